"""Intervals of figures that are no shares: resampled sums (Efron's percentile bootstrap), reproducible by a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from skipvision_train.evaluation.metrics import Accuracy, Figure, accuracy_interval

RESAMPLES = 2000
_BLOCK = 100

Array = NDArray[np.float64]


def resampled_sums(units: Array, seed: int, label: str = "") -> Array:
    """Column sums over units that are drawn with replacement, as many as there are.

    Equal rows are drawn together by a multinomial draw, so their order does not matter: nothing depends on how answers
    were batched.

    Args:
        units: (N, K) float64, one row per question, or per group of questions that stand or fall together.
        seed: of the draws.
        label: draws under other labels are independent.

    Returns:
        (RESAMPLES + 1, K) float64; row 0 holds the sums of the units themselves.
    """
    rows, counts = np.unique(units, axis=0, return_counts=True)
    draws = np.random.default_rng([seed, *label.encode()])
    blocks = [counts[None] @ rows]
    for _ in range(RESAMPLES // _BLOCK):
        blocks.append(draws.multinomial(len(units), counts / len(units), _BLOCK) @ rows)
    return np.concatenate(blocks)


def figure(values: Array, maximum: float, total: int, units: int) -> Figure:
    """A figure whose estimate is ``values[0]`` and whose resampled values are the rest.

    Where all resamples agree (everything right, nothing right) they say nothing of how sure that is: Wilson's interval
    of so many units stands instead.
    """
    value = float(values[0])
    low, high = (float(bound) for bound in np.percentile(values[1:], (2.5, 97.5)))
    if high - low <= 1e-12 * maximum:
        low, high = (maximum * bound for bound in accuracy_interval(min(1.0, value / maximum) * units, units))
    return Figure(value, min(low, value), max(high, value), maximum, total)


def mean_score(scores: Sequence[float], seed: int, label: str = "") -> Accuracy:
    """The mean of graded scores in [0, 1] of single questions.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("the mean of no scores")
    units = np.asarray(scores, dtype=np.float64)[:, None]
    found = figure(resampled_sums(units, seed, label)[:, 0] / len(scores), 1.0, len(scores), len(scores))
    return Accuracy(found.value, found.low, found.high, found.total)
