"""A checkpoint of two processes, continued by one, two and four: the same steps, samples and losses.

What differs is the order of fp32 sums. Measured over the two steps after the change from two to four: the same losses,
weights at most 6e-8 (ZeRO-2) and 1.5e-8 (ZeRO-3) apart.
"""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from launched import launch
from safetensors.torch import load_file

from skipvision_train.errors import CheckpointError
from skipvision_train.training import universal
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.checkpoints import CheckpointInfo, mark_complete, newest_complete, read_marker

CHANGES = ("trainer.per_device_batch=1", "trainer.max_steps=4", "trainer.save_every=2", "stage.weight_decay=0.1")
ENGINES = {
    "ddp": (),
    "zero1": ("deepspeed=zero2", "deepspeed.stage=1"),
    "zero2": ("deepspeed=zero2",),
    "zero3": ("deepspeed=zero3", "deepspeed.persistence_threshold=0"),
}


def distance(run, reference):
    """Largest relative distance of a loss, and absolute one of a weight."""
    ours, theirs = ([row["loss"] for row in read_metrics(p / "metrics.jsonl")] for p in (run, reference))
    assert len(ours) == len(theirs) == 4
    losses = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    a, b = (load_file(p / "model" / "model.safetensors") for p in (run, reference))
    assert set(a) == set(b)
    return losses, max(float((a[key] - b[key]).abs().max()) for key in b)


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "processes"), [("ddp", 4), ("zero1", 4), ("zero2", 4), ("zero3", 4), ("zero3", 1)])
def test_a_checkpoint_of_two_processes_continued_by_others(workspace, tmp_path_factory, tmp_path, engine, processes):
    whole = tmp_path_factory.getbasetemp() / f"whole-{engine}"
    if not whole.exists():
        launch(workspace, whole, *CHANGES, *ENGINES[engine], processes=2)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoint-4")
    output = launch(workspace, run, *CHANGES, *ENGINES[engine], processes=processes)
    assert f"start from {run / 'checkpoint-2'}" in output
    assert ("cut anew for" in output) == (engine != "ddp")
    assert not (run / "checkpoint-2" / universal.FOLDER).exists()
    newest = newest_complete(run)
    assert newest is not None
    assert newest[1] == CheckpointInfo(4, processes, "none" if engine == "ddp" else engine)
    losses, weights = distance(run, whole)
    sys.stdout.write(f"\n{engine} 2 -> {processes}: losses {losses:.2g}, weights {weights:.2g}\n")
    assert losses < 1e-6
    assert weights < 3e-6


def test_groups_and_steps_are_put_right():
    """As DeepSpeed leaves them: every group like the first, one step counter for all."""
    tensors = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [t], "name": "llm", "lr": 0.5, "weight_decay": 0.1} for t in tensors])
    shared = torch.tensor(7.0)
    optimizer.state = {t: {"step": shared, "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)} for t in tensors}
    settings = [{"name": "llm", "lr": 1.0, "weight_decay": 0.1}, {"name": "vision", "lr": 1.0, "weight_decay": 0.0}]
    universal.put_right(optimizer, settings, [0.5, 0.25])
    found = [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [("llm", 0.5, 0.1), ("vision", 0.25, 0.0)]
    for tensor in tensors:
        tensor.grad = torch.ones(1)
    optimizer.step()
    assert [float(optimizer.state[tensor]["step"]) for tensor in tensors] == [8.0, 8.0]


def test_what_cannot_be_cut_anew_names_both_numbers(tmp_path):
    """The shards are gone: DeepSpeed has nothing to convert."""
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "latest").write_text("global_step2")
    mark_complete(tmp_path, CheckpointInfo(2, 2, "zero2"))
    with pytest.raises(CheckpointError, match=r"by 2 processes, .* for 4 \(FileNotFoundError: .*continue with 2"):
        universal.convert(tmp_path, 2, 4)
    assert not (tmp_path / universal.FOLDER).exists()
    assert read_marker(tmp_path) is not None


def test_remains_of_a_conversion_are_removed_before_and_behind_one(tmp_path, monkeypatch):
    from deepspeed.checkpoint import ds_to_universal

    remains = tmp_path / universal.FOLDER, tmp_path / universal.LATEST
    (tmp_path / "latest").write_text("global_step2")
    found = []

    def begin(options):
        found.append([path.exists() for path in remains])
        remains[0].mkdir()
        remains[1].write_text(universal.FOLDER)

    def fail(options):
        begin(options)
        raise OSError("no space")

    monkeypatch.setattr(ds_to_universal, "main", begin)
    universal.convert(tmp_path, 2, 4)
    monkeypatch.setattr(ds_to_universal, "main", fail)
    with pytest.raises(CheckpointError, match="no space"):
        universal.convert(tmp_path, 2, 4)
    assert found == [[False, False]] * 2
    assert not any(path.exists() for path in remains)
