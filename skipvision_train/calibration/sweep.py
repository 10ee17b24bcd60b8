"""How the output moves when one layer leaves something out: for all layers at half the price of one forward each.

The run for layer l starts from the input that layer l has in the base forward, and the perturbed states of several
layers share a batch: layer j runs what was perturbed before it, stacked as rows, and makes one more state from the base
state. The last layer computes only what is read, and is not perturbed: nobody reads what its visual tokens compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from skipvision_train.adapters import apply
from skipvision_train.calibration.samples import Sample
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import VISUAL, LayerRule
from skipvision_train.plans.run import PlanRun

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Compares two sets of logits (N, V): (N,)."""


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run; nothing here changes its numbers but by rounding.

    Attributes:
        image_token_id: for a causal LM whose configuration names no image token.
        group: how many layers are perturbed between two points at which a broken run can go on.
        max_rows: how many perturbed states share a batch; bounds the memory.
        done: finished layers of an earlier run: (samples,) float64 per layer.
        keep: called with a layer and its (samples,) values when they are final.
        progress: called with the number of finished layers and of all that are to be done.
        exchange: turns the values of this rank's samples (columns) into those of all; None: there are no other ranks.
    """

    image_token_id: int | None = None
    group: int = 4
    max_rows: int = 8
    done: Mapping[int, Tensor] | None = None
    keep: Callable[[int, Tensor], None] | None = None
    progress: Callable[[int, int], None] | None = None
    exchange: Callable[[Tensor], Tensor] | None = None


@torch.no_grad()
def sweep(
    model: nn.Module,
    samples: Sequence[Sample],
    rule: LayerRule,
    divergence: Divergence,
    base: SkipPlan,
    options: SweepOptions | None = None,
) -> Tensor:
    """The divergence of the base forward from one in which a single layer also leaves out ``rule``, for every layer.

    Args:
        model: what ``skipvision_train.apply`` takes, in ``eval`` mode.
        samples: one row each; the mean over a sample's read positions is its value.
        rule: what one layer leaves out.
        divergence: ``(base logits, perturbed logits) -> (N,)``.
        base: the plan that holds in every layer. One that drops tokens is run the plain way, one forward per layer.
        options: see :class:`SweepOptions`.

    Returns:
        (layers, samples) float64 on the CPU; the last layer is 0.

    Raises:
        PlanError: the plan does not fit the model, or contradicts ``rule``.
    """
    options = options or SweepOptions()
    base = base.bind(len(find_decoder(model).layers))
    depth, finished = base.num_layers, {i: values.double() for i, values in (options.done or {}).items()}
    walk = _plain_walk if base.drops else _shared_walk
    # A group is run as a whole or not at all: what shares a batch rounds the same then, broken off or not.
    groups = [range(i, min(i + options.group, depth - 1)) for i in range(0, depth - 1, options.group)]
    groups = [group for group in groups if not all(layer in finished for layer in group)]
    total = sum(map(len, groups))
    for done, (layer, own) in enumerate(walk(model, samples, rule, divergence, base, options, groups), start=1):
        finished[layer] = own if options.exchange is None else options.exchange(own)
        if options.keep is not None:
            options.keep(layer, finished[layer])
        if options.progress is not None:
            options.progress(done, total)
    values = [finished[layer] for layer in range(depth - 1)]
    columns = len(values[0]) if values else len(samples)
    return torch.stack([*values, torch.zeros(columns, dtype=torch.float64)])


@torch.no_grad()
def read_logits(model: nn.Module, sample: Sample, plan: SkipPlan, image_token_id: int | None = None) -> Tensor:
    """(R, V) logits at the read positions of a sample, from one plain forward under ``plan``.

    Where ``plan`` drops tokens that are ranked, the first read position ranks them, as it does when the prompt runs
    alone: behind it stands the answer, of which a prefill knows nothing.
    """
    with apply(model, plan, image_token_id=image_token_id), _ranked_by(model, sample.read):
        return model(**sample.inputs, use_cache=False).logits[sample.read.to(_device(sample))]


@contextmanager
def _ranked_by(model: nn.Module, read: Tensor) -> Iterator[None]:
    """Let the first position of ``read`` (1, T) ask for what a plan drops; :func:`apply` comes first."""
    first = read & (read.cumsum(-1) == 1)

    def hand(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        layout = kwargs.get("token_layout")
        return args, kwargs if layout is None else {**kwargs, "token_layout": replace(layout, asking=first)}

    hook = find_decoder(model).register_forward_pre_hook(hand, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _device(sample: Sample) -> torch.device:
    return sample.inputs["input_ids"].device


def _plain_walk(
    model: nn.Module,
    samples: Sequence[Sample],
    rule: LayerRule,
    divergence: Divergence,
    base: SkipPlan,
    options: SweepOptions,
    groups: Sequence[range],
) -> Iterator[tuple[int, Tensor]]:
    """One forward per layer and sample: what the shared walk must equal, and what plans that drop tokens need."""
    reference = [read_logits(model, sample, base, options.image_token_id) for sample in samples]
    for layer in chain.from_iterable(groups):
        perturbed = base.with_rule(layer, rule)
        values = [
            divergence(logits, read_logits(model, sample, perturbed, options.image_token_id)).mean().double().cpu()
            for sample, logits in zip(samples, reference, strict=True)
        ]
        yield layer, torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


def _shared_walk(
    model: nn.Module,
    samples: Sequence[Sample],
    rule: LayerRule,
    divergence: Divergence,
    base: SkipPlan,
    options: SweepOptions,
    groups: Sequence[range],
) -> Iterator[tuple[int, Tensor]]:
    """Group after group of layers; in each, sample after sample."""
    depth = base.num_layers
    probe = base.with_rule(depth - 1, LayerRule(no_ffn=VISUAL))  # concerns every prompt with an image, changes nothing
    with apply(model, probe, image_token_id=options.image_token_id):
        states = [_BaseState(model, sample, base) for sample in samples]
        for layers in groups:
            values = torch.zeros(len(layers), len(samples), dtype=torch.float64)
            for column, state in enumerate(states):
                logits = state.perturb(layers, rule, options.max_rows)
                for row, moved in enumerate(logits):
                    values[row, column] = divergence(state.reference, moved).mean().double().cpu()
            yield from zip(layers, values, strict=True)


class _Begun(Exception):  # noqa: N818 (no error: it ends a forward that has served its purpose)
    """The decoder has called its first layer."""


class _BaseState:
    """One sample's base forward, as far as it has got.

    Attributes:
        hidden: (1, T, C), the input of layer ``at``.
        reference: (R, V) logits at the read positions, once a group has carried the base state to the end.
    """

    def __init__(self, model: nn.Module, sample: Sample, base: SkipPlan) -> None:
        self.decoder, self.head, self.base = find_decoder(model), _head(model), base
        self.at, self.reference = 0, torch.empty(0)
        call: dict[str, Any] = {}
        deep: dict[str, Any] = {}

        def begin(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.update(kwargs, hidden_states=args[0] if args else kwargs["hidden_states"])
            raise _Begun

        def enter(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            deep.update(kwargs)

        hooks = [
            self.decoder.layers[0].register_forward_pre_hook(begin, with_kwargs=True),
            self.decoder.register_forward_pre_hook(enter, with_kwargs=True),
        ]
        try:
            model(**sample.inputs, use_cache=False)
        except _Begun:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        self.hidden = call.pop("hidden_states")
        first: PlanRun = call.pop("plan_run")
        self.call = call
        self.backend, self.rotary_emb = first.backend, first.rotary_emb
        self.layout = replace(first.layout, read=sample.read.cpu())
        self.read = sample.read[0].to(self.hidden.device)
        # Qwen3-VL adds features of the vision tower to the visual tokens behind its first layers.
        self.visual, self.deep = deep.get("visual_pos_masks"), list(deep.get("deepstack_visual_embeds") or ())
        self.runs: dict[tuple[int, int | None], PlanRun] = {}

    def perturb(self, layers: Sequence[int], rule: LayerRule, max_rows: int) -> list[Tensor]:
        """(R, V) logits at the read positions for each of ``layers`` (ascending), in which it leaves out ``rule``."""
        self._advance(layers[0])
        needs_reference, stack = not len(self.reference), self.hidden[:0]
        carried = base = self.hidden
        for index in range(self.at, len(self.decoder.layers)):
            states = [self._layer(index, rows) for rows in stack.split(max_rows) if len(rows)]
            if index in layers:
                states.append(self._layer(index, base, rule))
            stack = torch.cat(states)
            if index <= layers[-1] or needs_reference:
                base = self._layer(index, base)
            if index == layers[-1]:
                carried = base
        if needs_reference:
            self.reference = self._logits(base)[0]
        self.at, self.hidden = layers[-1] + 1, carried
        return list(self._logits(stack))

    def _advance(self, layer: int) -> None:
        """Carry the base state to the input of ``layer``."""
        for index in range(self.at, layer):
            self.hidden = self._layer(index, self.hidden)
        self.at = layer

    def _layer(self, index: int, hidden: Tensor, rule: LayerRule | None = None) -> Tensor:
        """Layer ``index`` over rows of states (S, T, C), under the base plan and, if given, ``rule``."""
        rows = len(hidden)
        key = (rows, None if rule is None else index)
        if key not in self.runs:
            plan = self.base if rule is None else self.base.with_rule(index, rule)
            self.runs[key] = PlanRun(plan, self.layout.repeat(rows), hidden.device, self.backend, self.rotary_emb)
        mask = self.call.get("attention_mask")
        call = {**self.call, "attention_mask": None if mask is None else mask.expand(rows, *mask.shape[1:])}
        hidden = self.decoder.layers[index](hidden, plan_run=self.runs[key], **call)
        if self.visual is not None and index < len(self.deep):
            hidden = hidden.clone()
            hidden[self.visual.expand(rows, -1)] += self.deep[index].to(hidden).repeat(rows, 1)
        return hidden

    def _logits(self, states: Tensor) -> Tensor:
        """(S, R, V) of final states (S, T, C)."""
        return self.head(self.decoder.norm(states[:, self.read]))


def _head(model: nn.Module) -> nn.Module:
    """The LM head, of the model or of what a wrapper holds."""
    return next(head for module in model.modules() if (head := _output_embeddings(module)) is not None)


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    from transformers import PreTrainedModel

    return module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
