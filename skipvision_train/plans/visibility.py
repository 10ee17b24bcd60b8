"""What queries may see, in the forms that attention kernels take: a mask, runs of queries, or blocks.

Shapes: B rows, Q queries and K key slots of a row at most, M queries of the batch, S runs of consecutive queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvision_train.plans.transfer import upload

Form = Literal["mask", "segments", "blocks"]
"""``mask``: a tensor of bools. ``segments``: :class:`Segments`. ``blocks``: a ``BlockMask`` of flex attention."""

MAX_KEY_COPIES = 8
"""Runs of queries that share a beginning each get their own copy of its keys. With more copies than this on average
(frames of a video with text between them) the memory of the copies outweighs what the faster kernel saves."""


@dataclass(frozen=True)
class Segments:
    """Runs of consecutive queries, each with the keys of its document up to the run's end.

    In every run, query i of q sees all but the last q - 1 - i of the k keys: causal, aligned at the bottom right.

    Attributes:
        cu_seqlens_q: (S + 1,) int32, where the runs begin and end among the M packed queries.
        cu_seqlens_k: (S + 1,) int32, the same for their keys. The same tensor, if every run is a whole document: then
            torch may choose a kernel (cuDNN) that aligns at the top left.
        max_q: the longest run.
        max_k: the most keys of a run.
        key_index: int64, the place of every key in the flat (B * K) slots; one that several runs see comes several
            times. None: the slots as they stand.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int
    key_index: Tensor | None

    @classmethod
    def of_documents(cls, lengths: list[int], slots: Tensor | None) -> Segments:
        """Every document asks as a whole.

        Args:
            lengths: of the documents of all rows, each at least 1.
            slots: int64, the flat places of their tokens; None: there are no others.
        """
        ends = _ends(torch.tensor(lengths))
        return cls(ends, ends, max(lengths), max(lengths), slots)

    def to(self, device: torch.device) -> Segments:
        """A copy with its tensors on ``device``."""
        queries = upload(self.cu_seqlens_q, device)
        keys = queries if self.cu_seqlens_k is self.cu_seqlens_q else upload(self.cu_seqlens_k, device)
        index = None if self.key_index is None else upload(self.key_index, device)
        return Segments(queries, keys, self.max_q, self.max_k, index)


def _ends(lengths: Tensor) -> Tensor:
    """(S + 1,) int32: 0 and the running sums of ``lengths`` (S,)."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()


@dataclass(frozen=True)
class Sight:
    """Who may see what: a query the real keys of its document up to its own, or what ``visible`` says.

    Attributes:
        places: (B, Q) int64, ascending: the key slot of every query, which is a real one. Any in unused places.
        used: (B, Q) bool, which places hold a query. The others see every key: no row of a softmax may be empty.
        real: (B, K) bool, which key slots hold a token that is no padding.
        documents: (B, K) int64, each document one run of slots; None: one per row.
        visible: (B, Q, K) bool, instead of all that; or None.
    """

    places: Tensor
    used: Tensor
    real: Tensor
    documents: Tensor | None = None
    visible: Tensor | None = None

    def mask(self) -> Tensor:
        """(B, 1, Q, K) bool: True where a query may attend to a key. No (K, K) mask exists on the way."""
        if self.visible is not None:
            mask = self.visible
        else:
            mask = torch.arange(self.real.shape[1], device=self.real.device) <= self.places[..., None]
            mask = mask & self.real[:, None, :]
            if self.documents is not None:
                mask &= self.documents.gather(1, self.places)[:, :, None] == self.documents[:, None, :]
        return (mask | ~self.used[..., None])[:, None]

    def blocks(self, device: torch.device) -> Any:
        """The ``BlockMask`` of the same on ``device``, for all heads."""
        from torch.nn.attention.flex_attention import create_block_mask

        places, used, real = (upload(part, device) for part in (self.places, self.used, self.real))
        documents = torch.zeros_like(real) if self.documents is None else upload(self.documents, device)
        keys = real.shape[1] if self.visible is None else self.visible.shape[-1]
        visible = torch.zeros(0, 0, 0) if self.visible is None else upload(self.visible, device)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = documents[row, places[row, query]] == documents[row, key]
            return ((key <= places[row, query]) & real[row, key] & same) | ~used[row, query]

        def sees_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible[row, query, key] | ~used[row, query]

        # Compiled it never holds a (B, Q, K) tensor.
        create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
        return create(sees if self.visible is None else sees_visible, len(used), None, used.shape[1], keys, device)

    def segments(self) -> Segments | None:
        """The same as runs of queries; for tensors on the CPU and without ``visible``.

        Returns:
            None, if nobody asks or the keys would have to be copied too often.
        """
        width = self.real.shape[1]
        slots = (self.places + torch.arange(len(self.places))[:, None] * width)[self.used]
        if not len(slots):
            return None
        real = self.real.flatten()
        key_slots = real.nonzero()[:, 0]
        asking = (real.cumsum(0) - 1)[slots]  # numbers count the real keys of the batch from here on
        begin = self._document_begins(key_slots)

        new_run = torch.ones_like(slots, dtype=torch.bool)
        new_run[1:] = (asking[1:] != asking[:-1] + 1) | (begin[asking[1:]] != begin[asking[:-1]])
        first = new_run.nonzero()[:, 0]
        last = torch.cat([first[1:] - 1, torch.tensor([len(slots) - 1])])
        asked, lengths = last - first + 1, asking[last] - begin[asking[last]] + 1
        total = int(lengths.sum())
        if total > MAX_KEY_COPIES * len(key_slots):
            return None
        ends_k = _ends(lengths)
        shift = begin[asking[last]] - ends_k[:-1]
        index = key_slots[torch.arange(total) + shift.repeat_interleave(lengths)]
        whole = torch.equal(index, torch.arange(real.numel()))
        return Segments(_ends(asked), ends_k, int(asked.max()), int(lengths.max()), None if whole else index)

    def _document_begins(self, key_slots: Tensor) -> Tensor:
        """Of every real key (flat slots, ascending): the number of the first one of its document."""
        owners = [key_slots // self.real.shape[1]]
        if self.documents is not None:
            owners.append(self.documents.flatten()[key_slots])
        new = torch.zeros_like(key_slots, dtype=torch.bool)
        for owner in owners:
            new[1:] |= owner[1:] != owner[:-1]
        return torch.where(new, torch.arange(len(key_slots)), 0).cummax(0).values
