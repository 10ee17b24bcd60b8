"""Webdataset tar shards as entries by index: members that share a key are one entry, images stay where they are."""

from __future__ import annotations

import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipvision_train.data.records import MAX_TEXT_BYTES, ImageRef
from skipvision_train.data.strict_json import kind, parse_json, shown
from skipvision_train.errors import DataError

SIZES = "sizes.json"
"""Beside the shards, ``{"shard-000.tar": 10000, ...}``: how many entries each has, so that none is read on opening."""

CACHED_SHARDS = 64
"""Shards whose index is kept, per process; some 100 bytes per member."""

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
TEXTS = ("txt", "text", "caption")

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
"""Webdataset's rule: the key ends at the first dot of the file's name, and all behind it is the extension."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: what its key leaves of its name, and where its bytes are; ``offset`` -1 is no regular file."""

    extension: str
    offset: int
    length: int

    @property
    def suffix(self) -> str:
        """The part of the extension that tells the format."""
        return self.extension.rpartition(".")[2].lower()


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one key, in the shard's order."""

    key: str
    members: tuple[Member, ...]

    def text_bytes(self) -> int:
        """Bytes of the members that hold text."""
        return sum(member.length for member in self.members if member.suffix in (*TEXTS, "json"))

    def images(self) -> int:
        """How many members are images."""
        return sum(member.suffix in IMAGES for member in self.members)


class TarEntries:
    """The entries of a list of tar shards.

    Without ``sizes.json`` every shard's headers are read on opening, which takes a seek per member; with it a shard is
    looked at when one of its entries is asked for first.

    Raises:
        DataError: a shard that cannot be read, or that ``sizes.json`` does not list.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._indices: OrderedDict[int, list[Group]] = OrderedDict()
        self._measured: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        listed = [listed_sizes(folder) for folder in {path.parent: None for path in self.paths}]
        sizes = {path: count for folder in listed for path, count in folder.items()}
        counts = self._listed(sizes) if sizes else self._counted()
        self._bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if not len(self):
            raise DataError(f"{self._name()}: holds no records")

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def entry(self, index: int) -> dict[str, Any]:
        """The fields of the entry's ``.json`` member, with what the other members say.

        ``id`` is the key where the JSON gives none, ``caption`` the text member, and ``images`` the image members in
        the shard's order; both take the place of what the JSON says under those names (and ``image``).

        Raises:
            DataError: without the place.
        """
        shard, group = self._group(index)
        path, fields = self.paths[shard], {}
        by_suffix: dict[str, list[Member]] = {}
        for member in group.members:
            if member.offset < 0:
                raise DataError(f"the member {_name(group, member)} is no regular file")
            by_suffix.setdefault(member.suffix, []).append(member)
        if parsed := _single(by_suffix, ("json",), group):
            fields = parse_json(_read(path, parsed))
            if not isinstance(fields, dict):
                raise DataError(f"the member {_name(group, parsed)} must hold a JSON object, found {kind(fields)}")
        if text := _single(by_suffix, TEXTS, group):
            try:
                fields["caption"] = _read(path, text).decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"the member {_name(group, text)} is no UTF-8 text: byte {error.start}") from error
        images = [
            ImageRef(path, member.offset, member.length, name=_name(group, member))
            for member in group.members
            if member.suffix in IMAGES
        ]
        if images:
            fields.pop("image", None)
            fields["images"] = images
        fields.setdefault("id", group.key)
        return fields

    def where(self, index: int) -> str:
        """The place of an entry in words."""
        shard = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return f"{self.paths[shard]}: record {index - int(self._bounds[shard])}"

    def sizes(self) -> NDArray[np.int64]:
        """(N,) int64: bytes of the members that hold text; with ``sizes.json`` the first shard's mean for all."""
        return self._measurements()[0]

    def image_counts(self) -> NDArray[np.int64]:
        """(N,) int64: image members; with ``sizes.json`` the first shard's mean, rounded, for all."""
        return self._measurements()[1]

    def starts(self) -> NDArray[np.int64]:
        """First entry of every shard."""
        return self._bounds[:-1][np.diff(self._bounds) > 0]

    def files(self) -> list[Path]:
        """The shards."""
        return self.paths

    def _name(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    def _listed(self, sizes: Mapping[Path, int]) -> list[int]:
        for path in self.paths:
            if path not in sizes:
                raise DataError(f"{path}: {path.parent / SIZES} does not list this shard")
        return [sizes[path] for path in self.paths]

    def _counted(self) -> list[int]:
        texts, images, counts = [], [], []
        for shard in range(len(self.paths)):
            groups = self._index(shard)
            counts.append(len(groups))
            texts += [group.text_bytes() for group in groups]
            images += [group.images() for group in groups]
        self._measured = np.array(texts, np.int64), np.array(images, np.int64)
        return counts

    def _measurements(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._measured is None:
            groups = self._index(int(np.argmax(np.diff(self._bounds) > 0)))
            means = [round(sum(m(g) for g in groups) / len(groups)) for m in (Group.text_bytes, Group.images)]
            self._measured = np.full(len(self), means[0]), np.full(len(self), means[1])
        return self._measured

    def _group(self, index: int) -> tuple[int, Group]:
        shard = int(np.searchsorted(self._bounds, index, side="right")) - 1
        groups, expected = self._index(shard), int(self._bounds[shard + 1] - self._bounds[shard])
        if len(groups) != expected:
            raise DataError(f"the shard holds {len(groups)} entries, {SIZES} says {expected}")
        return shard, groups[index - int(self._bounds[shard])]

    def _index(self, shard: int) -> list[Group]:
        if shard not in self._indices:
            while len(self._indices) >= CACHED_SHARDS:
                self._indices.popitem(last=False)
            self._indices[shard] = index_shard(self.paths[shard])
        self._indices.move_to_end(shard)
        return self._indices[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": OrderedDict()}


def index_shard(path: Path) -> list[Group]:
    """The entries of a shard, from its headers alone. Consecutive members with the same key are one entry.

    Members without an extension, and those whose name begins with a dot, belong to no entry, as in webdataset.

    Raises:
        DataError: no tar, a compressed one, or one that is cut or damaged anywhere.
    """
    groups: list[tuple[str, list[Member]]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                match = _KEY.fullmatch(info.name)
                if info.isdir() or match is None:
                    continue
                key, extension = match.groups()
                if not groups or groups[-1][0] != key:
                    groups.append((key, []))
                groups[-1][1].append(Member(extension, info.offset_data if info.isreg() else -1, info.size))
            end = tar.offset
        _check_end(path, end)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no uncompressed tar that can be read to its end: {error}") from error
    return [Group(key, tuple(members)) for key, members in groups]


def _check_end(path: Path, end: int) -> None:
    """tarfile takes a damaged header for the end of the archive; what follows the real end is zeros, or nothing."""
    with path.open("rb") as file:
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise DataError(f"{path}: damaged at byte {end}; what follows cannot be found")
        file.seek(0, os.SEEK_END)
        if file.tell() < end:
            raise DataError(f"{path}: cut within its last member")


def listed_sizes(folder: Path) -> dict[Path, int]:
    """The entries of every shard of a folder, as ``sizes.json`` says; empty without it.

    Raises:
        DataError: the file holds something else.
    """
    file = folder / SIZES
    if not file.is_file():
        return {}
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: a JSON object of shards and their numbers of entries is expected")
    for name, count in content.items():
        if type(count) is not int or count < 0:
            raise DataError(f"{file}: {name!r} has {shown(count)} entries; a number is expected")
    return {folder / name: count for name, count in content.items()}


def _single(by_suffix: Mapping[str, list[Member]], suffixes: Sequence[str], group: Group) -> Member | None:
    found = [member for suffix in suffixes for member in by_suffix.get(suffix, [])]
    if len(found) > 1:
        names = " and ".join(_name(group, member) for member in found[:2])
        raise DataError(f"two members say the same: {names}")
    return found[0] if found else None


def _name(group: Group, member: Member) -> str:
    return f"{group.key}.{member.extension}"


def _read(path: Path, member: Member) -> bytes:
    if member.length > MAX_TEXT_BYTES:
        raise DataError(f"a member of {member.length} bytes of text; at most {MAX_TEXT_BYTES}")
    with ImageRef(path, member.offset, member.length).open() as file:
        return file.read()
