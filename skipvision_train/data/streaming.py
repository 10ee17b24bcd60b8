"""A stream as what a data loader reads: each process its lanes, each worker its batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import IterableDataset, get_worker_info

from skipvision_train.data.processor import Example
from skipvision_train.data.streams import Lane, Reference, Streams
from skipvision_train.data.watch import WatchedDataset


@dataclass(frozen=True)
class StreamShare:
    """What one process reads of a stream.

    Attributes:
        lanes: of all processes; a multiple of their number, and a divisor of the global batch.
        rank: of the process.
        processes: how many there are.
        per_device: samples of a batch.
        global_batch: samples of one step of all processes.
        seed: of the run.
        buffer: see :class:`Lane`.
    """

    lanes: int
    rank: int
    processes: int
    per_device: int
    global_batch: int
    seed: int
    buffer: int


class StreamDataset(IterableDataset["Example | None"]):
    """The samples of one process in order, endlessly; a loader in batches of ``per_device`` keeps that order.

    Every worker goes through all references of its process, which is cheap, and reads the samples of its own batches:
    of n workers, the loader takes each batch from the next one.

    Args:
        streams: the recipe's sources.
        samples: encodes a record that a reference reads.
        share: what this process reads.
    """

    def __init__(self, streams: Streams, samples: WatchedDataset[Example | None], share: StreamShare) -> None:
        self.streams = streams
        self.samples = samples
        self.share = share
        self.step = 0
        """The step that the next pass begins with."""

    def references(self, step: int) -> Iterator[Reference]:
        """What the process reads from a step on; one record of every lane in turn."""
        share = self.share
        numbers = range(share.rank, share.lanes, share.processes)
        lanes = [Lane(number, share.lanes, share.seed, share.buffer) for number in numbers]
        skip = step * (share.global_batch // share.lanes)
        sequences = [self.streams.references(lane, skip) for lane in lanes]
        while True:
            for sequence in sequences:
                yield next(sequence)

    def __iter__(self) -> Iterator[Example | None]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place, reference in enumerate(self.references(self.step)):
            if place // self.share.per_device % workers == number:
                yield self.samples[reference]
