"""Samples as plain data: where images are, who says what, and what no record may hold."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from skipvision_train.errors import DataError

IMAGE_MARKER = "<image>"
"""Stands in a user's text where an image stands."""

MAX_TEXT_BYTES = 10_000_000
"""More UTF-8 bytes of text in one record are refused, and a longer JSON entry is not even parsed."""

MAX_ID_LENGTH = 1_000
"""Longer ids are refused: they stand in every message and result."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the bytes of an image are: a file, a slice of a file, or in memory. Nothing is read before ``open``.

    Attributes:
        path: the file, or the tar that holds the image; beside ``data`` only a name for messages.
        offset: first byte of the image in the file, with ``length``.
        length: bytes of the image; None is the whole file.
        data: the bytes themselves.
        name: of the tar member, for messages.
        root: the real directory that the file must lie below when all links are followed; None allows any place.
    """

    path: Path
    offset: int = 0
    length: int | None = None
    data: bytes | None = field(default=None, repr=False)
    name: str | None = None
    root: Path | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return str(self.path) if self.name is None else f"{self.path}!{self.name}"

    @property
    def is_file(self) -> bool:
        """Whether the image is a whole file, so that ``path`` alone finds it."""
        return self.data is None and self.length is None

    def open(self) -> BinaryIO:
        """The image's bytes, to be read and closed.

        Raises:
            DataError: naming the image: missing, no regular file, a link that leaves ``root``, or a slice that is cut.
        """
        if self.data is not None:
            return BytesIO(self.data)
        if self.root is not None:
            self._check_inside(self.root)
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # a pipe would block the reader for good
                raise DataError(f"{self}: no regular file")
            if self.length is None:
                return open(self.path, "rb")
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if len(data) != self.length:
            raise DataError(f"{self}: {len(data)} of {self.length} bytes are there; the file was cut")
        return BytesIO(data)

    def _check_inside(self, root: Path) -> None:
        real = os.path.realpath(self.path)
        if real != str(root) and not real.startswith(os.path.join(root, "")):
            raise DataError(
                f"{self}: a link leads to {real}, outside of the image root {root}; 'follow_links: true' in the "
                "recipe's source allows that"
            )


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        text: what was said; in a user's turn ``IMAGE_MARKER`` stands where an image stands.
    """

    role: str
    text: str


EXTRAS = ("metric", "answers", "choices", "category", "group")
"""What an entry may say for evaluation (``evaluation/tasks.py``)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample of any file format.

    Attributes:
        id: as in the file, or the record's index where the file gives none; not unique in LLaVA-665K.
        source: name of the data source.
        images: in the order of their markers in ``turns``.
        turns: an optional system turn, then user and assistant in alternation, an assistant turn last.
        task: free label that evaluation groups by, or None.
        extras: the entry's ``EXTRAS`` as they stand there, unchecked: evaluation alone reads them, and checks.
    """

    id: str
    source: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    task: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict, hash=False)


def check_turns(turns: Sequence[Turn], last: str) -> None:
    """Refuse turns that no chat format can express.

    Args:
        turns: an optional system turn, then user, assistant, user, ...
        last: the role that must speak last: ``assistant`` in training data, ``user`` in a prompt.

    Raises:
        DataError: wrong order, an empty answer, or an image marker outside the user's turns.
    """
    spoken = [turn.role for turn in turns if turn.role != "system"]
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))]
    misplaced = any(turn.role == "system" for turn in turns[1:])
    if misplaced or spoken != expected or not spoken or spoken[-1] != last:
        found = ", ".join(turn.role for turn in turns[:12]) or "none"
        more = f" and {len(turns) - 12} more" if len(turns) > 12 else ""
        raise DataError(
            f"turns are {found}{more}; they must be an optional system turn, then user and assistant in alternation, "
            f"ending with {last}"
        )
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"turn {index}: the answer is empty")
        if turn.role != "user" and IMAGE_MARKER in turn.text:
            raise DataError(f"turn {index}: {IMAGE_MARKER} in a turn of role {turn.role}; only a user shows images")


def check_record(record: Record) -> None:
    """Refuse what no consumer can use, whatever format it came from.

    Raises:
        DataError: an id or a text that is too long or no Unicode, turns that :func:`check_turns` refuses, or another
            number of image markers than images.
    """
    if len(record.id) > MAX_ID_LENGTH:
        raise DataError(f"'id' has {len(record.id)} characters; at most {MAX_ID_LENGTH}")
    _encoded_length(record.id, "'id'")
    _encoded_length(record.task or "", "'task'")
    check_turns(record.turns, last="assistant")
    length = sum(_encoded_length(turn.text, f"turn {index}") for index, turn in enumerate(record.turns))
    if length > MAX_TEXT_BYTES:
        raise DataError(f"{length} bytes of text; at most {MAX_TEXT_BYTES}")
    if (markers := count_markers(record.turns)) != len(record.images):
        raise DataError(f"{markers} {IMAGE_MARKER} markers in the conversation, but {len(record.images)} images")


def count_markers(turns: Sequence[Turn]) -> int:
    """How many image markers the turns hold."""
    return sum(turn.text.count(IMAGE_MARKER) for turn in turns)


def text_bytes(record: Record) -> int:
    """UTF-8 bytes of all turns."""
    return sum(len(turn.text.encode()) for turn in record.turns)


def move_image_first(record: Record) -> Record:
    """Move the marker of every turn with one image to the front of the turn.

    LLaVA-1.5 does so to all its data, whether a file has the marker first or last (``preprocess_multimodal`` in its
    ``train.py``). Under a causal mask a question behind the image has seen the image, a question before it has not.
    """
    turns = []
    for turn in record.turns:
        if turn.text.count(IMAGE_MARKER) == 1:
            turn = replace(turn, text=f"{IMAGE_MARKER}\n{turn.text.replace(IMAGE_MARKER, '').strip()}".strip())
        turns.append(turn)
    return replace(record, turns=tuple(turns))


def _encoded_length(text: str, where: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; no tokenizer takes that
        raise DataError(f"{where}: the text holds half a surrogate pair at character {error.start}") from error
