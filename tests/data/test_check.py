"""A check of recipes with planted faults of every kind finds exactly those, whatever the number of workers."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from skipvision_train.data.check import REASONS, Measure, RecordCheck, Tally, check_records
from skipvision_train.data.check_report import (
    bars,
    budgets,
    distribution,
    duplicates,
    histogram,
    quantile,
    token_shapes,
)
from skipvision_train.data.dataset import BYTES_PER_TOKEN
from skipvision_train.data.images import load_image
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.data.records import text_bytes
from skipvision_train.errors import DataError
from skipvision_train.models.settings import ReducerConfig, TilingConfig


def encoded(seed: int, kind: str = "PNG", width: int = 20) -> bytes:
    """An image that only this seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def chat(identity, question="<image>\nWhat is it?", answer="A thing.", **extra):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "conversations": turns} | extra


FILES = {
    "a.png": encoded(0),
    "same_as_a.png": encoded(0),
    "a_again.bmp": encoded(0, "BMP"),  # the same pixels
    "wide.jpg": encoded(1, "JPEG", width=80),
    "really_a_gif.jpg": encoded(2, "GIF"),
    "book.gif": encoded(3, "GIF"),  # listed as .jpg
    "moved.webp": encoded(4, "PNG"),  # listed as .png, which it is
    "text.png": b"no image",
    "cut.png": encoded(5)[:150],
    "empty.png": b"",
}

LLAVA = [
    chat("fine", image="a.png"),
    chat("fine, shared", image="a.png"),
    chat("copy", "Look: <image>", image="same_as_a.png"),
    chat("two images", "<image><image>\nCompare.", image=["wide.jpg", "a_again.bmp"]),
    chat("text only", "Hello?"),
    chat("text only, too", "Hello again, what do you know?"),
    chat("gif in jpg", image="really_a_gif.jpg"),
    chat("other extension", image="book.jpg"),
    chat("other name", image="moved.png"),
    chat("missing", image="nowhere.png"),
    chat("missing and broken", "<image><image>?", image=["gone.jpg", "text.png"]),
    chat("broken", image="text.png"),
    chat("cut", image="cut.png"),
    chat("empty", image="empty.png"),
    chat("leaves by a link", image="out.png"),
    chat("no marker", "What?", image="a.png"),
    chat("two markers", "<image> <image>", image="a.png"),
    chat("up", image="../a.png"),
    chat("url", image="http://example.org/a.png"),
    chat("silent", answer=" ", image="a.png"),
    {"id": "no turns", "image": "a.png"},
    chat("number", image=7),
]
LLAVA_REASONS = {
    "missing_image": 2,
    "broken_image": 3,
    "refused_image": 1,
    "marker_mismatch": 2,
    "image_path": 2,
    "turns": 1,
    "fields": 2,
}
LLAVA_IMAGES = {"images": 15, "missing": 2, "broken": 4, "refused": 1, "misnamed": 3, "text_only": 2}


@pytest.fixture
def folder(tmp_path, write_tar):
    """Three sources: LLaVA records with files, rows with bytes, and shards."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for name, data in FILES.items():
        (root / "images" / name).write_bytes(data)
    (tmp_path / "outside.png").write_bytes(encoded(6))
    (root / "images" / "out.png").symlink_to(tmp_path / "outside.png")
    lines = [json.dumps(entry) for entry in LLAVA] + ["{broken", '{"a": 1, "a": 2}']
    (root / "chats.jsonl").write_text("\n".join(lines) + "\n")
    rows = [encoded(0), encoded(10), encoded(10), b"junk", encoded(11)]
    answers = ["one", "two", "three", "four", ""]
    table = {"image": [{"bytes": row, "path": None} for row in rows], "question": ["?"] * 5, "answer": answers}
    pq.write_table(pa.table(table), root / "rows.parquet", row_group_size=2)
    members = {"0.png": encoded(10), "0.txt": b"a dog", "1.png": encoded(12)[:100], "1.txt": b"a cat", "2.txt": b"none"}
    write_tar("data/shard.tar", members)
    return root


@pytest.fixture
def opened(folder):
    """Parts of a recipe with the sources, each with overrides."""

    def make(**overrides):
        sources = [
            {"name": "chats", "path": "chats.jsonl", "image_root": "images"},
            {"name": "rows", "path": "rows.parquet", "format": "vqa"},
            {"name": "shards", "path": "shard.tar", "format": "captions"},
        ]
        chosen = [source | overrides.get(source["name"], {}) for source in sources]
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"sources": chosen}))
        return load_records(load_recipe(folder / "recipe.yaml"))

    return make


def checked(mixture, measure=None, workers=0, pixels=False):
    tallies = [Tally(number) for number in range(len(mixture.parts))]
    check = RecordCheck(mixture.parts, measure or Measure(), pixels)
    check_records(check, workers, lambda tally: tallies[tally.source].add(tally))
    return tallies


def usable(mixture):
    """The records of an epoch with their decoded images: a plain loop over the whole mixture."""
    found, refused = [], Counter()
    for place in range(len(mixture)):
        try:
            record = mixture[place]
            found.append((record, [load_image(image, record.id) for image in record.images]))
        except DataError:
            refused[mixture.source_of(place).name] += 1
    return found, refused


def test_planted_faults_are_found(opened):
    chats, rows, shards = checked(opened())
    assert dict(chats.reasons) == LLAVA_REASONS | {"not_json": 2}
    assert {name: getattr(chats, name) for name in LLAVA_IMAGES} == LLAVA_IMAGES
    assert (chats.records, chats.occurrences, chats.bad_occurrences) == (24, 24, 15)
    assert dict(rows.reasons) == {"broken_image": 1, "turns": 1}
    assert (rows.records, rows.images, rows.broken) == (5, 4, 1)
    assert dict(shards.reasons) == {"broken_image": 1, "fields": 1}
    assert (shards.records, shards.images, shards.broken) == (3, 2, 1)
    assert chats.sides == {20: 7, 80: 1}


def test_bad_records_are_named(opened):
    chats, rows, _ = checked(opened())
    found = {bad.index: bad for bad in chats.bad}
    expected = {i: entry["id"] for i, entry in enumerate(LLAVA) if i >= 9} | {22: None, 23: None}
    assert {index: bad.id for index, bad in found.items()} == expected
    assert found[9].image.endswith("images/nowhere.png")
    assert found[10].image.endswith("images/gone.jpg")  # the first of two
    assert found[18].image == "http://example.org/a.png"
    assert all(bad.reason in REASONS and bad.message for bad in (*chats.bad, *rows.bad))
    assert [bad.index for bad in rows.bad] == [3, 4]


def test_workers_change_nothing(opened):
    mixture = opened(rows={"weight": 1.6})
    expected = checked(mixture, pixels=True)
    for workers in (1, 2):
        assert checked(mixture, workers=workers, pixels=True) == expected


def test_an_epoch_counts_as_often_as_it_has_a_record(opened):
    mixture = opened(chats={"weight": 2.3}, rows={"repeat": 3, "take": 3}, shards={"weight": 0.67})
    tallies = checked(mixture)
    records, refused = usable(mixture)
    assert [tally.occurrences for tally in tallies] == [len(part) for part in mixture.parts]
    assert [tally.records for tally in tallies] == [24, 3, 2]
    assert {t: n for t in ("chats", "rows", "shards") if (n := refused[t])} == {
        part.source.name: t.bad_occurrences for part, t in zip(mixture.parts, tallies, strict=True) if t.bad_occurrences
    }
    shapes = Counter((text_bytes(record), (1,) * len(images)) for record, images in records)
    assert sum((tally.shapes for tally in tallies), Counter()) == shapes


def test_tokens_are_those_of_the_processor(opened, processor, config):
    mixture = opened(chats={"repeat": 2, "image_first": True})
    measure = Measure(config, processor.tokenizer, processor.template, 200)
    tallies = checked(mixture, measure)
    examples = [processor.encode(record, images, 200) for record, images in usable(mixture)[0]]
    lengths = Counter(len(example.input_ids) for example in examples)
    found = Counter()
    for tally in tallies:
        for (text, tiles), count in tally.shapes.items():
            found[text + measure.visual(tiles)] += count
    assert found == lengths
    supervised = sum(label != -100 for example in examples for label in example.labels)
    assert sum(tally.supervised for tally in tallies) == supervised


def test_too_long_is_a_reason(opened, processor, config):
    mixture = opened()
    examples = {record.id: (record, images) for record, images in usable(mixture)[0] if record.source == "chats"}
    limit = len(processor.encode(*examples["fine"]).input_ids)
    expected = {name for name, pair in examples.items() if len(processor.encode(*pair).input_ids) > limit}
    (chats, *_) = checked(mixture, Measure(config, processor.tokenizer, "llama3", limit))
    found = {bad.id for bad in chats.bad if bad.reason == "length"}
    assert found == expected
    assert "two images" in found


def test_without_a_tokenizer_only_images_can_be_too_long(opened, config):
    # 14 visual tokens an image: a limit of 28 leaves no text beside two of them.
    (chats, *_) = checked(opened(), Measure(config, None, "llama3", 28))
    assert [bad.id for bad in chats.bad if bad.reason == "length"] == ["two images"]


def test_duplicates_by_bytes_and_pixels(opened, folder):
    mixture = opened()
    found = duplicates(checked(mixture, pixels=True), ["chats", "rows", "shards"], pixels=True)
    shown = ["a.png", "same_as_a.png", "wide.jpg", "a_again.bmp", "really_a_gif.jpg", "book.gif", "moved.webp"]
    sums = [hashlib.sha256((folder / "images" / name).read_bytes()).hexdigest() for name in shown]
    pixels = {load_image(folder / "images" / name, "0").tobytes() for name in shown}
    assert found["within"]["chats"] == {
        "images": 8,  # a.png twice
        "places": 7,
        "contents": len(set(sums)),
        "duplicates": 7 - len(set(sums)),
        "pixel_contents": len(pixels),
    }
    assert found["within"]["rows"]["duplicates"] == 1
    assert found["across"] == {"chats + rows": 1, "rows + shards": 1}
    assert found["all"]["places"] == 7 + 3 + 1
    assert found["all"]["contents"] == len(set(sums)) + 1


def test_budgets_are_counted_as_a_run_does(opened):
    mixture = opened(chats={"max_malformed": 15})
    tallies = checked(mixture)
    assert budgets(mixture.parts, tallies, 4) == []
    (shared,) = budgets(mixture.parts, tallies, 3)  # two and two, of sources without a budget of their own
    assert shared == "4 unusable records (rows 2, shards 2), error_budget is 3"
    strict = opened(chats={"max_malformed": 14})
    assert budgets(strict.parts, tallies, 4) == ["chats: 15 unusable records, max_malformed is 14"]


def test_a_source_that_may_have_none_is_counted_by_itself(opened):
    strict = opened(chats={"max_malformed": 0}, rows={"repeat": 2})
    tallies = checked(strict)
    assert budgets(strict.parts, tallies, 6) == ["chats: 15 unusable records, max_malformed is 0"]
    assert "6 unusable records (rows 4, shards 2)" in budgets(strict.parts, tallies, 5)[1]  # two records twice an epoch


def test_the_order_of_images_makes_no_other_shape(opened, folder, config_factory):
    orders = ["wide.jpg", "a.png"], ["a.png", "wide.jpg"]
    lines = [chat(str(i), "<image><image>", image=names) for i, names in enumerate(orders)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measure = Measure(
        config_factory(
            tiling=TilingConfig("aspect", 4), reducer=ReducerConfig(split="tiles", local_keep=None, summary="none")
        )
    )
    tiles = measure.tiles(80, 12), measure.tiles(20, 12)
    assert tiles[0] > tiles[1]
    (chats, *_) = checked(opened(), measure)
    assert chats.shapes == {(len("<image><image>A thing."), tiles[::-1]): 2}


def test_stretches_hold_records_of_one_row_group(tmp_path):
    """Of a part of the records, too; none is longer than an eighth of all."""
    for name, rows, group in (("a", 240, 50), ("b", 60, 40)):
        table = pa.table({"question": ["?"] * rows, "answer": ["it"] * rows})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=group)
    sources = [
        {"name": n, "path": f"{n}.parquet", "format": "vqa"} | more for n, more in (("a", {"take": 130}), ("b", {}))
    ]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"sources": sources}))
    check = RecordCheck(load_records(load_recipe(tmp_path / "recipe.yaml")).parts, Measure())
    places = range(130 + 60)
    assert len(check) == len(places)

    def group_of(place):
        number, index = check.locate(place)
        return number, index // (50, 40)[number]

    expected = []
    for _, members in itertools.groupby(places, group_of):
        stretch, most = list(members), len(places) // 8
        expected += [stretch[start : start + most] for start in range(0, len(stretch), most)]
    assert list(check.batches(1)) == expected


def test_bytes_are_estimated_as_tokens_up_to_the_limit(config):
    tally = Tally(0, shapes=Counter({(4000, (1, 1)): 2, (5000, (1, 1)): 3, (40, (1,)): 1}))
    estimate = token_shapes(tally, Measure(config, None, "llama3", 100))
    # 14 visual tokens an image: 72 places are left beside two, and the long ones fall together.
    assert estimate == {(72, (1, 1)): 5, (40 // BYTES_PER_TOKEN, (1,)): 1}
    assert token_shapes(tally, Measure())[4000 // BYTES_PER_TOKEN, (1, 1)] == 2


DIES = """
import os, signal, sys
from skipvision_train.data import check
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.errors import DataError

real = check.load_image
def load_image(ref, name):
    if "wide" in str(ref): os.kill(os.getpid(), signal.SIGKILL)
    return real(ref, name)
check.load_image = load_image
records = check.RecordCheck(load_records(load_recipe(sys.argv[1])).parts, check.Measure())
try:
    check.check_records(records, 2, lambda tally: None)
except DataError as error:
    print(error)
"""


def test_a_lost_worker_is_named_with_its_record(opened, folder):
    opened()
    done = subprocess.run([sys.executable, "-c", DIES, folder / "recipe.yaml"], capture_output=True, text=True)
    assert "record two images of chats" in done.stdout, done.stderr
    assert "try fewer workers" in done.stdout


def test_histogram_counts_every_value():
    rng = np.random.default_rng(0)
    values = Counter(int(value) for value in rng.integers(0, 3000, 500))
    drawn = histogram(values)
    for low, high, count in zip(drawn["edges"], drawn["edges"][1:], drawn["counts"], strict=False):
        assert count == sum(n for value, n in values.items() if low <= value < high)
    assert sum(drawn["counts"]) == 500
    assert 0 not in (drawn["counts"][0], drawn["counts"][-1])


def test_quantiles_are_numpys():
    values = [3, 3, 8, 9, 12, 40, 41, 41, 41, 200]
    for share in (0.1, 0.5, 0.55, 0.99, 1.0):
        assert quantile(Counter(values), share) == np.quantile(values, share, method="inverted_cdf")


def test_up_to_six_values_are_listed():
    assert distribution(Counter(range(6)))["values"] == {str(value): 1 for value in range(6)}
    assert distribution(Counter(range(7)))["values"] is None
    assert distribution(Counter({2: 3, 6: 1}))["mean"] == 3


def test_distributions_on_one_line():
    assert bars(distribution(Counter()), "tokens") == "none"
    assert bars(distribution(Counter({0: 1, 144: 3})), "tokens") == "0 (25 %), 144 (75 %) tokens"
    # Bins from 1, 2, 3, 4, 6, 8, 11, 16, 23, 32 on hold 1, 2, 3, 9, 13, 27, 65, 133, 243, 32; eighths, rounded up.
    line = bars(distribution(Counter({value: value for value in range(1, 33)})), "tokens")
    assert line == "1 ▁▁▁▁▁▁▃▅█▂ 32 tokens; median 23, mean 21.67, 99 % up to 32"
