"""Floating point operations of training steps, with and without what the plan skips, and what a device can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from transformers import PreTrainedConfig

from skipvision_train.analysis.flops import (
    LayerFlops,
    count_tokens,
    layer_flops,
    live_counts,
    lm_head_flops,
    sequence_flops,
)
from skipvision_train.analysis.image_flops import image_flops
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import LayerRule, TokenKind

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "RTX 4090": 165.2,
}
"""Dense bf16 peak, from the vendor's data sheets; a device's name contains the key, and the first one counts."""


def peak_tflops(device_name: str, precision: str) -> float | None:
    """The peak of a device, or None if it is not in the table or the precision is not bf16."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name.lower() in device_name.lower()), None)


@dataclass(frozen=True)
class Work:
    """What some samples cost in training: forward and backward, without recomputation.

    Attributes:
        flops: that are done.
        dense_flops: that would be, if no token skipped anything.
        ffn_skipped: token-layers without a feed-forward network, those of dropped tokens included.
        attention_skipped: token-layers without a query.
        token_layers: all tokens in all layers.
    """

    flops: float = 0.0
    dense_flops: float = 0.0
    ffn_skipped: float = 0.0
    attention_skipped: float = 0.0
    token_layers: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.as_list(), other.as_list(), strict=True)))

    def as_list(self) -> list[float]:
        """The numbers in order."""
        return [self.flops, self.dense_flops, self.ffn_skipped, self.attention_skipped, self.token_layers]


class WorkCounter:
    """Counts the work of samples, under the plan of the moment.

    A part that trains costs three times its forward pass (Kaplan et al. 2020, Sec. 2.1); a frozen one behind a part
    that trains costs two, because the gradient passes through it, and three for the products of its attention, which
    have no weights; a frozen one before all of them costs one. A language model with adapters is frozen; what the
    adapters themselves cost is left out.

    Args:
        config: a :class:`SkipVisionConfig`.
        trains: the parts that train.
        has_adapters: the language model trains by adapters (LoRA).
    """

    def __init__(self, config: PreTrainedConfig, trains: Sequence[str], has_adapters: bool = False) -> None:
        self.config = cast(SkipVisionConfig, config)
        self._factor: dict[str, int] = {}
        reached = False
        for part in ("vision", "connector", "reducer", "llm"):
            reached = reached or part in trains
            has_weights_to_train = part in trains and not (part == "llm" and has_adapters)
            self._factor[part] = 1 + has_weights_to_train + reached
        self._sample = lru_cache(16384)(self._count)

    def sample(self, kinds: tuple[int, ...], plan: SkipPlan) -> Work:
        """The decoder's work for a sample with so many tokens of every kind."""
        return self._sample(kinds, plan)

    def _count(self, kinds: tuple[int, ...], plan: SkipPlan) -> Work:
        text, counts = self.config.text_config, {TokenKind(kind): n for kind, n in enumerate(kinds) if n}
        depth = plan.num_layers
        whole = depth * self._with_backward(layer_flops(text, counts, LayerRule()))
        tokens = depth * count_tokens(counts)
        if plan.drops:
            flops = sequence_flops(text, counts, plan)
            done = flops.raters + sum(self._with_backward(layer) for layer in flops.layers)
            pairs = list(zip(live_counts(counts, plan), plan.rules, strict=True))
            ffn = sum(count_tokens(live, rule.no_ffn) for live, rule in pairs)
            queries = sum(count_tokens(live, rule.no_attention) for live, rule in pairs)
        else:
            rules = Counter(plan.rules)
            done = sum(n * self._with_backward(layer_flops(text, counts, rule)) for rule, n in rules.items())
            ffn = sum(n * count_tokens(counts, rule.no_ffn) for rule, n in rules.items())
            queries = sum(n * count_tokens(counts, rule.no_attention) for rule, n in rules.items())
        return Work(done, whole, tokens - ffn, tokens - queries, tokens)

    def _with_backward(self, layer: LayerFlops) -> float:
        factor = self._factor["llm"]
        # Ranking what is dropped has no gradient.
        return factor * (layer.projections + layer.ffn) + (3 if factor > 1 else 1) * layer.attention + layer.score

    def around(self, tiles: Sequence[int], supervised: int) -> float:
        """FLOPs of the images before the decoder, and of the LM head at supervised positions behind it."""
        total = self._factor["llm"] * lm_head_flops(self.config.text_config, supervised)
        for count, images in Counter(tiles).items():
            cost = image_flops(self.config, count)
            by_part = (("vision", cost.vision), ("connector", cost.connector), ("reducer", cost.merging))
            total += images * sum(self._factor[part] * flops for part, flops in by_part)
        return total
