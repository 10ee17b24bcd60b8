"""What the positions of somebody else's prompt are: read from its token ids, its padding mask and its labels.

Shapes: B rows, T positions. Everything is computed on the CPU, where a plan counts its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipvision_train.errors import PlanError
from skipvision_train.plans import TokenKind, TokenLayout
from skipvision_train.plans.layout import answer_starts

PIXELS = ("pixel_values", "pixel_values_videos")
ENCODED = "mm_encoder_outputs"
"""transformers' ``generate`` may encode images before the prefill; it passes ``{"image": ..., "video": ...}`` on."""


@dataclass(frozen=True)
class PromptReader:
    """How a model's prompts are read.

    Attributes:
        image_ids: the token ids that stand for visual tokens, one per visual token, of images and of videos.
        register_id: the token id of learned registers, or None.
        explicit: whether the caller named ``image_ids``: then tokens alone say where images are, else pixels do, too.
        text_only: whether batches without any visual token are meant although ``explicit``.
    """

    image_ids: tuple[int, ...]
    register_id: int | None = None
    explicit: bool = False
    text_only: bool = False

    def layout(self, call: Mapping[str, Any], filled: bool = False) -> TokenLayout | None:
        """The layout of one forward; None where a filled KV cache is continued with text.

        A single new token is always text, also when it happens to be the image token.

        Args:
            call: the forward's arguments by name: ``input_ids`` (B, T) int64; if there, ``attention_mask`` (B, T) with
                0 on padding (onto a filled cache: the last T columns are the new tokens'), ``labels`` (B, T) int64,
                ``position_ids`` (B, T) or (4, B, T), and the images.
            filled: whether the forward continues a KV cache that holds tokens.

        Raises:
            PlanError: the arguments do not say which position is what, or contradict each other.
        """
        input_ids, images = call.get("input_ids"), has_images(call)
        if filled and not images and not self._names_images(input_ids):
            return None
        if input_ids is None:
            raise PlanError(
                "inputs_embeds: embeddings do not say which tokens are images; pass input_ids, or use "
                "skipvision_train.attach and give the language model a token_layout"
            )
        input_ids = input_ids.cpu()
        kinds = self.kinds(input_ids, _padding_mask(call.get("attention_mask"), input_ids.shape, filled))
        if not (kinds == TokenKind.SKIPPED).any():
            self._refuse_missing(images)
        labels = call.get("labels")
        return TokenLayout.from_kinds(
            kinds,
            document_ids=_documents(call),
            asking=None if labels is None else answer_starts(labels.cpu()),
        )

    def kinds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) int64 :class:`TokenKind`: all visual tokens are ``SKIPPED``, registers ``SUMMARY``.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 0 on padding; None means no padding.
        """
        kinds = torch.full_like(input_ids, int(TokenKind.TEXT))
        kinds[self._visual(input_ids)] = int(TokenKind.SKIPPED)
        if self.register_id is not None:
            kinds[input_ids == self.register_id] = int(TokenKind.SUMMARY)
        if attention_mask is not None:
            kinds[attention_mask == 0] = int(TokenKind.PAD)
        return kinds

    def _visual(self, input_ids: Tensor) -> Tensor:
        return torch.isin(input_ids, torch.tensor(self.image_ids, device=input_ids.device))

    def _names_images(self, input_ids: Tensor | None) -> bool:
        """Whether tokens that come without pixels hold images nevertheless."""
        if not self.explicit or input_ids is None or input_ids.shape[1] == 1:
            return False
        return bool(self._visual(input_ids).any())

    def _refuse_missing(self, images: bool) -> None:
        """Raise PlanError if a batch without a visual token should have some; ``images``: pixels are given."""
        ids = ", ".join(map(str, self.image_ids))
        if images:
            raise PlanError(f"image_token_id: images are given, but input_ids nowhere hold {ids}; check image_token_id")
        if self.explicit and not self.text_only:
            raise PlanError(
                f"image_token_id: input_ids nowhere hold {ids}; check image_token_id, or pass text_only=True if "
                "batches without images are meant"
            )


def positions_of(attention_mask: Tensor) -> Tensor:
    """(B, T) int64: 0, 1, 2, ... over the real tokens of a (B, T) mask with 0 on padding; 0 on padding at the left."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def has_images(call: Mapping[str, Any]) -> bool:
    """Whether a forward's arguments hold pixels or encoded images or videos."""
    encoded = (call.get(ENCODED) or {}).values()
    return any(value is not None for value in (*map(call.get, PIXELS), *encoded))


def _padding_mask(attention_mask: Any, shape: torch.Size, filled: bool) -> Tensor | None:
    """The (B, T) padding mask of the new tokens on the CPU, or None where there is no padding."""
    if attention_mask is None:
        return None
    batch, length = shape
    found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or (not filled and found != (batch, length)):
        raise PlanError(
            f"attention_mask: found {found}, a plan needs one of the shape of input_ids, {(batch, length)}; no mask of "
            "four dimensions and no static cache"
        )
    return attention_mask[:, -length:].cpu()


def _documents(call: Mapping[str, Any]) -> Tensor | None:
    """(B, T) document ids of packed rows, or None.

    transformers takes rows for packed where no mask and no cache is given and the positions do not count up by one;
    of the four planes of Qwen's positions the first is the text's.
    """
    positions = call.get("position_ids")
    if positions is None or call.get("attention_mask") is not None or call.get("past_key_values") is not None:
        return None
    if positions.ndim == 3:
        if positions.shape[0] != 4:
            return None
        positions = positions[0]
    positions = positions.cpu()
    restarts = torch.zeros_like(positions)
    restarts[:, 1:] = positions.diff(dim=-1) != 1
    documents = restarts.cumsum(-1).expand(call["input_ids"].shape)
    return documents if restarts.any() else None
