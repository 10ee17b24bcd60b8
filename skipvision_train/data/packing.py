"""Sequence packing: which samples share a row.

The bins of a run are planned once, from the lengths of all samples: a pure function of lengths, seed and capacity, in
integers alone, so that every process finds the same bins. An epoch is an order of bins.

The plan counts how often each length occurs and fills bins with *patterns* of lengths: a pattern that fits is used
until one of its lengths runs out (histogram packing, after Krell et al., "Efficient Sequence Packing without
Cross-contamination", 2021). So planning takes as many steps as there are lengths, however many samples there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from skipvision_train.data.order import OrderRule, ShardShuffled
from skipvision_train.data.processor import Example
from skipvision_train.errors import DataError

WINDOW = 1 << 20
"""Samples that are packed together in a shuffled order; the plan's working memory is that of one window."""

SEQUENTIAL_WINDOW = 1 << 13
"""The same, where the order of the samples is to be kept by and large."""

TRIAL = 1 << 13
"""Lengths on which the penalties are compared."""

PENALTIES = tuple(step / 64 for step in (0, 1, 2, 3, 4, 6, 8, 10, 12, 13, 14, 15, 16, 17, 18, 64))
"""What the planner tries as the price of one more sample in a bin, as a share of the capacity."""


@dataclass(frozen=True)
class Bins:
    """Which samples share a row.

    Attributes:
        members: (samples,) int64, bin after bin.
        starts: (bins + 1,) int64: bin i is ``members[starts[i]:starts[i + 1]]``.
        windows: bins of each window, in order; bins of one window hold samples that stood close in the order.
        capacity: tokens of a row.
        tokens: of all samples, by the lengths that were planned with.
    """

    members: NDArray[np.int64]
    starts: NDArray[np.int64]
    windows: tuple[int, ...]
    capacity: int
    tokens: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> list[int]:
        """The samples of a bin."""
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} of {len(self)}")
        return [int(i) for i in self.members[self.starts[index] : self.starts[index + 1]]]

    def rule(self, samples: OrderRule) -> OrderRule:
        """How epochs order the bins, where ``samples`` says how the samples are ordered."""
        return OrderRule("shards", self.windows, buffer=1) if samples.kind == "shards" else OrderRule(samples.kind)

    @property
    def efficiency(self) -> float:
        """Tokens over places."""
        return self.tokens / (len(self) * self.capacity)

    def line(self) -> str:
        """One line for a log."""
        return (
            f"packed {len(self.members)} samples into {len(self)} rows of {self.capacity} tokens: "
            f"{len(self.members) / len(self):.2f} samples a row, {self.efficiency:.2%} full"
        )


def pack(lengths: NDArray[np.integer], capacity: int, seed: int = 0, rule: OrderRule | None = None) -> Bins:
    """Plan the bins.

    Args:
        lengths: (samples,) tokens of every sample, 1 to ``capacity``.
        capacity: tokens of a row.
        seed: of the order from which bins are made.
        rule: that order. A bin is made of samples of one window of it: of one buffer of shards, a short stretch of
            a sequential order, up to :data:`WINDOW` samples of a shuffled one. None shuffles.

    Raises:
        DataError: naming the first sample whose length is out of range.
    """
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"sample {first} has {lengths[first]} tokens; a row of data.pack_length {capacity} holds 1 to {capacity}"
        )
    order = (rule or OrderRule()).of(len(lengths), seed, 0)
    if isinstance(order, ShardShuffled):
        windows = order.buffers
    else:
        size = SEQUENTIAL_WINDOW if rule is not None and rule.kind == "sequential" else WINDOW
        windows = [min(size, len(lengths) - start) for start in range(0, len(lengths), size)]
    members: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    sizes: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    penalty, start = None, 0
    for window in windows:
        indices = order.take(start, start + window)
        start += window
        own = np.asarray(lengths[indices], dtype=np.int64)
        penalty = best_penalty(own[:TRIAL], capacity) if penalty is None else penalty
        made, counts = _members(own, fill(np.bincount(own, minlength=capacity + 1), capacity, penalty))
        members.append(indices[made])
        sizes.append(counts)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    tokens = int(lengths.sum(dtype=np.int64))
    return Bins(np.concatenate(members), starts, tuple(map(len, sizes[1:])), capacity, tokens)


def best_penalty(lengths: NDArray[np.int64], capacity: int) -> int:
    """The penalty under which these lengths need the fewest bins; of equal ones the smallest."""
    histogram = np.bincount(lengths, minlength=capacity + 1)
    tried = sorted({int(share * capacity) for share in PENALTIES})
    return min(tried, key=lambda penalty: sum(times for _, times in fill(histogram, capacity, penalty)))


def fill(histogram: NDArray[np.int64], capacity: int, penalty: int) -> list[tuple[tuple[int, ...], int]]:
    """Patterns of lengths, and how many bins to fill with each; together they use the histogram up.

    A bin begins with the longest sample that is left. Then it takes the one that leaves the least space, or the longer
    one of the two that do, where two gain more than ``penalty`` tokens over one. Short samples are what fills gaps, and
    there are never enough of them: the penalty is what one more is worth.

    Args:
        histogram: (capacity + 1,) how many samples have each length; none has length 0.
        capacity: tokens of a bin.
        penalty: in tokens.
    """
    left = histogram.astype(np.int64)
    patterns: list[tuple[tuple[int, ...], int]] = []
    while left.any():
        pattern = _pattern(left.copy(), capacity, penalty)
        lengths, needed = np.unique(pattern, return_counts=True)
        times = int((left[lengths] // needed).min())
        left[lengths] -= needed * times
        patterns.append((tuple(pattern), times))
    return patterns


def _pattern(left: NDArray[np.int64], capacity: int, penalty: int) -> list[int]:
    """The lengths of one bin; ``left`` loses them."""
    present, at_most = _tables(left)
    taken: list[int] = []
    gap = capacity
    while length := int(at_most[gap]):
        if taken:
            length = _next(left, present, at_most, gap, penalty)
        taken.append(length)
        gap -= length
        left[length] -= 1
        if not left[length]:
            present, at_most = _tables(left)
    return taken


def _tables(left: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The lengths that are left, ascending, and for every gap the longest that fits (0: none does)."""
    lengths = np.arange(len(left))
    return np.flatnonzero(left), np.maximum.accumulate(np.where(left > 0, lengths, 0))


def _next(
    left: NDArray[np.int64], present: NDArray[np.int64], at_most: NDArray[np.int64], gap: int, penalty: int
) -> int:
    """What a bin with a gap takes: the longest that fits, or the longer one of the best pair."""
    one = int(at_most[gap])
    first = present[: np.searchsorted(present, gap, side="right")]
    second = at_most[gap - first]
    used_up = (first == second) & (left[second] < 2)
    second = np.where(used_up, at_most[np.maximum(second - 1, 0)], second)
    gain = np.where(second > 0, first + second - penalty, 0)
    best = len(gain) - 1 - int(gain[::-1].argmax())  # of equal pairs the most unequal: keep what lies in the middle
    return one if one >= gain[best] else int(max(first[best], second[best]))


def _members(
    lengths: NDArray[np.int64], patterns: Sequence[tuple[tuple[int, ...], int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The samples of all bins, bin after bin, as places in ``lengths``, and how many each bin has.

    Samples of one length are used in their order. Within a bin samples stand in their order, and bins in the order of
    their first samples.
    """
    by_length = np.argsort(lengths, kind="stable")
    unused = np.searchsorted(lengths[by_length], np.arange(int(lengths.max(initial=0)) + 1))
    owner = np.empty(len(lengths), dtype=np.int64)
    made = 0
    for pattern, times in patterns:
        numbers = np.arange(made, made + times)
        for length in pattern:
            begin = unused[length]
            owner[by_length[begin : begin + times]] = numbers
            unused[length] += times
        made += times
    first = np.full(made, len(lengths))
    np.minimum.at(first, owner, np.arange(len(lengths)))
    rank = np.empty(made, dtype=np.int64)
    rank[np.argsort(first)] = np.arange(made)
    owner = rank[owner]
    return np.argsort(owner, kind="stable"), np.bincount(owner, minlength=made)


class PackedDataset(Dataset["list[Example | None]"]):
    """The samples of bin ``i`` when asked for item ``i``; a sample that was left out is None.

    Args:
        samples: of single samples.
        bins: which of them share a row.
    """

    def __init__(self, samples: Dataset[Example | None], bins: Bins) -> None:
        self.samples = samples
        self.bins = bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[Example | None]:
        """The encoded samples of a bin."""
        return [self.samples[member] for member in self.bins[index]]


def rows_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Split a bin into rows by true lengths: one row, unless the lengths that were planned with were too small.

    Args:
        lengths: tokens of the bin's samples, in order.
        capacity: tokens of a row.

    Returns:
        the places of each row's samples; each sample goes into the first row that has room.

    Raises:
        DataError: a sample is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place, length in enumerate(lengths):
        if length > capacity:
            raise DataError(f"a sample of {length} tokens does not fit a row of data.pack_length {capacity}")
        row = next((i for i, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(place)
        room[row] -= length
    return rows
