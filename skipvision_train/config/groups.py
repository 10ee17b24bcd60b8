"""Groups of ``conf/``: what may be left out with ``group=null``, and which files a group has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from skipvision_train.errors import ConfigError
from skipvision_train.resources import resource_dir


def config_folders(arguments: Sequence[str] = ()) -> list[Path]:
    """``conf/``, and the folders that ``--config-dir`` names."""
    found = [resource_dir("conf")]
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(Path(value if equals else next(iter(arguments[place + 1 :]), "")))
    return found


def with_left_out(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with ``group=null`` as Hydra says it, ``~group``.

    A group can be left out where the command's own file in ``conf/`` does so: ``deepspeed: null``.

    Args:
        command: its file in ``conf/``, such as ``data_check``.
        arguments: of the command line.

    Raises:
        ConfigError: null for a group that is needed, or a number, a truth value or nothing for any group, where Hydra
            raises no error of its own kind.
    """
    folders = config_folders(arguments)
    optional = _left_out(folders[0] / f"{command}.yaml")
    spelled = [_with_left_out(argument, optional, folders) for argument in arguments]
    # Hydra would leave a group out although a later argument chooses it again: the last word counts, as everywhere.
    return [
        argument
        for place, argument in enumerate(spelled)
        if argument == arguments[place] or not any(later.startswith(f"{argument[1:]}=") for later in spelled[place:])
    ]


def _left_out(file: Path) -> set[str]:
    """Keys of the defaults list that choose nothing."""
    import yaml

    entries = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    chosen = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {str(key) for key, value in chosen if value is None}


def _with_left_out(argument: str, optional: set[str], folders: Sequence[Path]) -> str:
    key = argument.partition("=")[0].lstrip("+")
    group = key.partition("@")[0]
    is_group = group != "" and any((folder / group).is_dir() for folder in folders)
    if "=" not in argument or argument[0] in "-~" or not is_group:
        return argument
    values = _values(argument)
    if values == [None] and key in optional:
        return f"~{key}"
    for value in values:
        if value is None and key in optional:
            raise ConfigError(f"{key}: null beside other choices; leave {key} out in a run of its own, {key}=null")
        if value == "" or not isinstance(value, str | list):
            shown = "null" if value is None else str(value).lower() or "''"
            out = f"{key}=null leaves it out" if key in optional else "it cannot be left out"
            raise ConfigError(
                f"{key}: {shown} is no file of conf/{group}, and {out}; use one of {_listed(group, folders)}"
            )
    return argument


def _values(argument: str) -> list[object]:
    """What an override gives its key: one value, or those of a sweep; nothing where Hydra will refuse to read it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep
    from hydra.errors import OverrideParseException

    try:
        override = OverridesParser.create().parse_override(argument)
    except OverrideParseException:
        return []
    if not override.is_sweep_override():
        return [override.value()]
    sweep = override.value()
    return list(sweep.list) if isinstance(sweep, ChoiceSweep) else []


def missing(path: str, options: Iterable[str], folders: Sequence[Path]) -> str:
    """What to say of a choice without a file: its folder's files, or close matches in its group.

    Args:
        path: what was looked for, the group first: ``experiment/table5/5_sf_ls_lv``.
        options: files directly in the group, as Hydra knows them.
        folders: where configurations are.
    """
    group, _, choice = path.removesuffix(".yaml").partition("/")
    if not choice:
        return f"config: no configuration named {group!r}"
    is_folder = any((folder / group / choice).is_dir() for folder in folders)
    inside = choice.strip("/") if is_folder else choice.rpartition("/")[0]
    known = _choices(f"{group}/{inside}" if inside else group, folders)
    if inside and known:
        known = [f"{inside}/{name}" for name in known]
        return f"{group}: no configuration named {choice!r}{_close(choice, known)}; {group}/ has {', '.join(known)}"
    if inside:
        every = [name for folder in folders for name in _below(folder / group)]
        return f"{group}: no configuration named {choice!r}, and no folder {inside}{_close(choice, every)}"
    known = sorted({*known, *options})
    every = [name for folder in folders for name in _below(folder / group)]
    listed = f"; {group}/ has {', '.join(known)}" if known else ""
    return f"{group}: no configuration named {choice!r}{_close(choice, [*known, *every])}{listed}"


def _listed(group: str, folders: Sequence[Path]) -> str:
    return ", ".join(_choices(group, folders))


def _choices(group: str, folders: Sequence[Path]) -> list[str]:
    """Files of a group, and its folders with a slash."""
    entries = [entry for folder in folders if (folder / group).is_dir() for entry in (folder / group).iterdir()]
    files = {entry.stem for entry in entries if entry.suffix == ".yaml"}
    return sorted(files | {f"{entry.name}/" for entry in entries if entry.is_dir()})


def _below(group: Path) -> list[str]:
    return sorted(file.relative_to(group).with_suffix("").as_posix() for file in group.rglob("*.yaml"))


def _close(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``: what is spelled alike, or else files of other folders whose name begins so."""
    names = list(dict.fromkeys(known))
    last = {name.rpartition("/")[2]: name for name in reversed(names)}
    close = difflib.get_close_matches(word, names, n=3) or [
        last[name] for name in difflib.get_close_matches(word.rpartition("/")[2], last, n=3)
    ]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
