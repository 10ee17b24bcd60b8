"""Completeness, rotation, publishing, failed writes."""

from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.training import checkpoints
from skipvision_train.training.checkpoints import (
    DAMAGED,
    MARKER,
    CheckpointInfo,
    all_checkpoints,
    changed_files,
    check_same_run,
    is_finished,
    mark_complete,
    newest_complete,
    publish_model,
    read_marker,
    remove_old,
    set_aside,
    shared_checksums,
    writing,
    written_files,
)

INFO = CheckpointInfo(step=3, processes=1, engine="none")


def make(run, step, complete=True):
    path = run / f"checkpoint-{step}"
    (path / "shards").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 100)
    (path / "shards" / "0.pt").write_bytes(b"y" * 50)
    if complete:
        mark_complete(path, CheckpointInfo(step, 1, "none"))
    return path


def test_marker_round_trip(tmp_path):
    path = make(tmp_path, 3)
    assert read_marker(path) == INFO
    files = json.loads((path / MARKER).read_text())["files"]
    assert files == {"model.safetensors": 100, "shards/0.pt": 50}


def test_remains_of_an_interrupted_marking_are_no_part(tmp_path):
    path = make(tmp_path, 3, complete=False)
    (path / f"{MARKER}.tmp").write_text("{")
    mark_complete(path, INFO)
    assert written_files(path) == ["model.safetensors", "shards/0.pt"]
    assert read_marker(path) == INFO


def test_the_largest_files_are_shared_out_first(tmp_path):
    for name, size in (("a", 5), ("b", 50), ("c", 5), ("d", 500)):
        (tmp_path / name).write_bytes(bytes(size))
    assert written_files(tmp_path) == ["d", "b", "a", "c"]


@pytest.mark.parametrize("damage", ["no marker", "file gone", "file short", "marker cut", "marker of another form"])
def test_damaged_is_not_complete(tmp_path, damage):
    make(tmp_path, 2)
    path = make(tmp_path, 10)
    if damage == "no marker":
        (path / MARKER).unlink()
    elif damage == "file gone":
        (path / "shards" / "0.pt").unlink()
    elif damage == "file short":
        (path / "model.safetensors").write_bytes(b"x" * 99)
    elif damage == "marker cut":
        (path / MARKER).write_text((path / MARKER).read_text()[:40])
    else:
        (path / MARKER).write_text('{"step": 10}')
    assert read_marker(path) is None
    found = newest_complete(tmp_path)
    assert found is not None
    assert found[0].name == "checkpoint-2"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_seen(tmp_path):
    path = make(tmp_path, 3)
    assert changed_files(path) == []
    flip(path / "shards" / "0.pt")
    assert read_marker(path) == INFO  # sizes are as they were
    assert changed_files(path) == ["shards/0.pt"]
    (path / "model.safetensors").unlink()
    assert changed_files(path) == ["model.safetensors", "shards/0.pt"]


def test_shares_of_the_reading_cover_every_file_once(tmp_path):
    path = make(tmp_path, 3)
    for name in ("a", "b", "c", "model.safetensors", "shards/0.pt"):
        (path / name).write_bytes(name.encode())
    mark_complete(path, INFO)
    for name in written_files(path):
        flip(path / name)
    for shares in (1, 2, 3, 7):
        found = [name for share in range(shares) for name in changed_files(path, share, shares)]
        assert sorted(found) == ["a", "b", "c", "model.safetensors", "shards/0.pt"]


def test_set_aside(tmp_path, caplog):
    make(tmp_path, 2)
    path = make(tmp_path, 3)
    set_aside(path, ["model.safetensors", "shards/0.pt"])
    assert "checkpoint-3: the content of model.safetensors and 1 more is not what was written" in caplog.text
    assert newest_complete(tmp_path)[0].name == "checkpoint-2"
    mark_complete(path, INFO)
    assert DAMAGED in written_files(path)
    remove_old(tmp_path, 0, 3)
    assert [step for step, _ in all_checkpoints(tmp_path)] == [2, 3]


def test_a_marker_of_an_earlier_version_has_no_checksums(tmp_path):
    path = make(tmp_path, 3)
    content = json.loads((path / MARKER).read_text())
    content.pop("crc32")
    (path / MARKER).write_text(json.dumps(content))
    flip(path / "model.safetensors")
    assert read_marker(path) == INFO
    assert changed_files(path) == []


def test_everything_is_on_the_disk_before_the_marker_is_there(tmp_path, monkeypatch):
    """Files, the folders that name them, and the marker itself under its temporary name, each with no marker yet."""
    path, synced = make(tmp_path, 3, complete=False), []

    def fsync(descriptor):
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), (path / MARKER).exists()))

    monkeypatch.setattr(checkpoints.os, "fsync", fsync)
    mark_complete(path, INFO)
    before = {file for file, marked in synced if not marked}
    files = {path / "model.safetensors", path / "shards" / "0.pt", path / f"{MARKER}.tmp"}
    assert before == files | {path / "shards", path, tmp_path}
    assert synced[-1] == (path, True)


@pytest.mark.parametrize("blind", [0, 1])
def test_files_that_one_process_does_not_see_yet_are_shared_out_all_the_same(tmp_path, monkeypatch, blind):
    """Listings of a network's file system: one process's lacks two files that another node has just written."""
    path, listed = make(tmp_path, 3, complete=False), checkpoints.written_files
    for number in range(4):
        (path / f"rng_{number}.pth").write_bytes(bytes(10 * (number + 1)))
    me, meeting, said = threading.local(), threading.Barrier(2), [[], []]

    def listing(directory):
        unseen = ("shards/0.pt", "rng_2.pth") if me.rank == blind else ()
        return [name for name in listed(directory) if name not in unseen]

    def gather(mine):
        said[me.rank] = mine
        meeting.wait(5)
        everything = said[0] + said[1]
        meeting.wait(5)
        return everything

    def save(rank):
        me.rank = rank
        sums = shared_checksums(path, rank, 2, gather)
        if rank == 0:
            mark_complete(path, INFO, sums)
        return sums

    monkeypatch.setattr(checkpoints, "written_files", listing)
    read = []
    monkeypatch.setattr(checkpoints, "checksum", lambda file, durable: read.append((me.rank, file.name)) or 7)
    with ThreadPoolExecutor(2) as pool:
        sums = list(pool.map(save, range(2)))
    assert sums[0] == sums[1] == dict.fromkeys(listed(path), 7)
    assert json.loads((path / MARKER).read_text())["crc32"] == sums[0]
    assert sorted(name for _, name in read) == sorted(Path(name).name for name in listed(path))
    assert {rank for rank, _ in read} == {0, 1}


def test_order_is_by_number(tmp_path):
    for step in (9, 10, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-200.old").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [step for step, _ in all_checkpoints(tmp_path)] == [9, 10, 100]
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-100", CheckpointInfo(100, 1, "none"))


def test_no_checkpoint(tmp_path):
    assert newest_complete(tmp_path) is None
    make(tmp_path, 1, complete=False)
    assert newest_complete(tmp_path) is None


def test_removal_keeps_the_newest_complete(tmp_path):
    for step in (1, 2, 4):
        make(tmp_path, step)
    make(tmp_path, 3, complete=False)
    remove_old(tmp_path, keep=2, current=4)
    assert [step for step, _ in all_checkpoints(tmp_path)] == [2, 4]
    remove_old(tmp_path, keep=0, current=4)
    assert [step for step, _ in all_checkpoints(tmp_path)] == [2, 4]


def test_removal_spares_the_one_that_is_being_written(tmp_path):
    for step in (1, 2):
        make(tmp_path, step)
    make(tmp_path, 4, complete=False)
    remove_old(tmp_path, keep=2, current=4)
    assert [step for step, _ in all_checkpoints(tmp_path)] == [2, 4]


def test_an_interrupted_removal_leaves_nothing_complete(tmp_path, monkeypatch):
    for step in (1, 2):
        make(tmp_path, step)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
    remove_old(tmp_path, keep=1, current=2)
    assert read_marker(tmp_path / "checkpoint-1") is None
    assert newest_complete(tmp_path)[0].name == "checkpoint-2"


def test_a_model_folder_without_its_configuration_is_not_finished(tmp_path):
    assert not is_finished(tmp_path)
    (tmp_path / "model").mkdir()
    assert not is_finished(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert is_finished(tmp_path)


def test_other_engine_or_processes(tmp_path):
    zero = CheckpointInfo(3, 2, "zero2")
    with pytest.raises(CheckpointError, match="written with deepspeed zero2, this run has none"):
        zero.check_fits(CheckpointInfo(3, 2, "none"), tmp_path)
    zero.check_fits(CheckpointInfo(3, 4, "zero2"), tmp_path)
    assert zero.needs_conversion(4)
    assert not zero.needs_conversion(2)
    assert not CheckpointInfo(3, 2, "none").needs_conversion(4)


def test_publishing_renames_a_whole_model(tmp_path):
    partial, final = tmp_path / "model.partial", tmp_path / "model"
    partial.mkdir()
    save_file({"a": torch.zeros(2, 3)}, partial / "model-1.safetensors")
    save_file({"b": torch.zeros(4)}, partial / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"b has shape \(4,\), the model has \(5,\)"):
        publish_model(partial, final, {"a": (2, 3), "b": (5,)})
    with pytest.raises(CheckpointError, match="c has shape None"):
        publish_model(partial, final, {"c": (1,)})
    assert not final.exists()
    publish_model(partial, final, {"a": (2, 3), "b": (4,)})
    assert final.is_dir()
    assert not partial.exists()


def test_a_model_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    partial, final, synced = tmp_path / "model.partial", tmp_path / "model", []
    (partial / "template").mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, partial / "model.safetensors")
    (partial / "config.json").write_text("{}")
    (partial / "template" / "x.jinja").write_text("x")

    def fsync(descriptor):
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), final.exists()))

    monkeypatch.setattr(checkpoints.os, "fsync", fsync)
    publish_model(partial, final, {"a": (2,)})
    files = {partial / name for name in ("model.safetensors", "config.json", "template/x.jinja")}
    assert {path for path, named in synced if not named} == files | {partial, partial / "template"}
    assert [path for path, named in synced if named] == [tmp_path]


def test_publishing_reads_back(tmp_path):
    partial = tmp_path / "model.partial"
    partial.mkdir()
    save_file({"a": torch.zeros(200)}, partial / "model.safetensors")
    content = (partial / "model.safetensors").read_bytes()
    (partial / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read back"):
        publish_model(partial, tmp_path / "model", {"a": (200,)})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672]")],
)
def test_a_failed_write_names_the_folder(tmp_path, error):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint-4: cannot be written: .*GB are free"), writing(folder):
        raise error
    assert not folder.exists()


def test_another_runtime_error_is_a_bug(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), writing(tmp_path / "x"):
        raise RuntimeError("shape mismatch")


def test_same_run(tmp_path):
    old = {"trainer": {"seed": 0, "workers": 4}, "stage": {"lr": {"llm": 1e-5}}}
    check_same_run(old, {"trainer": {"seed": 0, "workers": 0}, "stage": {"lr": {"llm": 1e-5}}}, tmp_path)
    with pytest.raises(ConfigError, match=r"^trainer\.output_dir: .* stage\.lr\.llm \(1e-05 before, 2e-05 now\)"):
        check_same_run(old, {"trainer": {"seed": 0, "workers": 4}, "stage": {"lr": {"llm": 2e-5}}}, tmp_path)
    for changed in ({"stage": {"lr": {}}}, {"stage": {"lr": {"llm": 1e-5}, "ema_decay": 0.9}}):  # one side alone has it
        with pytest.raises(ConfigError, match=r"stage\.(lr|ema_decay)"):
            check_same_run(old, {"trainer": {"seed": 0, "workers": 4}, **changed}, tmp_path)
