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
    ours = ("plans", "models.build", "data.processor", "calibration.scores", "evaluation.evaluate", "inference", "auto")
    missing = "sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'wandb')))"
    modules_after(f"{missing}\nimport {', '.join(f'skipvision_train.{name}' for name in ours)}")


RUN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from skipvision_train import plans
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import ResamplerConfig
from skipvision_train.models.settings import ReducerConfig, VisionConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration

text = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
import skipvision_train
model = LlamaForCausalLM(text)
with skipvision_train.apply(model, plans.fastv(1, 0.5), image_token_id=3):
    print(model(torch.tensor([[1, 3, 3, 3, 3, 2]])).logits.shape)
vision = VisionConfig(image_size=16, patch_size=4, width=8, layers=2, heads=1, depths=(1, 2))
connector = ResamplerConfig(windows=(4, 2), queries=(1, 4), head_dim=4)
config = SkipVisionConfig(text, vision, connector, ReducerConfig(local_keep=3), image_token_id=3)
model = SkipVisionForConditionalGeneration(config)
model.set_plan(plans.skip_ffn())
ids = torch.tensor([[1, *[3] * len(config.image_token_kinds()), 2]])
print(model(ids, pixel_values=torch.zeros(1, 3, 16, 16)).logits.shape)
"""


def test_plans_and_models_run_without_the_training_packages():
    """Inference users and other harnesses have neither Hydra nor DeepSpeed, wandb or datasets."""
    missing = "import sys\nfor n in ('hydra', 'omegaconf', 'deepspeed', 'wandb', 'datasets'): sys.modules[n] = None\n"
    run = subprocess.run([sys.executable, "-c", missing + RUN], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["torch.Size([1, 6, 9])", "torch.Size([1, 8, 9])"]


def test_exports_are_there():
    for name in skipvision_train.__all__:
        assert getattr(skipvision_train, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = skipvision_train.nothing_like_this
