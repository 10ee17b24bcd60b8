"""What a stream is read in: pieces of a source that are read from their front, without an index of the whole."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq

from skipvision_train.data.json_files import JsonEntries
from skipvision_train.data.records import MAX_TEXT_BYTES
from skipvision_train.data.shards import SIZES, TarEntries, listed_sizes
from skipvision_train.data.stores import Entries, container_of
from skipvision_train.data.strict_json import parse_json
from skipvision_train.data.tables import ARROW_ERRORS, HUB, DatasetEntries, ParquetEntries, from_hub, row_of
from skipvision_train.errors import ConfigError, DataError

PIECE = 64 << 20
"""Bytes of a file of JSON lines that are one unit: ranks share a single large file without reading all of it."""

HUB_ROWS = 64
"""Rows of a data set of the hub that are fetched at once."""

_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"

Read = Callable[[], Any]
"""Gives an entry, or raises a DataError without the place."""


class Unit(Protocol):
    """A piece of a source."""

    @property
    def records(self) -> int | None:
        """How many entries it has, where that is known without reading it."""

    def entries(self) -> Iterator[Read]:
        """Its entries in order, exactly ``records`` where that is known. What is not asked for costs little."""

    def where(self, index: int) -> str:
        """The place of an entry in words."""


@dataclass(frozen=True, eq=False)
class IndexedUnit:
    """Entries next to each other in a container with an index: a shard, a row group, rows of a table.

    Attributes:
        path: for messages.
        open: the container; called when the unit is begun.
        first: the unit's first entry.
        records: None is all that the container has.
    """

    path: str
    open: Callable[[], Entries]
    first: int = 0
    records: int | None = None

    def entries(self) -> Iterator[Read]:
        """See :class:`Unit`. A container that cannot be opened is as many entries that cannot be read, at least one."""
        try:
            container = self.open()
        except DataError as error:
            yield from (partial(_refuse, error) for _ in range(1 if self.records is None else self.records))
            return
        count = len(container) if self.records is None else self.records
        yield from (partial(container.entry, self.first + index) for index in range(count))

    def where(self, index: int) -> str:
        """See :class:`Unit`."""
        return f"{self.path}: record {self.first + index}"


@dataclass(frozen=True)
class LinesUnit:
    """The lines of a file that begin in a range of its bytes; blank ones are left out.

    Attributes:
        path: of the file.
        begin: first byte of the range.
        end: the byte behind it.
        records: lines of the range, where they are known.
    """

    path: Path
    begin: int
    end: int
    records: int | None = None

    def entries(self) -> Iterator[Read]:
        """See :class:`Unit`.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                place = self.begin and self.begin - 1 + _line_length(file, self.begin - 1)[0]
                while place < self.end:
                    length, is_blank = _line_length(file, place)
                    if not length:
                        return
                    if not is_blank:
                        yield partial(self._entry, place, length)
                    place += length
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error

    def where(self, index: int) -> str:
        """See :class:`Unit`."""
        piece = f" of the lines that begin behind byte {self.begin}" if self.begin else ""
        return f"{self.path}: record {index}{piece}"

    def _entry(self, place: int, length: int) -> Any:
        if length > MAX_TEXT_BYTES:
            raise DataError(f"{length} bytes of JSON; at most {MAX_TEXT_BYTES}")
        try:
            with self.path.open("rb", buffering=0) as file:
                raw = os.pread(file.fileno(), length, place)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from error
        if len(raw) != length:
            raise DataError(f"{len(raw)} of {length} bytes are there; the file was cut")
        return parse_json((raw.removeprefix(_BOM) if not place else raw).strip(_SPACE))


@dataclass(frozen=True)
class HubUnit:
    """One file of a data set of the hub, fetched while it is read; ``datasets`` retries what fails on the way.

    Attributes:
        location: ``hub:<owner>/<name>[:<config>][@<revision>]``.
        split: None is ``train``.
        number: of the file.
        files: of the data set.
    """

    location: str
    split: str | None
    number: int
    files: int

    @property
    def records(self) -> int | None:
        """Nobody says, file by file."""
        return None

    def entries(self) -> Iterator[Read]:
        """See :class:`Unit`.

        Raises:
            DataError: the file cannot be fetched. No policy applies to that: another try may find it.
        """
        data = from_hub(self.location, self.split, streaming=True).shard(self.files, self.number)
        try:
            for table in data.with_format("arrow").iter(batch_size=HUB_ROWS):
                yield from (partial(row_of, table.slice(row, 1), 0) for row in range(table.num_rows))
        except ARROW_ERRORS as error:
            raise DataError(f"{self.location}: file {self.number} of {self.files} cannot be read: {error}") from error

    def where(self, index: int) -> str:
        """See :class:`Unit`."""
        return f"{self.location}: record {index} of file {self.number}"


def open_units(locations: Sequence[str], split: str | None = None) -> tuple[Unit, ...]:
    """The units of a source, in order. Of data files only sizes and footers are read, of a JSON list everything once.

    Args:
        locations: as for ``open_entries``.
        split: likewise.

    Raises:
        ConfigError: names that tell no container, or of several.
        DataError: what cannot be read.
    """
    kinds = {container_of(location) for location in locations}
    if len(kinds) > 1:
        raise ConfigError(f"{locations[0]}: files of several kinds ({', '.join(sorted(kinds))}); use a source for each")
    make = {"tar": _shard, "parquet": _row_groups, "jsonl": _pieces, "json": _list}.get(kinds.pop())
    units: list[Unit] = []
    for location in locations:
        if make is not None:
            units += make(Path(location))
        elif location.startswith(HUB):
            count = int(from_hub(location, split, streaming=True).num_shards)
            units += [HubUnit(location, split, number, count) for number in range(count)]
        else:
            units += _stretches(location, DatasetEntries(location, split))
    return tuple(units)


def _shard(path: Path) -> list[Unit]:
    listed = listed_sizes(path.parent)
    if listed and path not in listed:
        raise DataError(f"{path}: {path.parent / SIZES} does not list this shard")
    count = listed.get(path)
    return [] if count == 0 else [IndexedUnit(str(path), partial(TarEntries, [path]), records=count)]


def _row_groups(path: Path) -> list[Unit]:
    try:
        metadata = pq.read_metadata(path)
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    except ARROW_ERRORS as error:
        raise DataError(f"{path}: no parquet file that can be read: {error}") from error
    firsts = np.cumsum([0, *rows])
    return [
        IndexedUnit(str(path), partial(ParquetEntries, path), int(first), count)
        for first, count in zip(firsts, rows, strict=False)
        if count
    ]


def _pieces(path: Path) -> list[Unit]:
    size = path.stat().st_size
    return [LinesUnit(path, begin, min(begin + PIECE, size)) for begin in range(0, size, PIECE)]


def _list(path: Path) -> list[Unit]:
    return _stretches(str(path), JsonEntries(path))


def _stretches(location: str, entries: Entries) -> list[Unit]:
    bounds = [*entries.starts().tolist(), len(entries)]
    opened = partial(_same, entries)
    return [IndexedUnit(location, opened, first, stop - first) for first, stop in itertools.pairwise(bounds)]


def _same(entries: Entries) -> Entries:
    return entries


def _refuse(error: DataError) -> Any:
    raise DataError(str(error))


def _line_length(file: Any, place: int) -> tuple[int, bool]:
    """Bytes from a place to the end of its line, the newline included; and whether there is nothing but space."""
    file.seek(place)
    length, is_blank = 0, True
    while part := file.readline(1 << 20):
        length += len(part)
        is_blank = is_blank and not (part.removeprefix(_BOM) if not place else part).strip(_SPACE)
        if part.endswith(b"\n"):
            break
    return length, is_blank
