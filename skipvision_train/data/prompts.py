"""Prompts in files: a JSON object per line, for generation and for calibration alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skipvision_train.data.messages import Picture, conversation_turns
from skipvision_train.data.records import IMAGE_MARKER, MAX_ID_LENGTH, Turn, check_turns, count_markers
from skipvision_train.data.strict_json import parse_json, shown
from skipvision_train.errors import DataError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with what stands before it.

    Attributes:
        id: as in the file; None where the file gives none.
        turns: an optional system turn, then user and assistant in alternation, a user's last.
        images: files, in the order of their markers.
        answer: what is expected, "" where the file does not say.
        task: free label that plans and results go by, or None.
    """

    id: str | int | None
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()
    answer: str = ""
    task: str | None = None


def prompt_lines(path: Path, field: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1; read as they are asked for.

    Args:
        path: the file; a byte order mark at its beginning is left out.
        field: of the configuration, for the error.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{field}: {path}: cannot be read: {error.strerror}") from error


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        DataError: it holds none.
    """
    entry = parse_json(line)
    if not isinstance(entry, dict):
        raise DataError(f"a JSON object is expected, found {shown(entry)}")
    return entry


def prompt_id(entry: Mapping[str, Any]) -> str | int | None:
    """The entry's id.

    Raises:
        DataError: no text and no integer, or too long.
    """
    found = entry.get("id")
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise DataError(f"'id': a string or an integer is expected, found {shown(found)}")
    if len(str(found)) > MAX_ID_LENGTH:
        raise DataError(f"'id' has {len(str(found))} characters; at most {MAX_ID_LENGTH}")
    _check_unicode("'id'", str(found))
    return found


def parse_prompt(entry: Mapping[str, Any], folder: Path) -> Prompt:
    """``{"id"?, "image" | "images"?, "prompt" | "messages", "system"?, "answer"?, "task"?}``; other keys are ignored.

    Args:
        entry: in ``prompt`` or in the users' texts of ``messages`` the marker ``<image>`` may stand where an image
            stands; without any marker the images come before the first question.
        folder: what image paths are relative to.

    Raises:
        DataError: naming the field.
    """
    images = tuple(folder / name for name in _image_names(entry))
    turns, images = _from_messages(entry, images, folder) if "messages" in entry else _from_prompt(entry, images)
    if entry.get("system") is not None:
        if turns[0].role == "system":
            raise DataError("'system': 'messages' begins with a system message, too; give one of them")
        turns = (Turn("system", _text(entry, "system")), *turns)
    check_turns(turns, last="user")
    for index, turn in enumerate(turns):
        _check_unicode(f"turn {index}", turn.text)
    return Prompt(
        prompt_id(entry),
        turns,
        images,
        _text(entry, "answer") if entry.get("answer") is not None else "",
        _text(entry, "task") if entry.get("task") is not None else None,
    )


def _from_prompt(entry: Mapping[str, Any], images: tuple[Path, ...]) -> tuple[tuple[Turn, ...], tuple[Path, ...]]:
    text = _text(entry, "prompt")
    if (markers := text.count(IMAGE_MARKER)) not in (0, len(images)):
        raise DataError(f"'prompt': {markers} {IMAGE_MARKER} markers, but {len(images)} images")
    return (Turn("user", text if markers else f"{IMAGE_MARKER}\n" * len(images) + text),), images


def _from_messages(
    entry: Mapping[str, Any], given: tuple[Path, ...], folder: Path
) -> tuple[tuple[Turn, ...], tuple[Path, ...]]:
    if "prompt" in entry:
        raise DataError("'prompt', 'messages': both are given; the last message is the question")
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'messages': a list of messages is expected, found {shown(messages)}")
    waiting: Iterator[Picture] = iter(given)
    turns, images = conversation_turns(messages, waiting)
    left = len(list(waiting))
    if left and not images:  # no marker anywhere: as in 'prompt', images come first
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            turns[first] = replace(turns[first], text=f"{IMAGE_MARKER}\n" * left + turns[first].text)
            return tuple(turns), given
    if left:
        raise DataError(f"'messages': {count_markers(turns)} {IMAGE_MARKER} markers, but {left} images more")
    return tuple(turns), tuple(image if isinstance(image, Path) else folder / str(image) for image in images)


def _image_names(entry: Mapping[str, Any]) -> list[str]:
    given = [name for name in ("image", "images") if entry.get(name)]
    if len(given) > 1:
        raise DataError("'image', 'images': both are given; one of them names the images that are shown")
    if not given:
        return []
    found = entry[given[0]]
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"{given[0]!r}: a path or a list of paths is expected, found {names!r:.80}")
    for name in names:
        _check_unicode(repr(given[0]), name)
        if name.startswith(("http://", "https://")):
            raise DataError(f"{given[0]!r}: {name:.80} is a URL; images are not downloaded, give the path of a file")
    return names


def _text(entry: Mapping[str, Any], field: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{field!r}: a text is expected, found {value!r:.80}")
    _check_unicode(repr(field), value)
    return value


def _check_unicode(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; no tokenizer takes that
        raise DataError(f"{where}: half a surrogate pair at character {error.start}") from error
