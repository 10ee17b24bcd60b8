"""Stages one after the other: what is started, what a failure and a signal leave, and two real ones."""

from __future__ import annotations

import json
import signal
import stat
import sys

import pytest

from skipvision_train.commands import pipeline
from skipvision_train.commands.pipeline import Config, run, run_stage, stage_commands
from skipvision_train.errors import ConfigError, SkipVisionError


@pytest.fixture
def launcher(tmp_path):
    """A launcher that notes its words and ends as the word ``status=N`` says."""
    path = tmp_path / "launch.py"
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(tmp_path / 'ran.jsonl')!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))\n"
        "sys.exit(next((int(w.split('=')[1]) for w in sys.argv if w.startswith('status=')), 0))\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def ran(tmp_path):
    return [json.loads(line) for line in (tmp_path / "ran.jsonl").read_text().splitlines()]


def test_every_stage_begins_with_the_model_of_the_one_before(launcher, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    cfg = Config(
        ["a", "table2/b"],
        str(tmp_path / "o"),
        ["x=1", "--config-dir=d"],
        ["llm=m"],
        ["r=1", "r=2 'p=q r'"],
        str(launcher),
    )
    run(cfg)
    one, two = tmp_path / "o" / "1_a", tmp_path / "o" / "2_table2_b"
    start = f"stage.start_from={one / 'model'}"
    assert ran(tmp_path) == [
        ["--config-dir=d", "experiment=a", f"trainer.output_dir={one}", "x=1", "llm=m", "r=1"],
        ["--config-dir=d", "experiment=table2/b", f"trainer.output_dir={two}", start, "x=1", "r=2", "p=q r"],
    ]
    assert capsys.readouterr().out == f"{two / 'model'}\n"


def test_a_stage_that_fails_ends_the_pipeline(launcher, tmp_path):
    cfg = Config(["a", "b", "c"], str(tmp_path), each=["", "status=3", ""], launcher=str(launcher))
    with pytest.raises(SkipVisionError, match=r"^stage 2 of 3, b, failed with exit status 3$"):
        run(cfg)
    assert len(ran(tmp_path)) == 2


@pytest.mark.parametrize("status", [143, 138])
def test_a_stage_that_was_stopped_hands_its_status_on(launcher, tmp_path, status):
    with pytest.raises(SystemExit) as ended:
        run(Config(["a", "b"], str(tmp_path), [f"status={status}"], launcher=str(launcher)))
    assert ended.value.code == status
    assert len(ran(tmp_path)) == 1


def test_a_signal_reaches_the_stage():
    """The stage tells its parent's process to signal itself, and ends with what it then receives."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "signal.pause()\n"
    )
    before = signal.getsignal(signal.SIGUSR1)
    assert run_stage([sys.executable, "-c", script]) == 138
    assert signal.getsignal(signal.SIGUSR1) == before
    assert run_stage([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Config([], "o"), "stages: none"),
        (Config(["a", "b"], "o", each=["x=1"]), "each: 1 texts for 2 stages"),
    ],
)
def test_what_cannot_be_run(cfg, message):
    with pytest.raises(ConfigError, match=message):
        stage_commands(cfg)


def test_not_inside_of_a_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="run it directly"):
        stage_commands(Config(["a"], "o"))


def test_a_launcher_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^launcher: /none/launch\.sh cannot be started: No such file"):
        pipeline.run_stage(["/none/launch.sh"])
