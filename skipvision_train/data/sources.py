"""The sources of a recipe: where their files are, and which of their records are taken how often."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipvision_train.data.tables import HUB
from skipvision_train.errors import ConfigError, DataError

MAX_FILES = 100_000
"""A pattern that stands for more is refused."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_EDGE = 64 << 10
_FEW = 64


@dataclass(frozen=True)
class Source:
    """One data set of a recipe.

    Attributes:
        name: unique within the recipe; sampling is seeded by it.
        path: data files with patterns resolved, a folder that ``save_to_disk`` wrote, or ``hub:<owner>/<name>``.
        format: how an entry becomes a record (``FORMATS``).
        image_root: the directory that image paths are relative to; None where images come with the entries.
        split: of a ``datasets`` folder or a data set of the hub.
        take: None for all; an integer for that many records drawn at random; a fraction above 0 and at most 1 for that
            share.
        first: the first so many records instead.
        repeat: how often the chosen records occur.
        weight: times as often; with a fraction a random part of the records occurs once more than the others.
        seed: of the choices.
        max_malformed: so many records of this source may be unusable, and one more is an error; None leaves that to the
            run (``data.on_error``).
        checksum: SHA-256 of every file in hexadecimal digits, in their order; empty does not check.
        image_first: move the image of a turn to its front, as LLaVA-1.5 does to its data.
        follow_links: links below ``image_root`` may lead out of it.
        task: of the records that have none.
        metric: how answers to the records that name none are scored (``evaluation/tasks.py``).
        public: where to get the data.
        note: what else there is to know.
    """

    name: str
    path: tuple[str, ...]
    format: str = "llava"
    image_root: Path | None = None
    split: str | None = None
    take: int | float | None = None
    first: int | None = None
    repeat: int = 1
    weight: float = 1.0
    seed: int = 0
    max_malformed: int | None = None
    checksum: tuple[str, ...] = ()
    image_first: bool = False
    follow_links: bool = False
    task: str | None = None
    metric: str | None = None
    public: str = ""
    note: str = ""

    def missing(self) -> list[str]:
        """What of the source is not there: files, and the image root."""
        absent = [path for path in self.path if not path.startswith(HUB) and not os.path.exists(path)]
        found = [f"{absent[0]} and {len(absent) - 1} more"] if len(absent) > 1 else absent
        if self.image_root is not None and not self.image_root.is_dir():
            found.append(f"image directory {self.image_root}")
        return found


@dataclass(frozen=True, eq=False)
class Selection:
    """Which records of a source stand at which positions.

    Attributes:
        count: records of the source.
        chosen: (n,) int64, ascending: the chosen ones; None is all of them, without the memory.
        rounds: how often the chosen ones occur, one round after the other.
        extra: (m,) int64, ascending: the chosen ones that occur once more, behind the rounds.
    """

    count: int
    chosen: NDArray[np.int64] | None
    rounds: int
    extra: NDArray[np.int64]

    @property
    def distinct(self) -> int:
        """How many records are chosen."""
        return self.count if self.chosen is None else len(self.chosen)

    def __len__(self) -> int:
        return self.distinct * self.rounds + len(self.extra)

    def __getitem__(self, position: int) -> int:
        """The record at a position."""
        behind = position - self.distinct * self.rounds
        if behind >= 0:
            return int(self.extra[behind])
        place = position % self.distinct
        return place if self.chosen is None else int(self.chosen[place])

    def spread(self, values: NDArray[np.int32]) -> NDArray[np.int32]:
        """Values of the source's records in the order of the positions: (count,) to (len(self),)."""
        taken = values if self.chosen is None else values[self.chosen]
        return np.concatenate([np.tile(taken, self.rounds), values[self.extra]])

    def starts(self, begins: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions at which a stretch of the source begins, given the records that begin one."""
        whole = begins if self.chosen is None else np.searchsorted(self.chosen, begins)
        rounds = [whole[whole < self.distinct] + round_ * self.distinct for round_ in range(self.rounds)]
        extra = np.searchsorted(self.extra, begins)
        return np.unique(np.concatenate([*rounds, extra[extra < len(self.extra)] + self.distinct * self.rounds]))

    def digest(self) -> str:
        """Hexadecimal digits that stand for the records at all positions."""
        digest = hashlib.sha256(f"{self.count}:{self.rounds}".encode())
        for indices in (self.chosen, self.extra):
            digest.update(b"all" if indices is None else indices.astype("<i8").tobytes())
        return digest.hexdigest()


def select(source: Source, count: int) -> Selection:
    """Choose from ``count`` records, by the source's seed and name alone. Fewer are a subset of more.

    Raises:
        DataError: fewer records than ``take`` or ``first``.
    """
    wanted = source.first
    if source.take is not None:
        wanted = source.take if isinstance(source.take, int) else max(1, round(source.take * count))
    if wanted is not None and wanted > count:
        raise DataError(f"{source.path[0]}: source {source.name!r} takes {wanted} records, there are {count}")
    chosen = None
    if source.first is not None:
        chosen = np.arange(source.first, dtype=np.int64)
    elif wanted is not None:
        chosen = _drawn(count, wanted, f"{source.seed}:{source.name}")
    distinct = count if chosen is None else len(chosen)
    occurrences = max(1, round(distinct * source.repeat * source.weight))
    rounds, rest = divmod(occurrences, distinct)
    extra = _drawn(distinct, rest, f"{source.seed}:{source.name}:weight")
    return Selection(count, chosen, rounds, extra if chosen is None else chosen[extra])


def expand(pattern: str) -> list[str]:
    """The files that a pattern stands for.

    ``{000..099}`` counts with leading zeros, ``{a,b}`` lists, ``*`` and ``?`` match what is there, sorted. A pattern
    that matches nothing stands for itself, so that it can be named as missing.

    Raises:
        ConfigError: more than ``MAX_FILES``, or a range that runs backwards.
    """
    choices: list[list[str]] = []
    total = 1
    for number, text in enumerate(_BRACES.split(pattern)):
        choices.append(_alternatives(text, pattern) if number % 2 else [text])
        total *= len(choices[-1])
    if total > MAX_FILES:
        raise ConfigError(f"{pattern}: stands for {total} files; at most {MAX_FILES}")
    found = []
    for parts in product(*choices):
        name = "".join(parts)
        found += (sorted(glob.glob(name)) or [name]) if "*" in name or "?" in name else [name]
    return found


def fingerprint(files: Sequence[Path]) -> str:
    """Hexadecimal digits that change when files do, without reading all of them.

    From names and sizes, and of up to 64 files also the first and last 64 KiB; the same for every copy of them.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\n".encode())
        if len(files) <= _FEW:
            with file.open("rb") as stream:
                digest.update(stream.read(_EDGE))
                stream.seek(max(0, size - _EDGE))
                digest.update(stream.read(_EDGE))
    return digest.hexdigest()


def verify(source: Source) -> None:
    """Read the source's files and compare them with its checksums, if it has any.

    Raises:
        DataError: a file is another one.
    """
    for path, expected in zip(source.path, source.checksum, strict=bool(source.checksum)):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            raise DataError(
                f"{path}: source {source.name!r} expects the checksum {expected}, found {digest.hexdigest()}"
            )


def _alternatives(text: str, pattern: str) -> list[str]:
    if (match := re.fullmatch(r"(\d+)\.\.(\d+)", text)) is None:
        return text.split(",")
    first, last = match.groups()
    if int(first) > int(last) or int(last) - int(first) >= MAX_FILES:
        raise ConfigError(f"{pattern}: {{{text}}} must run upwards over at most {MAX_FILES} numbers")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _drawn(count: int, wanted: int, key: str) -> NDArray[np.int64]:
    """``wanted`` of the indices below ``count``, ascending: those with the smallest hashes.

    The hash is splitmix64 of index and key: arithmetic that no version of a library changes, and a bijection, so there
    are no ties.
    """
    if not wanted:
        return np.zeros(0, np.int64)
    seed = np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return np.sort(np.argsort(mixed)[:wanted]).astype(np.int64)
