"""TokenPacker (arXiv 2407.02392, Sec. 3.2; structure as in its public code).

Shapes: B tiles, g patches per side, s patches per side of a cell, n = (g / s)^2 cells, W channels of the vision tower,
E of the attention, C of the language model.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipvision_train.errors import ConfigError
from skipvision_train.models.connector_settings import TokenPackerConfig
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.resampler import split_windows


class TokenPacker(nn.Module):
    """Every cell of patches becomes one token: its coarse feature queries its fine ones.

    Queries are the last depth, shrunk bilinearly to one feature per cell (which reads the middle of the cell only);
    keys and values come from all depths, concatenated, through MLPs. A query sees the patches of its own cell. There is
    no residual on the query; an MLP follows to the language model's width.

    As in the public code, linear layers and the output projection of the attention start from a truncated normal of
    standard deviation 0.02, the fused projection of the attention as ``MultiheadAttention`` starts it (Xavier,
    uniform); biases start at 0, LayerNorms at 1 and 0.

    Args:
        config: cell side, width and heads of the attention.
        grid: g.
        vision_width: W.
        num_depths: hidden states of the vision tower handed to ``forward``.
        llm_width: C.

    Raises:
        ConfigError: cells that do not divide the grid.
    """

    def __init__(
        self, config: TokenPackerConfig, grid: int, vision_width: int, num_depths: int, llm_width: int
    ) -> None:
        super().__init__()
        if grid % config.scale:
            raise ConfigError(f"connector.scale: {config.scale} does not divide the {grid} x {grid} grid of patches")
        self.grid = grid
        self.scale = config.scale
        norm = partial(nn.LayerNorm, config.width, eps=1e-6)
        self.query = nn.Linear(vision_width, config.width, bias=False)
        self.key = _mlp(num_depths * vision_width, config.width)
        self.value = _mlp(num_depths * vision_width, config.width)
        self.norm_query, self.norm_key, self.norm_value = norm(), norm(), norm()
        self.attention = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.projection = _mlp(config.width, llm_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # the attention's output projection is one, its fused input is none
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: VisionFeatures) -> list[Tensor]:
        """Pack tiles.

        Args:
            features: states of as many depths as the packer was built for, (B, g * g, W) each.

        Returns:
            one level: (B, n, C), cells in raster order.

        Raises:
            ValueError: another number of patches than the grid has.
        """
        state = features.states[-1]
        if state.shape[1] != self.grid**2:
            raise ValueError(f"features: {state.shape[1]} patches, expected {self.grid} x {self.grid}")
        every = torch.cat(features.states, dim=2)
        queries = self.norm_query(self.query(shrink(state, self.grid, self.scale)))
        keys = split_windows(self.norm_key(self.key(every)), self.grid, self.scale)
        values = split_windows(self.norm_value(self.value(every)), self.grid, self.scale)
        tokens = self.attention(queries.flatten(0, 1)[:, None], keys, values, need_weights=False)[0]
        return [self.projection(tokens.view(queries.shape))]


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def shrink(tokens: Tensor, grid: int, scale: int) -> Tensor:
    """Shrink a grid of features bilinearly, in fp32: ``align_corners=False``, not antialiased.

    Args:
        tokens: (B, grid * grid, W) in raster order.
        grid: patches per side.
        scale: patches per side of what becomes one; divides ``grid``.

    Returns:
        (B, (grid / scale)^2, W) in the dtype of ``tokens``: for an even scale the mean of a cell's four middle patches,
        for an odd one its middle patch.
    """
    side = grid // scale
    image = tokens.float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    small = F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False)
    return small.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)
