"""Models from parts and from the previous stage: what is copied, what is scaled, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.build import build_model, meta_model, start_stage
from skipvision_train.models.connector_settings import (
    MlpConfig,
    MqtConfig,
    ResamplerConfig,
    TokenPackerConfig,
    VisionZipConfig,
)
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, VisionConfig

VISION = {"patch_size": 4, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "depths": (1, 2)}


@pytest.fixture
def pretrained(config_factory, tmp_path):
    """A saved stage at half the resolution: levels of 1 and 4 windows with 2 and 4 queries, no reducer."""
    config = config_factory(
        vision=VisionConfig(image_size=16, **VISION),
        connector=ResamplerConfig(windows=(4, 2), queries=(2, 4), head_dim=16),
        reducer=ReducerConfig.off(),
    )
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "stage")
    return model, tmp_path / "stage"


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
    assert (report.missing, report.unused) == ((), ())
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
    model.save_pretrained(tmp_path / "stage")
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
    assert report.summary() == "missing 0, unused 1 (language_model 1)"


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
    assert report.missing == ()
    assert "connector.model.image_newline" in report.unused
    assert {"vision_tower.token_embedding.weight", "vision_tower.proj"} < set(report.unused)
    assert torch.equal(model.connector[2].weight, projector["model.mm_projector.2.weight"])
    assert torch.equal(model.vision_tower.conv1.weight, vision.visual.conv1.weight)
    unread = len(vision.state_dict()) - len(model.vision_tower.state_dict())
    assert report.summary() == f"missing 0, unused {unread + 1} (connector 1, vision_tower {unread})"


def test_missing_language_model_is_named(tiny_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no config\.json"):
        build_model(tiny_config, llm=tmp_path / "nowhere")


def test_stage_starts_from_the_previous_one_at_another_resolution(pretrained, tiny_config):
    old, directory = pretrained
    model, report = start_stage(directory, tiny_config)
    assert {name.split(".")[0] for name in report.missing} == {"reducer"}
    assert report.unused == ()
    a, b = old.state_dict(), model.state_dict()
    for name in a:
        if name.startswith("language_model."):
            assert torch.equal(a[name], b[name]), name
    position = "vision_tower.positional_embedding"
    assert b[position].shape == (1 + 8 * 8, 32)
    assert torch.equal(a[position][0], b[position][0])
    inner = [n for n in a if n.startswith("vision_tower.") and n != position]
    assert inner
    assert all(torch.equal(a[n], b[n]) for n in inner)


def test_same_shape_start_copies_everything(pretrained):
    old, directory = pretrained
    model, report = start_stage(directory, old.config)
    assert (report.missing, report.unused) == ((), ())
    for name, value in old.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.fixture
def with_registers(config_factory, tmp_path):
    """A saved stage whose images end in three registers."""
    config = config_factory(reducer=ReducerConfig(local_keep=6, registers=3))
    SkipVisionForConditionalGeneration(config).save_pretrained(tmp_path / "victor")
    return tmp_path / "victor"


def test_a_stage_may_add_registers(pretrained, config_factory):
    old, directory = pretrained
    values = {"vision": old.config.vision_config, "connector": old.config.connector_config}
    config = config_factory(**values, reducer=replace(ReducerConfig.off(), registers=3))
    model, report = start_stage(directory, config)
    assert (report.missing, report.unused) == (("reducer.registers",), ())
    assert report.summary() == "missing 1 (reducer 1), unused 0"
    assert model.reducer.registers.shape == (3, 32)
    assert model.reducer.registers.abs().max() > 0


def test_registers_are_carried_to_the_next_stage(with_registers, config_factory):
    config = config_factory(reducer=ReducerConfig(local_keep=None, registers=3))
    model, report = start_stage(with_registers, config)
    assert (report.missing, report.unused) == ((), ())
    saved = load_file(with_registers / "model.safetensors")["reducer.registers"]
    assert torch.equal(model.reducer.registers, saved)
    again = SkipVisionForConditionalGeneration.from_pretrained(with_registers)
    assert torch.equal(again.reducer.registers, saved)


@pytest.mark.parametrize("number", [0, 2, 8])
def test_the_number_of_registers_is_fixed(with_registers, config_factory, number):
    config = config_factory(reducer=ReducerConfig(local_keep=6, registers=number))
    with pytest.raises(
        ConfigError, match=rf"^reducer\.registers: {number}, but .*victor was trained with 3; keep 3, or train anew$"
    ):
        start_stage(with_registers, config)


def test_wrong_shape_is_named_with_both_shapes(pretrained, config_factory):
    _, directory = pretrained
    text = config_factory().text_config
    text.intermediate_size = 64
    config = config_factory(text_config=text)
    with pytest.raises(CheckpointError, match=r"mlp.*\(48, 32\).*needs \(64, 32\)|mlp.*\(32, 48\).*needs \(32, 64\)"):
        start_stage(directory, config)


def test_missing_tensor_is_named(pretrained, tiny_config):
    _, directory = pretrained
    file = directory / "model.safetensors"
    state = load_file(file)
    del state["language_model.model.norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"language_model\.model\.norm\.weight"):
        start_stage(directory, tiny_config)


def test_truncated_and_missing_files_are_named(pretrained, tiny_config):
    _, directory = pretrained
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        start_stage(directory, tiny_config)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"stage: no weights; found none of model\.safetensors, "):
        start_stage(directory, tiny_config)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"stage: no config\.json"):
        start_stage(directory, tiny_config)


def test_a_sharded_stage_is_taken_over(pretrained, tmp_path):
    old, _ = pretrained
    old.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    model, report = start_stage(tmp_path / "sharded", old.config)
    assert (report.missing, report.unused) == ((), ())
    for name, value in old.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


LLAVA = {"vision": VisionConfig(image_size=32, **{**VISION, "depths": (2,)}), "reducer": ReducerConfig.off()}


def save_stage(config, directory):
    torch.manual_seed(3)
    model = SkipVisionForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    "connector",
    [
        MlpConfig(layers=3, pool=2),
        MqtConfig(queries=16, keep=8, head_dim=16),
        TokenPackerConfig(scale=2, width=16, heads=2),
        VisionZipConfig(dominant=5, contextual=3),
    ],
    ids=lambda connector: type(connector).__name__,
)
def test_other_connectors_are_copied(config_factory, tmp_path, connector):
    config = config_factory(**LLAVA, connector=connector)
    old = save_stage(config, tmp_path / "stage")
    larger = config_factory(**{**LLAVA, "vision": replace(LLAVA["vision"], image_size=64)}, connector=connector)
    for new in (config, larger):
        model, report = start_stage(tmp_path / "stage", new)
        assert (report.missing, report.unused) == ((), ())
        for name, value in old.connector.state_dict().items():
            assert torch.equal(model.connector.state_dict()[name], value), name


def test_visionzip_takes_over_the_projector_of_llava(config_factory, tmp_path):
    old = save_stage(config_factory(**LLAVA, connector=MlpConfig()), tmp_path / "stage")
    model, _ = start_stage(
        tmp_path / "stage", config_factory(**LLAVA, connector=VisionZipConfig(dominant=5, contextual=3))
    )
    assert torch.equal(model.connector[2].weight, old.connector[2].weight)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            MlpConfig(),
            MqtConfig(queries=16, keep=16, head_dim=16),
            r"^connector\.type: mqt, but .*stage was .* with mlp; ",
        ),
        (
            ResamplerConfig(windows=(8,), queries=(4,), head_dim=16),
            MlpConfig(),
            r"^connector\.type: mlp, but .*stage was .* with resampler; keep its type, or start anew$",
        ),
        (
            MqtConfig(queries=16, keep=16, head_dim=16),
            MqtConfig(queries=16, keep=16, head_dim=8),
            r"^connector\.head_dim: 8, but .* with 16$",
        ),
        (
            TokenPackerConfig(width=16, heads=2),
            TokenPackerConfig(width=16, heads=4),
            r"^connector\.heads: 4, but .* with 2$",
        ),
    ],
)
def test_another_connector_is_refused_with_both(config_factory, tmp_path, before, after, message):
    save_stage(config_factory(**LLAVA, connector=before), tmp_path / "stage")
    with pytest.raises(ConfigError, match=message):
        start_stage(tmp_path / "stage", config_factory(**LLAVA, connector=after))


def test_a_connector_of_another_shape_is_refused_with_both(config_factory, tmp_path):
    save_stage(config_factory(**LLAVA, connector=MqtConfig(queries=16, keep=16, head_dim=16)), tmp_path / "stage")
    larger = config_factory(**LLAVA, connector=MqtConfig(queries=64, keep=64, head_dim=16))
    message = r"connector\.queries gives queries the shape \(16, 32\), the connector needs \(64, 32\)"
    with pytest.raises(CheckpointError, match=message):
        start_stage(tmp_path / "stage", larger)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", 4, r"^vision\.heads: 4, but .*stage was trained with 2$"),
        ("quick_gelu", False, r"^vision\.quick_gelu: False, but .*stage was trained with True$"),
        ("image_mean", (0.5, 0.5, 0.5), r"^vision\.image_mean: \(0\.5, 0\.5, 0\.5\), but"),
    ],
)
def test_a_tower_that_computes_otherwise_is_refused(pretrained, field, value, message):
    old, directory = pretrained
    config = type(old.config)(**{**old.config.to_dict(), "vision": {**old.config.vision, field: value}})
    with pytest.raises(ConfigError, match=message):
        start_stage(directory, config)


@pytest.mark.parametrize(
    ("before", "after", "sources"),
    [
        # name in the new model -> the module that it starts from, None for a fresh one
        (("both", "shared"), ("both", "separate"), {"summary": "summary", "latter_summary": "summary"}),
        (("latter", "shared"), ("both", "separate"), {"summary": "summary", "latter_summary": "summary"}),
        (("former", "shared"), ("both", "separate"), {"summary": "summary", "latter_summary": None}),
        (("both", "separate"), ("both", "separate"), {"summary": "summary", "latter_summary": "latter_summary"}),
        (("both", "separate"), ("both", "shared"), {"summary": "summary"}),
        (("both", "separate"), ("latter", "shared"), {"summary": "latter_summary"}),
        (("none", "shared"), ("both", "separate"), {"summary": None, "latter_summary": None}),
        (("both", "separate"), ("none", "shared"), {}),
    ],
)
def test_a_scorer_starts_from_the_one_that_did_its_work(config_factory, tmp_path, before, after, sources):
    def config(summary, layers):
        return config_factory(reducer=ReducerConfig(local_keep=6, summary=summary, summary_layers=layers))

    old = save_stage(config(*before), tmp_path / "stage").state_dict()
    model, report = start_stage(tmp_path / "stage", config(*after))
    fresh, used = set(), set()
    for module, source in sources.items():
        for name in ("norm.weight", "score.weight"):
            if source is None:
                fresh.add(f"reducer.{module}.{name}")
            else:
                used.add(f"reducer.{source}.{name}")
                assert torch.equal(model.state_dict()[f"reducer.{module}.{name}"], old[f"reducer.{source}.{name}"])
    assert set(report.missing) == fresh
    assert set(report.unused) == {name for name in old if name.startswith("reducer.")} - used


def test_meta_model_has_the_shapes_and_no_memory(tiny_config):
    model = meta_model(tiny_config)
    assert all(p.is_meta for p in model.parameters())
    real = SkipVisionForConditionalGeneration(tiny_config)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
