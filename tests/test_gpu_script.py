"""What is run on a rented GPU: that its commands exist, and that a run which is ended early leaves what it has."""

from __future__ import annotations

import json
import os
import subprocess
from types import ModuleType

import pytest


@pytest.fixture
def calibration(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import calibration

    return calibration


def test_the_gpu_script_names_commands_that_exist(pytestconfig):
    """It cannot run here: every file it names is there, and knows every option it is given."""
    root, script = pytestconfig.rootpath, pytestconfig.rootpath / "benchmarks/gpu.sh"
    shared = (root / "benchmarks/harness.py").read_text()
    refused = subprocess.run([script, "other"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    parts, seen = refused.stderr.partition("one of: ")[2].split(), []
    for part in parts:
        said = subprocess.run(
            [script, part], env={**os.environ, "RUN": "echo"}, capture_output=True, text=True, check=True
        )
        (line,) = said.stdout.splitlines()  # its limit of time is that of the part
        _, *words = line.split()
        file = next(word for word in words if word.endswith(".py"))
        text = (root / file).read_text() + shared
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in text, (file, option)
        seen.append(file)
    assert len(seen) == 11
    readme = (root / "benchmarks/README.md").read_text()
    assert all(f"`{part}`" in readme for part in parts)


def test_the_gpu_script_keeps_what_a_part_printed_before_it_ended(pytestconfig, tmp_path):
    """And its exit status. A stand-in for Python prints like it: at once, as it is told to by the environment."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$PYTHONUNBUFFERED $*"; echo warning >&2; kill $$\n')
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    env.pop("PYTHONUNBUFFERED", None)
    script = pytestconfig.rootpath / "benchmarks/gpu.sh"
    done = subprocess.run([script, "loop", tmp_path / "out"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + 15
    first, second = (tmp_path / "out" / "loop.txt").read_text().splitlines()
    assert first.startswith("1 benchmarks/training.py ")
    assert first.endswith(" --loop")
    assert second == "warning"
    assert done.stdout.splitlines() == [first, second]


TINY_CALIBRATION = ["--device", "cpu", "--layers", "2", "--visual", "8", "--text", "40", "--repeats", "2"]


def test_calibration_prints_every_time_when_it_is_taken(calibration, capsys, monkeypatch):
    calibration.main(TINY_CALIBRATION)
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["case"] == "cpu-2"
    assert result["largest_difference"] < 1e-5
    assert result["flops_ratio"] < 1
    begins = [f"round {n}, {name}: " for n in (1, 2) for name in ("plain", "shared")]
    assert [next(b for b in begins if line.startswith(b)) for line in lines if line.startswith("round")] == begins

    takes = iter([0.5])
    monkeypatch.setattr(calibration, "seconds", lambda run, device: next(takes))
    with pytest.raises(StopIteration):
        calibration.main(TINY_CALIBRATION)
    assert capsys.readouterr().out.splitlines()[-1] == "round 1, plain: 0.50 seconds"
