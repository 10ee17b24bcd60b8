"""Merging similar tokens (Skip-Vision, Sec. 4.1): decide without a gradient, apply with one. Pure functions.

Shapes: B images, N tokens, K kept tokens, C channels.
"""

from __future__ import annotations

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


def apply_merge(tokens: Tensor, merge: Merge) -> Tensor:
    """Average every slot's tokens, the kept one included, each with weight one; differentiable in ``tokens``.

    Args:
        tokens: (B, N, C).
        merge: as :func:`decide_merge` decided for B images of N tokens.

    Returns:
        (B, K, C) in the dtype of ``tokens``; zeros in a slot without a valid token.
    """
    assignment = merge.assignment()
    present = tokens.masked_fill((merge.target < 0)[..., None], 0.0)
    # A product with a 0/1 matrix, not a scatter: it sums in fp32 inside the kernel and is deterministic on a GPU.
    with torch.autocast(tokens.device.type, enabled=False):
        total = assignment.to(tokens.dtype) @ present
    return total / assignment.sum(-1, keepdim=True).clamp_min(1).to(tokens.dtype)


def merge_tokens(tokens: Tensor, keep: int, mask: Tensor | None = None, order: str = "similarity") -> Tensor:
    """Decide and apply in one step: (B, N, C) to (B, keep, C); ``keep == N`` without a mask returns ``tokens`` itself.

    Raises:
        ValueError: as :func:`decide_merge`.
    """
    if keep == tokens.shape[1] and mask is None:
        return tokens
    return apply_merge(tokens, decide_merge(tokens, keep, mask, order))
