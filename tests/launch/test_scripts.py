"""The launch scripts with real processes: one node, two nodes that meet on the loopback, Slurm with stand-ins."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.checkpoints import newest_complete
from skipvision_train.training.scaling_plan import Parameters, checkpoint_bytes

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def start(command, environment, folder, log):
    """Start a script; its output goes to a file, so that it can be read before the end and never fills a pipe."""
    return subprocess.Popen(
        list(map(str, command)), env=environment, cwd=folder, stdout=log.open("w"), stderr=subprocess.STDOUT
    )


def check_finished(process, log):
    assert process.wait(timeout=600) == 0, log.read_text()[-6000:]


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def step_was_logged(run, process, log):
    """Wait until the run has logged a step, or fail with its output if it ends before."""
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(log.read_text()[-6000:])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("launch")


def test_two_nodes_take_the_steps_of_one(shared, arguments, environment):
    """Two torchrun.sh with one process each meet on the loopback, beside one with two processes."""
    one, two = shared / "one", shared / "two"
    script, log = LAUNCH / "torchrun.sh", shared / "torchrun.log"
    check_finished(start([script, *arguments(one)], environment, shared, log), log)
    nodes = [
        (start([script, *arguments(two)], environment | {"NODES": "2", "NODE_RANK": rank, "PROCESSES": "1"}, shared,
               shared / f"node-{rank}.log"), shared / f"node-{rank}.log")
        for rank in "01"
    ]  # fmt: skip
    for process, said in nodes:
        check_finished(process, said)
    assert len(losses(one)) == 3
    assert losses(two) == losses(one)
    assert "1 samples x 2 processes" in nodes[0][1].read_text()
    assert "finished: " not in nodes[1][1].read_text()  # the other node is quiet


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_the_deepspeed_launcher(shared, arguments, environment, engine):
    """A run, and a checkpoint of the size that plan-run says."""
    run, log = shared / engine, shared / f"{engine}.log"
    overrides = [f"deepspeed={engine}", *(["deepspeed.persistence_threshold=0"] if engine == "zero3" else [])]
    check_finished(start([LAUNCH / "deepspeed.sh", *arguments(run, *overrides)], environment, shared, log), log)
    assert len(losses(run)) == 3
    path, info = newest_complete(run)
    assert info.processes == 2
    weights = sum(tensor.numel() for tensor in load_file(run / "model" / "model.safetensors").values())
    # Measured: 3 % (ZeRO-2) more, of names and metadata, which do not grow with the model.
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.suffix in (".pt", ".safetensors"))
    assert stored == pytest.approx(checkpoint_bytes(Parameters(weights, weights, weights), engine, "fp32"), rel=0.12)


def test_a_sweep_trains_one_job_after_the_other(shared, arguments, environment):
    """The command of docs/cluster.md: equal jobs in one process give equal losses, so none leaves anything behind."""
    log = shared / "sweep.log"
    stage = [argument for argument in arguments(shared) if not argument.startswith("trainer.output_dir")]
    command = ["skipvision", "train", "--multirun", *stage, "trainer.output_dir=lr-${stage.lr.llm}/${data.order}",
               "stage.lr.llm=1e-3,5e-3", "data.order=shuffle,sequential"]  # fmt: skip
    check_finished(start(command, environment, shared, log), log)
    alone = shared / "alone.log"
    last = [*stage, "trainer.output_dir=alone", "stage.lr.llm=5e-3", "data.order=sequential"]
    check_finished(start(["skipvision", "train", *last], environment, shared, alone), alone)
    runs = [shared / f"lr-{rate}" / order for rate in ("0.001", "0.005") for order in ("shuffle", "sequential")]
    assert [len(losses(run)) for run in runs] == [3] * 4
    assert losses(runs[3]) == losses(shared / "alone")
    assert len({tuple(losses(run)) for run in runs}) == 4


@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_queues_again_and_goes_on(tmp_path, arguments, slurm, nodes):
    """Signalled while it trains, the job saves, is queued again, and the second start finishes from there."""
    run, log = tmp_path / "run", tmp_path / "job.log"
    slurm |= {"SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": ",".join(["127.0.0.1"] * nodes)}
    slurm["SLURM_GPUS_ON_NODE"] = str(2 // nodes)
    command = [
        "bash",
        tmp_path / "spool" / "slurm_script",
        *arguments(run, "trainer.max_steps=40", "trainer.save_every=0"),
    ]
    job = start(command, slurm, tmp_path, log)
    step_was_logged(run, job, log)
    os.kill(job.pid, signal.SIGUSR1)  # the batch shell alone, as --signal=B: does
    check_finished(job, log)
    assert (tmp_path / "requeued").read_text() == "17\n"
    path, info = newest_complete(run)
    assert 0 < info.step < 40
    assert not (run / "model").exists()
    check_finished(start(command, slurm, tmp_path, log), log)
    assert f"start from {path}" in log.read_text()
    assert len(losses(run)) == 40
    assert (run / "model").is_dir()
    assert (tmp_path / "requeued").read_text() == "17\n"  # finished, so not again


def test_slurm_does_not_queue_a_failure_again(tmp_path, arguments, slurm):
    log = tmp_path / "job.log"
    command = ["bash", tmp_path / "spool" / "slurm_script", *arguments(tmp_path / "run", "trainer.global_batch=3")]
    assert start(command, slurm, tmp_path, log).wait(timeout=600) != 0
    assert "error: trainer.global_batch: 3 is no multiple" in log.read_text()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "slurm.sbatch"])
def test_a_port_in_use_is_one_clear_line(script, tmp_path, slurm, arguments):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        done = subprocess.run(
            ["bash", LAUNCH / script, *arguments(tmp_path / "run")], env=slurm | {"MASTER_PORT": str(number)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        f"error: MASTER_PORT: something already listens on port {number} of this machine; "
        "set MASTER_PORT to a free one\n"
    )


def test_a_missing_hostfile_is_named(environment):
    done = subprocess.run(
        [LAUNCH / "deepspeed.sh"], env=environment | {"HOSTFILE": "/none"}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: HOSTFILE: /none does not exist")


def test_the_example_hostfile_is_one_that_deepspeed_reads():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(LAUNCH / "hostfile.example")) == {"node-1": 8, "node-2": 8}
