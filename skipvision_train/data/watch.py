"""Which record a data loader's worker was reading when it failed or died."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import TypeVar

from torch.utils.data import Dataset, get_worker_info

from skipvision_train.errors import DataError, SkipVisionError

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 10.0
"""Seconds to wait for the end of a process whose connection is closed already."""

# "DataLoader worker (pid(s) 71, 72) exited unexpectedly", "DataLoader worker (pid 71) is killed by signal: Killed."
_LOST = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


class WatchedDataset(Dataset[T]):
    """A data set whose failures name the record.

    A worker process notes its number and the index that it reads in shared memory: what is killed cannot tell any more.

    Args:
        samples: the data set.
        name: of sample ``i``, for messages.
        workers: of one data loader.
    """

    def __init__(self, samples: Dataset[T], name: Callable[[int], str], workers: int) -> None:
        self.samples = samples
        self.name = name
        self._own = -1  # what this process reads, where there are no workers
        self._reading = multiprocessing.RawArray("q", 2 * max(1, workers))  # (process id, index) of every worker

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> T:
        """Sample ``index``.

        Raises:
            SkipVisionError: as the data set does.
            RuntimeError: anything else, with the record's name in front.
        """
        worker = get_worker_info()
        if worker is None:
            self._own = index
        else:
            self._reading[2 * worker.id : 2 * worker.id + 2] = [multiprocessing.current_process().pid or 0, index]
        try:
            return self.samples[index]
        except SkipVisionError:
            raise
        except Exception as error:
            raise RuntimeError(f"{self.name(index)}: {type(error).__name__}: {error}") from error

    def reading(self) -> tuple[str, ...]:
        """Names of the records that are being read, or were last, by this process and its workers."""
        indices = [index for process, index in zip(self._reading[::2], self._reading[1::2], strict=True) if process]
        return tuple(self._name(index) for index in ([self._own] if self._own >= 0 else indices))

    def guard(self, run: Callable[[], R]) -> R:
        """``run()``, in which a loader reads this data set; if a worker process is lost, the error names its record.

        Raises:
            DataError: a worker was lost.
        """
        # No context manager: torch reports a lost worker from a signal handler, also while another error is handled,
        # and only a try statement leaves no place for it to slip through.
        try:
            try:
                return run()
            except (ConnectionError, EOFError):  # what a worker had made cannot be fetched from it any more
                ending = {child.sentinel: child for child in multiprocessing.active_children()}
                for sentinel in wait(list(ending), timeout=_PATIENCE if ending else 0):
                    ending[sentinel].join()  # type: ignore[index]
                raise
        except (RuntimeError, ConnectionError, EOFError) as error:
            explained = self._explain(error)
            if explained is None:
                raise
            raise explained from error

    def _explain(self, error: Exception) -> DataError | None:
        """What the loss of a worker process means, or None if the error is about something else."""
        found = _LOST.search(str(error))
        reading = dict(zip(self._reading[::2], self._reading[1::2], strict=True))
        if found is not None:
            lost = [int(number) for number in found[1].split(",")]
        elif isinstance(error, RuntimeError):
            return None
        else:
            alive = {process.pid for process in multiprocessing.active_children()}
            lost = [number for number in reading if number and number not in alive]
        if not lost:
            return None
        names = [f"{self._name(reading[number])} (process {number})" for number in lost if number in reading]
        return DataError(
            f"a worker process of the data loader was lost while reading {', '.join(names) or 'its first record'}: "
            f"{str(error).strip().rstrip('.')}; the system kills processes where memory runs out: try fewer "
            "trainer.workers"
        )

    def _name(self, index: int) -> str:
        try:
            return self.name(index)
        except DataError as error:
            return str(error)
