"""The folder of a command's results: whole, with the configuration that they are of, and not replaced by accident.

Beside the results of ``skipvision bench`` stands ``bench.run.json``: ``configuration``, and ``finished``. A run writes
at its end, all at once; only while it moves its files into place is ``finished`` false.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from skipvision_train.errors import ConfigError, DataError
from skipvision_train.files import read_json, write_json

log = logging.getLogger(__name__)

HARMLESS = ("batch_size", "max_rows", "output", "overwrite", "wandb_project")
"""Fields that do not change what is measured."""

_LISTED, _SHOWN = 4, 60


class Settings(Protocol):
    """The ``Config`` of a command that leaves results in a folder."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    output: str
    overwrite: bool


@dataclass(frozen=True)
class ResultsFolder:
    """Where a command leaves its results; :meth:`open` makes one.

    Attributes:
        command: that writes them, a word.
        path: the folder.
        configuration: JSON values.
        made: patterns of all files that the command may write, relative to the folder.
    """

    command: str
    path: Path
    configuration: Mapping[str, Any]
    made: Sequence[str]

    @classmethod
    def open(cls, command: str, cfg: Settings, made: Sequence[str]) -> ResultsFolder:
        """Look at the folder, before anything is measured; nothing is changed until :meth:`writing`.

        Raises:
            ConfigError: the folder holds results of another configuration and ``overwrite`` is false, or it cannot be
                written.
            DataError: its record is none.
        """
        path = Path(cfg.output)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output: {path} is a file; name a folder")
        folder = cls(command, path, _as_json(cfg), made)
        if not cfg.overwrite:
            folder._refuse_others(_as_json(type(cfg)()))
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"output: {path} cannot be written: {there} is no folder that takes new files")
        return folder

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """An empty folder, whose files take the place of all former results when the block ends without an error.

        Raises:
            ConfigError: it cannot be written.
        """
        new = self.path / f".{self.command}.new"
        shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
        try:
            new.mkdir(parents=True)
            yield new
            self._publish(new)
        except OSError as error:
            raise ConfigError(f"output: {self.path} cannot be written: {error.strerror}") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _refuse_others(self, defaults: Mapping[str, Any]) -> None:
        record, former = self.path / record_name(self.command), self._former()
        ways = "name another output=..., or replace them with overwrite=true"
        if record.is_file():
            before = filled(flatten(_read_record(record)["configuration"]), flatten(defaults))
            if differing := differences(before, flatten(self.configuration), HARMLESS):
                raise ConfigError(f"output: {self.path} holds results of another configuration: {differing}; {ways}")
            log.info("%s holds results of this configuration; new ones replace them when they are whole", self.path)
        elif former:
            raise ConfigError(
                f"output: {self.path} holds {former[0].relative_to(self.path)}, and no {record.name} says of which "
                f"configuration; {ways}"
            )

    def _former(self) -> list[Path]:
        return [file for pattern in self.made for file in sorted(self.path.glob(pattern)) if file.is_file()]

    def _publish(self, new: Path) -> None:
        """First all former files go, then the new ones come: at no time does one stand beside the other."""
        files = [file for file in sorted(new.rglob("*")) if file.is_file()]
        unknown = [name for name in (file.relative_to(new) for file in files) if not any(map(name.match, self.made))]
        assert not unknown, f"{self.command} may not write {unknown}: a later run would not replace it"
        self._note(finished=False)
        for file in self._former():
            file.unlink()
            if file.parent != self.path and not any(file.parent.iterdir()):
                file.parent.rmdir()
        for file in files:
            target = self.path / file.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        self._note(finished=True)

    def _note(self, *, finished: bool) -> None:
        write_json(
            self.path / record_name(self.command), {"finished": finished, "configuration": dict(self.configuration)}
        )


def record_name(command: str) -> str:
    """The file that says of which configuration a command's results are."""
    return f"{command}.run.json"


def require_whole(path: str | Path, command: str) -> None:
    """For readers of several files of a folder. A folder without a record is taken as it is.

    Raises:
        DataError: a run was stopped while it moved its files into place, or the record is none.
    """
    record = Path(path) / record_name(command)
    if record.is_file() and not _read_record(record)["finished"]:
        raise DataError(f"{path}: skipvision {command} was stopped while it wrote these results; start it again")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def filled(before: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration of an earlier version: a field that did not exist did what its default does."""
    known = [f"{name}." for name in before]
    new = {key: value for key, value in defaults.items() if not any(name.startswith(f"{key}.") for name in known)}
    return new | dict(before)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], harmless: Collection[str]) -> str:
    """The first fields in which two flat configurations differ, with both values; empty if none does."""
    keys = sorted(before.keys() | now.keys())
    differ = [key for key in keys if key not in harmless and before.get(key) != now.get(key)]
    shown = ", ".join(
        f"{key} ({_short(before.get(key))} before, {_short(now.get(key))} now)" for key in differ[:_LISTED]
    )
    return shown + (f" and {len(differ) - _LISTED} more" if len(differ) > _LISTED else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _as_json(cfg: Settings) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(cfg)))
    return values


def _read_record(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("configuration"), dict) or "finished" not in found:
        raise DataError(f"{path}: not the record of a run: 'finished' or 'configuration' is missing")
    return found
