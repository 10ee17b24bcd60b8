"""One short builder per published method; each returns a :class:`SkipPlan` that fits every model deep enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from skipvision_train.errors import PlanError
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import DENSE_RULE, VISUAL, Drop, Kinds, LayerRule, TokenKind, as_kinds

KV_LEVELS: dict[str, Kinds] = {
    "small": frozenset({TokenKind.SKIPPED}),
    "middle + small": frozenset({TokenKind.SKIPPED, TokenKind.MIDDLE}),
    "all but summary": VISUAL,
}
"""What leaves the KV cache in the rows of Skip-Vision's Table 6, by the window size of the tokens."""

SPARSEVLM_KEEP: dict[int, dict[int, tuple[int, int, int]]] = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""SparseVLM's tables: of 576 visual tokens, how many stay after each stage, by version and mean number of tokens."""


def _on_layers(name: str, layers: Sequence[int], rule: LayerRule) -> SkipPlan:
    chosen = set(layers)
    if len(chosen) != len(layers):
        raise PlanError(f"{name}: layers {list(layers)} name a layer twice")
    if negative := sorted(i for i in chosen if i < 0):
        raise PlanError(f"{name}: layers {negative} do not exist; layers count from 0")
    rules = tuple(rule if i in chosen else DENSE_RULE for i in range(max(chosen, default=-1) + 1))
    return SkipPlan(name, rules, rest=DENSE_RULE)


def dense() -> SkipPlan:
    """Every token runs everything."""
    return SkipPlan("dense", rest=DENSE_RULE)


def skip_ffn(
    kinds: Iterable[str | TokenKind] = (TokenKind.SKIPPED,),
    evict: Iterable[str | TokenKind] = (TokenKind.SKIPPED,),
    evict_when: str = "after_first_token",
) -> SkipPlan:
    """Skip-Vision (Eq. 4, 5, 7): skipped visual tokens run no FFN in any layer and leave the KV cache after prefill.

    Pass ``evict=()`` for the paper's "w/o SK" rows.
    """
    rule = LayerRule(no_ffn=as_kinds(kinds))
    return SkipPlan("skip_ffn", rest=rule, evict=as_kinds(evict, "evict"), evict_when=evict_when)


def skip_kv(level: str = "small", evict_when: str = "after_first_token") -> SkipPlan:
    """The skip KV-cache alone (Skip-Vision, Eq. 7 and Table 6), to be composed with any plan.

    Args:
        level: ``small``, ``middle + small`` or ``all but summary``: what leaves the cache.
        evict_when: before or after the first token, as in :class:`SkipPlan`.
    """
    if level not in KV_LEVELS:
        raise PlanError(f"skip_kv: level {level!r} is unknown; use {', '.join(map(repr, KV_LEVELS))}")
    return SkipPlan("skip_kv", rest=DENSE_RULE, evict=KV_LEVELS[level], evict_when=evict_when)


def vskip(layers: Sequence[int], bypass: str = "zero", kinds: Kinds = VISUAL) -> SkipPlan:
    """V-Skip (Eq. 5-8): visual tokens issue no attention query in ``layers``; keys, values and FFN stay.

    ``bypass="norm"`` is Eq. 6 to the letter, ``"zero"`` what the paper's figures and FLOPs describe.
    """
    return _on_layers("vskip", layers, LayerRule(no_attention=kinds, bypass=bypass))


def ffn_skip(layers: Sequence[int], kinds: Kinds = VISUAL) -> SkipPlan:
    """FFN-Skip (V-Skip's ablation, Table 4): visual tokens run no FFN in ``layers``."""
    return _on_layers("ffn_skip", layers, LayerRule(no_ffn=kinds))


def shortv(layers: Sequence[int], kinds: Kinds = VISUAL) -> SkipPlan:
    """ShortV: visual tokens are frozen in ``layers``: no query and no FFN; keys and values stay."""
    return _on_layers("shortv", layers, LayerRule(no_attention=kinds, no_ffn=kinds))


def vtw(layer: int = 16, kinds: Kinds = VISUAL) -> SkipPlan:
    """VTW: all visual tokens leave the sequence at the entry of ``layer``; the text keeps its positions."""
    return SkipPlan("vtw", rest=DENSE_RULE, drops=(Drop(layer, kinds=kinds),))


def fastv(layer: int = 3, keep: float = 0.5, kinds: Kinds = VISUAL) -> SkipPlan:
    """FastV: from ``layer`` on only the visual tokens stay that the last token looked at most in the layer before.

    Args:
        layer: K, at least 1. The paper's latency experiments use 2, its evaluations and V-Skip's 3.
        keep: a share (float) or a number (int) of visual tokens: 1 - R.
        kinds: which kinds are ranked.
    """
    return SkipPlan("fastv", rest=DENSE_RULE, drops=(Drop(layer, keep, kinds),))


def pyramiddrop(
    layers: Sequence[int] = (8, 16, 24),
    keep: Sequence[float] = (0.5, 0.25, 0.125),
    positions: str = "renumber",
    kinds: Kinds = VISUAL,
) -> SkipPlan:
    """PyramidDrop: at the entry of each of ``layers`` a smaller share of the original visual tokens stays.

    Ranked by the last token's attention under the layer's own weights. Positions are closed up after every drop, as in
    the public code; ``positions="keep"`` leaves gaps (needed where positions have three dimensions).
    """
    if len(layers) != len(keep):
        raise PlanError(f"pyramiddrop: {len(layers)} layers but {len(keep)} shares; give one share per layer")
    drops = (
        Drop(i, share, kinds, "last_token", "own", positions, "down") for i, share in zip(layers, keep, strict=True)
    )
    return SkipPlan("pyramiddrop", rest=DENSE_RULE, drops=tuple(drops))


def sparsevlm(
    tokens: int = 192,
    version: int = 1,
    layers: Sequence[int] = (2, 6, 15),
    keep: Sequence[float] | None = None,
    kinds: Kinds = VISUAL,
) -> SkipPlan:
    """SparseVLM (version 1: recycles tokens, renumbers) and SparseVLM+ (version 2: corrected scores, positions kept).

    Args:
        tokens: the mean number of visual tokens, of 576, that the public tables are made for: 192, 128, 96 or 64.
        version: 1 or 2.
        layers: at whose exit tokens leave.
        keep: how many (int) or which share (float) stay after each of ``layers``; None takes the public tables.
        kinds: which kinds are ranked.
    """
    if version not in SPARSEVLM_KEEP:
        raise PlanError(f"sparsevlm: version {version!r} is unknown; use 1 or 2 (SparseVLM+)")
    if keep is None and tokens not in SPARSEVLM_KEEP[version]:
        raise PlanError(
            f"sparsevlm: no table for {tokens} tokens; use one of {list(SPARSEVLM_KEEP[version])}, or keep=[...]"
        )
    amounts = SPARSEVLM_KEEP[version][tokens] if keep is None else tuple(keep)
    if len(layers) != len(amounts):
        raise PlanError(f"sparsevlm: {len(layers)} layers but {len(amounts)} amounts to keep; give one per layer")
    first = version == 1
    score, positions = ("raters", "renumber") if first else ("corrected_raters", "keep")
    drops = (
        Drop(layer + 1, amount, kinds, score, positions=positions, recycle=first)
        for layer, amount in zip(layers, amounts, strict=True)
    )
    return SkipPlan("sparsevlm" if first else "sparsevlm+", rest=DENSE_RULE, drops=tuple(drops))


def victor(layer: int = 3, registers: int = 8, kinds: Kinds = VISUAL) -> SkipPlan:
    """Victor: learned registers stand behind every image; at ``layer`` all visual tokens leave and the registers stay.

    With ``kinds`` only those leave: Skip-Vision compares itself with a Victor that keeps the coarser levels.

    The paper does not say what becomes of the positions; they are kept. The registers must have been trained.
    """
    if registers < 1:
        raise PlanError(f"victor: {registers} registers; without registers the plan is vtw")
    return replace(vtw(layer, kinds), name="victor", registers=registers)
