"""The configuration reference is read from the schemas: nothing undocumented, nothing out of date."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from skipvision_train.cli import COMMANDS
from skipvision_train.config.reference import Entry, entries, groups, markdown, schema_of

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


@dataclass
class Inner:
    """Fields that are described above.

    Attributes:
        size: in pixels,
            a multiple of 14.
        other: nothing.
    """

    size: int = 336
    other: str | None = None


@dataclass
class Outer:
    """Fields that are described below."""

    name: str = "???"
    """Who
    it is."""
    depths: list[int] = field(default_factory=lambda: [1, 2])
    """Layers."""
    inner: Inner = field(default_factory=Inner)
    """Not shown: its fields are."""
    maybe: Inner | None = None
    """May be left out."""


def test_entries_by_hand():
    assert list(entries(Outer)) == [
        Entry("name", "str", "???", "Who it is."),
        Entry("depths", "list[int]", "[1, 2]", "Layers."),
        Entry("inner.size", "int", "336", "in pixels, a multiple of 14."),
        Entry("inner.other", "str | None", "null", "nothing."),
        Entry("maybe", "Inner | None", "null", "May be left out."),
        Entry("maybe.size", "int", "336", "in pixels, a multiple of 14."),
        Entry("maybe.other", "str | None", "null", "nothing."),
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_is_explained(command):
    found = list(entries(schema_of(command)))
    assert found
    assert [entry.path for entry in found if not entry.text] == []


def test_groups_name_their_files():
    found = {group.path: group for group in groups("train")}
    assert found["model"].default == "sv_cos"
    assert "table5/02_sf" in found["experiment"].choices
    assert found["deepspeed"].default is None
    assert "mlp" in found["connector@model.connector"].choices


def test_the_reference_is_up_to_date():
    assert DOCS.read_text() == markdown(COMMANDS), "run make reference"
