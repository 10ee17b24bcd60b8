"""What a bench found: its rows, its JSON form ``bench.json``, and its tables ``bench.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipvision_train.errors import DataError, PlanError
from skipvision_train.evaluation.metrics import Accuracy
from skipvision_train.evaluation.timing import PlanTimes, Spread
from skipvision_train.files import read_json, write_json
from skipvision_train.plans.plan import SkipPlan

FORMAT_VERSION = 1
BASELINE = "dense"
"""The row that all others are compared with."""


@dataclass(frozen=True)
class Difference:
    """Of a row's score to the dense row's, question by question, in [-1, 1], with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """Of a mean prompt under a plan, by arithmetic.

    Attributes:
        flops: of the decoder layers in a prefill, 2 per multiply-add.
        share: of the dense decoder's FLOPs.
        kv_bytes: of the cache that decoding keeps, in the model's precision.
        live: positions per kind, mean over layers; lower-case names.
        visual_queries, visual_ffn: shares of the (visual token, layer) pairs that issue a query, that run the FFN.
    """

    flops: float
    share: float
    kv_bytes: float
    live: Mapping[str, float]
    visual_queries: float
    visual_ffn: float


@dataclass(frozen=True)
class Row:
    """What was measured of one plan.

    Attributes:
        name: of the row.
        setting: what the plan does and why, in words.
        plan: as it ran.
        mean: score, the unweighted mean over tasks.
        tasks: score per task.
        difference: to the dense row.
        changed: share of the questions whose answer is another text than the dense row's.
        cost: by arithmetic.
        times: None if nothing was timed.
        scores: of every question, in the order of :attr:`BenchResult.questions`.
    """

    name: str
    setting: str
    plan: SkipPlan
    mean: Accuracy
    tasks: Mapping[str, Accuracy]
    difference: Difference
    changed: float
    cost: Cost
    times: PlanTimes | None
    scores: tuple[float, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Read the JSON form."""
        times = data["times"]
        if times is not None:
            spreads = {k: Spread(**times[k]) for k in ("prefill_ms", "first_token_ms", "decode_ms")}
            times = PlanTimes(**spreads, kv_bytes=times["kv_bytes"])
        return cls(
            name=data["name"],
            setting=data["setting"],
            plan=SkipPlan.from_dict(data["plan"]),
            mean=Accuracy(**data["mean"]),
            tasks={task: Accuracy(**value) for task, value in data["tasks"].items()},
            difference=Difference(**data["difference"]),
            changed=data["changed"],
            cost=Cost(**data["cost"]),
            times=times,
            scores=tuple(data["scores"]),
        )


@dataclass(frozen=True)
class BenchResult:
    """Everything ``skipvision bench`` measured.

    Attributes:
        facts: model, data, device, versions: what a reader needs to know about the run.
        prompt: positions per kind of a mean prompt, lower-case names.
        questions: id and task of every question.
        rows: the dense plan's first.
    """

    facts: Mapping[str, Any]
    prompt: Mapping[str, float]
    questions: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        rows = [{**vars(row), "plan": row.plan.to_dict()} for row in self.rows]
        for row in rows:
            parts = {key: asdict(row[key]) for key in ("mean", "difference", "cost")}
            row |= {**parts, "tasks": {task: asdict(value) for task, value in row["tasks"].items()}}
            row["times"] = row["times"] and asdict(row["times"])
        return {
            "format_version": FORMAT_VERSION,
            "facts": dict(self.facts),
            "prompt": dict(self.prompt),
            "questions": [list(question) for question in self.questions],
            "rows": rows,
        }

    def save(self, path: str | Path) -> None:
        """Write the JSON form; a reader never sees half a file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> BenchResult:
        """Read ``bench.json``, or that of a folder.

        Raises:
            DataError: the file is missing, is no JSON, or is no bench; the message names it.
        """
        path = Path(path) / "bench.json" if Path(path).is_dir() else Path(path)
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION or "rows" not in data:
            raise DataError(f"{path}: not a bench of format_version {FORMAT_VERSION}")
        try:
            rows = tuple(Row.from_dict(row) for row in data["rows"])
            questions = tuple((str(name), str(task)) for name, task in data["questions"])
            return cls(data["facts"], data["prompt"], questions, rows)
        except (KeyError, TypeError, ValueError, PlanError) as error:
            raise DataError(f"{path}: not a bench: {type(error).__name__}: {error}") from error


# --- Markdown ------------------------------------------------------------------------------------------------------


def markdown(result: BenchResult) -> str:
    """``bench.md``: what ran where, the table of plans, the table of tasks."""
    facts = [f"* {name}: {_fact(value)}" for name, value in result.facts.items()]
    prompt = ", ".join(f"{count:.1f} {kind}" for kind, count in result.prompt.items())
    facts.append(f"* a mean prompt: {prompt} tokens; {len(result.questions)} questions")
    return "\n".join(["# Bench", "", *facts, "", *plan_table(result), "", *task_table(result), ""])


def _fact(value: Any) -> str:
    return ", ".join(f"{key} {own}" for key, own in value.items()) if isinstance(value, dict) else str(value)


HEADINGS = (
    "plan",
    "setting",
    "score (%)",
    "to dense (points)",
    "other answers",
    "decoder MFLOPs",
    "of dense",
    "KV cache",
)
TIMED = ("prefill (ms)", "first token (ms)", "per token (ms)")


def plan_cells(result: BenchResult, row: Row) -> list[str]:
    """A row of the table as text; times where there are any."""
    score, apart = row.mean, row.difference
    cells = [
        row.name,
        row.setting,
        f"{100 * score.value:.1f} ({100 * score.low:.1f} to {100 * score.high:.1f})",
        "" if row.name == BASELINE else f"{100 * apart.value:+.1f} ({100 * apart.low:+.1f} to {100 * apart.high:+.1f})",
        f"{100 * row.changed:.1f} %",
        f"{row.cost.flops / 1e6:.4g}",
        f"{100 * row.cost.share:.1f} %",
        bytes_text(row.cost.kv_bytes),
    ]
    if is_timed(result):
        cells += ["", "", ""] if row.times is None else [spread_text(getattr(row.times, name)) for name in TIMES]
    return cells


TIMES = ("prefill_ms", "first_token_ms", "decode_ms")


def is_timed(result: BenchResult) -> bool:
    """Whether any row has times."""
    return any(row.times is not None for row in result.rows)


def plan_table(result: BenchResult) -> list[str]:
    """Lines of Markdown: a row per plan."""
    head = [*HEADINGS, *(TIMED if is_timed(result) else ())]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    return lines + [f"| {' | '.join(plan_cells(result, row))} |" for row in result.rows]


def task_table(result: BenchResult) -> list[str]:
    """Lines of Markdown: a row per plan, a column per task."""
    tasks = list(result.rows[0].tasks)
    lines = [f"| plan | {' | '.join(tasks)} |", "|---|" + "---:|" * len(tasks)]
    for row in result.rows:
        cells = [f"{100 * v.value:.1f} ({100 * v.low:.1f} to {100 * v.high:.1f})" for v in row.tasks.values()]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def spread_text(spread: Spread) -> str:
    """Median, and the fastest and slowest repeat."""
    return f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"


def bytes_text(value: float) -> str:
    """In KiB or MiB."""
    return f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"
