"""Choosing tokens by a score, and parting them from the rest. Pure functions.

Shapes: B tiles, n tokens, k kept ones, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_salient(saliency: Tensor, keep: int) -> Tensor:
    """The most salient tokens, in raster order; of equally salient ones those with the lower index.

    Args:
        saliency: (B, n), any dtype without NaN.
        keep: k, 0 to n.

    Returns:
        (B, k) int64, ascending in every row.

    Raises:
        ValueError: ``keep`` is out of range.
    """
    count = saliency.shape[1]
    if not 0 <= keep <= count:
        raise ValueError(f"keep: {keep} of {count} tokens; use 0 to {count}")
    # A stable sort, because torch.topk leaves open which of several equal scores it takes.
    ranking = saliency.argsort(dim=1, descending=True, stable=True)
    return ranking[:, :keep].sort(dim=1).values


def partition(tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Part the kept tokens from the rest, both in raster order; differentiable in ``tokens``.

    Args:
        tokens: (B, n, C), any dtype.
        kept: (B, k) int64, distinct within a row, in any order.

    Returns:
        (B, k, C) and (B, n - k, C).
    """
    batch, count, width = tokens.shape
    keep = kept.shape[1]
    is_kept = torch.zeros(batch, count, dtype=torch.uint8, device=tokens.device).scatter(1, kept, 1)
    order = is_kept.argsort(dim=1, descending=True, stable=True)
    arranged = tokens.gather(1, order[:, :, None].expand(-1, -1, width))
    return arranged[:, :keep], arranged[:, keep:]
