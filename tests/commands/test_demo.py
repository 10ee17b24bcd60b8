"""The demo's own work: start commands, remember what is finished, collect numbers. The stages are stand-ins here."""

from __future__ import annotations

import json
import sys

import pytest

from skipvision_train.commands import demo
from skipvision_train.errors import ConfigError, SkipVisionError


def scores(accuracy, low, high, **extra):
    return {"accuracy": accuracy, "interval": [low, high], "total": 200, **extra}


@pytest.fixture
def output(tmp_path):
    """A folder as the real stages leave it."""
    tasks = {"count": scores(0.9, 0.85, 0.94), "text": scores(0.2, 0.15, 0.26)}
    blind = {"count": scores(0.2, 0.15, 0.26), "text": scores(0.1, 0.06, 0.16)}
    evaluation = scores(0.55, 0.5, 0.6, tasks=tasks, blind=scores(0.15, 0.1, 0.2, tasks=blind, variant="grey"))
    files = {
        "evaluation/evaluation.json": evaluation,
        "evaluation_vskip/evaluation.json": scores(0.5, 0.45, 0.55, tasks=tasks, blind=None),
        "calibration/plan.json": {"num_layers": 2, "rules": [{"no_attention": []}, {"no_attention": ["retained"]}]},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    for stage, losses in {"pretrain": [6.0, 2.0], "sft": [3.0, 1.0]}.items():
        (tmp_path / stage).mkdir()
        lines = [json.dumps({"step": i, "loss": loss}) for i, loss in enumerate(losses)]
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"train_runtime": 1})]) + "\n")
    return tmp_path


@pytest.fixture
def config(output, monkeypatch):
    """Three stages; each appends its command to a file instead of running it."""
    write = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + chr(10)); sys.exit(sys.argv[2] == 'break')"
    monkeypatch.setattr(
        demo, "launch_command", lambda stage: [sys.executable, "-c", write, str(output / "ran"), *stage.command]
    )
    return demo.Config(output=str(output), stages=[demo.Stage(name, [name]) for name in ("one", "two", "three")])


def ran(config):
    return [line for path in [demo.Path(config.output) / "ran"] if path.exists() for line in path.read_text().split()]


def test_summary_collects_what_the_stages_wrote(config, output, capsys):
    demo.run(config)
    summary = json.loads((output / "summary.json").read_text())
    assert [summary[k] for k in ("accuracy", "blind_accuracy", "vskip_accuracy")] == [0.55, 0.15, 0.5]
    assert (summary["vskip_layers"], summary["num_layers"]) == ([1], 2)
    assert (summary["first_loss"], summary["last_loss"]) == (6.0, 1.0)
    assert summary["tasks_above_blind"] == ["count"]
    assert [stage["name"] for stage in summary["stages"]] == ["one", "two", "three"]
    assert summary["wall_seconds"] == pytest.approx(sum(stage["seconds"] for stage in summary["stages"]), abs=0.1)
    printed = capsys.readouterr().out
    assert "$ skipvision two" in printed
    assert "count" in printed


def test_finished_stages_are_not_run_again(config):
    demo.run(config)
    demo.run(config)
    assert ran(config) == ["one", "two", "three"]


def test_a_changed_stage_and_all_after_it_run_again(config):
    demo.run(config)
    config.stages[1].command = ["changed"]
    demo.run(config)
    assert ran(config) == ["one", "two", "three", "changed", "three"]


def test_a_failed_stage_stops_the_demo_and_is_tried_again(config):
    config.stages[1].command = ["break"]
    for _ in range(2):
        with pytest.raises(SkipVisionError, match="stage two failed with exit status 1: skipvision break"):
            demo.run(config)
    assert ran(config) == ["one", "break", "break"]


def test_the_stages_see_no_gpu(config, output, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    tell = f"import os; open({str(output / 'seen')!r}, 'a').write(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    monkeypatch.setattr(demo, "launch_command", lambda stage: [sys.executable, "-c", tell])
    demo.run(config)
    assert (output / "seen").read_text() == "''" * 3


def test_an_output_that_is_a_file_is_one_line(config, output):
    (output / "file").write_text("mine")
    config.output = str(output / "file")
    with pytest.raises(ConfigError, match=r"^output: .*file cannot be written: "):
        demo.run(config)


def test_an_empty_demo_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stages"):
        demo.run(demo.Config(output=str(tmp_path)))


def test_several_processes_start_under_torchrun():
    single = demo.launch_command(demo.Stage("a", ["train", "x=1"]))
    assert single == [sys.executable, "-m", "skipvision_train", "train", "x=1"]
    double = demo.launch_command(demo.Stage("a", ["train", "x=1"], processes=2))
    assert double[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc_per_node=2" in double
    assert double[-4:] == ["-m", "skipvision_train", "train", "x=1"]
