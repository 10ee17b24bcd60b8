"""Maps of what generated tokens attend to, over the positions of the image (after Skip-Vision's Figures 7 and 8).

Like :mod:`skipvision_train.analysis.paper_figures`, whose colours of kinds they share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from skipvision_train.analysis.figures import LIGHT, Theme, label_axes, legend_below, new_figure, plain, style_axes
from skipvision_train.analysis.paper_figures import SERIES

DECADES = 4
"""A map's colours reach at most so far below its largest value."""
COLUMNS = 240
"""How many columns a map has at most, about."""
NARROWEST = 0.025
"""A run of one kind takes at least this share of the positions' width."""
TICK = 0.07
"""What a tick label takes of a map's width."""


@dataclass(frozen=True)
class ImageSpan:
    """The positions that a map shows, in columns.

    A run of one kind that is short next to the others is drawn wider, so that a summary token between hundreds of
    others can be seen; more positions than ``COLUMNS`` are averaged, each run by itself.

    Attributes:
        kinds: the kind of every position.
        first: the first one's position in the prompt.
        names: what the legend calls a kind, where not by its name.
    """

    kinds: Sequence[str]
    first: int
    names: Mapping[str, str]

    def present(self) -> list[str]:
        """Kinds that occur, in order of first appearance."""
        return list(dict.fromkeys(self.kinds))

    def labels(self) -> list[str]:
        """The same as the legend calls them."""
        return [self.names.get(kind, kind) for kind in self.present()]

    def runs(self) -> list[Run]:
        """The runs of positions of one kind."""
        total, start, left, found = len(self.kinds), 0, 0.0, []
        for kind, group in groupby(self.kinds):
            count = len(list(group))
            columns = count if total <= COLUMNS else max(1, round(count * COLUMNS / total))
            run = Run(kind, start, count, columns, left, max(count, total * NARROWEST))
            start, left = start + count, left + run.width
            found.append(run)
        return found

    def pooled(self, rows: Sequence[Sequence[float]]) -> np.ndarray:
        """(rows, columns): the means of the positions that share a column."""
        values = np.asarray(rows, dtype=np.float64)
        cuts = [cut for run in self.runs() for cut in run.cuts()]
        return np.stack([values[:, a:b].mean(1) for a, b in cuts], axis=1)

    def edges(self) -> list[float]:
        """Left edges of all columns, and the right edge of the last."""
        runs = self.runs()
        left = [run.left + run.width * k / run.columns for run in runs for k in range(run.columns)]
        return [*left, runs[-1].left + runs[-1].width]


@dataclass(frozen=True)
class Run:
    """Neighbouring positions of one kind.

    Attributes:
        kind: their kind.
        start: the first one, counted from the span's first.
        count: how many.
        columns: how many columns show them.
        left, width: where they are drawn.
    """

    kind: str
    start: int
    count: int
    columns: int
    left: float
    width: float

    def cuts(self) -> list[tuple[int, int]]:
        """First position and end of every column."""
        ends = [self.start + round(self.count * k / self.columns) for k in range(self.columns + 1)]
        return list(pairwise(ends))


def attention_map(rows: Sequence[Sequence[float]], span: ImageSpan, theme: Theme = LIGHT, title: str = "") -> Figure:
    """What generated tokens attend to, per layer and position of the image (after Figures 7 and 8).

    Args:
        rows: per layer a weight per position, mean over heads and generated tokens.
        span: the positions.
        theme: appearance.
        title: above the map.
    """
    figure = _map_figure(theme, 1.1 + max(1.2, 0.17 * len(rows)), span, title or "Attention of generated tokens")
    strip, axes = _map_axes(figure, theme, 1, 1, max(1.2, 0.17 * len(rows)))
    _kind_strip(strip[0], span, theme)
    image = _heat(axes[0], rows, span, theme, _norm([rows]))
    _position_ticks(axes[0], span, 1)
    axes[0].yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    label_axes(axes[0], theme, "position in the prompt", "layer")
    _colour_bar(figure, image, axes, theme)
    return figure


def attention_heads(
    panels: Sequence[Sequence[Sequence[Sequence[float]]]],
    layers: Sequence[int],
    heads: Sequence[int],
    tokens: Sequence[str],
    span: ImageSpan,
    theme: Theme = LIGHT,
    title: str = "",
) -> Figure:
    """Maps of single heads: a row of panels per layer, a column per head; in each a line per generated token.

    Args:
        panels: per layer, per head, per generated token a weight per position.
        layers: the layers' numbers.
        heads: the heads' numbers.
        tokens: the generated tokens, as text.
        span: the positions.
        theme: appearance.
        title: above the panels.
    """
    each = max(0.66, 0.3 + 0.16 * len(tokens))
    figure = _map_figure(
        theme, 0.9 + each * len(layers), span, title or "Attention of single heads, a row per generated token"
    )
    strips, axes = _map_axes(figure, theme, len(layers), len(heads), each)
    norm = _norm([rows for row in panels for rows in row])
    for strip, head in zip(strips, heads, strict=True):
        _kind_strip(strip, span, theme)
        strip.set_title(f"head {head}", loc="left", fontsize=10, color=theme.text, pad=3)
    places = ((i, k) for i in range(len(layers)) for k in range(len(heads)))
    image: Any = None
    for (i, k), own in zip(places, axes, strict=True):
        image = _heat(own, panels[i][k], span, theme, norm, 1.5 / len(heads))  # a single position stays visible
        own.tick_params(labelbottom=i == len(layers) - 1, labelsize=8)
        own.set_yticks(range(len(tokens)), [_shown(token) for token in tokens] if k == 0 else [""] * len(tokens))
        if k == 0:
            own.set_ylabel(f"layer {layers[i]}", color=theme.text, fontsize=10)
        _position_ticks(own, span, len(heads))
        if i == len(layers) - 1:
            own.set_xlabel("position", color=theme.text, fontsize=10)
    _colour_bar(figure, image, axes, theme)
    return figure


def _shown(token: str) -> str:
    """A token as a label: what has no glyph made visible, cut at ten characters."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in token).strip() or "␣"
    text = text if len(text) <= 10 else text[:9] + "…"
    return plain(text)


def _map_figure(theme: Theme, height: float, span: ImageSpan, title: str) -> Figure:
    figure = new_figure(theme, height + 0.3)
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11, color=theme.text)
    patches = [Patch(color=theme.series[SERIES[kind]]) for kind in span.present()]
    legend_below(figure, patches, span.labels(), theme)
    return figure


def _map_axes(figure: Figure, theme: Theme, rows: int, columns: int, each: float) -> tuple[list[Axes], list[Axes]]:
    """A strip for the kinds on top of every column, and the maps, row by row."""
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[0.09, *[each] * rows], hspace=0.02)
    strips = [figure.add_subplot(grid[0, k]) for k in range(columns)]
    maps = [figure.add_subplot(grid[i + 1, k]) for i in range(rows) for k in range(columns)]
    for axes in (*strips, *maps):
        style_axes(axes, theme)
        axes.grid(visible=False)
        axes.tick_params(length=2)
    return strips, maps


def _kind_strip(axes: Axes, span: ImageSpan, theme: Theme) -> None:
    """Every column in its kind's colour."""
    present = span.present()
    colours = ListedColormap([theme.series[SERIES[kind]] for kind in present])
    cells = [[present.index(run.kind) for run in span.runs() for _ in range(run.columns)]]
    axes.pcolormesh(span.edges(), [0, 1], cells, cmap=colours, vmin=-0.5, vmax=len(present) - 0.5)
    axes.set_yticks([])
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _norm(panels: Sequence[Sequence[Sequence[float]]]) -> LogNorm:
    positive = [value for rows in panels for row in rows for value in row if value > 0]
    top = max(positive, default=1.0)
    low = max(min(positive, default=0.0), top * 10**-DECADES)
    if low > top / 2:  # weights that are nearly equal get the middle of the colours, not all the darkest
        middle = math.sqrt(low * top)
        low, top = middle / math.sqrt(2), middle * math.sqrt(2)
    return LogNorm(low, top, clip=True)


def _heat(
    axes: Axes, rows: Sequence[Sequence[float]], span: ImageSpan, theme: Theme, norm: LogNorm, gap: float = 1.5
) -> Any:
    """A map with row 0 on top, and gaps of so many points where the kind changes."""
    colours = LinearSegmentedColormap.from_list("of the theme", [theme.background, theme.series[0], theme.text])
    cells = span.pooled(rows).clip(min=float(norm.vmin or 0))
    image = axes.pcolormesh(span.edges(), [k - 0.5 for k in range(len(rows) + 1)], cells, cmap=colours, norm=norm)
    axes.invert_yaxis()
    for run in span.runs()[1:]:
        axes.axvline(run.left, color=theme.background, linewidth=gap)
    return image


def _position_ticks(axes: Axes, span: ImageSpan, panels: int) -> None:
    """The position at which every kind begins, and the end, where there is room for the number."""
    whole, free, ticks = span.edges()[-1], -math.inf, []
    for left, position in (*((run.left, run.start) for run in span.runs()), (whole, len(span.kinds))):
        if left >= free:
            ticks.append((left, str(span.first + position)))
            free = left + whole * TICK * panels
    axes.set_xticks([left for left, _ in ticks], [label for _, label in ticks])


def _colour_bar(figure: Figure, image: Any, axes: Sequence[Axes], theme: Theme) -> None:
    bar = figure.colorbar(image, ax=list(axes), fraction=0.04, pad=0.015)
    span = image.norm.vmax / image.norm.vmin
    if span < 100:  # powers of ten alone would be one label or none
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4) if span < 5 else LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label("attention weight", color=theme.text, fontsize=10)
    bar.ax.tick_params(colors=theme.text, labelsize=9, which="both")
    bar.outline.set_edgecolor(theme.grid)
