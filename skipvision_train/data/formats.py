"""Formats: one function each from an entry of a container (JSON object, row, members of a tar) to a ``Record``.

To add one: write ``name(entry, at) -> Record`` here, enter it in ``FORMATS``, and write one test. What every record
must satisfy (turns, markers, Unicode, length) is checked by ``read_record``, not by the formats.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skipvision_train.data.records import EXTRAS, IMAGE_MARKER, ImageRef, Record, Turn, check_record
from skipvision_train.data.strict_json import kind, shown
from skipvision_train.errors import DataError

Entry = Mapping[str, Any]

_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_CHAT_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """What a format has to know beside the entry.

    Attributes:
        source: name of the data source.
        index: of the entry in its source.
        image_root: the directory that image paths are relative to; None where images come with the entries.
        real_root: the same with its links followed, which no image may leave; None allows links to lead anywhere.
    """

    source: str
    index: int
    image_root: Path | None = None
    real_root: Path | None = None

    def record(
        self, entry: Entry, images: Iterable[ImageRef], turns: Iterable[Turn], task: str | None = None
    ) -> Record:
        """A record with the entry's ``id`` (its index without one), ``task`` (the argument without one) and ``EXTRAS``.

        Raises:
            DataError: an id or a task of another type.
        """
        identity, own = entry.get("id"), entry.get("task")
        identity = self.index if identity is None else identity
        if isinstance(identity, bool) or not isinstance(identity, str | int):
            raise DataError(f"'id' must be a string or an integer, found {kind(identity)}")
        if own is not None and not isinstance(own, str):
            raise DataError(f"'task' must be a string, found {kind(own)}")
        extras = {key: entry[key] for key in EXTRAS if entry.get(key) is not None}
        return Record(str(identity), self.source, tuple(images), tuple(turns), task if own is None else own, extras)

    def image(self, value: Any) -> ImageRef:
        """One image: a path below the image root, bytes, or ``{"bytes", "path"}`` as ``datasets`` stores images.

        Raises:
            DataError: another type, a URL, or a path that leaves the image root.
        """
        if isinstance(value, ImageRef):
            return value
        if isinstance(value, bytes):
            return ImageRef(Path(f"{self.source}/{self.index}"), data=value)
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            name = value.get("path")
            path = Path(name[:200] if isinstance(name, str) else f"{self.source}/{self.index}")
            return ImageRef(path, data=value["bytes"])
        if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
            value = value["path"]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"an image must be a path or bytes, found {kind(value)}")
        return self._file(value)

    def _file(self, name: str) -> ImageRef:
        if _URL.match(name):
            raise DataError(f"image {shown(name)} is a URL; nothing is downloaded while training: save it as a file")
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
            raise DataError(
                f"image {shown(name)}: must be relative to the image root {self.image_root} and stay below it"
            )
        if self.image_root is None:
            raise DataError(f"image {shown(name)} is a path, but the source has no image_root")
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"image {shown(name)}: the name holds half a surrogate pair") from error
        return ImageRef(self.image_root / name, root=self.real_root)


Format = Callable[[Entry, Place], Record]


def read_record(entry: Any, form: Format, at: Place) -> Record:
    """Apply a format and check what every record must satisfy.

    Raises:
        DataError: what is wrong, without the place.
    """
    if not isinstance(entry, Mapping):
        raise DataError(f"an object is expected, found {kind(entry)}")
    record = form(entry, at)
    check_record(record)
    return record


def llava(entry: Entry, at: Place) -> Record:
    """LLaVA: ``{"id", "image", "conversations": [{"from": "human" | "gpt" | "system", "value"}]}``.

    ``image`` (or ``images``) is a path, a list of paths, or absent in a text-only record.
    """
    turns = _turns(_listed(entry, "conversations"), "from", "value", _LLAVA_ROLES)
    return at.record(entry, _images(entry, at), turns)


def messages(entry: Entry, at: Place) -> Record:
    """OpenAI and ShareGPT: ``{"messages": [{"role", "content"}], "images": [...]}``.

    Content is text, which may hold image markers, or a list of parts: ``{"type": "text", "text"}``,
    ``{"type": "image"}`` with or without ``image``, and ``{"type": "image_url", "image_url": {"url":
    "data:image/png;base64,..."}}``. Images that parts do not bring come from ``images`` (or ``image``) in order. Parts
    are stripped and joined by newlines.
    """
    loose = iter(_images(entry, at))
    turns, shown_images = [], list[ImageRef]()
    for index, message in enumerate(_listed(entry, "messages")):
        where = f"message {index}"
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: an object with 'role' and 'content' is expected, found {kind(message)}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _CHAT_ROLES:
            raise DataError(f"{where}: 'role' is {shown(role)}; use one of {', '.join(_CHAT_ROLES)}")
        if isinstance(content, str):
            shown_images += _taken(loose, content.count(IMAGE_MARKER), where)
        elif isinstance(content, list):
            parts = [_part(part, loose, shown_images, f"{where}, part {n}", at) for n, part in enumerate(content)]
            content = "\n".join(part for part in parts if part)
        else:
            raise DataError(f"{where}: 'content' must be text or a list of parts, found {kind(content)}")
        turns.append(Turn(role, content))
    return at.record(entry, [*shown_images, *loose], turns)


def cauldron(entry: Entry, at: Place) -> Record:
    """The Cauldron: ``{"images": [...], "texts": [{"user", "assistant", "source"}]}``.

    Without markers in the texts all images stand in front of the first question. ``source`` is the task where all texts
    have the same one.
    """
    images, turns, sources = _images(entry, at), list[Turn](), set[str]()
    for index, pair in enumerate(_listed(entry, "texts")):
        if not isinstance(pair, Mapping):
            raise DataError(f"text {index}: an object with 'user' and 'assistant' is expected, found {kind(pair)}")
        turns += [Turn("user", _text(pair, "user")), Turn("assistant", _text(pair, "assistant"))]
        sources.add(source if isinstance(source := pair.get("source"), str) else "")
    task = sources.pop() or None if len(sources) == 1 else None
    return at.record(entry, images, _marked(turns, len(images)), task)


def captions(entry: Entry, at: Place) -> Record:
    """Image and caption: ``{"image", "caption"}`` (or ``text``), or an image and a ``.txt`` of one key in a tar.

    The question is the image alone, as pretraining with the template ``plain`` has it.
    """
    images = _images(entry, at)
    if not images:
        raise DataError(f"'image' is missing; found {_keys(entry)}")
    field = "caption" if entry.get("caption") is not None else "text"
    turns = [Turn("user", ""), Turn("assistant", _text(entry, field))]
    return at.record(entry, images, _marked(turns, len(images)))


def vqa(entry: Entry, at: Place) -> Record:
    """One question: ``{"image", "question", "answer"}``; the images stand in front where the question has no marker.

    With ``answers`` of several people (texts, or ``{"answer"}`` as VQA has them) instead of ``answer`` the one that
    most of them gave is the answer, of several the first.
    """
    images = _images(entry, at)
    if entry.get("answer") is None and entry.get("answers") is not None:
        answer = Counter(answer_texts(entry["answers"])).most_common(1)[0][0]
    else:
        answer = _text(entry, "answer")
    turns = [Turn("user", _text(entry, "question")), Turn("assistant", answer)]
    return at.record(entry, images, _marked(turns, len(images)))


def answer_texts(value: Any) -> list[str]:
    """The texts of ``answers``: a list of texts, or of ``{"answer"}`` objects.

    Raises:
        DataError: anything else, or an empty list.
    """
    items = value if isinstance(value, list) else []
    found = [item.get("answer") if isinstance(item, Mapping) else item for item in items]
    texts = [text for text in found if isinstance(text, str)]
    if not texts or len(texts) < len(found):
        raise DataError(f"'answers' must be a list of texts that is not empty, found {shown(value)}")
    return texts


FORMATS: dict[str, Format] = {
    "llava": llava,
    "messages": messages,
    "cauldron": cauldron,
    "captions": captions,
    "vqa": vqa,
}
"""By the name that recipes use."""


def _images(entry: Entry, at: Place) -> list[ImageRef]:
    given = [key for key in ("image", "images") if entry.get(key) is not None]
    if len(given) > 1:
        raise DataError("both 'image' and 'images' are there; one of them is expected")
    value = entry[given[0]] if given else []
    try:
        return [at.image(one) for one in (value if isinstance(value, list) else [value])]
    except DataError as error:
        raise DataError(f"{given[0]!r}: {error}") from error


def _turns(items: list[Any], speaker: str, said: str, roles: Mapping[str, str]) -> list[Turn]:
    turns = []
    for index, item in enumerate(items):
        if not isinstance(item, Mapping) or not isinstance(item.get(said), str):
            raise DataError(f"turn {index}: an object with {speaker!r} and a string {said!r} is expected")
        role = item.get(speaker)
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"turn {index}: {speaker!r} is {shown(role)}; use one of {', '.join(roles)}")
        turns.append(Turn(roles[role], item[said]))
    return turns


def _marked(turns: list[Turn], images: int) -> list[Turn]:
    """Markers in front of the first turn, unless the texts have markers themselves."""
    if any(IMAGE_MARKER in turn.text for turn in turns) or not images:
        return turns
    text = "\n".join([IMAGE_MARKER] * images + [turns[0].text] * bool(turns[0].text))
    return [replace(turns[0], text=text), *turns[1:]]


def _part(part: Any, loose: Iterator[ImageRef], images: list[ImageRef], where: str, at: Place) -> str:
    """The part's text; the images it shows are appended to ``images``."""
    if not isinstance(part, Mapping):
        raise DataError(f"{where}: an object with 'type' is expected, found {kind(part)}")
    form = part.get("type")
    if form == "text" and isinstance(text := part.get("text"), str):
        images += _taken(loose, text.count(IMAGE_MARKER), where)
        return text.strip()
    if form not in ("image", "image_url"):
        raise DataError(f"{where}: a text or an image is expected, found the type {shown(form)}")
    value = part.get(form)
    if isinstance(value, Mapping) and form == "image_url":
        value = value.get("url")
    if isinstance(value, str) and value.startswith("data:"):
        value = _decoded(value, where)
    images += _taken(loose, 1, where) if value is None else [at.image(value)]
    return IMAGE_MARKER


def _decoded(url: str, where: str) -> bytes:
    header, _, body = url.partition(",")
    if not header.endswith(";base64"):
        raise DataError(f"{where}: a data URL must be in base64, found {shown(header)}")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the data URL is no base64: {error}") from error


def _taken(loose: Iterator[ImageRef], count: int, where: str) -> list[ImageRef]:
    found = [image for _, image in zip(range(count), loose, strict=False)]
    if len(found) < count:
        raise DataError(f"{where}: shows {count} images that it does not bring, 'images' has {len(found)} left")
    return found


def _listed(entry: Entry, field: str) -> list[Any]:
    if field not in entry:
        raise DataError(f"{field!r} is missing; found {_keys(entry)}")
    value = entry[field]
    if not isinstance(value, list) or not value:
        raise DataError(f"{field!r} must be a list that is not empty, found {kind(value)}")
    return value


def _text(entry: Entry, field: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str):
        raise DataError(f"{field!r} must be a string, found {kind(value)}")
    return value


def _keys(entry: Entry) -> str:
    names = [str(key)[:40] for key in list(entry)[:8]]
    return f"the keys {', '.join(names)}{', ...' if len(entry) > 8 else ''}" if names else "no keys"
