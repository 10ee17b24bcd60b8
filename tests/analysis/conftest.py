"""A made-up evaluation, so that reports need no model."""

from collections.abc import Callable

import pytest

from skipvision_train.evaluation.results import (
    BlindScores,
    EvaluationResult,
    Prediction,
    SampleCost,
    Scores,
    Timing,
)
from skipvision_train.plans import skip_ffn

TASKS = ("colour", "count", "text")


def _predictions(per_task: int, right: int) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(f"{task}-{i}", task, (f"{task}{i}.png",), f"Which {task} {i}?", "red", "red", i < right)
        for task in TASKS
        for i in range(per_task)
    )


def make_evaluation(per_task: int = 8, right: int = 5, **overrides: object) -> EvaluationResult:
    predictions = _predictions(per_task, right)
    values: dict = {
        "checkpoint": "outputs/model",
        "recipe": "sketches",
        "plan": skip_ffn().bind(3),
        "scores": Scores.of(predictions),
        "cost": SampleCost({"text": 12.0, "skipped": 5.5}, 2e9, 1e9, 1e6, 4e9, 2e9, 4096.0, 1024.0),
        "predictions": predictions,
        "blind": BlindScores("grey", Scores.of(_predictions(per_task, 1)), {"grey": 0.125, "shuffled": 0.1}),
        "timing": {"dense": Timing(20.25, 5.0, 4096.0), "plan": Timing(15.5, 4.0, 1024.0)},
        "versions": {"torch": "2.15"},
    }
    return EvaluationResult(**{**values, **overrides})


@pytest.fixture
def evaluation_factory() -> Callable[..., EvaluationResult]:
    return make_evaluation
