"""Scores and their uncertainty: pure functions of strings and counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % quantile: two-sided 95 % intervals."""

_EDGES = " .,:;!?\"'`*()[]"
_SPACE = re.compile(r"\s+")


def normalise_answer(text: str) -> str:
    """An answer as it is compared: case folded, white space collapsed, punctuation and quotes at its ends removed.

    Signs, digits and punctuation inside the answer stay: ``-5``, ``3.5`` and ``1:30`` are answers of their own.
    """
    return _SPACE.sub(" ", text.casefold()).strip(_EDGES)


def exact_match(prediction: str, answer: str) -> bool:
    """True if both are the same answer after :func:`normalise_answer`; an empty prediction is never right."""
    found = normalise_answer(prediction)
    return bool(found) and found == normalise_answer(answer)


@dataclass(frozen=True)
class Accuracy:
    """An estimate in [0, 1] with its 95 % interval, and how many answers it rests on."""

    value: float
    low: float
    high: float
    total: int


def accuracy_interval(correct: float, total: int) -> tuple[float, float]:
    """Wilson's score interval at 95 % for ``correct`` of ``total``; a sum of graded scores varies no more than a count.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total}: needs 0 <= correct <= total and total > 0")
    share, z2 = correct / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(correct: int, total: int) -> Accuracy:
    """``correct / total`` with Wilson's interval."""
    low, high = accuracy_interval(correct, total)
    return Accuracy(correct / total, low, high, total)


@dataclass(frozen=True)
class Figure:
    """A benchmark's own figure with its 95 % interval.

    Attributes:
        value: in [0, maximum].
        low, high: the interval.
        maximum: what a perfect model has.
        total: questions that it rests on.
    """

    value: float
    low: float
    high: float
    maximum: float
    total: int


def share(right: int, total: int, maximum: float = 1.0) -> Figure:
    """``maximum * right / total`` with Wilson's interval; of nothing 0, and anything is possible."""
    if total == 0:
        return Figure(0.0, 0.0, maximum, maximum, 0)
    low, high = accuracy_interval(right, total)
    return Figure(maximum * (right / total), maximum * low, maximum * high, maximum, total)


def mean_accuracy(tasks: Sequence[Accuracy]) -> Accuracy:
    """The unweighted mean over tasks; every task counts the same however many answers it has.

    The interval adds the distances from each task's estimate to its Wilson bounds in quadrature, each side by itself
    (Newcombe 1998, square-and-add): a task with every answer right still contributes its uncertainty, which the plug-in
    variance ``p (1 - p) / n`` would call zero.

    Raises:
        ValueError: no tasks.
    """
    if not tasks:
        raise ValueError("mean over tasks: no tasks given")
    count = len(tasks)
    value = sum(task.value for task in tasks) / count
    below = math.sqrt(sum((task.value - task.low) ** 2 for task in tasks)) / count
    above = math.sqrt(sum((task.high - task.value) ** 2 for task in tasks)) / count
    return Accuracy(value, max(0.0, value - below), min(1.0, value + above), sum(task.total for task in tasks))
