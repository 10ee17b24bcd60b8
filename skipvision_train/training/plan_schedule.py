"""Which plan a stage runs under at which of its steps: a pure function of the number of steps done."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from skipvision_train.config.resolve import stage_plans
from skipvision_train.config.specs import TrainConfig
from skipvision_train.plans.plan import SkipPlan


@dataclass(frozen=True)
class PlanSchedule:
    """A stage's plans, and when each of them holds.

    Processes agree and a resumed run continues exactly, because nothing but the step counts.

    Attributes:
        plans: entry k skips k layers beside the base plan, which is entry 0; the last one skips all layers.
        widen: start and end as shares of the stage's steps, 0 <= start < end <= 1; None: the last plan throughout.
    """

    plans: tuple[SkipPlan, ...]
    widen: tuple[float, float] | None = None

    @classmethod
    def of(cls, cfg: TrainConfig, depth: int) -> PlanSchedule:
        """The schedule of a validated configuration, for a model of ``depth`` layers.

        Raises:
            ConfigError: plan or layers do not fit the depth, or contradict each other.
        """
        widen = cfg.stage.skip.widen
        return cls(stage_plans(cfg, depth), None if widen is None else (widen[0], widen[1]))

    @property
    def layers(self) -> int:
        """How many layers are skipped in the end, beside what the base plan skips."""
        return len(self.plans) - 1

    def skipped(self, step: int, total: int) -> int:
        """How many layers are skipped after ``step`` of ``total`` optimizer steps.

        With ``widen``: none up to its start, all from its end on, and between them each number for the same time.
        """
        if self.widen is None:
            return self.layers
        # Shares are meant as they are written: as a binary fraction, 0.1 of 30 steps is a little more than 3.
        start, end = (Fraction(str(share)) * total for share in self.widen)
        share = (step - start) / (end - start)
        return int(self.layers * min(max(share, Fraction(0)), Fraction(1)))

    def plan_at(self, step: int, total: int) -> SkipPlan:
        """The plan of the step that follows ``step`` steps of ``total``; for ``step == total`` the finished model's."""
        return self.plans[self.skipped(step, total)]

    def first_steps(self, total: int) -> tuple[int, ...]:
        """For each number of layers from 0 on: after how many of ``total`` steps so many are skipped, at least."""
        steps = range(total + 1)
        return tuple(bisect_left(steps, k, key=lambda step: self.skipped(step, total)) for k in range(len(self.plans)))

    def mean(self, cost: Callable[[SkipPlan], float], total: int) -> float:
        """The mean of a plan's ``cost`` over ``total`` steps."""
        first = (*self.first_steps(total), total)
        return sum((first[k + 1] - first[k]) * cost(plan) for k, plan in enumerate(self.plans)) / total
