"""The Matryoshka query transformer of MQT-LLaVA (arXiv 2405.19315, Sec. 3.2; structure as in its public code).

Shapes: B tiles, g patches per side, W channels of the vision tower, C of the language model, q learned queries of which
the first m are used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipvision_train.errors import ConfigError
from skipvision_train.models.connector_settings import MqtConfig
from skipvision_train.models.features import VisionFeatures

NORM_EPS = 1e-6


class MqtResampler(nn.Module):
    """One cross-attention of the first m learned queries over one hidden state of the tower.

    Queries and keys carry a fixed sine-cosine position embedding of the square grid of q queries, for the keys
    interpolated to the grid of patches. The keys are the position embedding and nothing else, the values the features:
    which patch a query reads does not depend on the image. There is no residual on the queries and no MLP. The queries
    do not see each other, so m queries give the first m of the tokens that all queries give.

    As in the public code, queries and the output projection of the attention start from a truncated normal of standard
    deviation 0.02, the projections of queries, keys and values uniform as in a fused ``MultiheadAttention``
    (``sqrt(6 / 4W)``), the projection to the language model, which has no bias, from a normal of standard deviation
    ``C ** -0.5``; biases start at 0, LayerNorms at 1 and 0. The public code stores the position embedding in half
    precision; here it is computed in fp32 where it is used, and no checkpoint holds it.

    Args:
        config: learned queries, how many are used, head size.
        grid: g.
        vision_width: W.
        llm_width: C.

    Raises:
        ConfigError: a width that the head size does not divide. What ``config.levels`` checks is taken for granted.
    """

    def __init__(self, config: MqtConfig, grid: int, vision_width: int, llm_width: int) -> None:
        super().__init__()
        if vision_width % config.head_dim:
            raise ConfigError(f"connector.head_dim: {config.head_dim} does not divide vision.width {vision_width}")
        self.keep = config.keep
        self.grid = grid
        self.heads = vision_width // config.head_dim
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.queries, vision_width), std=0.02))
        self.norm_query = nn.LayerNorm(vision_width, eps=NORM_EPS)
        self.norm_key = nn.LayerNorm(vision_width, eps=NORM_EPS)
        self.norm_value = nn.LayerNorm(vision_width, eps=NORM_EPS)
        self.query = nn.Linear(vision_width, vision_width)
        self.key = nn.Linear(vision_width, vision_width)
        self.value = nn.Linear(vision_width, vision_width)
        self.out = nn.Linear(vision_width, vision_width)
        self.projection = nn.Linear(vision_width, llm_width, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for linear in (self.query, self.key, self.value):
            # Xavier over the fused (3W, W) matrix: fan-in and fan-out are 4W together, not 2W.
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))
        nn.init.trunc_normal_(self.out.weight, std=0.02)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.projection.weight, std=self.projection.out_features**-0.5)

    def forward(self, features: VisionFeatures, queries: int | None = None) -> list[Tensor]:
        """Resample tiles.

        Args:
            features: the last of ``states`` is read, (B, g * g, W).
            queries: m, 1 to q; None is ``config.keep``.

        Returns:
            one level: (B, m, C).

        Raises:
            ValueError: m is out of range, or another number of patches than the grid has.
        """
        state, total = features.states[-1], len(self.queries)
        used = self.keep if queries is None else queries
        if not 1 <= used <= total:
            raise ValueError(f"queries: {used} of {total}; use 1 to {total}")
        if state.shape[1] != self.grid**2:
            raise ValueError(f"features: {state.shape[1]} patches, expected {self.grid} x {self.grid}")
        place = sincos_positions(math.isqrt(total), state.shape[2], state.device)
        patches = resize_positions(place, self.grid).to(self.queries.dtype)
        asked = self.queries[:used] + place[:used].to(self.queries.dtype)
        # Queries and keys are the same for all tiles: they are projected once, and shared by all of them.
        q = self._split(self.query(self.norm_query(asked))[None]).expand(len(state), -1, -1, -1)
        k = self._split(self.key(self.norm_key(patches))[None]).expand(len(state), -1, -1, -1)
        v = self._split(self.value(self.norm_value(state)))
        tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return [self.projection(self.out(tokens))]

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, n, W) to (B, heads, n, W / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sincos_positions(side: int, width: int, device: torch.device) -> Tensor:
    """The two-dimensional sine-cosine position embedding of a square grid, as in MAE (arXiv 2111.06377).

    Half of the channels say the column, the other half the row; in each half sines come before cosines, of the place
    times ``10000 ** (-i / (width / 4))``, i from 0.

    Args:
        side: places per side.
        width: channels, a multiple of 4.
        device: where it is computed.

    Returns:
        (side * side, width) fp32, raster order.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4))
    angles = torch.outer(torch.arange(side, device=device, dtype=torch.float32), frequencies)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(side * side, width)


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Interpolate a position embedding to another grid: bicubic, ``align_corners=False``, not antialiased.

    Args:
        positions: (s * s, W) fp32, raster order.
        grid: places per side of the result.

    Returns:
        (grid * grid, W) fp32.
    """
    side = math.isqrt(len(positions))
    image = positions.view(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(grid * grid, -1)
