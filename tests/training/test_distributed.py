"""Two real processes over gloo: plain, ZeRO-2, ZeRO-3, both launchers, against one process without DeepSpeed.

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

# An epoch has three steps. Micro batches of one sample: some hold no image while the other process's does.
CHANGES = ("trainer.per_device_batch=1", "trainer.max_steps=4", "trainer.save_every=2")

ZERO3 = ("deepspeed=zero3", "deepspeed.persistence_threshold=0")
"""Every tensor is sharded, as those of large models are; by default tiny ones would stay whole."""

SCRIPTS = Path(__file__).parents[2] / "launch"


def launch(script, workspace, run, *overrides, experiment="tiny"):
    """Start two processes with a script of ``launch/`` and wait; the output is shown if they fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PROCESSES": "2", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [str(SCRIPTS / script), "--config-dir", str(workspace / "conf"), f"experiment={experiment}",
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
    # Measured over four steps of Adam: losses differ by at most 9.4e-8 (relative) in all three runs, weights by at most
    # 6e-8 (plain), 1.2e-7 (ZeRO-2) and 3.1e-7 (ZeRO-3), absolute.
    assert losses(run) == pytest.approx(losses(reference), rel=1e-6)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (run, reference))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=3e-6, msg=key)


def test_without_deepspeed_by_torchrun(workspace, shared, reference):
    run = shared / "plain"
    launch("torchrun.sh", workspace, run)
    check_same(run, reference)


def test_zero2_by_torchrun(workspace, shared, reference):
    run = shared / "zero2"
    output = launch("torchrun.sh", workspace, run, "deepspeed=zero2")
    check_same(run, reference)
    assert "1 samples x 2 processes x 2 accumulated = 4 per step" in output
    assert output.count("finished: ") == 1  # the second process is quiet
    newest = newest_complete(run)
    assert newest is not None
    assert newest[1] == CheckpointInfo(4, 2, "zero2")


def test_zero3_by_the_deepspeed_launcher_and_resumed_by_torchrun(workspace, shared, reference):
    run = shared / "zero3"
    launch("deepspeed.sh", workspace, run, *ZERO3)
    check_same(run, reference)
    first = losses(run)

    # As after a crash while the last checkpoint was written.
    shutil.rmtree(run / "model")
    (run / "checkpoint-4" / "COMPLETE.json").unlink()
    output = launch("torchrun.sh", workspace, run, *ZERO3)
    assert f"start from {run / 'checkpoint-2'}" in output
    assert losses(run) == first
    check_same(run, reference)


def test_tiles_under_zero3(workspace, make_cfg, shared):
    """Images of 2, 3 and 4 tiles and none: processes whose batches are cut differently run the same modules."""
    cfg = make_cfg(*CHANGES, f"trainer.output_dir={shared / 'hd_one'}", experiment="tiny_hd")
    run_stage(cfg)
    launch("torchrun.sh", workspace, shared / "hd", *ZERO3, experiment="tiny_hd")
    check_same(shared / "hd", shared / "hd_one")
