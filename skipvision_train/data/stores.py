"""Record stores: a container opened by an index, a format that reads its entries, and sizes without parsing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skipvision_train.data.formats import FORMATS, Place, read_record
from skipvision_train.data.json_files import JsonEntries
from skipvision_train.data.records import Record, text_bytes
from skipvision_train.data.shards import TarEntries
from skipvision_train.data.strict_json import shown
from skipvision_train.data.tables import HUB, DatasetEntries, ParquetEntries
from skipvision_train.errors import ConfigError, DataError

FIT = 256
"""Records that are parsed to learn how much of an entry is text."""


class Entries(Protocol):
    """What a container offers: entries by index, and estimates for all of them at once."""

    def __len__(self) -> int: ...
    def entry(self, index: int) -> Any: ...
    def where(self, index: int) -> str: ...
    def sizes(self) -> NDArray[np.int64]: ...
    def image_counts(self) -> NDArray[np.int64]: ...
    def starts(self) -> NDArray[np.int64]: ...
    def files(self) -> list[Path]: ...


class RecordStore:
    """The records of one source, by index. Opening one takes an index of its files, not the data.

    Args:
        entries: the container.
        form: name of a format.
        source: written into every record.
        image_root: directory that image paths are relative to; None where images come with the entries.
        follow_links: allow links below ``image_root`` to lead out of it.
        task: of records that have none.
    """

    def __init__(
        self,
        entries: Entries,
        form: str,
        source: str,
        image_root: Path | None = None,
        follow_links: bool = False,
        task: str | None = None,
    ) -> None:
        self.entries = entries
        self.form = form
        self.source = source
        self.image_root = image_root
        self.task = task
        self._real_root = None if image_root is None or follow_links else image_root.resolve()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Record:
        """Read a record.

        Raises:
            DataError: naming file, index and id, and what is wrong.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        place = Place(self.source, index, self.image_root, self._real_root)
        return record_of(
            lambda: self.entries.entry(index), lambda: self.entries.where(index), self.form, place, self.task
        )

    def size(self, index: int) -> int:
        """Bytes of a record's text, estimated; see :attr:`sizes`."""
        return int(self.sizes[index])

    def images(self, index: int) -> int:
        """How many images a record has, estimated; see :attr:`image_counts`."""
        return int(self.image_counts[index])

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """(N,) int32: bytes of every record's text, estimated.

        A container knows the bytes of an entry with its punctuation. ``FIT`` records, evenly spread, tell how much of
        that is text: a line (least squares) through their text over their entry. The same on every machine.
        """
        raw = self.entries.sizes()
        known = [(int(raw[i]), text) for i in self._sample() if (text := self._text(i)) is not None] or [(0, 0)]
        count, x, y = len(known), sum(size for size, _ in known), sum(text for _, text in known)
        xx, xy = sum(size * size for size, _ in known), sum(size * text for size, text in known)
        # In integers, 1024 to the unit: ranks on different machines must not differ by the last bit of a float.
        spread = count * xx - x * x
        slope = min(max((count * xy - x * y) * 1024 // spread, 0), 1024) if spread else 1024
        offset = (1024 * y - slope * x) // count
        return np.clip((slope * raw + offset) >> 10, 0, raw).astype(np.int32)

    @cached_property
    def image_counts(self) -> NDArray[np.int32]:
        """(N,) int32: images of every record, estimated by the container."""
        return self.entries.image_counts().astype(np.int32)

    def starts(self) -> NDArray[np.int64]:
        """First records of the stretches that are read cheaply together: shards, row groups, blocks of a file."""
        return self.entries.starts()

    def files(self) -> list[Path]:
        """The files behind the store."""
        return self.entries.files()

    def _sample(self) -> list[int]:
        count = min(FIT, len(self))
        return [i * len(self) // count for i in range(count)]

    def _text(self, index: int) -> int | None:
        try:
            return text_bytes(self[index])
        except DataError:  # counted where it is asked for in earnest
            return None


def record_of(
    read: Callable[[], Any], where: Callable[[], str], form: str, place: Place, task: str | None = None
) -> Record:
    """Read an entry and make a record of it.

    Args:
        read: gives the entry.
        where: its place in words.
        form: name of a format.
        place: what the format has to know.
        task: of a record that has none.

    Raises:
        DataError: naming place and id, and what is wrong.
    """
    name = ""
    try:
        entry = read()
        if isinstance(entry, dict) and isinstance(entry.get("id"), str | int):
            name = f" (id {shown(entry['id'])})"
        record = read_record(entry, FORMATS[form], place)
    except DataError as error:
        raise DataError(f"{where()}{name}: {error}") from error
    return record if record.task is not None else replace(record, task=task)


class JoinedEntries:
    """Several containers one after the other, as a data set in several files is."""

    def __init__(self, parts: Sequence[Entries]) -> None:
        self.parts = parts
        self._bounds = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def entry(self, index: int) -> Any:
        """The entry of the part that has it."""
        part, own = self._part(index)
        return part.entry(own)

    def where(self, index: int) -> str:
        """The place in the part that has it."""
        part, own = self._part(index)
        return part.where(own)

    def sizes(self) -> NDArray[np.int64]:
        """Of all parts."""
        return np.concatenate([part.sizes() for part in self.parts])

    def image_counts(self) -> NDArray[np.int64]:
        """Of all parts."""
        return np.concatenate([part.image_counts() for part in self.parts])

    def starts(self) -> NDArray[np.int64]:
        """Of all parts."""
        return np.concatenate([part.starts() + first for part, first in zip(self.parts, self._bounds, strict=False)])

    def files(self) -> list[Path]:
        """Of all parts."""
        return [file for part in self.parts for file in part.files()]

    def _part(self, index: int) -> tuple[Entries, int]:
        number = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return self.parts[number], index - int(self._bounds[number])


def open_entries(locations: Sequence[str], split: str | None = None) -> Entries:
    """Open files of one kind, a ``datasets`` folder, or a data set of the hub.

    Args:
        locations: paths that end in .json, .jsonl, .ndjson, .parquet or .tar; or one folder or ``hub:`` name.
        split: of a ``datasets`` folder or a hub name.

    Raises:
        ConfigError: names that tell no container, or of several.
        DataError: what cannot be read.
    """
    kinds = {container_of(location) for location in locations}
    if len(kinds) > 1:
        raise ConfigError(f"{locations[0]}: files of several kinds ({', '.join(sorted(kinds))}); use a source for each")
    paths = [Path(location) for location in locations]
    match kinds.pop():
        case "tar":
            return TarEntries(paths)
        case "datasets":
            parts: list[Entries] = [DatasetEntries(location, split) for location in locations]
        case "parquet":
            parts = [ParquetEntries(path) for path in paths]
        case _:
            parts = [JsonEntries(path) for path in paths]
    return parts[0] if len(parts) == 1 else JoinedEntries(parts)


def container_of(location: str) -> str:
    """``json``, ``jsonl``, ``parquet``, ``tar`` or ``datasets``, by the name; one without extension is a folder.

    Raises:
        ConfigError: another extension.
    """
    suffix = Path(location).suffix.lower().removeprefix(".")
    if location.startswith(HUB):
        return "datasets"
    if suffix in ("gz", "tgz", "zst", "bz2", "xz", "zip"):
        raise ConfigError(f"{location}: compressed files cannot be read by index; unpack it")
    suffix = {"ndjson": "jsonl", "": "datasets"}.get(suffix, suffix)
    if suffix in ("json", "jsonl", "parquet", "tar", "datasets"):
        return suffix
    if Path(location).is_dir():
        return "datasets"
    raise ConfigError(
        f"{location}: no container is known by that extension; use .json, .jsonl, .parquet, .tar, a folder that "
        "'save_to_disk' wrote, or hub:<owner>/<name>"
    )
