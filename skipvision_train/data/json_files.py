"""JSON files opened by an index of where their entries begin: JSON lines, and one list of entries.

Opening reads the file once in pieces and keeps 16 bytes per entry; an entry is read and parsed when it is asked for.
Reading is done with ``pread``-like calls, not with a memory map: mapped pages would count as the loader's memory, and a
map over a file that is cut while it is open kills the process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipvision_train.data.records import MAX_TEXT_BYTES
from skipvision_train.data.strict_json import parse_json
from skipvision_train.errors import DataError

CHUNK = 4 << 20
"""Bytes of a file that are looked at at once; the index needs some 20 times as much memory while it is made."""

BLOCK = 8_192
"""Entries that are one stretch for orders that read stretch by stretch."""

_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_QUOTE, _ESCAPE, _COMMA = ord('"'), ord("\\"), ord(",")

_STEP = np.zeros(256, dtype=np.int8)
_STEP[[ord("{"), ord("[")]] = 1
_STEP[[ord("}"), ord("]")]] = -1
_IS_STRUCTURE = bytes(byte in b"{}[]," for byte in range(256))
"""For ``bytes.translate``, which is faster than numpy's look-up."""

_SHOWN = (re.compile(rb"<image>"), re.compile(rb'"type"\s*:\s*"image(?:_url)?"'))
"""What shows an image: a marker, or a part of a message."""
_BROUGHT = (re.compile(rb'"images?"\s*:\s*["\[{]'),)
"""A key with an image behind it."""
_LOOK = 64
"""Bytes that one match may span over the end of a chunk."""


class JsonEntries:
    """The entries of one JSON file, by index.

    Args:
        path: JSON lines if the name ends in ``.jsonl`` or ``.ndjson``, else a JSON list.

    Raises:
        DataError: the file cannot be read, is no list, or holds nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        is_lines = path.suffix.lower() in (".jsonl", ".ndjson")
        try:
            self._bytes = path.stat().st_size
            self._starts, self._ends = index_lines(path) if is_lines else index_list(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if not len(self._starts):
            raise DataError(f"{path}: holds no records")

    def __len__(self) -> int:
        return len(self._starts)

    def entry(self, index: int) -> Any:
        """Parse an entry.

        Raises:
            DataError: without the place.
        """
        return parse_json(self._raw(index).strip(_SPACE))

    def where(self, index: int) -> str:
        """The place of an entry in words."""
        return f"{self.path}: record {index}"

    def sizes(self) -> NDArray[np.int64]:
        """(N,) int64: bytes of every entry, its punctuation included."""
        return self._ends - self._starts

    def image_counts(self) -> NDArray[np.int64]:
        """(N,) int64: images of every entry, estimated without parsing, by reading the file once.

        As many as there are image markers and image parts in its text; without any, 1 where a key ``image`` or
        ``images`` has a value that is not null.
        """
        shown, brought = np.zeros(len(self), np.int64), np.zeros(len(self), np.int64)
        for base, chunk in _chunks(self.path, _LOOK):
            for counts, patterns in ((shown, _SHOWN), (brought, _BROUGHT)):
                for pattern in patterns:
                    # A match belongs to the chunk in which it begins; beyond that it is the next one's.
                    places = [m.start() for m in pattern.finditer(chunk) if m.start() < CHUNK]
                    owners = np.searchsorted(self._starts, np.array(places, np.int64) + base, side="right") - 1
                    np.add.at(counts, owners[owners >= 0], 1)
        return np.where(shown > 0, shown, np.minimum(brought, 1))

    def starts(self) -> NDArray[np.int64]:
        """Entries that begin a stretch: any ``BLOCK`` of them, since all are equally near."""
        return np.arange(0, len(self), BLOCK)

    def files(self) -> list[Path]:
        """The file."""
        return [self.path]

    def _raw(self, index: int) -> bytes:
        start, length = int(self._starts[index]), int(self._ends[index] - self._starts[index])
        if length > MAX_TEXT_BYTES:  # before it is read: a file without newlines is one line
            raise DataError(f"{length} bytes of JSON; at most {MAX_TEXT_BYTES}")
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                if os.fstat(self._file).st_size != self._bytes:
                    raise DataError("the file has changed since it was opened")
            raw = os.pread(self._file, length, start)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from error
        if len(raw) != length:
            raise DataError(f"{len(raw)} of {length} bytes are there; the file was cut")
        return raw

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # another process opens the file itself

    def __del__(self) -> None:
        if self.__dict__.get("_file") is not None:
            os.close(self._file)  # type: ignore[arg-type]


def index_lines(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the lines of a file begin and end, without their newlines; blank lines are left out.

    Returns:
        Two (N,) int64, offsets in bytes.
    """
    newlines, size, first = [], 0, b""
    for base, chunk in _chunks(path):
        newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + base)
        size, first = base + len(chunk), first or chunk[:3]
    breaks = np.concatenate([*newlines, [size]]).astype(np.int64)
    starts = np.concatenate([[len(_BOM) if first == _BOM else 0], breaks[:-1] + 1])
    return _without_blanks(path, starts, breaks, 16)  # a longer line of white space is refused when it is asked for


def _without_blanks(
    path: Path, starts: NDArray[np.int64], ends: NDArray[np.int64], longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Leave out entries of up to ``longest`` bytes that are white space; longer ones are not looked at."""
    kept = ends > starts
    with path.open("rb") as file:
        for index in np.flatnonzero(kept & (ends - starts <= longest)):
            file.seek(starts[index])
            kept[index] = bool(file.read(int(ends[index] - starts[index])).strip(_SPACE))
    return starts[kept], ends[kept]


def index_list(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the elements of a JSON list begin and end.

    Brackets, commas and quotes alone are looked at, so an element that is no JSON, or whose text is no UTF-8, costs
    that element; only unbalanced brackets or quotes make the whole file unreadable.

    Returns:
        Two (N,) int64, offsets in bytes; white space around an element is part of it.

    Raises:
        DataError: no list, a list without end, or something behind it.
    """
    scan = _ListScan(path)
    for base, chunk in _chunks(path):
        scan.read(base, chunk)
    return scan.result()


class _ListScan:
    """The state of :func:`index_list` between two pieces of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marks: list[NDArray[np.int64]] = []  # the opening bracket, the commas between elements, the closing one
        self.depth = 0
        self.in_string = False
        self.is_escaped = False
        self.begun = self.ended = False

    def read(self, base: int, chunk: bytes) -> None:
        """Take the next piece, which begins at byte ``base``."""
        data = np.frombuffer(chunk, np.uint8)
        if not self.begun:
            self._begin(chunk[len(_BOM) :] if base == 0 and chunk.startswith(_BOM) else chunk)
        quotes = self._quotes(data)
        places = np.flatnonzero(np.frombuffer(chunk.translate(_IS_STRUCTURE), np.bool_))
        inside = (np.searchsorted(quotes, places) + self.in_string) % 2 == 1
        places = places[~inside]
        self.in_string ^= bool(len(quotes) % 2)
        depths = self.depth + np.cumsum(_STEP[data[places]], dtype=np.int64)
        bytes_ = data[places]
        last = int(np.argmax(depths == 0)) if (depths == 0).any() else None
        if last is not None and not self.ended:
            self._end(base, chunk, int(places[last]))
            places, depths, bytes_ = places[: last + 1], depths[: last + 1], bytes_[: last + 1]
        elif self.ended and chunk.strip(_SPACE):
            raise DataError(f"{self.path}: something stands behind the JSON list, from byte {base} on")
        opening = np.zeros(len(places), bool)
        if not self.marks and len(places):
            opening[0] = True
        closing = depths == 0
        separating = (depths == 1) & (bytes_ == _COMMA)
        self.marks.append((places[opening | separating | closing] + base).astype(np.int64))
        self.depth = int(depths[-1]) if len(depths) else self.depth

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The elements between the marks."""
        marks = np.concatenate(self.marks) if self.marks else np.zeros(0, np.int64)
        if not self.begun:
            raise DataError(f"{self.path}: a JSON list of records is expected, the file is empty")
        if not self.ended:
            raise DataError(
                f"{self.path}: the JSON list does not end; its last whole element ends at byte {int(marks[-1])}"
            )
        starts, ends = marks[:-1] + 1, marks[1:]
        if len(starts) == 1:  # "[]": one element of white space is none
            return _without_blanks(self.path, starts, ends, CHUNK)
        return starts, ends

    def _begin(self, chunk: bytes) -> None:
        text = chunk.lstrip(_SPACE)
        if text and not text.startswith(b"["):
            raise DataError(
                f"{self.path}: a JSON list of records is expected, the file begins with {text[:12]!r}; JSON lines need "
                "a name that ends in .jsonl"
            )
        self.begun = bool(text)

    def _end(self, base: int, chunk: bytes, place: int) -> None:
        self.ended = True
        if chunk[place + 1 :].strip(_SPACE):
            raise DataError(f"{self.path}: something stands behind the JSON list, from byte {base + place + 1} on")

    def _quotes(self, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Places of the quotes that begin or end a string: those behind an even number of backslashes."""
        escapes = np.flatnonzero(data == _ESCAPE)
        quotes = np.flatnonzero(data == _QUOTE)
        escaped = np.zeros(len(data) + 1, bool)
        if len(escapes):
            begins = np.diff(escapes, prepend=-2) != 1
            run = np.cumsum(begins) - 1
            nth = escapes - escapes[begins][run]
            if self.is_escaped:  # a backslash at the end of the previous piece takes the first byte of this one
                nth = nth + ((run == 0) & (escapes[0] == 0))
            escaped[escapes[nth % 2 == 0] + 1] = True
        escaped[0] = self.is_escaped
        self.is_escaped = bool(escaped[-1]) if len(data) else self.is_escaped
        return quotes[~escaped[quotes]]


def _chunks(path: Path, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
    """Pieces of ``CHUNK`` bytes with their offsets, each with ``overlap`` bytes of the next one behind it."""
    with path.open("rb", buffering=0) as file:
        base = 0
        while True:
            file.seek(base)
            chunk = _read(file, CHUNK + overlap)
            if not chunk:
                return
            yield base, chunk
            base += CHUNK
            if len(chunk) < CHUNK:
                return


def _read(file: Any, count: int) -> bytes:
    """As many bytes as asked for, or up to the end; a raw file may return fewer at once."""
    parts: list[bytes] = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
