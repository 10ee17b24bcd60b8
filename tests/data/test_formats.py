"""Every format: what it reads, and what it refuses. The fuzz test mutates entries of all of them."""

from __future__ import annotations

import base64
import json
import os
import random
from pathlib import Path

import pytest

from skipvision_train.data import strict_json
from skipvision_train.data.formats import FORMATS, Place, read_record
from skipvision_train.data.records import ImageRef, Record, Turn
from skipvision_train.data.strict_json import parse_json
from skipvision_train.errors import DataError

ROOT = Path("/images")
PLACE = Place("test", 5, ROOT, ROOT)


def read(form, entry, place=PLACE):
    return read_record(entry, FORMATS[form], place)


def said(record):
    return [(turn.role[0], turn.text) for turn in record.turns]


# --- formats -------------------------------------------------------------------------------------------------------


def test_llava(llava):
    entry = llava("<image>\nWhat?", "A cat.", image="a/b.jpg", id=12, task="colour")
    assert read("llava", entry) == Record(
        "12",
        "test",
        (ImageRef(ROOT / "a/b.jpg"),),
        (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat.")),
        "colour",
    )
    several = read("llava", llava("<image> and <image>", "Two.", "Sure?", "Yes.", image=["x.png", "y.png"]))
    assert several.images == (ImageRef(ROOT / "x.png"), ImageRef(ROOT / "y.png"))
    assert said(several) == [("u", "<image> and <image>"), ("a", "Two."), ("u", "Sure?"), ("a", "Yes.")]
    text_only = llava("Hello", "Hi.")
    text_only.pop("id")
    assert read("llava", text_only).images == read("llava", text_only | {"image": None}).images == ()
    assert read("llava", text_only).id == "5"  # the index, where the file has no id
    assert read("llava", text_only).task is None
    system = {"from": "system", "value": "Be brief."}
    text_only["conversations"].insert(0, system)
    assert read("llava", text_only).turns[0] == Turn("system", "Be brief.")


def test_messages():
    entry = {
        "id": "a",
        "messages": [
            {"role": "system", "content": "Brief."},
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " And this? "}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        ],
        "images": ["a.png", "b.png"],
    }
    record = read("messages", entry)
    assert [image.path.name for image in record.images] == ["a.png", "b.png"]
    assert said(record) == [
        ("s", "Brief."),
        ("u", "<image>What?"),
        ("a", "A cat."),
        ("u", "<image>\nAnd this?"),
        ("a", "A dog."),
    ]


def test_messages_whose_parts_bring_images():
    """A part's own image and those of the list stand in the order in which they are shown."""
    url = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    parts = [
        {"type": "image", "image": "own.png"},
        {"type": "text", "text": "or <image>"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    answer = {"role": "assistant", "content": "x"}
    record = read("messages", {"messages": [{"role": "user", "content": parts}, answer], "image": "listed.png"})
    assert [image.data or image.path.name for image in record.images] == ["own.png", "listed.png", b"pixels"]
    assert said(record)[0] == ("u", "<image>\nor <image>\n<image>")


def test_cauldron():
    images = [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": "x.png"}]
    texts = [{"user": "Q1", "assistant": "A1", "source": "AI2D"}, {"user": "Q2", "assistant": "A2", "source": "AI2D"}]
    record = read("cauldron", {"images": images, "texts": texts})
    assert [image.data for image in record.images] == [b"one", b"two"]
    assert [str(image) for image in record.images] == ["test/5", "x.png"]
    assert said(record) == [("u", "<image>\n<image>\nQ1"), ("a", "A1"), ("u", "Q2"), ("a", "A2")]
    assert (record.id, record.task) == ("5", "AI2D")
    texts[1] = {"user": "<image>?", "assistant": "A2", "source": "other"}
    record = read("cauldron", {"images": images[:1], "texts": texts})
    assert said(record)[0] == ("u", "Q1")  # where a text has a marker, it says where the image stands
    assert record.task is None


def test_captions():
    expected = [("u", "<image>"), ("a", "A cat.")]
    for entry in ({"image": "a.png", "caption": "A cat."}, {"images": ["a.png"], "text": "A cat."}):
        record = read("captions", entry)
        assert said(record) == expected
        assert record.images == (ImageRef(ROOT / "a.png"),)
    with pytest.raises(DataError, match="'image' is missing; found the keys caption"):
        read("captions", {"caption": "x"})


def test_vqa():
    record = read("vqa", {"image": b"png", "question": "Which?", "answer": "This.", "task": "t"})
    assert said(record) == [("u", "<image>\nWhich?"), ("a", "This.")]
    assert record.images[0].data == b"png"
    assert said(read("vqa", {"question": "Which?", "answer": "This."}))[0] == ("u", "Which?")


def test_image_references_pass_and_missing_roots_are_named(llava):
    ref = ImageRef(Path("a.tar"), 512, 10, name="0.png")
    assert read("llava", llava("<image>", "x", image=[ref])).images == (ref,)
    assert read("llava", llava("<image>", "x", image={"bytes": None, "path": "a.png"})).images[0].path == ROOT / "a.png"
    with pytest.raises(DataError, match=r"'image': image 'a.png' is a path, but the source has no image_root"):
        read("llava", llava("<image>", "x", image="a.png"), Place("test", 0))


# --- what is refused -----------------------------------------------------------------------------------------------


def conversation(*turns, **extra):
    return {"id": "a", "conversations": [{"from": role, "value": text} for role, text in turns]} | extra


def asked(**image):
    return conversation(("human", "<image>"), ("gpt", "x"), **image)


def chat(*messages, **extra):
    return {"messages": [{"role": role, "content": content} for role, content in messages]} | extra


BROKEN = {
    "no object": ("llava", 3, "an object is expected, found int"),
    "no conversations": ("llava", {"id": "a", "image": "x"}, "'conversations' is missing; found the keys id, image"),
    "empty conversations": ("llava", {"conversations": []}, "must be a list that is not empty, found an empty list"),
    "no value": ("llava", {"conversations": [{"from": "human"}]}, "turn 0: an object with 'from'"),
    "role": ("llava", conversation(("bot", "x")), "'from' is 'bot'; use one of human, gpt, system"),
    "list as role": ("llava", conversation(([], "x")), "'from' is an empty list; use one of"),
    "answer first": ("llava", conversation(("gpt", "x"), ("human", "y")), "turns are assistant, user"),
    "no answer": ("llava", conversation(("human", "x")), "ending with assistant"),
    "two questions": ("llava", conversation(("human", "x"), ("human", "y"), ("gpt", "z")), "are user, user, assistant"),
    "late system": ("llava", conversation(("human", "x"), ("system", "y"), ("gpt", "z")), "user, system, assistant"),
    "empty answer": ("llava", conversation(("human", "x"), ("gpt", " \n")), "turn 1: the answer is empty"),
    "more markers": (
        "llava",
        conversation(("human", "<image><image>"), ("gpt", "x"), image="a.jpg"),
        "2 <image> markers in the conversation, but 1 images",
    ),
    "fewer markers": (
        "llava",
        conversation(("human", "q"), ("gpt", "x"), image=["a.jpg", "b.jpg"]),
        "0 <image> markers in the conversation, but 2 images",
    ),
    "marker in answer": ("llava", conversation(("human", "q"), ("gpt", "<image>"), image="a"), "only a user shows"),
    "escape": ("llava", asked(image="a/../../b"), "must be relative to the image root /images and stay below it"),
    "backslash escape": ("llava", asked(image="a\\..\\b"), "stay below it"),
    "absolute": ("llava", asked(image="/etc/passwd"), "stay below it"),
    "zero byte": ("llava", asked(image="a\0b"), "stay below it"),
    "surrogate in a name": ("llava", asked(image="a\udc80"), "the name holds half a surrogate pair"),
    "URL": ("llava", asked(image="https://example.org/a.png"), "is a URL; nothing is downloaded while training"),
    "URL of another scheme": ("llava", asked(image="FILE:///etc/passwd"), "is a URL"),
    "data URL": ("llava", asked(image="data:image/png;base64,AA=="), "is a URL"),
    "URL in a list": ("llava", asked(image=["s3://bucket/a.png"]), "'image': image 's3://bucket/a.png' is a URL"),
    "long URL": ("llava", asked(image="http://" + "x" * 10_000), "..."),
    "image number": ("llava", asked(image=3), "'image': an image must be a path or bytes, found int"),
    "image empty": ("llava", asked(image=""), "found an empty string"),
    "two image keys": ("llava", asked(image="a", images=["b"]), "both 'image' and 'images' are there"),
    "task": ("llava", conversation(("human", "q"), ("gpt", "x"), task=3), "'task' must be a string, found int"),
    "surrogate": ("llava", conversation(("human", "q"), ("gpt", "x\ud83d")), "turn 1: the text holds half a surrogate"),
    "id": ("llava", conversation(("human", "q"), ("gpt", "x"), id=[]), "'id' must be a string or an integer"),
    "messages missing": ("messages", {}, "'messages' is missing; found no keys"),
    "message text": ("messages", {"messages": ["x"]}, "message 0: an object with 'role' and 'content'"),
    "tool": ("messages", chat(("tool", "x")), "message 0: 'role' is 'tool'; use one of user, assistant, system"),
    "no content": ("messages", chat(("user", None)), "'content' must be text or a list of parts, found null"),
    "part": ("messages", chat(("user", [3])), "message 0, part 0: an object with 'type' is expected, found int"),
    "video": (
        "messages",
        chat(("user", [{"type": "video"}])),
        "part 0: a text or an image is expected, found the type",
    ),
    "no image left": (
        "messages",
        chat(("user", "<image><image>"), ("assistant", "x"), images=["a.png"]),
        "message 0: shows 2 images that it does not bring, 'images' has 1 left",
    ),
    "image left over": ("messages", chat(("user", "q"), ("assistant", "x"), images=["a"]), "0 <image> markers"),
    "URL in a part": (
        "messages",
        chat(("user", [{"type": "image_url", "image_url": {"url": "http://x/a.png"}}])),
        "is a URL",
    ),
    "no base64": (
        "messages",
        chat(("user", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}])),
        "message 0, part 0: the data URL is no base64",
    ),
    "other data": (
        "messages",
        chat(("user", [{"type": "image_url", "image_url": "data:image/svg+xml,<svg>"}])),
        "a data URL must be in base64, found 'data:image/svg+xml'",
    ),
    "texts": ("cauldron", {"texts": [3], "images": []}, "text 0: an object with 'user' and 'assistant'"),
    "no user": ("cauldron", {"texts": [{"assistant": "x"}]}, "'user' must be a string, found null"),
    "caption": ("captions", {"image": "a.png", "caption": ["a", "b"]}, "'caption' must be a string, found a list"),
    "answer": ("vqa", {"question": "q", "answer": 4}, "'answer' must be a string, found int"),
}


@pytest.mark.parametrize(("form", "entry", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_entries(form, entry, message):
    with pytest.raises(DataError) as caught:
        read(form, entry)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


# --- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b"", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 text: byte 0xff at 7"),
        (b'{"a": "\xe2\x82"}', "not UTF-8 text"),
        (b'{"score": NaN}', "NaN is no JSON value; write null"),
        (b"[1, -Infinity]", "-Infinity is no JSON value"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "the key 'c' stands twice in an object"),
        (b"[" * 50_000 + b"]" * 50_000, "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b"[" + b"[]," * 100_000 + b"[]]", "100002 opening brackets; at most 100000"),
        (b"1" * 5_000, "not JSON: Exceeds the limit"),
        (b'"\x01"', "not JSON: Invalid control character"),
    ],
)
def test_json_is_strict(raw, message):
    with pytest.raises(DataError) as caught:
        parse_json(raw)
    assert message in str(caught.value)


def test_json_is_bounded(monkeypatch):
    monkeypatch.setattr(strict_json, "MAX_TEXT_BYTES", 10)
    assert parse_json(b'"12345678"') == "12345678"
    with pytest.raises(DataError, match="11 bytes of JSON; at most 10"):
        parse_json(b'"123456789"')


# --- fuzz ----------------------------------------------------------------------------------------------------------

CASES = int(os.environ.get("SKIPVISION_FUZZ_CASES", "10000"))

SEEDS = [
    ("llava", conversation(("human", "<image>\nq"), ("gpt", "a"), ("human", "q"), ("gpt", "a"), image="a/b.jpg")),
    ("llava", conversation(("system", "s"), ("human", "q"), ("gpt", "a"), image=None, task="t")),
    ("messages", chat(("user", [{"type": "image"}, {"type": "text", "text": "q"}]), ("assistant", "a"), images=["a"])),
    ("messages", chat(("user", [{"type": "image", "image": "a.png"}]), ("assistant", "a"))),
    ("cauldron", {"images": ["a.png"], "texts": [{"user": "q", "assistant": "a", "source": "s"}]}),
    ("captions", {"image": "a.png", "caption": "c"}),
    ("vqa", {"image": "a.png", "question": "q", "answer": "a"}),
]
VALUES = [
    *(None, True, False, 0, -1, 2**70, 1e308, "", " ", "x", "<image>", "<image><image>", "\ud800", "\udc80", "a\0b"),
    *("../x", "/etc/passwd", "a/../../b", "http://x/y", "data:,x", "C:\\x", ".", "..", "a" * 5000, [], {}, [[]]),
    *([None], {"bytes": "x"}, {"path": 3}, {"bytes": None, "path": None}, {"type": "image"}, {"url": []}, ["a", 3]),
]


def mutated(value, rng):
    """A copy in which one place was changed: replaced, removed, repeated, or put elsewhere."""
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return rng.choice(VALUES)
    if isinstance(value, dict):
        changed, key = dict(value), rng.choice(list(value))
        action = rng.random()
        if action < 0.15:
            del changed[key]
        elif action < 0.25:
            changed[rng.choice(["image", "images", "id", "task", "x", "content", "texts"])] = changed.pop(key)
        elif action < 0.35:
            changed[rng.choice(["image", "images", "id", "task", "caption", "text"])] = rng.choice(VALUES)
        else:
            changed[key] = mutated(changed[key], rng)
        return changed
    changed, place = list(value), rng.randrange(len(value))
    action = rng.random()
    if action < 0.15:
        del changed[place]
    elif action < 0.3:
        changed.insert(place, rng.choice([changed[place], rng.choice(VALUES)]))
    else:
        changed[place] = mutated(changed[place], rng)
    return changed


def corrupted(raw, rng):
    """The bytes with a few of them changed, cut out or doubled."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        place = rng.randrange(len(data))
        action = rng.random()
        if action < 0.5:
            data[place] = rng.choice(b'"\\{}[],:\x00\x80\xff\xe2nN0<\n') if rng.random() < 0.7 else rng.randrange(256)
        elif action < 0.75:
            del data[place : place + rng.randint(1, 8)]
        else:
            data[place:place] = data[place : place + rng.randint(1, 8)]
    return bytes(data)


def test_whatever_comes_in_is_a_record_or_an_error(tmp_path):
    """Structure and bytes are changed at random; a record must keep every promise, and stay below the root."""
    rng = random.Random(0)
    place = Place("fuzz", 0, tmp_path, tmp_path)
    counts, messages = {"records": 0, "refused": 0}, set()
    for case in range(CASES):
        form, entry = SEEDS[case % len(SEEDS)]
        for _ in range(rng.randint(0, 2)):
            entry = mutated(entry, rng)
        raw = json.dumps(entry, allow_nan=True).encode()
        if case % 2:
            raw = corrupted(raw, rng)
        try:
            record = read_record(parse_json(raw), FORMATS[form], place)
        except DataError as error:
            counts["refused"] += 1
            messages.add(str(error))
            continue
        counts["records"] += 1
        assert sum(turn.text.count("<image>") for turn in record.turns) == len(record.images)
        assert record.turns[-1].role == "assistant"
        "".join(turn.text for turn in record.turns).encode()
        for image in record.images:
            assert image.data is not None or Path(os.path.normpath(image.path)).is_relative_to(tmp_path)
    assert (
        min(counts.values()) > CASES / 10
    )  # both ends are reached, so the mutations are neither too mild nor too wild
