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
