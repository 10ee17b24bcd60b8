"""Scores against hand-worked values."""

import math

import pytest

from skipvision_train.evaluation.metrics import (
    Accuracy,
    Figure,
    accuracy,
    accuracy_interval,
    exact_match,
    mean_accuracy,
    normalise_answer,
    share,
)


@pytest.mark.parametrize(
    ("raw", "normalised"),
    [
        ("  Seven.\n", "seven"),
        ('"Red  Circle"', "red circle"),
        ("-5", "-5"),
        ("3.50.", "3.50"),
        ("1:30", "1:30"),
        ("STRASSE", "strasse"),
        ("(B)", "b"),
    ],
)
def test_normalise(raw, normalised):
    assert normalise_answer(raw) == normalised
    assert normalise_answer(normalised) == normalised


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [("Yes.", "yes", True), ("yes it is", "yes", False), ("-5", "5", False), ("", "", False), (" . ", ".", False)],
)
def test_exact_match(prediction, answer, right):
    assert exact_match(prediction, answer) is right


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Wilson 1927 by hand with z = 1.96; 0/10 is (0, z2 / (n + z2)).
        (0, 10, 0.0, 0.27754),
        (10, 10, 0.72246, 1.0),
        (5, 10, 0.23659, 0.76341),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Table I
        (15, 148, 0.0624, 0.1605),  # the same table
    ],
)
def test_wilson(correct, total, low, high):
    assert accuracy_interval(correct, total) == pytest.approx((low, high), abs=6e-5)


def test_an_interval_stays_among_shares():
    """Rounding must not put a bound outside, for any count."""
    for total in range(1, 200):
        low, high = accuracy_interval(0, total)[0], accuracy_interval(total, total)[1]
        assert 0 <= low < 1e-12
        assert 1 - 1e-12 < high <= 1


def test_a_share_of_a_maximum_has_bounds_of_the_same_unit():
    found = share(5, 10, 200.0)
    assert (found.value, found.low, found.high) == pytest.approx((100, 200 * 0.23659, 200 * 0.76341), abs=0.01)
    assert (found.maximum, found.total) == (200, 10)
    assert share(0, 0, 200.0) == Figure(0, 0, 200, 200, 0)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts(correct, total):
    with pytest.raises(ValueError, match=f"{correct} correct of {total}"):
        accuracy_interval(correct, total)


def test_mean_is_over_tasks_not_over_answers():
    mean = mean_accuracy([accuracy(1000, 1000), accuracy(0, 10)])
    assert mean.value == 0.5
    assert mean.total == 1010


def test_mean_interval_by_hand():
    tasks = [Accuracy(0.5, 0.4, 0.6, 100), Accuracy(0.8, 0.5, 0.9, 20)]
    mean = mean_accuracy(tasks)
    assert mean.value == pytest.approx(0.65)
    assert mean.low == pytest.approx(0.65 - math.sqrt(0.01 + 0.09) / 2)
    assert mean.high == pytest.approx(0.65 + math.sqrt(0.01 + 0.01) / 2)


def test_one_task_keeps_its_interval():
    one = accuracy(7, 9)
    mean = mean_accuracy([one])
    assert (mean.value, mean.low, mean.high) == pytest.approx((one.value, one.low, one.high))


def test_perfect_tasks_keep_some_uncertainty():
    assert mean_accuracy([accuracy(20, 20), accuracy(30, 30)]).low < 0.95
