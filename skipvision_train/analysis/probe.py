"""What happens inside the decoder's layers while a model runs a sample: the residual stream around every FFN.

Shapes: T positions of the one row that a sample is, C hidden width. Nothing is kept between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from skipvision_train.adapters.apply import visual_token_ids
from skipvision_train.adapters.prompts import PromptReader
from skipvision_train.calibration.samples import Sample
from skipvision_train.evaluation.metrics import Z_95
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.rules import TokenKind
from skipvision_train.plans.run import PlanRun

KINDS = (TokenKind.TEXT, TokenKind.RETAINED, TokenKind.MIDDLE, TokenKind.SKIPPED, TokenKind.SUMMARY)
"""The kinds in the order of tables and pictures; padding does not occur."""


@dataclass(frozen=True)
class LayerStates:
    """One decoder layer of one forward.

    Attributes:
        index: the layer.
        layer: its module.
        attended: (T, C), h_attn: the residual stream behind attention, before the FFN's norm (Skip-Vision, Eq. 4). Of a
            token that has left the sequence: what passes through.
        leaving: (T, C), the layer's output.
        live: (T,) bool, whether the token is still in the sequence.
        ran: (T,) bool, whether its FFN ran.
    """

    index: int
    layer: Any
    attended: Tensor
    leaving: Tensor
    live: Tensor
    ran: Tensor

    def ffn_update(self) -> Tensor:
        """(T, C): what the FFN with its norm makes of every token's h_attn, whether or not the plan runs it."""
        return self.layer.mlp(self.layer.post_attention_layernorm(self.attended))


@contextmanager
def watch_layers(model: nn.Module, visit: Callable[[LayerStates], None]) -> Iterator[None]:
    """Call ``visit`` behind every decoder layer of every forward of one row without a filled cache, plan or no plan.

    Works inside and around ``skipvision_train.apply``. ``visit`` may run the layer's FFN once more.
    """
    active: dict[int, Tensor] = {}

    def before_norm(index: int) -> Callable[..., None]:
        def note(norm: nn.Module, args: tuple[Any, ...]) -> None:
            active.setdefault(index, args[0])

        return note

    def behind(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaving: Tensor) -> None:
        index = layer.self_attn.layer_idx
        visit(_states(layer, args[0] if args else kwargs["hidden_states"], kwargs, leaving, active[index]))
        del active[index]

    with ExitStack() as hooks:
        for index, layer in enumerate(find_decoder(model).layers):
            norm: nn.Module = layer.post_attention_layernorm
            hooks.callback(norm.register_forward_pre_hook(before_norm(index)).remove)
            hooks.callback(layer.register_forward_hook(behind, with_kwargs=True).remove)
        yield


def _states(layer: Any, entering: Tensor, kwargs: dict[str, Any], leaving: Tensor, active: Tensor) -> LayerStates:
    """``active``: the input of the FFN's norm, of the tokens whose FFN runs."""
    length, width = leaving.shape[1:]
    run: PlanRun | None = kwargs.get("plan_run")
    # A run decides once: asked again, as where activations are recomputed, it gives the same work.
    work = None if run is None else run.enter(layer, entering, kwargs["position_embeddings"])[1]
    rows = torch.arange(length, device=leaving.device)
    live, ran = torch.ones(length, dtype=torch.bool), torch.ones(length, dtype=torch.bool)
    if work is not None:
        rows = rows if work.rows is None else work.rows
        live = torch.zeros(length, dtype=torch.bool).index_fill(0, rows.cpu(), True)
        rows = rows if work.ffn is None else rows[work.ffn]
        ran = torch.zeros(length, dtype=torch.bool).index_fill(0, rows.cpu(), True)
    # Where the FFN is left out, what leaves the layer is h_attn (Eq. 5).
    attended = leaving[0].index_copy(0, rows, active.reshape(-1, width).to(leaving.dtype))
    return LayerStates(layer.self_attn.layer_idx, layer, attended, leaving[0], live, ran)


def sample_kinds(model: PreTrainedModel, sample: Sample, image_token_id: int | None = None) -> Tensor:
    """(T,) int64 on the CPU, the :class:`TokenKind` of every position; all visual tokens of others' models skip."""
    if "token_kinds" in sample.inputs:  # our own collator says it
        return sample.inputs["token_kinds"][0].cpu()
    return PromptReader(visual_token_ids(model, image_token_id)).kinds(sample.inputs["input_ids"].cpu())[0]


@dataclass(frozen=True)
class Estimate:
    """A mean with its normal 95 % interval.

    Attributes:
        mean, low, high: of the same shape; not a number where there is no sample.
    """

    mean: Tensor
    low: Tensor
    high: Tensor

    def to_dict(self) -> dict[str, Any]:
        """JSON form; None where there is no number."""
        return {name: plain(value) for name, value in vars(self).items()}


def over_samples(values: Tensor) -> Estimate:
    """Mean and interval over the first dimension; NaN is no sample, and one sample gives an interval without width."""
    count = (~values.isnan()).sum(0)
    mean = values.nanmean(0)
    squares = (values - mean).square().nansum(0)
    margin = Z_95 * (squares / (count - 1).clamp_min(1) / count).sqrt()
    return Estimate(mean, mean - margin, mean + margin)


def plain(values: Any) -> Any:
    """A tensor, a number or a nested list of numbers as JSON holds it: None for what is not finite."""
    nested = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(nested, list):
        return [plain(value) for value in nested]
    return nested if nested is not None and abs(nested) < float("inf") else None
