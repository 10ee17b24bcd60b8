"""What the figures of a calibration show: read back from the axes, not from pixels."""

import io
import math
import warnings

import pytest
from PIL import Image

from skipvision_train.analysis.calibration_figures import (
    budget_curves,
    functional_asymmetry,
    join_seeds,
    seed_bands,
    skip_map,
    transfer_matrix,
    vig_by_task,
)
from skipvision_train.analysis.figures import DARK, LIGHT, MARKERS, legend_columns, log_figures, loss_curves, to_png
from skipvision_train.analysis.panels import log_limits, runs
from skipvision_train.calibration.curves import Curve, Point
from skipvision_train.calibration.search import Estimate
from skipvision_train.evaluation.metrics import Accuracy

TASKS = {"colour": [0.4, 0.02, 1e-4, 0.0], "count": [0.2, 0.04, 3e-4, 0.0]}
MEAN = [0.3, 0.03, 2e-4, 0.0]
INTERVAL = [(0.2, 0.4), (0.01, 0.05), (-1e-4, 5e-4), (0.0, 0.0)]


def lines(axes):
    """The labelled lines: positions and values, gaps (not a number) left out."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    points = {
        line.get_label(): [(x, y) for x, y in zip(*line.get_data(), strict=True) if not math.isnan(y)] for line in named
    }
    return {name: [[x for x, _ in pairs], [y for _, y in pairs]] for name, pairs in points.items()}


def triangles(axes):
    """Where values stand on the lower edge."""
    marks = [line for line in axes.lines if line.get_label().startswith("_") and line.get_linestyle() == "None"]
    assert all(y == axes.get_ylim()[0] for line in marks for y in line.get_ydata())
    return [list(line.get_xdata()) for line in marks]


def bands(axes):
    """Per band the lowest and highest y at every x."""
    found = []
    for band in axes.collections:
        outline = [tuple(point) for path in band.get_paths() for point in path.vertices]
        xs = sorted({x for x, _ in outline})
        found.append({x: (min(y for a, y in outline if a == x), max(y for a, y in outline if a == x)) for x in xs})
    return found


def entries(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_task_whose_scores_chose_is_drawn_once_and_in_bold():
    (axes,) = vig_by_task(TASKS, TASKS["colour"]).axes
    assert set(lines(axes)) == set(TASKS)
    widths = {line.get_label(): line.get_linewidth() for line in axes.lines}
    assert widths["colour"] > widths["count"]


def point(n, kl, accuracy=None, flops=1.0):
    share = None if accuracy is None else Accuracy(accuracy, accuracy - 0.1, accuracy + 0.05, 100)
    return Point(n, Estimate(kl, kl / 2, kl * 3), share, flops)


def test_vig_has_a_line_per_task_and_the_mean_in_bold():
    figure = vig_by_task(TASKS, MEAN, INTERVAL, [2, 3], 0.05)
    (axes,) = figure.axes
    shown = lines(axes)
    assert shown["colour"] == [[0, 1, 2], [0.4, 0.02, 1e-4]]
    assert shown["count"] == [[0, 1, 2], [0.2, 0.04, 3e-4]]
    assert shown["mean"] == [[0, 1, 2], [0.3, 0.03, 2e-4]]
    assert shown["threshold"][1] == [0.05, 0.05]
    assert axes.get_yscale() == "log"
    drawn = {line.get_label(): line for line in axes.lines}
    assert drawn["mean"].get_linewidth() > 2 * drawn["colour"].get_linewidth()
    assert drawn["colour"].get_marker() != drawn["count"].get_marker()
    assert drawn["colour"].get_color() != drawn["count"].get_color()
    assert entries(figure) == ["skipped", "colour", "count", "mean", "threshold", "0 or off the scale"]


def test_vig_zeros_stand_on_the_lower_edge_below_every_point():
    (axes,) = vig_by_task(TASKS, MEAN, INTERVAL).axes
    assert triangles(axes) == [[3], [3], [3]]
    assert axes.get_ylim()[0] < 1e-4


def test_vig_band_ends_at_the_edge_where_the_interval_reaches_below_zero():
    (axes,) = vig_by_task(TASKS, MEAN, INTERVAL).axes
    (band,) = bands(axes)
    edge = axes.get_ylim()[0]
    assert band[0] == pytest.approx((0.2, 0.4))
    assert band[1] == pytest.approx((0.01, 0.05))
    assert band[2] == pytest.approx((edge, 5e-4))
    assert 3 not in band


def test_vig_shades_the_chosen_layers():
    (axes,) = vig_by_task({"all": [1.0, 0.1, 0.2, 0.1, 0.05]}, [1.0, 0.1, 0.2, 0.1, 0.05], chosen=[4, 1, 3]).axes
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches] == [(0.5, 1.5), (2.5, 4.5)]
    assert axes.patches[0].get_label() == "skipped"
    assert entries(axes.figure) == ["skipped", "all"]  # once, however many rectangles


def test_a_single_task_is_drawn_once_and_alone_needs_no_legend():
    figure = vig_by_task({"colour": [0.4, 0.1]}, [0.4, 0.1])
    assert lines(figure.axes[0]) == {"colour": [[0, 1], [0.4, 0.1]]}
    assert entries(figure) == []
    assert list(lines(vig_by_task({}, [0.4, 0.1]).axes[0])) == ["mean"]


def test_more_tasks_than_colours_still_differ():
    tasks = {f"task {i}": [0.5, 0.1 * i + 0.1] for i in range(12)}
    drawn = [line for line in vig_by_task(tasks, [0.5, 0.5]).axes[0].lines if line.get_label().startswith("task")]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn}
    assert len(looks) == len(drawn) == 12
    assert len({(colour, style) for colour, _, style in looks}) == 12  # also without telling the markers apart
    for theme in (LIGHT, DARK):
        assert len(set(theme.series)) == len(theme.series) == len(MARKERS) - 1


@pytest.mark.parametrize("tasks", [{"a": [0.0, 0.0]}, {"a": [0.0, 0.0], "b": [0.0, 0.0]}, {"a": [0.0]}])
def test_all_scores_zero_can_be_drawn(tasks):
    mean = next(iter(tasks.values()))
    assert to_png(vig_by_task(tasks, mean, [(0.0, 0.0)] * len(mean), [0], theme=DARK), dpi=40)


def test_the_axis_is_not_stretched_by_rounding_noise():
    assert log_limits([1.0, 1e-17]) == (pytest.approx(1e-8 / 3), 2.0)
    assert log_limits([0.5, 1e-6, 0.0]) == (pytest.approx(1e-6 / 3), 1.0)
    (axes,) = vig_by_task({}, [1.0, 1e-17, 1e-3]).axes
    assert triangles(axes) == [[1]]
    assert lines(axes)["mean"] == [[0, 2], [1.0, 1e-3]]


def test_a_short_axis_has_labels_between_the_powers_of_ten():
    (axes,) = functional_asymmetry({"attention": [0.35, 0.4]}).axes  # 0.117 to 0.8 holds no power of ten
    low, high = axes.get_ylim()
    labels = [t.get_text() for t, at in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True) if low < at < high]
    assert labels == ["0.2", "0.5"]


def test_asymmetry_shows_every_part_with_its_band():
    scores = {"attention": [0.1, 0.01, 0.0], "FFN": [0.2, 0.3, 0.0], "attention and FFN": [0.4, 0.5, 0.0]}
    figure = functional_asymmetry(scores, {"FFN": [(0.1, 0.4), (0.2, 0.5), (0.0, 0.0)]})
    (axes,) = figure.axes
    assert lines(axes) == {name: [[0, 1], values[:2]] for name, values in scores.items()}
    (band,) = bands(axes)
    assert band[0] == pytest.approx((0.1, 0.4))
    assert triangles(axes) == [[2]] * 3
    assert entries(figure) == [*scores, "0 or off the scale"]


def test_skip_map_fills_the_cells_that_skip():
    budgets = {1: {"colour": [3], "count": [3]}, 2: {"colour": [3, 1], "count": [2, 3]}}
    figure = skip_map(budgets, 4)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["N = 1", "N = 2"]
    cells = [axes.collections[0].get_array().reshape(2, 4).tolist() for axes in figure.axes]
    assert cells[0] == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert cells[1] == [[0, 1, 0, 1], [0, 0, 1, 1]]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["colour", "count"]
        assert axes.get_ylim() == (1.5, -0.5)  # the first row on top
        assert axes.get_xlim() == (-0.5, 3.5)


def test_skip_map_of_one_row_and_one_layer():
    (axes,) = skip_map({1: {"all": [0]}}, 1).axes
    assert axes.collections[0].get_array().ravel().tolist() == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where labels leave no room for the plot
        to_png(axes.figure, dpi=40)


def test_seed_bands_by_hand():
    scores = [[1.0, 0.1, 0.0], [2.0, 0.2, 0.0], [3.0, 0.6, 0.0]]
    figure = seed_bands(scores, [[2], [1, 2], [2]])
    axes, bars = figure.axes
    assert lines(axes)["mean"] == [[0, 1], [pytest.approx(2.0), pytest.approx(0.3)]]
    extremes, deviation = bands(axes)
    assert extremes[0] == pytest.approx((1.0, 3.0))
    assert extremes[1] == pytest.approx((0.1, 0.6))
    assert deviation[0] == pytest.approx((1.0, 3.0))  # 2 - 1 and 2 + 1
    assert deviation[1] == pytest.approx((0.3 - math.sqrt(0.07), 0.3 + math.sqrt(0.07)))  # (0.04 + 0.01 + 0.09) / 2
    assert triangles(axes) == [[2]]
    assert [bar.get_height() for bar in bars.patches] == [0, 1, 3]
    assert bars.get_ylim() == (0, 3)
    assert bars.get_xlim() == axes.get_xlim()


def test_scores_are_called_what_they_are():
    assert vig_by_task({}, [0.5, 0.1]).axes[0].get_ylabel() == "KL divergence (nats)"
    assert vig_by_task({}, [0.5, 0.1], unit="1 - cosine").axes[0].get_ylabel() == "1 - cosine"
    assert seed_bands([[0.5, 0.1]], [[1]], unit="rank").axes[0].get_ylabel() == "rank"


def test_one_seed_has_no_band():
    axes, bars = seed_bands([[0.5, 0.1]], [[1]]).axes
    assert bands(axes) == []
    assert [bar.get_height() for bar in bars.patches] == [0, 1]


def test_transfer_matrix_has_the_numbers_and_the_best_in_bold():
    figure = transfer_matrix(
        [[0.0, 0.25], [3.1e-8, None], [0.012, 0.0047]], ["colour", "count", "universal"], ["colour", "count"]
    )
    (axes,) = figure.axes
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert [text.get_text() for text in axes.texts] == ["0", "0.25", "3.1e-8", "n/a", "0.012", "0.0047"]
    assert [text.get_text() for text in axes.texts if text.get_weight() == "bold"] == ["0", "0.0047"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["colour", "count", "universal"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["colour", "count"]
    shares = axes.images[0].get_array()
    assert shares[0, 1] == 1  # the largest
    assert shares[0, 0] == shares[1, 0] == shares[1, 1] == 0
    assert shares[2, 0] == pytest.approx((math.log(0.012) - math.log(3.1e-8)) / (math.log(0.25) - math.log(3.1e-8)))


def test_accuracy_is_better_where_it_is_larger():
    (axes,) = transfer_matrix([[0.625, 0.25], [0.5, 0.75]], ["a", "b"], ["a", "b"], "accuracy").axes
    assert [text.get_text() for text in axes.texts] == ["62.5", "25.0", "50.0", "75.0"]
    assert [text.get_text() for text in axes.texts if text.get_weight() == "bold"] == ["62.5", "75.0"]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.0], [0.5, 1.0]]


def test_matrices_of_one_cell_and_of_many():
    (axes,) = transfer_matrix([[0.5]], ["colour"], ["colour"]).axes
    assert [text.get_text() for text in axes.texts] == ["0.5"]
    names = [f"numerical_task_{i}" for i in range(14)]
    (axes,) = transfer_matrix([[1.234e-5] * 14] * 14, names, names).axes
    assert {text.get_text() for text in axes.texts} == {"1e-5"}  # two digits would be too small to read
    assert axes.texts[0].get_fontsize() > 5


def test_matrices_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="1 rows and 2 columns"):
        transfer_matrix([[0.5]], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="use kl or accuracy"):
        transfer_matrix([[0.5]], ["a"], ["a"], "f1")


def test_curves_over_layers_and_flops():
    curves = [
        Curve("V-Skip", (point(8, 0.2, 0.6, 0.9), point(0, 0.0, 0.7, 1.0), point(4, 0.1, 0.65, 0.95))),
        Curve("VTW", (point(4, 0.5, None, 0.8), point(8, 0.9, 0.4, 0.5))),
    ]
    figure = budget_curves(curves)
    kl, accuracy = figure.axes
    assert lines(kl) == {"V-Skip": [[4, 8], [0.1, 0.2]], "VTW": [[4, 8], [0.5, 0.9]]}
    assert triangles(kl) == [[0]]
    assert [list(map(list, line.get_data())) for line in accuracy.lines] == [
        [[0, 4, 8], [70, 65, 60]],
        [[8], [40]],
    ]
    low_high = bands(kl)[0]
    assert low_high[4] == pytest.approx((0.05, 0.3))
    assert bands(accuracy)[0][8] == pytest.approx((50, 65))
    assert kl.get_xlim() == accuracy.get_xlim()
    assert entries(figure) == ["V-Skip", "VTW", "0 or off the scale"]

    kl, accuracy = budget_curves(curves, "flops_ratio").axes
    assert lines(kl) == {"V-Skip": [[90, 95], [0.2, 0.1]], "VTW": [[50, 80], [0.9, 0.5]]}
    assert triangles(kl) == [[100]]
    assert list(accuracy.lines[0].get_xdata()) == [90, 95, 100]


def test_curves_without_accuracy_are_one_panel():
    figure = budget_curves([Curve("V-Skip", (point(1, 0.1), point(2, 0.2)))])
    assert len(figure.axes) == 1
    assert figure.axes[0].get_xlabel() == "layers skipped"
    with pytest.raises(ValueError, match="use n or flops_ratio"):
        budget_curves([], "time")


def test_curves_without_a_zero_keep_their_size():
    """An artist without data and without clipping once made the layout give up."""
    figure = budget_curves([Curve("V-Skip", (point(0, 0.0), point(1, 0.1))), Curve("VTW", (point(1, 0.1),))])
    to_png(figure, dpi=40)
    assert figure.axes[0].get_position().height > 0.5


def test_seeds_of_a_random_choice_become_one_band():
    curves = [
        Curve("V-Skip", (point(4, 0.1, 0.5),)),
        Curve("V-Skip random 0", (point(4, 0.2, 0.4),)),
        Curve("V-Skip random 1", (point(4, 0.6, 0.3),)),
        Curve("VTW", (point(4, 0.7),)),
    ]
    joined = join_seeds(curves)
    assert [curve.name for curve in joined] == ["V-Skip", "V-Skip random", "VTW"]
    assert joined[0] == curves[0]
    assert joined[2] == curves[3]
    (both,) = joined[1].points
    assert (both.kl.value, both.kl.low, both.kl.high) == (pytest.approx(0.4), 0.2, 0.6)
    assert (both.accuracy.value, both.accuracy.low, both.accuracy.high) == (pytest.approx(0.35), 0.3, 0.4)
    with pytest.raises(ValueError, match="V-Skip random"):
        join_seeds([curves[1], Curve("V-Skip random 2", (point(5, 0.1),))])


def test_runs_of_layers():
    assert runs([5, 3, 4, 9, 0, 1, 3]) == [(0, 1), (3, 5), (9, 9)]
    assert runs([]) == []


def test_legends_are_as_wide_as_the_figure():
    """5.6 inches; a column has 0.55 for the sample and 0.08 for a letter."""
    assert legend_columns(["mean"]) == 1
    assert legend_columns(["a"] * 5) == 5
    assert legend_columns(["a" * 40, "b" * 40]) == 1
    # Two columns of 20 and 2 letters: 2.15 + 0.71; matplotlib puts the first two labels into the first column.
    assert legend_columns(["a" * 60, "a", "b", "b"]) == 1
    assert legend_columns(["a" * 40, "a", "b", "b"]) == 3


def test_figures_are_logged_as_pictures(monkeypatch, tmp_path):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    logged = []

    class Run:
        def log(self, data, step=None):
            logged.append((data, step))

    figure = loss_curves({"sft": [{"step": 1, "loss": 2.0}]})
    log_figures(Run(), {"calibration/loss": figure, "calibration/other": figure}, step=7)
    log_figures(Run(), {})
    (data, step), (nothing, later) = logged
    assert step == 7
    assert later is None
    assert nothing == {}
    assert list(data) == ["calibration/loss", "calibration/other"]
    assert all(isinstance(picture, wandb.Image) for picture in data.values())
    assert data["calibration/loss"].image.size == Image.open(io.BytesIO(to_png(figure))).size
