"""A stage from the previous stage's directory: what is copied, what is scaled, what starts fresh, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.build import start_stage
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
