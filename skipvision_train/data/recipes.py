"""Recipes: which files, how much of each, as YAML."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from skipvision_train.data.records import Record, move_image_first, read_llava
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.resources import resource_dir

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One file of a recipe.

    Attributes:
        name: unique within the recipe; sampling is seeded by it.
        path: the data file, relative to the data root or absolute.
        image_root: the directory that image paths are relative to, itself relative to the data root or absolute.
        format: ``llava`` (JSON, or JSON lines if the name ends in .jsonl).
        take: null for all; an integer for that many records; a fraction above 0 and at most 1 for that share.
        repeat: how often the chosen records occur.
        seed: of the choice.
        max_malformed: so many malformed records are left out with a warning; one more is an error.
        image_first: move the image of a turn to its front, as LLaVA-1.5 does to its data.
    """

    name: str
    path: Path
    image_root: Path
    format: str = "llava"
    take: int | float | None = None
    repeat: int = 1
    seed: int = 0
    max_malformed: int = 0
    image_first: bool = False


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
        DataError: a data file or an image directory is missing.
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
    return Recipe(f"{file.stem}:{split}" if split else file.stem, sources)


def load_records(recipe: Recipe) -> list[Record]:
    """The records of all sources in order, chosen and repeated as the recipe says; the same on every rank.

    Raises:
        DataError: a malformed file, or a source with fewer records than ``take``.
    """
    records: list[Record] = []
    for source in recipe.sources:
        found = read_llava(source.path, source.image_root, source.name, source.max_malformed)
        if source.image_first:
            found = [move_image_first(record) for record in found]
        chosen = [found[i] for i in _choose(len(found), source)]
        logger.info(
            "%s: %d of %d records, %d times, ids %s",
            source.name,
            len(chosen),
            len(found),
            source.repeat,
            ids_hash(chosen),
        )
        records.extend(chosen * source.repeat)
    return records


def ids_hash(records: Sequence[Record]) -> str:
    """16 hexadecimal digits that stand for the sources and ids of the records in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record.source}\0{record.id}\n".encode())
    return digest.hexdigest()[:16]


def _choose(count: int, source: Source) -> list[int]:
    """Indices in file order. Fewer are a subset of more, and neither Python's version nor the rank matters."""
    if source.take is None:
        return list(range(count))
    wanted = source.take if isinstance(source.take, int) else max(1, round(source.take * count))
    if wanted > count:
        raise DataError(f"{source.path}: source {source.name!r} takes {wanted} records, the file has {count}")
    key = f"{source.seed}:{source.name}"
    ranked = sorted(range(count), key=lambda i: hashlib.sha256(f"{key}:{i}".encode()).digest())
    return sorted(ranked[:wanted])


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
    for key in ("name", "path", "image_root", "format"):
        if key in entry and (not isinstance(entry[key], str) or not entry[key]):
            raise ConfigError(f"{where}: {key} is {entry[key]!r}; text is expected")
    source = Source(**{**entry, "path": root / entry["path"], "image_root": root / entry["image_root"]})
    _check(source, f"{where} ({source.name})")
    return source


def _check(source: Source, where: str) -> None:
    if source.format != "llava":
        raise ConfigError(f"{where}: format {source.format!r} is unknown; use llava")
    for key, least in (("repeat", 1), ("seed", 0), ("max_malformed", 0)):
        value = getattr(source, key)
        if type(value) is not int or value < least:
            raise ConfigError(f"{where}: {key} is {value!r}; an integer of at least {least} is expected")
    if not isinstance(source.image_first, bool):
        raise ConfigError(f"{where}: image_first is {source.image_first!r}; true or false is expected")
    take = source.take
    whole = type(take) is int and take >= 1
    share = isinstance(take, float) and 0 < take <= 1
    if take is not None and not whole and not share:
        raise ConfigError(
            f"{where}: take is {take!r}; use null, an integer of at least 1, or a fraction above 0 and at most 1"
        )
    if not source.path.is_file():
        raise DataError(f"{where}: no such data file: {source.path}")
    if not source.image_root.is_dir():
        raise DataError(f"{where}: no such image directory: {source.image_root}")
