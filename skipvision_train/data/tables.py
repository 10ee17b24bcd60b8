"""Parquet files and ``datasets`` tables as entries by index: rows as dictionaries, images as stored bytes."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from skipvision_train.errors import ConfigError, DataError, first_line

logger = logging.getLogger(__name__)

HUB = "hub:"
"""A path that begins so names a data set of the hub: ``hub:<owner>/<name>[:<config>][@<revision>]``."""

CACHED_GROUPS = 2
"""Row groups of a parquet file that are kept in memory: a row costs the reading of its whole group."""

BLOCK = 1_000
"""Rows of a ``datasets`` table that are one stretch, and that are measured at once."""


# What pyarrow raises on damaged files. A list, so that a bug of ours is not taken for one.
ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)


class ParquetEntries:
    """The rows of one parquet file.

    Raises:
        DataError: no parquet file, or one without rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, pq.ParquetFile] | None = None
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        try:
            metadata = self._parquet().metadata
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._columns = {text_bytes: self._text_columns(), image_count: self._image_columns()}
        except ARROW_ERRORS as error:
            raise DataError(f"{path}: no parquet file that can be read: {_line(error)}") from error
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
            raise DataError(f"{path}: damaged: {sum(rows)} rows in row groups, {metadata.num_rows} in the file")
        self._bounds = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        if not len(self):
            raise DataError(f"{path}: holds no records")

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def entry(self, index: int) -> dict[str, Any]:
        """The row.

        Raises:
            DataError: without the place: a row group that cannot be read, or text that is no UTF-8.
        """
        group = int(np.searchsorted(self._bounds, index, side="right")) - 1
        if group not in self._groups:
            while len(self._groups) >= CACHED_GROUPS:
                self._groups.popitem(last=False)
            self._groups[group] = self._read(group)
        self._groups.move_to_end(group)
        return row_of(self._groups[group], index - int(self._bounds[group]))

    def where(self, index: int) -> str:
        """The place of a row in words."""
        return f"{self.path}: record {index}"

    def sizes(self) -> NDArray[np.int64]:
        """(N,) int64: bytes of all text of every row; reads the columns of text alone."""
        return self._measured(text_bytes)

    def image_counts(self) -> NDArray[np.int64]:
        """(N,) int64: images of every row; reads their names where they have some, else their bytes."""
        return self._measured(image_count)

    def starts(self) -> NDArray[np.int64]:
        """First row of every row group."""
        return self._bounds[:-1][np.diff(self._bounds) > 0]

    def files(self) -> list[Path]:
        """The file."""
        return [self.path]

    def _text_columns(self) -> list[str]:
        return _text_columns(self._parquet().schema_arrow)

    def _image_columns(self) -> list[str]:
        """Columns that are images, and parts of columns that tell how many images they have."""
        schema = self._parquet().schema
        leaves = [schema.column(i).path for i in range(len(schema))]
        named = {leaf: f"{leaf.removesuffix('.bytes')}.path" for leaf in leaves if leaf.endswith(".bytes")}
        whole = [name for name in _image_columns(self._parquet().schema_arrow) if name in leaves]
        return [path if path in leaves else leaf for leaf, path in named.items()] + whole

    def _measured(self, measure: Any) -> NDArray[np.int64]:
        parts = [np.zeros(count, np.int64) for count in np.diff(self._bounds)]
        for group, part in enumerate(parts):
            try:
                part += measure(self._read(group, self._columns[measure]))
            except DataError as error:  # its records are refused one by one, under the policy, when they are asked for
                logger.warning("%s: %s", self.path, error)
        return np.concatenate(parts)

    def _read(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            # Without threads: this runs in loader processes, one of which is meant to take one core.
            table = self._parquet().read_row_group(group, columns=columns, use_threads=False)
        except ARROW_ERRORS as error:
            raise DataError(f"row group {group} cannot be read: {_line(error)}") from error
        if table.num_rows != (expected := int(self._bounds[group + 1] - self._bounds[group])):
            raise DataError(f"row group {group} holds {table.num_rows} rows, the file's metadata says {expected}")
        return table

    def _parquet(self) -> pq.ParquetFile:
        if self._open is None or self._open[0] != os.getpid():  # a forked process does not share the reader's state
            self._open = (os.getpid(), pq.ParquetFile(self.path))
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_groups": OrderedDict()}


class DatasetEntries:
    """The rows of a ``datasets`` data set: a folder that ``save_to_disk`` wrote, or one of the hub.

    The hub is reached through ``datasets`` alone: ``HF_HUB_OFFLINE=1`` keeps to its cache, and code that comes with a
    data set is never run.

    Args:
        location: the folder, or ``hub:<owner>/<name>[:<config>][@<revision>]``.
        split: needed where there are several.

    Raises:
        ConfigError: the split is missing or unknown.
        DataError: nothing there that can be read.
    """

    def __init__(self, location: str, split: str | None = None) -> None:
        self.location = location
        loaded = from_hub(location, split) if location.startswith(HUB) else _from_disk(location, split)
        self._data: Any = loaded.with_format("arrow")
        if not len(self):
            raise DataError(f"{location}: holds no records")

    def __len__(self) -> int:
        return len(self._data)

    def entry(self, index: int) -> dict[str, Any]:
        """The row.

        Raises:
            DataError: without the place.
        """
        try:
            table = self._data[index : index + 1]
        except ARROW_ERRORS as error:
            raise DataError(f"the row cannot be read: {_line(error)}") from error
        return row_of(table, 0)

    def where(self, index: int) -> str:
        """The place of a row in words."""
        return f"{self.location}: record {index}"

    def sizes(self) -> NDArray[np.int64]:
        """(N,) int64: bytes of all text of every row."""
        return self._measured(text_bytes, _text_columns)

    def image_counts(self) -> NDArray[np.int64]:
        """(N,) int64: images of every row."""
        return self._measured(image_count, _image_columns)

    def starts(self) -> NDArray[np.int64]:
        """First row of every ``BLOCK`` rows."""
        return np.arange(0, len(self), BLOCK)

    def files(self) -> list[Path]:
        """The arrow files behind the table."""
        return [Path(file["filename"]) for file in self._data.cache_files]

    def _measured(self, measure: Any, columns_of: Any) -> NDArray[np.int64]:
        columns = columns_of(self._data[:1].schema)
        if not columns:
            return np.zeros(len(self), np.int64)
        data = self._data.select_columns(columns)
        return np.concatenate([measure(data[first : first + BLOCK]) for first in range(0, len(self), BLOCK)])


def text_bytes(table: pa.Table) -> NDArray[np.int64]:
    """(rows,) int64: UTF-8 bytes of all text of every row, however deep it is nested."""
    return _summed(table, _array_text)


def image_count(table: pa.Table) -> NDArray[np.int64]:
    """(rows,) int64: images of every row: binaries and structs with a binary, alone or in lists."""
    return _summed(table, _array_images)


def _summed(table: pa.Table, measure: Any) -> NDArray[np.int64]:
    total = np.zeros(table.num_rows, np.int64)
    for column in table.itercolumns():
        parts = [measure(chunk) for chunk in column.chunks]
        total += np.concatenate(parts) if parts else 0
    return total


def _array_text(array: pa.Array) -> NDArray[np.int64]:
    if _is_text(array.type):
        return np.asarray(pc.fill_null(pc.binary_length(array), 0), np.int64)
    return _nested(array, _array_text)


def _array_images(array: pa.Array) -> NDArray[np.int64]:
    if _is_image(array.type):
        return np.asarray(pc.cast(array.is_valid(), pa.int64()))
    return _nested(array, _array_images)


def _nested(array: pa.Array, measure: Any) -> NDArray[np.int64]:
    """The sum of ``measure`` over the fields of a struct or the elements of a list; 0 of any other type."""
    if pa.types.is_struct(array.type):
        fields = [measure(pc.struct_field(array, [i])) for i in range(array.type.num_fields)]
        return np.sum(fields, axis=0, dtype=np.int64) if fields else np.zeros(len(array), np.int64)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        inner = measure(array.flatten())
        lengths = np.asarray(pc.fill_null(pc.list_value_length(array), 0), np.int64)
        sums = np.concatenate([[0], np.cumsum(inner)])
        ends = np.cumsum(lengths)
        return np.asarray(sums[ends] - sums[ends - lengths], np.int64)
    return np.zeros(len(array), np.int64)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        # Without its bytes, an image's name stands for it.
        return any(f.name == "bytes" and _is_image(f.type) for f in kind) or [f.name for f in kind] == ["path"]
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types of a column's values, images as a whole."""
    if _is_image(kind) or not pa.types.is_nested(kind):
        yield kind
    else:
        for index in range(kind.num_fields):
            yield from _leaves(kind.field(index).type)


def _text_columns(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if any(map(_is_text, _leaves(field.type)))]


def _image_columns(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if any(map(_is_image, _leaves(field.type)))]


def row_of(table: pa.Table, index: int) -> dict[str, Any]:
    try:
        return dict(table.slice(index, 1).to_pylist()[0])
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {_line(error)}") from error
    except ARROW_ERRORS as error:  # such as a time stamp that Python has no value for
        raise DataError(f"the row cannot be read: {_line(error)}") from error


def _from_disk(location: str, split: str | None) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(location)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{location}: no data set that 'save_to_disk' wrote can be read: {_line(error)}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        found = "split is missing" if split is None else f"split {split!r} is unknown"
        raise ConfigError(f"{location}: {found}; use one of {', '.join(map(str, loaded))}")
    return loaded[split]


def from_hub(location: str, split: str | None, streaming: bool = False) -> Any:
    """Open a data set of the hub, through the cache or as a stream.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    name, revision, config = location.removeprefix(HUB), None, None
    name, _, config = name.partition(":")
    if config:
        config, _, revision = config.partition("@")
    else:
        name, _, revision = name.partition("@")
    try:
        more = {"streaming": True} if streaming else {}
        return datasets.load_dataset(name, config or None, split=split or "train", revision=revision or None, **more)
    except (OSError, ValueError, KeyError, RuntimeError, pa.ArrowException) as error:
        raise DataError(f"{location}: cannot be loaded: {_line(error)}") from error


def _line(error: Exception) -> str:
    return first_line(error)[:200]
