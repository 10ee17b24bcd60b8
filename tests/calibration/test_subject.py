"""What is calibrated: loading our model or one of transformers, and the hash that tells models apart."""

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlms import make_family
from torch import nn

from skipvision_train.calibration.ranks import Ranks
from skipvision_train.calibration.samples import prompt_samples
from skipvision_train.calibration.session import Session
from skipvision_train.calibration.sweep import read_logits
from skipvision_train.commands.calibrate import Config
from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.inference import Assistant, Conversation
from skipvision_train.inference.loading import choose_device, load_for_inference, load_model
from skipvision_train.models.identity import model_hash
from skipvision_train.plans import skip_kv, vskip


@pytest.fixture
def llava_directory(tmp_path):
    family = make_family("llava")
    family.model.save_pretrained(tmp_path / "llava")
    family.processor.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


@torch.no_grad()
def test_a_directory_of_transformers_is_loaded(llava_directory, record):
    model, processor, is_ours = load_model(str(llava_directory), "cpu")
    family = make_family("llava")
    assert not is_ours
    assert not model.training
    (own,) = prompt_samples(family.model, family.processor, [record("w1", "w2")])
    (loaded,) = prompt_samples(model, processor, [record("w1", "w2")])
    torch.testing.assert_close(model(**loaded.inputs).logits, family.model(**own.inputs).logits, atol=0, rtol=0)
    assert load_model(str(llava_directory), "cpu", "bf16")[0].dtype == torch.bfloat16


def test_a_directory_of_ours_is_loaded(own_model, own_processor, tmp_path):
    own_model.save_pretrained(tmp_path / "ours")
    own_processor.save_pretrained(tmp_path / "ours")
    model, processor, is_ours = load_model(str(tmp_path / "ours"), "cpu")
    assert is_ours
    assert not model.training
    assert processor.tokens_per_image == own_processor.tokens_per_image
    assert model_hash(model) == model_hash(own_model)


def session_under(model, processor, record, folder, plan, positions):
    """A calibration of one record on the saved model."""
    model.config.skip_plan = plan.bind(3).to_dict()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    cfg = Config(checkpoint=str(folder), prompts="p.jsonl", samples=1, positions=positions, device="cpu")
    return Session.open(cfg, Ranks(), [record("What is it?", "A cat.")])


@pytest.mark.parametrize(
    ("when", "positions", "message"),
    [
        ("before_first_token", "next", "checkpoint: .* by which skipped leave the KV cache before_first_token, and"),
        ("after_first_token", "answer", "positions: 'answer', but under the plan .* skipped leave .*; use next"),
    ],
)
def test_eviction_that_the_scores_would_not_show_is_refused(
    own_model, own_processor, record, tmp_path, when, positions, message
):
    with pytest.raises(ConfigError, match=message):
        session_under(own_model, own_processor, record, tmp_path, skip_kv(evict_when=when), positions)


@torch.no_grad()
def test_what_is_read_under_a_plan_that_evicts_behind_the_first_token_is_what_generation_uses(
    own_model, own_processor, record, tmp_path
):
    session = session_under(own_model, own_processor, record, tmp_path, skip_kv("middle + small"), "next")
    (logits,) = read_logits(session.model, session.own[0], session.base).log_softmax(-1)
    letters = "abcxyz"
    with Image.open(tmp_path / "7.png") as image:
        asked = Conversation.begin(None).ask("<image>\nWhat is it?", [image.convert("RGB")])
    (found,) = Assistant(session.model, own_processor).log_likelihoods([asked], [list(letters)])
    ids = [own_processor.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in letters]
    assert [one.tokens for one in found] == [1] * len(letters)
    torch.testing.assert_close(torch.tensor([one.log_prob for one in found]), logits[ids], atol=1e-4, rtol=1e-4)


def lose(directory, ending):
    tensors = load_file(directory / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(ending))]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def cut_the_weights(directory):
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])


BROKEN = {
    "has no config.json": lambda directory: (directory / "config.json").unlink(),
    "is no model configuration": lambda directory: (directory / "config.json").write_text("{}"),
    "holds a model of text (llama)": lambda directory: (directory / "config.json").write_text(
        '{"model_type": "llama"}'
    ),
    "model type `nope`": lambda directory: (directory / "config.json").write_text('{"model_type": "nope"}'),
    "no file named model.safetensors": lambda directory: (directory / "model.safetensors").unlink(),
    "cannot be loaded": cut_the_weights,
    "lacks lm_head.weight": lambda directory: lose(directory, "lm_head.weight"),
    "image processor": lambda directory: (directory / "processor_config.json").unlink(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_directory_that_is_no_whole_model_is_refused(llava_directory, message):
    BROKEN[message](llava_directory)
    with pytest.raises(CheckpointError, match=r"checkpoint: .*llava") as caught:
        load_model(str(llava_directory), "cpu")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9085657\n"

BROKEN_OF_OURS = {
    "cannot be loaded: Error while deserializing header": cut_the_weights,
    "missing keys: connector.": lambda directory: lose(directory, "queries"),
    "model.safetensors: a git-lfs pointer": lambda directory: (directory / "model.safetensors").write_text(POINTER),
    "tokenizer.json: a git-lfs pointer": lambda directory: (directory / "tokenizer.json").write_text(POINTER),
    "(1) a `tokenizers` library": lambda directory: (directory / "tokenizer.json").unlink(),
    "it has no processor_config.json": lambda directory: (directory / "processor_config.json").unlink(),
    "has no processor of a Skip-Vision model": lambda directory: (directory / "processor_config.json").write_text("{}"),
}


@pytest.mark.parametrize("load", [load_model, load_for_inference])
@pytest.mark.parametrize("message", BROKEN_OF_OURS)
def test_a_directory_of_ours_that_is_damaged_is_refused(own_model, own_processor, tmp_path, message, load):
    own_model.save_pretrained(tmp_path)
    own_processor.save_pretrained(tmp_path)
    BROKEN_OF_OURS[message](tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))) as caught:
        load(str(tmp_path), device="cpu")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_work_are_refused(llava_directory):
    with pytest.raises(ConfigError, match="precision: 'fp8' is unknown"):
        load_model(str(llava_directory), "cpu", "fp8")
    with pytest.raises(ConfigError, match="device: 'abacus' is no device"):
        load_model(str(llava_directory), "abacus")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^device: cuda:0, but torch finds no GPU"):
        choose_device("cuda:0")
    assert choose_device(None) == torch.device("cpu")


# --- the hash ------------------------------------------------------------------------------------------------------


def small_model(values=5000):
    model = nn.Linear(values, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(values).float())
    return model


def test_the_hash_is_pinned():
    """Banks on disk hold it: a change of the recipe makes every one of them a bank of another model."""
    assert model_hash(small_model()) == "bb19666cc8a35cc14e54ccbc84869875129d0f702a923e64ba52fb4cb93c1599"


@pytest.mark.parametrize("index", [0, 999, 2500, 4000, 4999])
def test_the_hash_sees_values_at_both_ends_and_all_over(index):
    model, former = small_model(), model_hash(small_model())
    with torch.no_grad():
        model.weight[0, index] += 1
    assert model_hash(model) != former


def test_the_hash_sees_names_shapes_and_precision():
    model = nn.Sequential(small_model())
    reshaped = small_model()
    reshaped.weight = nn.Parameter(reshaped.weight.detach().reshape(2, 2500))
    others = [small_model(), model, reshaped, small_model().to(torch.float64)]
    assert len({model_hash(other) for other in others}) == 4


def test_the_hash_does_not_depend_on_the_order_of_parts():
    parts = {"a": small_model(10), "b": small_model(20)}
    assert model_hash(nn.ModuleDict(parts)) == model_hash(nn.ModuleDict(dict(reversed(parts.items()))))


def test_the_hash_outlives_saving_a_plan_and_another_layout_in_memory(own_model, tmp_path):
    former = model_hash(own_model)
    own_model.set_plan(vskip([0, 1]))
    assert model_hash(own_model) == former
    own_model.save_pretrained(tmp_path / "again")
    assert model_hash(type(own_model).from_pretrained(tmp_path / "again")) == former
    weight = own_model.language_model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert model_hash(own_model) == former


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_hash_of_other_models_outlives_saving(name, tmp_path):
    model = make_family(name).model
    model.save_pretrained(tmp_path / name)
    assert model_hash(type(model).from_pretrained(tmp_path / name)) == model_hash(model)
