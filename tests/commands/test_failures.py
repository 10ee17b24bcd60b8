"""What stops a command behind its configuration is one line as well: too little memory, places that take no file."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import pytest
import torch

from skipvision_train import cli


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line in this process, in an empty folder; the last line of stderr of one that fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipvision"])

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 1
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("name", "overrides", "ways"),
    [
        ("evaluate", ["checkpoint=m", "recipe=r", "output=o"], "batch_size below 16 or precision=bf16"),
        ("calibrate", ["checkpoint=m", "output=o", "precision=bf16"], "max_rows below 8"),
        ("train", ["trainer.per_device_batch=4"], "trainer.per_device_batch below 4"),
        ("sketches", ["output=o"], "a device with more memory"),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_takes_less(command, monkeypatch, name, overrides, ways):
    def fill(cfg: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr(import_module(f"skipvision_train.commands.{name}"), "run", fill)
    found = command(name, *overrides)
    assert found == f"error: too little memory: CUDA out of memory. Tried to allocate 2.00 GiB.; try {ways}"


def test_other_errors_of_torch_keep_their_traceback(monkeypatch, tmp_path):
    def fail(cfg: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipvision"])
    monkeypatch.setattr(import_module("skipvision_train.commands.train"), "run", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["train"])


@pytest.mark.parametrize(("output", "reason"), [("folder", "Is a directory"), ("file/x.html", "File exists")])
def test_a_report_that_cannot_be_written_is_one_line_and_leaves_nothing(command, tmp_path, output, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "vig.json").write_text(json.dumps({"scores": [0.5, 0.0], "layers": [1]}))
    found = command("report", "vig=[vig.json]", f"output={output}")
    assert found == f"error: output: {output} cannot be written: {reason}"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file", "vig.json"}
