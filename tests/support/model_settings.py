"""Small models in every setting: LLaVA, LLaVA-HD, CoS, each dense or Skip-Vision, and the reducers beside them."""

from __future__ import annotations

from dataclasses import replace

import torch

from skipvision_train.models.connector_settings import (
    MlpConfig,
    MqtConfig,
    ResamplerConfig,
    TokenPackerConfig,
    VisionZipConfig,
)
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, TilingConfig, VisionConfig
from skipvision_train.plans import skip_ffn

IMAGE = 3
VISION = VisionConfig(image_size=16, patch_size=4, width=32, layers=3, heads=2, mlp_ratio=2.0, depths=(2,))
LLAVA = {"local_keep": 5, "former_over": "retained", "last_local_ffn": False}
OFF = ReducerConfig.off()
SETTINGS = {
    "llava": (MlpConfig(), OFF, TilingConfig()),
    "llava_pool": (MlpConfig(pool=2), OFF, TilingConfig()),
    "sv_llava": (MlpConfig(), ReducerConfig(split="saliency", retain=4, **LLAVA), TilingConfig()),
    "sv_llava_cosine": (
        MlpConfig(),
        ReducerConfig(split="saliency", retain=4, retain_by="similarity", **LLAVA),
        TilingConfig(),
    ),
    "llava_hd": (MlpConfig(), OFF, TilingConfig("aspect", max_tiles=3)),
    "sv_llava_hd": (MlpConfig(), ReducerConfig(split="tiles", **LLAVA), TilingConfig("aspect", max_tiles=3)),
    "sv_llava_hd_unmerged": (
        MlpConfig(),
        ReducerConfig(split="tiles", **LLAVA | {"local_keep": None}),
        TilingConfig("aspect", max_tiles=3),
    ),
    "cos_hd": (
        ResamplerConfig(windows=(4, 2), queries=(1, 4), head_dim=16),
        ReducerConfig(split="tiles", **LLAVA),
        TilingConfig("aspect", max_tiles=3),
    ),
    "mqt": (MqtConfig(queries=9, keep=9, head_dim=16), OFF, TilingConfig()),
    "token_packer": (TokenPackerConfig(scale=2, width=16, heads=2), OFF, TilingConfig()),
    "visionzip": (VisionZipConfig(dominant=4, contextual=3), OFF, TilingConfig()),
    "separate_rounds": (
        ResamplerConfig(windows=(4, 2, 1), queries=(1, 4, 16), head_dim=16),
        ReducerConfig(local_keep=4, merge_rounds=2, merge_order="raster", summary_layers="separate"),
        TilingConfig(),
    ),
}


def build(config_factory, name: str) -> SkipVisionForConditionalGeneration:
    connector, reducer, tiling = SETTINGS[name]
    vision = replace(VISION, depths=(1, 2)) if isinstance(connector, TokenPackerConfig) else VISION
    torch.manual_seed(0)
    config = config_factory(vision=vision, connector=connector, reducer=reducer, tiling=tiling)
    model = SkipVisionForConditionalGeneration(config).eval()
    model.set_plan(skip_ffn())
    return model


def make_batch(model, rows: list[list[int | str]], tiles: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
    """Left-padded rows; ``"i"`` is the next image, of so many tiles."""
    runs = iter([[IMAGE] * len(model.config.image_token_kinds(count)) for count in tiles])
    ids = [[t for part in row for t in (next(runs) if part == "i" else [part])] for row in rows]
    width, size = max(map(len, ids)), model.config.vision_config.image_size
    batch = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
    }
    if tiles:
        generator = torch.Generator().manual_seed(seed)
        batch["pixel_values"] = torch.randn(sum(tiles), 3, size, size, generator=generator)
    if any(count > 1 for count in tiles):
        batch["image_tiles"] = torch.tensor(tiles)
    return batch


def some_tiles(model, number: int) -> list[int]:
    counts = model.config.tiling_config.counts
    return [counts[(2 * i + 1) % len(counts)] for i in range(number)]
