"""What a task's scores come to: its accuracy, and the figures that its benchmark reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from skipvision_train.evaluation.bootstrap import Array, figure, mean_score, resampled_sums
from skipvision_train.evaluation.metrics import Accuracy, Figure, accuracy, share
from skipvision_train.evaluation.tasks import METRICS
from skipvision_train.evaluation.yes_no import COGNITION, PERCEPTION, label_of

if TYPE_CHECKING:
    from skipvision_train.evaluation.results import Prediction

Predictions = Sequence["Prediction"]

_SUBTASK = 200.0
"""What a subtask of MME can reach: per cent of right answers and per cent of images with both answers right."""

_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
"""The categories of OCRBench that its paper adds up as text recognition."""


def summarise(metric: str, rows: Predictions, seed: int = 0, label: str = "") -> tuple[Accuracy, dict[str, Figure]]:
    """The accuracy of a task in [0, 1], and further figures by name.

    Args:
        metric: that all of them were scored by.
        rows: the task's answers.
        seed: of the resampling.
        label: resampling under other labels is independent.

    Raises:
        ValueError: no rows, or MME without two answers per image.
    """
    if metric == "mme":
        return _mme(rows, seed, label)
    scores = [row.score for row in rows]
    whole = mean_score(scores, seed, label) if METRICS[metric].graded else accuracy(round(sum(scores)), len(scores))
    return whole, _DETAILS.get(metric, _by_category)(rows, seed, label)


def _categories(rows: Predictions) -> dict[str, list[Prediction]]:
    """Rows by category, alphabetically; those without one are left out."""
    found: dict[str, list[Prediction]] = {}
    for row in rows:
        if row.category is not None:
            found.setdefault(row.category, []).append(row)
    return dict(sorted(found.items()))


def _by_category(rows: Predictions, seed: int, label: str) -> dict[str, Figure]:
    figures = {}
    for category, members in _categories(rows).items():
        scores = [row.score for row in members]
        if METRICS[members[0].metric].graded:
            mean = mean_score(scores, seed, f"{label}/{category}")
            figures[category] = Figure(mean.value, mean.low, mean.high, 1.0, mean.total)
        else:
            figures[category] = share(round(sum(scores)), len(scores))
    return figures


def _choice(rows: Predictions, seed: int, label: str) -> dict[str, Figure]:
    return {"unread": _unread(rows), **_by_category(rows, seed, label)}


def _unread(rows: Predictions) -> Figure:
    return share(sum(row.read == "" for row in rows), len(rows))


def _pope(rows: Predictions, seed: int, label: str) -> dict[str, Figure]:
    """POPE's five figures, over everything and within each split."""
    figures = _yes_no(rows, seed, label)
    for category, members in _categories(rows).items():
        figures |= {f"{category}.{name}": f for name, f in _yes_no(members, seed, f"{label}/{category}").items()}
    return figures


def _yes_no(rows: Predictions, seed: int, label: str) -> dict[str, Figure]:
    right = np.array([row.score > 0 for row in rows])
    yes = np.array([label_of(row.answer) == "yes" for row in rows])
    said_yes = right == yes
    cells = (yes & said_yes, ~yes & said_yes, yes & ~said_yes)
    hits, false, missed = (int(cell.sum()) for cell in cells)
    sums = resampled_sums(np.stack(cells, 1).astype(np.float64), seed, label)
    weight = 2 * sums[:, 0] + sums[:, 1] + sums[:, 2]
    f1 = np.divide(2 * sums[:, 0], weight, out=np.zeros_like(weight), where=weight > 0)
    return {
        "accuracy": share(int(right.sum()), len(rows)),
        "precision": share(hits, hits + false),
        "recall": share(hits, hits + missed),
        "f1": figure(f1, 1.0, len(rows), len(rows)),
        "yes_ratio": share(hits + false, len(rows)),
        "unread": _unread(rows),
    }


def _ocrbench(rows: Predictions, seed: int, label: str) -> dict[str, Figure]:
    """Counts of right answers: of everything (of 1000 in the whole benchmark), text recognition, and each category."""

    def count(members: Predictions) -> Figure:
        return share(round(sum(row.score for row in members)), len(members), float(len(members)))

    figures = {"score": count(rows)}
    if recognised := [row for row in rows if row.category in _RECOGNITION]:
        figures["Text Recognition"] = count(recognised)
    return figures | {category: count(members) for category, members in _categories(rows).items()}


def _mme(rows: Predictions, seed: int, label: str) -> tuple[Accuracy, dict[str, Figure]]:
    """Each subtask: per cent of right answers plus per cent of images with both right; their sums; the whole's share.

    Images are what is resampled, within their subtask: their two answers are not independent.
    """
    scores: dict[str, Array] = {}
    pairs: dict[str, int] = {}
    figures: dict[str, Figure] = {}
    for category, members in _categories(rows).items():
        units = _pairs(members, f"{label}, {category}")
        sums = resampled_sums(units, seed, f"{label}/{category}") / len(units)
        name = category.lower()
        scores[name], pairs[name] = 100 * (sums[:, 0] + sums[:, 1]), len(units)
        both = share(int(units[:, 1].sum()), len(units))
        figures[name] = figure(scores[name], _SUBTASK, 2 * len(units), len(units))
        figures[f"{name}.accuracy"] = figure(sums[:, 0], 1.0, 2 * len(units), len(units))
        figures[f"{name}.accuracy_plus"] = Figure(both.value, both.low, both.high, 1.0, 2 * len(units))

    def total(names: Sequence[str]) -> Figure:
        images = sum(pairs[name] for name in names)
        summed: Array = np.sum([scores[name] for name in names], axis=0)
        return figure(summed, _SUBTASK * len(names), 2 * images, images)

    halves = {"perception": PERCEPTION, "cognition": COGNITION}
    present = {half: [name for name in names if name in scores] for half, names in halves.items()}
    sums_of = {"score": total(list(scores)), **{half: total(names) for half, names in present.items() if names}}
    whole, most = sums_of["score"], sums_of["score"].maximum
    return Accuracy(whole.value / most, whole.low / most, whole.high / most, whole.total), sums_of | figures


def _pairs(rows: Predictions, where: str) -> Array:
    """(images, 2) float64: the share of right answers of each image, and 1 where both are right.

    Raises:
        ValueError: an image without two answers.
    """
    groups: dict[str | None, list[float]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row.score)
    for group, scores in groups.items():
        if len(scores) != 2:
            raise ValueError(f"{where}: {len(scores)} answers in group {group!r}; MME has 2 per image")
    return np.array([[sum(scores) / 2, float(sum(scores) == 2)] for scores in groups.values()])


_DETAILS: Mapping[str, Callable[[Predictions, int, str], dict[str, Figure]]] = {
    "multiple_choice": _choice,
    "yes_no": _pope,
    "ocrbench": _ocrbench,
}
