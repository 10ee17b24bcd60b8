"""What an evaluation found, and its JSON form ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skipvision_train.errors import DataError, PlanError
from skipvision_train.evaluation.metrics import Accuracy, Figure, mean_accuracy
from skipvision_train.evaluation.summaries import summarise
from skipvision_train.evaluation.tasks import DEFAULT_METRIC
from skipvision_train.files import read_json, write_json
from skipvision_train.plans.plan import SkipPlan

FORMAT_VERSION = 3
_READABLE = (2, FORMAT_VERSION)
"""Version 2 knew exact match alone and stored ``correct``."""

_HALF = 0.5


@dataclass(frozen=True)
class Prediction:
    """One question with the model's answer.

    Attributes:
        record_id: the record's id.
        task: the record's task, by which accuracies are grouped.
        images: the record's images as file paths below the data root; empty where images are not files.
        question: the text of the last question, without image markers.
        answer: the right answer.
        output: what the model wrote, or the likeliest of the choices.
        score: in [0, 1], by ``metric``.
        tokens: positions of the prompt per kind, lower-case names; kinds that do not occur are left out.
        tiles: tiles of each image.
        metric: how the answer was scored.
        category: part of the benchmark; None without any.
        group: what belongs together with other questions; None without any.
        read: what the metric took the output for; empty if it found nothing in it, None if it takes the text as it is.
    """

    record_id: str
    task: str
    images: tuple[str, ...]
    question: str
    answer: str
    output: str
    score: float
    tokens: dict[str, int] = field(default_factory=dict)
    tiles: tuple[int, ...] = ()
    metric: str = DEFAULT_METRIC
    category: str | None = None
    group: str | None = None
    read: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the answer has at least half of what it could have."""
        return self.score >= _HALF

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Prediction:
        """Read the JSON form, also the one of version 2."""
        values = {name: value for name, value in data.items() if name != "correct"}
        values["score"] = float(data["correct"] if "correct" in data else data["score"])
        return cls(**{**values, "images": tuple(data["images"]), "tiles": tuple(data["tiles"])})


@dataclass(frozen=True)
class Scores:
    """What the tasks score, in alphabetical order.

    Attributes:
        mean: the unweighted mean over tasks.
        tasks: per task the mean score of its questions; of MME the share of what its subtasks can reach.
        metrics: per task how its answers were scored.
        details: per task the benchmark's own figures by name; empty where the score says it all.
    """

    mean: Accuracy
    tasks: dict[str, Accuracy]
    metrics: dict[str, str] = field(default_factory=dict)
    details: dict[str, dict[str, Figure]] = field(default_factory=dict)

    @classmethod
    def of(cls, predictions: Iterable[Prediction], seed: int = 0) -> Scores:
        """Group by task and add up.

        Args:
            predictions: in any order.
            seed: of the resampling, for intervals of figures that are no shares.

        Raises:
            ValueError: no predictions, or a task with two metrics.
        """
        answers: dict[str, list[Prediction]] = {}
        for prediction in predictions:
            answers.setdefault(prediction.task, []).append(prediction)
        tasks, metrics, details = {}, {}, {}
        for task, rows in sorted(answers.items()):
            metrics[task] = rows[0].metric
            if others := {row.metric for row in rows} - {metrics[task]}:
                raise ValueError(f"task {task!r} is scored by {metrics[task]} and {others.pop()}")
            tasks[task], details[task] = summarise(metrics[task], rows, seed, task)
        return cls(mean_accuracy(list(tasks.values())), tasks, metrics, details)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the mean's fields, and ``tasks``."""
        tasks = {
            task: {
                **_accuracy_to_dict(value),
                "metric": self.metrics[task],
                "details": {name: asdict(figure) for name, figure in self.details[task].items()},
            }
            for task, value in self.tasks.items()
        }
        return {**_accuracy_to_dict(self.mean), "tasks": tasks}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        """Read the JSON form, also the one of version 2."""
        tasks = data["tasks"]
        return cls(
            _accuracy_from_dict(data),
            {task: _accuracy_from_dict(value) for task, value in tasks.items()},
            {task: value.get("metric", DEFAULT_METRIC) for task, value in tasks.items()},
            {
                task: {name: Figure(**figure) for name, figure in value.get("details", {}).items()}
                for task, value in tasks.items()
            },
        )


def _accuracy_to_dict(value: Accuracy) -> dict[str, Any]:
    return {"accuracy": value.value, "interval": [value.low, value.high], "total": value.total}


def _accuracy_from_dict(data: dict[str, Any]) -> Accuracy:
    return Accuracy(data["accuracy"], data["interval"][0], data["interval"][1], data["total"])


@dataclass(frozen=True)
class BlindScores:
    """What the same questions score without their images.

    Attributes:
        variant: the image replacement with the better mean over tasks; ``scores`` are its.
        scores: accuracy of that variant.
        means: mean over tasks of every variant that was run.
    """

    variant: str
    scores: Scores
    means: dict[str, float]


@dataclass(frozen=True)
class Timing:
    """What one plan costs on this machine, median over repeats.

    Attributes:
        prefill_ms: one prefill of one sample, vision tower included.
        decode_ms: one further token of that sample.
        kv_bytes: keys and values of all layers after prefill, as allocated, mean per sample.
    """

    prefill_ms: float
    decode_ms: float
    kv_bytes: float


@dataclass(frozen=True)
class SampleCost:
    """FLOPs (2 per multiply-add) and cache of one sample's prefill, mean over the evaluated prompts.

    Attributes:
        tokens: mean positions per kind, lower-case names.
        vision: CLIP tower.
        connector: resampler and merging.
        lm_head: at the last prompt position.
        decoder_dense: decoder layers over the same tokens if nothing were skipped.
        decoder_plan: decoder layers under the plan.
        kv_bytes_dense: cache in half precision if nothing were evicted.
        kv_bytes_plan: cache in half precision after eviction.
    """

    tokens: dict[str, float]
    vision: float
    connector: float
    lm_head: float
    decoder_dense: float
    decoder_plan: float
    kv_bytes_dense: float
    kv_bytes_plan: float


@dataclass(frozen=True)
class EvaluationResult:
    """Everything ``skipvision evaluate`` measured.

    Attributes:
        checkpoint: the evaluated model directory.
        recipe: the data.
        plan: the plan the model ran under.
        scores: accuracy under that plan.
        cost: FLOPs and cache sizes, by arithmetic.
        predictions: every question with its answer.
        blind: the same questions without their images; None if not asked for.
        timing: per plan name (``dense`` and the plan's), measured in one run; None if not asked for.
        seed: of the image shuffling.
        versions: package versions.
    """

    checkpoint: str
    recipe: str
    plan: SkipPlan
    scores: Scores
    cost: SampleCost
    predictions: tuple[Prediction, ...]
    blind: BlindScores | None = None
    timing: dict[str, Timing] | None = None
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        blind = self.blind and {
            "variant": self.blind.variant,
            "means": self.blind.means,
            **self.blind.scores.to_dict(),
        }
        return {
            "format_version": FORMAT_VERSION,
            "checkpoint": self.checkpoint,
            "recipe": self.recipe,
            "seed": self.seed,
            "versions": self.versions,
            "plan": self.plan.to_dict(),
            **self.scores.to_dict(),
            "blind": blind,
            "cost": asdict(self.cost),
            "timing": self.timing and {name: asdict(timing) for name, timing in self.timing.items()},
            "predictions": [asdict(p) for p in self.predictions],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvaluationResult:
        """Read the JSON form."""
        blind, timing = data["blind"], data["timing"]
        return cls(
            checkpoint=data["checkpoint"],
            recipe=data["recipe"],
            plan=SkipPlan.from_dict(data["plan"]),
            scores=Scores.from_dict(data),
            cost=SampleCost(**data["cost"]),
            predictions=tuple(Prediction.from_dict(p) for p in data["predictions"]),
            blind=blind and BlindScores(blind["variant"], Scores.from_dict(blind), blind["means"]),
            timing=timing and {name: Timing(**values) for name, values in timing.items()},
            seed=data["seed"],
            versions=data["versions"],
        )

    def save(self, path: str | Path) -> None:
        """Write the JSON form; a reader never sees half a file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Read ``evaluation.json``.

        Raises:
            DataError: the file is missing, is no JSON, or is no evaluation; the message names it.
        """
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format_version") not in _READABLE:
            raise DataError(f"{path}: not an evaluation of format_version {' or '.join(map(str, _READABLE))}")
        try:
            return cls.from_dict(data)
        except (KeyError, TypeError, ValueError, PlanError) as error:
            raise DataError(f"{path}: not an evaluation: {type(error).__name__}: {error}") from error
