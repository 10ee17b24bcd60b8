"""What every layer's visual computation adds, by several criteria: V-Skip's VIG and what it is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from skipvision_train.calibration.samples import Sample
from skipvision_train.calibration.sweep import SweepOptions, read_logits, sweep
from skipvision_train.errors import ConfigError
from skipvision_train.evaluation.metrics import Z_95
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import VISUAL, Kinds, LayerRule


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(P || Q) of the distributions of two sets of logits, in nats.

    Args:
        logits: (N, V), P; any floating dtype, computed in float64.
        other: (N, V), Q.

    Returns:
        (N,) float64, not negative: rounding may leave -1e-17 where P and Q agree, which is clamped.
    """
    log_p, log_q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)


def reverse_kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL(Q || P), the direction that VTW's and ShortV's code computes; shapes as :func:`kl_divergence`."""
    return kl_divergence(other, logits)


def cosine_distance(logits: Tensor, other: Tensor) -> Tensor:
    """1 - cosine similarity of two sets of logits (N, V): (N,) float64."""
    return (1 - torch.cosine_similarity(logits.double(), other.double(), dim=-1)).clamp_min(0)


@dataclass(frozen=True)
class Strategy:
    """How a layer is scored.

    Attributes:
        attention, ffn: what is switched off for visual tokens in that layer.
        divergence: compares the logits (N, V) with and without it; None ranks at random.
        unit: of a score.
    """

    attention: bool
    ffn: bool
    divergence: Callable[[Tensor, Tensor], Tensor] | None
    unit: str = "nats"

    def describe(self) -> str:
        """In words, for provenance."""
        part = " and ".join(name for name, off in (("attention", self.attention), ("FFN", self.ffn)) if off)
        how = "random order" if self.divergence is None else self.divergence.__name__.replace("_", " ")
        return f"{how} of the next-token distribution with and without the visual {part} of one layer"

    def rule(self, bypass: str, kinds: Kinds = VISUAL) -> LayerRule:
        """What the strategy leaves out in a layer."""
        nothing: Kinds = frozenset()
        return LayerRule(kinds if self.attention else nothing, kinds if self.ffn else nothing, bypass)


STRATEGIES: dict[str, Strategy] = {
    "vig": Strategy(True, False, kl_divergence),
    "vig_ffn": Strategy(False, True, kl_divergence),
    "vig_block": Strategy(True, True, kl_divergence),
    "vig_reverse": Strategy(True, False, reverse_kl),
    "cosine": Strategy(True, False, cosine_distance, "1 - cosine"),
    "shortv": Strategy(True, True, reverse_kl),
    "random": Strategy(True, False, None, "rank"),
}
"""``vig`` is V-Skip (Eq. 3); ``vig_ffn`` and ``vig_block`` its functional asymmetry; ``shortv`` ShortV's layer
contribution; the others are what V-Skip's ablations compare with."""


@dataclass(frozen=True)
class ScoreTable:
    """Divergences per layer and sample.

    Attributes:
        strategy: one of :data:`STRATEGIES`.
        bypass: what replaced a skipped attention.
        values: (layers, samples) float64 on the CPU, nats (cosine: 1 - cosine); the last layer's row is exactly 0.
        samples: the sample of every column.
        tasks: the task of every column.
    """

    strategy: str
    bypass: str
    values: Tensor
    samples: tuple[str, ...]
    tasks: tuple[str, ...]

    def _columns(self, task: str | None) -> Tensor:
        columns = [i for i, own in enumerate(self.tasks) if task is None or own == task]
        if not columns:
            known = ", ".join(sorted(set(self.tasks)))
            raise ConfigError(f"task: no sample has the task {task!r}; there are {known}")
        return self.values[:, columns]

    def mean(self, task: str | None = None) -> Tensor:
        """(layers,) float64, the mean over the samples of ``task``, or all."""
        return self._columns(task).mean(-1)

    def interval(self, task: str | None = None) -> Tensor:
        """(layers, 2) float64, the normal 95 % interval of the mean; one sample gives an interval without width."""
        values = self._columns(task)
        deviation = values.std(-1) if values.shape[1] > 1 else torch.zeros(len(values), dtype=values.dtype)
        margin = Z_95 * deviation / values.shape[1] ** 0.5
        mean = values.mean(-1)
        return torch.stack([mean - margin, mean + margin], dim=-1)

    def of(self, samples: Sequence[str]) -> ScoreTable:
        """The same of some of the samples, in their order."""
        columns = [self.samples.index(name) for name in samples]
        tasks = tuple(self.tasks[column] for column in columns)
        return replace(self, values=self.values[:, columns], samples=tuple(samples), tasks=tasks)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**vars(self), "values": self.values.tolist(), "samples": list(self.samples), "tasks": list(self.tasks)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ScoreTable:
        """Read the JSON form."""
        values = torch.tensor(data["values"], dtype=torch.float64)
        return cls(data["strategy"], data["bypass"], values, tuple(data["samples"]), tuple(data["tasks"]))


def strategy_named(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"strategy: {name!r} is unknown; use {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def score_layers(
    model: nn.Module,
    samples: Sequence[Sample],
    strategy: str = "vig",
    bypass: str = "zero",
    base: SkipPlan | None = None,
    seed: int = 0,
    options: SweepOptions | None = None,
) -> ScoreTable:
    """Score every layer: how far the output moves when visual tokens skip a part of that layer alone (V-Skip, Eq. 3).

    Args:
        model: ours or one of transformers' (``skipvision_train.apply`` says which), in ``eval`` mode.
        samples: on the model's device.
        strategy: one of :data:`STRATEGIES`.
        bypass: what replaces a skipped attention, ``zero`` or ``norm``.
        base: the plan that holds besides; None: nothing is skipped.
        seed: of the ``random`` strategy.
        options: how the sweep is run.

    Raises:
        ConfigError: an unknown strategy, no samples, or a score that is not finite, with its layer and sample.
        PlanError: the plan does not fit the model.
    """
    ids, tasks = tuple(sample.id for sample in samples), tuple(sample.task for sample in samples)
    if not samples:
        raise ConfigError("samples: none given; calibration needs at least one prompt with an image")
    if strategy_named(strategy).divergence is None:
        values = random_ranks(len(find_decoder(model).layers), seed)[:, None].repeat(1, len(samples))
    else:
        values = layer_values(model, samples, strategy, bypass, base or dense(), options)
    check_finite(values, ids)
    return ScoreTable(strategy, bypass, values, ids, tasks)


def layer_values(
    model: nn.Module,
    samples: Sequence[Sample],
    strategy: str,
    bypass: str,
    base: SkipPlan,
    options: SweepOptions | None = None,
) -> Tensor:
    """(layers, samples) float64: the values of a table, unchecked; with ``options.exchange`` those of all processes.

    Raises:
        ConfigError: an unknown strategy, or one that measures nothing.
    """
    chosen = strategy_named(strategy)
    if chosen.divergence is None:
        raise ConfigError(f"strategy: {strategy!r} measures nothing; its order is random_ranks")
    return sweep(model, samples, chosen.rule(bypass), chosen.divergence, base, options)


def random_ranks(depth: int, seed: int) -> Tensor:
    """(layers,) float64: the layers but the last in a random order, as ranks from 1; the last has 0."""
    order = list(range(depth - 1))
    random.Random(f"{seed}/random layers").shuffle(order)
    ranks = torch.zeros(depth, dtype=torch.float64)
    ranks[order] = torch.arange(1, depth, dtype=torch.float64)
    return ranks


def plan_divergence(
    model: nn.Module,
    samples: Sequence[Sample],
    plan: SkipPlan,
    base: SkipPlan | None = None,
    image_token_id: int | None = None,
) -> Tensor:
    """(samples,) float64: KL(P under ``base`` || P under ``plan``), of a whole plan; mean over a sample's positions."""
    return plan_divergences(model, samples, [plan], base, image_token_id)[0]


@torch.no_grad()
def plan_divergences(
    model: nn.Module,
    samples: Sequence[Sample],
    plans: Sequence[SkipPlan],
    base: SkipPlan | None = None,
    image_token_id: int | None = None,
) -> Tensor:
    """(plans, samples) float64: :func:`plan_divergence` of several plans; ``base`` runs once per sample."""
    values = torch.zeros(len(plans), len(samples), dtype=torch.float64)
    for column, sample in enumerate(samples):
        reference = read_logits(model, sample, base or dense(), image_token_id)
        for row, plan in enumerate(plans):
            moved = read_logits(model, sample, plan, image_token_id)
            values[row, column] = kl_divergence(reference, moved).mean().cpu()
    return values


def check_finite(values: Tensor, ids: Sequence[str]) -> None:
    """Refuse scores that are no numbers: they must never rank.

    Raises:
        ConfigError: naming the first layer and sample.
    """
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        layer, sample = bad[0].tolist()
        raise ConfigError(
            f"layer {layer}: the score of sample {ids[sample]} is {values[layer, sample].item()}; the model's logits "
            "overflow: calibrate in bf16 or fp32 (precision=fp32)"
        )
