"""The commands on a GPU, a real or a simulated one: what they write is what they write on the CPU."""

import json
import sys

import pytest
import torch
from simulated_gpu import a_gpu

from skipvision_train.commands import analyze, bench, calibrate, evaluate


def written(command, given, output, device):
    command.run(command.Config(**given, output=str(output), device=device))
    files = {file.name: json.loads(file.read_text()) for file in output.glob("*.json") if ".run." not in file.name}
    return {name: numbers(content) for name, content in files.items()}


def numbers(content, path=""):
    """Path -> every value that neither the device nor the clock decides."""
    if isinstance(content, dict):
        parts = {f"{path}.{k}": v for k, v in content.items() if k not in ("timing", "device", "seconds", "facts")}
    elif isinstance(content, list):
        parts = {f"{path}[{i}]": value for i, value in enumerate(content)}
    else:
        return {path: content}
    return {key: value for name, part in parts.items() for key, value in numbers(part, name).items()}


@pytest.mark.parametrize(
    ("command", "more"),
    [(evaluate, {"blind": True}), (calibrate, {"samples": 3}), (bench, {"limit": 2, "timing": False}), (analyze, {})],
    ids=["evaluate", "calibrate", "bench", "analyze"],
)
def test_a_command(checkpoint, data, tmp_path, monkeypatch, command, more):
    given = {"checkpoint": str(checkpoint), "recipe": str(data / "recipe.yaml"), "data_root": str(data), **more}
    expected = written(command, given, tmp_path / "cpu", "cpu")
    for module in [module for name, module in sys.modules.items() if name.startswith("skipvision_train")]:
        if hasattr(module, "choose_device"):
            monkeypatch.setattr(module, "choose_device", torch.device)
    with a_gpu():
        found = written(command, given, tmp_path / "gpu", "cuda")
    assert found.keys() == expected.keys()
    for file, values in expected.items():
        assert found[file].keys() == values.keys()
        for path, value in values.items():
            close = pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
            assert found[file][path] == close, (file, path)
