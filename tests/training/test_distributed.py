"""Two real processes over gloo: ZeRO-2, ZeRO-3, both launchers, against one process without DeepSpeed.

DeepSpeed compiles a small operator with g++ and ninja when it is first started on a machine (a minute or two); every
launch here finds the same ninja, because another version would compile it again.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.checkpoints import CheckpointInfo, newest_complete
from skipvision_train.training.run import run_stage

pytestmark = pytest.mark.distributed

# Micro batches of one sample over a whole epoch: some hold no image while the other process's does.
CHANGES = ("trainer.per_device_batch=1", "trainer.max_steps=3", "trainer.save_every=2")

TORCHRUN = ("torchrun", "--nproc_per_node=2", "--master_port={port}", "-m", "skipvision_train")
DEEPSPEED = ("deepspeed", "--num_accelerators", "2", "--master_port", "{port}", "--module", "skipvision_train")


def launch(launcher, workspace, run, *overrides):
    """Start two processes and wait; the output is shown if they fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scripts = Path(sys.executable).parent
    program, *arguments = [word.format(port=port) for word in launcher]
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(scripts / program), *arguments, "train", "--config-dir", str(workspace / "conf"), "experiment=tiny",
         f"trainer.output_dir={run}", *CHANGES, *overrides],
        cwd=run.parent, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture
def reference(make_cfg, shared):
    """One process, no DeepSpeed; run once."""
    cfg = make_cfg(*CHANGES, f"trainer.output_dir={shared / 'one'}")
    run_stage(cfg)
    return shared / "one"


def check_same(run, reference):
    # Measured: losses of the first step are equal; after three steps of Adam they differ by 1e-7, weights by 3e-7.
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (run, reference))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-5, msg=key)


def test_zero2_by_torchrun(workspace, shared, reference):
    run = shared / "zero2"
    output = launch(TORCHRUN, workspace, run, "deepspeed=zero2")
    check_same(run, reference)
    assert "1 samples x 2 processes x 2 accumulated = 4 per step" in output
    assert output.count("finished: ") == 1  # the second process is quiet
    newest = newest_complete(run)
    assert newest is not None
    assert newest[1] == CheckpointInfo(3, 2, "zero2")


def test_zero3_by_the_deepspeed_launcher_and_resumed_by_torchrun(workspace, shared, reference):
    run = shared / "zero3"
    launch(DEEPSPEED, workspace, run, "deepspeed=zero3")
    check_same(run, reference)
    first = losses(run)

    # As after a crash while the last checkpoint was written.
    shutil.rmtree(run / "model")
    (run / "checkpoint-3" / "COMPLETE.json").unlink()
    output = launch(TORCHRUN, workspace, run, "deepspeed=zero3")
    assert f"start from {run / 'checkpoint-2'}" in output
    assert losses(run) == first
    check_same(run, reference)
