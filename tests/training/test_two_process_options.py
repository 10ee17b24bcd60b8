"""Adapters and the moving average of the weights on two real processes, against one process."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from launched import launch
from safetensors.torch import load_file

from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.run import run_stage

pytestmark = pytest.mark.distributed

# An epoch has three steps. Micro batches of one sample: some hold no image while the other process's does.
CHANGES = ("trainer.per_device_batch=1", "stage.warmup_ratio=0")
LORA = {"rank": 3, "alpha": 6, "targets": ["q_proj", "down_proj"]}
EMA = "stage.ema_decay=0.75"
ENGINES = {
    "ddp": (),
    "zero2": ("deepspeed=zero2",),
    "zero3": ("deepspeed=zero3", "deepspeed.persistence_threshold=0"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture
def reference(make_cfg, shared):
    """The finished model of one process without DeepSpeed, under an option; each trained once."""

    def train(name, option):
        return run_stage(make_cfg(*CHANGES, option, f"trainer.output_dir={shared / name}"))

    return train


@pytest.fixture
def adapted(workspace, tmp_path):
    """The workspace, its stage with adapters."""
    stage = yaml.safe_load((workspace / "conf" / "experiment" / "tiny.yaml").read_text())
    stage["stage"]["lora"] = LORA
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = f"# @package _global_\n{yaml.safe_dump(stage, sort_keys=False)}"
    (tmp_path / "conf" / "experiment" / "tiny.yaml").write_text(text)
    return tmp_path


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def check_same(file, reference):
    # Measured over four steps of Adam, absolute: weights differ by at most 4.2e-7 with adapters (1.2e-6 under ZeRO-3),
    # the adapters by 1.1e-7, averages by 1.8e-7.
    ours, theirs = load_file(file), load_file(reference)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=3e-6, msg=key)


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_are_those_of_one_process(adapted, tmp_path, reference, engine):
    """What was trained of the language model, and the plain weights that it is merged into."""
    run = tmp_path / "run"
    one = reference("lora", f"stage.lora={json.dumps(LORA)}")
    launch(adapted, run, *CHANGES, *ENGINES[engine])
    assert losses(run) == pytest.approx(losses(one.parent), rel=1e-6)
    check_same(run / "model" / "model.safetensors", one / "model.safetensors")
    check_same(run / "model" / "adapters.safetensors", one / "adapters.safetensors")


@pytest.mark.parametrize("engine", ["ddp", "zero2"])  # ZeRO-3 is refused, see test_stage_options.py
def test_the_average_is_that_of_one_process_and_goes_on_where_it_was(workspace, tmp_path, reference, engine):
    run = tmp_path / "run"
    one = reference("ema", EMA)
    launch(workspace, run, *CHANGES, EMA, *ENGINES[engine])
    assert losses(run) == pytest.approx(losses(one.parent), rel=1e-6)
    check_same(run / "model" / "model.safetensors", one / "model.safetensors")
    check_same(run / "checkpoint-4" / "average.safetensors", one.parent / "checkpoint-4" / "average.safetensors")
    first, last = load_file(run / "model" / "model.safetensors"), run / "checkpoint-4"
    assert any(not torch.equal(value, first[key]) for key, value in load_file(last / "model.safetensors").items())

    # As after a crash while the last checkpoint was written.
    shutil.rmtree(run / "model")
    (last / "COMPLETE.json").unlink()
    output = launch(workspace, run, *CHANGES, EMA, *ENGINES[engine])
    assert f"start from {run / 'checkpoint-2'}" in output
    again = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in first.items())
