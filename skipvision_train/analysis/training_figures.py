"""Figures of a training run's metrics: loss per source, rates, gradients, tokens, time, speed, what is skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from skipvision_train.analysis.figures import LIGHT, Theme, embed, label_axes, legend_below, loss_curves
from skipvision_train.analysis.panels import panels_below

Rows = Sequence[Mapping[str, Any]]
"""The lines of a ``metrics.jsonl``."""

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Per line of a figure its steps and values."""


def series_of(rows: Rows, names: Sequence[str], scale: float = 1.0) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each name that occurs; lines without it, or with null, are left out.

    Args:
        rows: of a run.
        names: keys of the rows.
        scale: multiplies the values.
    """
    found = {}
    for name in names:
        points = [(row["step"], scale * row[name]) for row in rows if "step" in row and row.get(name) is not None]
        if points:
            found[name] = ([p[0] for p in points], [p[1] for p in points])
    return found


def names_below(rows: Rows, prefix: str) -> list[str]:
    """The keys that begin with ``prefix`` and a slash, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(f"{prefix}/")))


def lines(
    series: Series, y: str, theme: Theme = LIGHT, title: str = "", log: bool = False, zero: bool = True
) -> Figure:
    """Values over steps, a line each; their names lose what stands before the last slash.

    Args:
        series: per name its steps and values.
        y: what the vertical axis shows.
        theme: appearance.
        title: above the axes.
        log: the vertical axis is logarithmic.
        zero: it begins at zero, where it is not.
    """
    labels = [name.rpartition("/")[2] for name in series]
    figure, (axes,) = panels_below(theme, [2.9], labels if len(labels) > 1 else [], title)
    for i, (steps, values) in enumerate(series.values()):
        colour = theme.series[i % len(theme.series)]
        style = ("-", "--", ":")[i // len(theme.series) % 3]
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=colour, linewidth=1.5, linestyle=style, marker=marker, label=labels[i])
    if log and any(value > 0 for _, values in series.values() for value in values):
        axes.set_yscale("log")
    elif zero:
        axes.set_ylim(bottom=0)
    label_axes(axes, theme, "step", y)
    if len(labels) > 1:
        legend_below(figure, *axes.get_legend_handles_labels(), theme)
    return figure


def stacked(series: Series, y: str, theme: Theme = LIGHT, title: str = "") -> Figure:
    """Values over steps on top of each other; a name that lacks a step counts as 0 there.

    Args:
        series, y, theme, title: as :func:`lines`.
    """
    steps = sorted({step for own, _ in series.values() for step in own})
    labels = [name.rpartition("/")[2] for name in series]
    figure, (axes,) = panels_below(theme, [2.9], labels, title)
    known = [dict(zip(*own, strict=True)) for own in series.values()]
    values = [[own.get(step, 0.0) for step in steps] for own in known]
    colours = [theme.series[i % len(theme.series)] for i in range(len(labels))]
    axes.stackplot(steps, values, labels=labels, colors=colours, edgecolor=theme.background, linewidth=0.4)
    axes.set_ylim(bottom=0)
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1])
    label_axes(axes, theme, "step", y)
    legend_below(figure, *axes.get_legend_handles_labels(), theme)
    return figure


def training_cards(name: str, rows: Rows) -> list[dict[str, str]]:
    """The figures of a run for the report, of what its lines hold: ``alt``, ``light``, ``dark``, ``caption``."""
    cards = [_card("Faint: every logged line.", f"Training loss of {name}", loss_curves, {name: rows}, title=name)]

    def add(caption: str, title: str, draw: Callable[..., Figure], series: Series, y: str, **options: Any) -> None:
        if series:
            cards.append(_card(caption, f"{title} of {name}", draw, series, y, title=f"{name}: {title}", **options))

    sources = names_below(rows, "loss")
    add("", "loss per source", lines, series_of(rows, sources if len(sources) > 1 else []), "nats per token")
    add("", "learning rates", lines, series_of(rows, names_below(rows, "lr")), "learning rate")
    norms = ["grad_norm", *names_below(rows, "grad_norm")]
    add("Before clipping.", "gradient norms", lines, series_of(rows, norms), "norm", log=True)
    tokens = ["tokens/text", "tokens/visual", "tokens/padding"]
    add("Between two logged lines.", "tokens", stacked, series_of(rows, tokens), "tokens")
    parts = [key for key in names_below(rows, "time") if key != "time/step"]
    add("On the first process.", "time of a step", stacked, series_of(rows, parts, 100), "share of a step (%)")
    speed = [key for key in ("samples_per_second", "rows_per_second") if any(key in row for row in rows)]
    add("", "speed", lines, series_of(rows, speed), f"{speed[0].partition('_')[0]} per second" if speed else "")
    add("", "utilisation", lines, series_of(rows, ["mfu", "mfu_dense"], 100), "model FLOPs utilisation (%)")
    skipped = ["skip/ffn", "skip/attention", "skip/flops"]
    add("", "left out by the plan", lines, series_of(rows, skipped, 100), "share left out (%)")
    return cards


def _card(caption: str, alt: str, draw: Callable[..., Figure], *data: Any, **options: Any) -> dict[str, str]:
    return {**embed(alt, draw, *data, **options), "caption": caption}
