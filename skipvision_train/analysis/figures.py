"""The figures of the report, drawn with matplotlib's object interface (no pyplot, no display, no global state).

Every function returns a :class:`matplotlib.figure.Figure`. Colours are Okabe and Ito's, which stay apart under the
common colour deficiencies; marker and hatch differ too. Sizes suit a phone: 5.6 inches wide, text of 10 points.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skipvision_train.evaluation.metrics import Accuracy

if TYPE_CHECKING:
    import wandb

WIDTH = 5.6
"""Inches."""


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance.

    Attributes:
        background: of figure and axes.
        text: labels and axes.
        grid: helper lines.
        series: one colour per series, in order.
    """

    background: str
    text: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff",
    "#1f2328",
    "#d9dde2",
    ("#0072b2", "#d55e00", "#8a8f98", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b3a8c"),
)
DARK = Theme(
    "#161b22",
    "#e6edf3",
    "#343b45",
    ("#56b4e9", "#e69f00", "#9aa3ad", "#2bbf94", "#e19cc4", "#f0e442", "#f0805a", "#b39ddb"),
)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "p")
"""One more than there are colours: series beyond the last colour still differ."""
HATCHES = ("", "//", "..", "xx", "\\\\")


def to_png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def data_uri(content: bytes, media_type: str) -> str:
    """The content as a ``data:`` URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def embed(alt: str, draw: Callable[..., Figure], *data: Any, **options: Any) -> dict[str, str]:
    """A figure for a page: ``alt`` text, and ``light`` and ``dark`` as PNG data URIs.

    Args:
        alt: what the picture shows, for who cannot see it.
        draw: a function of this package's figure modules.
        *data: its data.
        **options: further arguments of ``draw``, without the theme.
    """
    themes = {"light": LIGHT, "dark": DARK}
    uris = {name: data_uri(to_png(draw(*data, theme=theme, **options)), "image/png") for name, theme in themes.items()}
    return {"alt": alt, **uris}


def log_figures(run: wandb.Run, figures: Mapping[str, Figure], step: int | None = None) -> None:
    """Log figures to a run of Weights & Biases as pictures, all in one step.

    Args:
        run: as ``wandb.init`` returns it.
        figures: by the name they get there.
        step: None takes the run's next one.
    """
    import wandb
    from PIL import Image

    run.log({name: wandb.Image(Image.open(io.BytesIO(to_png(figure)))) for name, figure in figures.items()}, step=step)


def new_figure(theme: Theme, height: float) -> Figure:
    """An empty figure of the common width and ``height`` inches, laid out so that nothing overlaps."""
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor=theme.background)


def plain(text: str) -> str:
    """A name for matplotlib, to which a pair of ``$`` would begin and end a formula."""
    return text.replace("$", r"\$")


def new_axes(theme: Theme, height: float, title: str) -> tuple[Figure, Axes]:
    """A figure of ``height`` inches with a single plot."""
    figure = new_figure(theme, height)
    axes = figure.add_subplot()
    style_axes(axes, theme, title)
    return figure, axes


def style_axes(axes: Axes, theme: Theme, title: str = "") -> None:
    """Give a plot the look of the report."""
    axes.set_facecolor(theme.background)
    axes.set_title(plain(title), loc="left", fontsize=11, color=theme.text)
    axes.tick_params(colors=theme.text, labelsize=10, which="both")
    axes.grid(visible=True, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_color(theme.grid)
        spine.set_visible(side in ("left", "bottom"))


def label_axes(axes: Axes, theme: Theme, x: str, y: str) -> None:
    """Name both axes."""
    axes.set_xlabel(x, color=theme.text, fontsize=10)
    axes.set_ylabel(y, color=theme.text, fontsize=10)


def _legend(axes: Axes, theme: Theme, **options: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, list(map(plain, labels)), frameon=False, fontsize=10, labelcolor=theme.text, **options)


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], theme: Theme) -> None:
    """A legend under the axes, where no data is, in as many columns as the width holds."""
    figure.legend(
        handles,
        list(map(plain, labels)),
        loc="outside lower center",
        ncols=legend_columns(labels),
        frameon=False,
        fontsize=10,
        labelcolor=theme.text,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def legend_columns(labels: Sequence[str]) -> int:
    """How many columns of these labels fit side by side, by a mean letter of 0.08 inches and 0.55 for the sample.

    Entries run down the columns, as matplotlib sets them.
    """
    for columns in range(len(labels), 1, -1):
        long, rest = divmod(len(labels), columns)
        starts = [k * long + min(k, rest) for k in range(columns + 1)]
        widths = (max(map(len, labels[a:b])) for a, b in pairwise(starts))
        if sum(0.08 * width + 0.55 for width in widths) <= WIDTH:
            return columns
    return 1


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Centred moving mean over ``share`` of the series; the window shrinks at both ends, so nothing is shifted."""
    half = int(len(values) * share / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def loss_curves(rows: Mapping[str, Sequence[Mapping[str, Any]]], theme: Theme = LIGHT, title: str = "") -> Figure:
    """Training loss over steps, one curve per run: every logged value faint, the moving mean on top.

    Args:
        rows: per run, the rows of its ``metrics.jsonl``; rows without ``step`` and ``loss`` are other measurements.
        theme: appearance.
        title: above the axes.
    """
    figure, axes = new_axes(theme, 3.2, title or "Training loss")
    for i, (name, entries) in enumerate(rows.items()):
        points = [(row["step"], row["loss"]) for row in entries if "step" in row and "loss" in row]
        steps, losses = [p[0] for p in points], [p[1] for p in points]
        colour = theme.series[i % len(theme.series)]
        axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=colour, linewidth=1.8, label=name)
    label_axes(axes, theme, "step", "cross entropy (nats per token)")
    axes.set_ylim(bottom=0)
    if len(rows) > 1:
        _legend(axes, theme)
    return figure


def vig_profile(scores: Sequence[float], chosen: Sequence[int], theme: Theme = LIGHT, title: str = "") -> Figure:
    """Visual Information Gain per layer on a log scale, the chosen layers marked (V-Skip, Fig. 3).

    Scores of 0 (the last layer's is 0 by construction) have no logarithm: they stand on the lower edge and are marked.

    Args:
        scores: one per layer, not negative.
        chosen: layers whose visual attention is skipped.
        theme: appearance.
        title: above the axes.
    """
    figure, axes = new_axes(theme, 3.2, title or "Visual Information Gain")
    positive = [s for s in scores if s > 0]
    floor = min(positive, default=1.0) / 3
    shown = [max(s, floor) for s in scores]
    axes.plot(range(len(scores)), shown, color=theme.grid, linewidth=1.2, zorder=1)
    groups = (("kept", [i for i in range(len(scores)) if i not in set(chosen)]), ("skipped", sorted(chosen)))
    for i, (name, layers) in enumerate(groups):
        colour, marker = theme.series[i], MARKERS[i]
        axes.scatter(layers, [shown[k] for k in layers], s=34, color=colour, marker=marker, label=name, zorder=2)
    for layer in (i for i, s in enumerate(scores) if s <= 0):
        axes.annotate("0", (layer, floor), xytext=(0, 6), textcoords="offset points", ha="center", color=theme.text)
    axes.set_yscale("log")
    axes.set_ylim(floor / 1.6, max(shown) * 2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(axes, theme, "layer", "KL divergence (nats)")
    _legend(axes, theme, title=None)
    return figure


def task_bars(series: Mapping[str, Mapping[str, Accuracy]], theme: Theme = LIGHT, title: str = "") -> Figure:
    """Accuracy per task with its 95 % interval, one bar per series; series may lack tasks.

    Args:
        series: per series (model, V-Skip, blind, ...) the accuracy of each task; tasks in order of first appearance.
        theme: appearance.
        title: above the axes.
    """
    tasks = list(dict.fromkeys(chain.from_iterable(series.values())))
    figure, axes = new_axes(theme, 1.1 + (0.16 + 0.2 * len(series)) * len(tasks), title or "Accuracy per task")
    thickness = 0.8 / max(1, len(series))
    for i, (name, results) in enumerate(series.items()):
        present = [(k, results[task]) for k, task in enumerate(tasks) if task in results]
        values = [100 * r.value for _, r in present]
        errors = [[100 * (r.value - r.low) for _, r in present], [100 * (r.high - r.value) for _, r in present]]
        axes.barh(
            [k + (i - (len(series) - 1) / 2) * thickness for k, _ in present],
            values,
            height=thickness * 0.9,
            xerr=errors,
            color=theme.series[i % len(theme.series)],
            edgecolor=theme.background,
            hatch=HATCHES[i % len(HATCHES)],
            error_kw={"ecolor": theme.text, "elinewidth": 1, "capsize": 2},
            label=name,
        )
    axes.set_yticks(range(len(tasks)), list(map(plain, tasks)))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 100)
    label_axes(axes, theme, "accuracy (%)", "")
    if len(series) > 1:
        legend_below(figure, *axes.get_legend_handles_labels(), theme)
    return figure
