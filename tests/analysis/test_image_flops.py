"""What stands before the language model: by hand, and by torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skipvision_train.analysis.image_flops import connector_flops, image_flops, merge_flops, vision_flops
from skipvision_train.models.connector_settings import (
    MlpConfig,
    MqtConfig,
    ResamplerConfig,
    TokenPackerConfig,
    VisionZipConfig,
)
from skipvision_train.models.connectors import build_connector
from skipvision_train.models.settings import ReducerConfig, TilingConfig, VisionConfig
from skipvision_train.models.vision import ClipVisionTower


def counted(module, *args):
    # In training mode, because the counter does not know the fused attention of nn.MultiheadAttention; and fused
    # kernels for the CPU are unknown to it.
    module.train().requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*args)
    return counter.get_total_flops()


def test_merging_costs_nothing_when_nothing_merges():
    assert merge_flops(ReducerConfig.off(), 1024, 4096) == 0
    assert merge_flops(ReducerConfig(local_keep=1024), 1024, 4096) == 0
    assert merge_flops(ReducerConfig(local_keep=1024), 500, 4096) == 0
    assert merge_flops(ReducerConfig(local_keep=256), 1024, 4096) == 2 * 1024 * 1024 * 4096
    two = ReducerConfig(local_keep=256, merge_rounds=2)
    assert merge_flops(two, 1024, 4096) == 2 * (1024 * 1024 + 512 * 512) * 4096


def test_vision_and_resampler_by_hand():
    """One block, one patch grid of 2 x 2, one level: small enough to write out."""
    vision = VisionConfig(
        image_size=8, patch_size=4, width=8, layers=4, heads=2, mlp_ratio=2.0, depths=(1,), quick_gelu=False
    )
    qkvo = 4 * 2 * 5 * 8 * 8
    attention = 2 * 2 * 5 * 5 * 8
    mlp = 2 * 2 * 5 * 8 * 16
    patches = 2 * 4 * 48 * 8
    assert vision_flops(vision) == patches + qkvo + attention + mlp

    connector = ResamplerConfig(windows=(2,), queries=(3,), head_dim=4)
    cross = 2 * 3 * 8 * 8 * 2 + 2 * 4 * 8 * 16 + 2 * 2 * 3 * 4 * 8
    mlp = 2 * 2 * 3 * 8 * 32
    assert connector_flops(connector, vision, text_width=32) == cross + mlp + 2 * 3 * 8 * 32


@pytest.mark.parametrize(
    ("connector", "depths", "readout"),
    [
        (ResamplerConfig(windows=(8, 4, 2), queries=(2, 4, 16), head_dim=16), (1, 2), "none"),
        (MlpConfig(layers=1), (2,), "none"),
        (MlpConfig(layers=2), (2,), "none"),
        (MlpConfig(layers=3, pool=2), (2,), "none"),
        (MqtConfig(queries=16, keep=9, head_dim=16), (2,), "none"),
        (TokenPackerConfig(scale=2, width=24, heads=2), (1, 2, 3), "none"),
        (VisionZipConfig(dominant=9, contextual=4), (2,), "attention"),
    ],
    ids=lambda value: getattr(value, "__class__", type(value)).__name__,
)
def test_connectors_agree_with_the_counter_of_torch(tiny_config, connector, depths, readout):
    vision = replace(tiny_config.vision_config, depths=depths)
    tower = ClipVisionTower(vision, readout).train().requires_grad_(False)
    image = torch.randn(1, 3, vision.image_size, vision.image_size)
    if readout == "none":
        assert counted(tower, image) == vision_flops(vision)
    features, module = tower(image), build_connector(connector, vision, 40)
    # Two products of VisionZip that choose and sum tokens are no part of the projector.
    extra = 2 * 4 * (64 - 8 - 4) * (features.keys.shape[-1] + vision.width) if readout == "attention" else 0
    assert counted(module, features) == connector_flops(connector, vision, 40) + extra


def test_an_image_of_several_tiles(config_factory):
    vision = replace(config_factory().vision_config, depths=(2,))
    reducer = ReducerConfig(split="tiles", local_keep=20, former_over="retained", last_local_ffn=False)
    config = config_factory(
        vision=vision, connector=MlpConfig(), reducer=reducer, tiling=TilingConfig("aspect", max_tiles=3)
    )
    cost = image_flops(config, 3)
    assert cost.vision == 3 * vision_flops(vision)
    assert cost.connector == 3 * connector_flops(MlpConfig(), vision, 32)
    assert cost.merging == 2 * (2 * 64) ** 2 * 32
    assert cost.total == cost.vision + cost.connector + cost.merging
    assert image_flops(config) == image_flops(config, 4)
