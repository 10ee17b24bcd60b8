"""Sources read from their front, without an index: endless sequences of records that can begin at any place.

The order is made of **lanes**. Position p of the run belongs to lane p modulo the number of lanes; a lane draws a
source for each of its positions, and each source deals its units (shards, row groups, pieces of files) out to the
lanes. A process reads whole lanes, so what a step is made of depends on seed and lanes, not on processes or workers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skipvision_train.data.formats import Place
from skipvision_train.data.mixture import manifest, source_manifest
from skipvision_train.data.order import mix
from skipvision_train.data.records import Record, move_image_first
from skipvision_train.data.sources import Source, fingerprint, verify
from skipvision_train.data.stores import record_of
from skipvision_train.data.tables import HUB
from skipvision_train.data.units import Read, Unit, open_units
from skipvision_train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_INDEX_BITS, _UNIT_BITS = 32, 20
_DRAWS = 1 << 16
_EMPTY_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Reference(int):
    """A record's number, which can read the record as well.

    Source, unit and index stand in the number: another process, told the number alone, can still name the record.
    """

    _read: Callable[[], Record]

    @classmethod
    def to(cls, source: int, unit: int, index: int, read: Callable[[], Record]) -> Reference:
        """The reference to record ``index`` of a unit of a source."""
        reference = cls((source << _UNIT_BITS | unit) << _INDEX_BITS | index)
        reference._read = read
        return reference

    def read(self) -> Record:
        """Read the record.

        Raises:
            DataError: naming the place and what is wrong.
        """
        return self._read()


@dataclass(frozen=True)
class Lane:
    """One of the sequences that an order is made of.

    Attributes:
        number: from 0.
        lanes: how many there are.
        seed: of the run.
        buffer: so many records that follow each other are shuffled together; 0 leaves everything as it is listed.
    """

    number: int
    lanes: int
    seed: int
    buffer: int


@dataclass(frozen=True, eq=False)
class SourceStream:
    """One source, unit by unit, over and over.

    Attributes:
        number: of the source in its recipe.
        source: what the recipe says.
        units: what it is read in.
    """

    number: int
    source: Source
    units: tuple[Unit, ...]

    def references(self, lane: Lane, skip: int = 0) -> Iterator[Reference]:
        """The source's records for one lane, without the first ``skip``.

        In every round units come in another order. Where there are at least as many as lanes, a lane takes every n-th
        of them; else it takes every n-th record of all. What is skipped is not read, and units whose number of records
        is known are not even opened.

        Raises:
            DataError: the source has no record for this lane.
        """
        known: dict[int, int] = {}
        round_ = empty = 0
        while True:
            found = 0
            for number in self._units_of(lane, round_):
                if (count := known.get(number, self._count(number, lane))) is not None and count <= skip:
                    skip, found = skip - count, found + count
                    continue
                begun = 0
                for block, places in enumerate(self._blocks(number, lane)):
                    begun += len(places)
                    if skip < len(places):
                        order = shuffled(len(places), lane, self.source.name, round_, number, block)
                        yield from (self._reference(number, *places[i]) for i in order[skip:])
                    skip = max(0, skip - len(places))
                known[number] = begun
                found += begun
            empty = 0 if found else empty + 1  # a small ``take`` may leave a lane nothing of a round
            if empty == _EMPTY_ROUNDS:
                raise DataError(
                    f"{self.source.path[0]}: source {self.source.name!r} gives lane {lane.number} no record"
                )
            round_ += 1

    def is_split_by_units(self, lanes: int) -> bool:
        """Whether every lane reads units that no other lane reads in the same round."""
        return len(self.units) >= lanes

    def where(self, unit: int, index: int) -> str:
        """The place of a record in words."""
        return self.units[unit].where(index)

    def _units_of(self, lane: Lane, round_: int) -> list[int]:
        order = shuffled(len(self.units), lane, self.source.name, round_)
        return order[lane.number :: lane.lanes] if self.is_split_by_units(lane.lanes) else order

    def _blocks(self, unit: int, lane: Lane) -> Iterator[list[tuple[int, Read]]]:
        """The entries of a unit that are the lane's, so many at a time as are shuffled together."""
        numbered = enumerate(self.units[unit].entries())
        if not self.is_split_by_units(lane.lanes):
            numbered = islice(numbered, lane.number, None, lane.lanes)  # type: ignore[assignment]
        chosen = (place for place in numbered if self._is_chosen(unit, place[0]))
        while block := list(islice(chosen, max(1, lane.buffer))):
            yield block

    def _count(self, unit: int, lane: Lane) -> int | None:
        """How many entries of a unit are the lane's, where that is known without reading."""
        records = self.units[unit].records
        if records is None:
            return None
        step = 1 if self.is_split_by_units(lane.lanes) else lane.lanes
        own = np.arange(0 if step == 1 else lane.number, records, step, dtype=np.uint64)
        return len(own) if self.source.take is None else int((self._hashes(unit, own) < self._bound).sum())

    def _is_chosen(self, unit: int, index: int) -> bool:
        return self.source.take is None or bool(self._hashes(unit, np.array([index], np.uint64))[0] < self._bound)

    @cached_property
    def _bound(self) -> np.uint64:
        return np.uint64(min(round((self.source.take or 1) * 2**64), 2**64 - 1))

    def _hashes(self, unit: int, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return scatter(f"{self.source.seed}:{self.source.name}:{unit}", indices)

    def _reference(self, unit: int, index: int, read: Read) -> Reference:
        return Reference.to(self.number, unit, index, partial(self._record, unit, index, read))

    def _record(self, unit: int, index: int, read: Read) -> Record:
        source = self.source
        root = None if source.image_root is None or source.follow_links else source.image_root.resolve()
        place = Place(source.name, index, source.image_root, root)
        record = record_of(read, partial(self.where, unit, index), source.format, place, source.task)
        return move_image_first(record) if source.image_first else record


class Streams:
    """The sources of a recipe as streams. ``streams[reference]`` reads a record.

    Args:
        name: the recipe's.
        parts: its sources.
    """

    def __init__(self, name: str, parts: Sequence[SourceStream]) -> None:
        self.name = name
        self.parts = tuple(parts)

    @classmethod
    def open(cls, name: str, sources: Sequence[Source]) -> Streams:
        """Look at the sources' files.

        Raises:
            ConfigError: a source asks for what needs an index.
            DataError: what cannot be read, or another checksum.
        """
        parts = []
        for number, source in enumerate(sources):
            _refuse_index(source)
            verify(source)
            part = SourceStream(number, source, open_units(source.path, source.split))
            if not part.units:
                raise DataError(f"{source.path[0]}: holds no records")
            if len(part.units) >= 1 << _UNIT_BITS:
                raise DataError(f"{source.path[0]}: {len(part.units)} units; at most {(1 << _UNIT_BITS) - 1} are read")
            parts.append(part)
        return cls(name, parts)

    def __getitem__(self, number: int) -> Record:
        """Read a record.

        Raises:
            DataError: naming the place and what is wrong.
            TypeError: a number alone does not tell how to read a stream's record.
        """
        if not isinstance(number, Reference):
            raise TypeError(f"{number!r} is no reference; a stream has no index")
        return number.read()

    @property
    def sources(self) -> tuple[Source, ...]:
        """What the recipe says of each source."""
        return tuple(part.source for part in self.parts)

    @property
    def shares(self) -> list[float]:
        """(sources,) the share of each source in the samples: its ``weight`` over the sum of all."""
        total = sum(source.weight for source in self.sources)
        return [source.weight / total for source in self.sources]

    def source_of(self, number: int) -> Source:
        """The source that a record comes from."""
        return self.parts[number >> (_INDEX_BITS + _UNIT_BITS)].source

    def where(self, number: int) -> str:
        """The place of a record in words."""
        unit, index = (number >> _INDEX_BITS) % (1 << _UNIT_BITS), number % (1 << _INDEX_BITS)
        return self.parts[number >> (_INDEX_BITS + _UNIT_BITS)].where(unit, index)

    def references(self, lane: Lane, skip: int = 0) -> Iterator[Reference]:
        """The records of one lane, endlessly, without the first ``skip``; nothing is decoded.

        Raises:
            DataError: a source has no record for this lane.
        """
        taken = np.zeros(len(self.parts), np.int64)
        for start in range(0, skip, _DRAWS):
            drawn = self._draws(lane, start)[: skip - start]
            taken += np.bincount(drawn, minlength=len(self.parts))
        parts = [part.references(lane, int(count)) for part, count in zip(self.parts, taken, strict=True)]
        while True:
            start = skip - skip % _DRAWS
            for number in self._draws(lane, start)[skip - start :].tolist():
                yield next(parts[number])
            skip = start + _DRAWS

    def first(self) -> Reference:
        """The first record as the recipe lists them, for a look at the data."""
        return next(self.parts[0].references(Lane(0, 1, 0, 0)))

    def lines(self, lanes: int) -> Iterator[str]:
        """What is read, for a log."""
        for part, share in zip(self.parts, self.shares, strict=True):
            how = f"{len(part.units)} units dealt out to {lanes} lanes"
            if not part.is_split_by_units(lanes):
                how = (
                    f"{len(part.units)} units are fewer than {lanes} lanes: every lane goes through all of them and "
                    "takes its share of their records"
                )
            yield f"{part.source.name}: {share:.1%} of the samples; {how}"

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that stand for the files and for what is taken of them."""
        return hashlib.sha256(" ".join(part["hash"] for part in map(_manifest, self.parts)).encode()).hexdigest()[:16]

    def manifest(self) -> dict[str, Any]:
        """What this data is, as plain data for ``data.json``; as of a mixture, without what only an index knows."""
        parts = [_manifest(part) | {"share": share} for part, share in zip(self.parts, self.shares, strict=True)]
        return manifest(self.name, None, self.hash, parts, streaming=True)

    def _draws(self, lane: Lane, start: int) -> NDArray[np.intp]:
        """(_DRAWS,): the sources of the lane's positions from ``start`` on."""
        if len(self.parts) == 1:
            return np.zeros(_DRAWS, np.intp)
        values = scatter(f"{lane.seed}/{lane.number}/{lane.lanes}", np.arange(start, start + _DRAWS, dtype=np.uint64))
        bounds = [min(round(sum(self.shares[: i + 1]) * 2**64), 2**64 - 1) for i in range(len(self.parts) - 1)]
        return np.searchsorted(np.array(bounds, np.uint64), values, side="right")


def scatter(key: str, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pseudorandom 64-bit integers, one for each number and the key; arithmetic that no library's version changes."""
    seed = np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    return mix((numbers + np.uint64(1)) * _GOLDEN + seed)


def shuffled(count: int, lane: Lane, *key: object) -> list[int]:
    """The numbers below ``count`` in an order that the run's seed and the key decide; as they are without a buffer."""
    if not lane.buffer:
        return list(range(count))
    digest = hashlib.sha256("/".join(map(str, (lane.seed, *key))).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _refuse_index(source: Source) -> None:
    wanted = {"first": source.first, "repeat": source.repeat if source.repeat != 1 else None}
    wanted["take"] = source.take if isinstance(source.take, int) else None
    for key, value in wanted.items():
        if value is not None:
            raise ConfigError(
                f"data.streaming: source {source.name!r} has {key}: {value}, which needs an index of the records; use "
                "a fraction as take and a weight, or data.streaming=false"
            )


def _manifest(part: SourceStream) -> dict[str, Any]:
    source = part.source
    files = [Path(path) for path in source.path if not path.startswith(HUB) and Path(path).is_file()]
    content = fingerprint(files)
    said = replace(source, path=(), image_root=None, checksum=(), public="", note="")
    key = f"{said!r}\0{content}\0{[path for path in source.path if path.startswith(HUB)]}\0{len(part.units)}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return source_manifest(source, files, {"units": len(part.units)}, digest)
