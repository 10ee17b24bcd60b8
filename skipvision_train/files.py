"""Small files that are whole or not there."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from skipvision_train.errors import DataError


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 under a temporary name beside ``path``, then rename: a reader never sees half a file.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: str | Path, data: Any) -> None:
    """:func:`write_text` of indented JSON.

    Raises:
        OSError: it cannot be written.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing or no JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
