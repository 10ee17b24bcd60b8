"""Tokens of batches, counted on their tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def count_tokens(batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """(3,) int64 on the CPU: supervised tokens, real tokens and all places of some batches, padding included.

    The label of a row's first position is predicted by nothing and does not count.
    """
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return torch.tensor([supervised, real, sum(batch["attention_mask"].numel() for batch in batches)])
