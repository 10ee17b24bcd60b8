"""Torch's own FLOPs counter, without what transformers makes of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """A counter in which outer products are free: some versions of transformers make rotary angles by one."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: _product})


def _product(a: Sequence[int], b: Sequence[int], out_shape: Sequence[int] | None = None, **kwargs: object) -> int:
    return 0 if a[2] == 1 else 2 * math.prod(a) * b[2]
