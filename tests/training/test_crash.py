"""Killed, damaged and stopped runs: the next start finds what is good, and the end is that of a run left alone."""

from __future__ import annotations

import random
import shutil
import signal
from types import ModuleType

import pytest
import torch
from interrupted import InterruptAfter, InterruptionError
from safetensors.torch import load_file

from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.checkpoints import all_checkpoints, newest_complete
from skipvision_train.training.run import run_stage


@pytest.fixture
def crash(pytestconfig, monkeypatch) -> ModuleType:
    """``benchmarks/crash.py``, imported as the scripts import each other."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import crash

    return crash


@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_a_flipped_bit_costs_the_steps_since_the_checkpoint_before(make_cfg, tmp_path, caplog, file):
    whole = make_cfg("trainer.max_steps=6", f"trainer.output_dir={tmp_path / 'whole'}")
    run_stage(whole)
    cfg = make_cfg("trainer.max_steps=6", "trainer.keep_checkpoints=0")
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(5),))
    damaged = tmp_path / "run" / "checkpoint-4" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with caplog.at_level("INFO"):
        final = run_stage(cfg)
    assert f"checkpoint-4: the content of {file} is not what was written" in caplog.text
    assert f"start from {tmp_path / 'run' / 'checkpoint-2'}" in caplog.text
    ours, theirs = load_file(final / "model.safetensors"), load_file(tmp_path / "whole/model/model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert newest_complete(tmp_path / "run")[1].step == 6


def test_with_no_sound_checkpoint_the_run_begins_anew(make_cfg, tmp_path, caplog):
    cfg = make_cfg()
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(3),))
    state = tmp_path / "run" / "checkpoint-2" / "scheduler.pt"
    state.write_bytes(bytes(state.stat().st_size))
    with caplog.at_level("INFO"):
        run_stage(cfg)
    assert "start from step 0" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("change", ["stage.schedule=constant", "stage.ema_decay=0.5"])
def test_a_run_that_died_behind_its_last_checkpoint_takes_no_further_step(make_cfg, tmp_path, change):
    """An epoch has three steps: the last one of two is in the middle of it."""
    cfg = make_cfg("trainer.max_steps=2", change)
    first = load_file(run_stage(cfg) / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "model")
    saved = (tmp_path / "run" / "checkpoint-2" / "COMPLETE.json").stat().st_mtime_ns
    again = load_file(run_stage(cfg) / "model.safetensors")
    assert all(torch.equal(again[key], first[key]) for key in first)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert [step for step, _ in all_checkpoints(tmp_path / "run")] == [2]
    assert (tmp_path / "run" / "checkpoint-2" / "COMPLETE.json").stat().st_mtime_ns == saved


def words(workspace, run, *changes):
    return [
        *("--config-dir", str(workspace / "conf"), "experiment=tiny", f"trainer.output_dir={run}"),
        *("trainer.per_device_batch=1", "trainer.max_steps=8", "trainer.save_every=2", *changes),
    ]


@pytest.mark.distributed
def test_killed_runs_end_like_one_left_alone(workspace, tmp_path, crash):
    """All processes in a save, one in a step; none outlives the kill, no more is lost than since the last save."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    crash.complete(words(workspace, whole, *crash.ENGINES["zero2"]), tmp_path / "whole.log")
    command = words(workspace, run, *crash.ENGINES["zero2"])
    for number, kill in enumerate((crash.Kill("save", 4, "all", files=2), crash.Kill("step", 5, "one", rank=1))):
        row = crash.crash(command, run, kill, tmp_path / f"{number}.log")
        assert 0 <= row["lost"] <= 4  # two steps of an interval, and those that were done while the kill was on its way
        assert row["reached"] >= kill.at
    crash.complete(command, tmp_path / "last.log")
    assert crash.difference(run, whole) == {"same": True, "weights": 0.0, "losses": 0.0}


@pytest.mark.distributed
@pytest.mark.parametrize("whom", ["one rank", "the launcher"])
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(workspace, tmp_path, crash, whom):
    run = tmp_path / "run"
    changes = ("trainer.max_steps=100000", "trainer.save_every=0", *crash.ENGINES["zero2"])
    launched = crash.Launched(words(workspace, run, *changes), tmp_path / "log")
    try:
        crash.wait_for(lambda: crash.last_step(run) >= 2 or not launched.running(), "two steps")
        ranks = launched.ranks()
        assert sorted(ranks) == [0, 1], (tmp_path / "log").read_text()[-3000:]
        if whom == "one rank":
            ranks[1].send_signal(signal.SIGUSR1)
        else:
            launched.launcher.send_signal(signal.SIGTERM)
        crash.wait_for(lambda: not launched.running(), "the end", 120)
        assert not any(crash.alive(process) for process in ranks.values())
    finally:
        launched.close()
    assert launched.launcher.returncode != 0
    newest = newest_complete(run)
    assert newest is not None, (tmp_path / "log").read_text()[-3000:]
    assert newest[1].step == crash.last_step(run)
    assert newest[1].processes == 2


def test_moments_come_from_the_seed_and_can_be_reached(crash):
    """Each within one interval of saving after the start, and before the end."""
    drawn = []
    for _ in range(2):
        draw = random.Random("0/zero2")
        pairs = (("step", "all"), ("save", "one"))
        drawn.append([crash.next_kill(draw, start, 20, 3, pair) for start in range(20) for pair in pairs])
    assert drawn[0] == drawn[1]
    for kill, start in zip(drawn[0][::2], range(20), strict=True):
        assert min(start + 1, 19) <= kill.at <= min(start + 4, 19)
    assert all(kill.at % 3 == 0 or kill.at == 20 for kill in drawn[0][1::2])


def test_a_difference_is_seen(crash, tmp_path):
    from safetensors.torch import save_file

    for name, value in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name / "model").mkdir(parents=True)
        save_file({"w": torch.tensor([value])}, tmp_path / name / "model" / "model.safetensors")
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {value}}}\n')
    assert crash.difference(tmp_path / "a", tmp_path / "b") == {"same": False, "weights": 0.5, "losses": 0.5}
    assert crash.difference(tmp_path / "a", tmp_path / "a")["same"]
