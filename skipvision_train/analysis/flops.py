"""Floating point operations and cache sizes of a model under a skip plan: pure arithmetic, no tensor, no model.

One multiply-add is 2 FLOPs. Matrix products are counted and nothing else (no norms, activations, rotary angles).
Attention is counted in full, active queries times all keys, as V-Skip, ShortV and torch's own counter do it;
``causal=True`` counts what a causal kernel computes. Counts may be fractional: a mean over samples.

Where a causal count needs to know who stands before whom, the sequence is taken to be
``text | retained | middle | skipped | summary | rest of the text``, with ``text_before`` text tokens before the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from skipvision_train.errors import PlanError
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import VISUAL, Drop, Kinds, LayerRule, TokenKind

KindCounts = Mapping[TokenKind, float]
"""How many positions of one sequence are of each kind; ``PAD`` costs nothing and is ignored."""

TEXT_BEFORE_IMAGE = 35.0
"""Text tokens before the image in LLaVA-1.5's prompt (system message and role)."""

IMAGE_ORDER = (TokenKind.RETAINED, TokenKind.MIDDLE, TokenKind.SKIPPED, TokenKind.SUMMARY)
"""How the kinds of an image are taken to follow each other."""


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one decoder layer.

    Attributes:
        projections: Q, K, V and O.
        attention: query-key products and the weighted sum of values.
        ffn: the gated feed-forward network's three matrices.
        score: ranking the tokens of a later drop with this layer's weights: keys of all tokens and queries of those
            that ask, projected once more, and their products.
    """

    projections: float
    attention: float
    ffn: float
    score: float = 0.0

    @property
    def total(self) -> float:
        """All of the layer."""
        return self.projections + self.attention + self.ffn + self.score


@dataclass(frozen=True)
class Flops:
    """FLOPs of the decoder, layer 0 first.

    Attributes:
        layers: one entry per layer.
        raters: finding the text tokens that resemble the image, once before layer 0 (SparseVLM).
    """

    layers: tuple[LayerFlops, ...]
    raters: float = 0.0

    @property
    def total(self) -> float:
        """All layers together, and what stands before them."""
        return self.raters + sum(layer.total for layer in self.layers)


def count_tokens(counts: KindCounts, without: Kinds = frozenset()) -> float:
    """Tokens that are neither padding nor of a kind in ``without``."""
    return sum(n for kind, n in counts.items() if kind is not TokenKind.PAD and kind not in without)


def after_drop(drop: Drop, live: KindCounts, original: KindCounts) -> dict[TokenKind, float]:
    """How many tokens of each kind are there behind ``drop``, recycled ones included.

    Kinds that are ranked together are taken to lose the same share: which of them stay depends on the scores. No layer
    rule may tell such kinds apart; what an eviction takes of them is an estimate.

    Args:
        drop: the drop.
        live: positions of each kind before it.
        original: positions of each kind before the first drop.
    """
    before, leaving = _before_and_leaving(drop, live, original)
    if not leaving:
        return dict(live)
    share = (before - leaving + drop.recycled(int(leaving))) / before
    return {kind: n * share if kind in drop.kinds else n for kind, n in live.items()}


def _before_and_leaving(drop: Drop, live: KindCounts, original: KindCounts) -> tuple[float, float]:
    """How many of the live tokens ``drop`` ranks, and how many of those it removes."""
    # Rounded, because the shares that an earlier drop gave the kinds add up to a whole number only nearly.
    before = round(sum(live.get(kind, 0) for kind in drop.kinds), 6)
    return before, before - drop.kept(before, sum(original.get(kind, 0) for kind in drop.kinds))


def live_counts(kind_counts: KindCounts, plan: SkipPlan) -> list[KindCounts]:
    """How many positions of each kind every layer runs, layer 0 first."""
    live, layers = kind_counts, []
    for layer in range(plan.num_layers):
        if (drop := plan.drop_at(layer)) is not None:
            live = after_drop(drop, live, kind_counts)
        layers.append(live)
    return layers


def _head_dim(text_config: PreTrainedConfig) -> int:
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def _widths(text_config: PreTrainedConfig) -> tuple[int, int]:
    """Width of all query heads together, and of all key (or value) heads together."""
    head_dim = _head_dim(text_config)
    return text_config.num_attention_heads * head_dim, text_config.num_key_value_heads * head_dim


def _layer_flops(
    text_config: PreTrainedConfig, queries: float, new_keys: float, pairs: float, ffn_tokens: float
) -> LayerFlops:
    width, (query_width, key_width) = text_config.hidden_size, _widths(text_config)
    return LayerFlops(
        projections=2 * width * (2 * queries * query_width + 2 * new_keys * key_width),
        attention=4 * pairs * query_width,
        ffn=6 * ffn_tokens * width * text_config.intermediate_size,
    )


def _in_order(counts: KindCounts, text_before: float) -> Iterator[tuple[TokenKind, float]]:
    """The runs of a sequence: text, the image's kinds, the rest of the text."""
    text = counts.get(TokenKind.TEXT, 0)
    before = min(text_before, text)
    yield TokenKind.TEXT, before
    for kind in IMAGE_ORDER:
        yield kind, counts.get(kind, 0)
    yield TokenKind.TEXT, text - before


def causal_pairs(counts: KindCounts, without: Kinds = frozenset(), text_before: float = TEXT_BEFORE_IMAGE) -> float:
    """Query-key pairs where every token not in ``without`` attends to itself and to all tokens before it."""
    pairs = earlier = 0.0
    for kind, n in _in_order(counts, text_before):
        if kind not in without:
            pairs += n * earlier + n * (n + 1) / 2
        earlier += n
    return pairs


def layer_flops(
    text_config: PreTrainedConfig,
    counts: KindCounts,
    rule: LayerRule,
    causal: bool = False,
    text_before: float = TEXT_BEFORE_IMAGE,
) -> LayerFlops:
    """FLOPs of one LLaMA-shaped layer over one sequence (V-Skip, Sec. 3.3; grouped-query attention counted as run).

    A kind in ``rule.no_attention`` costs neither Q, nor O, nor its attention row; its keys and values are computed.

    Args:
        text_config: hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim.
        counts: positions of each kind.
        rule: what the layer leaves out.
        causal: count the keys up to each query only.
        text_before: text tokens before the image, at most all; read where ``causal``.
    """
    tokens, queries = count_tokens(counts), count_tokens(counts, rule.no_attention)
    pairs = causal_pairs(counts, rule.no_attention, text_before) if causal else queries * tokens
    return _layer_flops(text_config, queries, tokens, pairs, count_tokens(counts, rule.no_ffn))


def _score_flops(text_config: PreTrainedConfig, drop: Drop, tokens: float, asking: float) -> float:
    """Ranking for a drop: K of all live ``tokens``, Q of the ``asking`` ones, and their products (counted in full).

    Correcting by the rotary embedding takes the products of one more head.
    """
    width, (query_width, key_width) = text_config.hidden_size, _widths(text_config)
    rotary_alone = _head_dim(text_config) if drop.score == "corrected_raters" else 0
    projections = 2 * tokens * width * key_width + 2 * asking * width * query_width
    return projections + 2 * asking * tokens * (query_width + rotary_alone)


def sequence_flops(
    text_config: PreTrainedConfig,
    kind_counts: KindCounts,
    plan: SkipPlan,
    *,
    asking: float | None = None,
    causal: bool = False,
    text_before: float = TEXT_BEFORE_IMAGE,
) -> Flops:
    """FLOPs of one prefill: the decoder layers only, without vision tower, connector and LM head.

    From a drop on only what stays is counted; ranking it costs :attr:`LayerFlops.score` in the layer that scores, and
    nothing where nothing leaves. SparseVLM's clustering is left out. A plan that evicts ``before_first_token`` runs
    its last position over fewer keys; that one row is not told apart.

    Args:
        text_config: as for :func:`layer_flops`.
        kind_counts: positions of each kind of one document.
        plan: of the model's depth.
        asking: text tokens that rank by ``raters``: those behind the last visual token; None takes all text.
        causal: as for :func:`layer_flops`; scores are counted in full either way.
        text_before: as for :func:`layer_flops`.

    Raises:
        PlanError: the plan is written for another depth.
    """
    plan.check_depth(text_config.num_hidden_layers)
    live = live_counts(kind_counts, plan)
    text = kind_counts.get(TokenKind.TEXT, 0) if asking is None else asking
    scores, rated = [0.0] * plan.num_layers, frozenset[TokenKind]()
    for drop in plan.drops:
        before = live[drop.layer - 1] if drop.layer else kind_counts
        if drop.score_layer is None or not _before_and_leaving(drop, before, kind_counts)[1]:
            continue  # the executor ranks nothing where nothing leaves
        single = drop.score == "last_token"
        scores[drop.score_layer] += _score_flops(text_config, drop, count_tokens(before), 1 if single else text)
        rated |= frozenset() if single else drop.kinds
    visual = sum(kind_counts.get(kind, 0) for kind in rated)
    layers = (
        replace(layer_flops(text_config, counts, rule, causal, text_before), score=score)
        for counts, rule, score in zip(live, plan.rules, scores, strict=True)
    )
    return Flops(tuple(layers), raters=2 * visual * text * text_config.hidden_size)


def decode_flops(text_config: PreTrainedConfig, kind_counts: KindCounts, plan: SkipPlan, step: int = 1) -> Flops:
    """FLOPs of the decoder layers for one generated token, over what each layer's KV cache still holds.

    Args:
        text_config: as for :func:`layer_flops`.
        kind_counts: of the prompt.
        plan: what is dropped and evicted; rules do not concern generated text.
        step: 1 for the first token that is fed back, which attends to the kept prompt and itself.

    Raises:
        PlanError: the plan is written for another depth.
    """
    plan.check_depth(text_config.num_hidden_layers)
    held = (count_tokens(live, plan.evict) for live in live_counts(kind_counts, plan))
    return Flops(tuple(_layer_flops(text_config, 1, 1, keys + step, 1) for keys in held))


def kv_cache_bytes(
    text_config: PreTrainedConfig, kind_counts: KindCounts, plan: SkipPlan, bytes_per_value: int = 2
) -> float:
    """Bytes of the keys and values of all layers that decoding keeps of the prompt (2 bytes: half precision)."""
    _, key_width = _widths(text_config)
    held = sum(count_tokens(live, plan.evict) for live in live_counts(kind_counts, plan))
    return 2 * held * key_width * bytes_per_value


def lm_head_flops(text_config: PreTrainedConfig, positions: float = 1) -> float:
    """FLOPs of the output projection at ``positions`` positions; a prefill needs it at the last one only."""
    return 2 * positions * text_config.hidden_size * text_config.vocab_size


def skip_vision_layer_flops(n_attention: float, n_ffn: float, width: int, ffn_width: int) -> LayerFlops:
    """Skip-Vision's own count of one layer, visual tokens only: ``4 N1 C^2 + 2 N1^2 C + 3 N2 C M`` (FLOPs of Table 2).

    One operation per multiply-add, no grouped-query attention, no text. For comparison with the paper's percentages.

    Args:
        n_attention: N1, visual tokens in attention.
        n_ffn: N2, visual tokens in the feed-forward network.
        width: C, hidden width.
        ffn_width: M, hidden width of the feed-forward network.
    """
    return LayerFlops(
        projections=4 * n_attention * width**2,
        attention=2 * n_attention**2 * width,
        ffn=3 * n_ffn * width * ffn_width,
    )


def skip_vision_flops(text_config: PreTrainedConfig, kind_counts: KindCounts, plan: SkipPlan) -> Flops:
    """Skip-Vision's formula over all layers of a plan; visual and summary tokens count, text does not.

    Raises:
        PlanError: the plan is written for another depth, or has layers in which visual tokens issue no query: N1
            stands for queries and keys alike.
    """
    plan.check_depth(text_config.num_hidden_layers)
    text, layers = frozenset({TokenKind.TEXT}), []
    for live, rule in zip(live_counts(kind_counts, plan), plan.rules, strict=True):
        if rule.no_attention & (VISUAL | {TokenKind.SUMMARY}):
            raise PlanError(
                f"plan {plan.name!r}: Skip-Vision's formula has one number for queries and keys, and this plan has "
                "layers with fewer queries; count it exactly or by V-Skip's formula"
            )
        attending, running = count_tokens(live, text), count_tokens(live, text | rule.no_ffn)
        layers.append(
            skip_vision_layer_flops(attending, running, text_config.hidden_size, text_config.intermediate_size)
        )
    return Flops(tuple(layers))


def v_skip_layer_flops(
    tokens: float, without_query: float, without_ffn: float, width: int, ffn_width: int
) -> LayerFlops:
    """V-Skip's and ShortV's count of one layer of a model without grouped-query attention.

    Dense ``2n(4h + 3m)h + 4n^2 h``; a token without query saves ``4h^2 + 4nh``, one without FFN ``6hm``, so that
    ShortV's layer is ``2t(4h + 3m)h + 4vh^2 + 4tnh``.

    Args:
        tokens: n, all tokens.
        without_query: of them, those that issue no query.
        without_ffn: of them, those that run no feed-forward network.
        width: h, hidden width.
        ffn_width: m, hidden width of the feed-forward network.
    """
    queries = tokens - without_query
    return LayerFlops(
        projections=4 * (queries + tokens) * width**2,
        attention=4 * queries * tokens * width,
        ffn=6 * (tokens - without_ffn) * width * ffn_width,
    )


def v_skip_flops(text_config: PreTrainedConfig, kind_counts: KindCounts, plan: SkipPlan) -> Flops:
    """V-Skip's and ShortV's formula over all layers of a plan; ranking tokens is not counted.

    Raises:
        PlanError: the plan is written for another depth.
    """
    plan.check_depth(text_config.num_hidden_layers)
    layers = []
    for live, rule in zip(live_counts(kind_counts, plan), plan.rules, strict=True):
        tokens = count_tokens(live)
        silent, without_ffn = tokens - count_tokens(live, rule.no_attention), tokens - count_tokens(live, rule.no_ffn)
        layers.append(
            v_skip_layer_flops(tokens, silent, without_ffn, text_config.hidden_size, text_config.intermediate_size)
        )
    return Flops(tuple(layers))
