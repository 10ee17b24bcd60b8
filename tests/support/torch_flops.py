"""Torch's own FLOPs counter, without the rotary angles: some versions of transformers make them by an outer product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_counter(rotary: nn.Module) -> FlopCounterMode:
    """A counter in which outer products are free, if the model's rotary embedding is made of them; else torch's own.

    Not for backward passes, where one token's gradient is an outer product.
    """
    with FlopCounterMode(display=False) as probe:
        rotary(torch.zeros(1, 1, 8), torch.arange(5)[None])
    made_by_products = probe.get_total_flops() > 0
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: _product} if made_by_products else None)


def _product(a: Sequence[int], b: Sequence[int], out_shape: Sequence[int] | None = None, **kwargs: object) -> int:
    return 0 if a[2] == 1 else 2 * math.prod(a) * b[2]


def total(counter: FlopCounterMode) -> int:
    """What a counter found, except in modules of rotary embeddings."""
    modules = counter.get_flop_counts().items()
    rotary = sum(sum(found.values()) for name, found in modules if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary
