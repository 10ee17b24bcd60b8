"""A worker that fails or dies is reported with the record that it was reading."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch.utils.data import DataLoader, Dataset

from skipvision_train.data.watch import WatchedDataset
from skipvision_train.errors import DataError


class Trouble(Dataset):
    """Twelve numbers, one of which does something else."""

    def __init__(self, place, action):
        self.place, self.action = place, action

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == self.place:
            self.action()
        return index


def fail():
    raise KeyError("pixels")


def refuse():
    raise DataError("record 7 of coco: no such image")


def name(index):
    return f"record r{index} of coco"


KILL = """
import os, signal, sys
from torch.utils.data import DataLoader, Dataset
from skipvision_train.data.watch import WatchedDataset
from skipvision_train.errors import DataError

class Deadly(Dataset):
    def __init__(self, place): self.place = place
    def __len__(self): return 12
    def __getitem__(self, index):
        if index == self.place: os.kill(os.getpid(), signal.SIGKILL)
        return index

def broken(index): raise DataError(f"data.jsonl: record {index}: not JSON")

for workers, place, name in ((1, 5, "record r{}".format), (2, 6, "record r{}".format), (3, 10, broken)):
    watched = WatchedDataset(Deadly(place), name, workers)
    try:
        watched.guard(lambda: list(DataLoader(watched, batch_size=1, num_workers=workers)))
    except DataError as error:
        print(error)
"""


def test_a_killed_worker_names_its_record():
    """In a process of its own: torch reports the loss from a signal handler, wherever the interpreter is."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", KILL], capture_output=True, text=True, check=True)
    first, second, third = run.stdout.splitlines()
    assert "was lost while reading record r5 (process " in first
    assert "was lost while reading record r6 (process " in second
    assert "was lost while reading data.jsonl: record 10: not JSON (process " in third
    assert "trainer.workers" in first


def raise_(error):
    raise error


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyError("x"), ConnectionResetError("hub")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught:
        WatchedDataset(Trouble(0, fail), name, 2).guard(lambda: raise_(error))
    assert caught.value is error


def test_a_worker_that_had_read_nothing():
    error = RuntimeError("DataLoader worker (pid(s) 71, 72) exited unexpectedly")
    with pytest.raises(DataError, match=r"while reading its first record: DataLoader worker \(pid\(s\) 71, 72"):
        WatchedDataset(Trouble(0, fail), name, 2).guard(lambda: raise_(error))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_names_the_record(workers):
    watched = WatchedDataset(Trouble(4, fail), name, workers)
    with pytest.raises(RuntimeError, match="record r4 of coco: KeyError: 'pixels'"):
        list(DataLoader(watched, num_workers=workers))


def test_an_error_that_names_its_record_stays_as_it_is():
    with pytest.raises(DataError, match=r"^record 7 of coco: no such image$"):
        WatchedDataset(Trouble(4, refuse), name, 0)[4]
    assert [WatchedDataset(Trouble(4, refuse), name, 0)[i] for i in range(4)] == [0, 1, 2, 3]
