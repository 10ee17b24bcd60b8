"""LLaVA's format as users have it, and every way in which a file can be wrong."""

from __future__ import annotations

import json

import pytest

from skipvision_train.data.records import IMAGE_MARKER, Record, Turn, move_image_first, read_llava
from skipvision_train.errors import DataError


def read(path, **options):
    return read_llava(path, "/images", "test", **options)


def test_reads_every_form_of_image(write_json, llava, tmp_path):
    entries = [
        llava("<image>\nWhat?", "A cat.", image="a/b.jpg", id=12, task="colour"),
        llava("<image> and <image>", "Two.", "Sure?", "Yes.", image=["x.png", "y.png"]),
        llava("Hello", "Hi."),
        llava("Hello", "Hi.") | {"image": None},
    ]
    entries[2].pop("id")
    records = read_llava(write_json(entries), tmp_path, "test")
    assert records[0] == Record(
        "12", "test", (tmp_path / "a/b.jpg",), (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat.")), "colour"
    )
    assert records[1].images == (tmp_path / "x.png", tmp_path / "y.png")
    assert [turn.role for turn in records[1].turns] == ["user", "assistant"] * 2
    assert records[2].images == records[3].images == ()
    assert records[2].id == "2"  # the index, where the file has no id
    assert records[2].task is None


def test_json_lines_equal_json(write_json, llava):
    entries = [llava("a", "b"), llava("c\u2028", "d")]
    lines = "\n".join(json.dumps(e, ensure_ascii=False) for e in entries) + "\n\n"
    assert read(write_json(lines, "data.jsonl")) == read(write_json(entries))


def test_system_turn(write_json, llava):
    entry = llava("a", "b")
    entry["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert read(write_json([entry]))[0].turns[0] == Turn("system", "Be brief.")


def conversation(*turns):
    return {"id": "a", "conversations": [{"from": role, "value": text} for role, text in turns]}


BROKEN = {
    "no object": ([3], "JSON object is expected, found int"),
    "no conversations": ([{"id": "a", "image": "x"}], "'conversations' is missing; found the keys id, image"),
    "empty conversations": ([{"id": "a", "conversations": []}], "list of turns, found an empty list"),
    "no value": ([{"id": "a", "conversations": [{"from": "human"}]}], "turn 0: an object with 'from'"),
    "role": ([conversation(("bot", "x"))], "'from' is 'bot'; use one of human, gpt, system"),
    "answer first": ([conversation(("gpt", "x"), ("human", "y"))], "turns are assistant, user"),
    "no answer": ([conversation(("human", "x"))], "ending with assistant"),
    "two questions": ([conversation(("human", "x"), ("human", "y"), ("gpt", "z"))], "turns are user, user, assistant"),
    "late system": ([conversation(("human", "x"), ("system", "y"), ("gpt", "z"))], "turns are user, system, assistant"),
    "empty answer": ([conversation(("human", "x"), ("gpt", " \n"))], "turn 1: the answer is empty"),
    "more markers": (
        [conversation(("human", "<image><image>"), ("gpt", "x")) | {"image": "a.jpg"}],
        "2 <image> markers in the conversation, but 1 images",
    ),
    "fewer markers": (
        [conversation(("human", "q"), ("gpt", "x")) | {"image": ["a.jpg", "b.jpg"]}],
        "0 <image> markers in the conversation, but 2 images",
    ),
    "marker in answer": (
        [conversation(("human", "q"), ("gpt", "<image>")) | {"image": "a"}],
        "only a user shows images",
    ),
    "escape": ([conversation(("human", "<image>"), ("gpt", "x")) | {"image": "a/../../b"}], "stay below it"),
    "backslash escape": ([conversation(("human", "<image>"), ("gpt", "x")) | {"image": "a\\..\\b"}], "stay below it"),
    "absolute": ([conversation(("human", "<image>"), ("gpt", "x")) | {"image": "/etc/passwd"}], "stay below it"),
    "image number": ([conversation(("human", "<image>"), ("gpt", "x")) | {"image": 3}], "'image' must be a path"),
    "image empty": ([conversation(("human", "<image>"), ("gpt", "x")) | {"image": ""}], "found an empty string"),
    "task": ([conversation(("human", "q"), ("gpt", "x")) | {"task": 3}], "'task' must be a string, found int"),
    "surrogate": ([conversation(("human", "q"), ("gpt", "x\ud83d"))], "turn 1: the text holds half a surrogate pair"),
    "id": ([conversation(("human", "q"), ("gpt", "x")) | {"id": []}], "'id' must be a string or an integer"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_malformed_record_is_named(write_json, llava, content, message):
    path = write_json([llava("fine", "fine"), *content])
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: record 1")
    assert message in str(caught.value)
    if isinstance(content[0], dict) and isinstance(content[0]["id"], str):
        assert "(id 'a')" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("{", "data.json", "not JSON"),
        ('{"id": 1}\n{"id": 2}', "data.json", "need a name that ends in .jsonl"),
        ({"id": 1}, "data.json", "a JSON list of records is expected, found an object"),
        ('{}\n{"id"', "data.jsonl", "line 2: not JSON"),
        ([], "data.json", "holds no records"),
    ],
)
def test_a_file_of_another_form(write_json, content, name, message):
    path = write_json(content, name)
    with pytest.raises(DataError, match=message) as caught:
        read(path, max_malformed=1)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match=r"nothing.json: cannot be read"):
        read(tmp_path / "nothing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xd8\xff\x00")
    with pytest.raises(DataError, match=r"binary.json: not UTF-8"):
        read(tmp_path / "binary.json")


def test_budget_of_malformed_records(write_json, llava, caplog):
    path = write_json([llava("q", ""), llava("q", "a"), llava("q", " "), llava("q", "b")])
    records = read(path, max_malformed=2)
    assert [r.turns[1].text for r in records] == ["a", "b"]
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "record 2 (id 'a')" in caplog.text
    with pytest.raises(DataError, match="2 malformed records, 1 allowed"):
        read(path, max_malformed=1)


@pytest.mark.parametrize("text", ["What?\n<image>", "<image>\nWhat?", "What?<image>", " <image> What? "])
def test_image_first(record, turns, text):
    moved = move_image_first(record(turns(text, "x", "and?", "y")))
    assert [t.text for t in moved.turns] == [f"{IMAGE_MARKER}\nWhat?", "x", "and?", "y"]


def test_image_first_leaves_several_images_in_place(record, turns):
    sample = record(turns("a <image> b <image>", "x"))
    assert move_image_first(sample) == sample
    assert move_image_first(record(turns("<image>", "x"))).turns[0].text == "<image>"
