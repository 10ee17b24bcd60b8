"""Tokens that leave the sequence: who ranks them, how they score, who stays, what is made of the rest.

Scores come from recomputed attention rows of a few asking tokens, in fp32, without gradient; no attention map exists.

Shapes as in ``stages.py``, and: A asking tokens of a row at most, H heads, G key heads, D head width, C hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipvision_train.errors import PlanError
from skipvision_train.plans.attention import normed_heads, rotate_rows
from skipvision_train.plans.layout import TokenLayout, is_kind
from skipvision_train.plans.rules import Drop, TokenKind
from skipvision_train.plans.stages import Census, LiveTokens, pick, used_slots
from skipvision_train.plans.transfer import upload

CORRECTED_HEADS = 14
"""SparseVLM+ averages its scores over this many heads, whatever the model has (its public code)."""


@dataclass(frozen=True)
class Asking:
    """The tokens whose attention ranks others.

    Attributes:
        columns: (B, A) int64 on the CPU; unused places hold any column.
        counts: per row, how many are used.
        documents: per document, whether one of its tokens asks.
    """

    columns: Tensor
    counts: list[int]
    documents: list[bool]

    @property
    def used(self) -> Tensor:
        """(B, A) bool on the CPU."""
        return used_slots(self.counts)


def asking_tokens(drop: Drop, layout: TokenLayout, census: Census) -> Asking:
    """Who ranks: the layout's asking tokens (by default every document's last); for raters the text behind the images.

    Raters (SparseVLM, Sec. 3.2) are sought in the text behind the last token of ``drop.kinds``, in training up to the
    first answer; without such text the last token takes their place.

    Raises:
        PlanError: raters or recycling in packed documents.
    """
    if drop.recycle and layout.document_ids is not None:
        raise PlanError("drop.recycle: makes new tokens of prompts, not of packed documents; give one document per row")
    mask = layout.last_tokens() if layout.asking is None else layout.asking.cpu()
    if drop.score in ("raters", "corrected_raters"):
        if layout.document_ids is not None:
            raise PlanError(
                f"drop.score: {drop.score!r} ranks prompts, not packed documents; give one document per row"
            )
        column = torch.arange(layout.kinds.shape[1]).expand_as(layout.kinds)
        last_visual = torch.where(layout.is_kind(drop.kinds), column, -1).amax(-1, keepdim=True)
        behind = (layout.kinds == TokenKind.TEXT) & (column > last_visual)
        if layout.asking is not None:
            first = torch.where(mask, column, layout.kinds.shape[1]).amin(-1, keepdim=True)
            behind &= (column <= first) & mask.any(-1, keepdim=True)
        mask = torch.where(behind.any(-1, keepdim=True), behind, mask)
    counts = mask.sum(-1).tolist()
    asks = [bool((mask[row] & own).any()) for row, own in zip(census.rows, census.members, strict=True)]
    return Asking(pick(mask, counts), counts, asks)


def droppable(live: LiveTokens, drop: Drop, layout: TokenLayout) -> Tensor:
    """(B, W) bool: the live tokens that a drop ranks, without those that always stay."""
    staying = upload(layout.staying(), live.columns.device).gather(1, live.columns)
    return live.real & is_kind(live.kinds, drop.kinds) & ~staying


@torch.no_grad()
def rater_weights(embeds: Tensor, layout: TokenLayout, drop: Drop, asking: Asking) -> Tensor:
    """(B, A) fp32: 1 for the text tokens that resemble the image more than the average one does, else 0.

    ``softmax_text(V T^T)`` averaged over the visual tokens (SparseVLM, Sec. 3.2). If all are equal, all are raters.

    Args:
        embeds: (B, T, C) input embeddings.
        layout: the batch, on the CPU.
        drop: which kinds are visual.
        asking: the candidates.
    """
    device = embeds.device
    visual = layout.is_kind(drop.kinds)
    counts = visual.sum(-1).tolist()
    columns, seen = upload(pick(visual, counts), device), upload(used_slots(counts), device)
    used = upload(asking.used, device)

    def gather(index: Tensor) -> Tensor:
        return embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1])).float()

    likeness = gather(columns) @ gather(upload(asking.columns, device)).transpose(1, 2)
    likeness = likeness.masked_fill(~used[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    mean = (likeness * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp_min(1)
    above = (mean > mean.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1)) & used
    return torch.where(above.any(-1, keepdim=True), above, used).float()


@torch.no_grad()
def attention_scores(
    layer: Any,
    tokens: Tensor,
    rotary: tuple[Tensor, Tensor],
    live: LiveTokens,
    asking: Asking,
    weights: Tensor | None,
    corrected: Tensor | None = None,
) -> Tensor:
    """How much attention every live token gets from the asking ones under ``layer``: the score of FastV and others.

    Args:
        layer: the decoder layer whose norm, queries and keys are used.
        tokens: (N, C), the packed live tokens, as they enter the layer.
        rotary: cos and sin, (N, D) each, of those tokens.
        live: the live tokens.
        asking: who ranks.
        weights: (B, A) fp32, how much each of them counts; None: 1.
        corrected: (B, W) bool, the ranked tokens: divide by what the rotary embedding alone would give, and average
            over the heads that give them most (SparseVLM+, Sec. 4.2 and 4.3). None: plain attention, all heads.

    Returns:
        (B, W) fp32; the mean over heads, the weighted sum over the asking tokens.
    """
    device, attention = tokens.device, layer.self_attn
    grid = upload(live.place.flatten(), device)
    columns, used = upload(asking.columns, device), upload(asking.used, device)
    same = (upload(live.columns, device)[:, None] == columns[..., None]) & upload(live.used, device)[:, None]
    slots = same.int().argmax(-1)  # (B, A), where the asking tokens stand among the live ones
    askers = upload(live.place, device).gather(1, slots).flatten()

    normed = layer.input_layernorm(tokens)
    query, key = normed_heads(attention, normed.index_select(0, askers), normed)
    query_rotary = tuple(part.index_select(0, askers) for part in rotary)
    query, key = rotate_rows(attention, query, query_rotary), rotate_rows(attention, key, rotary)
    batch, width = live.used.shape
    query = query.unflatten(0, columns.shape).transpose(1, 2).float()
    key = key.index_select(0, grid).unflatten(0, (batch, width)).transpose(1, 2).float()
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * attention.scaling
    allowed = (torch.arange(width, device=device) <= slots[..., None]) & upload(live.real, device)[:, None]
    if live.documents is not None:
        documents = upload(live.documents, device)
        allowed &= documents.gather(1, slots)[..., None] == documents[:, None]
    share = logits.masked_fill(~(allowed | ~used[..., None])[:, None], -torch.inf).softmax(-1)
    weights = used.float() if weights is None else weights
    if corrected is None:
        return (share.mean(1) * weights[..., None]).sum(1)
    return _corrected(share, weights, upload(corrected, device), attention, query_rotary, rotary, grid)


def _corrected(
    share: Tensor,
    weights: Tensor,
    ranked: Tensor,
    attention: Any,
    query_rotary: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
    grid: Tensor,
) -> Tensor:
    """SparseVLM+'s scores (B, W) of the attention ``share`` (B, H, A, W)."""
    batch, heads, askers, width = share.shape
    ones = torch.ones(1, attention.head_dim, device=share.device)
    query = rotate_rows(attention, ones.expand(len(query_rotary[0]), 1, -1), query_rotary)
    key = rotate_rows(attention, ones.expand(len(rotary[0]), 1, -1), rotary).index_select(0, grid)
    query, key = query.reshape(batch, askers, -1).float(), key.reshape(batch, width, -1).float()
    share = share / (query @ key.transpose(1, 2) * attention.scaling)[:, None]
    mass = (share * weights[:, None, :, None] * ranked[:, None, None]).sum((2, 3))
    best = mass.argsort(dim=-1, descending=True, stable=True)[:, : min(CORRECTED_HEADS, heads)]
    share = share.gather(1, best[..., None, None].expand(-1, -1, askers, width))
    return (share.mean(1) * weights[..., None]).sum(1)


def ranks(scores: Tensor, candidates: Tensor, documents: Tensor | None) -> Tensor:
    """(B, W) int64: the rank of every candidate in its document, 0 for the best; equal scores rank by place.

    Args:
        scores: (B, W) fp32.
        candidates: (B, W) bool; the ranks of the others mean nothing.
        documents: (B, W) int64, or None: one document per row.
    """
    group = torch.zeros_like(scores, dtype=torch.long) if documents is None else documents
    group = group.masked_fill(~candidates, torch.iinfo(torch.int64).max)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=-1, stable=True))
    sorted_group = group.gather(1, order)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    starts = torch.ones_like(candidates)
    starts[:, 1:] = sorted_group[:, 1:] != sorted_group[:, :-1]
    first = torch.where(starts, place, 0).cummax(-1).values
    return torch.empty_like(order).scatter(1, order, place - first)


@dataclass(frozen=True)
class Recycled:
    """New tokens made of some that leave: averages of clusters, written into places that have become free.

    Attributes:
        sources: (S,) int64, flat positions ``row * T + column`` of the clustered tokens.
        clusters: (S,) int64, the new token each of them goes into.
        targets: (K,) int64, the flat positions that the new tokens take.
    """

    sources: Tensor
    clusters: Tensor
    targets: Tensor

    def apply(self, hidden: Tensor) -> Tensor:
        """``hidden`` (B, T, C) with the new tokens in their places; differentiable."""
        flat = hidden.flatten(0, 1)
        sums = flat.new_zeros(len(self.targets), flat.shape[1])
        sums = sums.index_add(0, self.clusters, flat.index_select(0, self.sources))
        sizes = torch.zeros_like(sums[:, :1]).index_add(
            0, self.clusters, torch.ones_like(sums[:1, :1]).expand(len(self.clusters), 1)
        )
        return flat.index_copy(0, self.targets, sums / sizes).view_as(hidden)


@torch.no_grad()
def cluster(tokens: Tensor, count: int) -> Tensor:
    """(S,) int64: the cluster of every token of (S, C), by density peaks over the ``count`` nearest (DPC-kNN).

    As in SparseVLM's public code, without the random noise that it adds to the densities: equal ones rank by place.
    """
    tokens = tokens.float()
    # The mode without matrix products: exact where tokens are close.
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[1] ** 0.5
    density = (-distance.topk(count, largest=False).values.square().mean(-1)).exp()
    denser = density[None, :] > density[:, None]
    separation = torch.where(denser, distance, distance.max()).amin(-1)
    centres = (separation * density).argsort(descending=True, stable=True)[:count]
    nearest = distance[:, centres].argmin(-1)
    return nearest.index_copy(0, centres, torch.arange(count, device=tokens.device))


@torch.no_grad()
def recycle(
    live: LiveTokens,
    candidates: Tensor,
    ranked: Tensor,
    tokens: Tensor,
    drop: Drop,
    leaving: list[int],
    kept: list[int],
) -> tuple[Recycled | None, Tensor, Tensor]:
    """Make new tokens of the best that leave (SparseVLM, Sec. 3.4), one document per row.

    The best 30 % of what leaves are clustered, each cluster is averaged, and the averages stand behind the survivors.

    Args:
        live: before the drop.
        candidates: (B, W) bool, what was ranked.
        ranked: (B, W) int64, their ranks.
        tokens: (B, T, C), the hidden states at the entry of the drop's layer.
        drop: the drop.
        leaving: per row, how many leave.
        kept: per row, how many stay.

    Returns:
        the recipe (None: nothing leaves), (B, W) bool the slots that hold new tokens, (B, W) int64 the causal order.
    """
    new = torch.zeros_like(candidates)
    order = 2 * torch.arange(candidates.shape[1], device=candidates.device).repeat(len(candidates), 1)
    last = order.masked_fill(~candidates, 0).amax(-1)
    sources, clusters, targets, total = [], [], [], 0
    for row, (gone, stay) in enumerate(zip(leaving, kept, strict=True)):
        count = drop.recycled(gone)
        if not count:
            continue
        by_rank = ranked[row].masked_fill(~candidates[row], torch.iinfo(torch.int64).max).argsort(stable=True)
        chosen = by_rank[stay : stay + int(gone * 0.3) + 1]
        columns = live.columns[row]
        sources.append(columns[chosen] + row * live.sequence)
        clusters.append(cluster(tokens[row, columns[chosen]], count) + total)
        places = chosen[:count].sort().values
        targets.append(columns[places] + row * live.sequence)
        new[row].index_fill_(0, places, True)
        order[row].index_copy_(0, places, (last[row] + 1).expand(count))
        total += count
    if not sources:
        return None, new, order
    return Recycled(torch.cat(sources), torch.cat(clusters), torch.cat(targets)), new, order


def renumbered(live: LiveTokens) -> Tensor:
    """(B, W) int64: 0, 1, 2, ... over the live tokens of every document (PyramidDrop, SparseVLM v1)."""
    place = torch.arange(live.columns.shape[1], device=live.columns.device).expand_as(live.columns)
    if live.documents is None:
        return place
    starts = torch.ones_like(place, dtype=torch.bool)
    starts[:, 1:] = live.documents[:, 1:] != live.documents[:, :-1]
    return place - torch.where(starts, place, 0).cummax(-1).values
