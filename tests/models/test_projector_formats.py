"""Connectors from published files: tiny modules under the public names, and the loaded connector computes what they do.

fp32, differences of at most 1e-6.
"""

from __future__ import annotations

import json

import pytest
import torch
from published_connectors import (
    DEPTHS,
    GRID,
    LLM,
    WIDTH,
    PublishedCos,
    PublishedMqt,
    PublishedPacker,
    llava,
    named,
    randomise,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.build import build_model
from skipvision_train.models.connector_settings import (
    MlpConfig,
    MqtConfig,
    ResamplerConfig,
    TokenPackerConfig,
    VisionZipConfig,
)
from skipvision_train.models.connectors import build_connector
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.projector_formats import load_projector, read_projector
from skipvision_train.models.settings import ReducerConfig, VisionConfig

ZIP = VisionZipConfig(dominant=5, contextual=3)


@pytest.fixture
def configured(config_factory):
    """A configuration around a connector."""

    def make(connector, depths=(2,), image_size=32):
        vision = VisionConfig(
            image_size=image_size, patch_size=4, width=WIDTH, layers=3, heads=2, mlp_ratio=2.0, depths=depths
        )
        return config_factory(vision=vision, connector=connector, reducer=ReducerConfig.off())

    return make


def load(config, path):
    """The connector with the file's weights, and the report."""
    connector = build_connector(config.connector_config, config.vision_config, LLM)
    return connector, load_projector(connector, read_projector(path, config))


def patches(depths: int = 1, grid: int = GRID) -> VisionFeatures:
    torch.manual_seed(1)
    return VisionFeatures(states=tuple(torch.randn(2, grid * grid, WIDTH) for _ in range(depths)))


@pytest.mark.parametrize(
    ("file", "prefix", "whole"),
    [
        ("mm_projector.bin", "model.mm_projector.", "file"),
        ("mm_projector.bin", "model.mm_projector.", "directory"),
        ("mm_projector.bin", "mm_projector.", "file"),
        ("non_lora_trainables.bin", "base_model.model.model.mm_projector.", "file"),
        ("non_lora_trainables.bin", "base_model.model.model.mm_projector.", "directory"),
        ("checkpoint-100.bin", "module.model.mm_projector.", "file"),
        ("model.safetensors", "model.mm_projector.", "directory"),
    ],
)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_llava_projectors(configured, tmp_path, file, prefix, whole, layers):
    published = llava(layers)
    state = {**named(published, prefix), "model.image_newline": torch.zeros(LLM)}
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    path = tmp_path / file if whole == "file" else tmp_path
    connector, report = load(configured(MlpConfig(layers=layers)), path)
    assert (report.missing, report.unused) == ((), ("model.image_newline",))
    given = patches()
    with torch.no_grad():
        torch.testing.assert_close(connector(given)[0], published(given.states[0]), rtol=0, atol=0)


def test_the_same_projector_serves_visionzip_and_pooling(configured, tmp_path):
    published = llava()
    torch.save(named(published, "model.mm_projector."), tmp_path / "mm_projector.bin")
    for settings in (ZIP, MlpConfig(pool=2)):
        connector, _ = load(configured(settings), tmp_path / "mm_projector.bin")
        for name, tensor in published.state_dict().items():
            assert torch.equal(connector.state_dict()[name], tensor)


def test_a_linear_projector_of_llava(configured, tmp_path):
    published = randomise(nn.Linear(WIDTH, LLM))
    torch.save(named(published, "model.mm_projector."), tmp_path / "mm_projector.bin")
    connector, _ = load(configured(MlpConfig(layers=1)), tmp_path / "mm_projector.bin")
    given = patches()
    with torch.no_grad():
        torch.testing.assert_close(connector(given)[0], published(given.states[0]), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"the connector lacks 2 tensors, first 2\.weight of shape \(32, 32\)"):
        load(configured(MlpConfig(layers=2)), tmp_path / "mm_projector.bin")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_fp32(configured, tmp_path, dtype):
    published = llava().to(dtype)
    torch.save(named(published, "model.mm_projector."), tmp_path / "mm_projector.bin")
    connector, _ = load(configured(MlpConfig()), tmp_path / "mm_projector.bin")
    for name, tensor in published.state_dict().items():
        assert connector.state_dict()[name].dtype == torch.float32
        assert torch.equal(connector.state_dict()[name], tensor.float())


def transformers_llava(text, folder, **values):
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **values)).eval()
    model.save_pretrained(folder, max_shard_size="30KB")
    return model


def test_a_llava_directory_of_transformers(configured, tiny_text_config, tmp_path):
    model = transformers_llava(tiny_text_config, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    connector, report = load(configured(MlpConfig()), tmp_path)
    assert len(report.unused) == len(model.state_dict()) - 4
    given = patches()
    with torch.no_grad():
        expected = model.model.multi_modal_projector(given.states[0])
        torch.testing.assert_close(connector(given)[0], expected, rtol=0, atol=0)


def test_a_llava_directory_with_another_activation_is_refused(configured, tiny_text_config, tmp_path):
    transformers_llava(tiny_text_config, tmp_path, projector_hidden_act="relu")
    with pytest.raises(
        CheckpointError, match=r"config\.json: projector_hidden_act 'relu'; connector\.type mlp computes"
    ):
        read_projector(tmp_path, configured(MlpConfig()))


def test_the_weights_of_a_whole_model_come_before_its_mm_projector(configured, tmp_path):
    """liuhaotian/llava-v1.5 directories hold both; the file is the projector before the second stage."""
    first, second = llava(), llava()
    with torch.no_grad():
        second[0].weight += 1
    torch.save(named(first, "model.mm_projector."), tmp_path / "mm_projector.bin")
    torch.save(named(second, "model.mm_projector."), tmp_path / "pytorch_model.bin")
    assert torch.equal(load(configured(MlpConfig()), tmp_path)[0][0].weight, second[0].weight)
    assert torch.equal(load(configured(MlpConfig()), tmp_path / "mm_projector.bin")[0][0].weight, first[0].weight)


def test_mqt(configured, tmp_path):
    published = PublishedMqt(4, heads=4)
    place = published.pos_embed.clone()
    randomise(published).pos_embed.data.copy_(place)
    torch.save(named(published, "model.query_abstractor."), tmp_path / "query_abstractor.bin")
    config = configured(MqtConfig(queries=16, keep=6, head_dim=8))
    connector, report = load(config, tmp_path)
    assert report.unused == ("model.query_abstractor.pos_embed",)
    given = patches()
    with torch.no_grad():
        torch.testing.assert_close(connector(given)[0], published(given.states[0], 6), rtol=1e-5, atol=1e-5)
    more = configured(MqtConfig(queries=64, keep=6, head_dim=8))
    message = r"query_abstractor\.query gives queries the shape \(16, 32\), the connector needs \(64, 32\)"
    with pytest.raises(CheckpointError, match=message):
        load(more, tmp_path)


@pytest.mark.parametrize("scale", [2, 4])
def test_token_packer(configured, tmp_path, scale):
    published = randomise(PublishedPacker(16, 2, depths=2))
    torch.save(named(published, "model.mm_projector."), tmp_path / "mm_projector.bin")
    connector, report = load(configured(TokenPackerConfig(scale=scale, width=16, heads=2), DEPTHS), tmp_path)
    assert (report.missing, report.unused) == ((), ())
    given = patches(depths=2)
    with torch.no_grad():
        torch.testing.assert_close(connector(given)[0], published(given.states, scale), rtol=1e-5, atol=1e-5)


@pytest.fixture
def cos(tmp_path):
    """The published names with 2 + 8 queries on a grid of 8, with the tower that such files may hold too."""
    published = PublishedCos(windows=(8, 4), queries=(2, 8), head_dim=8)
    state = {f"model.mm_projector.{name}": tensor for name, tensor in published.state.items()}
    torch.save({**state, "vision_tower.conv1.weight": torch.zeros(1)}, tmp_path / "mm_projector.bin")
    return published, tmp_path / "mm_projector.bin"


def test_chain_of_sight(configured, cos):
    published, file = cos
    config = configured(ResamplerConfig(windows=(8, 4), queries=(2, 8), head_dim=8), DEPTHS)
    connector, report = load(config, file)
    assert report.unused == ("vision_tower.conv1.weight",)
    given = patches(depths=2)
    with torch.no_grad():
        levels = connector(given)
    torch.testing.assert_close(levels[0][0], published.window(given.states, 0, 0, 0), rtol=1e-5, atol=1e-5)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        expected = published.window(given.states, 1, row, column)
        first = (row * 2 + column) * 2
        torch.testing.assert_close(levels[1][0, first : first + 2], expected, rtol=1e-5, atol=1e-5)


def test_chain_of_sight_is_scaled_where_it_is_loaded(configured, cos):
    published, file = cos
    config = configured(ResamplerConfig(windows=(16, 4, 2), queries=(2, 32, 128), head_dim=8), DEPTHS, image_size=64)
    connector, _ = load(config, file)
    state, source = connector.state_dict(), published.state
    assert torch.equal(state["levels.0.queries"], source["cls_token_w8_q2"][0])
    assert torch.equal(state["levels.2.blocks.1.mlp.1.weight"], source["mlp_0_w4_l2_q8.fc1.weight"])
    old = source["cls_token_w4_q8"][0].view(2, 2, 2, WIDTH)
    assert torch.equal(state["levels.1.queries"].view(4, 4, 2, WIDTH)[3, 1], old[1, 0])


def test_other_depths_than_the_files_are_named(configured, cos):
    config = configured(ResamplerConfig(windows=(8, 4), queries=(2, 8), head_dim=8), (1, 3))
    with pytest.raises(
        CheckpointError, match=r"mm_projector\.attn_0_w8_l2_q2\.\S+ has no place in connector\.type resampler"
    ):
        load(config, cos[1])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"model.embed_tokens.weight": (4, 4)},
            r"holds no projector; no tensor's name has mm_projector\. or multi_modal",
        ),
        (
            {"mm_projector.0.weight": (32, 32), "mm_projector.0.bias": (32,), "mm_projector.2.weight": (32, 32)},
            r"the projector lacks 1 tensors, first mm_projector\.2\.bias",
        ),
        (
            {
                "mm_projector.0.weight": (32, 48),
                "mm_projector.0.bias": (32,),
                "mm_projector.2.weight": (32, 32),
                "mm_projector.2.bias": (32,),
            },
            r"mm_projector\.0\.weight gives 0\.weight the shape \(32, 48\), the connector needs \(32, 32\)",
        ),
        (
            {
                f"mm_projector.{i}.{end}": (32, 32) if end == "weight" else (32,)
                for i in (0, 2, 4)
                for end in ("weight", "bias")
            },
            r"mm_projector\.4\.weight has no place in connector\.type mlp; is this another projector, or one of more",
        ),
        (
            {"a.mm_projector.0.weight": (32, 32), "b.mm_projector.0.weight": (32, 32)},
            r"a\.mm_projector\.0\.weight and b\.mm_projector\.0\.weight are two tensors for one place",
        ),
    ],
)
def test_projectors_that_do_not_fit_are_named(configured, tmp_path, state, message):
    torch.save({name: torch.ones(shape) for name, shape in state.items()}, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(configured(MlpConfig()), tmp_path / "mm_projector.bin")
    assert "\n" not in str(caught.value)


def test_a_projector_of_another_kind_is_refused(configured, tmp_path):
    torch.save(named(llava(), "model.mm_projector."), tmp_path / "mm_projector.bin")
    for connector, message in (
        (TokenPackerConfig(width=16, heads=2), "has no place in connector.type token_packer"),
        (MqtConfig(queries=16, keep=16, head_dim=8), "holds no projector; no tensor's name has query_abstractor."),
        (ResamplerConfig(windows=(8,), queries=(4,), head_dim=8), r"no mm_projector\.cls_token_w\*_q\*"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(configured(connector), tmp_path / "mm_projector.bin")


def test_an_own_directory_gives_its_connector(configured, tmp_path):
    small = configured(ResamplerConfig(windows=(8, 4), queries=(2, 8), head_dim=8), DEPTHS)
    model = SkipVisionForConditionalGeneration(small)
    model.save_pretrained(tmp_path / "own")
    same, report = build_model(small, connector=tmp_path / "own")
    assert report.unused == ()
    for name, tensor in model.connector.state_dict().items():
        assert torch.equal(same.connector.state_dict()[name], tensor)
    large = configured(ResamplerConfig(windows=(16, 4, 2), queries=(2, 32, 128), head_dim=8), DEPTHS, image_size=64)
    scaled, _ = build_model(large, connector=tmp_path / "own")
    assert torch.equal(
        scaled.connector.levels[2].blocks[0].mlp[1].weight, model.connector.levels[1].blocks[0].mlp[1].weight
    )
    with pytest.raises(ConfigError, match=r"^connector\.type: mlp, but .*own was trained with resampler; "):
        build_model(configured(MlpConfig()), connector=tmp_path / "own")


def test_nothing_there(configured, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.bin: does not exist$"):
        read_projector(tmp_path / "nowhere.bin", configured(MlpConfig()))
    with pytest.raises(CheckpointError, match=r": no weights; found none of model\.safetensors, .*mm_projector\.bin"):
        read_projector(tmp_path, configured(MlpConfig()))
