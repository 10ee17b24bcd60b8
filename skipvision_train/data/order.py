"""The order of an epoch: pure functions from a position to an index, so that a run can begin at any position.

Every order depends on the seed and the epoch alone, never on processes or workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from skipvision_train.errors import ConfigError

ORDERS = ("shuffle", "shards", "sequential")
"""The values of ``data.order``."""

LARGEST_LIST = 10_000_000
"""Up to so many samples ``shuffle`` holds its permutation (8 bytes each); beyond that it computes every place."""

_BLOCK = 1 << 16
_ROUNDS = 8


class Order(Protocol):
    """A permutation of ``samples`` indices, given piece by piece."""

    @property
    def samples(self) -> int:
        """How many indices there are."""

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,): the indices at the positions from ``start`` to ``stop``, both within the epoch."""


@dataclass(frozen=True)
class Sequential:
    """Index after index."""

    samples: int

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """See :class:`Order`."""
        return np.arange(start, stop, dtype=np.int64)


@dataclass(frozen=True)
class Shuffled:
    """A random permutation of everything, held in memory: ``torch.randperm``, seeded by seed and epoch."""

    samples: int
    seed: int
    epoch: int

    @cached_property
    def _permutation(self) -> NDArray[np.int64]:
        # Two integers in one: generators seeded with neighbouring numbers would repeat orders across (seed, epoch).
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return torch.randperm(self.samples, generator=generator).numpy()

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """See :class:`Order`."""
        return self._permutation[start:stop]


@dataclass(frozen=True)
class Feistel:
    """A pseudorandom permutation that is computed place by place: memory does not depend on the number of samples.

    A Feistel network permutes the next power of two; a place that falls outside is permuted again until it falls
    inside (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), on average less than once.
    """

    samples: int
    seed: int
    epoch: int

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """See :class:`Order`."""
        places = np.arange(start, stop, dtype=np.uint64)
        outside = np.arange(len(places))
        while len(outside):
            places[outside] = self._round_trip(places[outside])
            outside = outside[places[outside] >= self.samples]
        return places.astype(np.int64)

    @cached_property
    def _keys(self) -> list[np.uint64]:
        digests = (hashlib.sha256(f"{self.seed}/{self.epoch}/{i}".encode()).digest() for i in range(_ROUNDS))
        return [np.uint64(int.from_bytes(digest[:8], "little")) for digest in digests]

    def _round_trip(self, places: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = max(2, (self.samples - 1).bit_length())
        low_bits = np.uint64(bits // 2)
        low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
        high, low = places >> low_bits, places & low_mask
        for i, key in enumerate(self._keys):
            if i % 2:
                low = low ^ (mix(high ^ key) & low_mask)
            else:
                high = high ^ (mix(low ^ key) & high_mask)
        return (high << low_bits) | low


@dataclass(frozen=True)
class ShardShuffled:
    """Shards in random order, a few at a time, and everything in those few shuffled.

    At any moment only ``buffer`` shards are read, and each of them once per epoch. Memory is that of one buffer's
    permutation, whatever the number of samples.

    Attributes:
        shards: samples of each shard, in the order of their indices.
        seed, epoch: of the permutations.
        buffer: shards that are shuffled together.
    """

    shards: tuple[int, ...]
    seed: int
    epoch: int
    buffer: int

    @property
    def samples(self) -> int:
        """How many indices there are."""
        return sum(self.shards)

    @property
    def buffers(self) -> list[int]:
        """The samples of each buffer, in order."""
        return [int(size) for size in np.diff(self._begins)]

    @cached_property
    def _sequence(self) -> NDArray[np.int64]:
        """(shards,): the order in which shards are read."""
        return Shuffled(len(self.shards), self.seed, self.epoch).take(0, len(self.shards))

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        """(buffers + 1,): the position at which each buffer begins, and the end."""
        ends = np.cumsum(np.asarray(self.shards, dtype=np.int64)[self._sequence])
        return np.concatenate([[0], ends[self.buffer - 1 : -1 : self.buffer], ends[-1:]])

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """(shards,): the first index of every shard."""
        return np.cumsum([0, *self.shards[:-1]])

    @cached_property
    def _last_used(self) -> list[tuple[int, NDArray[np.int64]]]:
        return []

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """See :class:`Order`."""
        pieces = [np.empty(0, dtype=np.int64)]
        while start < stop:
            number = int(np.searchsorted(self._begins, start, side="right")) - 1
            begin, end = int(self._begins[number]), int(self._begins[number + 1])
            pieces.append(self._members(number)[start - begin : stop - begin])
            start = end
        return np.concatenate(pieces)

    def _members(self, number: int) -> NDArray[np.int64]:
        """The indices of a buffer, shuffled."""
        if self._last_used and self._last_used[0][0] == number:
            return self._last_used[0][1]
        shards = self._sequence[number * self.buffer : (number + 1) * self.buffer]
        inside = np.concatenate([self._first[s] + np.arange(self.shards[s]) for s in shards])
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        shuffled = inside[torch.randperm(len(inside), generator=generator).numpy()]
        self._last_used[:] = [(number, shuffled)]
        return shuffled


@dataclass(frozen=True)
class OrderRule:
    """How epochs are ordered.

    Attributes:
        kind: of :data:`ORDERS`.
        shards: for ``shards``: the samples of each shard, which are consecutive indices.
        buffer: shards that are shuffled together.
    """

    kind: str = "shuffle"
    shards: tuple[int, ...] | None = None
    buffer: int = 8

    def of(self, samples: int, seed: int, epoch: int) -> Order:
        """The order of one epoch.

        Raises:
            ConfigError: the kind is unknown, or the shards are not those of the samples.
        """
        if self.kind == "sequential":
            return Sequential(samples)
        if self.kind == "shuffle":
            return Shuffled(samples, seed, epoch) if samples <= LARGEST_LIST else Feistel(samples, seed, epoch)
        if self.kind != "shards":
            raise ConfigError(f"data.order: {self.kind!r} is unknown; use {', '.join(ORDERS)}")
        if self.shards is None or sum(self.shards) != samples:
            found = "none are known" if self.shards is None else f"{len(self.shards)} shards have {sum(self.shards)}"
            raise ConfigError(f"data.order: shards needs the samples of every shard of the {samples}, and {found}")
        return ShardShuffled(self.shards, seed, epoch, self.buffer)


def walk(order: Order, length: int) -> Iterator[int]:
    """The first ``length`` indices, block by block; behind the last one the order begins again."""
    done = 0
    while done < length:
        start = done % order.samples
        stop = min(start + _BLOCK, order.samples, start + length - done)
        yield from order.take(start, stop).tolist()
        done += stop - start


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter 64-bit integers (the finaliser of SplitMix64; overflow wraps)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
