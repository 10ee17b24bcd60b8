"""The error of skipped FFNs as Skip-Vision's section 5 bounds it, beside what it is when measured.

Two forwards per sample, dense and under the plan. Shapes: S samples, L layers, T positions, R read ones, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from skipvision_train.analysis import lipschitz
from skipvision_train.analysis.lipschitz import LayerNorms
from skipvision_train.analysis.probe import LayerStates, over_samples, plain, sample_kinds, watch_layers
from skipvision_train.calibration.samples import Sample
from skipvision_train.calibration.scores import kl_divergence
from skipvision_train.calibration.sweep import read_logits
from skipvision_train.errors import ConfigError
from skipvision_train.models.merging import decide_merge
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.selection import partition, top_salient
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.methods import dense, skip_ffn
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import VISUAL, TokenKind

ROUNDING = 1e-3
"""An error this much above its bound, relatively, is not called above it."""


@dataclass(frozen=True)
class SampleErrors:
    """What skipping does to one sample.

    Attributes:
        skipping: (L,) float64, eps_skip: the norm of FFN(h_attn) of all skipping tokens together (Eq. 8), in the
            forward that skips. Together, because Eq. 10 speaks of the whole state, of n tokens (Sec. 8).
        per_token: (L,) float64, the same, mean over single tokens; NaN where none skips.
        read: (L,) float64, ||h_dense - h_skip|| behind every layer, mean over the read positions (the last token of a
            prompt).
        text: (L,) float64, the same, of all text tokens together.
        whole: (L,) float64, the same, of all tokens together: what eps^(l) of Eq. 9 is.
        variance: sigma^2 of Eq. 12: of the dense logits over the vocabulary, mean over the read positions.
        kl: KL(p_skip || p_dense) in nats, mean over the read positions.
        theta: mean cosine similarity of merged tokens and the tokens they are merged into; None where none is merged.
    """

    skipping: Tensor
    per_token: Tensor
    read: Tensor
    text: Tensor
    whole: Tensor
    variance: float
    kl: float
    theta: float | None


@dataclass(frozen=True)
class ErrorBound:
    """Section 5 of the paper on a checkpoint.

    Attributes:
        plan: name of the plan.
        norms: spectral norms, one entry per layer.
        samples: one entry per sample.
    """

    plan: str
    norms: list[LayerNorms]
    samples: list[SampleErrors]

    def factors(self, residual: bool = False) -> Tensor:
        """(L,) float64: gamma of Eq. 9, or with the residual connections."""
        return torch.tensor([n.residual if residual else n.paper for n in self.norms], dtype=torch.float64)

    def stacked(self, name: str) -> Tensor:
        """(S, L) float64: a per-layer attribute of all samples."""
        return torch.stack([getattr(sample, name) for sample in self.samples])

    def telescoped(self, residual: bool = False) -> Tensor:
        """(S, L) float64: log10 of the bound behind every layer (Eq. 9 and 10), from each sample's own eps_skip."""
        return torch.stack([lipschitz.telescoped(s.skipping, self.factors(residual)) for s in self.samples])

    def closed(self) -> list[float]:
        """Per sample log10 of Eq. 11, with the largest eps_skip and the largest gamma."""
        gamma = float(self.factors().max())
        return [lipschitz.closed_form(float(s.skipping.max()), gamma, len(self.norms)) for s in self.samples]

    def log_errors(self) -> Tensor:
        """(S, L) float64: log10 of the measured error of the whole state, which :meth:`telescoped` is to bound."""
        return self.stacked("whole").log10()

    def exceeded(self, residual: bool = False) -> Tensor:
        """(S, L) bool: behind which layers the measured error of the whole state is above the bound.

        By more than ``ROUNDING``. Behind the first layer that skips both are one number (Eq. 8), which the difference
        of two states in half precision may miss by more: it does not count.
        """
        bound, skips = self.telescoped(residual), self.stacked("skipping") > 0
        first = skips & (skips.cumsum(1) == 1)
        return (self.log_errors() > bound + math.log10(1 + ROUNDING)) & bound.isfinite() & ~first

    def violations(self, residual: bool = False) -> int:
        """In how many samples the measured error is above the bound behind any layer."""
        return int(self.exceeded(residual).any(1).sum())

    def kl_violations(self) -> int:
        """In how many samples the measured KL is above Eq. 12 with the bound of Eq. 10."""
        measured = torch.tensor([sample.kl for sample in self.samples], dtype=torch.float64).log10()
        return int((measured > self.kl_bounds()["bound"]).sum())

    def kl_bounds(self) -> dict[str, Tensor]:
        """(S,) float64, log10 of nats: Eq. 12 from the bound and from the measured error, and Eq. 13.

        The paper puts an error of the hidden state over a variance of the logits; so do these.
        """
        bound, values = self.telescoped()[:, -1].tolist(), []
        for sample, total in zip(self.samples, bound, strict=True):
            measured = _log10(float(sample.read[-1]))
            extra = 0.0 if sample.theta is None else lipschitz.similarity_error(sample.theta)
            values.append(
                [
                    lipschitz.kl_bound(total, sample.variance),
                    lipschitz.kl_bound(measured, sample.variance),
                    lipschitz.kl_bound(total, sample.variance, extra),
                    lipschitz.kl_bound(measured, sample.variance, extra),
                ]
            )
        names = ("bound", "measured", "bound_with_similarity", "measured_with_similarity")
        columns = torch.tensor(values, dtype=torch.float64).unbind(1)
        return dict(zip(names, columns, strict=True))

    def theta(self) -> float | None:
        """Mean over the samples; None where nothing is merged."""
        known = [sample.theta for sample in self.samples if sample.theta is not None]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form; means over samples, logarithms averaged as such."""
        measured = {
            name: over_samples(self.stacked(name)).to_dict()
            for name in ("skipping", "per_token", "read", "text", "whole")
        }
        scalars = {
            name: over_samples(torch.tensor([getattr(s, name) for s in self.samples], dtype=torch.float64)).to_dict()
            for name in ("kl", "variance")
        }
        theta = self.theta()
        return {
            "plan": self.plan,
            "layers": [
                {**vars(n), "attention": n.attention, "ffn": n.ffn, "gamma": n.paper, "gamma_residual": n.residual}
                for n in self.norms
            ],
            "measured": measured,
            **scalars,
            "log10_bound": plain(self.telescoped().mean(0)),
            "log10_bound_residual": plain(self.telescoped(residual=True).mean(0)),
            "log10_closed_form": plain(torch.tensor(self.closed(), dtype=torch.float64).mean()),
            "log10_measured": plain(self.log_errors().mean(0)),
            "violations": self.violations(),
            "violations_residual": self.violations(residual=True),
            "violations_by_layer": self.exceeded().sum(0).tolist(),
            "violations_residual_by_layer": self.exceeded(residual=True).sum(0).tolist(),
            "violations_kl": self.kl_violations(),
            "log10_kl_bound": {name: plain(values.mean()) for name, values in self.kl_bounds().items()},
            "theta": theta,
            "eps_sim": None if theta is None else lipschitz.similarity_error(theta),
        }


def skipping_plan(plan: SkipPlan, depth: int) -> SkipPlan:
    """The plan that is compared with dense: ``plan``, or where it skips no FFN, all visual tokens skip it everywhere.

    Raises:
        ConfigError: a plan that also leaves out attention or drops tokens; the bound is about skipped FFNs alone.
    """
    if plan.layers_without_attention() or plan.drops:
        raise ConfigError(
            f"plan: the bound is about skipped FFNs, and {plan.name!r} also leaves out attention or drops tokens; "
            "use plan=skip_ffn or plan=ffn_skip, or leave 'bound' out of parts"
        )
    if plan.layers_without_ffn():
        return plan
    return skip_ffn(kinds=VISUAL, evict=()).bind(depth)


@torch.no_grad()
def sample_errors(
    model: PreTrainedModel, sample: Sample, plan: SkipPlan, image_token_id: int | None = None
) -> SampleErrors:
    """Run a sample dense and under ``plan`` and compare the states behind every layer.

    Args:
        model: what ``skipvision_train.apply`` takes, in ``eval`` mode.
        sample: one row.
        plan: which FFNs are skipped.
        image_token_id: for a causal LM whose configuration names no image token.

    Raises:
        PlanError: the plan does not fit the model.
    """
    text = sample_kinds(model, sample, image_token_id) == TokenKind.TEXT
    read, original = sample.read[0], list[Tensor]()
    rows: list[list[float]] = []

    def keep(states: LayerStates) -> None:
        original.append(states.leaving)

    def compare(states: LayerStates) -> None:
        skips = ~states.ran
        updates = states.ffn_update()[skips.to(states.leaving.device)].double()
        # Subtracted in fp32 at least: the difference of two half-precision numbers need not be one.
        error = (original[states.index].float() - states.leaving.float()).double().norm(dim=-1).cpu()
        measured = (updates.norm(), updates.norm(dim=-1).mean(), error[read].mean(), error[text].norm(), error.norm())
        rows.append([float(value) for value in measured])

    with watch_layers(model, keep):
        dense_logits = read_logits(model, sample, dense(), image_token_id)
    with watch_layers(model, compare):
        logits = read_logits(model, sample, plan, image_token_id)
    skipping, per_token, at_read, of_text, whole = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return SampleErrors(
        skipping=skipping,
        per_token=per_token,
        read=at_read,
        text=of_text,
        whole=whole,
        variance=float(dense_logits.double().var(-1, correction=0).mean()),
        kl=float(kl_divergence(logits, dense_logits).mean()),
        theta=merge_similarity(model, sample),
    )


def error_bound(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    plan: SkipPlan,
    image_token_id: int | None = None,
    iterations: int = 500,
) -> ErrorBound:
    """Spectral norms of every layer, and the errors of every sample.

    Args:
        model: what ``skipvision_train.apply`` takes, in ``eval`` mode.
        samples: one row each.
        plan: which FFNs are skipped, as :func:`skipping_plan` gives it.
        image_token_id: for a causal LM whose configuration names no image token.
        iterations: of the power iteration, at most.

    Raises:
        PlanError: the plan does not fit the model.
    """
    norms = [lipschitz.layer_norms(layer, iterations) for layer in find_decoder(model).layers]
    return ErrorBound(plan.name, norms, [sample_errors(model, sample, plan, image_token_id) for sample in samples])


@torch.no_grad()
def merge_similarity(model: PreTrainedModel, sample: Sample) -> float | None:
    """theta of Eq. 13: mean cosine similarity of tokens that are merged away and the tokens that they are merged into.

    Of a merge in one round (the paper's); of several rounds as if it were one. None where nothing is merged.
    """
    if not isinstance(model, SkipVisionForConditionalGeneration):
        return None
    config: Any = model.config  # annotated as the base class in transformers
    keep, found = config.reducer_config.local_keep, []
    if keep is None:
        return None
    for local in local_tokens(model, sample):
        if len(local) <= keep:
            continue
        merge = decide_merge(local[None], keep)
        receiver = merge.kept[0, merge.target[0]]
        away = receiver != torch.arange(len(local), device=local.device)
        found.append(F.cosine_similarity(local.float(), local[receiver].float(), dim=-1)[away].double())
    return float(torch.cat(found).mean()) if found else None


def local_tokens(model: SkipVisionForConditionalGeneration, sample: Sample) -> list[Tensor]:
    """The local tokens of every image before merging, (n, C) each, split as ``ReducerConfig.split`` says."""
    config: Any = model.config
    reducer = config.reducer_config
    features = model.vision_tower(sample.inputs["pixel_values"])
    levels = model.connector(features)
    if reducer.split == "finest":
        return list(levels[-1].unbind())
    tokens = torch.cat(tuple(levels), dim=1)
    if reducer.split == "saliency":
        return list(partition(tokens, top_salient(features.saliency, reducer.retain))[1].unbind())
    tiles = sample.inputs["image_tiles"].tolist() if "image_tiles" in sample.inputs else [1] * len(tokens)
    return [image[1:].flatten(0, 1) for image in tokens.split(tiles)]


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf
