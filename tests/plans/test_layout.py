"""Positions and visibility of a layout, against loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_train.plans import TokenKind, TokenLayout


def test_positions_count_real_tokens(kit):
    layout = kit.layout_of("..ttrs.t.", "ttttttttt", ".........")
    assert layout.position_ids.tolist() == [[0, 0, 0, 1, 2, 3, 0, 4, 0], list(range(9)), [0] * 9]
    assert layout.attention_mask.tolist()[0] == [0, 0, 1, 1, 1, 1, 0, 1, 0]


def test_positions_restart_with_every_document(kit):
    layout = kit.layout_of("ttrst.trr.", documents=[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3]])
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2, 0]]


@settings(max_examples=60)
@given(st.data())
def test_positions_and_visibility_equal_loops(data):
    length = data.draw(st.integers(1, 8))
    row = st.lists(st.sampled_from(list(TokenKind)), min_size=length, max_size=length)
    kinds = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
    steps = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    documents = torch.stack([torch.tensor(data.draw(steps)).cumsum(0) for _ in kinds])
    packed = data.draw(st.booleans())
    layout = TokenLayout.from_kinds(kinds, documents if packed else None)
    visible = layout.visible()
    for b in range(len(kinds)):
        next_position: dict[int, int] = {}
        for i in range(length):
            document = int(documents[b, i]) if packed else 0
            real = kinds[b, i] != TokenKind.PAD
            assert layout.position_ids[b, i] == (next_position.get(document, 0) if real else 0)
            next_position[document] = next_position.get(document, 0) + int(real)
            for j in range(length):
                same = not packed or documents[b, i] == documents[b, j]
                assert visible[b, i, j] == (i == j or (j < i and same and bool(kinds[b, j] != TokenKind.PAD)))


def test_kinds_and_columns(kit):
    layout = kit.layout_of("trsy.", documents=[[0, 0, 1, 1, 1]])
    assert layout.is_kind(frozenset({TokenKind.SKIPPED, TokenKind.SUMMARY})).tolist() == [
        [False, False, True, True, False]
    ]
    assert not layout.is_kind(frozenset()).any()
    part = layout.columns(1, 4)
    assert part.kinds.tolist() == [[1, 2, 3]]
    assert part.position_ids.tolist() == [[1, 0, 1]]
    assert part.document_ids.tolist() == [[0, 1, 1]]
    assert layout.to("cpu").kinds.tolist() == layout.kinds.tolist()
