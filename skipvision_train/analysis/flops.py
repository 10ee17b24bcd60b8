"""Floating point operations and cache sizes of a model under a skip plan: pure arithmetic, no tensor, no model.

One multiply-add is 2 FLOPs. Matrix products are counted and nothing else (no norms, activations, rotary angles).
Attention is counted in full, active queries times all keys, as V-Skip's and ShortV's figures are; a causal kernel does
about half of it. Counts may be fractional: a mean over samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from skipvision_train.models.configuration import ConnectorConfig, ReducerConfig, VisionConfig
from skipvision_train.plans.plan import Kinds, LayerRule, SkipPlan, TokenKind

KindCounts = Mapping[TokenKind, float]
"""How many positions of one sequence are of each kind; ``PAD`` costs nothing and is ignored."""


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one decoder layer.

    Attributes:
        projections: Q, K, V and O.
        attention: query-key products and the weighted sum of values.
        ffn: the gated feed-forward network's three matrices.
    """

    projections: float
    attention: float
    ffn: float

    @property
    def total(self) -> float:
        """All of the layer."""
        return self.projections + self.attention + self.ffn


@dataclass(frozen=True)
class Flops:
    """FLOPs of the decoder, layer 0 first."""

    layers: tuple[LayerFlops, ...]

    @property
    def total(self) -> float:
        """All layers together."""
        return sum(layer.total for layer in self.layers)


def count_tokens(counts: KindCounts, without: Kinds = frozenset()) -> float:
    """Tokens that are neither padding nor of a kind in ``without``."""
    return sum(n for kind, n in counts.items() if kind is not TokenKind.PAD and kind not in without)


def _widths(text_config: PreTrainedConfig) -> tuple[int, int]:
    """Width of all query heads together, and of all key (or value) heads together."""
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return text_config.num_attention_heads * head_dim, text_config.num_key_value_heads * head_dim


def _layer_flops(
    text_config: PreTrainedConfig, queries: float, new_keys: float, keys: float, ffn_tokens: float
) -> LayerFlops:
    width, (query_width, key_width) = text_config.hidden_size, _widths(text_config)
    return LayerFlops(
        projections=2 * width * (2 * queries * query_width + 2 * new_keys * key_width),
        attention=4 * queries * keys * query_width,
        ffn=6 * ffn_tokens * width * text_config.intermediate_size,
    )


def layer_flops(text_config: PreTrainedConfig, counts: KindCounts, rule: LayerRule) -> LayerFlops:
    """FLOPs of one LLaMA-shaped layer over one sequence (V-Skip, Sec. 3.3; grouped-query attention counted as run).

    A kind in ``rule.no_attention`` costs neither Q, nor O, nor its attention row; its keys and values are computed.

    Args:
        text_config: hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim.
        counts: positions of each kind.
        rule: what the layer leaves out.
    """
    tokens = count_tokens(counts)
    return _layer_flops(
        text_config, count_tokens(counts, rule.no_attention), tokens, tokens, count_tokens(counts, rule.no_ffn)
    )


def sequence_flops(text_config: PreTrainedConfig, kind_counts: KindCounts, plan: SkipPlan) -> Flops:
    """FLOPs of one prefill: the decoder layers only, without vision tower, connector and LM head.

    A plan that evicts ``before_first_token`` runs its last position over fewer keys; that one row is not told apart.

    Raises:
        PlanError: the plan is written for another depth.
    """
    plan.check_depth(text_config.num_hidden_layers)
    return Flops(tuple(layer_flops(text_config, kind_counts, rule) for rule in plan.rules))


def decode_flops(text_config: PreTrainedConfig, kind_counts: KindCounts, plan: SkipPlan, step: int = 1) -> Flops:
    """FLOPs of the decoder layers for one generated token, with the KV cache as it is after eviction.

    Args:
        text_config: as for :func:`layer_flops`.
        kind_counts: of the prompt.
        plan: what is evicted; rules do not concern generated text.
        step: 1 for the first token that is fed back, which attends to the kept prompt and itself.
    """
    plan.check_depth(text_config.num_hidden_layers)
    keys = count_tokens(kind_counts, plan.evict) + step
    return Flops((_layer_flops(text_config, 1, 1, keys, 1),) * plan.num_layers)


def kv_cache_bytes(
    text_config: PreTrainedConfig, kind_counts: KindCounts, plan: SkipPlan, bytes_per_value: int = 2
) -> float:
    """Bytes of the keys and values of all layers that decoding keeps of the prompt (2 bytes: half precision)."""
    _, key_width = _widths(text_config)
    return 2 * plan.num_layers * count_tokens(kind_counts, plan.evict) * key_width * bytes_per_value


def lm_head_flops(text_config: PreTrainedConfig, positions: float = 1) -> float:
    """FLOPs of the output projection at ``positions`` positions; a prefill needs it at the last one only."""
    return 2 * positions * text_config.hidden_size * text_config.vocab_size


def vision_flops(config: VisionConfig) -> float:
    """FLOPs of the CLIP tower for one image: patch embedding and the blocks up to the deepest state that is read."""
    patches = config.grid**2
    tokens = patches + 1
    embedding = 2 * patches * 3 * config.patch_size**2 * config.width
    hidden = int(config.width * config.mlp_ratio)
    block = 8 * tokens * config.width**2 + 4 * tokens**2 * config.width + 4 * tokens * config.width * hidden
    return float(embedding + max(config.depths) * block)


def connector_flops(connector: ConnectorConfig, vision: VisionConfig, text_width: int) -> float:
    """FLOPs of the multi-scale resampler for one image (methods: Chain-of-Sight).

    Per level and feature depth: queries and outputs projected, keys and values of the whole grid projected, every query
    attending to the ``window**2`` patches of its window, and an MLP of four times the width; one projection at the end.
    """
    width, patches = vision.width, vision.grid**2
    total = 2.0 * connector.num_tokens * width * text_width
    for window, queries in zip(connector.windows, connector.queries, strict=True):
        projections = 4 * queries * width**2 + 4 * patches * width**2
        attention = 4 * queries * window**2 * width
        mlp = 16 * queries * width**2
        total += len(vision.depths) * (projections + attention + mlp)
    return total


def merge_flops(reducer: ReducerConfig, local_tokens: int, text_width: int) -> float:
    """FLOPs of token merging for one image: the cosine similarities of all pairs; 0 where nothing is merged."""
    if reducer.local_keep is None or reducer.local_keep == local_tokens:
        return 0.0
    return 2.0 * local_tokens**2 * text_width


def paper_visual_flops(n_attention: float, n_ffn: float, width: int, ffn_width: int) -> float:
    """Skip-Vision's own count of one layer, visual tokens only: ``4 N1 C^2 + 2 N1^2 C + 3 N2 C M`` (FLOPs of Table 2).

    One operation per multiply-add, no grouped-query attention, no text. For comparison with the paper's percentages.

    Args:
        n_attention: N1, visual tokens in attention.
        n_ffn: N2, visual tokens in the feed-forward network.
        width: C, hidden width.
        ffn_width: M, hidden width of the feed-forward network.
    """
    return 4 * n_attention * width**2 + 2 * n_attention**2 * width + 3 * n_ffn * width * ffn_width
