"""The token of an image is one that nothing else is written with."""

from __future__ import annotations

import pytest
from byte_tokenizer import IMAGE_TOKEN, byte_tokenizer
from chat_tokenizers import CONTROL, EXACT, IMAGE, LOSSY, OWN_TEMPLATES
from transformers import AddedToken

from skipvision_train.data.placeholder import free, listed, taken
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.records import Turn
from skipvision_train.data.templates import get_template
from skipvision_train.errors import DataError

TURNS = [
    Turn("system", "Be brief."),
    Turn("user", "What is the capital of France? 日本"),
    Turn("assistant", "Paris."),
    Turn("user", "Is it warm?"),
    Turn("assistant", "Yes."),
]
TEMPLATES = ("llama3", "vicuna_v1", "chatml", "qwen2_5", "plain")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", [*EXACT, *LOSSY])
def test_no_conversation_has_a_free_token(name, template):
    tokenizer = (EXACT | LOSSY)[name]()
    turns = TURNS[1:3] if template == "plain" else TURNS
    written = set(get_template(template).encode(turns, tokenizer, (), 0).input_ids)
    special = {i for i in written if (token := tokenizer.added_tokens_decoder.get(i)) is not None and token.special}
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    assert special | named <= set(taken(tokenizer, template))
    assert not (special | named) & set(tokenizer.convert_tokens_to_ids(free(tokenizer, template)))
    assert free(tokenizer, template)[0] == IMAGE


@pytest.mark.parametrize("name", ["zephyr", "gemma"])
def test_a_chat_template_of_ones_own(name):
    tokenizer = EXACT["byte-level"].__wrapped__()
    tokenizer.chat_template = OWN_TEMPLATES[name]
    expected = {"zephyr": {"<|im_end|>"}, "gemma": {"<s>", "<|im_start|>", "<|im_end|>"}}[name]
    assert set(tokenizer.convert_ids_to_tokens(list(taken(tokenizer, "tokenizer")))) == expected
    assert set(free(tokenizer, "tokenizer")) == set(CONTROL) - expected


@pytest.mark.parametrize(("name", "becomes"), [("word piece", True), ("sentencepiece", False)])
def test_the_unknown_token_is_free_where_no_text_becomes_it(name, becomes):
    tokenizer = (EXACT | LOSSY)[name]()
    unknown = tokenizer.unk_token_id
    assert (unknown in tokenizer("\u2603\ue123", add_special_tokens=False)["input_ids"]) == becomes
    assert (unknown in taken(tokenizer, "llama3")) == becomes


def test_a_padding_token_may_stand_for_images(config_factory):
    """Vicuna pads with its unknown token, and has no other special one that is free."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = IMAGE_TOKEN
    assert free(tokenizer, "llama3") == [IMAGE_TOKEN, "<|end_of_text|>"]
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    processor = SkipVisionProcessor.from_config(config_factory(image_token_id=image), tokenizer)
    batch = processor(text=["a", "a longer text"])
    assert (batch["attention_mask"] == 0).any()
    assert not (batch["input_ids"] == image).any()


def test_a_format_for_another_tokenizer_takes_nothing():
    assert set(taken(byte_tokenizer(), "chatml").values()) == {
        "the token that texts begin with (bos_token)",
        "the token that texts end with (eos_token)",
    }


def test_tokens_for_images_come_first():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<a>", "<image>", "<b>")], special_tokens=True)
    tokenizer.add_tokens(["<typed>"])
    assert free(tokenizer, "llama3") == ["<image>", IMAGE_TOKEN, "<|end_of_text|>", "<a>", "<b>"]
    assert listed(free(tokenizer, "llama3")) == f"<image> or {IMAGE_TOKEN} or <|end_of_text|>"
    assert listed([]).startswith("none yet: add one to the tokenizer")


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>"])
def test_a_processor_refuses_a_token_that_is_taken(config_factory, token):
    tokenizer = byte_tokenizer()
    index = tokenizer.convert_tokens_to_ids(token)
    with pytest.raises(DataError) as refused:
        SkipVisionProcessor.from_config(config_factory(image_token_id=index), tokenizer)
    assert str(refused.value).startswith(f"image_token_id: {index} ({token}) is ")
    assert str(refused.value).endswith(f"use the id of a free special token: {IMAGE_TOKEN} or <|end_of_text|>")
