"""The processor as training, evaluation and users of transformers call it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, AutoTokenizer

from skipvision_train.data.images import to_pixels
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.records import Turn
from skipvision_train.errors import DataError
from skipvision_train.models.settings import ReducerConfig
from skipvision_train.plans.rules import TokenKind


def kinds_at(example, image_id):
    return [k for k, t in zip(example.token_kinds, example.input_ids, strict=True) if t == image_id]


def test_layout_of_an_image(processor, config, image_id, turns, picture):
    example = processor.encode(turns("<image>\nWhat?", "A cat."), [picture()])
    R, M, S, Y = TokenKind.RETAINED, TokenKind.MIDDLE, TokenKind.SKIPPED, TokenKind.SUMMARY
    assert kinds_at(example, image_id) == [R] * 2 + [M] * 4 + [Y] + [S] * 5 + [R, Y]
    assert tuple(kinds_at(example, image_id)) == config.image_token_kinds()
    assert processor.tokens_per_image == 14
    others = [k for k, t in zip(example.token_kinds, example.input_ids, strict=True) if t != image_id]
    assert set(others) == {TokenKind.TEXT}
    assert torch.equal(example.pixel_values, to_pixels([picture()], config.vision_config))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    questions=st.lists(st.lists(st.sampled_from(["<image>", " word ", "!", "\n"]), max_size=5), min_size=1, max_size=3),
    keep=st.integers(1, 16),
    summary=st.sampled_from(["both", "former", "latter", "none"]),
)
def test_every_image_has_its_kinds_in_order(config_factory, tokenizer, picture, questions, keep, summary):
    image_id = tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")
    config = config_factory(image_token_id=image_id, reducer=ReducerConfig(local_keep=keep, summary=summary))
    processor = SkipVisionProcessor.from_config(config, tokenizer)
    sample = [t for parts in questions for t in (Turn("user", "".join(parts)), Turn("assistant", "ok"))]
    count = sum(turn.text.count("<image>") for turn in sample)
    example = processor.encode(sample, [picture()] * count)
    assert tuple(kinds_at(example, image_id)) == config.image_token_kinds() * count
    assert len(example.input_ids) == len(example.labels) == len(example.token_kinds)
    assert (example.pixel_values is None) == (count == 0)
    for index, kind in enumerate(example.token_kinds):
        assert (kind != TokenKind.TEXT) == (example.input_ids[index] == image_id)


def test_records_are_named_in_errors(processor, record, turns, picture):
    sample = record(turns("<image>", "x"), identity="42")
    with pytest.raises(DataError, match="record 42 of test: 1 <image> markers in the turns, but 0 images"):
        processor.encode(sample)
    with pytest.raises(DataError, match="record 42 of test: the first question and answer take"):
        processor.encode(sample, [picture()], max_length=10)


def test_template_of_one_call(processor, turns, picture):
    example = processor.encode(turns("q <image>", "A cat."), [picture()], template="plain")
    assert processor.decode([t for t in example.labels if t != -100]) == "A cat.<|eot_id|>"
    assert len(processor.encode_prompt(turns("q <image>"), [picture()], template="plain").input_ids) == 15
    with pytest.raises(DataError, match="template 'x' is unknown"):
        processor.encode(turns("a", "b"), template="x")


def test_prompt_is_the_beginning_of_the_sample(processor, turns, picture):
    sample = turns("<image>\nWhat?", "A cat.", system="Be brief.")
    whole, prompt = processor.encode(sample, [picture()]), processor.encode_prompt(sample[:-1], [picture()])
    assert prompt.labels == []
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert whole.token_kinds[: len(prompt.input_ids)] == prompt.token_kinds


def test_round_trip_through_auto_processor(processor, config, turns, picture, tmp_path):
    processor.encode(turns("a", "b"))  # leaves the tokenizer as it was
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SkipVisionProcessor
    sample = turns("<image>\nWhat <|eot_id|>?", "A cat.")
    before, after = processor.encode(sample, [picture()]), loaded.encode(sample, [picture()])
    assert after.input_ids == before.input_ids
    assert after.labels == before.labels
    assert after.token_kinds == before.token_kinds
    assert torch.equal(after.pixel_values, before.pixel_values)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == processor.chat_template
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("processor_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).is_file()


def test_another_template_survives_saving_and_leaves_the_chat_template(config, fresh_tokenizer, tmp_path):
    fresh_tokenizer.chat_template = "{{ 'mine' }}"
    SkipVisionProcessor.from_config(config, fresh_tokenizer, template="plain").save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.template == "plain"
    assert loaded.tokenizer.chat_template == "{{ 'mine' }}"


def test_placeholder_must_be_a_special_token(config_factory, fresh_tokenizer):
    with pytest.raises(DataError, match="image_token_id: 3 is no special token of tokenizer"):
        SkipVisionProcessor.from_config(config_factory(image_token_id=3), fresh_tokenizer)


def message(role, *parts):
    return {"role": role, "content": list(parts)}


def text(value):
    return {"type": "text", "text": value}


def test_chat_messages_make_a_batch(processor, turns, picture, tmp_path):
    first, second = picture(), picture(30, 10, seed=1)
    second.save(tmp_path / "b.png")
    messages = [
        {"role": "system", "content": "Be brief."},
        message("user", {"type": "image", "image": first}, text("What?")),
        message("assistant", text("A cat.")),
        message("user", text("And"), {"type": "image", "path": str(tmp_path / "b.png")}),
    ]
    batch = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    sample = turns("<image>\nWhat?", "A cat.", "And\n<image>", system="Be brief.")
    expected = processor.encode_prompt(sample, [first, second])
    assert set(batch) == {"input_ids", "attention_mask", "token_kinds", "pixel_values"}
    assert batch["input_ids"].tolist() == [expected.input_ids]
    assert batch["token_kinds"].tolist() == [expected.token_kinds]
    assert torch.equal(batch["pixel_values"], expected.pixel_values)


def test_chat_batches_are_padded_left(processor, picture):
    conversations = [
        [message("user", text("Hi"))],
        [message("user", {"type": "image"}, text("What is the capital?"))],
        [{"role": "user", "content": "<image>\nWhat is the capital?"}],
    ]
    batch = processor.apply_chat_template(conversations, images=[picture(), picture()])
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert batch["token_kinds"][0, 0] == TokenKind.PAD
    assert batch["input_ids"][1].tolist() == batch["input_ids"][2].tolist()
    assert batch["pixel_values"].shape[0] == 2
    ids = processor.apply_chat_template(conversations[0], return_dict=False)
    assert ids.shape[0] == 1


def test_chat_with_an_answer_has_labels(processor):
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    batch = processor.apply_chat_template(conversation, add_generation_prompt=False)
    labels = batch["labels"][0]
    assert processor.decode(labels[labels != -100]) == "Ho<|eot_id|>"


@pytest.mark.parametrize(
    ("content", "images", "error"),
    [
        ([{"type": "video"}], 0, "message 0, part 0: a text part or an image part is expected"),
        ([{"type": "image", "url": "http://x"}], 0, "images are not downloaded"),
        ([{"type": "image", "image": "https://x/y.png"}], 0, "images are not downloaded"),
        ([{"type": "image", "image": 3}], 0, "must be a PIL image or a path, found int"),
        ([{"type": "image"}], 0, "an image is expected here"),
        ("about <image>", 0, "an image is expected here"),
        ([{"type": "image", "image": "/nowhere/x.png"}], 0, "/nowhere/x.png .* no such image file"),
        ("hi", 1, "images: 1 more than"),
        (3, 0, "content must be text or a list of parts, found int"),
    ],
)
def test_chat_messages_that_cannot_be_used(processor, picture, content, images, error):
    with pytest.raises(DataError, match=error):
        processor.apply_chat_template([{"role": "user", "content": content}], images=[picture()] * images)


def test_chat_messages_without_role(processor):
    with pytest.raises(DataError, match="message 0: a mapping with 'role' and 'content'"):
        processor.apply_chat_template([{"content": "x"}])
    with pytest.raises(DataError, match="only 'pt' is supported"):
        processor.apply_chat_template([{"role": "user", "content": "x"}], return_tensors="np")


def test_rendered_text_gives_the_same_ids(processor, picture):
    """The Jinja template, an independent path, against ids written directly."""
    messages = [
        message("system", text(" Be brief.\n")),
        message("user", {"type": "image", "image": picture()}, text(" What is the capital? ")),
        message("assistant", text("Paris ")),
        message(
            "user",
            text("and"),
            text(""),
            {"type": "image", "image": picture(seed=1)},
            text(" now! "),
            text(""),
            text(" sure?"),
        ),
    ]
    rendered = processor.apply_chat_template(messages, tokenize=False)
    assert rendered.count("<|begin_of_text|>") == 1
    assert rendered.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    batch = processor(text=rendered, images=[picture(), picture(seed=1)], return_tensors="pt")
    expected = processor.apply_chat_template(messages)
    assert set(batch) == set(expected)
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


def test_call_with_text(processor, picture):
    token = processor.image_token
    batch = processor(text=["a", f"{token} b {token}"], images=[picture(), picture()], padding=True)
    assert batch["input_ids"].shape == batch["token_kinds"].shape
    bos = processor.tokenizer.bos_token_id
    assert (batch["input_ids"] == bos).sum(1).tolist() == [1, 1]  # added where the text has none
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, 28]
    with pytest.raises(DataError, match=r"1 image tokens <\|reserved_special_token_0\|> in the text, but 2 images"):
        processor(text=token, images=[picture()] * 2)
    with pytest.raises(DataError, match="set padding=True"):
        processor(text=["a", "a b c"], padding=False)
    with pytest.raises(DataError, match="text: a text in the chat format is needed"):
        processor(images=[picture()])


def test_padding_id_is_no_image(processor):
    assert processor.tokenizer.pad_token_id is None
    assert processor.pad_id == processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    processor.tokenizer.pad_token = "<|end_of_text|>"
    assert processor.pad_id == processor.tokenizer.convert_tokens_to_ids("<|end_of_text|>")


def test_a_processor_of_another_version_is_refused(processor):
    runs = processor.image_tokens["1"]
    with pytest.raises(DataError, match=r"^image_tokens: .*; a mapping from numbers of tiles is needed"):
        type(processor)(processor.tokenizer, processor.vision, processor.image_token_id, runs)
