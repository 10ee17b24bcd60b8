"""Visual Information Gain and the choice of layers (V-Skip, Sec. 3.2 and 3.3, Eq. 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.rules import VISUAL, Kinds, LayerRule


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(P || Q) of the distributions of two sets of logits, in nats.

    Args:
        logits: (N, V), P; any floating dtype, computed in float64.
        other: (N, V), Q.

    Returns:
        (N,) float64, not negative: rounding may leave -1e-17 where P and Q agree, which is clamped.
    """
    log_p, log_q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)


@torch.no_grad()
def visual_information_gain(
    model: SkipVisionForConditionalGeneration,
    batches: Sequence[Mapping[str, Tensor]],
    bypass: str = "zero",
    kinds: Kinds = VISUAL,
) -> Tensor:
    """VIG of every layer: KL(P || P without layer l's visual attention) of the next token, mean over samples (Eq. 3).

    P is the model under the plan it has now; the second distribution adds "no attention for ``kinds``" to that plan in
    layer l alone. Scores are one layer at a time, not greedy. The last layer is not run: its visual outputs are read by
    nobody, so its score is 0 by construction. The model's plan is the same afterwards, also if a forward fails.

    Args:
        model: on the device of ``batches``; put into ``eval`` by the caller.
        batches: prompts as the collator makes them, **left padded**: the last column is the last prompt position.
        bypass: what replaces the bypassed attention, ``zero`` or ``norm`` (:class:`LayerRule`).
        kinds: the tokens whose queries are switched off.

    Returns:
        (layers,) float64 on the CPU, nats.

    Raises:
        ValueError: no batches, or a batch that is padded on the right.
        PlanError: the model's plan bypasses the same layer with another ``bypass``.
    """
    if not batches:
        raise ValueError("visual information gain needs at least one batch")
    if any(not bool(batch["attention_mask"][:, -1].all()) for batch in batches):
        raise ValueError("the batches must be left padded: the last position of every row is the last of its prompt")
    base = model.plan
    scores = torch.zeros(base.num_layers, dtype=torch.float64)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    reference = [_next_token_logits(model, batch) for batch in batches]
    rule = LayerRule(no_attention=kinds, bypass=bypass)
    try:
        for layer in range(base.num_layers - 1):
            model.set_plan(base.with_rule(layer, rule))
            for batch, logits in zip(batches, reference, strict=True):
                scores[layer] += kl_divergence(logits, _next_token_logits(model, batch)).sum().cpu()
    finally:
        model.set_plan(base)
    return scores / samples


def _next_token_logits(model: SkipVisionForConditionalGeneration, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]


def select_layers(scores: Tensor | Sequence[float], n: int) -> tuple[int, ...]:
    """The ``n`` layers of the smallest scores, ascending; ties go to the smaller index (Eq. 4).

    Raises:
        ValueError: ``n`` is negative or larger than the number of layers, or a score is not finite.
    """
    values = [float(score) for score in scores]
    if not 0 <= n <= len(values):
        raise ValueError(f"cannot choose {n} of {len(values)} layers")
    if bad := [i for i, value in enumerate(values) if not value < float("inf")]:
        raise ValueError(f"the scores of layers {bad} are not finite: {[values[i] for i in bad]}")
    return tuple(sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[:n]))
