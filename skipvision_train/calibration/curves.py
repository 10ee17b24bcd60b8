"""KL and accuracy against N, the number of skipped layers, for V-Skip and the methods it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from skipvision_train.calibration.search import Estimate, check_count
from skipvision_train.errors import ConfigError
from skipvision_train.evaluation.metrics import Accuracy
from skipvision_train.plans.methods import ffn_skip, shortv, vskip, vtw
from skipvision_train.plans.plan import SkipPlan

METHODS: dict[str, str] = {
    "vig": "V-Skip",
    "vig_reverse": "V-Skip reverse KL",
    "cosine": "V-Skip cosine",
    "random": "V-Skip random",
    "vig_ffn": "FFN-Skip",
    "vig_block": "ShortV by VIG",
    "shortv": "ShortV",
}
"""What the layers chosen by a strategy are used for. VTW needs no scores."""


def methods_at(n: int, depth: int, orders: Mapping[str, Sequence[int]], bypass: str = "zero") -> dict[str, SkipPlan]:
    """Every method's plan that relieves ``n`` layers of visual tokens, by the method's name; all bound to ``depth``.

    VTW drops all visual tokens at layer ``depth - n``, so that ``n`` layers run without them.

    Args:
        n: 0 to ``depth``.
        depth: layers of the model.
        orders: by strategy, all layers from the first to skip to the last (:func:`search.rank_layers`). A seed may
            follow the strategy, as in ``random/0``; it ends the method's name: ``V-Skip random 0``.
        bypass: of the attention that V-Skip skips, ``zero`` or ``norm``.

    Raises:
        ConfigError: an unknown strategy, an order that does not name every layer once, or ``n`` above the depth.
    """
    check_count(n, depth)
    plans = {}
    for key, order in orders.items():
        strategy, _, seed = key.partition("/")
        if strategy not in METHODS:
            raise ConfigError(f"orders: no method chooses its layers by {key!r}; use {', '.join(METHODS)}")
        if sorted(order) != list(range(depth)):
            raise ConfigError(f"orders.{key}: {list(order)} does not name each of the layers 0 to {depth - 1} once")
        plans[f"{METHODS[strategy]} {seed}".rstrip()] = _plan(strategy, order[:n], bypass)
    plans["VTW"] = vtw(depth - n)
    return {name: replace(plan.bind(depth), name=name) for name, plan in plans.items()}


def _plan(strategy: str, layers: Sequence[int], bypass: str) -> SkipPlan:
    if strategy == "vig_ffn":
        return ffn_skip(layers)
    return shortv(layers) if strategy in ("shortv", "vig_block") else vskip(layers, bypass)


@dataclass(frozen=True)
class Point:
    """One plan, measured.

    Attributes:
        n: layers skipped.
        kl: divergence from the base model on held-out samples, nats.
        accuracy: None where it was not measured.
        flops_ratio: prefill FLOPs over those of the dense plan.
    """

    n: int
    kl: Estimate
    accuracy: Accuracy | None
    flops_ratio: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Point:
        """Read the JSON form (``dataclasses.asdict``)."""
        accuracy = None if data["accuracy"] is None else Accuracy(**data["accuracy"])
        return cls(data["n"], Estimate(**data["kl"]), accuracy, data["flops_ratio"])


@dataclass(frozen=True)
class Curve:
    """One method at several N, ascending."""

    name: str
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Curve:
        """Read the JSON form."""
        return cls(data["name"], tuple(Point.from_dict(point) for point in data["points"]))


Points = Mapping[tuple[str, int], Point]
"""Points by method and N."""


def points_of(curves: Sequence[Curve]) -> dict[tuple[str, int], Point]:
    """The points of saved curves as :func:`measure_curves` takes them for ``done``."""
    return {(curve.name, point.n): point for curve in curves for point in curve.points}


def measure_curves(
    plans: Mapping[int, Mapping[str, SkipPlan]],
    divergence: Callable[[SkipPlan], Tensor],
    flops_ratio: Callable[[SkipPlan], float],
    accuracy: Callable[[SkipPlan], Accuracy] | None = None,
    done: Points | None = None,
    keep: Callable[[str, Point], None] | None = None,
) -> list[Curve]:
    """Measure every method at every N. Plans that differ in name alone are measured once (all of them at N = 0).

    Args:
        plans: by N and method, from :func:`methods_at`.
        divergence: of a plan: (samples,), KL(P || P under the plan) on held-out samples.
        flops_ratio: of a plan, as :func:`search.flops_ratio`.
        accuracy: of a plan; None leaves it out.
        done: points measured before, under the same settings: they are taken as they are.
        keep: called with the method and every new point, to save it.

    Returns:
        One curve per method, in the order in which ``plans`` names them first.

    Raises:
        ConfigError: a divergence that is not finite, with method and N.
    """
    cells = [(name, n, replace(plan, name="")) for n in sorted(plans) for name, plan in plans[n].items()]
    done = done or {}
    measured = {plan: done[name, n] for name, n, plan in cells if (name, n) in done}
    curves: dict[str, list[Point]] = {name: [] for methods in plans.values() for name in methods}
    for name, n, plan in cells:
        point = done.get((name, n))
        if point is None:
            if plan not in measured:
                named = replace(plan, name=name)
                kl = _mean_kl(divergence, named, n)
                measured[plan] = Point(n, kl, accuracy(named) if accuracy else None, flops_ratio(named))
            point = replace(measured[plan], n=n)
            if keep is not None:
                keep(name, point)
        curves[name].append(point)
    return [Curve(name, tuple(points)) for name, points in curves.items()]


def _mean_kl(divergence: Callable[[SkipPlan], Tensor], plan: SkipPlan, n: int) -> Estimate:
    values = divergence(plan)
    try:
        return Estimate.of(values)
    except ConfigError as error:
        raise ConfigError(f"{plan.name}, N = {n}: {error}") from error


def table(curves: Sequence[Curve]) -> str:
    """The curves as a Markdown table, one row per method and N, intervals in brackets."""
    lines = [
        "| method | N | KL (nats) | accuracy (%) | FLOPs (%) |",
        "|---|---:|---:|---:|---:|",
    ]
    for curve in curves:
        for point in curve.points:
            kl = f"{point.kl.value:.3g} [{point.kl.low:.3g}, {point.kl.high:.3g}]"
            flops = f"{100 * point.flops_ratio:.1f}"
            lines.append(f"| {curve.name} | {point.n} | {kl} | {_percent(point.accuracy)} | {flops} |")
    return "\n".join(lines)


def _percent(value: Accuracy | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
