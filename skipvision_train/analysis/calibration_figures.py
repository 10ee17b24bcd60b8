"""The figures of a calibration: gains per layer, skip maps, seeds, transfer between tasks, curves over the budget.

Like :mod:`skipvision_train.analysis.figures`: functions of plain data, each returning a ``Figure``. Divergences stand
on logarithmic axes. A value of 0 has no logarithm: it is drawn as an open triangle on the lower edge, never left out.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import log
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skipvision_train.analysis.figures import DARK, LIGHT, MARKERS, WIDTH, Theme, label_axes, plain
from skipvision_train.analysis.panels import (
    ZEROS,
    Pairs,
    band,
    finish_log,
    flat,
    has_zeros,
    layer_axis,
    legend,
    log_limits,
    log_line,
    panels_below,
    shade,
)

if TYPE_CHECKING:
    from skipvision_train.calibration.curves import Curve, Point

NATS = "KL divergence (nats)"


def vig_by_task(
    tasks: Mapping[str, Sequence[float]],
    mean: Sequence[float],
    interval: Pairs = (),
    chosen: Sequence[int] = (),
    threshold: float | None = None,
    theme: Theme = LIGHT,
    title: str = "",
    unit: str = "nats",
) -> Figure:
    """Visual Information Gain per layer: a line per task, the mean in bold with its band (V-Skip, Fig. 3).

    Args:
        tasks: per task a score per layer, not negative; a single task, or one whose scores are the mean, is the mean
            itself and is not drawn twice.
        mean: per layer, over all samples, or what else chose the layers.
        interval: per layer, of the mean.
        chosen: layers that skip; shaded.
        threshold: the gain below which a layer skips.
        theme: appearance.
        title: above the axes.
        unit: of the scores; ``nats`` are those of a KL divergence.
    """
    same = [task for task, values in tasks.items() if len(tasks) == 1 or list(values) == list(mean)]
    bold = same[0] if same else "mean"
    lines = {**{task: values for task, values in tasks.items() if task != bold}, bold: mean}
    labels = [*lines, "skipped", "threshold", ZEROS]
    figure, (axes,) = panels_below(theme, [3.3], labels, title or "Visual Information Gain")
    edge, top = log_limits([*flat(lines.values()), *([threshold] if threshold else [])])
    shade(axes, chosen, theme)
    if interval:
        band(axes, range(len(mean)), interval, edge, theme.text, 0.18)
    for i, (name, values) in enumerate(lines.items()):
        log_line(axes, range(len(values)), values, edge, theme, None if name == bold else i, name)
    if threshold:
        axes.axhline(threshold, color=theme.text, linestyle=(0, (4, 3)), linewidth=1.2, label="threshold")
    finish_log(axes, edge, top)
    layer_axis(axes, len(mean), theme, _score_label(unit))
    legend(figure, axes, theme, has_zeros(flat(lines.values()), edge))
    return figure


def functional_asymmetry(
    scores: Mapping[str, Sequence[float]],
    intervals: Mapping[str, Pairs] | None = None,
    theme: Theme = LIGHT,
    title: str = "",
) -> Figure:
    """What skipping attention, FFN or both costs in each layer: attention saturates with depth, the FFN does not.

    Args:
        scores: per part (attention, FFN, block) a score per layer, not negative.
        intervals: per part, if known, lower and upper bound per layer.
        theme: appearance.
        title: above the axes.
    """
    figure, (axes,) = panels_below(theme, [3.1], [*scores, ZEROS], title or "Attention and FFN")
    edge, top = log_limits(flat(scores.values()))
    for i, (name, values) in enumerate(scores.items()):
        if intervals and name in intervals:
            band(axes, range(len(values)), intervals[name], edge, theme.series[i % len(theme.series)], 0.18)
        log_line(axes, range(len(values)), values, edge, theme, i, name, size=4.5, width=1.6)
    finish_log(axes, edge, top)
    layer_axis(axes, max(map(len, scores.values())), theme, NATS)
    legend(figure, axes, theme, has_zeros(flat(scores.values()), edge))
    return figure


def skip_map(
    budgets: Mapping[int, Mapping[str, Sequence[int]]], num_layers: int, theme: Theme = LIGHT, title: str = ""
) -> Figure:
    """Which layers skip, one panel per budget (V-Skip, Fig. 9).

    Args:
        budgets: per number of skipped layers and per row (a task or a strategy) the layers that skip.
        num_layers: depth of the model.
        theme: appearance.
        title: above the panels.
    """
    # 0.3 inches for a panel's heading, and once 0.45 for the layers' numbers and their name.
    heights = [0.3 + 0.45 / len(budgets) + 0.19 * len(rows) for rows in budgets.values()]
    figure, panels = panels_below(theme, heights, [], title or "Layers whose visual attention is skipped")
    colours = ListedColormap([theme.background, theme.series[0]])
    for axes, (budget, rows) in zip(panels, budgets.items(), strict=True):
        cells = [[int(layer in set(layers)) for layer in range(num_layers)] for layers in rows.values()]
        edges_x = [layer - 0.5 for layer in range(num_layers + 1)]
        edges_y = [row - 0.5 for row in range(len(rows) + 1)]
        # Outlined, so that runs of filled cells can be counted.
        axes.pcolormesh(edges_x, edges_y, cells, cmap=colours, vmin=0, vmax=1, edgecolors=theme.grid, linewidth=0.6)
        axes.set_yticks(range(len(rows)), list(map(plain, rows)))
        axes.tick_params(length=0, labelsize=9)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_title(f"N = {budget}", loc="left", fontsize=10, color=theme.text, pad=3)
        axes.tick_params(labelbottom=axes is panels[-1])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        axes.set_xlim(-0.5, num_layers - 0.5)
    label_axes(panels[-1], theme, "layer (filled: skipped)", "")
    return figure


def seed_bands(
    scores: Sequence[Sequence[float]],
    chosen: Sequence[Sequence[int]],
    theme: Theme = LIGHT,
    title: str = "",
    unit: str = "nats",
) -> Figure:
    """How much the draw of the samples matters: scores over seeds, and how often each layer is chosen (V-Skip, Fig. 5).

    Args:
        scores: per seed a score per layer, not negative.
        chosen: per seed the layers that skip.
        theme: appearance.
        title: above the panels.
        unit: of the scores; ``nats`` are those of a KL divergence.
    """
    labels = ["mean", "standard deviation", "least to most", ZEROS]
    figure, (axes, bars) = panels_below(theme, [2.8, 1.2], labels, title or f"Scores over seeds ({len(scores)})")
    layers = list(zip(*scores, strict=True))
    mean = [statistics.fmean(values) for values in layers]
    deviation = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in layers]
    edge, top = log_limits(flat(scores))
    extremes = [(min(values), max(values)) for values in layers]
    around = [(m - d, m + d) for m, d in zip(mean, deviation, strict=True)]
    if len(scores) > 1:
        band(axes, range(len(mean)), extremes, edge, theme.series[0], 0.2, "least to most")
        band(axes, range(len(mean)), around, edge, theme.series[0], 0.4, "standard deviation")
    log_line(axes, range(len(mean)), mean, edge, theme, None, "mean", size=3)
    finish_log(axes, edge, top)
    label_axes(axes, theme, "", _score_label(unit))
    axes.tick_params(labelbottom=False)
    axes.sharex(bars)
    counts = [sum(layer in picked for picked in chosen) for layer in range(len(mean))]
    bars.bar(range(len(mean)), counts, width=0.8, color=theme.series[1], edgecolor=theme.background, linewidth=0.5)
    bars.set_ylim(0, len(chosen))
    bars.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    layer_axis(bars, len(mean), theme, "times chosen")
    legend(figure, axes, theme, has_zeros(mean, edge))
    return figure


def transfer_matrix(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    quantity: str = "kl",
    theme: Theme = LIGHT,
    title: str = "",
) -> Figure:
    """What a plan found on one task does on another (V-Skip, Fig. 7); the best of each column is bold.

    Args:
        values: per task calibrated on, per task evaluated on; None where nothing was measured.
        rows: tasks calibrated on.
        columns: tasks evaluated on.
        quantity: ``kl`` (nats, less is better, colours by the logarithm) or ``accuracy`` (a share, shown in %).
        theme: appearance.
        title: above the matrix.

    Raises:
        ValueError: an unknown quantity, or ``values`` of another shape.
    """
    if quantity not in ("kl", "accuracy"):
        raise ValueError(f"quantity: {quantity!r} is unknown; use kl or accuracy")
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise ValueError(f"values are not of {len(rows)} rows and {len(columns)} columns")
    known = NATS if quantity == "kl" else "Accuracy (%)"
    heading = title or f"{known} of one task's plan on another"
    figure, (axes,) = panels_below(theme, [1.0 + max(1.0, 0.42 * len(rows))], [], heading)
    colours = LinearSegmentedColormap.from_list("of the theme", [theme.background, theme.series[0]])
    shares = _shares(values, quantity)
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto")
    texts, size = _cell_texts(values, quantity, 72 * (WIDTH - 0.6 - 0.08 * max(map(len, rows))) / len(columns))
    best = [_best((row[k] for row in values), quantity) for k in range(len(columns))]
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            weight = "bold" if value is not None and value == best[x] else "normal"
            colour = _readable(colours(shares[y][x]))
            axes.text(x, y, texts[y][x], ha="center", va="center", fontsize=size, color=colour, weight=weight)
    names = list(map(plain, columns))
    if max(map(len, columns)) * len(columns) > 50:
        axes.set_xticks(range(len(columns)), names, rotation=40, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(columns)), names)
    axes.set_yticks(range(len(rows)), list(map(plain, rows)))
    axes.tick_params(length=0, labelsize=9.5)
    axes.grid(visible=False)
    label_axes(axes, theme, "evaluated on", "calibrated on")
    return figure


def budget_curves(curves: Sequence[Curve], against: str = "n", theme: Theme = LIGHT, title: str = "") -> Figure:
    """Divergence and accuracy of several methods over their budget; without any accuracy, the divergence alone.

    Args:
        curves: one per method; intervals are drawn as bands. :func:`join_seeds` makes one of several random ones.
        against: ``n``, layers skipped, or ``flops_ratio``, prefill FLOPs.
        theme: appearance.
        title: above the panels.

    Raises:
        ValueError: ``against`` is something else.
    """
    names = {"n": "layers skipped", "flops_ratio": "prefill FLOPs (% of dense)"}
    if against not in names:
        raise ValueError(f"against: {against!r} is unknown; use {' or '.join(names)}")
    measured = any(point.accuracy for curve in curves for point in curve.points)
    labels = [*(curve.name for curve in curves), ZEROS]
    heights = [2.9, 2.4] if measured else [2.9]
    figure, panels = panels_below(theme, heights, labels, title or "What skipping costs")
    divergences = [point.kl.value for curve in curves for point in curve.points]
    edge, top = log_limits(divergences)
    for i, curve in enumerate(curves):
        points = sorted(curve.points, key=lambda point: _budget(point, against))
        x = [_budget(point, against) for point in points]
        colour = theme.series[i % len(theme.series)]
        band(panels[0], x, [(point.kl.low, point.kl.high) for point in points], edge, colour, 0.15)
        log_line(panels[0], x, [point.kl.value for point in points], edge, theme, i, curve.name, size=4.5, width=1.5)
        if measured:
            _accuracy_line(panels[1], points, against, theme, i)
    finish_log(panels[0], edge, top)
    label_axes(panels[0], theme, "" if measured else names[against], NATS)
    if measured:
        panels[0].tick_params(labelbottom=False)
        panels[0].sharex(panels[1])
        label_axes(panels[1], theme, names[against], "accuracy (%)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=against == "n"))
    legend(figure, panels[0], theme, has_zeros(divergences, edge))
    return figure


def join_seeds(curves: Sequence[Curve]) -> list[Curve]:
    """Curves that differ in a seed at the end of their name (``V-Skip random 0``, ``V-Skip random 1``) become one.

    Its values are means over the seeds, its intervals reach from the least to the most of them. A lone curve keeps its
    own intervals. The order is that of each name's first curve.

    Raises:
        ValueError: the seeds of one name have other N.
    """
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(re.sub(r" \d+$", "", curve.name), []).append(curve)
    joined = []
    for name, group in groups.items():
        if len({tuple(point.n for point in curve.points) for curve in group}) > 1:
            raise ValueError(f"{name}: its seeds were measured at different numbers of layers")
        points = [_join(same) for same in zip(*(curve.points for curve in group), strict=True)]
        joined.append(replace(group[0], name=name, points=tuple(points)))
    return joined


def _score_label(unit: str) -> str:
    return NATS if unit == "nats" else unit


def _join(points: Sequence[Point]) -> Point:
    if len(points) == 1:
        return points[0]
    values = [point.kl.value for point in points]
    kl = replace(points[0].kl, value=statistics.fmean(values), low=min(values), high=max(values))
    known = [point.accuracy for point in points if point.accuracy]
    accuracy = None
    if known:
        shares = [own.value for own in known]
        accuracy = replace(known[0], value=statistics.fmean(shares), low=min(shares), high=max(shares))
    return replace(points[0], kl=kl, accuracy=accuracy)


def _budget(point: Point, against: str) -> float:
    return point.n if against == "n" else 100 * point.flops_ratio


def _accuracy_line(axes: Axes, points: Sequence[Point], against: str, theme: Theme, series: int) -> None:
    known = [(_budget(point, against), point.accuracy) for point in points if point.accuracy]
    x = [budget for budget, _ in known]
    colour = theme.series[series % len(theme.series)]
    low, high = [100 * own.low for _, own in known], [100 * own.high for _, own in known]
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    shares = [100 * own.value for _, own in known]
    axes.plot(x, shares, color=colour, marker=MARKERS[series % len(MARKERS)], markersize=4.5, linewidth=1.5)


def _shares(values: Sequence[Sequence[float | None]], quantity: str) -> list[list[float]]:
    """Per value its place between the least and the largest, 0 to 1; divergences by their logarithm, unknown ones 0."""
    known = [value for row in values for value in row if value is not None and (quantity != "kl" or value > 0)]
    least, most = min(known, default=1.0), max(known, default=1.0)

    def share(value: float | None) -> float:
        if value is None or most == least or value <= least:
            return 0.0
        return log(value / least) / log(most / least) if quantity == "kl" else (value - least) / (most - least)

    return [[share(value) for value in row] for row in values]


def _cell_texts(values: Sequence[Sequence[float | None]], quantity: str, width: float) -> tuple[list[list[str]], float]:
    """What stands in the cells, and its size in points: two digits, or one if two get too small in ``width`` points."""

    def text(value: float | None, digits: int) -> str:
        if value is None:
            return "n/a"
        if quantity != "kl":
            return f"{100 * value:.1f}"
        if 0 < value < 10.0**-digits / 10:
            mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
            return f"{mantissa}e{int(exponent)}"
        return f"{value:.{digits}g}"

    for digits in (2, 1):
        texts = [[text(value, digits) for value in row] for row in values]
        # A bold figure is 0.68 em wide.
        size = min(9.5, 0.9 * width / (0.68 * max(len(cell) for row in texts for cell in row)))
        if size > 6:
            break
    return texts, size


def _best(column: Iterable[float | None], quantity: str) -> float | None:
    known = [value for value in column if value is not None]
    return (min if quantity == "kl" else max)(known, default=None)


def _readable(background: tuple[float, ...]) -> str:
    """Dark or light text, whichever stands out more from an RGB colour (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return LIGHT.text if luminance > 0.18 else DARK.text
