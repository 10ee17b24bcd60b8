"""The batch of docs/design.md, padded on either side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipvision_train.data.collate import collate, collate_packed
from skipvision_train.data.processor import Example
from skipvision_train.errors import DataError
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.rules import TokenKind

PAD = int(TokenKind.PAD)


def example(*ids, images=0, labels=True, fill=0.0):
    pixels = torch.full((images, 3, 2, 2), fill) if images else None
    marks = [-100, *ids[1:]] if labels else []
    return Example(list(ids), marks, [0] * len(ids), pixels)


def test_right_padding():
    batch = collate([example(5, 0, 7), example(0)], "right", pad_id=0)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 0, 7], [0, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],  # a real token that equals the padding is real
        "token_kinds": [[0, 0, 0], [0, PAD, PAD]],
        "labels": [[-100, 0, 7], [-100, -100, -100]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_left_padding():
    batch = collate([example(0), example(5, 6, 0)], "left", pad_id=9)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[9, 9, 0], [5, 6, 0]],
        "attention_mask": [[0, 0, 1], [1, 1, 1]],
        "token_kinds": [[PAD, PAD, 0], [0, 0, 0]],
        "labels": [[-100, -100, -100], [-100, 6, 0]],
    }


def test_prompts_have_no_labels():
    batch = collate([example(5, labels=False), example(5, 6, labels=False)], "left", pad_id=0)
    assert set(batch) == {"input_ids", "attention_mask", "token_kinds"}
    with pytest.raises(DataError, match="1 of 2 examples have labels"):
        collate([example(5, labels=False), example(5)], "left", pad_id=0)


def test_pixels_are_joined_in_order_of_rows():
    rows = [example(1, images=2, fill=1.0), example(2), example(3, images=1, fill=3.0)]
    pixels = collate(rows, "right", pad_id=0)["pixel_values"]
    assert pixels[:, 0, 0, 0].tolist() == [1.0, 1.0, 3.0]
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 3, 2, 2)


def test_left_out_samples():
    batch = collate([None, example(1, 2), None], "right", pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2]]
    with pytest.raises(DataError, match="none of the batch's 2 samples can be used"):
        collate([None, None], "right", pad_id=0)


def test_unknown_side():
    with pytest.raises(DataError, match="padding_side: 'both'; use left or right"):
        collate([example(1)], "both", pad_id=0)


def test_packed_rows():
    batch = collate_packed([[example(5, 6, 7), example(8, 9)], [example(1, 2)]], pad_id=0)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "token_kinds": [[0, 0, 0, 0, 0], [0, 0, PAD, PAD, PAD]],
        "labels": [[-100, 6, 7, -100, 9], [-100, 2, -100, -100, -100]],
        "document_ids": [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_the_first_label_of_a_packed_sample_is_not_supervised():
    first = Example([5, 6], [5, 6], [0, 0], None)
    assert collate_packed([[first, first]], pad_id=0)["labels"].tolist() == [[-100, 6, -100, 6]]


def test_images_of_packed_rows_are_joined_in_order():
    def tiled(fill, *tiles):
        return replace(example(1, images=sum(tiles), fill=fill), image_tiles=tiles)

    batch = collate_packed([[tiled(1.0, 2), example(2), tiled(3.0, 1, 2)], [tiled(4.0, 1)]], pad_id=0)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0] * 2 + [3.0] * 3 + [4.0]
    assert batch["image_tiles"].tolist() == [2, 1, 2, 1]


def test_prompts_are_not_packed():
    with pytest.raises(DataError, match="only samples with labels are packed"):
        collate_packed([[example(1, 2), example(3, labels=False)]], pad_id=0)


@st.composite
def packed_rows(draw):
    lengths = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3))
    return [[example(*range(10, 10 + length)) for length in row] for row in lengths]


@given(packed_rows())
def test_documents_are_contiguous_and_positions_restart(rows):
    batch = collate_packed(rows, pad_id=0)
    layout = TokenLayout.from_kinds(batch["token_kinds"], batch["document_ids"])
    width = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    for i, row in enumerate(rows):
        lengths = [len(sample.input_ids) for sample in row]
        padding = width - sum(lengths)
        expected = [document for document, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
        assert batch["document_ids"][i].tolist() == expected
        assert layout.position_ids[i].tolist() == [p for length in lengths for p in range(length)] + [0] * padding
