"""What every field of a command's configuration means: the text of ``--help``, and ``docs/configuration.md``.

Read from the schemas themselves: a field's type and default, and the docstring that stands below it. Neither Hydra nor
torch is imported, so that ``--help`` answers at once.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import yaml

from skipvision_train.resources import resource_dir

WIDTH = 100


@dataclass(frozen=True)
class Entry:
    """One field.

    Attributes:
        path: dotted, as an override names it.
        type: as it is written in the schema.
        default: as YAML writes it; ``???`` must be given.
        text: what it means, one paragraph.
    """

    path: str
    type: str
    default: str
    text: str


@dataclass(frozen=True)
class Group:
    """A configuration group of a command.

    Attributes:
        path: as an override names it: ``model``, ``connector@model.connector``.
        default: the choice that is made without one, or None.
        choices: names of its files.
    """

    path: str
    default: str | None
    choices: tuple[str, ...]


def schema_of(command: str) -> type:
    """The schema of a command: ``data check`` -> ``commands.data_check.Config``."""
    module = importlib.import_module(f"skipvision_train.commands.{_file(command)}")
    schema: type = module.Config
    return schema


def _file(command: str) -> str:
    return command.replace(" ", "_").replace("-", "_")


def entries(schema: type, prefix: str = "") -> Iterator[Entry]:
    """Every field of a schema, those of nested schemas in their place."""
    hints, texts = typing.get_type_hints(schema), dict[str, str]()
    for base in reversed(schema.__mro__[:-1]):
        texts |= _texts(base)
    for field in dataclasses.fields(schema):
        path, kind = f"{prefix}{field.name}", _nested(hints[field.name])
        default = _default(field)
        if kind is None or default is None:
            shown = "null" if default is None else _yaml(default)
            yield Entry(path, str(field.type), shown, texts.get(field.name, ""))
        if kind is not None:
            yield from entries(kind, f"{path}.")


def _nested(hint: Any) -> type | None:
    """The schema that a field holds, also an optional one; None for a plain value."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    kinds = [option for option in options if option is not NoneType and dataclasses.is_dataclass(option)]
    return typing.cast("type", kinds[0]) if kinds else None


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "???"


def _yaml(value: Any) -> str:
    if value == "???":
        return "???"
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


@cache
def _texts(schema: type) -> dict[str, str]:
    """What stands below each field in the schema's source, or under ``Attributes:`` in its docstring: one paragraph."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(schema)))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    listed = (inspect.getdoc(schema) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    items = re.findall(r"^    (\w+): ((?:.|\n {5,})*)", listed, re.MULTILINE)
    found = {name: " ".join(text.split()) for name, text in items}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def groups(command: str) -> list[Group]:
    """The groups in the defaults list of a command's file, with the files that can be chosen."""
    conf = resource_dir("conf")
    content = yaml.safe_load((conf / f"{_file(command)}.yaml").read_text())
    found = []
    for entry in content["defaults"]:
        if isinstance(entry, dict):
            ((path, default),) = entry.items()
            folder = path.removeprefix("optional ").split("@")[0]
            found.append(Group(path.removeprefix("optional "), default, _choices(conf / folder)))
            if folder == "model":  # the files of this group choose from that one
                found.append(Group("connector@model.connector", None, _choices(conf / "connector")))
    return found


def _choices(folder: Path) -> tuple[str, ...]:
    return tuple(str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.yaml")))


# --- text ----------------------------------------------------------------------------------------------------------


def help_text(command: str, what: str, usage: str) -> str:
    """What ``skipvision <command> --help`` prints.

    Args:
        command: its name.
        what: it does, in a line.
        usage: how it is called.
    """
    lines = [f"skipvision {command}: {what}", "", f"usage: {usage}"]
    lines += ["       --cfg job shows the composed configuration instead of running it", ""]
    if found := groups(command):
        lines.append("groups (choose another file of conf/ by group=name)")
        for group in found:
            lines.append(f"  {group.path}={'null' if group.default is None else group.default}")
            lines += textwrap.wrap(", ".join(group.choices), WIDTH, initial_indent="      ", subsequent_indent="      ")
        lines.append("")
    lines.append("fields (set one by field=value; a chosen group's file may give other defaults)")
    for entry in entries(schema_of(command)):
        lines.append(f"  {entry.path}={entry.default}")
        text = entry.text.replace("``", "").replace("`", "")
        lines += textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def markdown(commands: Mapping[str, str]) -> str:
    """``docs/configuration.md``: a section per command.

    Args:
        commands: name -> what it does.
    """
    lines = [
        "# Configuration reference",
        "",
        "Written by `make reference` from the schemas; a test keeps it so. Fields are set as `field=value`, groups as",
        "`group=file`; a group's file may give other defaults than the schema's below. `skipvision <command> --help`",
        "prints the same, `--cfg job` the composed configuration.",
    ]
    for command, what in commands.items():
        lines += ["", f"## skipvision {command}", "", f"{what[0].upper()}{what[1:]}.", ""]
        for group in groups(command):
            names = ", ".join(f"`{name}`" for name in group.choices)
            default = "none" if group.default is None else f"`{group.default}`"
            lines.append(f"* group `{group.path}` (default {default}): {names}")
        lines += ["", "| field | default | meaning |", "|---|---|---|"]
        for entry in entries(schema_of(command)):
            text = entry.text.replace("``", "`").replace("|", "\\|")
            lines.append(f"| `{entry.path}` | `{entry.default}` | {text} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    from skipvision_train.cli import COMMANDS

    (Path(__file__).parents[2] / "docs" / "configuration.md").write_text(markdown(COMMANDS))
