"""The starting checkpoints are read by transformers and open_clip themselves; the tokenizer is LLaMA-3's in small."""

import json
import random

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipvision_train.sketches.checkpoints import IMAGE_TOKEN, SPECIAL_TOKENS, write_checkpoints
from skipvision_train.sketches.questions import caption, conversation
from skipvision_train.sketches.scenes import FAMILIES, LETTERS, random_sketch


@pytest.fixture(scope="module")
def llm(written):
    return written[0] / "start" / "llm"


@pytest.fixture(scope="module")
def tokenizer(llm):
    return AutoTokenizer.from_pretrained(llm)


def test_special_tokens_keep_llama3s_order(tokenizer):
    first = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    assert first == 512 - 16
    # LLaMA-3's ids, counted from <|begin_of_text|> = 128000.
    for token, original in {
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eot_id|>": 128009,
    }.items():
        assert tokenizer.convert_tokens_to_ids(token) - first == original - 128000, token
    assert IMAGE_TOKEN == "<|reserved_special_token_0|>"
    assert len(tokenizer) == 512 == first + len(SPECIAL_TOKENS)


def test_tokenizer_begins_with_bos_and_has_no_padding_token(tokenizer):
    assert tokenizer.pad_token is None
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert tokenizer("How many")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("How many", add_special_tokens=False)["input_ids"][0] != tokenizer.bos_token_id


def test_text_survives_the_round_trip(tokenizer):
    rng = random.Random(0)
    texts = ["two  spaces", "naïve café", "日本語 🙂", "12345 it's", " leading", "line\n\nline\t"]
    for _ in range(30):
        sketch = random_sketch(rng, rng.choice(FAMILIES))
        texts += [caption(rng, sketch), *(q.text for q in conversation(rng, sketch))]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_letters_of_a_text_are_single_tokens_and_words_too(tokenizer):
    rng = random.Random(1)
    letters = {tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS}
    assert len(letters) == len(LETTERS)
    for _ in range(50):
        card = random_sketch(rng, "text")
        assert len(tokenizer.encode(card.text, add_special_tokens=False)) == len(card.text)
        inside = tokenizer.encode(caption(rng, card), add_special_tokens=False)
        assert [i for i in inside if i in letters] == tokenizer.encode(card.text, add_special_tokens=False)
    for word in ("triangle", "yes", "left", "user", "assistant", " purple", "\n\n"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word


def test_splitting_rule_is_llama3s(tokenizer):
    """Digits in groups of three from the left, contractions apart, a letter run takes one leading mark or space."""
    pieces = [p for p, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 (red)\n\nend")]
    assert pieces == ["It", "'s", "Ġ", "123", "45", "Ġ(", "red", ")ĊĊ", "end"]


def test_chat_template_gives_llama3s_format(tokenizer):
    messages = [
        {"role": "system", "content": "Short answers."},
        {"role": "user", "content": " How many objects are there? "},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "Is there a ring?"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nShort answers.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow many objects are there?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs there a ring?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_language_model_loads_strictly_and_is_random(llm, tokenizer):
    model, report = AutoModelForCausalLM.from_pretrained(llm, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    config = model.config
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, len(tokenizer))
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 48)
    assert config.pad_token_id is None
    assert config.bos_token_id == tokenizer.bos_token_id
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    loss = model(input_ids=torch.tensor([tokenizer.encode("How tall is bar B?")])).logits
    assert loss.isfinite().all()


def test_vision_model_loads_strictly_with_open_clip(written):
    folder = written[0] / "start" / "vision"
    settings = json.loads((folder / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**settings["model_cfg"])
    state = load_file(folder / "open_clip_model.safetensors")
    model.load_state_dict(state, strict=True)
    assert tuple(state["visual.positional_embedding"].shape) == (2 * 2 + 1, 32)
    assert settings["preprocess_cfg"]["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_vision_model_is_found_by_open_clips_factory(written):
    folder = written[0] / "start" / "vision"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    state = load_file(folder / "open_clip_model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert preprocess is not None


def test_weights_follow_the_seed_and_leave_the_global_generator_alone(tmp_path, small_settings):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoints(tmp_path / name, small_settings.llm, small_settings.vision, seed)
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("llm/model.safetensors", "vision/open_clip_model.safetensors"):
        a, b, c = ((tmp_path / name / part).read_bytes() for name in "abc")
        assert a == b != c
    assert "random" in (tmp_path / "a" / "README.md").read_text()
