"""Examples to the batch that the model takes (``docs/design.md``, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skipvision_train.errors import DataError
from skipvision_train.plans.rules import TokenKind

if TYPE_CHECKING:
    from skipvision_train.data.processor import Example

IGNORED_LABEL = -100
NO_DOCUMENT = -1
"""What stands in ``document_ids`` on padding."""


def collate(examples: Sequence[Example | None], padding_side: str, pad_id: int) -> dict[str, Tensor]:
    """Pad examples to the longest of them.

    Args:
        examples: None stands for a sample that was left out (``RecordDataset`` with ``skip``) and makes no row.
        padding_side: ``right`` for training, ``left`` for generation.
        pad_id: what ``input_ids`` is filled with. It may be the id of a real token: the mask comes from lengths.

    Returns:
        ``input_ids``, ``attention_mask`` and ``token_kinds``, (B, T) int64; ``labels``, (B, T) int64, unless the
        examples are prompts; where there are images ``pixel_values``, (N, 3, S, S) float32, their tiles row by row, and
        ``image_tiles``, (I,) int64, if an image has several.

    Raises:
        DataError: no example is left, prompts and training samples are mixed, or a side is unknown.
    """
    rows = [example for example in examples if example is not None]
    if not rows:
        raise DataError(f"collate: none of the batch's {len(examples)} samples can be used")
    if padding_side not in ("left", "right"):
        raise DataError(f"padding_side: {padding_side!r}; use left or right")
    supervised = [bool(example.labels) for example in rows]
    if any(supervised) and not all(supervised):
        raise DataError(f"collate: {sum(supervised)} of {len(rows)} examples have labels; mix no prompts and samples")
    lengths = [len(example.input_ids) for example in rows]
    width, left = max(lengths), padding_side == "left"
    batch = {
        "input_ids": _padded([example.input_ids for example in rows], width, pad_id, left),
        "attention_mask": _padded([[1] * length for length in lengths], width, 0, left),
        "token_kinds": _padded([example.token_kinds for example in rows], width, int(TokenKind.PAD), left),
    }
    if all(supervised):
        batch["labels"] = _padded([example.labels for example in rows], width, IGNORED_LABEL, left)
    pixels = [example.pixel_values for example in rows if example.pixel_values is not None]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    tiles = [count for example in rows for count in example.image_tiles]
    if any(count > 1 for count in tiles):
        batch["image_tiles"] = torch.tensor(tiles)
    return batch


def collate_packed(rows: Sequence[Sequence[Example]], pad_id: int) -> dict[str, Tensor]:
    """Rows that hold several samples each, one behind the other, padded on the right.

    Args:
        rows: the samples of every row, at least one each, with labels.
        pad_id: what ``input_ids`` is filled with.

    Returns:
        as :func:`collate`, and ``document_ids``, (B, T) int64: 0 for the first sample of a row, 1 for the second and so
        on, -1 on padding. The first label of every sample is -100: what predicts it belongs to another sample.

    Raises:
        DataError: a sample has no labels.
    """
    if not all(sample.labels for samples in rows for sample in samples):
        raise DataError("collate: only samples with labels are packed, there is a prompt among them")
    batch = collate([_joined(samples) for samples in rows], "right", pad_id)
    documents = [[i for i, sample in enumerate(samples) for _ in sample.input_ids] for samples in rows]
    batch["document_ids"] = _padded(documents, batch["input_ids"].shape[1], NO_DOCUMENT, left=False)
    return batch


def _joined(samples: Sequence[Example]) -> Example:
    """One example of several: their tokens and their images in order."""
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    return replace(
        samples[0],
        input_ids=[token for sample in samples for token in sample.input_ids],
        labels=[label for sample in samples for label in (IGNORED_LABEL, *sample.labels[1:])],
        token_kinds=[kind for sample in samples for kind in sample.token_kinds],
        pixel_values=torch.cat(pixels) if pixels else None,
        image_tiles=tuple(count for sample in samples for count in sample.image_tiles),
    )


def keep_queries(example: Example, image_token_id: int, queries: int, keep: int) -> Example:
    """Leave each tile the first ``keep`` of its ``queries`` placeholders (MQT's elastic number of queries).

    Args:
        example: its images have nothing but ``queries`` placeholders per tile.
        image_token_id: the placeholder.
        queries: placeholders of a tile.
        keep: 1 to ``queries``.
    """
    seen, stays = 0, []
    for token in example.input_ids:
        is_visual = token == image_token_id
        stays.append(not is_visual or seen % queries < keep)
        seen += is_visual

    def left(values: list[int]) -> list[int]:
        return [value for value, stay in zip(values, stays, strict=True) if stay] if values else values

    return replace(
        example,
        input_ids=left(example.input_ids),
        labels=left(example.labels),
        token_kinds=left(example.token_kinds),
    )


def _padded(rows: Sequence[list[int]], width: int, fill: int, left: bool) -> Tensor:
    """(len(rows), width) int64."""
    padding = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)])
