"""What the figures of an analysis show: read back from the axes, not from pixels."""

import io
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision_train.analysis.attention_figures import COLUMNS, NARROWEST, ImageSpan, attention_heads, attention_map
from skipvision_train.analysis.figures import DARK, LIGHT, to_png
from skipvision_train.analysis.paper_figures import (
    SERIES,
    attention_mass,
    density,
    error_bound,
    ffn_impact,
    flops_share,
    similarity_density,
)
from skipvision_train.analysis.paper_report import spread_layers
from skipvision_train.plans import TokenKind

KINDS = ["retained"] * 4 + ["middle"] * 9 + ["summary"] + ["skipped"] * 17 + ["retained", "summary"]
SPAN = ImageSpan(KINDS, 35, {"skipped": "left out"})
MASS = {"text": [0.5, 0.1], "skipped": [0.2, 0.6], "generated": [0.3, 0.3]}
SHARES = {"visual_ffn": [0.1, 0.5], "text_ffn": [0.4, 0.1], "projections": [0.3, 0.2], "attention": [0.2, 0.2]}
BOUNDS = {"bound": [-math.inf, 2.0, 40.0], "other": [0.5, 3.0, 50.0]}
LOGS = [-math.inf, 0.3, 0.5]
ERRORS = {"all": [1.0, 2.0, 3.0], "text": [0.0, 0.5, 0.7]}


def entries(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def line(axes, label):
    (found,) = [own for own in axes.lines if own.get_label() == label]
    return [float(y) for y in found.get_ydata()]


def test_every_kind_has_a_colour_of_its_own():
    kinds = {kind.name.lower() for kind in TokenKind if kind is not TokenKind.PAD} | {"generated"}
    assert set(SERIES) == kinds
    assert len(set(SERIES.values())) == len(kinds)


def test_shares_are_stacked_to_a_hundred():
    (axes,) = (figure := flops_share([64, 4096], SHARES)).axes
    assert line(axes, axes.lines[0].get_label()) == [10, 50]
    tops = [max(y for _, y in area.get_paths()[0].vertices) for area in axes.collections]
    assert tops == [pytest.approx(50), pytest.approx(60), pytest.approx(80), pytest.approx(100)]
    assert axes.get_xscale() == "log"
    assert entries(figure) == ["FFN of visual tokens", "FFN of text", "Q, K, V, O", "attention"]


def test_impact_has_a_line_and_a_band_per_kind():
    means, bounds = {"text": [1.0, 2.0], "skipped": [0.1, 0.0]}, {"text": [(0.5, 2), (1, 4)], "skipped": [(0, 1)] * 2}
    (axes,) = (figure := ffn_impact(means, bounds, {"skipped": "visual"})).axes
    assert line(axes, "text") == [1.0, 2.0]
    assert line(axes, "visual")[0] == 0.1
    assert math.isnan(line(axes, "visual")[1])  # a triangle on the edge instead
    assert len(axes.collections) == 2
    assert entries(figure) == ["text", "visual", "0 or off the scale"]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=50))
def test_density_integrates_to_one_around_the_mean(values):
    x, y = density(values)
    step = x[1] - x[0]
    assert sum(y) * step == pytest.approx(1, abs=0.02)
    assert min(y) >= 0
    assert max(y[0], y[-1]) < 1e-3 * max(y)
    assert sum(a * b for a, b in zip(x, y, strict=True)) * step == pytest.approx(np.mean(values), abs=0.02)


def test_density_needs_values():
    with pytest.raises(ValueError, match="at least one value"):
        density([])


def test_similarity_marks_the_means():
    (axes,) = (figure := similarity_density({"a": [0.1, 0.3], "b": [0.7]}, {"a": 0.2, "b": 0.7})).axes
    assert entries(figure) == ["a: mean 0.20", "b: mean 0.70"]
    assert [own.get_xdata()[0] for own in axes.lines if len(own.get_xdata()) == 2] == [0.2, 0.7]


@given(st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=20), min_size=1, max_size=3))
@settings(max_examples=25)
def test_similarity_is_drawn_until_no_density_is_seen(levels):
    named = {str(i): values for i, values in enumerate(levels)}
    (axes,) = similarity_density(named, {name: float(np.mean(values)) for name, values in named.items()}).axes
    left, right = axes.get_xlim()
    for name, values in named.items():
        assert left < min(values)
        assert max(values) < right
        (curve,) = [own for own in axes.lines if str(own.get_label()).startswith(f"{name}: ")]
        outside = [y for x, y in zip(*curve.get_data(), strict=True) if not left <= x <= right]
        assert max(outside, default=0) < 0.01 * max(curve.get_ydata())


def test_mass_is_stacked():
    (axes,) = (figure := attention_mass(MASS, {"skipped": "visual"})).axes
    heights = [[bar.get_height() for bar in group] for group in axes.containers]
    assert heights == [pytest.approx([100 * v for v in own]) for own in MASS.values()]
    assert [bar.get_y() for bar in axes.containers[2]] == pytest.approx([70, 70])
    assert entries(figure) == ["text", "visual", "generated"]


@given(st.lists(st.tuples(st.sampled_from(sorted(SERIES)), st.integers(1, 700)), min_size=1, max_size=6))
def test_columns_cover_every_position_once_and_no_run_vanishes(runs):
    kinds = [kind for kind, count in runs for _ in range(count)]
    span = ImageSpan(kinds, 3, {})
    cuts = [cut for run in span.runs() for cut in run.cuts()]
    assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
    assert cuts[-1][1] == len(kinds)
    assert all(len(set(kinds[a:b])) == 1 for a, b in cuts)
    assert len(cuts) <= max(len(kinds) if len(kinds) <= COLUMNS else 0, COLUMNS + len(runs))
    edges = span.edges()
    assert len(edges) == len(cuts) + 1
    assert all(a < b for a, b in pairwise(edges))
    assert all(run.width >= NARROWEST * len(kinds) for run in span.runs())
    weights = np.random.default_rng(0).random((2, len(kinds)))
    sizes = np.array([b - a for a, b in cuts])
    assert span.pooled(weights.tolist()) @ sizes == pytest.approx(weights.sum(1))


def cells(axes):
    (mesh,) = axes.collections
    return np.asarray(mesh.get_array())


def test_map_shows_rows_kinds_and_where_they_begin():
    rows = [[0.01 * (i + 1) / len(KINDS) for i in range(len(KINDS))], [0.02] * len(KINDS)]
    figure = attention_map(rows, SPAN)
    strip, axes, *_ = figure.axes
    assert cells(axes) == pytest.approx(np.array(rows))
    names = ["retained", "middle", "summary", "skipped"]
    assert [names[int(kind)] for kind in cells(strip)[0]] == KINDS
    assert axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["35", "39", "48", "66"]  # no room for 49 and 67
    assert entries(figure) == ["retained", "middle", "summary", "left out"]
    alone = attention_map([[0.1] * 4], ImageSpan(["skipped"] * 4, 35, {})).axes[1]
    assert [label.get_text() for label in alone.get_xticklabels()] == ["35", "39"]


def test_a_weight_of_nothing_is_drawn_like_the_least():
    rows = [[0.0] * len(KINDS), [0.5, 1e-9, *[0.1] * (len(KINDS) - 2)]]
    axes = attention_map(rows, SPAN).axes[1]
    assert cells(axes)[0] == pytest.approx(0.5e-4)
    assert cells(axes)[1, 1] == pytest.approx(0.5e-4)
    attention_map([[0.0] * len(KINDS)], SPAN)


@pytest.mark.parametrize("weight", [1e-5, 0.014, 1.0])
def test_weights_that_are_nearly_equal_get_the_middle_of_the_colours(weight):
    figure = attention_map([[weight] * (len(KINDS) - 1) + [weight * 1.05]] * 3, SPAN)
    norm = figure.axes[1].collections[0].norm
    assert 0.4 < norm(weight) < norm(weight * 1.05) < 0.6
    assert 2 <= len(shown_ticks(figure)) <= 6


@pytest.mark.parametrize("lowest", [0.09, 0.03, 0.004])
def test_few_decades_have_plain_numbers_beside_the_colours(lowest):
    figure = attention_map([[lowest, *[0.1] * (len(KINDS) - 1)]] * 3, SPAN)
    labels = shown_ticks(figure)
    assert 2 <= len(labels) <= 6
    assert all(float(label) > 0 for label in labels)


def shown_ticks(figure):
    """Labels beside the colours that lie within their range."""
    to_png(figure, dpi=50)
    bar = figure.axes[-1]
    low, high = bar.get_ylim()
    return [label.get_text() for label in bar.get_yticklabels() if low <= label.get_position()[1] <= high]


def test_control_characters_are_written_out():
    figure = attention_heads([[[[0.1] * len(KINDS)] * 2]], [0], [0], ["\x17", "ä\t"], SPAN)
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["\\x17", "ä\\t"]


def test_heads_have_a_panel_per_layer_and_head():
    panels = [[[[layer + head + 1.0] * len(KINDS)] * 2 for head in (0, 1)] for layer in (0, 10)]
    figure = attention_heads(panels, [0, 10], [3, 5], ["a\n", "$5 is more than"], SPAN)
    strips, maps = figure.axes[:2], figure.axes[2:6]
    assert [axes.get_title(loc="left") for axes in strips] == ["head 3", "head 5"]
    assert [float(cells(axes)[0, 0]) for axes in maps] == [1, 2, 11, 12]
    assert [axes.get_ylabel() for axes in maps] == ["layer 0", "", "layer 10", ""]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["a\\n", "\\$5 is mor…"]
    assert len({axes.collections[0].norm for axes in maps}) == 1


def test_bound_has_three_panels():
    figure = error_bound(BOUNDS, LOGS, ERRORS, {"L": [0.5, 2.0, 2.0]})
    above, middle, below = figure.axes
    assert line(above, "bound")[1:] == [2.0, 40.0]
    assert math.isnan(line(above, "bound")[0])
    assert line(middle, "text")[1:] == [0.5, 0.7]
    (error,) = [own for own in above.lines if list(own.get_ydata())[1:] == [0.3, 0.5]]  # of all, among its bounds
    (same,) = [own for own in middle.lines if own.get_label() == "all"]
    assert (error.get_color(), error.get_marker()) == (same.get_color(), same.get_marker())
    assert above.get_ylim()[0] < 0.3 < 40 < above.get_ylim()[1]
    assert line(below, "L") == [0.5, 2.0, 2.0]
    assert [float(own.get_ydata()[0]) for own in below.lines if own.get_linestyle() == "--"] == [1]
    assert entries(figure) == ["bound", "other", "all", "text", "L", "0 or off the scale"]


def test_an_error_of_rounding_is_no_point():
    """fp32 leaves about a ten millionth of what the states are."""
    figure = error_bound(BOUNDS, LOGS, {"all": [1.0, 20.0, 30.0], "text": [3e-6, 3e-4, 7.0]}, {"L": [1.0] * 3})
    assert math.isnan(line(figure.axes[1], "text")[0])
    assert line(figure.axes[1], "text")[1:] == [3e-4, 7.0]
    assert entries(figure)[-1] == "0 or off the scale"


def test_layers_that_are_shown():
    assert [spread_layers(depth) for depth in (1, 2, 4, 32)] == [[0], [0, 1], [0, 1, 2, 3], [0, 10, 21, 31]]


FIGURES = {
    "flops": lambda theme: flops_share([576], {name: own[:1] for name, own in SHARES.items()}, theme=theme),
    "impact": lambda theme: ffn_impact({"text": [1.0]}, {"text": [(1, 1)]}, theme=theme),
    "similarity": lambda theme: similarity_density({"a": [1.0] * 3}, {"a": 1.0}, theme=theme),
    "mass": lambda theme: attention_mass(MASS, theme=theme),
    "map": lambda theme: attention_map([[0.1] * len(KINDS)] * 32, SPAN, theme=theme),
    "heads": lambda theme: attention_heads([[[[0.1] * len(KINDS)]]], [0], [0], ["x"], SPAN, theme=theme),
    "bound": lambda theme: error_bound(BOUNDS, LOGS, ERRORS, {"L": [1.0, 2.0, 3.0]}, theme=theme),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_without_a_warning_in_both_themes(name):
    for theme in (LIGHT, DARK):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture = Image.open(io.BytesIO(to_png(FIGURES[name](theme), dpi=60)))
        corner = tuple(int(theme.background[i : i + 2], 16) for i in (1, 3, 5))
        assert picture.convert("RGB").getpixel((0, 0)) == corner
