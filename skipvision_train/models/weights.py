"""Checkpoints on disk: which tensors their files hold, and how they get into a model: one by one, or mapped.

The files of transformers directories (one or sharded, safetensors or ``.bin``) and single ``.safetensors``, ``.bin`` or
``.pt`` files. What a file holds is known before anything is read from it, so that a checkpoint that does not fit is
refused before a model has changed. Nothing is downloaded; pickled files are read with ``weights_only=True``, which
refuses everything but tensors and plain containers.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skipvision_train.errors import CheckpointError, first_line

INDEX = ".index.json"
DIRECTORY_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where a transformers directory keeps its weights, in the order in which transformers looks."""

FLOATS = ("float64", "float32", "float16", "bfloat16")
"""What can be converted to a parameter's dtype. Everything narrower is quantised: a number without its scale."""

POINTER = b"version https://git-lfs"
"""How the few lines begin that git keeps in the place of a large file."""

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read.

    Attributes:
        file: that holds it.
        shape: as stored.
        dtype: torch's name without ``torch.``, or safetensors' code where that is none of :data:`FLOATS`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str

    def empty(self) -> Tensor:
        """A tensor on "meta" like it; of one of :data:`FLOATS`."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a checkpoint, by name.

    Attributes:
        source: the file or directory, for messages.
        tensors: everything that the files hold.
        contents: whether :meth:`read` reads; without, its tensors are on "meta", to check what would become of them.
    """

    source: Path
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    contents: bool = True

    @classmethod
    def open(cls, path: Path, names: tuple[str, ...] = DIRECTORY_FILES, contents: bool = True) -> WeightFiles:
        """Look at a checkpoint without reading its tensors.

        Args:
            path: a weights file, or a directory.
            names: the files that a directory may keep its weights in, the first that exists counts.
            contents: as the attribute.

        Raises:
            CheckpointError: the path does not exist; no weights; a git-lfs pointer in the place of a file; a file that
                is damaged or holds more than tensors; an index whose files are missing or lack a tensor that it lists.
        """
        path = Path(path)
        if path.is_file():
            return cls(path, _catalogue(path), contents)
        if not path.exists():
            raise CheckpointError(f"{path}: does not exist")
        for name in names:
            file = path / name
            if file.is_file():
                return cls(path, _sharded(file) if name.endswith(INDEX) else _catalogue(file), contents)
        raise CheckpointError(f"{path}: no weights; found none of {', '.join(names)}")

    def check(self, pairs: Iterable[tuple[str, Tensor]], part: str) -> None:
        """Refuse weights that do not fit.

        Args:
            pairs: a stored name and the tensor that it is wanted for.
            part: of the model, for messages.

        Raises:
            CheckpointError: tensors are missing, the first is named with the shape that the model needs; a shape is
                wrong, with both; a dtype that is no floating-point type of 16 bits or more.
        """
        wanted = list(pairs)
        if missing := [(name, tensor) for name, tensor in wanted if name not in self.tensors]:
            name, tensor = missing[0]
            raise CheckpointError(
                f"{self.source}: {part} lacks {len(missing)} of {len(wanted)} tensors, first {name} of shape "
                f"{tuple(tensor.shape)}"
            )
        for name, tensor in wanted:
            stored = self.tensors[name]
            if stored.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{self.source}: {name} has shape {stored.shape}, the model needs {tuple(tensor.shape)}"
                )
        self._check_floats(name for name, _ in wanted)

    def copy(self, pairs: Iterable[tuple[str, Tensor]], part: str) -> None:
        """Fill tensors of a model from the files, one after the other.

        At most one stored tensor is in memory at a time: files are opened one by one and read, not mapped, so that
        neither a state dict nor the pages of a file stand beside the model. (A pickled file is mapped: its pages are
        the system's to drop.) Half precision becomes the tensor's own dtype, for fp32 without loss.

        Args:
            pairs: a stored name and the tensor to fill; a name may come several times.
            part: of the model, for messages.

        Raises:
            CheckpointError: as :meth:`check`, before anything is copied.
        """
        wanted = list(pairs)
        self.check(wanted, part)
        by_file: dict[Path, list[tuple[str, Tensor]]] = {}
        for name, tensor in wanted:
            by_file.setdefault(self.tensors[name].file, []).append((name, tensor))
        for file, inside in by_file.items():
            with _reader(file, "pread") as read, torch.no_grad():
                for name, tensor in inside:
                    tensor.copy_(read(name))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors as they are stored. They are mapped from their files: reading them is what fills memory.

        Without :attr:`contents` they have their shape and dtype alone.

        Raises:
            CheckpointError: a dtype that is no floating-point type of 16 bits or more.
        """
        wanted = list(names)
        self._check_floats(wanted)
        if not self.contents:
            return {name: self.tensors[name].empty() for name in wanted}
        state: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.tensors[name].file for name in wanted):
            with _reader(file, "mmap") as read:
                state.update({name: read(name) for name in wanted if self.tensors[name].file == file})
        return state

    def views(self, sources: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Stored tensors in a type, each in memory that it shares with no other: what a model may take as its own.

        What is stored in ``dtype`` stays a view of its file. The mapping is private: pages are read when they are
        touched, those that nobody writes to are the system's, which all processes of a machine share, and what is
        written is a copy of the writer's own that no file sees. A file may be renamed or removed while it is mapped,
        but must not be changed or cut. Other types are converted; torch's bf16 of fp64 is that of its fp32.

        Args:
            sources: name of a tensor in the model -> stored name, which may come several times.
            dtype: bfloat16 or float32.

        Returns:
            name in the model -> contiguous tensor.

        Raises:
            CheckpointError: a dtype that is no floating-point type of 16 bits or more.
        """
        self._check_floats(sources.values())
        by_file: dict[Path, list[str]] = {}
        for name, stored in sources.items():
            by_file.setdefault(self.tensors[stored].file, []).append(name)
        state: dict[str, Tensor] = {}
        taken: set[int] = set()
        for file, inside in by_file.items():
            with _reader(file, "mmap") as read:
                for name in inside:
                    tensor = read(sources[name]).to(dtype).contiguous()
                    storage = tensor.untyped_storage()
                    # One source of two parameters; and tensors of a pickled file may lie in one another.
                    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
                        tensor = tensor.clone()
                    taken.add(storage.data_ptr())
                    state[name] = tensor
        return state

    def _check_floats(self, names: Iterable[str]) -> None:
        for name in names:
            if (dtype := self.tensors[name].dtype) not in FLOATS:
                raise CheckpointError(
                    f"{self.source}: {name} has dtype {dtype}; quantised weights cannot be loaded, use one of "
                    f"{', '.join(FLOATS)}"
                )


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: no such file, a git-lfs pointer, no JSON, or another kind of value.
    """
    _check_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def check_pointers(path: Path) -> None:
    """Name the first file in a directory (or the file itself) that is a git-lfs pointer; asked after a load failed.

    Raises:
        CheckpointError: there is one.
    """
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            _check_pointer(file)


def _check_pointer(file: Path) -> None:
    """Refuse what a clone without git-lfs has in the place of a large file; other faults are the reader's to name."""
    try:
        with file.open("rb") as opened:
            head = opened.read(len(POINTER))
    except OSError:
        return
    if head == POINTER:
        raise CheckpointError(f"{file}: a git-lfs pointer, not the file itself; run `git lfs pull` in its repository")


def _sharded(index: Path) -> dict[str, StoredTensor]:
    """What the shards of an index hold."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index}: weight_map must name a file for every tensor")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(listed.values())):
        if not (file := index.parent / shard).is_file():
            raise CheckpointError(f"{index}: lists {shard}, which is not there; the checkpoint is incomplete")
        tensors.update(_catalogue(file))
    for name, shard in listed.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: {name} is listed in {shard}, but that file does not hold it")
    return tensors


def _catalogue(file: Path) -> dict[str, StoredTensor]:
    """What one file holds."""
    _check_pointer(file)
    if file.suffix != ".safetensors":
        return {
            name: StoredTensor(file, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in _unpickle(file).items()
        }
    with _safetensors(file, "mmap") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (the handle is no mapping)
        return {
            name: StoredTensor(
                file, tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype())
            )
            for name, part in slices.items()
        }


@contextmanager
def _reader(file: Path, backend: str) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one tensor of a file by name; ``backend`` is safetensors' ``pread`` or ``mmap``."""
    if file.suffix != ".safetensors":
        yield _unpickle(file).__getitem__
        return
    with _safetensors(file, backend) as handle:
        yield handle.get_tensor


@contextmanager
def _safetensors(file: Path, backend: str) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", backend=backend) as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: damaged or truncated safetensors file: {error}") from error


def _unpickle(file: Path) -> dict[str, Tensor]:
    """A flat state dict, mapped where the format allows; the wrapping of a training checkpoint is taken off."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{file}: a TorchScript archive; convert it to a file of tensors first (docs/checkpoints.md)"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{file}: no plain file of tensors: it holds other pickled objects, which are never loaded, or is "
                "damaged"
            ) from error
        raise CheckpointError(f"{file}: damaged or truncated: {first_line(error)}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file}: expected a dict of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
