"""Parts of figures that several share: plots below each other, and lines, bands and zeros on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from skipvision_train.analysis.figures import (
    MARKERS,
    Theme,
    label_axes,
    legend_below,
    legend_columns,
    new_figure,
    plain,
    style_axes,
)

DECADES = 8
"""A logarithmic axis reaches at most so far below its largest value: rounding noise is no measurement."""
ZEROS = "0 or off the scale"
"""What the legend calls the triangles."""
LEGEND_ROW = 0.21
"""Inches."""

Pairs = Sequence[Sequence[float]]
"""A lower and an upper bound per point."""


def log_limits(values: Iterable[float], decades: int = DECADES) -> tuple[float, float]:
    """The ends of a logarithmic axis for ``values``: the lower edge is below every value that is drawn as a point.

    Args:
        values: those that are not positive are not drawn as points.
        decades: the axis reaches at most so far below the largest.
    """
    positive = [value for value in values if value > 0]
    top = max(positive, default=1.0)
    return max(min(positive, default=1.0), top * 10**-decades) / 3, top * 2


def panels_below(
    theme: Theme, heights: Sequence[float], labels: Sequence[str], title: str
) -> tuple[Figure, list[Axes]]:
    """Plots of these heights below each other under a title, with room for a legend of ``labels``."""
    rows = math.ceil(len(labels) / legend_columns(labels)) if labels else 0
    figure = new_figure(theme, sum(heights) + 0.3 + LEGEND_ROW * rows)
    # Over the whole figure, not the plot: the names of rows may take a third of the width.
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11, color=theme.text)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    panels = [figure.add_subplot(grid[k, 0]) for k in range(len(heights))]
    for axes in panels:
        style_axes(axes, theme)
    return figure, panels


def log_line(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[float],
    edge: float,
    theme: Theme,
    series: int | None,
    label: str,
    size: float = 3.5,
    width: float = 1.1,
) -> None:
    """A line through the values above ``edge``; open triangles on the edge for the others. ``series`` None: in bold."""
    bold = series is None
    colour = theme.text if series is None else theme.series[series % len(theme.series)]
    marker = "o" if series is None else MARKERS[series % len(MARKERS)]
    shown = [value if value > edge else math.nan for value in values]
    axes.plot(
        x,
        shown,
        color=colour,
        marker=marker,
        markersize=size,
        linewidth=2.6 if bold else width,
        linestyle="-" if series is None or series < len(theme.series) else "--",
        zorder=4 if bold else 3,
        label=label,
    )
    below = [position for position, value in zip(x, values, strict=True) if value <= edge]
    if not below:
        return
    # Unlabelled: the legend explains the triangle once for all lines.
    axes.plot(
        below,
        [edge] * len(below),
        linestyle="none",
        marker="v",
        markersize=7,
        markerfacecolor=theme.background,
        markeredgecolor=colour,
        clip_on=False,
        zorder=5,
    )


def band(
    axes: Axes, x: Sequence[float], bounds: Pairs, edge: float, colour: str, alpha: float, label: str | None = None
) -> None:
    """Fill between the bounds, as far as they lie above ``edge``."""
    low, high = zip(*([max(float(value), edge) for value in pair] for pair in bounds), strict=True)
    visible = [b > edge for b in high]
    axes.fill_between(x, low, high, where=visible, color=colour, alpha=alpha, linewidth=0, label=label, zorder=2)


def shade(axes: Axes, chosen: Sequence[int], theme: Theme) -> None:
    """Grey behind the chosen layers, one rectangle per run of neighbours."""
    label: str | None = "skipped"
    for first, last in runs(chosen):
        axes.axvspan(first - 0.5, last + 0.5, color=theme.grid, alpha=0.75, linewidth=0, label=label, zorder=0)
        label = None


def runs(layers: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every run of neighbouring numbers, ascending."""
    found: list[tuple[int, int]] = []
    for layer in sorted(set(layers)):
        if found and found[-1][1] == layer - 1:
            found[-1] = (found[-1][0], layer)
        else:
            found.append((layer, layer))
    return found


def finish_log(axes: Axes, edge: float, top: float) -> None:
    """Make the y axis logarithmic between its ends; a short one is labelled between the powers of ten, too."""
    axes.set_yscale("log")
    axes.set_ylim(edge, top)
    if top < 100 * edge:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def layer_axis(axes: Axes, num_layers: int, theme: Theme, y: str) -> None:
    """Whole numbers for layers, and the names of both axes."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set_xlim(-0.7, num_layers - 0.3)
    label_axes(axes, theme, "layer", y)


def legend(figure: Figure, axes: Axes, theme: Theme, zeros: bool) -> None:
    """The legend of what ``axes`` shows, and of the triangle if a zero is among it; none for a single entry."""
    handles, labels = axes.get_legend_handles_labels()
    if zeros:
        handles.append(Line2D([], [], linestyle="none", marker="v", markerfacecolor="none", markeredgecolor=theme.text))
        labels.append(ZEROS)
    if len(handles) > 1:
        legend_below(figure, handles, labels, theme)


def flat(rows: Iterable[Sequence[float]]) -> list[float]:
    """All values of all rows."""
    return [float(value) for row in rows for value in row]


def has_zeros(values: Iterable[float], edge: float) -> bool:
    """True if a value is drawn as a triangle."""
    return any(value <= edge for value in values)
