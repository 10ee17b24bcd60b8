"""The trade-off picture: what a plan scores against what it costs, as in Skip-Vision's Figure 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from skipvision_train.analysis.figures import LIGHT, MARKERS, Theme, label_axes, legend_below
from skipvision_train.analysis.panels import panels_below

if TYPE_CHECKING:
    from skipvision_train.evaluation.bench_results import BenchResult


@dataclass(frozen=True)
class Point:
    """A plan in the picture.

    Attributes:
        x: its cost.
        y: its score in per cent.
        low, high: the score's 95 % interval.
        spread: lowest and highest cost; None without any.
    """

    x: float
    y: float
    low: float
    high: float
    spread: tuple[float, float] | None = None


COSTS = {
    "tradeoff": "decoder FLOPs of a prefill (% of dense)",
    "tradeoff_latency": "time to the first token (ms)",
}
"""The pictures by file name, and what their horizontal axis shows."""


def points_of(result: BenchResult, picture: str) -> dict[str, Point]:
    """The rows as points of one of the :data:`COSTS`; rows that were not timed have no latency."""
    points = {}
    for row in result.rows:
        score = (100 * row.mean.value, 100 * row.mean.low, 100 * row.mean.high)
        if picture == "tradeoff":
            points[row.name] = Point(100 * row.cost.share, *score)
        elif row.times is not None:
            time = row.times.first_token_ms
            points[row.name] = Point(time.median, *score, (time.low, time.high))
    return points


def tradeoff(points: Mapping[str, Point], cost: str, theme: Theme = LIGHT, title: str = "") -> Figure:
    """A point per plan, upper left is best; the dashed line marks the first plan's score.

    Args:
        points: by name, the plan that the others are compared with first.
        cost: what the horizontal axis shows.
        theme: appearance.
        title: above the axes.
    """
    figure, (axes,) = panels_below(theme, [3.6], list(points), title or "Score against cost")
    handles = []
    for i, point in enumerate(points.values()):
        colour = theme.text if i == 0 else theme.series[(i - 1) % len(theme.series)]
        sideways = None if point.spread is None else [[point.x - point.spread[0]], [point.spread[1] - point.x]]
        handles.append(
            axes.errorbar(
                [point.x],
                [point.y],
                yerr=[[point.y - point.low], [point.high - point.y]],
                xerr=sideways,
                color=colour,
                marker="*" if i == 0 else MARKERS[(i - 1) % 7],
                markersize=11 if i == 0 else 7,
                linestyle="none",
                elinewidth=0.9,
                capsize=2,
                zorder=4 if i == 0 else 3,
            )
        )
    axes.axhline(next(iter(points.values())).y, color=theme.text, linewidth=0.8, linestyle="--", alpha=0.6)
    label_axes(axes, theme, cost, "score (%), mean over tasks")
    legend_below(figure, handles, list(points), theme)
    return figure


def pictures(result: BenchResult) -> dict[str, Figure]:
    """The pictures of a bench by file name."""
    found: dict[str, Figure] = {}
    for name, cost in COSTS.items():
        if points := points_of(result, name):
            found[name] = tradeoff(points, cost)
    return found
