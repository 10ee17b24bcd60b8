"""Samples for people to look at: what is marked is what was answered, and pictures are what the model is given."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby

import chat_tokenizers
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision_train.data.preview import Encoder, ImageRun, Sample, Token, draw, summaries, token_row, token_texts
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.recipes import load_recipe, load_records, load_streams
from skipvision_train.data.records import ImageRef, Record
from skipvision_train.models.settings import ReducerConfig, TilingConfig
from skipvision_train.plans.rules import TokenKind

ENDS = {"llama3": "<|eot_id|>", "plain": "<|eot_id|>", "vicuna_v1": "</s>", "chatml": "<|im_end|>"}
BEFORE = {"vicuna_v1": " "}
"""What a template supervises in front of an answer."""


def bytes_with_control_tokens():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


TOKENIZERS = {"bytes": bytes_with_control_tokens} | chat_tokenizers.EXACT

CONVERSATIONS = {
    "one turn": (("<image>\nWhat?", " A cat. "), None, 1),
    "several turns": (("<image>\nWhat?", "A cat.", "Where?", "On a mat!", "Why?", "It is warm."), None, 1),
    "several images": (("<image>\n<image> Compare", "Same.", "now <image> too", "Other."), None, 3),
    "text only": (("Hi", "Hello, ünïcode 日本 !!\n\nyes"), "Be brief.", 0),
    "control tokens spelled out": (("<|eot_id|></s>", "<|im_end|> <|eot_id|>"), None, 0),
}


def placeholder(tokenizer):
    names = ("<|reserved_special_token_0|>", chat_tokenizers.IMAGE)
    return next(found for name in names if (found := tokenizer.get_vocab().get(name)) is not None)


def supervised_texts(sample):
    runs = groupby(sample.tokens, key=lambda token: token.supervised)
    return ["".join(token.text for token in run) for supervised, run in runs if supervised]


@pytest.fixture
def files(tmp_path, picture):
    def make(count, size=(20, 20)):
        paths = [tmp_path / f"{number}.png" for number in range(count)]
        for number, path in enumerate(paths):
            picture(*size, seed=number).save(path)
        return paths

    return make


@pytest.fixture
def tiled(config_factory, tokenizer, image_id):
    """Up to four tiles of 32 pixels, 2 + 4 + 16 tokens each; those of the local tiles skip."""
    config = config_factory(
        image_token_id=image_id,
        reducer=ReducerConfig(split="tiles", local_keep=None, summary="none"),
        tiling=TilingConfig("aspect", 4),
    )
    return SkipVisionProcessor.from_config(config, tokenizer)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", ENDS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_marked_is_exactly_the_answers(config_factory, turns, record, files, name, template, conversation):
    texts, system, images = CONVERSATIONS[conversation]
    if template == "plain":
        texts, system, images = texts[:2], None, texts[0].count("<image>")
    tokenizer = TOKENIZERS[name]()
    config = config_factory(image_token_id=placeholder(tokenizer))
    encoder = Encoder(SkipVisionProcessor.from_config(config, tokenizer, template), template, None)
    drawn = Sample("test", "record 0", record(turns(*texts, system=system), files(images)))
    sample = encoder.sample(drawn)
    assert sample.problem is None
    marked, answers = supervised_texts(sample), [text.strip() + ENDS[template] for text in texts[1::2]]
    if name in ("bytes", "byte-level"):
        assert marked == [BEFORE.get(template, "") + answer for answer in answers]
    else:  # these begin some texts with a space of their own
        assert [text.removeprefix(" ") for text in marked] == answers
    assert sample.length == len(encoder.example(drawn.record).input_ids)
    assert (sample.kept_turns, sample.cut_tokens) == (len(drawn.record.turns), 0)
    per_image = len(config.image_token_kinds())
    runs = [token for token in sample.tokens if isinstance(token, ImageRun)]
    assert [run.number for run in runs] == list(range(images))
    assert all(sum(run.counts.values()) == per_image for run in runs)
    assert sample.visual == images * per_image


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_tokens_are_told_from_their_spelling(config_factory, turns, record, name):
    tokenizer = TOKENIZERS[name]()
    config = config_factory(image_token_id=placeholder(tokenizer))
    encoder = Encoder(SkipVisionProcessor.from_config(config, tokenizer, "chatml"), "chatml", None)
    sample = encoder.sample(Sample("test", "", record(turns("<|im_start|><|im_end|>", "<|im_end|>"))))
    special = [token.text for token in sample.tokens if isinstance(token, Token) and token.special]
    assert special == ["<|im_start|>", "<|im_end|>"] * 2
    text = "".join(token.text for token in sample.tokens if not token.special)
    assert text.replace(" ", "") == "user\n<|im_start|><|im_end|>\nassistant\n<|im_end|>\n"


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(TOKENIZERS)), text=st.text(max_size=20))
def test_texts_of_tokens_add_up_to_the_text(name, text):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_stands_at_the_last():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé日b", add_special_tokens=False)["input_ids"]
    assert token_texts(ids, tokenizer) == ["a", "", "é", "", "", "日", "b"]
    assert token_texts(ids[:2], tokenizer) == ["a", "\ufffd"]  # nothing follows that could finish it


def test_bytes_that_never_are_a_character_are_shown_eight_at_a_time():
    tokenizer = byte_tokenizer()
    inside = tokenizer("é", add_special_tokens=False)["input_ids"][1]
    ids = [inside] * 18 + tokenizer("a", add_special_tokens=False)["input_ids"]
    assert token_texts(ids, tokenizer) == [*([""] * 7 + ["\ufffd" * 8]) * 2, "", "", "\ufffd\ufffda"]


def test_kinds_of_an_image(config, processor, turns, record, files):
    """The tiny model's order is 2 retained, 4 middle, a summary, 5 skipped, 1 retained, a summary."""
    example = Encoder(processor, "llama3", None).example(record(turns("<image>", "a"), files(1)))
    (run,) = (token for token in token_row(example, processor) if isinstance(token, ImageRun))
    names = [(kind.name, count) for kind, count in run.runs]
    assert names == [
        *(("RETAINED", 2), ("MIDDLE", 4), ("SUMMARY", 1), ("SKIPPED", 5), ("RETAINED", 1), ("SUMMARY", 1)),
    ]
    assert run.counts == {
        TokenKind.RETAINED: 3,
        TokenKind.MIDDLE: 4,
        TokenKind.SUMMARY: 2,
        TokenKind.SKIPPED: 5,
    }
    assert run.supervised == 0
    place = example.input_ids.index(processor.image_token_id)
    example.labels[place] = processor.image_token_id
    (wrong,) = (token for token in token_row(example, processor) if isinstance(token, ImageRun))
    assert wrong.supervised == 1  # a bug elsewhere would be seen


def test_pictures_are_what_the_model_is_given(processor, turns, record, tmp_path, picture):
    side = processor.vision["image_size"]
    image = picture(side, side)  # nothing to pad or resize
    image.save(tmp_path / "exact.png")
    sample = Encoder(processor, "llama3", None).sample(
        Sample("test", "", record(turns("<image>", "a"), [tmp_path / "exact.png"]))
    )
    (shown,) = sample.pictures
    assert (shown.name, shown.width, shown.height, shown.columns, shown.rows) == ("exact.png", side, side, 1, 1)
    assert np.array_equal(np.asarray(shown.view), np.asarray(image))
    assert shown.local is None


def test_tiles_are_put_together_again(tiled, turns, record, tmp_path, picture):
    side = tiled.vision["image_size"]
    wide, square = picture(3 * side, side, 1), picture(side, side, 2)
    wide.save(tmp_path / "wide.png")
    square.save(tmp_path / "square.png")
    files = [tmp_path / f"{name}.png" for name in ("wide", "square", "wide")]
    drawn = record(turns("<image> and <image> and <image>", "a"), files)
    sample = Encoder(tiled, "llama3", None).sample(Sample("test", "", drawn))
    first, second, third = sample.pictures
    assert np.array_equal(np.asarray(third.local), np.asarray(wide))
    assert (first.columns, first.rows, first.view.size) == (3, 1, (side, side))
    assert np.array_equal(np.asarray(first.local), np.asarray(wide))
    assert np.array_equal(np.asarray(second.local), np.asarray(square))
    assert np.array_equal(np.asarray(second.view), np.asarray(square))
    runs = [token for token in sample.tokens if isinstance(token, ImageRun)]
    assert [run.counts for run in runs[:2]] == [  # the last local token runs the FFN
        {TokenKind.RETAINED: 22 + 1, TokenKind.SKIPPED: 3 * 22 - 1},
        {TokenKind.RETAINED: 22 + 1, TokenKind.SKIPPED: 22 - 1},
    ]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_what_max_length_cuts(processor, turns, record, files, system):
    drawn = record(turns("<image> a", "b", "c", "d", "e" * 9, "f", system=system), files(1))
    two_pairs = replace(drawn, turns=drawn.turns[:-2])
    whole, kept = (len(Encoder(processor, "llama3", None).example(one).input_ids) for one in (drawn, two_pairs))
    sample = Encoder(processor, "llama3", kept).sample(Sample("test", "", drawn))
    assert (sample.length, sample.cut_tokens) == (kept, whole - kept)
    assert drawn.turns[sample.kept_turns :] == drawn.turns[-2:]
    assert supervised_texts(sample) == ["b<|eot_id|>", "d<|eot_id|>"]


def test_records_that_cannot_be_used_say_why(processor, turns, record, files, tmp_path):
    encoder = Encoder(processor, "llama3", 40)
    image = files(1)
    (tmp_path / "broken.png").write_bytes(image[0].read_bytes()[:60])
    for drawn, reason in (
        (record(turns("<image>", "a"), [tmp_path / "gone.png"]), "no such image file"),
        (record(turns("<image>", "a"), [tmp_path / "broken.png"]), "no image that can be decoded"),
        (record(turns("a", "b" * 50)), "max_length is 40"),
    ):
        sample = encoder.sample(Sample("test", "record 3", drawn))
        assert reason in sample.problem
        assert (sample.tokens, sample.pictures, sample.length) == ((), (), 0)
        assert sample.record is drawn
    unread = Sample("test", "record 4", None, "no JSON")
    assert encoder.sample(unread) is unread


def recipe_of(tmp_path, llava, *counts, broken=()):
    lines = ["sources:"]
    for number, count in enumerate(counts):
        entries = [llava("q", f"answer {number} {i}", id=f"{number}/{i}") for i in range(count)]
        texts = ["{" if (number, i) in broken else json.dumps(entry) for i, entry in enumerate(entries)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(texts))
        lines.append(f"  - {{name: s{number}, path: {number}.jsonl}}")
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    return load_recipe(tmp_path / "r.yaml")


def ids(samples):
    return [sample.record.id for sample in samples]


def test_draws_depend_on_the_seed_and_the_sources_name(tmp_path, llava):
    records = load_records(recipe_of(tmp_path, llava, 50, 3, 50))
    first = list(draw(records, 5, seed=0))
    assert [sample.source for sample in first] == ["s0"] * 5 + ["s1"] * 3 + ["s2"] * 5
    assert len(set(ids(first))) == 13
    places = [int(sample.place.removeprefix("record ")) for sample in first]
    assert places == sorted(places)
    assert ids(draw(records, 5, seed=0)) == ids(first)
    assert ids(draw(records, 5, seed=1)) != ids(first)
    for sample in first:  # the place is where the data set has the record
        assert records[int(sample.place.removeprefix("record "))] == sample.record
    fewer = load_records(recipe_of(tmp_path, llava, 50))
    assert ids(draw(fewer, 5, seed=0)) == ids(first)[:5]


def test_draws_of_streams(tmp_path, llava):
    recipe = recipe_of(tmp_path, llava, 40, 4)
    first = list(draw(load_streams(recipe), 4, seed=0, buffer=100))
    assert [sample.source for sample in first] == ["s0"] * 4 + ["s1"] * 4
    assert sorted(ids(first)[4:]) == ["1/0", "1/1", "1/2", "1/3"]
    assert ids(draw(load_streams(recipe), 4, seed=0, buffer=100)) == ids(first)
    assert ids(draw(load_streams(recipe), 4, seed=5, buffer=100)) != ids(first)


@pytest.mark.parametrize("load", [load_records, load_streams])
def test_a_record_that_cannot_be_read_is_drawn_with_its_reason(tmp_path, llava, load):
    recipe = recipe_of(tmp_path, llava, 3, broken={(0, 1)})
    samples = sorted(draw(load(recipe), 3, seed=0), key=lambda sample: sample.place)
    assert [sample.record is None for sample in samples] == [False, True, False]
    assert "0.jsonl" in samples[1].problem


def test_summaries(processor, tmp_path, llava):
    records = load_records(recipe_of(tmp_path, llava, 9, 5, 2, broken={(1, 0), (1, 1)}))
    encoder = Encoder(processor, "llama3", None)
    samples = [encoder.sample(sample) for sample in draw(records, 5, seed=0) if sample.source != "s2"]
    first, second, none = summaries(records, samples)
    assert (first.name, first.format, first.records, first.shown, first.unusable) == ("s0", "llava", 9, 5, 0)
    assert (second.records, second.shown, second.unusable, second.text_only, second.cut) == (5, 5, 2, 3, 0)
    assert (none.shown, none.length, none.supervised) == (0, 0.0, 0.0)
    answers = [sample.record.turns[1].text for sample in samples if sample.source == "s0"]
    learned = [len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in answers]
    assert first.supervised == pytest.approx(sum(learned) / 5)
    assert first.visual == 0.0


def test_the_encoder_applies_draft_and_resizer(processor, turns, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "large.jpg")
    drawn = Record("1", "test", (ImageRef(tmp_path / "large.jpg"),), tuple(turns("<image>", "a")))
    plain, draft = (Encoder(processor, "llama3", None, draft=on).sample(Sample("t", "", drawn)) for on in (False, True))
    assert (plain.pictures[0].width, draft.pictures[0].width) == (256, 256)  # of the file, however it is decoded
    assert not np.array_equal(np.asarray(plain.pictures[0].view), np.asarray(draft.pictures[0].view))
