"""One self-contained HTML page about finished runs: losses, accuracy, cost, calibrations, examples.

Figures and pictures are data URIs, so the file opens from disk and can be mailed. No script runs in it; light and dark
follow the reader's system. Everything that comes from data is escaped by the template engine.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from skipvision_train.analysis.analysis_section import analysis_section
from skipvision_train.analysis.bench_section import bench_section
from skipvision_train.analysis.calibration_report import Calibration, section
from skipvision_train.analysis.figures import data_uri, embed, task_bars
from skipvision_train.analysis.training_figures import training_cards
from skipvision_train.errors import DataError
from skipvision_train.evaluation.bench_results import BenchResult
from skipvision_train.evaluation.metrics import Accuracy
from skipvision_train.evaluation.results import EvaluationResult, Prediction

TEMPLATE = Path(__file__).with_name("report_template.html")
THUMBNAIL = 448
"""Longest side of an embedded picture, in pixels."""


@dataclass(frozen=True)
class ReportInputs:
    """What the report is about.

    Attributes:
        title: heading of the page.
        losses: per stage name, the rows of its ``metrics.jsonl``.
        evaluation: the model under its own plan; None leaves accuracy, cost and examples out.
        others: name in the tables, and the same model under another plan (V-Skip, say).
        calibrations: per name.
        analyses: per name, what an ``analysis.json`` holds.
        benches: per name, plans side by side.
        examples: how many held-out questions are shown.
    """

    title: str
    losses: Mapping[str, Sequence[Mapping[str, Any]]]
    evaluation: EvaluationResult | None = None
    others: Mapping[str, EvaluationResult] = field(default_factory=dict)
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    analyses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    benches: Mapping[str, BenchResult] = field(default_factory=dict)
    examples: int = 12


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``.

    Raises:
        DataError: the file is missing, or a line is no JSON object; the message names both.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; a stage's folder holds metrics.jsonl") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
    return rows


def choose_examples(predictions: Iterable[Prediction], count: int) -> list[Prediction]:
    """``count`` predictions: the tasks in turn, of each task right and wrong ones in turn, in the order given.

    Fewer if there are fewer. Distinct pictures come first, so that no picture repeats while others are left.
    """
    first: dict[tuple[str, ...], Prediction] = {}
    rest = []
    for prediction in predictions:
        if prediction.images and prediction.images in first:
            rest.append(prediction)
        else:
            first[prediction.images or (prediction.record_id,)] = prediction
    queues: dict[str, dict[bool, list[Prediction]]] = {}
    for prediction in [*first.values(), *rest]:
        queues.setdefault(prediction.task, {True: [], False: []})[prediction.correct].append(prediction)
    chosen: list[Prediction] = []
    turn = 0
    while len(chosen) < count and any(right or wrong for right, wrong in (q.values() for q in queues.values())):
        for number, task in enumerate(sorted(queues)):
            preferred = (turn + number) % 2 == 0
            queue = queues[task][preferred] or queues[task][not preferred]
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
        turn += 1
    return chosen


def picture_uri(image: Image.Image) -> str:
    """A picture of at most ``THUMBNAIL`` pixels a side as a PNG data URI."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")


def render_report(inputs: ReportInputs, load_picture: Callable[[str], Image.Image]) -> str:
    """The page as HTML.

    Args:
        inputs: what it is about.
        load_picture: opens an image by the path that the predictions hold.
    """
    evaluation = inputs.evaluation
    predictions = evaluation.predictions if evaluation else ()
    training = {name: training_cards(name, rows) for name, rows in inputs.losses.items()}
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=inputs.title,
        measured=_measured(inputs, evaluation) if evaluation else None,
        losses=[cards[0] for cards in training.values()],
        metrics={name: cards[1:] for name, cards in training.items() if cards[1:]},
        benches=[bench_section(name, result) for name, result in inputs.benches.items()],
        analyses=[analysis_section(name, data) for name, data in inputs.analyses.items()],
        calibrations=[section(name, calibration) for name, calibration in inputs.calibrations.items()],
        examples=[_example(p, load_picture) for p in choose_examples(predictions, inputs.examples)],
        provenance=_provenance(inputs),
    )


def _measured(inputs: ReportInputs, evaluation: EvaluationResult) -> dict[str, Any]:
    """What the page says of accuracy and cost."""
    columns = _columns(inputs, evaluation)
    return {
        "checkpoint": evaluation.checkpoint,
        "recipe": evaluation.recipe,
        "total": evaluation.scores.mean.total,
        "task_count": len(evaluation.scores.tasks),
        "tiles": _tiles(inputs, evaluation),
        "bars": embed("Accuracy per task", task_bars, {n: dict(tasks) for n, (_, tasks) in columns.items()}, title=""),
        "blind_variant": evaluation.blind.variant if evaluation.blind else None,
        "columns": list(columns),
        "rows": _accuracy_rows(columns, evaluation),
        "vision": _flops(evaluation.cost.vision),
        "connector": _flops(evaluation.cost.connector),
        "costs": _cost_rows(inputs, evaluation),
    }


def _columns(inputs: ReportInputs, evaluation: EvaluationResult) -> dict[str, tuple[Accuracy, Mapping[str, Accuracy]]]:
    """Per column of the accuracy table: the mean and the tasks. The model first, blind last."""
    columns = {"model": evaluation.scores} | {name: other.scores for name, other in inputs.others.items()}
    if evaluation.blind:
        columns["blind"] = evaluation.blind.scores
    return {name: (scores.mean, scores.tasks) for name, scores in columns.items()}


def _accuracy_rows(
    columns: Mapping[str, tuple[Accuracy, Mapping[str, Accuracy]]], evaluation: EvaluationResult
) -> list[dict[str, Any]]:
    rows = [
        {
            "task": task,
            "total": own.total,
            "mean": False,
            "cells": [_cell(tasks.get(task)) for _, tasks in columns.values()],
        }
        for task, own in evaluation.scores.tasks.items()
    ]
    mean = evaluation.scores.mean
    cells = [_cell(column_mean) for column_mean, _ in columns.values()]
    return [*rows, {"task": "mean", "total": mean.total, "mean": True, "cells": cells}]


def _cell(value: Accuracy | None) -> dict[str, str] | None:
    if value is None:
        return None
    return {name: f"{100 * getattr(value, name):.1f}" for name in ("value", "low", "high")}


def _tiles(inputs: ReportInputs, evaluation: EvaluationResult) -> list[dict[str, str]]:
    tiles = [("mean accuracy", evaluation.scores.mean.value)]
    tiles += [(f"with {name}", other.scores.mean.value) for name, other in inputs.others.items()]
    if evaluation.blind:
        tiles.append(("without seeing the image", evaluation.blind.scores.mean.value))
    cost = evaluation.cost
    shown = [{"label": label, "value": f"{100 * value:.1f} %"} for label, value in tiles]
    shown.append({"label": "decoder FLOPs, of dense", "value": f"{100 * cost.decoder_plan / cost.decoder_dense:.1f} %"})
    shown.append({"label": "KV cache, of dense", "value": f"{100 * cost.kv_bytes_plan / cost.kv_bytes_dense:.1f} %"})
    return shown


def _cost_rows(inputs: ReportInputs, evaluation: EvaluationResult) -> list[dict[str, Any]]:
    """Per plan: decoder FLOPs, cache, prefill and decode time, each with a note that compares it with dense."""
    own, untimed = evaluation.cost, ("not timed", "")
    rows: list[dict[str, Any]] = []
    if not evaluation.plan.is_dense:
        dense = [(_flops(own.decoder_dense), ""), (_bytes(own.kv_bytes_dense), ""), ("", ""), ("", "")]
        rows.append({"plan": "dense", "cells": dense})
    for name, result in [(evaluation.plan.name, evaluation), *inputs.others.items()]:
        cost, times = result.cost, [untimed, untimed]
        if result.timing:
            plan, full = result.timing["plan"], result.timing["dense"]
            pairs = ((plan.prefill_ms, full.prefill_ms), (plan.decode_ms, full.decode_ms))
            times = [(f"{t:.1f} ms", f"dense {d:.1f} ms") for t, d in pairs]
        decoder = (_flops(cost.decoder_plan), f"{100 * cost.decoder_plan / cost.decoder_dense:.1f} %")
        cache = (_bytes(cost.kv_bytes_plan), f"{100 * cost.kv_bytes_plan / cost.kv_bytes_dense:.1f} %")
        rows.append({"plan": name, "cells": [decoder, cache, *times]})
    return rows


def _flops(value: float) -> str:
    for unit, size in (("TFLOPs", 1e12), ("GFLOPs", 1e9)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e6:.2f} MFLOPs"


def _bytes(value: float) -> str:
    return f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"


def _example(prediction: Prediction, load_picture: Callable[[str], Image.Image]) -> dict[str, Any]:
    return {
        "task": prediction.task,
        "question": prediction.question,
        "answer": prediction.answer,
        "output": prediction.output,
        "correct": prediction.correct,
        "images": [picture_uri(load_picture(path)) for path in prediction.images],
    }


def _provenance(inputs: ReportInputs) -> list[tuple[str, str]]:
    evaluation = inputs.evaluation
    facts: list[tuple[str, str]] = []
    if evaluation:
        facts += [
            ("model", evaluation.checkpoint),
            ("data", evaluation.recipe),
            ("plan", evaluation.plan.name),
            ("tokens per prompt", ", ".join(f"{n:.1f} {kind}" for kind, n in evaluation.cost.tokens.items() if n)),
            ("seed", str(evaluation.seed)),
        ]
    if evaluation and evaluation.blind:
        facts.append(("blind", ", ".join(f"{name} {100 * v:.1f} %" for name, v in evaluation.blind.means.items())))
    facts += [(f"layers of {name}", ", ".join(map(str, c.layers))) for name, c in inputs.calibrations.items()]
    if evaluation:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())))
    return facts
