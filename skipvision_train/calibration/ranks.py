"""Calibration on several processes: each takes its share of the samples, all end with the same table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from skipvision_train.errors import SkipVisionError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Attributes:
        rank: 0 to ``world`` - 1; 0 writes files and talks.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls) -> Ranks:
        """Join the processes that ``torchrun`` has started, if any; on its own process, alone."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():
            dist.init_process_group("gloo")  # lists of floats are all that is exchanged
        return cls(dist.get_rank(), world)

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's items: every ``world``-th."""
        return list(items[self.rank :: self.world])

    def join(self, own: Tensor) -> Tensor:
        """All processes' values (n,) float64, in the order of the items that were shared."""
        if self.world == 1:
            return own
        parts: list[list[float]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, own.tolist())
        joined = [0.0] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            joined[rank :: self.world] = part
        return torch.tensor(joined, dtype=torch.float64)

    def told(self, read: Callable[[], T]) -> T:
        """What ``read`` gives on the first process, on all of them; it raises everywhere what it raises there.

        For files: an output folder may be each node's own.
        """
        if self.world == 1:
            return read()
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = read()
            except SkipVisionError as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise found[1]
        return cast(T, found[0])

    def finish(self) -> None:
        """Leave the group."""
        if self.world > 1:
            dist.destroy_process_group()
