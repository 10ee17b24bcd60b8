"""Reading a layout from token ids, masks, labels and positions; no model."""

import pytest
import torch

from skipvision_train.adapters.prompts import PromptReader, answer_starts, has_images, positions_of
from skipvision_train.errors import PlanError
from skipvision_train.plans import TokenKind

T, S, Y, PAD = TokenKind.TEXT, TokenKind.SKIPPED, TokenKind.SUMMARY, TokenKind.PAD
IMAGE, VIDEO, REGISTER = 7, 8, 9
READER = PromptReader((IMAGE, VIDEO), REGISTER)
IDS = torch.tensor([[0, 0, 1, 7, 7, 2], [1, 8, 8, 9, 7, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def test_kinds_and_positions():
    layout = READER.layout({"input_ids": IDS, "attention_mask": MASK})
    assert layout.kinds.tolist() == [[PAD, PAD, T, S, S, T], [T, S, S, Y, S, T]]
    assert layout.position_ids.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert layout.document_ids is None
    assert layout.asking is None


def test_without_a_mask_nothing_is_padding_and_without_a_register_id_registers_are_text():
    kinds = PromptReader((IMAGE,)).layout({"input_ids": IDS}).kinds
    assert kinds.tolist() == [[T, T, T, S, S, T], [T, T, T, T, S, T]]


def test_an_image_token_on_padding_is_padding():
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert READER.layout({"input_ids": IDS, "attention_mask": mask}).kinds[0].tolist() == [T, T, T, S, PAD, PAD]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([-100, -100, 5, 6, -100, 7], [1, 4]),
        ([5, 6, -100, -100, 7, 7], [3]),
        ([-100, -100, -100, -100, -100, 0], [4]),
        ([-100] * 6, []),
        ([5] * 6, []),
    ],
)
def test_answer_starts(labels, expected):
    rows = torch.tensor([labels, [-100, 1, 1, 1, 1, 1]])
    starts = answer_starts(rows)
    assert starts.dtype == torch.bool
    assert starts[0].nonzero()[:, 0].tolist() == expected
    assert starts[1].tolist() == [True, False, False, False, False, False]
    layout = READER.layout({"input_ids": IDS, "labels": rows})
    assert torch.equal(layout.asking, starts)


def test_a_single_column_of_labels_has_no_start():
    assert answer_starts(torch.tensor([[3]])).tolist() == [[False]]


def test_positions_of():
    assert positions_of(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_has_images():
    pixels = torch.zeros(1)
    assert not has_images({"pixel_values": None, "mm_encoder_outputs": {}})
    assert not has_images({"mm_encoder_outputs": None})
    assert not has_images({"mm_encoder_outputs": {"image": None}})
    assert has_images({"pixel_values": pixels})
    assert has_images({"pixel_values_videos": pixels})
    assert has_images({"mm_encoder_outputs": {"image": None, "video": pixels}})


@pytest.mark.parametrize("planes", [0, 4])
def test_packed_rows_are_documents(planes):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1]])
    given = positions if planes == 0 else torch.stack([positions, *torch.zeros(3, 2, 6, dtype=torch.long)])
    layout = READER.layout({"input_ids": IDS, "position_ids": given})
    assert layout.document_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]]
    for key, value in (("attention_mask", MASK), ("past_key_values", object())):
        assert READER.layout({"input_ids": IDS, "position_ids": given, key: value}).document_ids is None


@pytest.mark.parametrize("positions", [torch.arange(6)[None], torch.zeros(3, 2, 6, dtype=torch.long)])
def test_positions_that_restart_nowhere_or_have_no_text_plane_are_one_document(positions):
    assert READER.layout({"input_ids": IDS, "position_ids": positions}).document_ids is None


def test_packed_positions_of_one_row_hold_for_all():
    layout = READER.layout({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])})
    assert layout.document_ids.tolist() == [[0, 0, 0, 1, 1, 1]] * 2


# --- onto a filled cache -------------------------------------------------------------------------------------------


def test_a_continuation_is_text_unless_images_come_with_it():
    explicit = PromptReader((IMAGE,), explicit=True)
    token, several = torch.tensor([[IMAGE]]), torch.tensor([[IMAGE, IMAGE, 3]])
    assert READER.layout({"input_ids": token}, filled=True) is None
    assert READER.layout({"input_ids": several}, filled=True) is None
    assert READER.layout({"inputs_embeds": torch.zeros(1, 2, 4)}, filled=True) is None
    assert explicit.layout({"input_ids": token}, filled=True) is None
    assert explicit.layout({"input_ids": torch.tensor([[1, 2]])}, filled=True) is None
    assert explicit.layout({"input_ids": several}, filled=True).kinds.tolist() == [[S, S, T]]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    images = {"input_ids": several, "pixel_values": torch.zeros(1), "attention_mask": mask}
    assert READER.layout(images, filled=True).kinds.tolist() == [[S, S, T]]


# --- errors --------------------------------------------------------------------------------------------------------


def test_errors():
    pixels, text = torch.zeros(1), torch.tensor([[1, 2, 3]])
    with pytest.raises(PlanError, match="inputs_embeds: embeddings do not say which tokens are images; pass input_ids"):
        READER.layout({"inputs_embeds": torch.zeros(1, 3, 4)})
    with pytest.raises(PlanError, match=r"images are given, but input_ids nowhere hold 7, 8; check image_token_id"):
        READER.layout({"input_ids": text, "pixel_values": pixels})
    with pytest.raises(PlanError, match=r"images are given"):
        PromptReader((IMAGE,), explicit=True, text_only=True).layout({"input_ids": text, "pixel_values": pixels})
    with pytest.raises(PlanError, match=r"nowhere hold 7; check image_token_id, or pass text_only=True"):
        PromptReader((IMAGE,), explicit=True).layout({"input_ids": text})
    assert PromptReader((IMAGE,), explicit=True, text_only=True).layout({"input_ids": text}).kinds.tolist() == [[T] * 3]
    assert READER.layout({"input_ids": text}).kinds.tolist() == [[T] * 3]


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(2, 1, 6, 6), r"\(2, 1, 6, 6\)"),
        (torch.ones(2, 7), r"\(2, 7\)"),
        ({"full_attention": None}, "dict"),
    ],
)
def test_masks_of_another_form_are_refused(mask, found):
    with pytest.raises(PlanError, match=rf"attention_mask: found {found}, .* the shape of input_ids, \(2, 6\)"):
        READER.layout({"input_ids": IDS, "attention_mask": mask})
