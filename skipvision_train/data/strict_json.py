"""JSON as the standard has it, bounded in time and memory, for input that nobody has checked."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from skipvision_train.data.records import MAX_TEXT_BYTES
from skipvision_train.errors import DataError

MAX_CONTAINERS = 100_000
"""More lists and objects in one entry are refused: each costs some 60 bytes of memory for 2 bytes of text."""

_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}


def parse_json(raw: bytes) -> Any:
    """Parse one entry.

    Refused besides what is no JSON: bytes that are no UTF-8, NaN and infinities (Python writes them, JSON has none), a
    key that stands twice in an object (parsers disagree on which value counts), nesting deeper than the interpreter's
    stack, more than ``MAX_CONTAINERS`` lists and objects, and more than ``MAX_TEXT_BYTES``.

    Raises:
        DataError: saying what is wrong, without a place.
    """
    if len(raw) > MAX_TEXT_BYTES:
        raise DataError(f"{len(raw)} bytes of JSON; at most {MAX_TEXT_BYTES}")
    if (containers := raw.count(b"{") + raw.count(b"[")) > MAX_CONTAINERS:
        raise DataError(f"{containers} opening brackets; at most {MAX_CONTAINERS}")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: byte {raw[error.start]:#04x} at {error.start}") from error
    except RecursionError as error:
        raise DataError("not JSON that can be read: nested too deeply") from error
    except DataError:
        raise
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python converts
        raise DataError(f"not JSON: {str(error).splitlines()[0]:.120}") from error


def kind(value: Any) -> str:
    """What a JSON value is, in words; never its content, which may be huge."""
    if isinstance(value, str | list | dict) and not value:
        return f"an empty {_KINDS[type(value)].split()[-1]}"
    return _KINDS.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A scalar's value in at most 80 characters; of anything else its kind."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    return f"{value!r:.80}" if isinstance(value, int | float | bool | None) else kind(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise DataError(f"the key {shown(twice)} stands twice in an object")
    return found


def _constant(name: str) -> NoReturn:
    raise DataError(f"{name} is no JSON value; write null, or leave the key out")
