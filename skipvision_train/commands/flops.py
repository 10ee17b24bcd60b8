"""``skipvision flops``: what a prefill, a decoded token and the KV cache cost under a plan. Needs no model."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from skipvision_train.analysis.geometry import Geometry
from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from skipvision_train.analysis.flops import Flops
    from skipvision_train.plans.plan import SkipPlan
    from skipvision_train.plans.rules import TokenKind

FORMULAS = {
    "exact": "2 FLOPs per multiply-add, every token, grouped-query attention as it runs, ranking of tokens counted",
    "v_skip": "V-Skip and ShortV: dense 2n(4h+3m)h+4n^2h per layer, no grouped-query attention, ranking not counted",
    "skip_vision": "Skip-Vision: 4 N1 C^2 + 2 N1^2 C + 3 N2 C M per layer, 1 per multiply-add, no text, no ranking",
}
ATTENTION = {"full": "attention over all keys", "causal": "attention over earlier keys alone"}


@dataclass
class Config:
    """Settings of ``skipvision flops``. Numbers of tokens are those of one sequence and may be means."""

    geometry: Geometry = MISSING
    """The decoder: a file of ``conf/geometry``, single sizes overridden at will."""
    plan: PlanSpec = field(default_factory=PlanSpec)
    """The plan: a file of ``conf/plan`` and its fields."""
    visual_tokens: float = 576
    """Visual tokens that the decoder gets."""
    skipped_tokens: float | None = None
    """Of them, skipped ones (Skip-Vision's finest level); null: all, as in a model that retains none on purpose."""
    middle_tokens: float = 0
    """Of them, retained ones of the levels between the coarsest and the finest."""
    summary_tokens: float = 0
    """Summary tokens beside them. A plan with registers adds its own."""
    text_tokens: float = 66.64
    """Text tokens; the default is the mean that V-Skip's figures imply for LLaVA-1.5."""
    text_before: float = 35
    """Of them, those before the image, at most all; read where ``attention`` is causal."""
    asking_tokens: float | None = None
    """Of them, those behind the image, which rank visual tokens under SparseVLM; null: all."""
    dense_visual_tokens: float | None = None
    """Visual tokens of the dense model that the ratio refers to; null: the same visual tokens, without summaries."""
    attention: str = "full"
    """full (as papers count it) or causal (as a causal kernel computes it)."""
    formula: str = "exact"
    """exact, v_skip or skip_vision: whose way to count the prefill. Decoding and the cache are always exact."""
    vision_tower: bool = False
    """Add the geometry's CLIP tower."""
    views: float = 1
    """Images that the tower encodes per sequence (LLaVA-NeXT: up to 5)."""
    lm_head: bool = False
    """Add the LM head at one position."""
    format: str = "table"
    """table, or json: one object on stdout and nothing else."""


@dataclass(frozen=True)
class Cost:
    """What one plan costs.

    Attributes:
        tokens: positions of each kind.
        prefill: the decoder.
        before: the vision tower, or 0.
        lm_head: at one position, or 0; in the prefill and for every generated token.
        decode: the decoder for the first token that is fed back.
        cache: bytes of the KV cache of the prompt, in half precision.
    """

    tokens: dict[TokenKind, float]
    prefill: Flops
    before: float
    lm_head: float
    decode: float
    cache: float

    @property
    def total(self) -> float:
        """The whole prefill."""
        return self.prefill.total + self.before + self.lm_head

    def by_work(self) -> dict[str, float]:
        """The prefill by kind of work; what is not counted is left out."""
        layers = self.prefill.layers
        work = {name: sum(getattr(layer, name) for layer in layers) for name in ("projections", "attention", "ffn")}
        work["score"] = sum(layer.score for layer in layers) + self.prefill.raters
        extra = {"vision_tower": self.before, "lm_head": self.lm_head}
        return work | {name: value for name, value in extra.items() if value}


def run(cfg: Config) -> None:
    """Check, count twice, print."""
    check(cfg)
    from skipvision_train.analysis.geometry import check_geometry, text_config
    from skipvision_train.config.plans import build_plan
    from skipvision_train.plans.methods import dense

    check_geometry(cfg.geometry)
    text = text_config(cfg.geometry)
    plan = build_plan(cfg.plan, text.num_hidden_layers, cfg.geometry.name)
    whole = cost(cfg, text, dense().bind(text.num_hidden_layers), dense_counts(cfg))
    if not whole.total:
        raise ConfigError("visual_tokens: the dense model has no tokens to count; give visual_tokens or text_tokens")
    reduced = cost(cfg, text, plan, plan_counts(cfg, plan))
    if cfg.format == "json":
        sys.stdout.write(json.dumps(as_json(cfg, plan, whole, reduced)) + "\n")
    else:
        sys.stdout.write(as_table(cfg, plan, whole, reduced) + "\n")


def check(cfg: Config) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: naming the field.
    """
    for name, allowed in (("attention", ATTENTION), ("formula", FORMULAS), ("format", ("table", "json"))):
        if getattr(cfg, name) not in allowed:
            raise ConfigError(f"{name}: {getattr(cfg, name)!r} is unknown; use {', '.join(allowed)}")
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)) and not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{name}: {value} is out of range; use a number from 0 on")
    named = (cfg.skipped_tokens or 0) + cfg.middle_tokens
    if named > cfg.visual_tokens:
        raise ConfigError(
            f"visual_tokens: {cfg.visual_tokens:g} are fewer than the {named:g} of skipped_tokens and middle_tokens"
        )
    if cfg.asking_tokens is not None and cfg.asking_tokens > cfg.text_tokens:
        raise ConfigError(f"asking_tokens: {cfg.asking_tokens:g} are more than text_tokens {cfg.text_tokens:g}")
    if cfg.formula != "exact" and cfg.attention != "full":
        raise ConfigError(f"attention: {cfg.attention} with formula {cfg.formula}, which counts full; use exact")
    if cfg.formula == "skip_vision" and (cfg.vision_tower or cfg.lm_head):
        name = "vision_tower" if cfg.vision_tower else "lm_head"
        raise ConfigError(f"{name}: true with formula skip_vision, which counts visual tokens in the decoder alone")


def plan_counts(cfg: Config, plan: SkipPlan) -> dict[TokenKind, float]:
    """Positions of each kind that the decoder gets, registers included."""
    from skipvision_train.plans.rules import TokenKind

    rest = cfg.visual_tokens - cfg.middle_tokens
    skipped = rest if cfg.skipped_tokens is None else cfg.skipped_tokens
    counts = {
        TokenKind.TEXT: cfg.text_tokens,
        TokenKind.RETAINED: rest - skipped,
        TokenKind.MIDDLE: cfg.middle_tokens,
        TokenKind.SKIPPED: skipped,
        TokenKind.SUMMARY: cfg.summary_tokens + plan.registers,
    }
    return {kind: n for kind, n in counts.items() if n}


def dense_counts(cfg: Config) -> dict[TokenKind, float]:
    """Positions of each kind of the dense model that the plan is compared with: no summaries, no registers."""
    from skipvision_train.plans.rules import TokenKind

    visual = cfg.visual_tokens if cfg.dense_visual_tokens is None else cfg.dense_visual_tokens
    return {kind: n for kind, n in ((TokenKind.TEXT, cfg.text_tokens), (TokenKind.RETAINED, visual)) if n}


def cost(cfg: Config, text: PreTrainedConfig, plan: SkipPlan, counts: dict[TokenKind, float]) -> Cost:
    """Count one plan.

    Raises:
        ConfigError: the formula cannot express the plan, or the geometry has no vision tower to add.
    """
    from skipvision_train.analysis import flops
    from skipvision_train.analysis.geometry import vision_config
    from skipvision_train.analysis.image_flops import vision_flops

    if cfg.formula == "exact":
        causal = cfg.attention == "causal"
        prefill = flops.sequence_flops(
            text, counts, plan, asking=cfg.asking_tokens, causal=causal, text_before=cfg.text_before
        )
    else:
        paper = flops.v_skip_flops if cfg.formula == "v_skip" else flops.skip_vision_flops
        try:
            prefill = paper(text, counts, plan)
        except PlanError as error:
            raise ConfigError(f"formula: {error}") from error
    return Cost(
        tokens=counts,
        prefill=prefill,
        before=cfg.views * vision_flops(vision_config(cfg.geometry)) if cfg.vision_tower else 0.0,
        lm_head=flops.lm_head_flops(text) if cfg.lm_head else 0.0,
        decode=flops.decode_flops(text, counts, plan).total,
        cache=flops.kv_cache_bytes(text, counts, plan),
    )


def words(cfg: Config) -> str:
    """How the prefill is counted."""
    return f"{FORMULAS[cfg.formula]}; {ATTENTION[cfg.attention]}"


def _tokens(cost: Cost) -> dict[str, float]:
    return {kind.name.lower(): n for kind, n in cost.tokens.items()}


def as_json(cfg: Config, plan: SkipPlan, whole: Cost, reduced: Cost) -> dict[str, Any]:
    """The result as one JSON object: TFLOPs of the prefill, GFLOPs per decoded token, bytes of the cache.

    By Skip-Vision's formula the prefill is in multiply-adds, which ``formula`` says.
    """
    both = {"dense": whole, "plan": reduced}
    return {
        "geometry": cfg.geometry.name,
        "plan": plan.name,
        "note": plan.provenance.get("layers", ""),
        "formula": words(cfg),
        "attention": cfg.attention,
        "dense_tflops": whole.total / 1e12,
        "plan_tflops": reduced.total / 1e12,
        "ratio": reduced.total / whole.total,
        "tokens": {name: _tokens(cost) for name, cost in both.items()},
        "prefill_tflops": {name: {w: n / 1e12 for w, n in c.by_work().items()} for name, c in both.items()},
        "decode_gflops": {name: (cost.decode + cost.lm_head) / 1e9 for name, cost in both.items()},
        "kv_cache_bytes": {name: cost.cache for name, cost in both.items()},
    }


def as_table(cfg: Config, plan: SkipPlan, whole: Cost, reduced: Cost) -> str:
    """The result for people: one line per kind of work, dense beside plan."""

    def line(name: str, dense: float, planned: float, unit: float) -> str:
        share = f"{100 * planned / dense:.1f} %" if dense else ""
        return f"{name:<28}{dense / unit:>12.4f}{planned / unit:>12.4f}{share:>10}".rstrip()

    def tokens(cost: Cost) -> str:
        return ", ".join(f"{n:g} {kind}" for kind, n in _tokens(cost).items())

    own, full = reduced.by_work(), whole.by_work()
    unit = "prefill, 10^12 multiply-adds" if cfg.formula == "skip_vision" else "prefill, TFLOPs"
    lines = [
        f"{cfg.geometry.name}: dense {tokens(whole)}; plan {tokens(reduced)}",
        plan.table(),
        *([f"  layers: {plan.provenance['layers']}"] if "layers" in plan.provenance else []),
        "",
        f"{unit:<28}{'dense':>12}{'plan':>12}",
        *(line(f"  {work.replace('_', ' ')}", full[work], own[work], 1e12) for work in own),
        line("  total", whole.total, reduced.total, 1e12),
        line("decode, GFLOPs per token", whole.decode + whole.lm_head, reduced.decode + reduced.lm_head, 1e9),
        line("KV cache, MB in 16 bits", whole.cache, reduced.cache, 1e6),
        "",
        f"prefill: {words(cfg)}",
    ]
    return "\n".join(lines)
