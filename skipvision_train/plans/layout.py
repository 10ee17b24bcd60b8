"""The token layout: what every position of a batch is. Plain tensors, built once per batch, no model needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvision_train.plans.rules import Kinds, TokenKind
from skipvision_train.plans.transfer import upload

IGNORE_INDEX = -100
"""What stands in labels where nothing is supervised."""


@dataclass(frozen=True)
class TokenLayout:
    """What every position of a batch is.

    Attributes:
        kinds: (batch, length) int64, :class:`TokenKind` values; ``PAD`` may stand left, right or both.
        position_ids: (batch, length) int64, the rotary position; 0 on padding. Restarts with every document.
        document_ids: (batch, length) int64 or None. Tokens attend only within their document (packing); None means
            one document per row.
        asking: (batch, length) bool or None: the positions whose attention ranks visual tokens in a plan that drops
            some. In training those just before an answer (a document without one drops no ranked token); None means
            the last token of every document, which is right for a prompt.
        read: (batch, length) bool or None: the positions whose last hidden state somebody reads. The last layer then
            computes queries and FFN for no other, and leaves the others' states unfinished. None means all.
    """

    kinds: Tensor
    position_ids: Tensor
    document_ids: Tensor | None = None
    asking: Tensor | None = None
    read: Tensor | None = None

    @classmethod
    def from_kinds(cls, kinds: Tensor, document_ids: Tensor | None = None, asking: Tensor | None = None) -> TokenLayout:
        """Derive positions: 0, 1, 2, ... over the non-padding tokens of each document of each row.

        Args:
            kinds: (batch, length) integers.
            document_ids: (batch, length) integers, each document one contiguous run, or None.
            asking: (batch, length) bool, as the attribute.
        """
        kinds = kinds.long()
        real = kinds != TokenKind.PAD
        positions = real.long().cumsum(-1) - 1
        if document_ids is not None:
            starts = torch.ones_like(real)
            starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
            first = torch.where(starts, positions + (~real).long(), torch.zeros_like(positions))
            positions = positions - first.cummax(-1).values
        return cls(kinds, positions.clamp_min(0) * real, document_ids, asking)

    def with_labels(self, labels: Tensor) -> TokenLayout:
        """The layout of a training batch: what labels say is read of it, and where answers begin.

        Args:
            labels: (batch, length) int64, -100 where nothing is supervised. Label t is predicted at t - 1, the first
                one of a document by nothing: what stands before belongs to another.
        """
        if self.document_ids is not None:
            begins = F.pad(self.document_ids[:, 1:] != self.document_ids[:, :-1], (1, 0), value=True)
            labels = labels.masked_fill(begins, IGNORE_INDEX)
        return replace(self, read=predicting(labels), asking=answer_starts(labels))

    @property
    def attention_mask(self) -> Tensor:
        """(batch, length) int64: 1 on real tokens, 0 on padding."""
        return (self.kinds != TokenKind.PAD).long()

    def is_kind(self, kinds: Kinds) -> Tensor:
        """(batch, length) bool: True where the position is one of ``kinds``."""
        return is_kind(self.kinds, kinds)

    def last_tokens(self) -> Tensor:
        """(batch, length) bool: True on the last real token of every document."""
        real = self.kinds != TokenKind.PAD
        length = self.kinds.shape[-1]
        column = torch.arange(length, device=real.device).expand_as(real)
        at_or_after = torch.where(real, column, length).flip(-1).cummin(-1).values.flip(-1)
        following = F.pad(at_or_after[:, 1:], (0, 1), value=length)  # the next real token's column
        is_last = following == length
        if self.document_ids is not None:
            is_last |= self.document_ids.gather(1, following.clamp_max(length - 1)) != self.document_ids
        return real & is_last

    def staying(self) -> Tensor:
        """(batch, length) bool: every document's last token and those that ask. No drop removes them, whatever their
        kind: the next token is predicted from them. An answer directly behind an image is asked for by a visual token.
        """
        last = self.last_tokens()
        return last if self.asking is None else last | (self.asking & (self.kinds != TokenKind.PAD))

    def visible(self) -> Tensor:
        """(batch, length, length) bool: query i may attend to key j (causal, same document, key no padding).

        Every token sees itself, padding too: a row without a single key would give NaN.
        """
        length = self.kinds.shape[-1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.kinds.device).tril()
        mask = causal & (self.kinds != TokenKind.PAD)[:, None, :]
        if self.document_ids is not None:
            mask &= self.document_ids[:, :, None] == self.document_ids[:, None, :]
        return mask | torch.eye(length, dtype=torch.bool, device=mask.device)

    def columns(self, start: int, stop: int) -> TokenLayout:
        """The layout of the columns ``start`` to ``stop``; positions and documents stay as they are."""
        return self._each(lambda part: part[:, start:stop])

    def to(self, device: torch.device | str) -> TokenLayout:
        """A copy on another device."""
        return self._each(lambda part: upload(part, torch.device(device)))

    def repeat(self, rows: int) -> TokenLayout:
        """A layout of one row, ``rows`` times."""
        return self._each(lambda part: part.expand(rows, -1))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenLayout:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if part is None else change(part) for name, part in parts.items()}
        return TokenLayout(**changed)


def predicting(labels: Tensor) -> Tensor:
    """(batch, length) bool: the positions whose hidden state predicts a supervised token, the next one."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1), value=False)


def answer_starts(labels: Tensor) -> Tensor:
    """(batch, length) bool: the positions just before an answer, whose hidden state predicts the answer's first token.

    Args:
        labels: (batch, length) int64, -100 where nothing is supervised. An answer is a run of supervised positions; one
            that begins at column 0 has no position before it.
    """
    supervised = labels != IGNORE_INDEX
    starts = torch.zeros_like(supervised)
    starts[:, :-1] = supervised[:, 1:] & ~supervised[:, :-1]
    return starts


def is_kind(kinds: Tensor, wanted: Kinds) -> Tensor:
    """Bool of the shape of ``kinds``: True where it is one of ``wanted``."""
    found = torch.zeros_like(kinds, dtype=torch.bool)
    for kind in wanted:
        found |= kinds == int(kind)
    return found
