"""Recipes: which data sets, how much of each, as YAML."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from skipvision_train.data.formats import FORMATS
from skipvision_train.data.mixture import Mixture, Part
from skipvision_train.data.sources import Source, expand
from skipvision_train.data.stores import container_of
from skipvision_train.data.streams import Streams
from skipvision_train.data.tables import HUB
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.resources import resource_dir

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """A name and at least one source."""

    name: str
    sources: tuple[Source, ...]


def load_recipe(name: str | Path, root: str | Path | None = None) -> Recipe:
    """Read a recipe: ``{sources: [...]}``, or ``{splits: {<split>: [...]}}`` of which one split is asked for.

    Args:
        name: a file of ``data_recipes/`` without its extension, or a path that ends in .yaml; ``:<split>`` behind it
            names the split (``sketches:sft``).
        root: directory that the recipe's paths are relative to. None is the recipe file's own directory, and an
            error for a recipe of ``data_recipes/``.

    Raises:
        ConfigError: naming the recipe file and the key.
        DataError: data files or image directories are missing; the message lists all of them.
    """
    base, _, split = str(name).partition(":")
    file = _recipe_file(base, root)
    content = _read_yaml(file)
    entries = _entries(content, split, file)
    where = Path(root) if root is not None else file.parent
    sources = tuple(_source(entry, f"{file}: source {index}", where) for index, entry in enumerate(entries))
    names = [source.name for source in sources]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"{file}: the source name {twice[0]!r} occurs twice; names seed the choice of records")
    _refuse_missing(file, sources)
    return Recipe(f"{file.stem}:{split}" if split else file.stem, sources)


def load_records(recipe: Recipe) -> Mixture:
    """Open the sources of a recipe, in order; the same on every rank.

    Files are indexed, records are read when they are asked for. Each source's counts and hash are logged.

    Raises:
        DataError: a file that cannot be opened, another checksum, or a source with fewer records than ``take``.
    """
    parts = []
    for source in recipe.sources:
        parts.append(part := Part.open(source))
        logger.info(
            "%s: %d of %d records, %d in an epoch, hash %s",
            source.name,
            part.selection.distinct,
            len(part.store),
            len(part),
            part.hash,
        )
    return Mixture(recipe.name, parts)


def load_streams(recipe: Recipe) -> Streams:
    """The sources of a recipe as streams: no index is made, and what needs one is refused.

    Raises:
        ConfigError: a source that takes a number of records.
        DataError: a file that cannot be opened, or another checksum.
    """
    return Streams.open(recipe.name, recipe.sources)


def _recipe_file(base: str, root: str | Path | None) -> Path:
    if base.endswith((".yaml", ".yml")):
        return Path(base)
    folder = resource_dir("data_recipes")
    file = folder / f"{base}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"recipe {base!r}: no such recipe; use one of {known}, or the path of a .yaml file")
    if root is None:
        raise ConfigError(f"recipe {base!r}: data.root is needed, the directory that holds the data")
    return file


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: the recipe cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {error}") from error
    if not isinstance(content, dict) or len(content) != 1 or not set(content) & {"sources", "splits"}:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{file}: one key is expected, 'sources' or 'splits'; found {found}")
    return content


def _entries(content: dict[str, Any], split: str, file: Path) -> list[Any]:
    if "splits" in content:
        splits = content["splits"]
        if not isinstance(splits, dict) or split not in splits:
            known = ", ".join(f"{file.stem}:{key}" for key in splits) if isinstance(splits, dict) else "none"
            found = f"split {split!r}" if split else "no split"
            raise ConfigError(f"{file}: {found} was asked for; use one of {known}")
        entries = splits[split]
    elif split:
        raise ConfigError(f"{file}: the recipe has no splits, but {split!r} was asked for")
    else:
        entries = content["sources"]
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{file}: a list of sources is expected, found {type(entries).__name__}")
    return entries


def _source(entry: Any, where: str, root: Path) -> Source:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: a mapping is expected, found {type(entry).__name__}")
    known = {field.name: field for field in fields(Source)}
    if unknown := sorted(str(key) for key in set(entry) - set(known)):
        raise ConfigError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
    if missing := [key for key, field in known.items() if field.default is MISSING and key not in entry]:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    for key, (is_right, expected) in _RULES.items():
        # Null is the same as leaving a key out, where that is allowed.
        if key in entry and not (entry[key] is None and known[key].default is not MISSING) and not is_right(entry[key]):
            raise ConfigError(f"{where}: {key} is {entry[key]!r:.80}; {expected}")
    values = {key: value for key, value in entry.items() if value is not None}
    if "take" in values and "first" in values:
        raise ConfigError(f"{where}: take and first are both given; one of them chooses")
    if values.get("take") == "all":
        del values["take"]
    if (form := values.get("format", "llava")) not in FORMATS:
        raise ConfigError(f"{where}: format {form!r} is unknown; use one of {', '.join(FORMATS)}")
    try:
        values["path"] = _paths(values["path"], root)
        values["checksum"] = _checksums(values.get("checksum", []), values["path"])
    except ConfigError as error:
        raise ConfigError(f"{where} ({values['name']}): {error}") from error
    if "image_root" in values:
        values["image_root"] = root / values["image_root"]
    return Source(**values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and bool(value) and all(map(_is_text, value)))


def _is_take(value: Any) -> bool:
    return value == "all" or (type(value) is int and value >= 1) or (isinstance(value, float) and 0 < value <= 1)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


def _at_least(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and value >= least, f"an integer of at least {least} is expected"


_TEXT = (_is_text, "text is expected")
_TEXTS = (_is_texts, "text or a list of texts is expected")
_SWITCH: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false is expected")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("name", "format", "image_root", "split", "task", "metric", "public", "note"), _TEXT),
    **dict.fromkeys(("path", "checksum"), _TEXTS),
    **dict.fromkeys(("image_first", "follow_links"), _SWITCH),
    "take": (_is_take, "use null or all, an integer of at least 1, or a fraction above 0 and at most 1"),
    "first": _at_least(1),
    "repeat": _at_least(1),
    "weight": (_is_weight, "a number above 0 is expected"),
    "seed": _at_least(0),
    "max_malformed": _at_least(0),
}


def _paths(given: str | list[str], root: Path) -> tuple[str, ...]:
    found: list[str] = []
    for name in [given] if isinstance(given, str) else given:
        found += [name] if name.startswith(HUB) else expand(os.path.join(root, name))
    for path in found:
        container_of(path)
    return tuple(found)


def _checksums(given: str | list[str], paths: tuple[str, ...]) -> tuple[str, ...]:
    sums = tuple(text.removeprefix("sha256:").lower() for text in ([given] if isinstance(given, str) else given))
    for text in sums:
        if not re.fullmatch("[0-9a-f]{64}", text):
            raise ConfigError(f"checksum is {text!r:.80}; 64 hexadecimal digits of SHA-256 are expected")
    if sums and any(container_of(path) == "datasets" for path in paths):
        raise ConfigError("checksum: a folder or a data set of the hub has none; name the files")
    if sums and len(sums) != len(paths):
        raise ConfigError(f"checksum: {len(sums)} for {len(paths)} files; one for each is expected")
    return sums


def _refuse_missing(file: Path, sources: tuple[Source, ...]) -> None:
    missing = {source: found for source in sources if (found := source.missing())}
    if missing:
        lines = [
            f"  {source.name}: {', '.join(found)}" + (f" (public: {source.public})" if source.public else "")
            for source, found in missing.items()
        ]
        raise DataError(f"{file}: {len(missing)} of {len(sources)} sources are missing:\n" + "\n".join(lines))
