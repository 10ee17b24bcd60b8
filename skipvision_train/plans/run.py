"""One forward of a decoder under a plan: which tokens are live in which layer, and what each layer does with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from skipvision_train.plans import drops
from skipvision_train.plans.attention import Kernel, add_rows, attend, put_rows
from skipvision_train.plans.backends import Backend
from skipvision_train.plans.cache import thin
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import Drop, Kinds, LayerRule
from skipvision_train.plans.stages import Census, LayerWork, LiveTokens, layer_work, pick
from skipvision_train.plans.transfer import upload

# In transformers 5.17 a layer's __call__ checkpoints whatever forward the instance has; in 5.23 the class's forward
# does it, which an instance forward replaces and so must do itself.
CHECKPOINTS_IN_CALL = "__call__" in vars(GradientCheckpointingLayer)

Rotary = tuple[Tensor, Tensor]
"""cos and sin."""


@dataclass
class Stretch:
    """The layers between two drops.

    Attributes:
        first_layer: where it begins; -1 for the one before any drop, which may have no layer at all.
        live: its live tokens.
        recycled: new tokens made at its entry; None: none.
        positions: (B, W) int64 where a drop renumbers; None: the columns' own rotary positions hold.
        work: the index tensors of the rules met so far, and whether they are those of a last layer partly read.
        rotary: cos and sin of the packed live tokens, (N, D) each, once a layer has asked for them.
    """

    first_layer: int
    live: LiveTokens
    recycled: drops.Recycled | None
    positions: Tensor | None
    work: dict[tuple[LayerRule, bool], LayerWork | None]
    rotary: Rotary | None = None


class PlanRun:
    """The state of one forward. Decisions are made once and kept, so that recomputed layers decide the same.

    Args:
        plan: bound to the model's depth.
        layout: the batch, on the CPU.
        device: the model's.
        backend: what computes the attention of a subset of queries.
        rotary_emb: the decoder's ``rotary_emb``: ``(hidden, position_ids) -> cos, sin``.
        visible: (B, T, K) bool for a step onto a filled cache, as in ``select_queries``.

    Attributes:
        unmasked: whether layers that run their stock code take no mask, whatever the decoder hands them.
    """

    def __init__(
        self,
        plan: SkipPlan,
        layout: TokenLayout,
        device: torch.device,
        backend: Backend,
        rotary_emb: Any,
        visible: Tensor | None = None,
    ) -> None:
        self.plan, self.layout, self.device = plan, layout, device
        self.backend, self.rotary_emb, self.visible = backend, rotary_emb, visible
        self.unmasked = False
        self.census = Census(layout)
        self.stretches = [Stretch(-1, LiveTokens.whole(layout), None, None, {})]
        self.asking: dict[int, drops.Asking] = {}
        self.raters: dict[Kinds, Tensor] = {}
        self.scores: dict[int, Tensor] = {}
        self.kept: dict[int, list[int] | None] = {}
        first = self.stretches[0]
        for layer in range(plan.drops[0].layer if plan.drops else plan.num_layers):
            self._work(layer, first)

    def stock_mask_needed(self) -> bool:
        """Whether some layer runs stock attention over the whole sequence of packed documents."""
        if self.backend.form == "segments":
            return False
        first = self.stretches[0]
        return bool(self.plan.drops) or any(w is None or w.queries is None for w in first.work.values())

    def enter(
        self, layer: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, LayerWork | None]:
        """What ``layer`` is to do with ``hidden`` (B, T, C), and ``hidden`` with recycled tokens in their places.

        Returns:
            None as the work where the stock layer does just that.
        """
        index = layer.self_attn.layer_idx
        if index == 0:
            self._find_raters(hidden)
        drop = self.plan.drop_at(index)
        if drop is not None and drop.score_layer == index:
            self._score(drop, layer, hidden, position_embeddings)
        if drop is not None:
            hidden = self._drop(drop, hidden)
        following = self.plan.drop_at(index + 1)
        if following is not None and following.score_layer == index:
            self._score(following, layer, hidden, position_embeddings)
        stretch = self._stretch(index)
        work = self._work(index, stretch)
        if work is not None and work.queries is not None and work.rotary is None:
            work = replace(work, rotary=self._rotary(stretch, hidden, position_embeddings))
            stretch.work[self._key(index)] = work
        return hidden, work

    def _key(self, layer: int) -> tuple[LayerRule, bool]:
        """What tells the work of a layer from that of others: its rule, and whether it leaves out what nobody reads."""
        return self.plan.rules[layer], self.layout.read is not None and layer == self.plan.num_layers - 1

    def _work(self, layer: int, stretch: Stretch) -> LayerWork | None:
        rule, last = key = self._key(layer)
        if key not in stretch.work:
            read = self.layout.read if last and stretch.live.columns.device.type == "cpu" else None
            stretch.work[key] = layer_work(
                stretch.live, self.census, rule, self.device, self.visible, self.backend.form, read
            )
        return stretch.work[key]

    def finish(self, cache: Any) -> None:
        """Tell the layers of a filled cache that saw fewer tokens which ones those were."""
        edges = [stretch.first_layer for stretch in self.stretches[1:]] + [self.plan.num_layers]
        for stretch, edge in zip(self.stretches[1:], edges[1:], strict=True):
            live, shift = stretch.live, None
            if stretch.positions is not None:
                real = self.layout.attention_mask.sum(-1)
                shift = upload(real - torch.tensor(live.lengths), self.device)
            columns = upload(live.columns, self.device)
            thin(cache, range(stretch.first_layer, edge), columns, live.used, live.sequence, shift)

    def _stretch(self, layer: int) -> Stretch:
        return next(s for s in reversed(self.stretches) if s.first_layer <= layer)

    def _rotary(
        self, stretch: Stretch, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, (N, D) each, of the packed live tokens of a stretch."""
        if stretch.rotary is None:
            batch, live = hidden.shape[0], stretch.live
            if stretch.positions is None:
                parts = [part.expand(batch, -1, -1).flatten(0, 1) for part in position_embeddings]
                rows = upload(live.rows, self.device) if live.compact else None
            else:
                parts = [part.flatten(0, 1) for part in self.rotary_emb(hidden, upload(stretch.positions, self.device))]
                rows = upload(live.packed, self.device)
            cos, sin = parts if rows is None else (part.index_select(0, rows) for part in parts)
            stretch.rotary = cos, sin
        return stretch.rotary

    def _find_raters(self, embeds: Tensor) -> None:
        for drop in self.plan.drops:
            if drop.score not in ("raters", "corrected_raters") or drop.kinds in self.raters:
                continue
            if self._leave(drop) is not None:
                self.raters[drop.kinds] = drops.rater_weights(embeds, self.layout, drop, self._asking(drop))

    def _asking(self, drop: Drop) -> drops.Asking:
        if drop.layer not in self.asking:
            self.asking[drop.layer] = drops.asking_tokens(drop, self.layout, self.census)
        return self.asking[drop.layer]

    def _kept(self, drop: Drop) -> list[int] | None:
        """How many droppable tokens every document keeps at a drop; None: all of them."""
        if drop.layer not in self.kept:
            self.kept[drop.layer] = self._leave(drop)
        return self.kept[drop.layer]

    def _leave(self, drop: Drop) -> list[int] | None:
        """The same for the tokens that are live now."""
        kept = self.census.plan_drop(drop, self._asking(drop).documents)
        before = [self.census.droppable(i, drop.kinds) for i in range(len(kept))]
        return None if kept == before else kept

    def _score(self, drop: Drop, layer: Any, hidden: Tensor, position_embeddings: Rotary) -> None:
        # In training also where nothing leaves: ZeRO-3 fetches weights in the order in which modules run, and a process
        # whose batch has no image must run the same ones.
        if drop.layer in self.scores or (self._kept(drop) is None and not torch.is_grad_enabled()):
            return
        stretch = self.stretches[-1]
        rotary = self._rotary(stretch, hidden, position_embeddings)
        tokens = hidden.detach().flatten(0, 1)
        if stretch.live.compact:
            tokens = tokens.index_select(0, upload(stretch.live.rows, self.device))
        ranked = None
        if drop.score == "corrected_raters":
            ranked = drops.droppable(stretch.live, drop, self.layout)
        raters = self.raters.get(drop.kinds) if "raters" in drop.score else None
        self.scores[drop.layer] = drops.attention_scores(
            layer, tokens, rotary, stretch.live, self._asking(drop), raters, ranked
        )

    def _drop(self, drop: Drop, hidden: Tensor) -> Tensor:
        """Begin the stretch after a drop, unless a recomputed layer finds it begun."""
        kept = self._kept(drop)
        if kept is None:
            return hidden
        if self.stretches[-1].first_layer < drop.layer:
            self.stretches.append(self._next_stretch(drop, kept, hidden))
        stretch = self._stretch(drop.layer)
        return hidden if stretch.recycled is None else stretch.recycled.apply(hidden)

    @torch.no_grad()
    def _next_stretch(self, drop: Drop, kept: list[int], hidden: Tensor) -> Stretch:
        live, scores = self.stretches[-1].live, self.scores.get(drop.layer)
        live = live if scores is None else live.to(self.device)
        candidates = drops.droppable(live, drop, self.layout)
        stays, order, recycled = live.real & ~candidates, None, None
        if scores is not None:
            ranks = drops.ranks(scores, candidates, live.documents)
            stays |= candidates & (ranks < upload(self._per_token(kept), self.device).gather(1, live.columns))
            if drop.recycle:
                recycled, new, order = drops.recycle(live, candidates, ranks, hidden, drop, *self._per_row(drop, kept))
                stays |= new
        self.census.drop(drop, kept)
        lengths = self.census.live()
        live = live.select(pick(stays, lengths, order), lengths)
        positions = drops.renumbered(live) if drop.positions == "renumber" else None
        return Stretch(drop.layer, live, recycled, positions, {})

    def _per_token(self, numbers: list[int]) -> Tensor:
        """(B, T) int64 on the CPU: the number of its document for every real token."""
        spread = torch.zeros_like(self.layout.kinds)
        for row, own, number in zip(self.census.rows, self.census.members, numbers, strict=True):
            spread[row, own] = number
        return spread

    def _per_row(self, drop: Drop, kept: list[int]) -> tuple[list[int], list[int]]:
        """Per row of one document each: how many leave at a drop, and how many stay."""
        leaving, staying = [0] * len(self.layout.kinds), [0] * len(self.layout.kinds)
        for i, (row, stay) in enumerate(zip(self.census.rows, kept, strict=True)):
            leaving[row], staying[row] = self.census.droppable(i, drop.kinds) - stay, stay
        return leaving, staying


@dataclass(frozen=True)
class DecodeRun:
    """A step onto a cache of which some layers hold less than the sequence.

    Attributes:
        masks: for every such layer, the mask of the model's attention implementation, or None for none.
        rotary: for every such layer whose positions were renumbered, its cos and sin.
    """

    masks: dict[int, Tensor | None]
    rotary: dict[int, Rotary]


def layer_forward(
    layer: Any,
    hidden_states: Tensor,
    *args: Any,
    plan_run: PlanRun | None = None,
    decode_run: DecodeRun | None = None,
    **kwargs: Any,
) -> Tensor:
    """The instance forward of a decoder layer: stock, unless its rule concerns some token of this batch."""
    if decode_run is not None:
        index = layer.self_attn.layer_idx
        if index in decode_run.masks:
            kwargs["attention_mask"] = decode_run.masks[index]
        if index in decode_run.rotary:
            kwargs["position_embeddings"] = decode_run.rotary[index]
    if plan_run is None:
        return layer._stock_forward(hidden_states, *args, **kwargs)
    if plan_run.unmasked:
        kwargs["attention_mask"] = None
    hidden_states, work = plan_run.enter(layer, hidden_states, kwargs["position_embeddings"])
    if work is None:
        return layer._stock_forward(hidden_states, *args, **kwargs)
    rule = plan_run.plan.rules[layer.self_attn.layer_idx]
    if layer.gradient_checkpointing and layer.training and not CHECKPOINTS_IN_CALL:
        run = partial(run_layer, layer, rule, work, plan_run.backend.kernel, **{**kwargs, "past_key_values": None})
        return layer._gradient_checkpointing_func(run, hidden_states)
    return run_layer(layer, rule, work, plan_run.backend.kernel, hidden_states, **kwargs)


def attention_forward(attention: Any, *args: Any, run: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Any:
    """The instance forward of a ``self_attn``: stock, or ``run`` with the module.

    Going through the module keeps the order in which modules run the same on all ranks, whether or not a rank's batch
    has tokens that skip: DeepSpeed's ZeRO-3 fetches weights in that order, and waits for ever for another one.
    """
    return attention._stock_forward(*args, **kwargs) if run is None else run(attention)


def run_layer(layer: Any, rule: LayerRule, work: LayerWork, kernel: Kernel, hidden: Tensor, **kwargs: Any) -> Tensor:
    """One decoder layer, (B, T, C) -> (B, T, C), of which some tokens skip the attention query, the FFN, or all."""
    batch = hidden.shape[0]
    whole = hidden.flatten(0, 1)
    tokens = whole if work.rows is None else whole.index_select(0, work.rows)
    normed = layer.input_layernorm(tokens)
    queries = work.queries
    if queries is None or work.rotary is None:
        tokens = tokens + layer.self_attn(hidden_states=normed.view_as(hidden), **kwargs)[0].flatten(0, 1)
    else:
        run = partial(
            attend,
            normed=normed,
            queries=queries,
            rotary=work.rotary,
            batch=batch,
            past_key_values=kwargs.get("past_key_values"),
            kernel=kernel,
        )
        update = layer.self_attn(run=run)
        tokens = tokens + update if queries.index is None else add_rows(tokens, queries.index, update)
        if work.silent is not None:
            tokens = add_rows(tokens, work.silent, normed.index_select(0, work.silent))
    active = tokens if work.ffn is None else tokens.index_select(0, work.ffn)
    active = active + layer.mlp(layer.post_attention_layernorm(active)[None])[0]
    if work.ffn is None:
        tokens = active
    elif torch.is_grad_enabled():
        tokens = put_rows(tokens, work.ffn, active.to(tokens.dtype))
    else:  # nobody else holds what attention has just made: no copy of all rows for some of them
        tokens.index_copy_(0, work.ffn, active.to(tokens.dtype))
    if work.rows is not None:
        tokens = put_rows(whole, work.rows, tokens.to(whole.dtype))
    return tokens.view_as(hidden)
