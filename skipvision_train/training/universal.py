"""Optimizer shards of one number of processes, cut anew for another, by way of DeepSpeed's universal checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from skipvision_train.errors import CheckpointError

log = logging.getLogger(__name__)

FOLDER = "universal"
LATEST = "latest_universal"
"""The file in which DeepSpeed looks for the folder's name."""


def convert(checkpoint: Path, written_by: int, processes: int) -> None:
    """Write ``checkpoint/universal``: every parameter and its moments whole. Takes 12 bytes per parameter on the disk,
    for as long as the run is loading. On one process.

    Raises:
        CheckpointError: naming both numbers of processes and what went wrong.
    """
    from deepspeed.checkpoint import ds_to_universal

    log.info(
        "%s: written by %d processes; the optimizer's shards are cut anew for %d", checkpoint, written_by, processes
    )
    remove(checkpoint)
    options = argparse.Namespace(
        input_folder=str(checkpoint / (checkpoint / "latest").read_text().strip()),
        output_folder=str(checkpoint / FOLDER),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(options)
    except Exception as error:  # whatever DeepSpeed meets, the way out is the same
        remove(checkpoint)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{checkpoint}: written by {written_by} processes, and DeepSpeed cannot cut it anew for {processes} "
            f"({reason}); continue with {written_by}"
        ) from error


def remove(checkpoint: Path) -> None:
    """Remove what :func:`convert` wrote, or began to write."""
    (checkpoint / LATEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint / FOLDER, ignore_errors=True)


def put_right(optimizer: torch.optim.Optimizer, settings: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> None:
    """Undo what DeepSpeed 0.19 does to torch's optimizer when it loads a universal checkpoint under ZeRO-3.

    It gives all groups the settings of the first one (learning rate, weight decay, name), and all tensors one and the
    same step counter, which each of them then moves on.

    Args:
        optimizer: torch's, inside DeepSpeed's.
        settings: of the groups as they were made, in the same order.
        rates: the learning rates that the schedule has reached.
    """
    for group, setting, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(setting)
        group["lr"] = rate
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
