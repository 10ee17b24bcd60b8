"""Samples as plain data, and the reader of LLaVA's conversation format (JSON and JSON lines)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skipvision_train.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_MARKER = "<image>"
"""Stands in a user's text where an image stands."""

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        text: what was said; in a user's turn ``IMAGE_MARKER`` stands where an image stands.
    """

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One sample of any file format.

    Attributes:
        id: as in the file, or the record's index where the file gives none; not unique in LLaVA-665K.
        source: name of the data source.
        images: files in the order of their markers in ``turns``.
        turns: an optional system turn, then user and assistant in alternation, an assistant turn last.
        task: free label that evaluation groups by, or None.
    """

    id: str
    source: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    task: str | None = None


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
        found = ", ".join(turn.role for turn in turns) or "none"
        raise DataError(
            f"turns are {found}; they must be an optional system turn, then user and assistant in alternation, "
            f"ending with {last}"
        )
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"turn {index}: the answer is empty")
        if turn.role != "user" and IMAGE_MARKER in turn.text:
            raise DataError(f"turn {index}: {IMAGE_MARKER} in a turn of role {turn.role}; only a user shows images")


def count_markers(turns: Sequence[Turn]) -> int:
    """How many image markers the turns hold."""
    return sum(turn.text.count(IMAGE_MARKER) for turn in turns)


def read_llava(path: str | Path, image_root: str | Path, source: str, max_malformed: int = 0) -> list[Record]:
    """Read LLaVA's format: ``{"id", "image", "conversations": [{"from": "human" | "gpt" | "system", "value"}]}``.

    ``image`` is a path, a list of paths, or absent in a text-only record. A string ``task`` is kept.

    Args:
        path: a JSON list, or JSON lines if the name ends in ``.jsonl``.
        image_root: directory that image paths are relative to; they may not leave it.
        source: written into every record.
        max_malformed: so many malformed records are left out with a warning each; one more is an error.

    Raises:
        DataError: naming the file, the record's index (from 0) and id, and what is wrong with it.
    """
    path, root = Path(path), Path(image_root)
    records: list[Record] = []
    malformed = 0
    for index, entry in enumerate(_entries(path)):
        try:
            records.append(_record(entry, index, root, source))
        except DataError as error:
            name = f" (id {entry['id']!r})" if isinstance(entry, dict) and "id" in entry else ""
            message = f"{path}: record {index}{name}: {error}"
            malformed += 1
            if malformed > max_malformed:
                suffix = f" ({malformed} malformed records, {max_malformed} allowed)" if max_malformed else ""
                raise DataError(message + suffix) from error
            logger.warning("left out: %s", message)
    if not records:
        raise DataError(f"{path}: holds no records")
    return records


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


def _entries(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _parse(line, f"{path}: line {number}")
        return
    entries = _parse(text, str(path), hint="; JSON lines need a name that ends in .jsonl")
    if not isinstance(entries, list):
        raise DataError(f"{path}: a JSON list of records is expected, found {_kind(entries)}")
    yield from entries


def _parse(text: str, where: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}{hint}") from error


def _record(entry: Any, index: int, root: Path, source: str) -> Record:
    if not isinstance(entry, dict):
        raise DataError(f"a JSON object is expected, found {_kind(entry)}")
    identity, task = entry.get("id", index), entry.get("task")
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise DataError(f"'id' must be a string or an integer, found {_kind(identity)}")
    if task is not None and not isinstance(task, str):
        raise DataError(f"'task' must be a string, found {_kind(task)}")
    _check_unicode(str(identity), "'id'")
    turns = _turns(entry)
    check_turns(turns, last="assistant")
    images = _image_paths(entry.get("image"), root)
    if (markers := count_markers(turns)) != len(images):
        raise DataError(f"{markers} {IMAGE_MARKER} markers in the conversation, but {len(images)} images in 'image'")
    return Record(str(identity), source, images, turns, task)


def _turns(entry: dict[str, Any]) -> tuple[Turn, ...]:
    if "conversations" not in entry:
        raise DataError(f"'conversations' is missing; found the keys {', '.join(map(str, entry)) or 'none'}")
    conversation = entry["conversations"]
    if not isinstance(conversation, list) or not conversation:
        raise DataError(f"'conversations' must be a list of turns, found {_kind(conversation)}")
    turns = []
    for index, item in enumerate(conversation):
        if not isinstance(item, dict) or not isinstance(item.get("value"), str):
            raise DataError(f"turn {index}: an object with 'from' and a string 'value' is expected")
        if item.get("from") not in _ROLES:
            raise DataError(f"turn {index}: 'from' is {item.get('from')!r}; use one of {', '.join(_ROLES)}")
        _check_unicode(item["value"], f"turn {index}")
        turns.append(Turn(_ROLES[item["from"]], item["value"]))
    return tuple(turns)


def _image_paths(value: Any, root: Path) -> tuple[Path, ...]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    paths = []
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"'image' must be a path or a list of paths, found {_kind(name)}")
        # Decided on the text alone: data sets are often linked into the root, so links may lead out of it.
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
            raise DataError(f"image {name!r}: must be relative to the image root {root} and stay below it")
        paths.append(root / name)
    return tuple(paths)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; no tokenizer takes that
        raise DataError(f"{where}: the text holds half a surrogate pair at character {error.start}") from error


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    text = names.get(type(value), type(value).__name__)
    return f"an empty {text.split()[-1]}" if value in ("", [], {}) else text
