"""LLaVA-1.5's projector (arXiv 2310.03744), and mean pooling of what it projects.

Shapes: B tiles, g patches per side, W channels of the vision tower, C of the language model.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from skipvision_train.models.connector_settings import MlpConfig
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.resampler import split_windows


class MlpProjector(nn.Sequential):
    """Linear layers to the language model's width with GELU between them, on every patch of the last depth.

    The module is the sequence of layers itself, so its parameters have the names of LLaVA's ``mm_projector.bin``
    without their prefix: ``0.weight``, ``0.bias``, ``2.weight``, ``2.bias``. As there, weights and biases start as
    ``torch.nn.Linear`` starts them (uniform, bound ``1 / sqrt(inputs)``).

    Args:
        config: number of layers, and the side of the cells that are averaged.
        vision_width: W.
        llm_width: C.
    """

    def __init__(self, config: MlpConfig, vision_width: int, llm_width: int) -> None:
        layers: list[nn.Module] = [nn.Linear(vision_width, llm_width)]
        for _ in range(config.layers - 1):
            layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
        super().__init__(*layers)
        self.pool = config.pool

    def forward(self, features: VisionFeatures) -> list[Tensor]:
        """Project patches.

        Args:
            features: the last of ``states`` is read, (B, g * g, W).

        Returns:
            one level: (B, g * g, C), or (B, (g / pool)^2, C) means of pool x pool cells; raster order.
        """
        return [mean_cells(self.project(features.states[-1]), self.pool)]

    def project(self, tokens: Tensor) -> Tensor:
        """(B, n, W) to (B, n, C), every token by itself."""
        return super().forward(tokens)


def mean_cells(tokens: Tensor, side: int) -> Tensor:
    """Average square cells of a square grid of tokens.

    Args:
        tokens: (B, g * g, C) in raster order.
        side: tokens per side of a cell, s; divides g. With 1 ``tokens`` itself is returned.

    Returns:
        (B, (g / s)^2, C): cells in raster order.
    """
    if side == 1:
        return tokens
    batch, count, width = tokens.shape
    return split_windows(tokens, math.isqrt(count), side).mean(dim=1).view(batch, -1, width)
