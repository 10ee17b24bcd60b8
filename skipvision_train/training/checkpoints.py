"""Checkpoints that are whole or not there, the finished model, and the record of what a run was configured to do.

A run's folder::

    config.yaml      what the run was configured to do
    metrics.jsonl    one line per logged step
    checkpoint-N/    state after step N; complete if COMPLETE.json is there and every listed file has its listed size;
                     before a run continues from it, every file's content is compared with its listed checksum
    model/           the finished model; written under another name, checked, renamed
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.folders import differences, flatten

log = logging.getLogger(__name__)

MARKER = "COMPLETE.json"
DAMAGED = "DAMAGED.json"
"""What the marker is called once a file was found to have changed."""
FINISHED = "model"
PARTIAL = "model.partial"
CONFIG = "config.yaml"
_NAME = re.compile(r"checkpoint-(\d+)")

HARMLESS = (
    "dry_run",
    "data.error_budget",
    "model.from_scratch",
    "trainer.keep_checkpoints",
    "trainer.last_layer",
    "trainer.loss",
    "trainer.guards.memory",
    "trainer.guards.nonfinite_budget",
    "trainer.guards.spike_threshold",
    "trainer.guards.stuck_after",
    "trainer.log_every",
    "trainer.output_dir",
    "trainer.per_device_batch",
    "trainer.peak_tflops",
    "trainer.progress_bar",
    "trainer.resume",
    "trainer.save_every",
    "trainer.tensorboard",
    "trainer.wandb",
    "trainer.wandb_project",
    "trainer.watch.sample_count",
    "trainer.watch.sample_every",
    "trainer.watch.sample_recipe",
    "trainer.watch.sample_tokens",
    "trainer.workers",
)
"""Fields that may change between two starts of one run: they do not change what is learnt."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint was written by.

    Attributes:
        step: optimizer steps done.
        processes: training processes; DeepSpeed's shards fit this number only and are cut anew for another.
        engine: ``none``, or the ZeRO stage as ``zero2``.
    """

    step: int
    processes: int
    engine: str

    def check_fits(self, other: CheckpointInfo, path: Path) -> None:
        """Refuse to continue with another engine. Another number of processes fits; see :meth:`needs_conversion`.

        Raises:
            CheckpointError: naming both.
        """
        if self.engine != other.engine:
            raise CheckpointError(
                f"{path}: written with deepspeed {self.engine}, this run has {other.engine}; continue with the same"
            )

    def needs_conversion(self, processes: int) -> bool:
        """True if the optimizer's shards must be cut anew for this number of processes."""
        return self.engine != "none" and self.processes != processes


def written_files(directory: Path) -> list[str]:
    """What a checkpoint consists of: names relative to it, the largest first, without a marker."""
    files = {str(p.relative_to(directory)): p.stat().st_size for p in directory.rglob("*") if p.is_file()}
    return sorted((name for name in files if name not in (MARKER, f"{MARKER}.tmp")), key=lambda n: (-files[n], n))


def checksum(file: Path, durable: bool = False) -> int:
    """CRC-32 of a file's content; with ``durable`` it is on the disk afterwards.

    Raises:
        OSError: it cannot be read, or not be written to the disk.
    """
    content = 0
    with file.open("r+b" if durable else "rb") as stream:
        if durable:
            os.fsync(stream.fileno())
        while block := stream.read(1 << 22):
            content = zlib.crc32(block, content)
    return content


def checksums(directory: Path, names: Sequence[str], durable: bool = False) -> dict[str, int]:
    """:func:`checksum` of some of a checkpoint's files."""
    return {name: checksum(directory / name, durable) for name in names}


def shared_checksums(
    directory: Path, rank: int, processes: int, gather: Callable[[list[Any]], list[Any]]
) -> dict[str, int]:
    """Durable checksums of all files of a checkpoint that all processes have written. All of them call it.

    Each takes every n-th name of all that any process sees: on a network's file system the listing of one node may
    lack, for some seconds, what another has written.

    Args:
        directory: the checkpoint.
        rank: this process's.
        processes: how many there are.
        gather: list of this process -> all processes' lists, joined in the order of the ranks.
    """
    names = list(dict.fromkeys(gather(written_files(directory))))
    return dict(gather(list(checksums(directory, names[rank::processes], durable=True).items())))


def mark_complete(directory: Path, info: CheckpointInfo, sums: Mapping[str, int] | None = None) -> None:
    """Write the marker, last: it lists every file with its size and checksum. All is on the disk before it is.

    Args:
        directory: the checkpoint.
        info: its facts.
        sums: durable checksums of all files; None computes them here.
    """
    if sums is None:
        sums = checksums(directory, written_files(directory), durable=True)
    sizes = {name: (directory / name).stat().st_size for name in sorted(sums)}
    for folder in {directory, directory.parent, *((directory / name).parent for name in sizes)}:
        sync(folder)
    temporary = directory / f"{MARKER}.tmp"
    content = {**asdict(info), "files": sizes, "crc32": {name: sums[name] for name in sizes}}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    sync(temporary)
    temporary.replace(directory / MARKER)
    sync(directory)


def sync(path: Path) -> None:
    """Have a file's content, or a directory's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_marker(directory: Path) -> CheckpointInfo | None:
    """The checkpoint's facts, or None if it is not complete: no marker, or a file missing or of another size."""
    try:
        content = json.loads((directory / MARKER).read_text())
        files: dict[str, int] = content.pop("files")
        content.pop("crc32", None)
        info = CheckpointInfo(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    for name, size in files.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            log.warning("%s: %s is missing or not %d bytes long; the checkpoint is ignored", directory, name, size)
            return None
    return info


def changed_files(directory: Path, share: int = 0, shares: int = 1) -> list[str]:
    """Files of a complete checkpoint that cannot be read or whose content is not what was written.

    Args:
        directory: the checkpoint. One without checksums, of an earlier version, is taken as it is.
        share: of the work, which processes divide among them.
        shares: how many there are.
    """
    recorded: dict[str, int] = json.loads((directory / MARKER).read_text()).get("crc32", {})
    changed = []
    for name in list(recorded)[share::shares]:
        try:
            same = checksum(directory / name) == recorded[name]
        except OSError:
            same = False
        if not same:
            changed.append(name)
    return changed


def set_aside(directory: Path, changed: Sequence[str]) -> None:
    """Make a checkpoint with changed files one that no run continues from; the next save removes it."""
    (directory / MARKER).replace(directory / DAMAGED)
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    log.warning(
        "%s: the content of %s%s is not what was written; the checkpoint is ignored", directory, changed[0], more
    )


def all_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Every ``checkpoint-N`` of a run, complete or not, oldest first."""
    found = [(int(m.group(1)), p) for p in run.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return sorted(found)


def newest_complete(run: Path) -> tuple[Path, CheckpointInfo] | None:
    """The checkpoint to continue from, or None. Incomplete ones are named in the log and passed over."""
    for _, path in reversed(all_checkpoints(run)):
        info = read_marker(path)
        if info is not None:
            return path, info
        log.warning("%s is not complete (the run was stopped while writing it); it is ignored", path)
    return None


def remove_old(run: Path, keep: int, current: int) -> None:
    """Keep the newest ``keep`` complete checkpoints (0: all) and remove older ones, and incomplete ones before
    ``current``."""
    complete = []
    for step, path in all_checkpoints(run):
        if step == current or read_marker(path) is not None:
            complete.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in complete[:-keep]:  # of 0: none
        # The marker goes first: what is left of an interrupted removal is not complete.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn a failed write (full disk, quota, no permission) into a :class:`CheckpointError` and remove the remains.

    torch reports a failed write as a ``RuntimeError`` of its file writer, safetensors as an error of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise CheckpointError(f"{directory}: cannot be written: {error}; {_space(directory)}") from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        shutil.rmtree(directory, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{directory}: cannot be written: {reason}; {_space(directory)}") from error


def _space(directory: Path) -> str:
    return f"{shutil.disk_usage(directory.parent).free / 1e9:.1f} GB are free there; earlier checkpoints are untouched"


def publish_model(partial: Path, final: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check a written model directory tensor by tensor and give it its final name, once all of it is on the disk.

    Args:
        partial: where it was written.
        final: its name from now on; must not exist.
        expected: name and shape of every tensor that may not be missing.

    Raises:
        CheckpointError: a file cannot be read back, or a tensor is missing or of another shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(partial.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read back: {error}") from error
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise CheckpointError(f"{partial}: {name} has shape {shapes.get(name)}, the model has {shape}")
    for path in (*partial.rglob("*"), partial):
        sync(path)
    partial.replace(final)
    sync(final.parent)


def is_finished(run: Path) -> bool:
    """True if the run's model is there; a directory of that name is whole."""
    return (run / FINISHED / "config.json").is_file()


def check_same_run(recorded: Mapping[str, Any], now: Mapping[str, Any], run: Path) -> None:
    """Refuse to continue a run that was configured to learn something else.

    Raises:
        ConfigError: naming the fields that differ, with both values.
    """
    if differing := differences(flatten(recorded), flatten(now), HARMLESS):
        raise ConfigError(
            f"trainer.output_dir: {run} holds a run of another configuration: {differing}; use another folder or the "
            "same configuration"
        )
