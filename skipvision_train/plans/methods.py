"""One short builder per published method; each returns a :class:`SkipPlan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from skipvision_train.errors import PlanError
from skipvision_train.plans.plan import DENSE_RULE, VISUAL, Kinds, LayerRule, SkipPlan, TokenKind, as_kinds


def _on_layers(name: str, num_layers: int, layers: Sequence[int], rule: LayerRule) -> SkipPlan:
    chosen = set(layers)
    if len(chosen) != len(layers):
        raise PlanError(f"{name}: layers {list(layers)} name a layer twice")
    if outside := sorted(i for i in chosen if not 0 <= i < num_layers):
        raise PlanError(f"{name}: layers {outside} do not exist; the model has layers 0 to {num_layers - 1}")
    return SkipPlan(name, tuple(rule if i in chosen else DENSE_RULE for i in range(num_layers)))


def dense(num_layers: int) -> SkipPlan:
    """Every token runs everything."""
    return SkipPlan("dense", (DENSE_RULE,) * num_layers)


def skip_ffn(
    num_layers: int,
    kinds: Iterable[str | TokenKind] = (TokenKind.SKIPPED,),
    evict: Iterable[str | TokenKind] = (TokenKind.SKIPPED,),
    evict_when: str = "after_first_token",
) -> SkipPlan:
    """Skip-Vision (Eq. 4, 5, 7): skipped visual tokens run no FFN in any layer and leave the KV cache after prefill.

    Pass ``evict=()`` for the paper's "w/o SK" rows.
    """
    rule = LayerRule(no_ffn=as_kinds(kinds))
    return SkipPlan("skip_ffn", (rule,) * num_layers, evict=as_kinds(evict, "evict"), evict_when=evict_when)


def vskip(num_layers: int, layers: Sequence[int], bypass: str = "zero", kinds: Kinds = VISUAL) -> SkipPlan:
    """V-Skip (Eq. 5-8): visual tokens issue no attention query in ``layers``; keys, values and FFN stay.

    ``bypass="norm"`` is Eq. 6 to the letter, ``"zero"`` what the paper's figures and FLOPs describe.
    """
    return _on_layers("vskip", num_layers, layers, LayerRule(no_attention=kinds, bypass=bypass))


def ffn_skip(num_layers: int, layers: Sequence[int], kinds: Kinds = VISUAL) -> SkipPlan:
    """FFN-Skip (V-Skip's ablation, Table 4): visual tokens run no FFN in ``layers``."""
    return _on_layers("ffn_skip", num_layers, layers, LayerRule(no_ffn=kinds))


def shortv(num_layers: int, layers: Sequence[int], kinds: Kinds = VISUAL) -> SkipPlan:
    """ShortV: visual tokens are frozen in ``layers``: no query and no FFN; keys and values stay."""
    return _on_layers("shortv", num_layers, layers, LayerRule(no_attention=kinds, no_ffn=kinds))
