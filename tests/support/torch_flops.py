"""Torch's own FLOPs counter, without the rotary angles: some versions of transformers make them by an outer product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode


def forward_counter() -> FlopCounterMode:
    """A counter in which outer products are free. Not for backward passes, where one token's gradient is one."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: _product})


def _product(a: Sequence[int], b: Sequence[int], out_shape: Sequence[int] | None = None, **kwargs: object) -> int:
    return 0 if a[2] == 1 else 2 * math.prod(a) * b[2]


def total(counter: FlopCounterMode) -> int:
    """What a counter found, except in modules of rotary embeddings."""
    modules = counter.get_flop_counts().items()
    rotary = sum(sum(found.values()) for name, found in modules if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary
