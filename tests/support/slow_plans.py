"""A slow reference of the plan executor that shares no code with it: whole attention maps and Python loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from skipvision_train.plans import Drop, LayerRule, SkipPlan, TokenKind, TokenLayout


def rms_norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of (n, D) as complex numbers (component i pairs with i + D/2)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


class SlowSequence:
    """One sequence without padding under a plan: everybody computes everything, then updates are zeroed.

    ``asking``: who ranks in a drop; ``[]`` ranks nothing. ``prompt``: how many tokens the drops know of (generated ones
    come after them); the last of these always stays. ``visible`` (n, n): what may be seen, besides causality.
    """

    def __init__(
        self, model: LlamaForCausalLM, kinds: list, plan: SkipPlan, visible: Tensor, asking: list[int], prompt: int
    ) -> None:
        self.model, self.kinds, self.plan, self.visible = model, kinds, plan, visible
        self.asking, self.prompt = asking, prompt
        self.live = list(range(len(kinds)))  # in causal order
        self.position = {i: float(i) for i in self.live}
        self.width = model.config.hidden_size // model.config.num_attention_heads
        self.theta = model.config.rope_parameters["rope_theta"]

    def logits(self, ids: Tensor) -> Tensor:
        """(n, V). A dropped token keeps the state it had."""
        h = self.embeds = self.model.model.embed_tokens.weight[ids]
        drops = {drop.layer: drop for drop in self.plan.drops}
        for index, (layer, rule) in enumerate(zip(self.model.model.layers, self.plan.rules, strict=True)):
            if (drop := drops.get(index)) is not None:
                if drop.score_layer == index:
                    self.score = self.scores(drop, layer, h)
                h = self.drop(drop, h)
            if (following := drops.get(index + 1)) is not None and following.score_layer == index:
                self.score = self.scores(following, layer, h)
            h = h.index_put((torch.tensor(self.live),), self.layer(layer, rule, h[self.live]))
        return self.model.lm_head(rms_norm(h, self.model.model.norm))

    def heads(self, projected: Tensor, number: int) -> list[Tensor]:
        """The slices of one projection that every query head uses."""
        group = self.model.config.num_attention_heads // number
        return [projected[:, h // group * self.width : (h // group + 1) * self.width] for h in range(number * group)]

    def maps(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        """(H, m, m), the attention maps of the normed live tokens ``x`` (m, C)."""
        config, positions = self.model.config, torch.tensor([self.position[i] for i in self.live])
        seen = torch.ones(len(x), len(x)).tril().bool() & self.visible[self.live][:, self.live]
        queries = self.heads(layer.self_attn.q_proj(x), config.num_attention_heads)
        keys = self.heads(layer.self_attn.k_proj(x), config.num_key_value_heads)
        scale = math.sqrt(self.width)
        products = [
            rotated(q, positions, self.theta) @ rotated(k, positions, self.theta).T / scale
            for q, k in zip(queries, keys, strict=True)
        ]
        return torch.stack([torch.where(seen, product, -torch.inf).softmax(-1) for product in products])

    def layer(self, layer: torch.nn.Module, rule: LayerRule, h: Tensor) -> Tensor:
        kinds, x = [self.kinds[i] for i in self.live], rms_norm(h, layer.input_layernorm)
        values = self.heads(layer.self_attn.v_proj(x), self.model.config.num_key_value_heads)
        mixed = [share @ value for share, value in zip(self.maps(layer, x), values, strict=True)]
        update = layer.self_attn.o_proj(torch.cat(mixed, dim=-1))
        off = torch.tensor([kind in rule.no_attention for kind in kinds])[:, None]
        h = h + torch.where(off, x if rule.bypass == "norm" else torch.zeros_like(x), update)
        x = rms_norm(h, layer.post_attention_layernorm)
        update = layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
        off = torch.tensor([kind in rule.no_ffn for kind in kinds])[:, None]
        return h + torch.where(off, torch.zeros_like(x), update)

    # --- drops -----------------------------------------------------------------------------------------------------

    def ranked(self, drop: Drop) -> list[int]:
        """The live tokens that a drop may remove, in causal order."""
        return [i for i in self.live if self.may_leave(i, drop)]

    def may_leave(self, i: int, drop: Drop) -> bool:
        """Whether it is ranked: neither the last token nor one that asks ever is."""
        return self.kinds[i] in drop.kinds and i < self.prompt - 1 and i not in self.asking

    def rating(self, drop: Drop) -> list[int]:
        """Who ranks: the asking tokens, or the text behind the image that resembles it more than average."""
        if "raters" not in drop.score or not self.asking:
            return self.asking
        images = [i for i, kind in enumerate(self.kinds[: self.prompt]) if kind in drop.kinds]
        first = max(images, default=-1) + 1
        stop = self.prompt if self.asking == [self.prompt - 1] else min(self.asking) + 1
        texts = [i for i in range(first, stop) if self.kinds[i] == TokenKind.TEXT]
        if not texts:
            return self.asking
        likeness = (self.embeds[images] @ self.embeds[texts].T).softmax(-1).mean(0)
        return [i for i, value in zip(texts, likeness, strict=True) if value > likeness.mean()] or texts

    @torch.no_grad()
    def scores(self, drop: Drop, layer: torch.nn.Module, h: Tensor) -> dict[int, float]:
        """The score of every live token."""
        rows = [self.live.index(i) for i in self.rating(drop)]
        shares = self.maps(layer, rms_norm(h[self.live], layer.input_layernorm))[:, rows]
        if drop.score == "corrected_raters":
            positions = torch.tensor([self.position[i] for i in self.live])
            ones = rotated(torch.ones(len(self.live), self.width), positions, self.theta)
            shares = shares / (ones[rows] @ ones.T / math.sqrt(self.width))
            ranked = [self.live.index(i) for i in self.ranked(drop)]
            mass = shares[:, :, ranked].sum((1, 2)).tolist()
            shares = shares[sorted(range(len(mass)), key=lambda head: -mass[head])[:14]]
        return dict(zip(self.live, shares.mean(0).sum(0).tolist(), strict=True))

    def drop(self, drop: Drop, h: Tensor) -> Tensor:
        """Shorten ``live``; the hidden states with recycled tokens in their places."""
        ranked, amount = self.ranked(drop), drop.keep
        if drop.score != "none" and not self.asking:
            return h
        if isinstance(drop.keep, float):
            original = sum(self.may_leave(i, drop) for i in range(len(self.kinds)))
            amount = {"nearest": round, "down": math.floor}[drop.rounding](round(drop.keep * original, 6))
        if len(ranked) <= amount:
            return h
        best = sorted(ranked, key=lambda i: -self.score[i]) if amount or drop.recycle else ranked
        leave, behind, places = best[int(amount) :], ranked[-1], []
        if drop.recycle:
            h, places = self.recycle(leave, h)
        after = []
        for i in self.live:
            after += [i] if i not in leave else []
            after += places if i == behind else []
        self.live = after
        if drop.positions == "renumber":
            self.position = {i: float(place) for place, i in enumerate(after)}
        return h

    def recycle(self, leave: list[int], h: Tensor) -> tuple[Tensor, list[int]]:
        """Average clusters of the best that leave into places of theirs."""
        chosen = leave[: int(len(leave) * 0.3) + 1]
        count = len(chosen) // 10 + 1
        owner = slow_clusters([h[i].detach() for i in chosen], count)
        places, rows = sorted(chosen[:count], key=self.live.index), list(h)
        for cluster, place in enumerate(places):
            members = [h[i] for i, own in zip(chosen, owner, strict=True) if own == cluster]
            rows[place] = sum(members) / len(members)
        return torch.stack(rows), places


def slow_clusters(tokens: list[Tensor], count: int) -> list[int]:
    """DPC-kNN in loops: the cluster of every token."""
    n, root = len(tokens), math.sqrt(len(tokens[0]))
    distance = [[float((a - b).norm()) / root for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in distance]
    farthest = max(map(max, distance))
    apart = [min([distance[i][j] for j in range(n) if density[j] > density[i]] or [farthest]) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -apart[i] * density[i])[:count]
    found = [min(range(count), key=lambda c: distance[i][centres[c]]) for i in range(n)]
    for c, centre in enumerate(centres):
        found[centre] = c
    return found


def slow_logits(
    model: LlamaForCausalLM,
    ids: Tensor,
    layout: TokenLayout,
    plan: SkipPlan,
    hidden_from: Callable[[int], int] | None = None,
    prompt: int | None = None,
) -> Tensor:
    """Reference logits (B, T, V), zero on padding: each document of each row is run alone, without padding.

    ``hidden_from(n)``: from this index of a sequence of length n on, queries do not see the kinds of ``plan.evict``
    that stand before it. ``prompt``: how many tokens of the only sequence the drops know of; None: all.
    """
    rows = []
    for row, kinds in enumerate(layout.kinds):
        logits = torch.zeros(len(kinds), model.config.vocab_size)
        ids_of_documents = torch.zeros_like(kinds) if layout.document_ids is None else layout.document_ids[row]
        for document in ids_of_documents.unique():
            where = ((ids_of_documents == document) & (kinds != TokenKind.PAD)).nonzero()[:, 0]
            if not len(where):
                continue
            own = [TokenKind(int(kinds[i])) for i in where]
            known = len(own) if prompt is None else prompt
            asking = [known - 1]
            if layout.asking is not None:
                asking = [place for place, i in enumerate(where) if layout.asking[row, i]]
            visible = torch.ones(len(own), len(own)).bool()
            if hidden_from is not None:
                evicted = torch.tensor([kind in plan.evict for kind in own])
                evicted[hidden_from(len(own)) :] = False
                visible[hidden_from(len(own)) :] &= ~evicted
            sequence = SlowSequence(model, own, plan, visible, asking, known)
            logits = logits.index_put((where,), sequence.logits(ids[row, where]))
        rows.append(logits)
    return torch.stack(rows)
