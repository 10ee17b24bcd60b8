"""Published methods at equal FLOPs: of each the strength that brings the decoder closest to a share of its FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from skipvision_train.analysis.calibration_report import read_calibration
from skipvision_train.analysis.flops import KindCounts, sequence_flops
from skipvision_train.calibration.search import rank_layers
from skipvision_train.errors import ConfigError
from skipvision_train.files import read_json
from skipvision_train.plans import methods
from skipvision_train.plans.plan import SkipPlan, compose
from skipvision_train.plans.rules import TokenKind

ON_LAYERS: dict[str, Callable[[Sequence[int]], SkipPlan]] = {
    "vskip": methods.vskip,
    "ffn_skip": methods.ffn_skip,
    "shortv": methods.shortv,
}
"""Methods whose strength is how many layers skip."""

STRATEGIES = {"vskip": ("vig",), "ffn_skip": ("vig_ffn",), "shortv": ("shortv", "vig_block")}
"""Strategies of a calibration that rank a method's layers, the method's own first."""

METHODS = ("skip_ffn", "skip_kv", *ON_LAYERS, "vtw", "fastv", "fastv+vskip", "pyramiddrop")
"""What can be brought to a share; ``skip_ffn`` and ``skip_kv`` have one strength only."""

SHARES = tuple(percent / 100 for percent in range(1, 100))
"""Of the visual tokens that stay: what is tried."""


@dataclass(frozen=True)
class Order:
    """Layers in the order in which they begin to skip.

    Attributes:
        layers: all of them.
        source: where the order comes from, in words.
    """

    layers: tuple[int, ...]
    source: str

    @classmethod
    def deepest(cls, depth: int) -> Order:
        """The last layer first: all that is known without a calibration."""
        return cls(tuple(reversed(range(depth))), "the deepest")


@dataclass(frozen=True)
class Choice:
    """A plan that was chosen.

    Attributes:
        plan: of the model's depth.
        setting: its strength, and where its layers come from, in words.
        share: of the dense decoder's FLOPs, for mean prompts.
    """

    plan: SkipPlan
    setting: str
    share: float


def layer_orders(depth: int, calibration: str | None = None, model_hash: str | None = None) -> dict[str, Order]:
    """For each method of :data:`ON_LAYERS` the order of its layers: by its own strategy's scores where the calibration
    has them, otherwise the deepest.

    Args:
        depth: of the model.
        calibration: a folder that ``skipvision calibrate`` has written; None has no scores.
        model_hash: of the model; None does not compare it with the calibration's.

    Raises:
        ConfigError: a calibration of another model or depth, or with none of the strategies.
        DataError: no calibration there.
    """
    orders = {method: Order.deepest(depth) for method in ON_LAYERS}
    if calibration is None:
        return orders
    path = Path(calibration)
    found = read_calibration(path)
    if len(found.scores) != depth:
        raise ConfigError(f"calibration: {path} has scores of {len(found.scores)} layers, the model has {depth}")
    facts = read_json(path / "vig.json" if path.is_dir() else path)
    if model_hash is not None and facts.get("model_hash", model_hash) != model_hash:
        raise ConfigError(f"calibration: {path} is of another model ({facts.get('checkpoint')}); calibrate this one")
    scores = {name: table.mean().tolist() for name, table in found.tables.items()}
    scores[facts.get("strategy", "vig")] = list(found.scores)  # what chose: a bank's need not be the samples' mean
    for method, names in STRATEGIES.items():
        if known := [name for name in names if name in scores]:
            orders[method] = Order(rank_layers(scores[known[0]]), f"by {known[0]}")
    if all(order.source == "the deepest" for order in orders.values()):
        wanted = ", ".join(name for names in STRATEGIES.values() for name in names)
        raise ConfigError(f"calibration: {path} has scores of {', '.join(scores)}; methods here use {wanted}")
    return orders


def flops_share(text_config: PreTrainedConfig, counts: KindCounts, plan: SkipPlan) -> float:
    """FLOPs of the decoder layers under ``plan`` over those of the same tokens with nothing left out."""
    dense = methods.dense().bind(plan.num_layers)
    return sequence_flops(text_config, counts, plan).total / sequence_flops(text_config, counts, dense).total


def at_share(
    method: str, share: float, text_config: PreTrainedConfig, counts: KindCounts, orders: Mapping[str, Order]
) -> Choice | None:
    """The strength of a method whose FLOPs come closest to a share of the dense ones; of equal ones the weakest.

    Args:
        method: one of :data:`METHODS`.
        share: above 0, below 1.
        text_config: of the decoder.
        counts: positions of each kind, mean over prompts.
        orders: of :func:`layer_orders`.

    Returns:
        None where the method has nothing to leave out: no tokens of the kinds that it is about, or too few layers.

    Raises:
        ConfigError: an unknown method, or a share out of range.
    """
    if method not in METHODS:
        raise ConfigError(f"methods: {method!r} is unknown; use some of {', '.join(METHODS)}")
    if not 0 < share < 1:
        raise ConfigError(f"equal_flops: {share}; a share of the dense FLOPs above 0 and below 1")
    depth = text_config.num_hidden_layers
    if method == "fastv+vskip":
        return _fastv_and_vskip(share, text_config, counts, orders)
    tried = [
        Choice(plan.bind(depth), setting, flops_share(text_config, counts, plan.bind(depth)))
        for setting, plan in _strengths(method, text_config, counts, orders)
    ]
    return _closest(tried, share)


def _closest(tried: Sequence[Choice], share: float) -> Choice | None:
    return min(tried, key=lambda choice: abs(choice.share - share), default=None)


def _fastv_and_vskip(
    share: float, text_config: PreTrainedConfig, counts: KindCounts, orders: Mapping[str, Order]
) -> Choice | None:
    """V-Skip for half of what is to be saved, FastV on top of it for the rest."""
    half = at_share("vskip", (1 + share) / 2, text_config, counts, orders)
    if half is None:
        return None
    tried = []
    for setting, plan in _strengths("fastv", text_config, counts, orders):
        both = compose([plan.bind(half.plan.num_layers), half.plan])
        tried.append(Choice(both, f"{setting}; {half.setting}", flops_share(text_config, counts, both)))
    return _closest(tried, share)


def _strengths(
    method: str, text_config: PreTrainedConfig, counts: KindCounts, orders: Mapping[str, Order]
) -> Iterator[tuple[str, SkipPlan]]:
    """What a method can be set to, weakest first, in words and as a plan of open depth; never nothing at all."""
    depth = text_config.num_hidden_layers
    if method in ("skip_ffn", "skip_kv"):
        if counts.get(TokenKind.SKIPPED, 0):
            yield "skipped tokens", methods.skip_ffn() if method == "skip_ffn" else methods.skip_kv()
    elif method in ON_LAYERS:
        order = orders[method]
        for count in range(1, depth + 1):
            layers = sorted(order.layers[:count])
            yield f"layers {_listed(layers)} ({order.source})", ON_LAYERS[method](layers)
    elif method == "vtw":
        for layer in reversed(range(1, depth)):
            yield f"layer {layer}", methods.vtw(layer)
    elif method == "fastv" and depth > 1:
        layer = fastv_layer(depth)
        for keep in reversed(SHARES):
            yield f"layer {layer}, keep {keep:g}", methods.fastv(layer, keep)
    elif method == "pyramiddrop" and depth > 3:
        layers = [depth * k // 4 for k in (1, 2, 3)]
        positions = "keep" if has_three_dimensions(text_config) else "renumber"
        for keep in reversed(SHARES):
            amounts = [round(keep**k, 6) for k in (1, 2, 3)]
            shown = ", ".join(f"{amount:.2g}" for amount in amounts)
            yield f"layers {_listed(layers)}, keep {shown}", methods.pyramiddrop(layers, amounts, positions)


def fastv_layer(depth: int) -> int:
    """K as deep as FastV's 2 of 32 layers, at least 1."""
    return max(1, round(2 * depth / 32))


def has_three_dimensions(text_config: PreTrainedConfig) -> bool:
    """Whether rotary positions are frames, rows and columns: they cannot be closed up after a drop."""
    return "mrope_section" in (getattr(text_config, "rope_parameters", None) or {})


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
