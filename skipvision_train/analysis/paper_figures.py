"""The figures of a checkpoint's analysis, after Skip-Vision's Figures 2, 3, 5, and its error bound.

Like :mod:`skipvision_train.analysis.figures`: functions of plain data, each returning a ``Figure``. Kinds of tokens
have the same colour in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from skipvision_train.analysis.figures import LIGHT, MARKERS, Theme, label_axes, legend_below
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
)

SERIES = {"text": 0, "skipped": 1, "generated": 2, "retained": 3, "summary": 4, "middle": 5}
"""The colour of every kind, as an index into a theme's series."""

SHARES = ("visual_ffn", "text_ffn", "projections", "attention")
SHARE_NAMES = ("FFN of visual tokens", "FFN of text", "Q, K, V, O", "attention")
GRID = 1000
"""Points of a density, from -1 to 1."""
VISIBLE = 0.005
"""The axis reaches as far as a density is above this share of its peak."""
ERROR_DECADES = 6
"""Further below the largest error is what rounding in fp32 leaves where nothing was skipped yet."""


def flops_share(
    visual_tokens: Sequence[float], shares: Mapping[str, Sequence[float]], theme: Theme = LIGHT, title: str = ""
) -> Figure:
    """Where the decoder's FLOPs go as an image has more tokens, as stacked areas (Figure 2).

    Args:
        visual_tokens: ascending, positive.
        shares: for each of ``SHARES`` a share of 1 per number of visual tokens.
        theme: appearance.
        title: above the axes.
    """
    figure, (axes,) = panels_below(theme, [3.0], SHARE_NAMES, title or "FLOPs of the decoder")
    order = (1, 0, 5, 2)
    colours = [theme.series[i] for i in order]
    values = [[100 * share for share in shares[name]] for name in SHARES]
    axes.stackplot(visual_tokens, values, labels=SHARE_NAMES, colors=colours, alpha=0.85, linewidth=0)
    axes.plot(visual_tokens, values[0], color=theme.text, linewidth=1.4, marker="o", markersize=3.5)
    axes.set_ylim(0, 100)
    if len(visual_tokens) > 1:
        axes.set_xlim(min(visual_tokens), max(visual_tokens))
    if max(visual_tokens) > 20 * min(visual_tokens):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
    label_axes(axes, theme, "visual tokens", "share of FLOPs (%)")
    legend_below(figure, *axes.get_legend_handles_labels(), theme)
    return figure


def ffn_impact(
    means: Mapping[str, Sequence[float]],
    intervals: Mapping[str, Pairs],
    names: Mapping[str, str] | None = None,
    theme: Theme = LIGHT,
    title: str = "",
) -> Figure:
    """The FFN's update over what it is added to, per layer and kind of token (Figure 3).

    Args:
        means: per kind a ratio per layer.
        intervals: per kind lower and upper bound per layer.
        names: what the legend calls a kind, where not by its name.
        theme: appearance.
        title: above the axes.
    """
    labels = [(names or {}).get(kind, kind) for kind in means]
    figure, (axes,) = panels_below(theme, [3.1], [*labels, ZEROS], title or "FFN impact")
    edge, top = log_limits(flat(means.values()))
    for (kind, values), label in zip(means.items(), labels, strict=True):
        band(axes, range(len(values)), intervals[kind], edge, theme.series[SERIES[kind]], 0.2)
        log_line(axes, range(len(values)), values, edge, theme, SERIES[kind], label, size=4.5, width=1.6)
    finish_log(axes, edge, top)
    layer_axis(axes, max(map(len, means.values())), theme, "||FFN(h)|| / ||h||")
    legend(figure, axes, theme, has_zeros(flat(means.values()), edge))
    return figure


def density(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """A Gaussian kernel density of values from -1 to 1: positions and density.

    On ``GRID`` points between -1 and 1 and as far beyond as the kernels of values there reach, so that it ends near 0.

    The width is Silverman's, 0.9 min(deviation, quartile range / 1.34) n^(-1/5), at least two points.

    Raises:
        ValueError: no values.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("a density needs at least one value")
    edges = np.linspace(-1, 1, GRID + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    counts, _ = np.histogram(found.clip(-1, 1), edges)
    quartiles = np.quantile(found, [0.25, 0.75])
    spread = min(found.std(), (quartiles[1] - quartiles[0]) / 1.34) or found.std()
    width = max(0.9 * spread * len(found) ** -0.2, 4 / GRID)
    used = counts > 0
    beyond = math.ceil(4 * width * GRID / 2)
    places = (2 * np.arange(-beyond, GRID + beyond) + 1) / GRID - 1
    kernel = np.exp(-(((places[:, None] - centres[None, used]) / width) ** 2) / 2)
    heights = kernel @ counts[used] / (len(found) * width * math.sqrt(2 * math.pi))
    return places.tolist(), heights.tolist()


def similarity_density(
    levels: Mapping[str, Sequence[float]], means: Mapping[str, float], theme: Theme = LIGHT, title: str = ""
) -> Figure:
    """The distribution of the tokens' mean similarity to the others of their level (Figure 5); dashed: the means.

    Args:
        levels: per level, coarsest first, a value per token; at least one.
        means: per level.
        theme: appearance.
        title: above the axes.
    """
    labels = [f"{name}: mean {means[name]:.2f}" for name in levels]
    figure, (axes,) = panels_below(theme, [3.0], labels, title or "Similarity of visual tokens")
    ends: list[float] = []
    for i, ((name, values), label) in enumerate(zip(levels.items(), labels, strict=True)):
        x, y = density(values)
        visible = [place for place, height in zip(x, y, strict=True) if height > VISIBLE * max(y)]
        ends += [visible[0], visible[-1], min(values), max(values)]
        colour = theme.series[i % len(theme.series)]
        style = "-" if i < len(theme.series) else "--"
        axes.plot(x, y, color=colour, linewidth=1.8, linestyle=style, label=label)
        axes.fill_between(x, y, color=colour, alpha=0.15, linewidth=0)
        axes.axvline(means[name], color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    room = 0.02 * (max(ends) - min(ends)) + 0.01
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_ylim(bottom=0)
    label_axes(axes, theme, "mean cosine similarity to the other tokens", "density")
    legend_below(figure, *axes.get_legend_handles_labels(), theme)
    return figure


def attention_mass(
    mass: Mapping[str, Sequence[float]],
    names: Mapping[str, str] | None = None,
    theme: Theme = LIGHT,
    title: str = "",
) -> Figure:
    """How the attention of generated tokens divides among kinds of tokens, as stacked bars per layer.

    Args:
        mass: per kind a share of 1 per layer.
        names: what the legend calls a kind, where not by its name.
        theme: appearance.
        title: above the axes.
    """
    labels = [(names or {}).get(kind, kind) for kind in mass]
    figure, (axes,) = panels_below(theme, [2.8], labels, title or "Attention of generated tokens")
    depth = max(map(len, mass.values()))
    base = [0.0] * depth
    for (kind, values), label in zip(mass.items(), labels, strict=True):
        percent = [100 * value for value in values]
        colour = theme.series[SERIES[kind]]
        axes.bar(range(depth), percent, 0.86, bottom=base, color=colour, label=label, linewidth=0)
        base = [below + value for below, value in zip(base, percent, strict=True)]
    axes.set_ylim(0, 100)
    layer_axis(axes, depth, theme, "attention (%)")
    legend_below(figure, *axes.get_legend_handles_labels(), theme)
    return figure


def error_bound(
    bounds: Mapping[str, Sequence[float]],
    log10_error: Sequence[float],
    measured: Mapping[str, Sequence[float]],
    constants: Mapping[str, Sequence[float]],
    theme: Theme = LIGHT,
    title: str = "",
) -> Figure:
    """Bounds behind every layer, the errors that are measured there, and the constants that the bounds are made of.

    Args:
        bounds: per line log10 of a bound per layer, -inf for none.
        log10_error: log10 per layer of the measured error that they bound, -inf for none: drawn among the bounds, in
            the style of the first of ``measured``.
        measured: per line an error per layer, not negative.
        constants: per line a constant per layer, positive.
        theme: appearance.
        title: above the panels.
    """
    labels = [*bounds, *measured, *constants, ZEROS]
    figure, panels = panels_below(theme, [2.1, 2.0, 1.3], labels, title or "Error of skipped FFNs")
    depth = max(map(len, bounds.values()))
    first = len(bounds)
    for i, (name, values) in enumerate([*bounds.items(), ("_", log10_error)]):  # "_" hides a line from the legend
        shown = [value if math.isfinite(value) else math.nan for value in values]
        colour, marker = theme.series[i], MARKERS[i]
        panels[0].plot(range(depth), shown, color=colour, marker=marker, markersize=4, linewidth=1.6, label=name)
    panels[0].yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:.4g}}}$"))
    for axes, lines in zip(panels[1:], (measured, constants), strict=True):
        edge, top = log_limits(flat(lines.values()), ERROR_DECADES)
        for i, (name, values) in enumerate(lines.items(), start=first):
            log_line(axes, range(depth), values, edge, theme, i, name, size=4, width=1.6)
        finish_log(axes, edge, top)
        first += len(lines)
        if lines is constants and edge < 1 < top:
            axes.axhline(1, color=theme.text, linewidth=1, linestyle=(0, (4, 3)))
    for axes, name in zip(panels, ("error and bounds", "error", "constant"), strict=True):
        layer_axis(axes, depth, theme, name)
        if axes is not panels[-1]:
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)
    entries = [axes.get_legend_handles_labels() for axes in panels]
    handles = [handle for pair in entries for handle in pair[0]]
    names = [name for pair in entries for name in pair[1]]
    if has_zeros(flat(measured.values()), log_limits(flat(measured.values()), ERROR_DECADES)[0]):
        handles.append(Line2D([], [], linestyle="none", marker="v", markerfacecolor="none", markeredgecolor=theme.text))
        names.append(ZEROS)
    legend_below(figure, handles, names, theme)
    return figure
