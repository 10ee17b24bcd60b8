"""What the figures show: read back from the axes, not from pixels."""

import io

import pytest
from matplotlib.cbook import is_math_text
from matplotlib.text import Text
from PIL import Image

from skipvision_train.analysis.attention_figures import ImageSpan, attention_heads, attention_map
from skipvision_train.analysis.calibration_figures import skip_map, transfer_matrix, vig_by_task
from skipvision_train.analysis.figures import DARK, LIGHT, loss_curves, smooth, task_bars, to_png, vig_profile
from skipvision_train.evaluation.metrics import Accuracy


def test_loss_curves_show_every_logged_loss():
    rows = [{"step": i, "loss": 5.0 / i, "lr": 1.0} for i in range(1, 41)] + [{"step": 40, "train_runtime": 3.0}]
    axes = loss_curves({"pretrain": rows}).axes[0]
    raw, mean = axes.lines
    assert list(raw.get_xdata()) == list(range(1, 41))
    assert list(raw.get_ydata()) == [5.0 / i for i in range(1, 41)]
    assert len(mean.get_ydata()) == 40
    assert axes.get_ylim()[0] == 0


def test_smoothing_keeps_a_line_straight_and_short_series_as_they_are():
    assert smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]
    line = [float(i) for i in range(200)]
    assert smooth(line)[5:-5] == pytest.approx(line[5:-5])


def test_vig_marks_the_chosen_layers_and_the_zero():
    axes = vig_profile([0.5, 0.2, 0.01, 0.0], [2, 3]).axes[0]
    assert axes.get_yscale() == "log"
    kept, skipped = axes.collections
    assert kept.get_offsets()[:, 0].tolist() == [0, 1]
    assert skipped.get_offsets()[:, 0].tolist() == [2, 3]
    assert kept.get_offsets()[:, 1].tolist() == [0.5, 0.2]
    assert [text.get_text() for text in axes.texts] == ["0"]


def test_all_scores_zero_can_be_drawn():
    assert to_png(vig_profile([0.0, 0.0], []))


MONEY = "a_$x_{$"
"""No formula of matplotlib's: drawn as one it is an error. ``$x$`` would lose its signs."""
SPAN = ImageSpan(["skipped"] * 2, 0, {"skipped": MONEY})
OF_TASKS = {
    "vig": lambda name: vig_by_task({name: [0.5, 0.0], "b": [0.2, 0.0]}, [0.3, 0.0], title=name),
    "vig of one": lambda name: vig_profile([0.5, 0.0], [1], title=name),
    "skip map": lambda name: skip_map({1: {name: [1]}}, 2),
    "transfer": lambda name: transfer_matrix([[0.1, 0.2]] * 2, [name, "b"], ["b", name], title=name),
    "tasks": lambda name: task_bars({name: {name: Accuracy(0.6, 0.4, 0.7, 10)}, "b": {}}, title=name),
    "losses": lambda name: loss_curves({name: [{"step": 1, "loss": 1.0}], "b": [{"step": 1, "loss": 1.0}]}),
    "map": lambda name: attention_map([[0.1, 0.2]], SPAN, title=name),
    "heads": lambda name: attention_heads([[[[0.1, 0.2]]]], [0], [0], [name], SPAN, title=name),
}


@pytest.mark.parametrize("figure", OF_TASKS)
@pytest.mark.parametrize("name", [MONEY, "$x$"])
def test_names_are_no_formulas(figure, name):
    drawn = OF_TASKS[figure](name)
    assert to_png(drawn, dpi=40)
    labels = [text.get_text() for text in drawn.findobj(Text) if "$x" in text.get_text()]
    assert {label.replace("\\$", "$") for label in labels} >= {name}
    assert not any(map(is_math_text, labels))


def test_bars_carry_their_intervals():
    results = {"colour": Accuracy(0.6, 0.4, 0.7, 10), "count": Accuracy(0.0, 0.0, 0.3, 10)}
    axes = task_bars({"model": results, "blind": {"count": Accuracy(0.2, 0.1, 0.5, 10)}}).axes[0]
    assert [round(patch.get_width(), 6) for patch in axes.patches] == [60, 0, 20]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["colour", "count"]
    whiskers = axes.collections[0].get_segments()
    assert [segment[:, 0].tolist() for segment in whiskers] == [pytest.approx([40, 70]), pytest.approx([0, 30])]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_png_has_the_background_of_its_theme(theme):
    figure = loss_curves({"sft": [{"step": 1, "loss": 2.0}]}, theme)
    image = Image.open(io.BytesIO(to_png(figure, dpi=50)))
    assert image.format == "PNG"
    assert "#{:02x}{:02x}{:02x}".format(*image.convert("RGB").getpixel((1, 1))) == theme.background
