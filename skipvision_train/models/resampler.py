"""The multi-scale visual resampler of Chain-of-Sight (arXiv 2407.15819).

Shapes: B images, g patches per side, W channels of the vision tower, C of the language model. A level with windows of
side w has n = (g / w)^2 windows and m queries in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipvision_train.models.connector_settings import ResamplerConfig
from skipvision_train.models.features import VisionFeatures


def split_windows(features: Tensor, grid: int, window: int) -> Tensor:
    """Cut patch features into square windows.

    Args:
        features: (B, grid * grid, W) in raster order.
        grid: patches per side.
        window: patches per side of a window; divides ``grid``.

    Returns:
        (B * n, window * window, W): images, then windows in raster order; the patches of a window in raster order.
    """
    batch, _, width = features.shape
    side = grid // window
    tiles = features.view(batch, side, window, side, window, width).transpose(2, 3)
    return tiles.reshape(batch * side * side, window * window, width)


class CrossAttention(nn.Module):
    """Queries attend to one window's features: normed on both sides, no biases on q, k and v, one on the output.

    Args:
        width: W, of queries and features.
        head_dim: channels per head.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        if width % head_dim:
            raise ValueError(f"connector.head_dim: {head_dim} does not divide the vision width {width}")
        self.heads = width // head_dim
        self.norm_query = nn.LayerNorm(width)
        self.norm_features = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """(B, m, W) queries and (B, k, W) features to (B, m, W), without the residual."""
        q = self.query(self.norm_query(queries)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.key_value(self.norm_features(features)).unflatten(-1, (2, self.heads, -1))
        k, v = kv.transpose(1, 3).unbind(2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ResamplerBlock(nn.Module):
    """Cross-attention and MLP (4x, GELU), each with a residual on the queries.

    Args:
        width: W.
        head_dim: channels per attention head.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.attention = CrossAttention(width, head_dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """(B, m, W) queries and (B, k, W) features to the new (B, m, W) queries."""
        queries = queries + self.attention(queries, features)
        return queries + self.mlp(queries)


class ResamplerLevel(nn.Module):
    """One window size: its queries, and one block per vision depth.

    Args:
        grid: patches per side.
        window: patches per side of a window.
        num_queries: over the whole image, m for each window.
        width: W.
        num_depths: how many hidden states of the vision tower are read.
        connector: for the head size and the queries' initial scale.
    """

    def __init__(
        self, grid: int, window: int, num_queries: int, width: int, num_depths: int, connector: ResamplerConfig
    ) -> None:
        super().__init__()
        self.grid = grid
        self.window = window
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_queries, width), std=connector.init_std))
        self.blocks = nn.ModuleList([ResamplerBlock(width, connector.head_dim) for _ in range(num_depths)])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One (B, g * g, W) per depth to (B, num_queries, W): windows in raster order, then a window's queries."""
        batch, _, width = features[0].shape
        windows = (self.grid // self.window) ** 2
        tokens = self.queries.view(1, windows, -1, width).expand(batch, -1, -1, -1).flatten(0, 1)
        for block, depth in zip(self.blocks, features, strict=True):
            tokens = block(tokens, split_windows(depth, self.grid, self.window))
        return tokens.reshape(batch, -1, width)


class MultiScaleResampler(nn.Module):
    """Learned queries that read CLIP features window by window, at several window sizes.

    Every level has its own queries and, for every vision depth, its own block; the depths are read one after the other.
    One LayerNorm and one projection to the language model's width are shared by all levels. Weights start from a
    truncated normal of standard deviation ``connector.init_std`` (0.02), biases at 0, LayerNorms at 1 and 0.

    Args:
        connector: windows and queries of the levels, coarsest first, and the head size.
        grid: g, patches per side.
        vision_width: W.
        num_depths: hidden states of the vision tower handed to ``forward``.
        llm_width: C.

    Raises:
        ConfigError: the windows do not tile the grid.
        ValueError: ``connector.head_dim`` does not divide ``vision_width``.
    """

    def __init__(
        self, connector: ResamplerConfig, grid: int, vision_width: int, num_depths: int, llm_width: int
    ) -> None:
        super().__init__()
        connector.check_grid(grid)
        self.grid = grid
        self.levels = nn.ModuleList(
            [
                ResamplerLevel(grid, window, queries, vision_width, num_depths, connector)
                for window, queries in zip(connector.windows, connector.queries, strict=True)
            ]
        )
        self.norm = nn.LayerNorm(vision_width)
        self.projection = nn.Linear(vision_width, llm_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=connector.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: VisionFeatures) -> list[Tensor]:
        """Resample tiles.

        Args:
            features: states of as many depths as the resampler was built for, (B, g * g, W) each.

        Returns:
            one (B, queries_l, C) per level, coarsest first.

        Raises:
            ValueError: another number of patches than the grid has.
        """
        states = features.states
        if states[0].shape[1] != self.grid**2:
            raise ValueError(f"features: {states[0].shape[1]} patches, expected {self.grid} x {self.grid}")
        return [self.projection(self.norm(level(states))) for level in self.levels]
