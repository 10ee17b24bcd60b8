"""Before any process waits for another inside training: were all started alike, and is there a port to meet at?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist

from skipvision_train.errors import ConfigError, TrainingError
from skipvision_train.training.checkpoints import flatten

PACKAGES = ("skipvision_train", "torch", "transformers", "accelerate", "deepspeed")
"""Their versions are compared as well."""

_KEY = "skipvision_train/started"


def started_with(values: Mapping[str, Any]) -> dict[str, str]:
    """What has to be the same everywhere: every field of the configuration, and versions, as text."""
    return {key: repr(value) for key, value in flatten(values).items()} | {
        f"the version of {name}": _version(name) for name in PACKAGES
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def digest(started: Mapping[str, str]) -> str:
    """A hash of :func:`started_with`."""
    return hashlib.sha256(json.dumps(started, sort_keys=True).encode()).hexdigest()


def differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Fields that are not the same, with both values."""
    keys = [key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]
    return [f"{key} {first.get(key)} and {other.get(key)}" for key in keys]


def check_started_alike(values: Mapping[str, Any], patience: float) -> dist.Store | None:
    """Compare this process's configuration with that of all others.

    The processes meet at a store (``MASTER_ADDR``, ``MASTER_PORT``), which takes no collective, and all of them get the
    same answer.

    Args:
        values: the configuration.
        patience: seconds to wait for processes that do not show up; 0 is half an hour.

    Returns:
        the store; while it is held, a process that comes late still finds it. None for a run of one process.

    Raises:
        ConfigError: configurations differ, naming ranks and fields.
        TrainingError: the port is taken, or a process does not show up.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    limit = timedelta(seconds=patience or 1800)
    store, rank, processes = _meet(limit)
    mine = started_with(values)
    store.set(f"{_KEY}/{rank}", json.dumps([digest(mine), mine]))
    if rank == 0:
        store.set(f"{_KEY}/verdict", _verdict(store, mine, processes))
    try:
        verdict = store.get(f"{_KEY}/verdict").decode()
    except dist.DistError as error:
        raise TrainingError(f"rank {rank} waited {limit} for rank 0 in vain: {error}") from error
    if verdict.startswith("missing"):
        raise TrainingError(verdict.removeprefix("missing").strip())
    if verdict:
        raise ConfigError(verdict)
    return store


def _meet(limit: timedelta) -> tuple[dist.Store, int, int]:
    try:
        store, rank, processes = next(dist.rendezvous("env://", timeout=limit))
    except dist.DistError as error:
        address = f"MASTER_ADDR {os.environ.get('MASTER_ADDR')}, MASTER_PORT {os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise TrainingError(f"{address}: another program uses the port; set MASTER_PORT to a free one") from error
        raise TrainingError(f"{address}: not all processes came there: {str(error).splitlines()[0]}") from error
    store.set_timeout(limit)
    return store, rank, processes


def _verdict(store: dist.Store, mine: Mapping[str, str], processes: int) -> str:
    """What is wrong, or nothing."""
    found, own = [], digest(mine)
    for rank in range(1, processes):
        try:
            other, fields = json.loads(store.get(f"{_KEY}/{rank}"))
        except dist.DistError:
            return f"missing rank {rank} of {processes} did not start in time; look at its log"
        if other != own:
            found.append(
                f"rank 0 and rank {rank} were started with different {'; '.join(differences(mine, fields)[:8])}"
            )
    return "; ".join(found[:4]) + (". Start all with the same arguments and files" if found else "")
