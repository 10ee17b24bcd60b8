"""Merging similar tokens (Skip-Vision, Sec. 4.1): decide without a gradient, apply with one. Pure functions.

Shapes: B images, N tokens, K kept tokens, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ORDERS = ("similarity", "raster")


@dataclass(frozen=True)
class Merge:
    """Which tokens stay and where every token goes.

    Attributes:
        kept: (B, K) int64, the index of the token in each output slot.
        target: (B, N) int64, the output slot every token is averaged into; -1 for masked tokens, which go nowhere.
    """

    kept: Tensor
    target: Tensor

    def assignment(self) -> Tensor:
        """(B, K, N) bool: slot k averages token n."""
        slots = torch.arange(self.kept.shape[1], device=self.target.device)
        return self.target[:, None, :] == slots[:, None]

    def sizes(self) -> Tensor:
        """(B, K) int64: how many tokens each slot averages, the kept one included; 0 for a slot without a valid one."""
        return self.assignment().sum(-1)


@torch.no_grad()
def decide_merge(tokens: Tensor, keep: int, mask: Tensor | None = None, order: str = "similarity") -> Merge:
    """Keep the most distinctive tokens and send each other token to the kept one it resembles most.

    Distinctive means a low mean cosine similarity to all other tokens (the token itself left out). Similarities are
    computed in fp32 whatever the dtype of ``tokens`` and whether or not autocast is on (where torch is allowed TF32,
    their products have its 10-bit mantissas). Ties go by index: of equally distinctive tokens the later ones are kept,
    and of equally similar kept tokens the one with the lower index receives. An all-zero token resembles nothing
    (similarity 0), it makes no NaN. ``keep == N`` merges nothing.

    Args:
        tokens: (B, N, C), any float dtype.
        keep: K, 1 to N.
        mask: (B, N) bool, False on padding. Padding influences nothing, and takes a slot only where fewer than ``keep``
            tokens are valid; None means all tokens are valid.
        order: of the output slots. ``similarity`` is the order of the paper's code: by falling mean similarity (padding
            first), so that the last slot holds the most distinctive token. ``raster`` is by token index. The order
            changes no merged value.

    Raises:
        ValueError: ``keep`` out of range or ``order`` unknown.
    """
    batch, count, _ = tokens.shape
    if not 1 <= keep <= count:
        raise ValueError(f"keep: {keep} of {count} tokens; use 1 to {count}")
    if order not in ORDERS:
        raise ValueError(f"order: {order!r} is unknown; use {' or '.join(ORDERS)}")
    valid = torch.ones(batch, count, dtype=torch.bool, device=tokens.device) if mask is None else mask
    if keep == count:
        kept = torch.arange(count, device=tokens.device).expand(batch, count)
        return Merge(kept, kept.masked_fill(~valid, -1))
    similarity = _cosine_similarity(tokens, valid)
    others = (valid.sum(-1, keepdim=True) - 1).clamp_min(1)
    # Summed in fp64, where sums of fp32 numbers are exact for all practical purposes: rounding decides no tie.
    mean = (similarity.sum(-1, dtype=torch.float64) - similarity.diagonal(dim1=1, dim2=2)) / others
    ranking = mean.masked_fill(~valid, torch.inf).argsort(dim=-1, descending=True, stable=True)
    kept = ranking[:, count - keep :]
    by_index = kept.sort(dim=-1).values
    if order == "raster":
        kept = by_index
    # The receiver is looked up among kept tokens in index order (argmax takes the first maximum), then named by slot.
    columns = similarity.gather(2, by_index[:, None, :].expand(-1, count, -1))
    columns = columns.masked_fill(~valid.gather(1, by_index)[:, None, :], -torch.inf)
    receiver = by_index.gather(1, columns.argmax(-1)).scatter(1, kept, kept)
    slots = torch.arange(keep, device=tokens.device).expand(batch, keep)
    slot_of = torch.zeros(batch, count, dtype=torch.int64, device=tokens.device).scatter(1, kept, slots)
    return Merge(kept, slot_of.gather(1, receiver).masked_fill(~valid, -1))


def _cosine_similarity(tokens: Tensor, valid: Tensor) -> Tensor:
    """(B, N, N) fp32; rows and columns of padding are 0."""
    unit = F.normalize(tokens.float().masked_fill(~valid[..., None], 0.0), dim=-1)
    # Autocast would round the factors of this product to half precision.
    with torch.autocast(tokens.device.type, enabled=False):
        return unit @ unit.transpose(1, 2)


def apply_merge(tokens: Tensor, merge: Merge, sizes: Tensor | None = None) -> Tensor:
    """Average every slot's tokens, the kept one included; differentiable in ``tokens``.

    Args:
        tokens: (B, N, C).
        merge: as :func:`decide_merge` decided for B images of N tokens.
        sizes: (B, N), the weight of every token, as many original tokens as it stands for (ToMe); None weighs all
            tokens the same.

    Returns:
        (B, K, C) in the dtype of ``tokens``; zeros in a slot without a valid token.
    """
    weights = merge.assignment().to(tokens.dtype if sizes is None else torch.promote_types(tokens.dtype, sizes.dtype))
    if sizes is not None:
        weights = weights * sizes[:, None, :]
    present = tokens.masked_fill((merge.target < 0)[..., None], 0.0)
    # A product with a matrix, not a scatter: it sums in fp32 inside the kernel and is deterministic on a GPU.
    with torch.autocast(tokens.device.type, enabled=False):
        total = weights.to(tokens.dtype) @ present
    # Counted in fp32: half precision holds no whole numbers above 256.
    return total / weights.sum(-1, keepdim=True, dtype=torch.float32).clamp_min(1).to(tokens.dtype)


def merge_rounds(count: int, keep: int, rounds: int) -> list[int]:
    """How many tokens are left after each round: every round divides their number by the same factor, rounded up.

    The last entry is ``keep``; rounds that would merge nothing are left out.
    """
    left = [math.ceil(count * (keep / count) ** (i / rounds) - 1e-9) for i in range(1, rounds)]
    steps = [*left, keep]
    return [n for before, n in zip([count, *steps], steps, strict=False) if n < before]


def merge_tokens(
    tokens: Tensor,
    keep: int,
    mask: Tensor | None = None,
    order: str = "similarity",
    rounds: int = 1,
    weighted: bool = True,
) -> Tensor:
    """Decide and apply: (B, N, C) to (B, keep, C); ``keep == N`` without a mask returns ``tokens`` itself.

    Args:
        tokens: (B, N, C).
        keep: K, 1 to N.
        mask: as in :func:`decide_merge`; for one round only.
        order: as in :func:`decide_merge`; with several rounds raster means the order of the tokens that stay.
        rounds: merge step by step (:func:`merge_rounds`); later rounds compare the means.
        weighted: with several rounds: a slot is the mean of all original tokens it stands for. Without it, of the
            tokens of the last round, whatever they stand for.

    Raises:
        ValueError: as :func:`decide_merge`; or a mask with several rounds.
    """
    count = tokens.shape[1]
    if keep == count and mask is None:
        return tokens
    if rounds == 1:
        return apply_merge(tokens, decide_merge(tokens, keep, mask, order))
    if mask is not None:
        raise ValueError(f"mask: with {rounds} rounds; padding is left out in one round only")
    if not 1 <= keep <= count:
        raise ValueError(f"keep: {keep} of {count} tokens; use 1 to {count}")
    sizes = torch.ones(tokens.shape[:2], device=tokens.device)
    for left in merge_rounds(count, keep, rounds):
        # The order of earlier rounds decides nothing but ties; raster keeps indices meaningful between them.
        merge = decide_merge(tokens, left, order=order if left == keep else "raster")
        tokens = apply_merge(tokens, merge, sizes if weighted else None)
        sizes = (merge.assignment() * sizes[:, None, :]).sum(-1)
    return tokens
