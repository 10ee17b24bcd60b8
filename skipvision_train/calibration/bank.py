"""One plan per task in a folder, with where the plans come from; and batches that mix tasks.

The folder holds ``<task>.json`` for every task, ``universal.json`` for all others, and ``bank.json``, which names them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from skipvision_train.errors import PlanError
from skipvision_train.files import write_json
from skipvision_train.plans.plan import SkipPlan

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT_VERSION = 1
INDEX, UNIVERSAL = "bank.json", "universal.json"
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,60}")
_SHOWN = 12  # digits of a hash in a message


@dataclass(frozen=True)
class BankFacts:
    """How the plans of a bank were found.

    Attributes:
        model_hash: of the calibrated model (``models.identity.model_hash``).
        base_plan: name of the plan that the calibrated ones extend.
        strategy: how layers were scored.
        bypass: what replaces skipped attention.
        seed: of the draw.
        samples: per task the ids of the samples that its plan was found with.
        versions: of the packages.
        created: date, as the caller writes it.
    """

    model_hash: str
    base_plan: str
    strategy: str
    bypass: str
    seed: int
    samples: Mapping[str, Sequence[str]]
    versions: Mapping[str, str]
    created: str


@dataclass(frozen=True, eq=False)
class PlanBank:
    """The plans of a folder; :meth:`create` and :meth:`load` make one.

    Attributes:
        path: the folder.
        plans: per task.
        universal: for every other task.
        facts: where they come from.
    """

    path: Path
    plans: Mapping[str, SkipPlan]
    universal: SkipPlan
    facts: BankFacts
    _told: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        depths = {name: plan.num_layers for name, plan in {**self.plans, "the universal plan": self.universal}.items()}
        if len(set(depths.values())) > 1:
            found = ", ".join(f"{name} {depth}" for name, depth in depths.items())
            raise PlanError(f"{self.path}: plans of different depths in one bank: {found}; all are for one model")

    @classmethod
    def create(cls, path: str | Path, plans: Mapping[str, SkipPlan], universal: SkipPlan, facts: BankFacts) -> PlanBank:
        """Write a bank under a temporary name and rename it; a bank that stands there is replaced as a whole.

        Raises:
            PlanError: plans of different or open depths, a task without sample ids, or something else at ``path``,
                which stays as it is.
        """
        path = Path(path)
        bank = cls(path, dict(plans), universal, facts)
        if missing := [task for task in plans if task not in facts.samples]:
            raise PlanError(f"{path}: no sample ids for the plan of {missing[0]!r}; a bank says what it was found with")
        _refuse_foreign(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            bank._write(work / "new")
            _swap(work / "new", path, aside=work / "old")
        finally:
            shutil.rmtree(work)
        log.info("wrote %s: %d tasks and the universal plan", path, len(plans))
        return bank

    def _write(self, folder: Path) -> None:
        files = {task: file_name(task) for task in self.plans}
        for task, file in files.items():
            self.plans[task].save(folder / file)
        self.universal.save(folder / UNIVERSAL)
        write_json(folder / INDEX, {"format_version": FORMAT_VERSION, "files": files, **asdict(self.facts)})

    @classmethod
    def load(cls, path: str | Path, model_hash: str | None = None) -> PlanBank:
        """Read a bank.

        Args:
            path: the folder.
            model_hash: of the model that is to run under its plans; None takes the bank as it is.

        Raises:
            PlanError: no bank, another format version, another model, a plan file that is missing or malformed, or
                plans of different depths.
        """
        path = Path(path)
        index = _read_index(path)
        try:
            files = {str(task): Path(file).name for task, file in index["files"].items()}
            facts = BankFacts(**{entry.name: index[entry.name] for entry in fields(BankFacts)})
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path / INDEX}: not the index of a plan bank: {error!r}") from error
        if model_hash is not None and model_hash != facts.model_hash:
            raise PlanError(
                f"{path}: a bank of another model: its hash is {facts.model_hash[:_SHOWN]}, this model's is "
                f"{model_hash[:_SHOWN]}; calibrate this model, or load the one of the bank (in the same precision)"
            )
        if lost := [file for file in (*files.values(), UNIVERSAL) if not (path / file).is_file()]:
            raise PlanError(f"{path}: the plan file {lost[0]} is missing; calibrate again, or copy the whole folder")
        plans = {task: SkipPlan.load(path / file) for task, file in files.items()}
        return cls(path, plans, SkipPlan.load(path / UNIVERSAL), facts)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks with a plan of their own."""
        return tuple(self.plans)

    def has(self, task: str) -> bool:
        """Whether the task has a plan of its own."""
        return task in self.plans

    def plan_for(self, task: str) -> SkipPlan:
        """The task's plan; the universal one for a task without, which the log says once per task."""
        if task in self.plans:
            return self.plans[task]
        if task not in self._told:
            self._told.add(task)
            log.warning(
                "%s: no plan for the task %r, the universal plan runs; there are plans for %s",
                self.path,
                task,
                ", ".join(self.plans) or "no task",
            )
        return self.universal

    def groups(self, tasks: Sequence[str]) -> list[tuple[SkipPlan, list[int]]]:
        """Rows that run under equal plans.

        Args:
            tasks: of every row.

        Returns:
            Each plan with the indices of its rows, ascending; plans in the order of their first rows.
        """
        grouped: dict[SkipPlan, list[int]] = {}
        for row, task in enumerate(tasks):
            grouped.setdefault(self.plan_for(task), []).append(row)
        return list(grouped.items())

    def run_mixed(self, tasks: Sequence[str], run: Callable[[SkipPlan, list[int]], Sequence[T]]) -> list[T]:
        """Run rows of several tasks, each under its task's plan.

        Args:
            tasks: of every row.
            run: given a plan and the indices of rows, makes one result per row, in their order.

        Returns:
            The results in the order of ``tasks``.

        Raises:
            ValueError: ``run`` made more or fewer results than it was given rows.
        """
        results: dict[int, T] = {}
        for plan, rows in self.groups(tasks):
            made = run(plan, rows)
            if len(made) != len(rows):
                raise ValueError(f"plan {plan.name!r}: {len(made)} results of {len(rows)} rows")
            results.update(zip(rows, made, strict=True))
        return [results[row] for row in range(len(tasks))]


def file_name(task: str) -> str:
    """A file name of its own for every task, on every file system.

    What is not plain (lower-case letters, digits, ``_`` and ``-``) is replaced, and eight digits of a hash keep such
    names apart.
    """
    if _PLAIN.fullmatch(task) and f"{task}.json" not in (INDEX, UNIVERSAL):
        return f"{task}.json"
    plain = re.sub(r"[^a-z0-9_-]+", "-", task.lower()).strip("-")[:50] or "task"
    return f"{plain}-{hashlib.sha256(task.encode()).hexdigest()[:8]}.json"


def _swap(new: Path, path: Path, aside: Path) -> None:
    """Give ``new`` the name ``path``; what stood there stands there again if that fails."""
    if path.exists():
        path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        if aside.exists():
            aside.rename(path)
        raise


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PlanError(f"{path}: no plan bank: it has no {INDEX}; skipvision calibrate writes one") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{file}: not JSON: {error}") from error
    if not isinstance(index, dict) or index.get("format_version") != FORMAT_VERSION:
        found = index.get("format_version") if isinstance(index, dict) else None
        raise PlanError(f"{file}: format_version is {found!r}, expected {FORMAT_VERSION}; calibrate again")
    return index


def _refuse_foreign(path: Path) -> None:
    """Raise PlanError if replacing ``path`` would delete what no bank wrote."""
    if not path.exists():
        return
    if not path.is_dir():
        raise PlanError(f"{path}: stands there and is no folder; give the bank another place")
    held = sorted(entry.name for entry in path.iterdir())
    if foreign := [name for name in held if INDEX not in held or not name.endswith(".json")]:
        raise PlanError(
            f"{path}: holds {foreign[0]}, which is no part of a plan bank and would be deleted with the old bank; "
            "give the bank a folder of its own"
        )
