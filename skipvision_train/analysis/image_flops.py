"""FLOPs of what stands before the language model: vision tower, connector, merging. Arithmetic as in ``flops.py``.

Only matrix products count, 2 FLOPs per multiply-add. The one attention row that a tower reads off its class token, and
the product that averages merged tokens, are left out: 0.3 and 0.2 % of all of this for SV-LLaVA.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import (
    ConnectorConfig,
    MlpConfig,
    MqtConfig,
    ResamplerConfig,
    TokenPackerConfig,
    VisionZipConfig,
)
from skipvision_train.models.merging import merge_rounds
from skipvision_train.models.settings import ReducerConfig, VisionConfig


@dataclass(frozen=True)
class ImageFlops:
    """FLOPs of one image's forward pass.

    Attributes:
        vision: the tower, all tiles.
        connector: all tiles.
        merging: the similarities of the local tokens.
    """

    vision: float
    connector: float
    merging: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.vision + self.connector + self.merging


def image_flops(config: SkipVisionConfig, tiles: int | None = None) -> ImageFlops:
    """What an image of so many tiles costs before the language model sees it; None means the largest number.

    Raises:
        ConfigError: a number of tiles that the configuration does not have.
    """
    tiles = config.tiling_config.counts[-1] if tiles is None else tiles
    vision, width = config.vision_config, config.text_config.hidden_size
    local = config.local_tokens(tiles)
    return ImageFlops(
        vision=tiles * vision_flops(vision),
        connector=tiles * connector_flops(config.connector_config, vision, width),
        merging=merge_flops(config.reducer_config, local, width),
    )


def vision_flops(config: VisionConfig) -> float:
    """FLOPs of the CLIP tower for one tile: patch embedding and the blocks up to the deepest state that is read."""
    patches = config.grid**2
    tokens = patches + 1
    embedding = 2 * patches * 3 * config.patch_size**2 * config.width
    hidden = int(config.width * config.mlp_ratio)
    block = 8 * tokens * config.width**2 + 4 * tokens**2 * config.width + 4 * tokens * config.width * hidden
    return float(embedding + max(config.depths) * block)


def connector_flops(connector: ConnectorConfig, vision: VisionConfig, text_width: int) -> float:
    """FLOPs of a connector for one tile.

    Args:
        connector: its settings.
        vision: the tower it reads.
        text_width: channels of the language model.
    """
    width, patches = vision.width, vision.grid**2
    if isinstance(connector, ResamplerConfig):
        return _resampler_flops(connector, vision, text_width)
    if isinstance(connector, MlpConfig):
        return _mlp_flops(patches, connector.layers, width, text_width)
    if isinstance(connector, VisionZipConfig):
        tokens = connector.dominant + connector.contextual
        return _mlp_flops(tokens, connector.layers, width, text_width)
    if isinstance(connector, MqtConfig):
        return _mqt_flops(connector, vision, text_width)
    return _token_packer_flops(connector, vision, text_width)


def _mlp_flops(tokens: int, layers: int, width: int, text_width: int) -> float:
    return 2.0 * tokens * (width + (layers - 1) * text_width) * text_width


def _resampler_flops(connector: ResamplerConfig, vision: VisionConfig, text_width: int) -> float:
    """Per level and feature depth: queries and outputs projected, keys and values of the whole grid projected, every
    query attending to the ``window**2`` patches of its window, and an MLP of four times the width; one projection."""
    width, patches = vision.width, vision.grid**2
    total = 2.0 * sum(connector.queries) * width * text_width
    for window, queries in zip(connector.windows, connector.queries, strict=True):
        projections = 4 * queries * width**2 + 4 * patches * width**2
        attention = 4 * queries * window**2 * width
        mlp = 16 * queries * width**2
        total += len(vision.depths) * (projections + attention + mlp)
    return total


def _mqt_flops(connector: MqtConfig, vision: VisionConfig, text_width: int) -> float:
    """Queries and keys are projected once for all tiles; for one tile that makes no difference."""
    width, patches, queries = vision.width, vision.grid**2, connector.keep
    projections = 2.0 * (2 * queries + 2 * patches) * width**2
    return projections + 4 * queries * patches * width + 2 * queries * width * text_width


def _token_packer_flops(connector: TokenPackerConfig, vision: VisionConfig, text_width: int) -> float:
    """A query per cell; keys and values of all patches through two-layer MLPs, then the attention's own projections."""
    width, inner, patches = vision.width, connector.width, vision.grid**2
    cells = patches // connector.scale**2
    mlps = 2.0 * 2 * patches * (len(vision.depths) * width + inner) * inner
    projections = 2 * (2 * cells + 2 * patches) * inner**2 + 2 * cells * width * inner
    output = 2 * cells * (inner + text_width) * text_width
    return mlps + projections + 4 * patches * inner + output


def merge_flops(reducer: ReducerConfig, local_tokens: int, text_width: int) -> float:
    """FLOPs of token merging for one image: cosine similarities of all pairs, once per round; 0 without merging."""
    if reducer.local_keep is None or reducer.local_keep >= local_tokens:
        return 0.0
    rounds = merge_rounds(local_tokens, reducer.local_keep, reducer.merge_rounds)
    return sum(2.0 * count**2 * text_width for count in [local_tokens, *rounds[:-1]])
