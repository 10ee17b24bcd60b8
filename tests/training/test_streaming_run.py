"""Stages whose data is streamed: the same losses for any number of workers and processes, and after a resume."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from interrupted import InterruptAfter, InterruptionError
from launched import launch

from skipvision_train.config.validate import validate
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.run import assemble, describe_stage, run_stage


@pytest.fixture
def recipe(workspace, tmp_path):
    """The twelve samples in three files, and six captions for another source."""
    records = json.loads((workspace / "data" / "data.json").read_text())
    for number in range(3):
        lines = [json.dumps(record) for record in records[4 * number : 4 * number + 4]]
        (tmp_path / f"part-{number}.jsonl").write_text("\n".join(lines))
    captions = [{"image": f"{i}.png", "caption": f"number {i}"} for i in (0, 1, 2, 3, 6, 7)]
    for number in range(2):
        (tmp_path / f"captions-{number}.jsonl").write_text("\n".join(map(json.dumps, captions[3 * number :][:3])))
    images = str(workspace / "data" / "images")
    sources = [
        {"name": "talk", "path": "part-*.jsonl"},
        {"name": "captions", "path": "captions-{0..1}.jsonl", "format": "captions", "weight": 0.5},
    ]
    (path := tmp_path / "streamed.yaml").write_text(
        yaml.safe_dump({"sources": [source | {"image_root": images} for source in sources]})
    )
    return path


@pytest.fixture
def streamed(recipe):
    """Overrides; two lanes."""
    return (
        f"data.recipe={recipe}",
        "data.streaming=true",
        "data.stream_lanes=2",
        "data.stream_buffer=3",
        "trainer.max_steps=5",
        "trainer.per_device_batch=1",
        "trainer.save_every=1",
        "trainer.keep_checkpoints=0",
    )


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # machines with fewer cores
def test_a_resumed_run_gives_the_same_losses_with_any_workers(make_cfg, tmp_path, streamed):
    run_stage(make_cfg(*streamed, f"trainer.output_dir={tmp_path / 'whole'}"))
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5]
    for step, before, after in ((1, 2, 0), (3, 0, 3)):
        run = tmp_path / str(step)
        cfg = make_cfg(*streamed, f"trainer.workers={before}", f"trainer.output_dir={run}")
        with pytest.raises(InterruptionError):
            run_stage(cfg, (InterruptAfter(step),))
        run_stage(make_cfg(*streamed, f"trainer.workers={after}", f"trainer.output_dir={run}"))
        again = read_metrics(run / "metrics.jsonl")
        for key in ("step", "loss", "grad_norm", "supervised_tokens", "epoch"):
            assert [row.get(key) for row in again] == [row.get(key) for row in whole], key


@pytest.mark.distributed
def test_two_processes_take_the_steps_of_one_also_resumed(make_cfg, workspace, tmp_path, streamed):
    run_stage(make_cfg(*streamed, f"trainer.output_dir={tmp_path / 'one'}"))
    run = tmp_path / "two"
    output = launch(workspace, run, *streamed, "trainer.workers=1")
    assert "talk: 66.7% of the samples; 3 units dealt out to 2 lanes" in output
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    shutil.rmtree(run / "model")
    for step in (4, 5):
        shutil.rmtree(run / f"checkpoint-{step}")
    assert "start from" in launch(workspace, run, *streamed, "trainer.workers=2")
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def test_the_lanes_of_the_first_start_stay(make_cfg, streamed, tmp_path, monkeypatch):
    """What null means is decided once: two processes may not go on with the order that was one's."""
    with pytest.raises(InterruptionError):
        run_stage(make_cfg(*streamed, "data.stream_lanes=null"), (InterruptAfter(1),))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["stream_lanes"] == 1
    monkeypatch.setattr("skipvision_train.training.run.check_started_alike", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"data\.stream_lanes \(1 before, 2 now\)"):
        run_stage(make_cfg(*streamed, "data.stream_lanes=null"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run_stage(make_cfg(*streamed, "data.stream_lanes=null")).is_dir()


def test_a_dry_run_shows_the_first_record(make_cfg, streamed):
    text = describe_stage(make_cfg(*streamed))
    assert "5 steps over unknown samples" in text
    assert "colour?" in text.replace(" ", "").replace("|", "")


def test_what_was_read_is_recorded(make_cfg, tmp_path, streamed):
    run_stage(make_cfg(*streamed, "trainer.max_steps=1"))
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    assert recorded["streaming"] is True
    assert [source["units"] for source in recorded["sources"]] == [3, 2]


def test_an_unusable_record_stops_the_run_or_is_left_out(make_cfg, tmp_path, streamed):
    (tmp_path / "part-1.jsonl").write_text("{no json\n")
    with pytest.raises(DataError, match=r"part-1\.jsonl: record 0"):
        run_stage(make_cfg(*streamed))
    run_stage(make_cfg(*streamed, "data.on_error=skip", "data.error_budget=1", f"trainer.output_dir={tmp_path / 'b'}"))


def test_settings_of_images_reach_the_data(make_cfg, workspace, streamed):
    plain, other = (assemble(make_cfg(*more)).feed.dataset.samples for more in ((), ("data.resizer=pillow",)))
    assert plain._resizer == "auto"
    assert other._resizer == "pillow"
    assert plain._shrink is None
    drafted = assemble(make_cfg("data.draft=true")).feed.dataset.samples
    assert drafted._shrink(640, 480) == 8
    assert drafted._shrink(40, 30) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_steps=null", "trainer.epochs=1"], r"^trainer\.epochs: 1\.0 with data\.streaming, .*max_steps"),
        (["data.order=shards"], r"^data\.order: shards with data\.streaming"),
        (["data.group=length"], r"^data\.group: length with data\.streaming"),
        (["data.pack=true"], r"^data\.pack: true with data\.streaming"),
        (["data.stream_lanes=3"], r"^data\.stream_lanes: 3 must be a multiple of the 2 processes and divide .* 4"),
        (["data.stream_lanes=8"], r"^data\.stream_lanes: 8 must be"),
        (["data.stream_buffer=0"], r"^data\.stream_buffer: 0 is out of range"),
        (["data.streaming=false", "data.stream_lanes=2"], r"^data\.stream_lanes: 2 without data\.streaming"),
        (["data.streaming=false", "data.resizer=gpu"], r"^data\.resizer: 'gpu' is unknown; use auto, torch, pillow"),
    ],
)
def test_what_cannot_work_is_refused(make_cfg, overrides, message):
    cfg = make_cfg("data.streaming=true", "trainer.per_device_batch=1", *overrides)
    with pytest.raises(ConfigError, match=message):
        validate(cfg, 2)
