"""What the report shows of a calibration: its files are read, its figures and its table are made.

A calibration's folder holds ``vig.json`` (``scores`` and ``layers``, and ``threshold`` if there was one). Beside it may
stand, each showing what it holds:

* ``scores.json`` and ``scores_<strategy>.json``: a :class:`ScoreTable` each;
* ``seeds.json``: ``scores`` and ``layers``, both with one list per seed;
* ``curves.json``: ``curves``, a list of :class:`Curve`;
* ``transfer.json``: ``calibrated_on`` and ``evaluated_on``, names of tasks, with ``kl`` or ``accuracy`` or both: one
  list per task calibrated on, null where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isclose
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from skipvision_train.analysis.calibration_figures import (
    budget_curves,
    functional_asymmetry,
    join_seeds,
    seed_bands,
    skip_map,
    transfer_matrix,
    vig_by_task,
)
from skipvision_train.analysis.figures import embed, vig_profile
from skipvision_train.calibration.curves import Curve
from skipvision_train.calibration.scores import STRATEGIES, ScoreTable, strategy_named
from skipvision_train.calibration.search import select_layers
from skipvision_train.errors import DataError
from skipvision_train.files import read_json
from skipvision_train.folders import require_whole

PARTS = {"vig": "attention", "vig_ffn": "FFN", "vig_block": "attention and FFN"}
"""Strategies of one criterion that differ in what they switch off."""

T = TypeVar("T")


@dataclass(frozen=True)
class Seeds:
    """Calibrations that differ in the draw: per seed a score per layer, and the layers chosen."""

    scores: Sequence[Sequence[float]]
    layers: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Transfer:
    """Plans of one task under the samples of another: rows calibrated on, columns evaluated on; per quantity."""

    calibrated_on: Sequence[str]
    evaluated_on: Sequence[str]
    values: Mapping[str, Sequence[Sequence[float | None]]]


@dataclass(frozen=True)
class Calibration:
    """A finished calibration.

    Attributes:
        scores: per layer, those that the plan was made from.
        layers: that skip.
        threshold: the gain below which a layer skips; None: chosen otherwise.
        tables: per strategy, its scores per sample; that of the plan comes first.
        seeds: None: there was one.
        curves: one per method.
        transfer: None: not measured.
    """

    scores: Sequence[float]
    layers: Sequence[int]
    threshold: float | None = None
    tables: Mapping[str, ScoreTable] = field(default_factory=dict)
    seeds: Seeds | None = None
    curves: Sequence[Curve] = ()
    transfer: Transfer | None = None


def read_calibration(path: str | Path) -> Calibration:
    """What stands in a calibration's folder, or in a ``vig.json`` alone.

    Raises:
        DataError: a file is missing or holds something else, or not all of them were written; the message names it.
    """
    path = Path(path)
    if not path.is_dir():
        return Calibration(**_read(path, _profile))
    require_whole(path, "calibrate")
    profile = _read(path / "vig.json", _profile)
    depth = len(profile["scores"])
    found = [path / "scores.json", *(path / f"scores_{name}.json" for name in STRATEGIES)]
    tables = [_read(file, partial(_table, depth=depth)) for file in found if file.is_file()]
    seeds, curves, transfer = (path / f"{name}.json" for name in ("seeds", "curves", "transfer"))
    return Calibration(
        **profile,
        tables={table.strategy: table for table in tables},
        seeds=_read(seeds, partial(_seeds, depth=depth)) if seeds.is_file() else None,
        curves=_read(curves, _curves) if curves.is_file() else (),
        transfer=_read(transfer, _transfer) if transfer.is_file() else None,
    )


def _read(path: Path, parse: Callable[[Any], T]) -> T:
    data = read_json(path)
    try:
        return parse(data)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not what a calibration writes: {reason}") from error


def _table(data: Any, depth: int) -> ScoreTable:
    table = ScoreTable.from_dict(data)
    strategy_named(table.strategy)  # refuses one that this version does not know
    if table.values.shape != (depth, len(table.tasks)):
        shape = tuple(table.values.shape)
        raise ValueError(f"values are of shape {shape}, with {depth} layers and {len(table.tasks)} samples")
    return table


def _seeds(data: Any, depth: int) -> Seeds:
    if any(len(scores) != depth for scores in data["scores"]) or len(data["scores"]) != len(data["layers"]):
        raise ValueError(f"needs {depth} scores, and the layers, for every seed")
    return Seeds(data["scores"], data["layers"])


def _curves(data: Any) -> list[Curve]:
    return join_seeds([Curve.from_dict(curve) for curve in data["curves"]])


def _profile(data: Any) -> dict[str, Any]:
    return {"scores": data["scores"], "layers": data["layers"], "threshold": data.get("threshold")}


def _transfer(data: Any) -> Transfer:
    rows, columns = data["calibrated_on"], data["evaluated_on"]
    values = {quantity: data[quantity] for quantity in ("kl", "accuracy") if data.get(quantity) is not None}
    for quantity, matrix in values.items():
        if len(matrix) != len(rows) or any(len(row) != len(columns) for row in matrix):
            raise ValueError(f"{quantity} is not of {len(rows)} rows and {len(columns)} columns")
    return Transfer(rows, columns, values)


def budgets_for(num_layers: int) -> list[int]:
    """How many layers the skip map skips: the paper's 5, 10, 15 and 20, or quarters of a shallower model."""
    return [5, 10, 15, 20] if num_layers > 20 else sorted({num_layers * k // 4 for k in (1, 2, 3)} - {0})


def skipped_by_budget(
    scores: Mapping[str, Sequence[float]], budgets: Sequence[int]
) -> dict[int, dict[str, tuple[int, ...]]]:
    """Per budget and row (a task, a strategy) the layers of the smallest scores.

    Raises:
        ConfigError: a budget above the depth, or a score that is not finite.
    """
    return {n: {name: select_layers(values, n) for name, values in scores.items()} for n in budgets}


def task_scores(table: ScoreTable) -> dict[str, list[float]]:
    """Per task its mean score per layer, in alphabetical order; samples that name none come last, as one.

    Empty where no sample names a task: then the mean over all samples says it all.
    """
    tasks = sorted(set(table.tasks) - {""})
    found = {task: table.mean(task).tolist() for task in tasks}
    if tasks and "" in table.tasks:
        found["without a task"] = table.mean("").tolist()
    return found


def score_intervals(table: ScoreTable, scores: Sequence[float]) -> list[list[float]]:
    """Of scores that are the mean over all samples, or over a task's, per layer; empty where they are something else,
    as a mean over tasks of unequal size."""
    for task in (None, *sorted(set(table.tasks))):
        if all(isclose(a, b, rel_tol=1e-6) for a, b in zip(table.mean(task).tolist(), scores, strict=True)):
            return table.interval(task).tolist()
    return []


def section(name: str, calibration: Calibration) -> dict[str, Any]:
    """What the template shows of a calibration: ``name``, ``figures``, and the table of its layers."""
    tasks = _task_scores(calibration)
    figures = [
        _profile_figure(name, calibration, tasks),
        *_asymmetry_figures(calibration),
        *_choice_figures(calibration, tasks),
        *_curve_figures(calibration),
        *_transfer_figures(calibration),
    ]
    return {"name": name, "figures": figures, **layer_table(calibration)}


def layer_table(calibration: Calibration) -> dict[str, Any]:
    """``columns``, and a row per layer: its score, the score's interval where it is known, each task's if several."""
    tasks, intervals = _task_scores(calibration), _intervals(calibration)
    shown = tasks if len(tasks) > 1 else {}
    rows = [
        {
            "layer": layer,
            "score": f"{score:.2e}",
            "interval": [f"{bound:.1e}" for bound in intervals[layer]] if intervals else [],
            "tasks": [f"{values[layer]:.2e}" for values in shown.values()],
            "skipped": layer in calibration.layers,
        }
        for layer, score in enumerate(calibration.scores)
    ]
    return {"columns": ["layer", "score", *shown, ""], "rows": rows}


def _main(calibration: Calibration) -> ScoreTable | None:
    return next(iter(calibration.tables.values()), None)


def _unit(calibration: Calibration) -> str:
    main = _main(calibration)
    return STRATEGIES[main.strategy].unit if main else "nats"


def _task_scores(calibration: Calibration) -> dict[str, list[float]]:
    """:func:`task_scores` under the plan's strategy; none without a table."""
    main = _main(calibration)
    return task_scores(main) if main else {}


def _intervals(calibration: Calibration) -> list[list[float]]:
    main = _main(calibration)
    return score_intervals(main, calibration.scores) if main else []


def _card(caption: str, alt: str, draw: Callable[..., Figure], *data: Any, **options: Any) -> dict[str, str]:
    return {**embed(alt, draw, *data, **options), "caption": caption}


def _profile_figure(name: str, calibration: Calibration, tasks: Mapping[str, Sequence[float]]) -> dict[str, str]:
    main = _main(calibration)
    if main is None:
        return _card("", f"Score per layer, {name}", vig_profile, calibration.scores, calibration.layers, title=name)
    given = (tasks, calibration.scores, _intervals(calibration), calibration.layers, calibration.threshold)
    return _card("", f"Score per layer and task, {name}", vig_by_task, *given, title=name, unit=_unit(calibration))


def _asymmetry_figures(calibration: Calibration) -> list[dict[str, str]]:
    parts = {part: calibration.tables[key] for key, part in PARTS.items() if key in calibration.tables}
    if len(parts) < 2:
        return []
    means = {part: table.mean().tolist() for part, table in parts.items()}
    intervals = {part: table.interval().tolist() for part, table in parts.items()}
    caption = "What is lost when visual tokens skip a part of one layer."
    return [_card(caption, "Loss per layer without attention, FFN or both", functional_asymmetry, means, intervals)]


def _choice_figures(calibration: Calibration, tasks: Mapping[str, Sequence[float]]) -> list[dict[str, str]]:
    """The skip map and the seeds."""
    figures, depth, main = [], len(calibration.scores), _main(calibration)
    mean = calibration.scores if main is None else main.mean().tolist()
    rows = {**tasks, "all samples": mean} if len(tasks) != 1 else tasks
    if budgets := budgets_for(depth):
        caption = "The layers of the smallest scores, by their number N."
        chosen = skipped_by_budget(rows, budgets)
        figures.append(_card(caption, "Layers that skip, by budget", skip_map, chosen, depth))
    if seeds := calibration.seeds:
        caption = "Calibrations that differ in the draw of the samples; bars: how many of them choose the layer."
        figures.append(
            _card(
                caption, "Scores per layer over seeds", seed_bands, seeds.scores, seeds.layers, unit=_unit(calibration)
            )
        )
    return figures


def _curve_figures(calibration: Calibration) -> list[dict[str, str]]:
    if not calibration.curves:
        return []
    caption = "Bands: 95 % intervals; of random choices, the least to the most of the seeds."
    alts = {"n": "KL and accuracy over the number of skipped layers", "flops_ratio": "KL and accuracy over FLOPs"}
    return [_card(caption, alt, budget_curves, calibration.curves, against) for against, alt in alts.items()]


def _transfer_figures(calibration: Calibration) -> list[dict[str, str]]:
    if calibration.transfer is None:
        return []
    rows, columns = calibration.transfer.calibrated_on, calibration.transfer.evaluated_on
    return [
        _card("Bold: the best plan of the column.", f"Transfer, {name}", transfer_matrix, values, rows, columns, name)
        for name, values in calibration.transfer.values.items()
    ]
