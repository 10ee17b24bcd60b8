"""docs/settings.md can be copied: every override that it shows composes, fits its experiment, and changes it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

import pytest
from documents import ROOT

from skipvision_train import cli
from skipvision_train.commands import train
from skipvision_train.config.validate import validate

TEXT = re.sub(r"^```.*?^```$", "", (ROOT / "docs/settings.md").read_text(), flags=re.DOTALL | re.MULTILINE)
CELL = re.compile(r"`([^`]+)`")
KEY = re.compile(r"[\w.@/]+=.")


def table(header: str) -> list[list[str]]:
    """The cells of the table whose first column is called so."""
    rows = re.search(rf"^\| {header} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def shown() -> list[tuple[str, str]]:
    """Experiment and override of every row of "One override at a time"."""
    return [
        (experiment, override)
        for _, experiments, overrides in table("what")
        for experiment in CELL.findall(experiments)
        for override in CELL.findall(overrides)
    ]


EXPERIMENTS = [CELL.findall(row[0])[0] for row in table("experiment")]
OTHERS = sorted(
    {text for text in CELL.findall(TEXT) if KEY.match(text)} - {"group=null"} - {override for _, override in shown()}
)
"""Overrides in running text and in other tables."""


@pytest.fixture
def composed(monkeypatch, capsys) -> Callable[..., Any]:
    """The configuration that ``skipvision train`` would run with."""

    def compose(*overrides: str) -> Any:
        configs: list[Any] = []
        monkeypatch.setattr(train, "run", configs.append)
        monkeypatch.setattr(sys, "argv", ["skipvision"])
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", *overrides])
        assert stopped.value.code == 0, capsys.readouterr().err
        (cfg,) = configs
        return cfg

    return compose


def test_the_document_is_read():
    assert len(shown()) >= 20
    assert ("sv_cos", "deepspeed=null") in shown()
    assert len(EXPERIMENTS) == 7
    assert "model.tiling.mode=aspect" in OTHERS


@pytest.mark.parametrize(("experiment", "override"), shown())
def test_an_override_fits_its_experiment_and_changes_it(composed, experiment, override):
    before = composed(f"experiment={experiment}")
    after = composed(f"experiment={experiment}", *shlex.split(override))
    validate(after, 8)
    assert after != before


@pytest.mark.parametrize("override", OTHERS)
def test_an_override_elsewhere_fits_an_experiment(composed, override):
    problems = []
    for experiment in EXPERIMENTS:
        try:
            return validate(composed(f"experiment={experiment}", *shlex.split(override)), 8)
        except (AssertionError, ValueError) as problem:
            problems.append(f"{experiment}: {problem}")
    raise AssertionError("\n".join(problems))


def test_switching_deepspeed_off(composed):
    assert composed("experiment=sv_cos").deepspeed.stage == 3
    assert composed("experiment=sv_cos", "deepspeed=null").deepspeed is None
