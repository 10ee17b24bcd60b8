"""From scores to layers: budgets, agreement between seeds, greedy and joint search, final plans compared.

Nothing here needs a model: scores come in as numbers or from a callable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from skipvision_train.analysis.flops import KindCounts, layer_flops, live_counts, sequence_flops
from skipvision_train.calibration.scores import ScoreTable
from skipvision_train.errors import ConfigError
from skipvision_train.evaluation.metrics import Z_95
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import VISUAL, Kinds, LayerRule

Scores = Tensor | Sequence[float]
"""One score per layer, layer 0 first; the smaller, the less is lost by skipping that layer."""


@dataclass(frozen=True)
class Budget:
    """How many layers skip: exactly one of the fields.

    Attributes:
        count: N layers.
        share: of the model's layers, 0 to 1, rounded down.
        threshold: nats; every layer whose score is at most this.
        total: nats; the most layers whose scores add up to at most this.

    Raises:
        ConfigError: none or several given, or a value that is negative or no number.
    """

    count: int | None = None
    share: float | None = None
    threshold: float | None = None
    total: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise ConfigError(f"budget: {found}; give exactly one of {', '.join(vars(self))}")
        if isinstance(self.count, bool) or not isinstance(self.count, int | None):
            raise ConfigError(f"count: {self.count!r} is no number of layers; use a whole number")
        if not (value := vars(self)[given[0]]) >= 0:  # also true for NaN
            raise ConfigError(f"{given[0]}: {value}; use 0 or more")
        if self.share is not None and self.share > 1:
            raise ConfigError(f"share: {self.share}; a share of the layers is at most 1")


def finite_scores(scores: Scores) -> list[float]:
    """The scores as numbers.

    Raises:
        ConfigError: no scores, or some that are not finite, with their layers: they must never rank.
    """
    values = [float(score) for score in scores]
    if not values:
        raise ConfigError("scores: there are none; give one per layer")
    if bad := [i for i, value in enumerate(values) if not math.isfinite(value)]:
        raise ConfigError(
            f"scores: those of layers {bad} are not finite: {[values[i] for i in bad]}; the model's logits overflow: "
            "calibrate in bf16 or fp32 (precision=fp32)"
        )
    return values


def rank_layers(scores: Scores) -> tuple[int, ...]:
    """All layers by ascending score, ties by index; ConfigError as :func:`finite_scores`."""
    values = finite_scores(scores)
    return tuple(sorted(range(len(values)), key=lambda i: (values[i], i)))


def select_layers(scores: Scores, n: int) -> tuple[int, ...]:
    """The ``n`` layers of the smallest scores, ascending; ties go to the smaller index (V-Skip, Eq. 4).

    Raises:
        ConfigError: ``n`` is negative or larger than the number of layers, or a score is not finite.
    """
    order = rank_layers(scores)
    check_count(n, len(order))
    return tuple(sorted(order[:n]))


def check_count(n: int, layers: int) -> None:
    """Raise ConfigError if ``n`` of ``layers`` layers cannot be chosen."""
    if not 0 <= n <= layers:
        raise ConfigError(f"count: {n} of {layers} layers cannot be chosen; use 0 to {layers}")


def count_for(scores: Scores, budget: Budget) -> tuple[int, ...]:
    """The layers of the smallest scores, as many as ``budget`` allows, ascending.

    Raises:
        ConfigError: ``budget.count`` is above the number of layers, or a score is not finite.
    """
    values = finite_scores(scores)
    if budget.count is not None:
        n = budget.count
    elif budget.share is not None:
        n = int(budget.share * len(values) + 1e-9)  # 0.29 of 100 layers is 28.999999999999996
    elif budget.threshold is not None:
        n = sum(value <= budget.threshold for value in values)
    else:
        assert budget.total is not None
        spent = accumulate(sorted(values), initial=0.0)
        n = max(i for i, sum_of_i in enumerate(spent) if sum_of_i <= budget.total)
    return select_layers(values, n)


@dataclass(frozen=True)
class Stability:
    """How far scores and chosen layers depend on the samples that were drawn.

    Attributes:
        mean: (layers,) float64, over seeds.
        variance: (layers,) float64, unbiased, over seeds; 0 for a single seed.
        chosen: (layers,) float64, the share of seeds that choose the layer, 0 to 1.
        overlap: (seeds, seeds) float64, Jaccard index of the chosen sets; 1 where both are empty.
    """

    mean: Tensor
    variance: Tensor
    chosen: Tensor
    overlap: Tensor

    @property
    def mean_overlap(self) -> float:
        """Over pairs of different seeds; 1 for a single seed."""
        pairs = [float(self.overlap[i, j]) for i, j in combinations(range(len(self.overlap)), 2)]
        return sum(pairs) / len(pairs) if pairs else 1.0


def stability(scores: Tensor, layers: Sequence[Sequence[int]]) -> Stability:
    """Compare calibrations of one model that differ in the seed (V-Skip, Sec. 4.5.4).

    Args:
        scores: (seeds, layers) float, the mean over each seed's samples.
        layers: the layers that each seed's scores choose.
    """
    sets = [set(own) for own in layers]
    chosen = torch.tensor([[float(i in own) for i in range(scores.shape[1])] for own in sets], dtype=torch.float64)
    overlap = [[len(a & b) / len(a | b) if a | b else 1.0 for b in sets] for a in sets]
    variance = scores.var(0) if len(scores) > 1 else torch.zeros_like(scores[0])
    return Stability(scores.mean(0), variance, chosen.mean(0), torch.tensor(overlap, dtype=torch.float64))


def universal(tables: ScoreTable | Sequence[ScoreTable], how: str = "pooled") -> Tensor:
    """Scores for a plan that serves all tasks: (layers,) float64.

    Args:
        tables: one table of several tasks, or several (a task's columns are put together).
        how: ``pooled``, the mean over tasks of each task's mean, so that every task counts the same however many
            samples it has; or the name of the one task whose scores serve all.

    Raises:
        ConfigError: no such task, no tables, or tables of different models or strategies.
    """
    tables = tables if isinstance(tables, Sequence) else [tables]
    _check_alike(tables)
    values = torch.cat([table.values for table in tables], dim=1)
    columns: dict[str, list[int]] = {}
    for i, task in enumerate(task for table in tables for task in table.tasks):
        columns.setdefault(task, []).append(i)
    if how != "pooled" and how not in columns:
        raise ConfigError(f"universal: no sample has the task {how!r}; use pooled or one of {', '.join(columns)}")
    names = columns if how == "pooled" else [how]
    return torch.stack([values[:, columns[name]].mean(-1) for name in names]).mean(0)


def _check_alike(tables: Sequence[ScoreTable]) -> None:
    if not tables:
        raise ConfigError("scores: no tables given")
    kinds = sorted({f"{table.strategy} ({table.bypass}, {len(table.values)} layers)" for table in tables})
    if len(kinds) > 1:
        raise ConfigError(f"scores: {' and '.join(kinds)} cannot be put together; use tables of one kind")


@dataclass(frozen=True)
class GreedySearch:
    """The base plan with the rule in the chosen layers, these as they were chosen, and what each cost at its turn."""

    plan: SkipPlan
    order: tuple[int, ...]
    trail: tuple[float, ...]


def greedy(score: Callable[[SkipPlan], Tensor], base: SkipPlan, rule: LayerRule, n: int) -> GreedySearch:
    """Choose ``n`` layers one by one, scoring all others again after every choice.

    Layers in which ``base`` leaves out what ``rule`` does are not candidates: choosing them would change nothing.

    Args:
        score: of a plan: (layers,), what ``rule`` in one further layer costs on top of it. The whole is not their sum.
        base: bound to the model's depth.
        rule: what a chosen layer leaves out besides.
        n: how many layers to choose; each costs one call of ``score``.

    Raises:
        ConfigError: fewer than ``n`` candidates, or a score that is not finite.
        PlanError: ``base`` has no depth of its own, or another bypass somewhere.
    """
    open_layers = [i for i in range(base.num_layers) if base.rules[i].combine(rule) != base.rules[i]]
    check_count(n, len(open_layers))
    plan, order, trail = base, [], []
    for _ in range(n):
        values = _scores_of(score(plan), plan)
        best = min(open_layers, key=lambda i: (values[i], i))
        open_layers.remove(best)
        order.append(best)
        trail.append(values[best])
        plan = plan.with_rule(best, rule)
    return GreedySearch(_named(plan, base, "greedy"), tuple(order), tuple(trail))


@dataclass(frozen=True)
class JointSearch:
    """What :func:`joint` found.

    Attributes:
        plan: the base plan and all choices; a layer both of whose parts are chosen is a ShortV layer.
        order: (layer, part) as they were chosen.
        trail: the added score of each at the time of its choice.
        flops_ratio: decoder FLOPs of ``plan`` over those of the dense plan.
    """

    plan: SkipPlan
    order: tuple[tuple[int, str], ...]
    trail: tuple[float, ...]
    flops_ratio: float


def part_rules(bypass: str = "zero", kinds: Kinds = VISUAL) -> dict[str, LayerRule]:
    """The rules that compete in :func:`joint`: one switches off ``attention``, one the ``ffn``."""
    return {"attention": LayerRule(no_attention=kinds, bypass=bypass), "ffn": LayerRule(no_ffn=kinds)}


def flops_ratio(text_config: PreTrainedConfig, kind_counts: KindCounts, plan: SkipPlan) -> float:
    """Prefill FLOPs of the decoder layers under ``plan`` over those of the dense plan (:func:`sequence_flops`)."""
    whole = sequence_flops(text_config, kind_counts, dense().bind(plan.num_layers)).total
    return sequence_flops(text_config, kind_counts, plan).total / whole


def joint(
    score: Callable[[SkipPlan, str], Tensor],
    base: SkipPlan,
    target: float,
    *,
    text_config: PreTrainedConfig,
    kind_counts: KindCounts,
    rules: Mapping[str, LayerRule] | None = None,
    rescore: bool = False,
) -> JointSearch:
    """Let the parts of all layers compete: the smallest added score per FLOP saved, until the FLOPs budget is met.

    Ties go to the smaller layer, then to the part named first. A choice that saves nothing is no candidate.

    Args:
        score: of a plan and a part: (layers,), what leaving out that part of one further layer on top of the plan adds.
        base: bound to the model's depth.
        target: FLOPs of the decoder layers over those of the dense plan, at most.
        text_config: the decoder's sizes.
        kind_counts: positions of each kind of a typical prompt; only FLOPs depend on them.
        rules: the competing parts; None takes :func:`part_rules`.
        rescore: score all parts again after every choice; otherwise once, on top of ``base``.

    Raises:
        ConfigError: even all parts of all layers do not save enough, with the smallest ratio that can be reached; or a
            score that is not finite.
        PlanError: ``base`` has no depth of its own or another one than ``text_config``, or another bypass somewhere.
    """
    rules = part_rules() if rules is None else rules
    candidates = [(layer, part) for layer in range(base.num_layers) for part in rules]
    _check_reachable(target, flops_ratio(text_config, kind_counts, _with_all(base, rules)))
    live = live_counts(kind_counts, base)
    plan, order, trail = base, [], []
    values: dict[str, list[float]] = {}
    while (ratio := flops_ratio(text_config, kind_counts, plan)) > target:
        if rescore or not values:
            values = {part: _scores_of(score(plan, part), plan) for part in rules}
        saved = {(i, part): _saved(text_config, live[i], plan.rules[i], rules[part]) for i, part in candidates}
        useful = [choice for choice in candidates if saved[choice] > 0]
        layer, part = min(useful, key=lambda choice: values[choice[1]][choice[0]] / saved[choice])
        order.append((layer, part))
        trail.append(values[part][layer])
        plan = plan.with_rule(layer, rules[part])
    return JointSearch(_named(plan, base, "joint"), tuple(order), tuple(trail), ratio)


def _saved(text_config: PreTrainedConfig, live: KindCounts, rule: LayerRule, added: LayerRule) -> float:
    """FLOPs that ``added`` saves in a layer of ``live`` tokens that has ``rule`` already; exactly 0 if nothing."""
    before = layer_flops(text_config, live, rule).total
    return before - layer_flops(text_config, live, rule.combine(added)).total


def _with_all(base: SkipPlan, rules: Mapping[str, LayerRule]) -> SkipPlan:
    for layer in range(base.num_layers):
        for rule in rules.values():
            base = base.with_rule(layer, rule)
    return base


def _check_reachable(target: float, smallest: float) -> None:
    if not target >= smallest:  # also true for NaN
        shown = math.ceil(smallest * 1e4) / 1e4  # rounded up: what the message names can be asked for
        raise ConfigError(
            f"target: {target} of the dense FLOPs cannot be reached; leaving out every part of every layer leaves "
            f"{shown:.4f}, use that or more"
        )


def _scores_of(scores: Tensor, plan: SkipPlan) -> list[float]:
    values = finite_scores(scores)
    if len(values) != plan.num_layers:
        raise ConfigError(f"scores: {len(values)} for the {plan.num_layers} layers of plan {plan.name!r}")
    return values


def _named(plan: SkipPlan, base: SkipPlan, search: str) -> SkipPlan:
    return replace(plan, name=search if base.is_dense else f"{base.name} + {search}")


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its normal 95 % interval, which has no width where there is one sample."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The mean of (samples,) values, computed in float64.

        Raises:
            ConfigError: no values, or values that are not finite.
        """
        values = values.double()
        if not len(values) or not bool(values.isfinite().all()):
            raise ConfigError(f"divergence: needs finite values of at least one sample, found {values.tolist()}")
        mean = float(values.mean())
        half = Z_95 * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return cls(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Comparison:
    """One plan on held-out samples.

    Attributes:
        name: of the plan.
        samples: how many.
        kl: mean divergence of the final plan from the base model, nats.
        difference: of ``kl`` to the first plan's, sample by sample: both saw the same samples, so this interval is
            narrower than the two of ``kl`` suggest; it excludes 0 where one plan is better.
    """

    name: str
    samples: int
    kl: Estimate
    difference: Estimate


def compare(plans: Mapping[str, SkipPlan], divergence: Callable[[SkipPlan], Tensor]) -> list[Comparison]:
    """What the final plans of several searches cost, on samples that none of them has seen.

    Args:
        plans: by name.
        divergence: of a plan: (samples,), KL(P || P under the plan) of every held-out sample, always the same ones.

    Raises:
        ConfigError: a divergence that is not finite, or another number of samples than the first plan's.
    """
    rows: list[Comparison] = []
    first: Tensor | None = None
    for name, plan in plans.items():
        values = divergence(plan).double()
        first = values if first is None else first
        if values.shape != first.shape:
            raise ConfigError(f"divergence: {len(values)} samples for {name}, {len(first)} for {rows[0].name}")
        try:
            rows.append(Comparison(name, len(values), Estimate.of(values), Estimate.of(values - first)))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    return rows
