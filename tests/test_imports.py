"""What importing costs and needs: the help is instant, and models work in an environment without Hydra."""

from __future__ import annotations

import subprocess
import sys

import pytest

import skipvision_train


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_and_the_command_line_import_no_torch():
    assert not {"torch", "transformers", "hydra"} & modules_after("import skipvision_train, skipvision_train.cli")


def test_inference_needs_no_hydra():
    """transformers and DeepSpeed import what they find; what counts is that nothing of ours fails without Hydra."""
    ours = ("plans", "models.build", "data.processor", "calibration.vig", "evaluation.evaluate", "auto")
    missing = "sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'wandb')))"
    modules_after(f"{missing}\nimport {', '.join(f'skipvision_train.{name}' for name in ours)}")


def test_exports_are_there():
    for name in skipvision_train.__all__:
        assert getattr(skipvision_train, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = skipvision_train.nothing_like_this
