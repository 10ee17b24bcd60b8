"""What lies on the disk: the same for the same settings, whole or absent, disjoint between splits, readable."""

import collections
import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from skipvision_train.errors import ConfigError, DataError
from skipvision_train.sketches import writer
from skipvision_train.sketches.drawing import draw
from skipvision_train.sketches.questions import TASKS
from skipvision_train.sketches.settings import DataSize
from skipvision_train.sketches.writer import SPLITS, make_record, write_sketches


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def load(root, split):
    return json.loads((root / f"{split}.json").read_text())


def test_same_settings_give_the_same_bytes_with_one_and_two_processes(written, small_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 7)
    write_sketches(tmp_path / "again", small_settings, processes=2)
    assert tree(tmp_path / "again") == tree(written[0])


def test_another_seed_gives_other_images_and_questions(written, small_settings, tmp_path):
    other = dataclasses.replace(small_settings, data=dataclasses.replace(small_settings.data, seed=12))
    write_sketches(tmp_path / "other", other, processes=1)
    mine, theirs = tree(written[0]), tree(tmp_path / "other")
    assert mine.keys() == theirs.keys()
    same = [name for name in mine if name.startswith("images/") and mine[name] == theirs[name]]
    assert same == []
    assert all(mine[f"{split}.json"] != theirs[f"{split}.json"] for split in SPLITS)


def test_a_split_may_grow_without_changing_what_it_held():
    assert make_record("sft", 3, 0) == make_record("sft", 3, 0)
    assert make_record("sft", 3, 0)[1] != make_record("pretrain", 3, 0)[1]


def test_records_are_in_llava_format(written):
    root, _ = written
    for split, count in zip(SPLITS, (40, 40, 28), strict=True):
        records = load(root, split)
        assert len(records) == count == len({r["id"] for r in records})
        for record in records:
            turns = record["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n")
            assert sum(t["value"].count("<image>") for t in turns) == 1
            assert all(t["value"].strip() for t in turns)
            assert record["image"].startswith(f"{split}/")
            assert ("task" in record) == (split == "heldout")
    assert all(len(r["conversations"]) == 2 for r in load(root, "pretrain") + load(root, "heldout"))
    assert max(len(r["conversations"]) for r in load(root, "sft")) > 8
    assert collections.Counter(r["task"] for r in load(root, "heldout")) == dict.fromkeys(TASKS, 4)


def test_every_image_decodes_to_its_sketch(written, small_settings):
    root, _ = written
    kinds = collections.Counter()
    for split in SPLITS:
        for index, record in enumerate(load(root, split)):
            with Image.open(root / "images" / record["image"]) as image:
                kinds[image.format] += 1
                assert image.mode == "RGB"
                pixels = np.asarray(image, dtype=int)
            sketch, again = make_record(split, index, small_settings.data.seed)
            assert again == record
            drawn = np.asarray(draw(sketch, 96), dtype=int)
            assert pixels.shape == (96, 96, 3)
            # PNG is exact; JPEG of quality 92 stays close (measured mean error below 3.2 of 255 grey levels).
            assert np.abs(pixels - drawn).mean() < (4 if record["image"].endswith(".jpg") else 1e-9)
    assert set(kinds) == {"PNG", "JPEG"}
    assert min(kinds.values()) >= 40
    files = {p.relative_to(root / "images").as_posix() for p in (root / "images").rglob("*.*")}
    assert files == {r["image"] for split in SPLITS for r in load(root, split)}


def test_splits_share_no_image_and_no_sketch(written):
    root, _ = written
    hashes = {s: {hashlib.sha256(p.read_bytes()).digest() for p in (root / "images" / s).iterdir()} for s in SPLITS}
    keys = {split: {make_record(split, index, 11)[0].key for index in range(400)} for split in SPLITS}
    for a, b in (("pretrain", "sft"), ("pretrain", "heldout"), ("sft", "heldout")):
        assert not hashes[a] & hashes[b]
        assert not keys[a] & keys[b]


def test_manifest_states_counts_settings_and_hashes(written, small_settings):
    root, manifest = written
    assert json.loads((root / "manifest.json").read_text()) == manifest
    assert manifest["generator_version"] == writer.GENERATOR_VERSION
    assert manifest["settings"] == dataclasses.asdict(small_settings)
    for split in SPLITS:
        entry = manifest["splits"][split]
        assert entry["json_sha256"] == hashlib.sha256((root / f"{split}.json").read_bytes()).hexdigest()
        digest = hashlib.sha256()
        for record in load(root, split):
            digest.update(hashlib.sha256((root / "images" / record["image"]).read_bytes()).digest())
        assert entry["images_sha256"] == digest.hexdigest()
        assert entry["questions"] == sum(len(r["conversations"]) // 2 for r in load(root, split))


def test_second_run_writes_nothing(written, small_settings, monkeypatch):
    root, manifest = written
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    monkeypatch.setattr(writer, "draw", lambda *_: pytest.fail("drew an image again"))
    assert write_sketches(root, small_settings, processes=1) == manifest
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_other_settings_on_an_existing_folder_are_refused(written, small_settings):
    root, _ = written
    before = tree(root)
    other = dataclasses.replace(small_settings, data=dataclasses.replace(small_settings.data, sft=41))
    with pytest.raises(ConfigError, match=r"holds sketches of other settings; use another folder"):
        write_sketches(root, other, processes=1)
    assert tree(root) == before


def test_another_generator_version_is_refused(written, small_settings, monkeypatch):
    monkeypatch.setattr(writer, "GENERATOR_VERSION", writer.GENERATOR_VERSION + 1)
    with pytest.raises(ConfigError, match="other generator_version"):
        write_sketches(written[0], small_settings, processes=1)


def test_a_foreign_folder_is_left_alone(tmp_path, small_settings):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty and holds no manifest\.json"):
        write_sketches(tmp_path, small_settings, processes=1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_broken_manifest_is_named(tmp_path, small_settings):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: not JSON"):
        write_sketches(tmp_path, small_settings, processes=1)


def test_an_interrupted_run_leaves_no_folder_and_the_next_one_succeeds(written, tmp_path, small_settings, monkeypatch):
    root = tmp_path / "data"
    monkeypatch.setattr(writer, "_write_all", lambda partial, *_: (partial / "half").mkdir() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_sketches(root, small_settings, processes=1)
    assert not root.exists()
    monkeypatch.setattr(
        writer, "_write_all", lambda partial, *_: shutil.copytree(written[0], partial, dirs_exist_ok=True)
    )
    write_sketches(root, small_settings, processes=1)
    assert tree(root) == tree(written[0])
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DataSize(sft=0)}, r"data\.sft: 0 images"),
        ({"data": DataSize(image_size=16)}, r"data\.image_size: 16 pixels"),
    ],
)
def test_sizes_that_cannot_work_are_refused(tmp_path, small_settings, change, message):
    with pytest.raises(ConfigError, match=message):
        write_sketches(tmp_path / "x", dataclasses.replace(small_settings, **change), processes=1)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("llm", "heads", 5, r"llm\.heads: 5 must divide llm\.width 32"),
        ("llm", "key_value_heads", 3, r"llm\.key_value_heads: 3 must divide llm\.heads 4"),
        ("llm", "vocabulary", 300, r"llm\.vocabulary: 300"),
        ("vision", "patch_size", 7, r"vision\.patch_size: 7 must divide image_size 24"),
        ("vision", "head_width", 24, r"vision\.head_width: 24 must divide vision\.width 32"),
    ],
)
def test_model_sizes_that_cannot_work_are_refused(small_settings, part, field, value, message):
    changed = dataclasses.replace(getattr(small_settings, part), **{field: value})
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(small_settings, **{part: changed}).check()
