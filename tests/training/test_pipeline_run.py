"""Two real stages by one command."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from skipvision_train.cli import run_command
from skipvision_train.training.callbacks import read_metrics


def test_two_stages_and_again(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    words = f"overrides=['--config-dir={workspace / 'conf'}','trainer.max_steps=2','trainer.save_every=0']"
    each = "each=['stage.name=one','stage.name=two stage.lr.llm=null']"
    arguments = ["stages=[tiny,tiny]", f"output={tmp_path}", words, each]
    run_command("pipeline", arguments)
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("1_tiny", "2_tiny"))
    assert capsys.readouterr().out == f"{tmp_path / '2_tiny' / 'model'}\n"
    frozen = [name for name in first if name.startswith("language_model")]
    assert frozen
    assert all(torch.equal(first[name], second[name]) for name in frozen)  # the second stage began with the first one's
    assert any(not torch.equal(first[name], second[name]) for name in first)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("1_tiny", "2_tiny")]
    assert [len(rows) for rows in lines] == [2, 2]
    run_command("pipeline", arguments)
    assert [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("1_tiny", "2_tiny")] == lines
