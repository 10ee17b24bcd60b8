"""Stages with packed rows: the step is that of the samples alone, and a resumed run goes on where it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from interrupted import InterruptAfter, InterruptionError
from launched import launch

from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.run import assemble, run_stage

PACKED = ("data.pack=true", "data.pack_length=320")


def metrics(run: Path):
    return read_metrics(run / "metrics.jsonl")


def test_a_packed_step_is_that_of_the_samples(make_cfg, tmp_path):
    """All twelve samples in one step: as rows of their own, and packed. Measuring lengths draws no weights anew."""
    rows = assemble(make_cfg(*PACKED)).feed.rows
    assert rows < 12
    for name, batch, overrides in (("alone", 12, ()), ("packed", rows, PACKED)):
        steps = (f"trainer.per_device_batch={batch}", f"trainer.global_batch={batch}", "trainer.max_steps=1")
        run_stage(make_cfg(*overrides, *steps, f"trainer.output_dir={tmp_path / name}"))
    (alone,), (packed,) = metrics(tmp_path / "alone"), metrics(tmp_path / "packed")
    assert packed["supervised_tokens"] == alone["supervised_tokens"]
    assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert packed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("plan", ["skip_ffn", "dense"])
def test_a_resumed_packed_run_gives_the_same_losses(make_cfg, tmp_path, workers, plan):
    """Two steps make an epoch; the run stops in the first epoch and in the second."""
    batch = ("trainer.per_device_batch=1", "trainer.global_batch=2", "trainer.max_steps=5", "trainer.save_every=1")
    overrides = (*PACKED, *batch, f"trainer.workers={workers}", f"plan.method={plan}")
    run_stage(make_cfg(*overrides, f"trainer.output_dir={tmp_path / 'whole'}"))
    losses = [row["loss"] for row in metrics(tmp_path / "whole")]
    assert len(losses) == 5
    for step in (1, 3):
        cfg = make_cfg(*overrides, f"trainer.output_dir={tmp_path / str(step)}")
        with pytest.raises(InterruptionError):
            run_stage(cfg, (InterruptAfter(step),))
        run_stage(cfg)
        assert [row["loss"] for row in metrics(tmp_path / str(step))] == losses


@pytest.mark.distributed
def test_two_processes_take_the_packed_steps_of_one_also_resumed(make_cfg, workspace, tmp_path):
    """Resumed in the middle of the second epoch, which has two steps."""
    batch = ("trainer.per_device_batch=1", "trainer.global_batch=2", "trainer.max_steps=5", "trainer.save_every=1")
    overrides = (*PACKED, *batch, "trainer.keep_checkpoints=0")
    run_stage(make_cfg(*overrides, f"trainer.output_dir={tmp_path / 'one'}"))
    expected = pytest.approx([row["loss"] for row in metrics(tmp_path / "one")], rel=1e-6)
    run = tmp_path / "two"
    launch(workspace, run, *overrides)
    assert [row["loss"] for row in metrics(run)] == expected
    shutil.rmtree(run / "model")
    for step in (4, 5):
        shutil.rmtree(run / f"checkpoint-{step}")
    launch(workspace, run, *overrides, "trainer.workers=1")
    assert [row["loss"] for row in metrics(run)] == expected
