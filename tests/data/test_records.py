"""Records as plain data: where images are, and what no record may hold."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from skipvision_train.data import records as module
from skipvision_train.data.records import (
    IMAGE_MARKER,
    ImageRef,
    Turn,
    check_record,
    move_image_first,
    text_bytes,
)
from skipvision_train.errors import DataError


def content(ref):
    with ref.open() as file:
        return file.read()


# --- images --------------------------------------------------------------------------------------------------------


def test_a_file_a_slice_and_memory(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert content(ImageRef(tmp_path / "file")) == b"0123456789"
    part = ImageRef(tmp_path / "file", 3, 4, name="inner.jpg")
    assert content(part) == b"3456"
    assert content(ImageRef(Path("nowhere"), data=b"bytes")) == b"bytes"
    assert [ref.is_file for ref in (ImageRef(tmp_path), part, ImageRef(tmp_path, data=b""))] == [True, False, False]
    assert str(part) == f"{tmp_path / 'file'}!inner.jpg"
    assert str(ImageRef(tmp_path / "file")) == str(tmp_path / "file")
    assert pickle.loads(pickle.dumps(part)) == part


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    os.mkfifo(tmp_path / "pipe")
    for ref, message in (
        (ImageRef(tmp_path / "gone.png"), "gone.png: cannot be read: No such file"),
        (ImageRef(tmp_path), "no regular file"),
        (ImageRef(tmp_path / "pipe"), "pipe: no regular file"),
        (ImageRef(tmp_path / "file", 8, 4, name="x.jpg"), "file!x.jpg: 2 of 4 bytes are there; the file was cut"),
        (ImageRef(tmp_path / "a\0b"), "cannot be read: "),
        (ImageRef(tmp_path / ("x" * 300)), "cannot be read: File name too long"),
    ):
        with pytest.raises(DataError, match=message):
            ref.open()


def test_links_may_not_leave_the_root(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    root.mkdir()
    (outside / "secret.png").write_bytes(b"secret")
    (root / "own.png").write_bytes(b"own")
    (root / "link.png").symlink_to(root / "own.png")
    (root / "escape.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    (tmp_path / "root_beside").mkdir()
    (tmp_path / "root_beside" / "x.png").write_bytes(b"beside")
    (root / "beside.png").symlink_to(tmp_path / "root_beside" / "x.png")
    for name in ("own.png", "link.png"):
        assert content(ImageRef(root / name, root=root)) == b"own"
    for name in ("escape.png", "folder/secret.png", "beside.png", "folder/deep/../secret.png"):
        with pytest.raises(DataError, match=r"a link leads to .*, outside of the image root .*'follow_links: true'"):
            ImageRef(root / name, root=root).open()
        assert content(ImageRef(root / name))  # without a root links may lead anywhere


def test_the_root_is_no_part_of_what_an_image_is(tmp_path):
    assert ImageRef(tmp_path, root=tmp_path) == ImageRef(tmp_path)
    assert len({ImageRef(tmp_path, root=tmp_path), ImageRef(tmp_path), ImageRef(tmp_path, 1, 2)}) == 2


# --- what no record may hold ---------------------------------------------------------------------------------------


def test_text_is_bounded(record, turns, monkeypatch):
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 100)
    check_record(record(turns("q" * 49, "é" * 25, "", "b")))
    with pytest.raises(DataError, match="101 bytes of text; at most 100"):
        check_record(record(turns("q" * 50, "é" * 25, "", "b")))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"identity": "x" * 1001}, "'id' has 1001 characters; at most 1000"),
        ({"identity": "\ud800"}, "'id': the text holds half a surrogate pair at character 0"),
        ({"images": [Path("a"), Path("b")]}, "1 <image> markers in the conversation, but 2 images"),
    ],
)
def test_a_record_is_checked(record, turns, changed, message):
    arguments = {"turns": turns("<image>", "x"), "images": [Path("a")]}
    check_record(record(**arguments))
    with pytest.raises(DataError, match=message):
        check_record(record(**arguments | changed))


def test_many_turns_make_a_short_message(record):
    with pytest.raises(DataError) as caught:
        check_record(record([Turn("user", "q")] * 1000))
    assert len(str(caught.value)) < 300
    assert "and 988 more" in str(caught.value)


def test_text_bytes_are_those_of_utf8(record, turns):
    assert text_bytes(record(turns("é", "語!", "", "b"))) == 2 + 4 + 0 + 1


# --- image first ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["What?\n<image>", "<image>\nWhat?", "What?<image>", " <image> What? "])
def test_image_first(record, turns, text):
    moved = move_image_first(record(turns(text, "x", "and?", "y")))
    assert [t.text for t in moved.turns] == [f"{IMAGE_MARKER}\nWhat?", "x", "and?", "y"]


def test_image_first_leaves_several_images_in_place(record, turns):
    sample = record(turns("a <image> b <image>", "x"))
    assert move_image_first(sample) == sample
    assert move_image_first(record(turns("<image>", "x"))).turns[0].text == "<image>"
