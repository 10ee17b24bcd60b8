"""Which tokens are live in a stretch of layers, and which of them run what: index tensors, made once per forward.

How *many* tokens live, ask or run the FFN in each row follows from the layout and is counted on the CPU
(:class:`Census`). *Which* ones they are may follow from scores on the accelerator. So every shape is known beforehand
and nothing here waits for a device.

Shapes: B rows, T columns, W slots of the widest row of live tokens, N live tokens of all rows. Live tokens stand at the
left of a (B, W) grid in their causal order. *Packed* means one after the other without the unused slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from skipvision_train.plans.layout import TokenLayout, is_kind
from skipvision_train.plans.rules import Drop, Kinds, LayerRule, TokenKind
from skipvision_train.plans.transfer import upload
from skipvision_train.plans.visibility import Form, Segments, Sight


class Census:
    """How many tokens of which kinds are live in every document of a batch. Plain numbers on the CPU.

    Args:
        layout: the batch, on the CPU.

    Attributes:
        rows: the row of every document.
        counts: for every document, how many live tokens there are of each set of kinds. The sets start as single kinds
            and are joined by a drop that ranks several kinds together.
        original: the same before any drop.
        fixed: for every document, how many tokens of each set of one kind no drop removes.
    """

    def __init__(self, layout: TokenLayout) -> None:
        documents = torch.zeros_like(layout.kinds) if layout.document_ids is None else layout.document_ids
        self.layout = layout
        self.rows: list[int] = []
        self.members: list[Tensor] = []
        self.counts: list[dict[Kinds, int]] = []
        self.fixed: list[dict[Kinds, int]] = []
        staying = layout.staying()
        for row, (kinds, owners) in enumerate(zip(layout.kinds, documents, strict=True)):
            for owner in owners[kinds != TokenKind.PAD].unique_consecutive():
                own = (owners == owner) & (kinds != TokenKind.PAD)
                self.rows.append(row)
                self.members.append(own)
                self.counts.append({frozenset({k}): int((kinds[own] == k).sum()) for k in TokenKind})
                stay = kinds[own & staying[row]]
                self.fixed.append({frozenset({k}): int((stay == k).sum()) for k in TokenKind})
        self.original = [dict(counts) for counts in self.counts]

    def live(self, kinds: Kinds | None = None) -> list[int]:
        """Per row, the live tokens of ``kinds``; None counts all of them."""
        totals = [0] * len(self.layout.kinds)
        for row, counts in zip(self.rows, self.counts, strict=True):
            totals[row] += sum(n for known, n in counts.items() if kinds is None or known <= kinds)
        return totals

    def live_documents(self) -> list[int]:
        """Per document, its live tokens."""
        return [sum(counts.values()) for counts in self.counts]

    def droppable(self, document: int, kinds: Kinds, original: bool = False) -> int:
        """How many tokens of ``kinds`` a document has that a drop may remove."""
        counts, fixed = (self.original if original else self.counts)[document], self.fixed[document]
        return sum(n for k, n in counts.items() if k <= kinds) - sum(n for k, n in fixed.items() if k <= kinds)

    def plan_drop(self, drop: Drop, asks: list[bool]) -> list[int]:
        """How many of its droppable tokens every document keeps.

        Args:
            drop: what is to leave.
            asks: whether a document has a token that ranks; one without keeps everything, if ranking is needed.
        """
        before = [self.droppable(i, drop.kinds) for i in range(len(asks))]
        original = [self.droppable(i, drop.kinds, original=True) for i in range(len(asks))]
        kept = [int(drop.kept(*pair)) for pair in zip(before, original, strict=True)]
        ranked = drop.score != "none"
        return [b if ranked and not ask else k for b, k, ask in zip(before, kept, asks, strict=True)]

    def drop(self, drop: Drop, kept: list[int]) -> None:
        """Take note of a drop; recycled tokens count among the kept."""
        for i, counts in enumerate(self.counts):
            before = self.droppable(i, drop.kinds)
            for known in [known for known in counts if known <= drop.kinds]:
                counts[known] = self.fixed[i].get(known, 0)
            counts[drop.kinds] = counts.get(drop.kinds, 0) + kept[i] + drop.recycled(before - kept[i])


def used_slots(counts: list[int]) -> Tensor:
    """(B, Q) bool on the CPU: the first ``counts[b]`` slots of row b; Q is the largest count, at least 1."""
    return torch.arange(max(1, *counts)) < torch.tensor(counts)[:, None]


def pick(mask: Tensor, counts: list[int], order: Tensor | None = None) -> Tensor:
    """(B, Q) int64: where ``mask`` (B, W) bool is True, on its device; arbitrary in unused slots.

    Args:
        mask: has ``counts[b]`` True values in row b.
        counts: known without looking at the mask, so that nobody waits for a device.
        order: (B, W) int64, the order in which to take them (equal ones by place); None: by place.
    """
    order = torch.zeros_like(mask, dtype=torch.long) if order is None else order
    late = torch.iinfo(torch.int64).max
    return order.masked_fill(~mask, late).argsort(dim=-1, stable=True)[:, : max(1, *counts)]


@dataclass(frozen=True)
class LiveTokens:
    """The live tokens of a stretch of layers. Tensors are on the CPU until a ranked drop depends on the device.

    Attributes:
        columns: (B, W) int64, the column of every slot. Unused slots, at the right, hold any column.
        lengths: per row, how many slots are used.
        kinds: (B, W) int64, of the slots' columns.
        documents: (B, W) int64, of the slots' columns; None without packing.
        sequence: T.
        compact: whether tokens have left: padding has too, then. False: the slots are the columns.
    """

    columns: Tensor
    lengths: list[int]
    kinds: Tensor
    documents: Tensor | None
    sequence: int
    compact: bool

    @classmethod
    def whole(cls, layout: TokenLayout) -> LiveTokens:
        """Everything, the layout's padding included: what the layers before any drop see."""
        batch, length = layout.kinds.shape
        columns = torch.arange(length, device=layout.kinds.device).expand(batch, length)
        return cls(columns, [length] * batch, layout.kinds, layout.document_ids, length, compact=False)

    def select(self, slots: Tensor, lengths: list[int]) -> LiveTokens:
        """The tokens in ``slots`` (B, max(lengths)), in that order."""
        return LiveTokens(
            self.columns.gather(1, slots),
            lengths,
            self.kinds.gather(1, slots),
            None if self.documents is None else self.documents.gather(1, slots),
            self.sequence,
            compact=True,
        )

    def to(self, device: torch.device) -> LiveTokens:
        """A copy with its tensors on ``device``."""
        documents = None if self.documents is None else upload(self.documents, device)
        return replace(
            self, columns=upload(self.columns, device), kinds=upload(self.kinds, device), documents=documents
        )

    @cached_property
    def used(self) -> Tensor:
        """(B, W) bool on the CPU: which slots hold a token."""
        return used_slots(self.lengths)

    @cached_property
    def real(self) -> Tensor:
        """(B, W) bool: which slots hold a token that is no padding."""
        return upload(self.used, self.kinds.device) & (self.kinds != TokenKind.PAD)

    @cached_property
    def packed(self) -> Tensor:
        """(N,) int64 on the CPU, the places of the used slots in the flat (B * W) grid."""
        return self.used.flatten().nonzero()[:, 0]

    @cached_property
    def is_full(self) -> bool:
        """Whether all slots are used, so that the packed tokens are the flat grid."""
        return len(self.packed) == self.used.numel()

    @cached_property
    def place(self) -> Tensor:
        """(B, W) int64 on the CPU, where the token of every slot stands among the packed ones; 0 in unused slots."""
        places = torch.arange(len(self.packed))
        return torch.zeros(self.used.numel(), dtype=torch.long).index_copy(0, self.packed, places).view_as(self.used)

    @cached_property
    def rows(self) -> Tensor:
        """(N,) int64, the flat positions ``row * T + column`` of the packed tokens."""
        row = torch.arange(len(self.columns), device=self.columns.device)[:, None]
        return (self.columns + row * self.sequence).flatten().index_select(0, upload(self.packed, row.device))


@dataclass(frozen=True)
class Queries:
    """Who asks in a layer, and what they may see. All tensors on the model's device.

    Of ``mask``, ``segments`` and ``blocks`` there is the one that the attention backend wants, or the mask where that
    one cannot be had, or none where ``causal`` says it all.

    Attributes:
        index: (M,) int64, the packed tokens that ask, ascending; None: all live tokens do.
        slots: (M,) int64, the place of each of them in the flat (B * Q) grid of queries; None: none is unused.
        width: Q.
        grid: (B * K,) int64, the packed token of every key slot; None: the packed tokens are the slots.
        causal: without a mask: query i of a row sees the slots 0 to i; False: it sees every slot.
        mask: (B, 1, Q, K) bool, True where a query may attend to a key. Unused places see every key, so that no row of
            the softmax is empty.
        segments: the runs of queries and their keys.
        blocks: a ``BlockMask`` of flex attention over (B, Q, K).
    """

    index: Tensor | None
    slots: Tensor | None
    width: int
    grid: Tensor | None
    causal: bool = True
    mask: Tensor | None = None
    segments: Segments | None = None
    blocks: Any = None


def select_queries(
    live: LiveTokens,
    asks: Tensor,
    counts: list[int],
    device: torch.device,
    visible: Tensor | None = None,
    form: Form = "mask",
    documents: list[int] | None = None,
) -> Queries:
    """The queries of the tokens that ask, and what each may see.

    Args:
        live: the live tokens.
        asks: (B, W) bool, which slots issue a query; padding and unused slots do not.
        counts: per row, how many.
        device: where the tensors are wanted.
        visible: (B, T, K) bool, what each column may see, if that is not "all earlier real tokens of its document and
            itself": a step onto a filled cache. For a whole sequence only.
        form: what the attention backend wants. There are no segments onto a filled cache, nor for some of the tokens
            that a ranked drop left: which ones they are is known to the device alone.
        documents: how many live tokens the documents of all rows have; None: each row is one.
    """
    grid = None if live.is_full else upload(live.place.flatten(), device)
    everybody = counts == live.lengths
    if everybody:
        width, flat, index = live.used.shape[1], live.packed, None
        places, used = torch.arange(width, device=live.columns.device).expand_as(live.columns), live.used
    else:
        places, used = pick(asks, counts), used_slots(counts)
        width, flat = used.shape[1], used.flatten().nonzero()[:, 0]
        index = _packed_places(live, places, flat, device)
    is_full = len(flat) == used.numel()
    slots = None if is_full else upload(flat, device)
    if visible is not None:
        visible = upload(visible, places.device).gather(1, places[..., None].expand(-1, -1, visible.shape[-1]))
    sight = Sight(places, upload(used, places.device), live.real, live.documents, visible)

    if form == "blocks":
        return Queries(index, slots, width, grid, blocks=sight.blocks(device))
    segments = None
    if form == "segments" and visible is None:
        if everybody:
            lengths = [length for length in documents or live.lengths if length]
            segments = Segments.of_documents(lengths, None if is_full else flat) if lengths else None
        elif places.device.type == "cpu":
            segments = sight.segments()
    if segments is not None:
        return Queries(index, slots, width, grid, segments=segments.to(device))
    if everybody and live.documents is None and visible is None:
        return Queries(index, slots, width, grid)
    mask = sight.mask()
    if is_full and width == 1 and mask.device.type == "cpu" and mask.all():
        return Queries(index, slots, width, grid, causal=False)
    return Queries(index, slots, width, grid, mask=upload(mask, device))


def packed_index(live: LiveTokens, mask: Tensor, counts: list[int], device: torch.device) -> Tensor:
    """(M,) int64 on ``device``: the packed places of the slots where ``mask`` (B, W) bool is True, ``counts`` a row."""
    return _packed_places(live, pick(mask, counts), used_slots(counts).flatten().nonzero()[:, 0], device)


def _packed_places(live: LiveTokens, slots: Tensor, flat: Tensor, device: torch.device) -> Tensor:
    """(M,) int64 on ``device``: the packed places of ``slots`` (B, Q) where ``flat`` (M,) says that they are used."""
    places = upload(live.place, slots.device).gather(1, slots).flatten()
    return upload(places.index_select(0, upload(flat, slots.device)), device)


@dataclass(frozen=True)
class LayerWork:
    """What one layer does with the live tokens; shared by all layers of a stretch with the same rule.

    Attributes:
        rows: (N,) int64, the flat positions of the live tokens in the batch; None: all of them, as they stand.
        queries: who asks; None: everybody, as the stock layer computes it.
        silent: (M,) int64, the packed tokens that get the ``norm`` bypass; None: nothing is added.
        ffn: (M,) int64, the packed tokens that run the FFN; None: all of them.
        rotary: cos and sin, (N, D) each, of the packed tokens; None where ``queries`` is.
    """

    rows: Tensor | None
    queries: Queries | None
    silent: Tensor | None
    ffn: Tensor | None
    rotary: tuple[Tensor, Tensor] | None = None


def layer_work(
    live: LiveTokens,
    census: Census,
    rule: LayerRule,
    device: torch.device,
    visible: Tensor | None = None,
    form: Form = "mask",
    read: Tensor | None = None,
) -> LayerWork | None:
    """The index tensors of one rule; None where the stock layer does just that.

    Args:
        live: the live tokens.
        census: how many there are.
        rule: what is left out.
        device: where the tensors are wanted.
        visible: as in :func:`select_queries`.
        form: as in :func:`select_queries`.
        read: (B, T) bool on the CPU, of the last layer: nobody reads the other tokens' results. Only for live tokens
            that are known on the CPU.
    """
    if read is not None:
        wanted = live.real & read.gather(1, live.columns)
        return _last_work(live, rule, device, visible, form, wanted, census.live_documents())
    tokens = census.live()
    silent, idle = census.live(rule.no_attention), census.live(rule.no_ffn)
    in_runs = form == "segments" and live.documents is not None  # cheaper than stock attention with a (T, T) mask
    if not live.compact and not in_runs and not any(silent) and not any(idle):
        return None
    queries = bypassed = ffn = None
    if any(silent) or live.compact or in_runs:
        asking = [total - off for total, off in zip(tokens, silent, strict=True)]
        asks = live.real & ~is_kind(live.kinds, rule.no_attention)
        queries = select_queries(live, asks, asking, device, visible, form, census.live_documents())
    if any(silent) and rule.bypass == "norm":
        bypassed = packed_index(live, live.real & is_kind(live.kinds, rule.no_attention), silent, device)
    if any(idle):
        active = [total - off for total, off in zip(tokens, idle, strict=True)]
        ffn = packed_index(live, live.real & ~is_kind(live.kinds, rule.no_ffn), active, device)
    rows = upload(live.rows, device) if live.compact else None
    return LayerWork(rows, queries, bypassed, ffn)


def _last_work(
    live: LiveTokens,
    rule: LayerRule,
    device: torch.device,
    visible: Tensor | None,
    form: Form,
    read: Tensor,
    documents: list[int],
) -> LayerWork:
    """The work of a layer of which only the slots ``read`` (B, W) bool on the CPU are read."""

    def index(mask: Tensor) -> Tensor:
        return packed_index(live, mask, mask.sum(-1).tolist(), device)

    silent = is_kind(live.kinds, rule.no_attention)
    asks = read & ~silent
    queries = select_queries(live, asks, asks.sum(-1).tolist(), device, visible, form, documents)
    bypassed = index(read & silent) if rule.bypass == "norm" and rule.no_attention else None
    ffn = index(read & ~is_kind(live.kinds, rule.no_ffn))
    return LayerWork(upload(live.rows, device) if live.compact else None, queries, bypassed, ffn)
