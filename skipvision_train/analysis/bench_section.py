"""What the report shows of ``skipvision bench``: its table, its trade-off pictures, and where the numbers are from."""

from __future__ import annotations

from typing import Any

from skipvision_train.analysis.figures import embed
from skipvision_train.analysis.tradeoff import COSTS, points_of, tradeoff
from skipvision_train.evaluation.bench_results import BASELINE, BenchResult, Row, bytes_text, is_timed, spread_text
from skipvision_train.evaluation.metrics import Accuracy

Cell = tuple[str, str]
"""What a cell says, and the smaller line below it."""


def bench_section(name: str, result: BenchResult) -> dict[str, Any]:
    """``name``, ``figures``, the header and rows of both tables, and the facts of the run."""
    figures = [
        {**embed(f"Score against {cost}", tradeoff, points, cost, title=""), "caption": "Whiskers: 95 % intervals."}
        for picture, cost in COSTS.items()
        if (points := points_of(result, picture))
    ]
    head = ["plan", "score (%)", "to dense (points)", "other answers", "decoder FLOPs", "KV cache"]
    timed = is_timed(result)
    tasks = list(result.rows[0].tasks)
    return {
        "name": name,
        "figures": figures,
        "columns": head + (["prefill (ms)", "first token (ms)", "per token (ms)"] if timed else []),
        "rows": [{"plan": row.name, "setting": row.setting, "cells": _cells(row, timed)} for row in result.rows],
        "tasks": tasks,
        "task_rows": [
            {"plan": row.name, "cells": [_accuracy(row.tasks[task]) for task in tasks]} for row in result.rows
        ],
        "facts": facts(result),
    }


def _cells(row: Row, timed: bool) -> list[Cell]:
    apart = row.difference
    bounds = f"{100 * apart.low:+.1f} to {100 * apart.high:+.1f}"
    cells = [
        _accuracy(row.mean),
        ("", "") if row.name == BASELINE else (f"{100 * apart.value:+.1f}", bounds),
        (f"{100 * row.changed:.1f} %", ""),
        (f"{100 * row.cost.share:.1f} %", f"{row.cost.flops / 1e9:.3g} GFLOPs"),
        (bytes_text(row.cost.kv_bytes), ""),
    ]
    if timed and row.times is None:
        return [*cells, ("", ""), ("", ""), ("", "")]
    if row.times is not None:
        for spread in (row.times.prefill_ms, row.times.first_token_ms, row.times.decode_ms):
            median, _, rest = spread_text(spread).partition(" (")
            cells.append((median, rest.removesuffix(")")))
    return cells


def _accuracy(value: Accuracy) -> Cell:
    return f"{100 * value.value:.1f}", f"{100 * value.low:.1f} to {100 * value.high:.1f}"


def facts(result: BenchResult) -> list[tuple[str, str]]:
    """What a reader needs to know about the run."""
    shown = []
    for name, value in result.facts.items():
        text = ", ".join(f"{key} {own}" for key, own in value.items()) if isinstance(value, dict) else str(value)
        shown.append((name, text))
    prompt = ", ".join(f"{count:.1f} {kind}" for kind, count in result.prompt.items())
    return [*shown, ("a mean prompt", f"{prompt} tokens"), ("questions", str(len(result.questions)))]
