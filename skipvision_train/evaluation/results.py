"""What an evaluation found, and its JSON form ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skipvision_train.errors import DataError, PlanError
from skipvision_train.evaluation.metrics import Accuracy, accuracy, mean_accuracy
from skipvision_train.files import read_json, write_json
from skipvision_train.plans.plan import SkipPlan

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Prediction:
    """One question with the model's answer.

    Attributes:
        record_id: the record's id.
        task: the record's task, by which accuracies are grouped.
        images: the record's images as file paths below the data root; empty where images are not files.
        question: the text of the last question, without image markers.
        answer: the right answer.
        output: what the model wrote.
        correct: whether both are the same after normalisation.
        tokens: positions of the prompt per kind, lower-case names; kinds that do not occur are left out.
        tiles: tiles of each image.
    """

    record_id: str
    task: str
    images: tuple[str, ...]
    question: str
    answer: str
    output: str
    correct: bool
    tokens: dict[str, int] = field(default_factory=dict)
    tiles: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Accuracy of every task in alphabetical order, and their unweighted mean."""

    mean: Accuracy
    tasks: dict[str, Accuracy]

    @classmethod
    def of(cls, predictions: Iterable[Prediction]) -> Scores:
        """Group by task and count.

        Raises:
            ValueError: no predictions.
        """
        outcomes: dict[str, list[bool]] = {}
        for prediction in predictions:
            outcomes.setdefault(prediction.task, []).append(prediction.correct)
        tasks = {task: accuracy(sum(outcomes[task]), len(outcomes[task])) for task in sorted(outcomes)}
        return cls(mean_accuracy(list(tasks.values())), tasks)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the mean's fields, and ``tasks``."""
        return {**_accuracy_to_dict(self.mean), "tasks": {t: _accuracy_to_dict(a) for t, a in self.tasks.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        """Read the JSON form."""
        return cls(_accuracy_from_dict(data), {t: _accuracy_from_dict(a) for t, a in data["tasks"].items()})


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
            predictions=tuple(
                Prediction(**{**p, "images": tuple(p["images"]), "tiles": tuple(p["tiles"])})
                for p in data["predictions"]
            ),
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
        if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
            raise DataError(f"{path}: not an evaluation of format_version {FORMAT_VERSION}")
        try:
            return cls.from_dict(data)
        except (KeyError, TypeError, PlanError) as error:
            raise DataError(f"{path}: not an evaluation: {type(error).__name__}: {error}") from error
