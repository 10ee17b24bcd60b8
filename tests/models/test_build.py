"""Models from parts: what is copied, what is converted, what is refused."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from skipvision_train.errors import CheckpointError
from skipvision_train.models.build import build_model, load_language_model, meta_model, start_stage
from skipvision_train.models.connector_settings import MlpConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, VisionConfig

VISION = {"patch_size": 4, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "depths": (1, 2)}


def save_language_model(config, directory, form, dtype=torch.float32):
    """A language model with seeded weights, saved in one of the forms that transformers reads."""
    torch.manual_seed(1)
    llm = AutoModelForCausalLM.from_config(config.text_config).to(dtype)
    llm.save_pretrained(directory, max_shard_size="20KB" if "sharded" in form else "1GB")
    if form.endswith("bin"):
        to_pickles(directory)
    return llm


def to_pickles(directory):
    """Rewrite a directory's safetensors as ``pytorch_model*.bin``, with an index if there was one."""
    for file in list(directory.glob("*.safetensors")):
        torch.save(
            load_file(file), directory / file.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        )
        file.unlink()
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        text = index.read_text().replace("model-", "pytorch_model-").replace("safetensors", "bin")
        (directory / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.mark.parametrize("form", ["single", "sharded", "bin", "sharded bin"])
def test_language_model_directory_is_taken_over(tiny_config, tmp_path, form):
    llm = save_language_model(tiny_config, tmp_path / "llm", form)
    assert (len(list((tmp_path / "llm").glob("*-of-*"))) > 1) == ("sharded" in form)
    assert bool(list((tmp_path / "llm").glob("*.safetensors"))) == (not form.endswith("bin"))
    model, report = build_model(tiny_config, llm=tmp_path / "llm")
    assert report.unused == ()
    assert set(report.missing) == {name for name in model.state_dict() if not name.startswith("language_model.")}
    for name, value in llm.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name], value), name
    ids = torch.randint(0, 320, (2, 9))
    with torch.no_grad():  # also what no file holds, the rotary frequencies, is in place
        torch.testing.assert_close(model.language_model(ids).logits, llm(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_fp32_without_loss(tiny_config, tmp_path, dtype):
    llm = save_language_model(tiny_config, tmp_path / "llm", "sharded", dtype)
    # A configuration read from a half precision directory says so; training needs fp32 whatever it says.
    config = AutoConfig.from_pretrained(tmp_path / "llm")
    assert config.dtype == dtype
    tiny_config.text_config = config
    model, _ = build_model(tiny_config, llm=tmp_path / "llm")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, value in llm.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name], value.float()), name
    model.to(dtype).save_pretrained(tmp_path / "stage")
    tiny_config.text_config.dtype = dtype
    again, _ = start_stage(tmp_path / "stage", tiny_config)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.language_model.lm_head.weight, llm.lm_head.weight.float())


@pytest.mark.parametrize("stored", ["original", "copy", "both"])
def test_tied_embeddings(config_factory, text_config_factory, tmp_path, stored):
    text = text_config_factory()
    text.tie_word_embeddings = True
    config = config_factory(text_config=text)
    save_language_model(config, tmp_path / "llm", "single")
    file, head, embedding = tmp_path / "llm" / "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
    state = load_file(file)
    assert head not in state
    weight = state[embedding]
    if stored != "original":
        state[head] = weight.clone()
    if stored == "copy":
        del state[embedding]
    save_file(state, file)
    model, report = build_model(config, llm=tmp_path / "llm")
    assert report.unused == ()
    assert torch.equal(model.language_model.model.embed_tokens.weight, weight)
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    alone, _ = load_language_model(text, tmp_path / "llm")
    assert alone.lm_head.weight is alone.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "stage")
    if stored == "both":
        stage = load_file(tmp_path / "stage" / "model.safetensors")
        save_file({**stage, "language_model.lm_head.weight": weight.clone()}, tmp_path / "stage" / "model.safetensors")
    again, report = start_stage(tmp_path / "stage", config)
    assert (report.missing, report.unused) == ((), ())
    assert again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    assert torch.equal(again.language_model.lm_head.weight, weight)
    if stored == "both":
        save_file({**state, head: weight + 1}, file)
        with pytest.raises(
            CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but .*ties"
        ):
            build_model(config, llm=tmp_path / "llm")


@pytest.fixture
def broken(tiny_config, tmp_path):
    """Save a language model with some of its tensors changed, added, or (None) left out."""

    def save(**changes):
        save_language_model(tiny_config, tmp_path / "llm", "single")
        file = tmp_path / "llm" / "model.safetensors"
        state = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)
        return tmp_path / "llm"

    return save


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lm_head__weight": None},
            r"language model lacks 1 of 30 tensors, first lm_head\.weight of shape \(320, 32\)",
        ),
        (
            {"model__norm__weight": torch.ones(48)},
            r"model\.norm\.weight has shape \(48,\), the model needs \(32,\)",
        ),
        (
            {"model__norm__weight": torch.ones(32, dtype=torch.int8)},
            r"model\.norm\.weight has dtype I8; quantised weights cannot be loaded, use one of float64, float32",
        ),
        (
            {"model__layers__0__self_attn__q_proj__bias": torch.ones(32)},
            r"holds 1 tensors the language model has no place for, first model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
    ],
)
def test_language_models_that_do_not_fit_are_refused(tiny_config, broken, changes, message):
    directory = broken(**changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        build_model(tiny_config, llm=directory)
    assert "\n" not in str(caught.value)


def test_stored_rotary_frequencies_are_reported_only(tiny_config, broken):
    directory = broken(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    _, report = build_model(tiny_config, llm=directory)
    assert report.unused == ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert report.summary().endswith(", unused 1 (language_model 1)")


def test_the_report_tells_the_parts_apart(config_factory, tmp_path):
    config = config_factory(
        vision=VisionConfig(image_size=32, **{**VISION, "depths": (2,)}),
        connector=MlpConfig(),
        reducer=ReducerConfig.off(),
    )
    vision = open_clip.CLIP(
        8,
        vision_cfg={"layers": 3, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16, "mlp_ratio": 2.0},
        text_cfg={"context_length": 6, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1},
        quick_gelu=True,
    )
    model_cfg = {
        "vision_cfg": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16, "mlp_ratio": 2.0},
        "quick_gelu": True,
    }
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    torch.save(vision.state_dict(), tmp_path / "clip" / "open_clip_pytorch_model.bin")
    projector = {f"model.mm_projector.{name}": torch.randn(32, 32) for name in ("0.weight", "2.weight")}
    projector |= {f"model.mm_projector.{name}": torch.randn(32) for name in ("0.bias", "2.bias")}
    torch.save({**projector, "model.image_newline": torch.zeros(32)}, tmp_path / "mm_projector.bin")
    model, report = build_model(config, vision=tmp_path / "clip", connector=tmp_path / "mm_projector.bin")
    assert set(report.missing) == {name for name in model.state_dict() if name.startswith("language_model.")}
    assert "connector.model.image_newline" in report.unused
    assert {"vision_tower.token_embedding.weight", "vision_tower.proj"} < set(report.unused)
    assert torch.equal(model.connector[2].weight, projector["model.mm_projector.2.weight"])
    assert torch.equal(model.vision_tower.conv1.weight, vision.visual.conv1.weight)
    unread = len(vision.state_dict()) - len(model.vision_tower.state_dict())
    assert report.summary() == (
        f"missing {len(report.missing)} (language_model {len(report.missing)}), "
        f"unused {unread + 1} (connector 1, vision_tower {unread})"
    )


def test_what_no_checkpoint_gives_is_reported(tiny_config, config_factory, tmp_path):
    torch.manual_seed(0)
    whole = SkipVisionForConditionalGeneration(tiny_config)
    whole.save_pretrained(tmp_path / "own")
    model, report = build_model(tiny_config)
    assert report.missing == tuple(model.state_dict())
    model, report = build_model(tiny_config, connector=tmp_path / "own")
    assert {name.split(".")[0] for name in report.missing} == {"language_model", "vision_tower", "reducer"}
    for name, value in whole.state_dict().items():
        if name not in report.missing:
            assert torch.equal(model.state_dict()[name], value), name
    registers = config_factory(reducer=ReducerConfig(local_keep=6, registers=2))
    save_language_model(tiny_config, tmp_path / "llm", "single")
    _, report = build_model(registers, llm=tmp_path / "llm", connector=tmp_path / "own")
    assert report.summary().startswith(f"missing {len(report.missing)} (reducer 3, vision_tower ")
    assert report.names() == {"missing": list(report.missing), "unused": []}
    assert "reducer.registers" in report.names()["missing"]


def test_missing_language_model_is_named(tiny_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no config\.json"):
        build_model(tiny_config, llm=tmp_path / "nowhere")


def test_meta_model_has_the_shapes_and_no_memory(tiny_config):
    model = meta_model(tiny_config)
    assert all(p.is_meta for p in model.parameters())
    real = SkipVisionForConditionalGeneration(tiny_config)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
