"""A run that is stopped and started again, as Weights & Biases has it on the disk without a network."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path

import pytest
import wandb
from transformers import TrainerCallback
from wandb.proto import wandb_internal_pb2

from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.run import run_stage
from skipvision_train.training.signals import Stopped

BLOCK = 2**15


def records(file: Path):
    """A .wandb file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB, of pieces with checksum (4 bytes),
    length (2) and kind (1: whole, 2: first, 3: in between, 4: last)."""
    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def lines(file):
    """What a start logged: the numbers of every line, by name."""
    found = []
    for record in records(file):
        if record.HasField("history"):
            found.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return found


class StopAt(TrainerCallback):
    """Asks the run to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_second_start_goes_on_with_the_first_ones_curves(make_cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg, run = make_cfg("trainer.wandb=offline", "trainer.save_every=0"), tmp_path / "run"
    files = []
    for callbacks in ((StopAt(2),), ()):
        if callbacks:
            with pytest.raises(Stopped):
                run_stage(cfg, callbacks)
        else:
            run_stage(cfg)
        wandb.teardown()  # waits for the process that writes the file
        files += [file for file in (run / "wandb").glob("offline-run-*/*.wandb") if file not in files]
    assert len(files) == 2
    first, second = (next(record for record in records(file) if record.HasField("run")).run for file in files)
    assert first.run_id == second.run_id == (run / "wandb_id.txt").read_text().strip()
    assert (first.project, first.display_name) == (second.project, second.display_name)

    logged = [lines(file) for file in files]
    assert [[line["step"] for line in part] for part in logged] == [[1, 2], [3, 4]]
    kept = read_metrics(run / "metrics.jsonl")
    assert [line["loss"] for part in logged for line in part] == [row["loss"] for row in kept]
    for file in files:  # curves are drawn over the run's own steps, not over those that wandb counts
        axes = {
            r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records(file) if r.HasField("metric")
        }
        assert axes["*"] == "step"
