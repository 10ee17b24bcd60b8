"""Models from parts and from the previous stage: what is copied, what is scaled, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.build import build_model, meta_model, read_state, start_stage
from skipvision_train.models.configuration import ConnectorConfig, ReducerConfig, VisionConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration

VISION = {"patch_size": 4, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "depths": (1, 2)}


@pytest.fixture
def pretrained(config_factory, tmp_path):
    """A saved stage at half the resolution: levels of 1 and 4 windows with 2 and 4 queries, no reducer."""
    config = config_factory(
        vision=VisionConfig(image_size=16, **VISION),
        connector=ConnectorConfig(windows=(4, 2), queries=(2, 4), head_dim=16),
        reducer=ReducerConfig.off(),
    )
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "stage")
    return model, tmp_path / "stage"


def test_language_model_directory_is_taken_over(tiny_config, tmp_path):
    torch.manual_seed(1)
    llm = AutoModelForCausalLM.from_config(tiny_config.text_config)
    llm.save_pretrained(tmp_path / "llm", max_shard_size="20KB")
    assert len(list((tmp_path / "llm").glob("*.safetensors"))) > 1
    model, _ = build_model(tiny_config, llm=tmp_path / "llm")
    for name, value in llm.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name], value), name


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
    assert report.summary() == "missing 1, unused 0"
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


def test_truncated_and_missing_files_are_named(pretrained):
    _, directory = pretrained
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        read_state(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing"):
        read_state(directory)


def test_meta_model_has_the_shapes_and_no_memory(tiny_config):
    model = meta_model(tiny_config)
    assert all(p.is_meta for p in model.parameters())
    real = SkipVisionForConditionalGeneration(tiny_config)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
