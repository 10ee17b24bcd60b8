"""SIGTERM and SIGUSR1: what a process hears, what all processes do, what is left to continue from."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from skipvision_train.training import signals
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.checkpoints import all_checkpoints, newest_complete
from skipvision_train.training.run import run_stage
from skipvision_train.training.signals import AGAIN_SECONDS, ShieldedWorker, Stopped, StopRequest


class SignalAt(TrainerCallback):
    """Sends signals to this process while a step is under way."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def steps_and_losses(run):
    return [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl")]


@pytest.fixture
def killed(monkeypatch):
    """What the process sends to itself, in place of sending it; the signals' actions as before."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    sent = []
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: sent.append((pid, number)))
    yield sent
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_signal_ends_the_process_by_its_default_action(killed):
    now = [10.0]
    request = StopRequest(lambda: now[0])
    request.hear(signal.SIGUSR1)
    now[0] += AGAIN_SECONDS / 2
    request.hear(signal.SIGTERM)  # the launcher passes on what came directly as well
    assert killed == []
    assert request.number == signal.SIGUSR1
    now[0] += AGAIN_SECONDS
    request.hear(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_forked_helper_leaves_signals_to_its_parent(killed, monkeypatch):
    request = StopRequest(lambda: 0.0)
    monkeypatch.setattr(signals.os, "getpid", lambda: request.process + 1)
    request.hear(signal.SIGTERM)
    assert request.number == 0


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.number == signal.SIGUSR1
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_a_worker_still_does_what_it_was_to_begin_with(killed):
    begun = []
    ShieldedWorker(begun.append)(3)
    assert begun == [3]
    assert {signal.getsignal(number) for number in signals.SIGNALS} == {signal.SIG_IGN}
    ShieldedWorker(None)(3)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_stopped_run_goes_on_bit_for_bit(make_cfg, tmp_path, number):
    """Stopped in a step after which nothing would have been saved, and with workers in the process group."""
    whole = make_cfg(f"trainer.output_dir={tmp_path / 'whole'}", "trainer.save_every=0")
    run_stage(whole)
    cfg, run = make_cfg("trainer.save_every=0"), tmp_path / "run"
    with pytest.raises(Stopped) as stopped:
        run_stage(cfg, (SignalAt(3, number),))
    assert stopped.value.code == 128 + number
    assert stopped.value.step == 3
    assert newest_complete(run)[0] == run / "checkpoint-3"
    assert not (run / "model").exists()
    final = run_stage(cfg)
    assert steps_and_losses(run) == steps_and_losses(tmp_path / "whole")
    ours, theirs = load_file(final / "model.safetensors"), load_file(tmp_path / "whole/model/model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_lines_of_a_stopped_run_cover_every_step_once(make_cfg, tmp_path):
    """With a line for several steps, the stop ends one early and the continued run starts a new one."""
    cfg = make_cfg("trainer.log_every=4", "trainer.save_every=0")
    with pytest.raises(Stopped):
        run_stage(cfg, (SignalAt(2, signal.SIGTERM),))
    run_stage(cfg)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4]
    whole = make_cfg("trainer.save_every=0", f"trainer.output_dir={tmp_path / 'whole'}")
    run_stage(whole)
    each = {row["step"]: row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")}
    assert rows[-1]["supervised_tokens"] == each[3]["supervised_tokens"] + each[4]["supervised_tokens"]
    assert rows[-1]["loss"] == pytest.approx((each[3]["loss"] + each[4]["loss"]) / 2, abs=1e-6)


def test_a_signal_in_the_last_step_changes_nothing(make_cfg, tmp_path):
    final = run_stage(make_cfg("trainer.save_every=0"), (SignalAt(4, signal.SIGTERM),))
    assert final == tmp_path / "run" / "model"
    assert all_checkpoints(tmp_path / "run") == []


class SignalWorkers(TrainerCallback):
    """What a launcher does that signals the whole process group: the loader's workers get it too."""

    def __init__(self, children: Path) -> None:
        self.children = children
        self.signalled = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for worker in map(int, self.children.read_text().split()):
                if b"resource_tracker" not in Path(f"/proc/{worker}/cmdline").read_bytes():
                    os.kill(worker, signal.SIGTERM)
                    self.signalled += 1


def test_workers_leave_signals_to_the_training_process(make_cfg):
    callback = SignalWorkers(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children"))
    run_stage(make_cfg("trainer.save_every=0", "trainer.workers=2"), (callback,))
    assert callback.signalled >= 2


def stub(folder, name, text):
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("asked", "ends", "requeued"), [(True, 138, True), (True, 0, False), (False, 1, False)])
def test_the_batch_script_passes_the_signal_on_and_queues_again(pytestconfig, tmp_path, asked, ends, requeued):
    """Slurm's programs replaced: srun runs its command here, and a torchrun that ends as it is told to."""
    said = tmp_path / "said"
    stub(tmp_path, "scontrol", f'if [[ $1 == requeue ]]; then echo "requeue $2" >> {said}; else echo node-1; fi')
    stub(tmp_path, "srun", 'exec "$@"')
    listen = f"trap 'exit {ends}' USR1; kill -USR1 $PPID; while :; do read -rt 1 <> <(:); done"
    stub(tmp_path, "torchrun", listen if asked else f"exit {ends}")
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-1"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "8"}
    script = pytestconfig.rootpath / "launch" / "slurm.sbatch"
    done = subprocess.run(["bash", script, "experiment=tiny"], env=environment, timeout=60, check=False)
    assert said.exists() == requeued
    assert done.returncode == (0 if requeued else ends)
