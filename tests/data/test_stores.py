"""Containers by index: the same records as a reader of the whole file finds, and one broken entry costs one record."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from skipvision_train.data import json_files
from skipvision_train.data.json_files import JsonEntries
from skipvision_train.data.records import text_bytes
from skipvision_train.data.shards import TarEntries, index_shard
from skipvision_train.data.stores import RecordStore, container_of, open_entries
from skipvision_train.data.tables import DatasetEntries
from skipvision_train.errors import ConfigError, DataError

FEW = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stored(path, form="llava", root="/images", **options):
    return RecordStore(open_entries([str(path)]), form, "test", None if root is None else Path(root), **options)


def questions(store):
    return [record.turns[0].text for record in store]


# --- JSON ----------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.sampled_from('ab"\\{}[],:\né語 \u2028'), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@FEW
@given(
    values=st.lists(VALUES, min_size=1, max_size=8),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_a_list_has_the_elements_that_json_finds(tmp_path, values, chunk, indent, ascii_only, bom):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" * bom + f" \n{text}\n ".encode() if not bom else b"\xef\xbb\xbf" + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        # Every state of the scan is carried over the end of a piece: within a string, an escape, a word.
        patch.setattr(json_files, "CHUNK", max(chunk, 4))
        entries = JsonEntries(path)
        assert [entries.entry(i) for i in range(len(entries))] == values


@FEW
@given(
    values=st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), min_size=1, max_size=8),
    chunk=st.integers(4, 40),
    separator=st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
    last=st.booleans(),
)
def test_lines_are_those_of_the_file(tmp_path, values, chunk, separator, last):
    path = tmp_path / "data.jsonl"
    path.write_bytes((separator.join(map(json.dumps, values)) + separator * last).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK", chunk)
        entries = JsonEntries(path)
        assert [entries.entry(i) for i in range(len(entries))] == values


def test_names_and_marks_of_unicode_do_not_matter(write_json, llava):
    entries = [llava("a", "b"), llava("c\u2028\u0085", "d")]
    lines = "\ufeff" + "\n".join(json.dumps(e, ensure_ascii=False) for e in entries) + "\n\n"
    expected = list(stored(write_json(entries)))
    for name in ("data.jsonl", "data.ndjson", "data.JSONL"):
        assert list(stored(write_json(lines, name))) == expected


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_broken_record_costs_itself_alone(tmp_path, llava, name):
    fine = [json.dumps(llava(f"q{i}", "a", id=f"r{i}")).encode() for i in range(2)]
    broken = [
        (b'{"id": "u", "x": "\xff\xfe"}', "not UTF-8 text: byte 0xff at 18"),
        (b'{"id": "n", "x": NaN}', "NaN is no JSON value"),
        (b'{"id": "t", "id": "t"}', "the key 'id' stands twice"),
        (b'{"id": nothing}', "not JSON"),
        (b'{"id": "c"}', "(id 'c'): 'conversations' is missing"),
        (b'"text"', "an object is expected, found a string"),
    ]
    entries = [fine[0], *(raw for raw, _ in broken), fine[1]]
    path = tmp_path / name
    path.write_bytes(b"\n".join(entries) if name.endswith("l") else b"[" + b", ".join(entries) + b"]")
    store = stored(path)
    assert len(store) == 8
    assert (store[0].id, store[7].id) == ("r0", "r1")
    for index, (_, message) in enumerate(broken, start=1):
        with pytest.raises(DataError) as caught:
            store[index]
        assert str(caught.value).startswith(f"{path}: record {index}")
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("{", "data.json", r"a JSON list of records is expected, the file begins with b'\{'"),
        ('{"id": 1}\n{"id": 2}', "data.json", "JSON lines need a name that ends in .jsonl"),
        ("", "data.json", "a JSON list of records is expected, the file is empty"),
        (" \n ", "data.json", "the file is empty"),
        ("[]", "data.json", "holds no records"),
        ("[ \n ]", "data.json", "holds no records"),
        ("", "data.jsonl", "holds no records"),
        ("\n\n  \n", "data.jsonl", "holds no records"),
        ('[{"a": 1}, {"b": ', "data.json", "the JSON list does not end; its last whole element ends at byte 9"),
        ('[{"a": "]}', "data.json", "does not end; its last whole element ends at byte 0"),
        ("[1] [2]", "data.json", "something stands behind the JSON list, from byte 3 on"),
        ("[1]" + " " * 100 + "x", "data.json", "something stands behind the JSON list"),
    ],
)
def test_a_file_of_another_form(write_json, content, name, message, monkeypatch):
    path = write_json(content, name)
    for chunk in (json_files.CHUNK, 5):
        monkeypatch.setattr(json_files, "CHUNK", chunk)
        with pytest.raises(DataError, match=message) as caught:
            stored(path)
        assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json: cannot be read: No such file"):
        stored(tmp_path / "nothing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xd8\xff\x00")
    with pytest.raises(DataError, match=r"binary\.json: a JSON list of records is expected"):
        stored(tmp_path / "binary.json")


def test_a_huge_line_is_refused_without_being_read(tmp_path, llava, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(llava("q", "a" * 1000)) + "\n" + json.dumps(llava("q", "b")))
    monkeypatch.setattr(json_files, "MAX_TEXT_BYTES", 500)
    store = stored(path)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("it was read"))
    with pytest.raises(DataError, match=r"record 0: 1\d\d\d bytes of JSON; at most 500"):
        store[0]
    monkeypatch.undo()
    assert stored(path)[1].turns[1].text == "b"


def test_a_file_that_changes_is_noticed(write_json, llava):
    path = write_json([llava("q", "a" * 50)] * 3)
    opened, unopened = stored(path), stored(path)
    opened[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="bytes are there; the file was cut"):
        opened[2]
    with pytest.raises(DataError, match="record 0: the file has changed since it was opened"):
        unopened[0]
    path.unlink()
    with pytest.raises(DataError, match="record 0: cannot be read: No such file"):
        pickle.loads(pickle.dumps(unopened))[0]


def test_indices_outside(write_json, llava):
    store = stored(write_json([llava("q", "a")] * 3))
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"record {index} of 3"):
            store[index]


def test_a_task_of_the_source_is_a_default(write_json, llava):
    path = write_json([llava("q", "a"), llava("q", "a", task="own")])
    assert [record.task for record in stored(path, task="given")] == ["given", "own"]


def test_links_out_of_the_image_root(write_json, llava, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    path = write_json([llava("<image>", "x", image="linked/a.png")])
    with pytest.raises(DataError, match="outside of the image root"):
        stored(path, root=tmp_path / "images")[0].images[0].open()
    with stored(path, root=tmp_path / "images", follow_links=True)[0].images[0].open() as file:
        assert file.read() == b"png"
    # The image root itself may be a link, and what lies below it stays below it.
    (tmp_path / "root").symlink_to(tmp_path / "elsewhere")
    path = write_json([llava("<image>", "x", image="a.png")])
    with stored(path, root=tmp_path / "root")[0].images[0].open() as file:
        assert file.read() == b"png"


# --- estimates -----------------------------------------------------------------------------------------------------


def test_sizes_follow_the_text(write_json, llava):
    """Exact where entries differ in the length of their text alone; never parsed but for a few."""
    entries = [llava("q" * (1 + 7 * i % 301), "a" * (5 + i % 40), id="x") for i in range(1000)]
    for name in ("data.json", "data.jsonl"):
        content = entries if name == "data.json" else "\n".join(map(json.dumps, entries))
        store = stored(write_json(content, name))
        true = [text_bytes(record) for record in store]
        assert np.abs(store.sizes - true).max() <= 1
        assert store.sizes.dtype == np.int32
        assert store.size(7) == store.sizes[7]


def test_sizes_of_many_turns_are_close(write_json, llava):
    rng = random.Random(0)
    entries = [llava(*["w" * rng.randint(5, 200) for _ in range(2 * rng.randint(1, 6))]) for _ in range(600)]
    store = stored(write_json(entries))
    true = np.array([text_bytes(record) for record in store])
    assert abs(store.sizes.sum() / true.sum() - 1) < 0.02
    assert np.corrcoef(store.sizes, true)[0, 1] > 0.98


def test_sizes_where_nothing_can_be_read(write_json):
    store = stored(write_json([{"a": i} for i in range(3)]))
    assert store.sizes.shape == (3,)
    assert (store.sizes >= 0).all()


@pytest.mark.parametrize("chunk", [1 << 20, 70, 5])
def test_images_are_counted_by_their_marks(write_json, llava, monkeypatch, chunk):
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    part, answer = {"type": "image", "image": "a.png"}, {"role": "assistant", "content": "image"}
    entries = [
        llava("<image>\nq", "a", image="a.png"),
        llava("q <image> and <image>", "a", "<image>", "b", image=["a.png", "b.png", "c.png"]),
        llava("q", "a"),
        llava("q", "a") | {"image": None},
        {"messages": [{"role": "user", "content": [part, {"type": "image"}]}, answer], "images": ["b.png"]},
        {"image": "a.png", "caption": 'the word "image" alone'},
        llava("<image>", "a", image="z.png"),
    ]
    for name in ("data.json", "data.jsonl"):
        content = entries if name == "data.json" else "\n".join(map(json.dumps, entries))
        store = stored(write_json(content, name))
        assert store.image_counts.tolist() == [1, 3, 0, 0, 2, 1, 1]
        assert store.images(1) == 3


# --- parquet -------------------------------------------------------------------------------------------------------


def rows(count, first=0):
    image = {"bytes": b"png", "path": "x.png"}
    return [
        {
            "id": first + i,
            "image": image if i % 3 else None,
            "conversations": [
                {"from": "human", "value": f"{'<image>' if i % 3 else ''}é{i + first}" * 1},
                {"from": "gpt", "value": "a" * i},
            ],
        }
        for i in range(1, count + 1)
    ]


def write_parquet(path, entries, **options):
    pq.write_table(pa.Table.from_pylist(entries), path, **options)
    return path


def test_parquet_rows(tmp_path):
    entries = rows(25)
    path = write_parquet(tmp_path / "data.parquet", entries, row_group_size=10)
    store = stored(path, root=None)
    for index in (24, 0, 11, 9, 10, 3):  # back and forth over the row groups
        record, entry = store[index], entries[index]
        assert record.id == str(entry["id"])
        assert record.turns[0].text == entry["conversations"][0]["value"]
        assert [image.data for image in record.images] == ([b"png"] if entry["image"] else [])
    assert store.starts().tolist() == [0, 10, 20]
    assert store.image_counts.tolist() == [int(entry["image"] is not None) for entry in entries]
    # Exact up to the constant "human" and "gpt": what the column of conversations holds.
    assert store.entries.sizes().tolist() == [text_bytes(record) + 8 for record in store]
    assert store.sizes.tolist() == [text_bytes(record) for record in store]
    assert pickle.loads(pickle.dumps(store))[12] == store[12]


def test_a_row_group_is_read_once_in_order(tmp_path, monkeypatch):
    opened, read = [], []
    real_open, real_read = pq.ParquetFile, pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq, "ParquetFile", lambda path: opened.append(path) or real_open(path))
    monkeypatch.setattr(
        real_open,
        "read_row_group",
        lambda file, group, **options: read.append(group) or real_read(file, group, **options),
    )
    store = stored(write_parquet(tmp_path / "data.parquet", rows(25), row_group_size=10), root=None)
    for index in range(25):
        store[index]
    assert len(opened) == 1
    assert read == [0, 1, 2]
    store[10]  # the last two are kept
    store[0]
    assert read == [0, 1, 2, 0]
    assert len(store.entries._groups) == 2


def test_parquet_in_several_files(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"train-{number}.parquet", rows(4, first=10 * number), row_group_size=3)
    entries = open_entries([str(tmp_path / f"train-{number}.parquet") for number in range(3)])
    store = RecordStore(entries, "llava", "test")
    assert [record.id for record in store] == [str(10 * n + i) for n in range(3) for i in range(1, 5)]
    assert store.starts().tolist() == [0, 3, 4, 7, 8, 11]
    assert len(store.files()) == 3
    with pytest.raises(IndexError):
        store[12]


def test_parquet_with_lists_of_images(tmp_path):
    image = {"bytes": b"png", "path": None}
    entries = [
        {"images": [image] * n, "texts": [{"user": "q", "assistant": "a" * n, "source": "s"}]} for n in (1, 3, 2)
    ]
    store = stored(write_parquet(tmp_path / "data.parquet", entries), "cauldron", root=None)
    assert [len(record.images) for record in store] == store.image_counts.tolist() == [1, 3, 2]


def test_parquet_that_is_broken(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", rows(20), row_group_size=10, compression="none")
    raw = path.read_bytes()
    (tmp_path / "none.parquet").write_bytes(b"PAR1")
    (tmp_path / "cut.parquet").write_bytes(raw[: len(raw) // 2])
    for name in ("none.parquet", "cut.parquet", "gone.parquet"):
        with pytest.raises(DataError, match=f"{name}: no parquet file that can be read"):
            stored(tmp_path / name)
    write_parquet(tmp_path / "empty.parquet", rows(2)[:0] or [{"a": 1}][:0])
    with pytest.raises(DataError, match=r"empty\.parquet: holds no records"):
        stored(tmp_path / "empty.parquet")


def test_text_in_parquet_that_is_no_utf8(tmp_path):
    array = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    answers = pa.array(["a", "a"])
    pq.write_table(pa.table({"question": array, "answer": answers}), tmp_path / "data.parquet")
    store = stored(tmp_path / "data.parquet", "vqa", root=None)
    assert store[0].turns[0].text == "fine"
    with pytest.raises(DataError, match=r"data\.parquet: record 1: not UTF-8 text"):
        store[1]


# --- datasets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cauldron(picture):
    """Three rows as the hub has them, with an Image feature."""
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    images = [[{"bytes": stream.getvalue(), "path": None}] * n for n in (1, 0, 2)]
    texts = [[{"user": f"q{i}", "assistant": "a" * (i + 1), "source": "s"}] for i in range(3)]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": [{name: datasets.Value("string") for name in ("user", "assistant", "source")}],
        }
    )
    return datasets.Dataset.from_dict({"images": images, "texts": texts}, features=features)


def test_datasets_on_disk(tmp_path, cauldron):
    cauldron.save_to_disk(tmp_path / "saved")
    store = stored(tmp_path / "saved", "cauldron", root=None)
    assert [len(record.images) for record in store] == store.image_counts.tolist() == [1, 0, 2]
    assert store[0].images[0].data.startswith(b"\x89PNG")  # as stored: nobody has decoded it
    assert questions(store) == ["<image>\nq0", "q1", "<image>\n<image>\nq2"]
    assert store.entries.sizes().tolist() == [2 + 1 + 1, 2 + 2 + 1, 2 + 3 + 1]
    assert pickle.loads(pickle.dumps(store))[2] == store[2]
    assert all(file.is_file() for file in store.files())


def test_datasets_with_splits(tmp_path, cauldron):
    datasets.DatasetDict({"train": cauldron, "test": cauldron.select([2])}).save_to_disk(tmp_path / "saved")
    assert len(DatasetEntries(str(tmp_path / "saved"), "test")) == 1
    with pytest.raises(ConfigError, match="split is missing; use one of train, test"):
        DatasetEntries(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="split 'val' is unknown; use one of train, test"):
        DatasetEntries(str(tmp_path / "saved"), "val")
    with pytest.raises(DataError, match="no data set that 'save_to_disk' wrote"):
        DatasetEntries(str(tmp_path))


def test_datasets_of_the_hub(monkeypatch, cauldron):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return cauldron

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for location in ("hub:a/b:x(y)@v1", "hub:a/b@v1", "hub:a/b:x"):
        assert len(DatasetEntries(location, "val" if "@" in location else None)) == 3
    assert calls == [
        (("a/b", "x(y)"), {"split": "val", "revision": "v1"}),
        (("a/b", None), {"split": "val", "revision": "v1"}),
        (("a/b", "x"), {"split": "train", "revision": None}),
    ]

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"^hub:a/b: cannot be loaded: Couldn't reach 'a/b' on the Hub \(Offline.*\)$"):
        DatasetEntries("hub:a/b")


# --- tar shards ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(write_tar):
    """Two shards of captions, 3 and 2."""

    def members(first, count):
        return {
            name: data
            for i in range(first, first + count)
            for name, data in ((f"d/{i:04d}.jpg", b"jpg%d" % i), (f"d/{i:04d}.txt", b"caption %d\n" % i))
        }

    return [write_tar("s/shard-000.tar", members(0, 3)), write_tar("s/shard-001.tar", members(3, 2))]


def content(ref):
    with ref.open() as file:
        return file.read()


def test_captions_in_shards(shards):
    store = RecordStore(open_entries([str(path) for path in shards]), "captions", "test")
    assert [record.turns[1].text for record in store] == [f"caption {i}" for i in range(5)]
    assert [content(record.images[0]) for record in store] == [b"jpg%d" % i for i in range(5)]
    assert str(store[4].images[0]) == f"{shards[1]}!d/0004.jpg"
    assert store[4].id == "d/0004"
    assert store.starts().tolist() == [0, 3]
    assert store.entries.sizes().tolist() == [10] * 5
    assert store.image_counts.tolist() == [1] * 5
    assert pickle.loads(pickle.dumps(store))[3] == store[3]


def test_conversations_in_shards(write_tar, llava):
    entry = json.dumps(llava("<image><image>", "x", image=["one.png", "two.png"]) | {"id": "own"}).encode()
    path = write_tar("a.tar", {"k.0.png": b"one", "k.1.png": b"two", "k.json": entry, "t.json": entry[:-1] + b"}"})
    store = stored(path, root=None)
    assert [content(image) for image in store[0].images] == [b"one", b"two"]
    assert store[0].id == "own"
    assert str(store[0].images[1]).endswith("a.tar!k.1.png")
    with pytest.raises(DataError, match=r"a\.tar: record 1 \(id 'own'\): 'image': .* the source has no image_root"):
        store[1]


def test_what_belongs_to_no_entry(write_tar):
    members = [("README", b"x"), (".hidden.txt", b"x"), ("d/._0.txt", b"x"), ("0.txt", b"a"), ("0.jpg", b"b")]
    (group,) = index_shard(write_tar("a.tar", members))
    assert (group.key, [member.extension for member in group.members]) == ("0", ["txt", "jpg"])


def test_entries_of_a_shard_that_cannot_be_used(write_tar, tmp_path, monkeypatch):
    members = [
        ("a.txt", b"x"),
        *(("b.txt", b"x"), ("b.caption", b"y"), ("b.jpg", b"z")),
        *(("c.txt", b"\xff"), ("c.jpg", b"z")),
        *(("d.json", b"[1]"), ("d.jpg", b"z")),
        *(("e.json", b'{"text": NaN}'), ("e.jpg", b"z")),
        *(("f.txt", b"x" * 200), ("f.jpg", b"z")),
        *(("g.txt", b"fine"), ("g.jpg", b"z")),
    ]
    monkeypatch.setattr("skipvision_train.data.shards.MAX_TEXT_BYTES", 100)
    store = stored(write_tar("a.tar", members), "captions", root=None)
    messages = [
        "record 0 (id 'a'): 'image' is missing",
        "record 1: two members say the same: b.txt and b.caption",
        "record 2: the member c.txt is no UTF-8 text: byte 0",
        "record 3: the member d.json must hold a JSON object, found a list",
        "record 4: NaN is no JSON value",
        "record 5: a member of 200 bytes of text; at most 100",
    ]
    for index, message in enumerate(messages):
        with pytest.raises(DataError) as caught:
            store[index]
        assert f"{tmp_path / 'a.tar'}: {message}" in str(caught.value)
    assert store[6].turns[1].text == "fine"


def test_links_and_long_names_in_shards(tmp_path):
    path, long = tmp_path / "a.tar", "n" * 300
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("0.jpg", f"{long}.jpg"):
            info = tarfile.TarInfo(name)
            if name == "0.jpg":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = 3
                tar.addfile(info, io.BytesIO(b"jpg"))
            text = tarfile.TarInfo(name.replace("jpg", "txt"))
            text.size = 1
            tar.addfile(text, io.BytesIO(b"x"))
    store = stored(path, "captions", root=None)
    with pytest.raises(DataError, match=r"record 0: the member 0\.jpg is no regular file"):
        store[0]
    assert (store[1].id, content(store[1].images[0])) == (long, b"jpg")


def test_shards_that_are_damaged(shards, tmp_path):
    raw = shards[0].read_bytes()
    end = 512 * 12  # six members of one block each, with a header each
    cases = {
        "short.tar": (raw[: end - 512 * 3], "no uncompressed tar that can be read to its end"),
        "header.tar": (raw[: 512 * 4] + b"garbage!" * 64 + raw[512 * 5 :], "damaged at byte 2048"),
        "text.tar": (b"no tar at all", "no uncompressed tar"),
        "zip.tar": (b"\x1f\x8b" + raw, "no uncompressed tar"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: {message}"):
            stored(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        stored(tmp_path / "gone.tar")
    (tmp_path / "unended.tar").write_bytes(raw[:end])  # some writers leave out the two blocks of zeros
    assert len(stored(tmp_path / "unended.tar")) == 3


def test_sizes_of_shards_from_a_list(shards, monkeypatch):
    listed = shards[0].parent / "sizes.json"
    listed.write_text(json.dumps({"shard-000.tar": 3, "shard-001.tar": 2}))
    opened = []
    real = index_shard
    monkeypatch.setattr("skipvision_train.data.shards.index_shard", lambda path: opened.append(path) or real(path))
    store = RecordStore(TarEntries(shards), "captions", "test")
    assert (len(store), opened) == (5, [])
    assert store[4].turns[1].text == "caption 4"
    assert opened == [shards[1]]
    assert store.entries.sizes().tolist() == [10] * 5
    assert opened == [shards[1], shards[0]]
    listed.write_text(json.dumps({"shard-000.tar": 3, "shard-001.tar": 4}))
    store = RecordStore(TarEntries(shards), "captions", "test")
    with pytest.raises(DataError, match=r"shard-001\.tar: record 0: the shard holds 2 entries, sizes\.json says 4"):
        store[3]
    for content_, message in (
        ('{"shard-000.tar": 3}', r"shard-001\.tar: .*sizes\.json does not list this shard"),
        ('{"shard-000.tar": "3"}', "'shard-000.tar' has '3' entries; a number is expected"),
        ("[3]", "a JSON object of shards and their numbers"),
        ("{", r"sizes\.json: not JSON"),
    ):
        listed.write_text(content_)
        with pytest.raises(DataError, match=message):
            TarEntries(shards)


# --- all of them ---------------------------------------------------------------------------------------------------


def test_containers_by_name(tmp_path):
    (tmp_path / "v1.5").mkdir()
    names = {"a.json": "json", "a.ndjson": "jsonl", "a.parquet": "parquet", "a.tar": "tar", "hub:a/b.c": "datasets"}
    names |= {"folder": "datasets", str(tmp_path / "v1.5"): "datasets"}
    assert {name: container_of(name) for name in names} == names
    for name in ("a.jsonl.gz", "a.tar.gz", "a.tgz"):
        with pytest.raises(ConfigError, match="compressed files cannot be read by index; unpack it"):
            container_of(name)
    with pytest.raises(ConfigError, match=r"a\.csv: no container is known by that extension; use \.json"):
        container_of("a.csv")
    with pytest.raises(ConfigError, match=r"a\.json: files of several kinds \(json, tar\)"):
        open_entries(["a.json", "b.tar"])


class Reader:
    """What a loader's workers read."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        return [index, self.store[index].turns[1].text]


def test_workers_read_the_same(write_json, write_tar, llava, tmp_path):
    """Opened files are not shared with a worker in a way that lets them disturb each other."""
    entries = [llava("q", f"answer {i}") for i in range(40)]
    captions = {f"{i}.{kind}": b"x%d" % i for i in range(40) for kind in ("jpg", "txt")}
    stores = [
        stored(write_json(entries)),
        stored(write_parquet(tmp_path / "a.parquet", entries, row_group_size=7), root=None),
        stored(write_tar("a.tar", captions), "captions", root=None),
    ]
    for store in stores:
        reader = Reader(store)
        expected = [reader[i] for i in range(40)]  # also opens the files here, before the workers begin
        loader = DataLoader(reader, batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert list(loader) == expected


CASES = int(os.environ.get("SKIPVISION_FUZZ_CASES", "10000")) // 20


def test_whatever_a_file_holds_is_records_or_an_error(write_json, write_tar, llava, tmp_path):
    """Bytes of whole files are changed at random: opening and reading end in records or in DataError."""
    rng = random.Random(1)
    entries = [llava('<image>\nq\\"é', "a", image="a.png") for _ in range(4)]
    captions = {f"{i}.{kind}": b"x%d" % i for i in range(4) for kind in ("jpg", "txt")}
    table = [{"question": "q", "answer": "a" * i, "image": {"bytes": b"png", "path": None}} for i in range(1, 5)]
    originals = [
        (write_json(entries), "llava"),
        (write_json("\n".join(map(json.dumps, entries)), "data.jsonl"), "llava"),
        (write_tar("a.tar", captions), "captions"),
        (write_parquet(tmp_path / "a.parquet", table, row_group_size=2), "vqa"),
    ]
    raws = [path.read_bytes() for path, _ in originals]
    counts, messages = {"opened": 0, "refused": 0, "records": 0, "broken": 0}, set()
    for case in range(CASES):
        (path, form), raw = originals[case % 4], raws[case % 4]
        data = bytearray(raw)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(data))
            data[place : place + rng.choice([0, 1, 1, 1, 5])] = bytes(
                rng.choices(b'"\\{}[],\n\x00\xff7a', k=rng.randint(0, 2))
            )
        path.write_bytes(data)
        try:
            store = stored(path, form)
            sizes = store.sizes
        except DataError:
            counts["refused"] += 1
            continue
        counts["opened"] += 1
        assert sizes.shape == store.image_counts.shape == (len(store),)
        for index in range(len(store)):
            try:
                record = store[index]
                [content(image) for image in record.images if not image.path.is_relative_to("/images")]
                counts["records"] += 1
            except DataError as error:
                counts["broken"] += 1
                messages.add(str(error))
    assert min(counts.values()) > CASES / 20
    assert all(": record " in message or "!" in message for message in messages)
