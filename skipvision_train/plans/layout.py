"""The token layout: what every position of a batch is. Plain tensors, built once per batch, no model needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipvision_train.plans.plan import Kinds, TokenKind


@dataclass(frozen=True)
class TokenLayout:
    """What every position of a batch is.

    Attributes:
        kinds: (batch, length) int64, :class:`TokenKind` values; ``PAD`` may stand left, right or both.
        position_ids: (batch, length) int64, the rotary position; 0 on padding. Restarts with every document.
        document_ids: (batch, length) int64 or None. Tokens attend only within their document (packing); None means
            one document per row.
    """

    kinds: Tensor
    position_ids: Tensor
    document_ids: Tensor | None = None

    @classmethod
    def from_kinds(cls, kinds: Tensor, document_ids: Tensor | None = None) -> TokenLayout:
        """Derive positions: 0, 1, 2, ... over the non-padding tokens of each document of each row.

        Args:
            kinds: (batch, length) integers.
            document_ids: (batch, length) integers, each document one contiguous run, or None.
        """
        kinds = kinds.long()
        real = kinds != TokenKind.PAD
        positions = real.long().cumsum(-1) - 1
        if document_ids is not None:
            starts = torch.ones_like(real)
            starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
            first = torch.where(starts, positions + (~real).long(), torch.zeros_like(positions))
            positions = positions - first.cummax(-1).values
        return cls(kinds, positions.clamp_min(0) * real, document_ids)

    @property
    def attention_mask(self) -> Tensor:
        """(batch, length) int64: 1 on real tokens, 0 on padding."""
        return (self.kinds != TokenKind.PAD).long()

    def is_kind(self, kinds: Kinds) -> Tensor:
        """(batch, length) bool: True where the position is one of ``kinds``."""
        found = torch.zeros_like(self.kinds, dtype=torch.bool)
        for kind in kinds:
            found |= self.kinds == int(kind)
        return found

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
        documents = None if self.document_ids is None else self.document_ids[:, start:stop]
        return TokenLayout(self.kinds[:, start:stop], self.position_ids[:, start:stop], documents)

    def to(self, device: torch.device | str) -> TokenLayout:
        """A copy on another device."""
        documents = None if self.document_ids is None else self.document_ids.to(device)
        return TokenLayout(self.kinds.to(device), self.position_ids.to(device), documents)
