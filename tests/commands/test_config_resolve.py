"""What the tokenizer and the paths of a configuration must be: the field, the reason, and a way that works."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
from byte_tokenizer import IMAGE_TOKEN, byte_tokenizer
from chat_tokenizers import qwen_words, sentencepiece
from tokenizers import Tokenizer
from transformers import LlamaConfig

from skipvision_train import cli
from skipvision_train.commands import train
from skipvision_train.config.resolve import image_token_id, load_tokenizer, model_config, text_config
from skipvision_train.config.specs import DataSpec, ModelSpec, StageSpec, TextSpec, TrainConfig, TrainerSpec
from skipvision_train.errors import CheckpointError, ConfigError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def config(vocab_size=320, template="llama3", **fields) -> TrainConfig:
    text = TextSpec(vocab_size=vocab_size, num_key_value_heads=2, **SMALL)
    return TrainConfig(
        model=ModelSpec(text=text, **fields),
        stage=StageSpec(template=template),
        data=DataSpec(recipe="any"),
        trainer=TrainerSpec(output_dir="any", max_steps=1),
    )


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("<|eot_id|>", "the token that texts end with (eos_token)"),
        ("<|begin_of_text|>", "the token that texts begin with (bos_token)"),
        ("<|end_header_id|>", "a control token of template llama3"),
        ("A", "no special token, so that a text may spell it"),
        ("<img>", None),
    ],
)
def test_a_placeholder_that_means_something(token, reason):
    with pytest.raises(ConfigError) as refused:
        model_config(config(image_token=token), byte_tokenizer())
    found = f"{token!r} is {reason}" if reason else f"the tokenizer has no token {token!r}"
    assert str(refused.value) == (
        f"model.image_token: {found}; use a special token that is free, "
        f"""'model.image_token="{IMAGE_TOKEN}"' or 'model.image_token="<|end_of_text|>"'"""
    )


def vicuna(pad=None):
    """With no other special tokens than LLaMA-2's."""
    tokenizer = sentencepiece("normalizer")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in ("<s>", "</s>")]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": pad} if pad else {})
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)


@pytest.mark.parametrize("token", ["<s>", "</s>", "<|reserved_special_token_0|>"])
def test_what_a_message_suggests_can_be_typed(token, monkeypatch):
    tokenizer = vicuna()
    with pytest.raises(ConfigError) as refused:
        image_token_id(tokenizer, token, "vicuna_v1")
    (suggested,) = shlex.split(str(refused.value).partition(" free, ")[2])
    assert suggested == 'model.image_token="<unk>"'
    seen = []
    monkeypatch.setattr(train, "run", seen.append)
    monkeypatch.setattr(sys, "argv", ["skipvision"])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", suggested])
    assert image_token_id(tokenizer, seen[0].model.image_token, "vicuna_v1") == tokenizer.unk_token_id


def test_no_free_token():
    tokenizer = vicuna()
    tokenizer.eos_token = "<unk>"
    with pytest.raises(ConfigError, match=r"'<unk>' is the token that texts end with .* none yet: add one to the"):
        image_token_id(tokenizer, "<unk>", "vicuna_v1")


def test_vicunas_own_files():
    """They pad with the unknown token, which is the one that is free."""
    tokenizer = vicuna(pad="<unk>")
    assert image_token_id(tokenizer, "<unk>", "vicuna_v1") == tokenizer.unk_token_id


def test_the_largest_id_needs_a_row(tmp_path):
    tokenizer = qwen_words()
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert len(tokenizer) < 2000 < largest  # a vocabulary with gaps
    cfg = config(2000, template="chatml", image_token="<|image_pad|>")
    with pytest.raises(
        ConfigError, match=rf"^model\.text\.vocab_size: 2000 is less than the tokenizer's {largest + 1} r"
    ):
        model_config(cfg, tokenizer)
    cfg.model.text.vocab_size = largest
    with pytest.raises(ConfigError, match=rf"its token {token!r} has id {largest}$"):
        model_config(cfg, tokenizer)
    cfg.model.text.vocab_size = largest + 1
    assert model_config(cfg, tokenizer).text_config.vocab_size == largest + 1
    LlamaConfig(vocab_size=2000, num_key_value_heads=2, **SMALL).save_pretrained(tmp_path)
    cfg.model.llm = str(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"^model\.tokenizer: its token .* has id {largest}, but {tmp_path} has 2000 r"
    ):
        model_config(cfg, tokenizer)


@pytest.mark.parametrize("path", ["model.llm", "stage.start_from", "model.tokenizer"])
def test_a_path_that_leads_nowhere(path, tmp_path):
    cfg = config()
    part, name = path.split(".")
    setattr(getattr(cfg, part), name, str(tmp_path / "nope"))
    for read in (load_tokenizer, text_config) if path != "model.tokenizer" else (load_tokenizer,):
        with pytest.raises(CheckpointError, match=rf"^{path}: {tmp_path}/nope does not exist$"):
            read(cfg)
    (tmp_path / "nope").mkdir()
    with pytest.raises(CheckpointError, match=rf"^{path}: {tmp_path}/nope holds no tokenizer: "):
        load_tokenizer(cfg)
    (tmp_path / "nope" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/nope/tokenizer.json: a git-lfs pointer"):
        load_tokenizer(cfg)
