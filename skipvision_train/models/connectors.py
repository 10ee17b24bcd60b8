"""The connector that a configuration names."""

from __future__ import annotations

from torch import nn

from skipvision_train.models.connector_settings import (
    ConnectorConfig,
    MlpConfig,
    MqtConfig,
    ResamplerConfig,
    TokenPackerConfig,
)
from skipvision_train.models.mlp import MlpProjector
from skipvision_train.models.mqt import MqtResampler
from skipvision_train.models.resampler import MultiScaleResampler
from skipvision_train.models.settings import VisionConfig
from skipvision_train.models.token_packer import TokenPacker
from skipvision_train.models.visionzip import VisionZip


def build_connector(config: ConnectorConfig, vision: VisionConfig, llm_width: int) -> nn.Module:
    """A connector with fresh weights.

    Its forward takes :class:`VisionFeatures` of B tiles and gives one (B, n_l, llm_width) per level, coarsest first,
    with n_l as ``config.levels(vision)`` says.
    """
    grid, width, depths = vision.grid, vision.width, len(vision.depths)
    if isinstance(config, ResamplerConfig):
        return MultiScaleResampler(config, grid, width, depths, llm_width)
    if isinstance(config, MlpConfig):
        return MlpProjector(config, width, llm_width)
    if isinstance(config, MqtConfig):
        return MqtResampler(config, grid, width, llm_width)
    if isinstance(config, TokenPackerConfig):
        return TokenPacker(config, grid, width, depths, llm_width)
    return VisionZip(config, width, llm_width)
