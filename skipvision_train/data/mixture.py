"""A recipe's sources opened: one sequence of records, chosen and repeated as the recipe says."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from skipvision_train import __version__
from skipvision_train.data.records import Record, move_image_first
from skipvision_train.data.sources import Selection, Source, fingerprint, select, verify
from skipvision_train.data.stores import RecordStore, open_entries
from skipvision_train.errors import DataError

logger = logging.getLogger(__name__)

PACKAGES = ("numpy", "pyarrow", "datasets", "pillow")
"""Whose versions a manifest names."""


@dataclass(frozen=True, eq=False)
class Part:
    """One source of a mixture.

    Attributes:
        source: what the recipe says.
        store: its records.
        selection: which of them are taken.
        hash: 16 hexadecimal digits that stand for the files and the records taken.
    """

    source: Source
    store: RecordStore
    selection: Selection
    hash: str

    @classmethod
    def open(cls, source: Source) -> Part:
        """Open a source's files, and choose.

        Raises:
            DataError: what cannot be read, another checksum, or too few records.
        """
        verify(source)
        entries = open_entries(source.path, source.split)
        store = RecordStore(entries, source.format, source.name, source.image_root, source.follow_links, source.task)
        selection = select(source, len(store))
        content = fingerprint(store.files())
        key = f"{source.name}\0{source.format}\0{source.image_first}\0{content}\0{selection.digest()}"
        return cls(source, store, selection, hashlib.sha256(key.encode()).hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.selection)

    def record(self, position: int) -> Record:
        """The record at a position.

        Raises:
            DataError: naming the file, the record and what is wrong.
        """
        record = self.store[self.selection[position]]
        if self.source.metric is not None:
            record = replace(record, extras={"metric": self.source.metric, **record.extras})
        return move_image_first(record) if self.source.image_first else record

    def manifest(self) -> dict[str, Any]:
        """What was opened and taken, as plain data."""
        counts = {"records": len(self.store), "chosen": self.selection.distinct, "occurrences": len(self)}
        return source_manifest(self.source, self.store.files(), counts, self.hash)


def source_manifest(source: Source, files: Sequence[Path], counts: Mapping[str, int], digest: str) -> dict[str, Any]:
    """A source in a manifest, as plain data.

    Args:
        source: what the recipe says.
        files: that it was found in.
        counts: what was counted in them.
        digest: the source's ``hash``.
    """
    said = {field.name: getattr(source, field.name) for field in fields(source) if field.name != "note"}
    root = None if source.image_root is None else str(source.image_root)
    return {
        **said,
        "path": list(source.path),
        "image_root": root,
        "checksum": list(source.checksum),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "fingerprint": fingerprint(files),
        **counts,
        "hash": digest,
    }


def manifest(
    recipe: str, records: int | None, digest: str, sources: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """What a recipe's data is, as plain data for ``data.json``: with ``more``, and the versions of packages."""
    versions = {"skipvision-train": __version__} | {package: version(package) for package in PACKAGES}
    return {
        "recipe": recipe,
        "records": records,
        **more,
        "hash": digest,
        "sources": list(sources),
        "versions": versions,
    }


class Mixture(Sequence[Record]):
    """The records of all sources in order; the same on every rank, whoever opens it.

    A record is read when it is asked for, and one that cannot be used raises ``DataError`` then.

    Args:
        name: the recipe's.
        parts: its sources, opened.
    """

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self.name = name
        self.parts = tuple(parts)
        self._bounds = [0, *accumulate(len(part) for part in self.parts)]

    @property
    def sources(self) -> tuple[Source, ...]:
        """What the recipe says of each source."""
        return tuple(part.source for part in self.parts)

    def __len__(self) -> int:
        return self._bounds[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Read a record, or the records of a slice.

        Raises:
            DataError: naming the file, the record and what is wrong.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, position = self.locate(index)
        return self.parts[part].record(position)

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the part that holds a record, and its position there."""
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = bisect_right(self._bounds, place) - 1
        return part, place - self._bounds[part]

    def source_of(self, index: int) -> Source:
        """The source that a record comes from; nothing is read."""
        return self.parts[self.locate(index)[0]].source

    def size(self, index: int) -> int:
        """Bytes of a record's text, estimated; see :attr:`sizes`."""
        return int(self.sizes[index])

    def images(self, index: int) -> int:
        """Images of a record, estimated; see :attr:`image_counts`."""
        return int(self.image_counts[index])

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """(len,) int32: bytes of every record's text, estimated without parsing (``RecordStore.sizes``)."""
        return np.concatenate([part.selection.spread(part.store.sizes) for part in self.parts])

    @cached_property
    def image_counts(self) -> NDArray[np.int32]:
        """(len,) int32: images of every record, estimated without parsing (``RecordStore.image_counts``)."""
        return np.concatenate([part.selection.spread(part.store.image_counts) for part in self.parts])

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """Records of every stretch that is read cheaply together (a tar, a row group, a block of a file), in order."""
        parts = zip(self.parts, self._bounds, strict=False)
        starts = [part.selection.starts(part.store.starts()) + first for part, first in parts]
        return tuple(np.diff(np.concatenate([*starts, [len(self)]])).tolist())

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that stand for the records of all parts in their order; see :meth:`manifest`."""
        return hashlib.sha256(" ".join(part.hash for part in self.parts).encode()).hexdigest()[:16]

    def read_all(self) -> list[Record]:
        """Every record, for what needs them all at once, such as an evaluation.

        Of each source ``max_malformed`` records that cannot be read are left out with a warning, none if it is null.

        Raises:
            DataError: one more.
        """
        records = []
        for part in self.parts:
            allowed, malformed = part.source.max_malformed or 0, 0
            for position in range(len(part)):
                try:
                    records.append(part.record(position))
                except DataError as error:
                    malformed += 1
                    if malformed > allowed:
                        suffix = f" ({malformed} malformed records, {allowed} allowed)" if allowed else ""
                        raise DataError(f"{error}{suffix}") from error
                    logger.warning("left out: %s", error)
        return records

    def manifest(self) -> dict[str, Any]:
        """What this data is, as plain data for ``data.json``: sources with counts and hashes, and versions.

        A part's ``hash`` stands for name, format, ``image_first``, ``fingerprint`` and the indices taken, in order; the
        mixture's for its parts. Two runs with the same hash see the same records, unless a file changed in its middle
        and kept its size: ``checksum`` in the recipe excludes that.
        """
        return manifest(self.name, len(self), self.hash, [part.manifest() for part in self.parts])
