"""How much every layer's FFN changes a token, by kind (Skip-Vision, Figure 3), and what FFNs cost (Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from skipvision_train.analysis.flops import layer_flops
from skipvision_train.analysis.probe import KINDS, Estimate, LayerStates, over_samples, sample_kinds, watch_layers
from skipvision_train.calibration.samples import Sample
from skipvision_train.calibration.sweep import read_logits
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import DENSE_RULE, TokenKind


@dataclass(frozen=True)
class FfnImpact:
    """The FFN's update relative to what it is added to.

    Attributes:
        plan: name of the plan that ran.
        values: per kind that occurs (samples, layers) float64: a sample's mean over its tokens of that kind; NaN where
            it has none.
    """

    plan: str
    values: dict[TokenKind, Tensor]

    def estimates(self) -> dict[TokenKind, Estimate]:
        """Per kind mean and interval over the samples, (layers,)."""
        return {kind: over_samples(values) for kind, values in self.values.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON form: per kind mean, lower and upper bound per layer."""
        impact = {kind.name.lower(): estimate.to_dict() for kind, estimate in self.estimates().items()}
        return {"plan": self.plan, "impact": impact}


def impact(states: LayerStates) -> Tensor:
    """(T,) fp32: ``||FFN(h_attn)||_2 / ||h_attn||_2`` of every token.

    Figure 3's caption calls it "feature modulus ratio before (||h_attn||_2) and after FFN (||FFN(h_attn)||_2)"; read
    here as after over before, as the text has it: "updates introduced by the FFN". FFN means the layer's pre-normed FFN
    without the residual connection, as in Eq. 4.
    """
    return states.ffn_update().float().norm(dim=-1) / states.attended.float().norm(dim=-1)


@torch.no_grad()
def ffn_impact(
    model: PreTrainedModel, samples: Sequence[Sample], plan: SkipPlan, image_token_id: int | None = None
) -> FfnImpact:
    """Measure the impact in every layer while ``plan`` runs.

    Of tokens whose FFN the plan leaves out: what the FFN would add to the state that they have under the plan. Tokens
    that a plan has dropped do not count in later layers.

    Args:
        model: what ``skipvision_train.apply`` takes, in ``eval`` mode.
        samples: one row each.
        plan: dense for Figure 3, which shows stock models, or the model's own.
        image_token_id: for a causal LM whose configuration names no image token.

    Raises:
        PlanError: the plan does not fit the model.
    """
    depth = len(find_decoder(model).layers)
    values = {kind: torch.full((len(samples), depth), torch.nan, dtype=torch.float64) for kind in KINDS}

    def measure(row: int, sample: Sample) -> None:
        kinds = sample_kinds(model, sample, image_token_id)

        def visit(states: LayerStates) -> None:
            ratios = impact(states).cpu()
            for kind in KINDS:
                own = (kinds == kind) & states.live
                if own.any():
                    values[kind][row, states.index] = ratios[own].double().mean()

        with watch_layers(model, visit):
            read_logits(model, sample, plan, image_token_id)

    for row, sample in enumerate(samples):
        measure(row, sample)
    return FfnImpact(plan.name, {kind: found for kind, found in values.items() if not found.isnan().all()})


@dataclass(frozen=True)
class FlopsShare:
    """Where the decoder's FLOPs of one prefill go, for a number of visual tokens; shares add up to 1.

    Attributes:
        visual_tokens: how many.
        flops: of all decoder layers, 2 per multiply-add.
        visual_ffn: the FFN of the visual tokens (Figure 2).
        text_ffn: the FFN of the text.
        projections: Q, K, V and O of all tokens.
        attention: products of queries and keys, and of weights and values.
    """

    visual_tokens: float
    flops: float
    visual_ffn: float
    text_ffn: float
    projections: float
    attention: float


def flops_shares(text: PreTrainedConfig, visual_tokens: Sequence[float], text_tokens: float) -> list[FlopsShare]:
    """Figure 2 by arithmetic: the dense decoder's FLOPs, grouped-query attention as it runs, attention in full.

    Neither the vision tower nor the LM head is counted. All layers are alike, so one layer has the shares.

    Args:
        text: sizes of the decoder, as for :func:`~skipvision_train.analysis.flops.layer_flops`.
        visual_tokens: numbers of visual tokens, not negative.
        text_tokens: text tokens beside them; with none at all there must be visual ones.
    """
    shares = []
    for visual in visual_tokens:
        layer = layer_flops(text, {TokenKind.TEXT: text_tokens, TokenKind.RETAINED: visual}, DENSE_RULE)
        of_text = layer.ffn * text_tokens / (text_tokens + visual)
        parts = (layer.ffn - of_text, of_text, layer.projections, layer.attention)
        total = text.num_hidden_layers * layer.total
        shares.append(FlopsShare(visual, total, *(part / layer.total for part in parts)))
    return shares
