"""``benchmarks/crash.py`` and ``equivalence.py``: moments, what is read, and that a wrong end is an error."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from skipvision_train.training.checkpoints import CheckpointInfo, mark_complete

STEPS = 6


@pytest.fixture(scope="module")
def scripts(pytestconfig: pytest.Config) -> Iterator[SimpleNamespace]:
    """The modules of ``benchmarks/``, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
        import crash
        import equivalence
        import stopping
        import two_processes

        yield SimpleNamespace(crash=crash, equivalence=equivalence, stopping=stopping, two_processes=two_processes)


def write_run(run: Path, weight: float = 1.0, loss: float = 2.0, steps: int = STEPS, name: str = "w") -> Path:
    """A finished run: its lines, and a model of two tensors, the first of which never differs."""
    (run / "model").mkdir(parents=True)
    lines = [{"step": step, "loss": loss / step} for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({"a": torch.ones(3), name: torch.tensor([0.5, weight])}, run / "model" / "model.safetensors")
    (run / "model" / "config.json").write_text("{}")
    return run


def write_checkpoint(run: Path, step: int, whole: bool = True) -> None:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state").write_text("state")
    if whole:
        mark_complete(folder, CheckpointInfo(step, 2, "none"))


def test_stops_come_in_all_combinations_and_their_moments_from_the_seed(scripts):
    """Twelve in a row: two signals, two places, three who are told; each moment in reach of the next start."""
    chosen = [scripts.stopping.choice(number) for number in range(24)]
    assert len(set(chosen[:12])) == 12
    assert chosen[12:] == chosen[:12]
    assert len(set(chosen[:4])) == 4
    assert {(number, place) for number, place, _ in chosen[:4]} == {
        (number, place) for number in (signal.SIGTERM, signal.SIGUSR1) for place in ("step", "save")
    }

    def moments(seed):
        draw = random.Random(seed)
        return [scripts.two_processes.next_kill(draw, 3, 50, 4, pair[1:]) for pair in chosen]

    assert moments("0/ddp") == moments("0/ddp") != moments("1/ddp")
    for kill, (_, place, who) in zip(moments("0/ddp"), chosen, strict=True):
        assert (kill.place, kill.victim) == (place, who)
        assert kill.at == 4 if place == "save" else 4 <= kill.at <= 8
        assert 0 <= kill.delay <= 0.3


def test_what_a_run_has_reached_is_read_off_its_folder(scripts, tmp_path):
    watched = scripts.two_processes
    assert (watched.last_step(tmp_path), watched.resumed_step(tmp_path)) == (0, 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 4, whole=False)
    assert (watched.last_step(tmp_path), watched.resumed_step(tmp_path)) == (4, 3)
    for place, at, files, expected in [
        ("step", 4, 0, True),
        ("step", 5, 0, False),
        ("save", 4, 1, True),  # one file is there
        ("save", 4, 2, False),
        ("save", 3, 16, True),  # complete
    ]:
        assert watched.reached(tmp_path, watched.Kill(place, at, "all", files=files)) is expected


def test_the_grace_period_is_that_of_the_batch_script(scripts, pytestconfig):
    text = (pytestconfig.rootpath / "launch" / "slurm.sbatch").read_text()
    grace = scripts.stopping.Grace.read(text)
    assert grace.grace == 300
    assert 0 < grace.shutdown < grace.grace  # what is left is for the launcher and Slurm
    with pytest.raises(ValueError, match="no --signal"):
        scripts.stopping.Grace.read(text.replace("--signal", "--sign"))


@pytest.mark.parametrize(
    ("changes", "same", "weights", "losses"),
    [
        ({}, True, 0.0, 0.0),
        ({"weight": 1.25}, False, 0.25, 0.0),
        ({"weight": 1 + 2**-23}, False, 2**-23, 0.0),  # the last bit
        ({"weight": float("nan")}, False, float("inf"), 0.0),
        ({"name": "other"}, False, float("inf"), 0.0),
        ({"loss": 3.0}, False, 0.0, 1.0),
        ({"steps": STEPS - 1}, False, 0.0, 0.0),
    ],
    ids=["same", "weight", "last bit", "no number", "missing weight", "loss", "missing step"],
)
def test_a_run_differs_by_a_weight_a_loss_or_a_step(scripts, tmp_path, changes, same, weights, losses):
    reference, run = write_run(tmp_path / "whole"), write_run(tmp_path / "run", **changes)
    assert scripts.crash.difference(run, reference) == {"same": same, "weights": weights, "losses": losses}


END = {"engine": "ddp", "case": "the end", "same": True, "weights": 0.0, "losses": 0.0}
KILL = {"engine": "ddp", "case": "1: all, after step 4", "lost": 3}
STOP = {
    "engine": "ddp", "case": "1: SIGTERM", "signal": signal.SIGTERM, "statuses": [143, 143],
    "ended_s": 9.0, "saved_s": 1.0, "reached": 5, "start": 5, "lost": 0, "from": 3, "finished": False,
}  # fmt: skip


def test_kills_may_cost_an_interval_of_saving_and_no_more(scripts):
    found = scripts.crash.complaints
    assert found([KILL, END], every=3) == []
    assert found([{**KILL, "lost": 4}, END], every=3) == [
        "ddp 1: all, after step 4: lost 4 steps, with a checkpoint every 3"
    ]
    assert found([{**KILL, "lost": -1}, END], every=3) != []
    (line,) = found([KILL, {**END, "same": False, "weights": 0.5}], every=3)
    assert "the end differs from that of the run left alone: weights by up to 0.5" in line


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"signal": signal.SIGUSR1, "statuses": [138, 138]}, None),
        ({"signal": signal.SIGUSR1}, "the status of both processes should be 138"),
        ({"statuses": [143, 137]}, "the status of both processes should be 143"),
        ({"statuses": [143]}, "the status of both processes should be 143"),
        ({"ended_s": 10.5}, "ended after 10.5 s, the grace period is 10 s"),
        ({"lost": 1, "reached": 6}, "step 6 was done, the newest whole checkpoint is of step 5"),
        ({"from": 5}, "no step since 5, with which it began, was saved"),
        ({"finished": True, "statuses": [0, 0]}, "the run was over before it could stop; use more --steps"),
    ],
)
def test_a_stop_is_judged(scripts, changes, complaint):
    expected = [] if complaint is None else [f"ddp 1: SIGTERM: {complaint}"]
    assert scripts.stopping.complaints([{**STOP, **changes}, END], 1, grace=10) == expected


def test_fewer_stops_than_asked_for_and_another_end_are_errors(scripts):
    assert scripts.stopping.complaints([STOP, END], 3, grace=10) == [
        "ddp: 1 of 3 stops before the run was over; use more --steps"
    ]
    (line,) = scripts.stopping.complaints([STOP, {**END, "same": False, "losses": 0.25}], 1, grace=10)
    assert "losses by up to 0.25" in line


def test_statuses_are_read_by_rank(scripts, tmp_path):
    for name, text in (("1", "138"), ("0", "143"), ("entry", "#!")):
        (tmp_path / name).write_text(text)
    assert scripts.stopping.Told.statuses(SimpleNamespace(folder=tmp_path)) == [143, 138]


@pytest.fixture
def staged(scripts, monkeypatch, tmp_path):
    """``crash.main`` with runs that are written and not trained; gives a function that runs it."""

    def run_folder(words):
        return Path(next(word for word in words if word.startswith("trainer.output_dir=")).partition("=")[2])

    def run_it(*options, lost=0, **changes):
        def complete(words, log, processes=2):
            run = run_folder(words)
            write_run(run, **({} if run.name.endswith("whole") else changes))

        def crash(words, run, kill, log, processes=2):
            row = {"case": str(kill), "refused": None, "reached": 3, "start": 3 - lost, "lost": lost}
            return row | {"ended_s": 1.0, "from": 0}

        def stop(words, run, kill, number, log, grace):
            row = {**STOP, "case": str(kill), "refused": None, "signal": int(number), "lost": lost}
            return row | {"statuses": [128 + number] * 2}

        for module in (scripts.crash, scripts.stopping):
            monkeypatch.setattr(module, "complete", complete)
        monkeypatch.setattr(scripts.crash, "prepare", lambda folder: [])
        monkeypatch.setattr(scripts.crash, "crash", crash)
        monkeypatch.setattr(scripts.stopping, "stop", stop)
        scripts.crash.main(["--engines", "ddp", "zero2", "--steps", "6", "--folder", str(tmp_path / "runs"), *options])

    return run_it


BOTH = ("--kills", "2", "--sigterm", "3")


def test_the_script_ends_well_if_all_is_well(staged, capsys):
    staged(*BOTH)
    *lines, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)
    assert [(row["engine"], "signal" in row) for row in rows] == [
        (engine, stop) for engine in ("ddp", "zero2") for stop in [False] * 3 + [True] * 3 + [False]
    ]
    assert lines[-1] == "all ends bit for bit those of the runs left alone"
    assert any("here 300 s; 6 stops took 9.0 to 9.0 s" in line for line in lines)


@pytest.mark.parametrize("part", [("--kills", "2"), ("--kills", "0", "--sigterm", "2")], ids=["kills", "stops"])
@pytest.mark.parametrize("wrong", [{"weight": 1.5}, {"loss": 2.5}, {"steps": STEPS - 1}, {"lost": 4}])
def test_the_script_fails_if_something_is_wrong(staged, capsys, part, wrong):
    with pytest.raises(SystemExit) as ended:
        staged(*part, **wrong)
    assert ended.value.code == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(json.loads(last)) == 6
    assert {line.split()[1].strip(":") for line in lines if line.startswith("WRONG: ")} == {"ddp", "zero2"}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"loss": 2.0 * (1 + 0.5e-6)}, True),
        ({"loss": 2.0 * (1 + 2e-6)}, False),  # each step within its tolerance, the mean not
        ({"weight": 1 + 5e-6}, True),
        ({"weight": 1 + 2e-5}, False),
    ],
    ids=["same", "rounding", "drift", "near", "wrong weight"],
)
def test_arrangements_are_judged_by_loss_drift_and_weights(scripts, tmp_path, changes, same):
    reference, run = write_run(tmp_path / "run-0"), write_run(tmp_path / "run-1", **changes)
    row = scripts.equivalence.compare("zero2", run, reference)
    assert row["same"] is same
    assert row["weights"] == pytest.approx(abs(changes.get("weight", 1) - 1), rel=0.05)
    assert row["drift"] == pytest.approx(abs(changes.get("loss", 2) / 2 - 1), rel=1e-3)


def test_one_loss_out_of_tolerance_is_seen_though_the_mean_is_right(scripts, tmp_path):
    reference, run = write_run(tmp_path / "run-0"), write_run(tmp_path / "run-1")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, change in ((1, 1e-5), (4, -1e-5)):
        rows[step]["loss"] *= 1 + change
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = scripts.equivalence.compare("zero2", run, reference)
    assert row["drift"] < scripts.equivalence.DRIFT
    assert row["loss"] == pytest.approx(1e-5, rel=1e-3)
    assert row["same"] is False


def test_a_series_with_a_step_less_is_an_error(scripts, tmp_path):
    reference, run = write_run(tmp_path / "run-0"), write_run(tmp_path / "run-1", steps=STEPS - 1)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        scripts.equivalence.compare("zero2", run, reference)


@pytest.mark.parametrize("wrong", [False, True])
def test_equivalence_fails_if_an_arrangement_differs(scripts, capsys, monkeypatch, wrong):
    def run(case, folder, output, rows):
        write_run(output, weight=1.1 if wrong and case.overrides else 1.0)

    monkeypatch.setattr(scripts.equivalence, "prepare", lambda *args: None)
    monkeypatch.setattr(scripts.equivalence, "run", run)
    words = ["--cases", "zero2", "checkpointing"]
    if wrong:
        with pytest.raises(SystemExit) as ended:
            scripts.equivalence.main(words)
        assert ended.value.code == 1
    else:
        scripts.equivalence.main(words)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["case"], row["same"]) for row in rows] == [
        ("one process", True),
        ("zero2", not wrong),
        ("checkpointing", not wrong),
    ]
