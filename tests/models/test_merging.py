"""Merging against brute force over Python floats, and the invariants of a weighted average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_train.models.merging import Merge, apply_merge, decide_merge, merge_rounds, merge_tokens


def brute_force(rows: list[list[float]], keep: int) -> tuple[list[int], list[int], list[list[float]]]:
    """Kept indices by falling mean similarity, the kept index every token goes to, and the averages."""
    count = len(rows)

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    mean = [sum(cosine(rows[i], rows[j]) for j in range(count) if j != i) / (count - 1) for i in range(count)]
    kept = sorted(range(count), key=lambda i: -mean[i])[count - keep :]
    goes = [i if i in kept else max(kept, key=lambda k, i=i: cosine(rows[i], rows[k])) for i in range(count)]
    averages = []
    for k in kept:
        group = [rows[i] for i in range(count) if goes[i] == k]
        averages.append([sum(column) / len(group) for column in zip(*group, strict=True)])
    return kept, goes, averages


@settings(max_examples=60, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 12), share=st.floats(0.01, 0.99), width=st.integers(2, 5))
def test_equals_brute_force_and_conserves_mass(seed, count, share, width):
    keep = max(1, min(count - 1, round(share * count)))
    tokens = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))
    merge = decide_merge(tokens, keep)
    merged = apply_merge(tokens, merge)
    assert merge.kept.dtype == merge.target.dtype == torch.int64
    for row in range(2):
        kept, goes, averages = brute_force(tokens[row].tolist(), keep)
        assert merge.kept[row].tolist() == kept
        assert merge.kept[row][merge.target[row]].tolist() == goes
        torch.testing.assert_close(merged[row], torch.tensor(averages))
    sizes = merge.sizes()
    assert sizes.sum(-1).tolist() == [count, count]
    assert (sizes >= 1).all()
    torch.testing.assert_close((merged * sizes[..., None]).sum(1), tokens.sum(1), rtol=1e-5, atol=1e-5)


def test_worked_example():
    """Three tokens near east, one north, one south: the odd ones stay, the last being the most distinctive."""
    tokens = torch.tensor([[[1.0, 0.0], [2.0, 0.2], [0.0, 3.0], [1.0, -0.1], [-0.5, -2.0]]])
    merge = decide_merge(tokens, 3)
    assert merge.kept.tolist() == [[3, 2, 4]]
    assert merge.target.tolist() == [[0, 0, 1, 0, 2]]
    expected = torch.tensor([[[4 / 3, 0.1 / 3], [0.0, 3.0], [-0.5, -2.0]]])
    torch.testing.assert_close(apply_merge(tokens, merge), expected)


def test_keep_all_is_the_identity_in_raster_order():
    tokens = torch.randn(2, 6, 4)
    assert merge_tokens(tokens, 6) is tokens
    merge = decide_merge(tokens, 6)
    assert merge.kept.tolist() == merge.target.tolist() == [list(range(6))] * 2
    torch.testing.assert_close(apply_merge(tokens, merge), tokens, rtol=0, atol=0)


def test_keep_one_is_the_mean():
    tokens = torch.randn(3, 7, 4)
    torch.testing.assert_close(merge_tokens(tokens, 1), tokens.mean(1, keepdim=True))


def test_similarity_does_not_see_a_tokens_length():
    tokens, scale = torch.randn(2, 9, 4), torch.rand(2, 9, 1) + 0.5
    plain, scaled = decide_merge(tokens, 4), decide_merge(tokens * scale, 4)
    assert plain.kept.equal(scaled.kept)
    assert plain.target.equal(scaled.target)


def test_order_changes_the_slots_and_no_value():
    tokens = torch.randn(2, 12, 4)
    by_similarity, by_raster = decide_merge(tokens, 5), decide_merge(tokens, 5, order="raster")
    assert not by_similarity.kept.equal(by_raster.kept)
    assert by_similarity.kept.sort(-1).values.equal(by_raster.kept)
    slots = by_similarity.kept.argsort(-1)
    reordered = apply_merge(tokens, by_similarity).gather(1, slots[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(reordered, merge_tokens(tokens, 5, order="raster"), rtol=0, atol=0)


def test_ties_go_by_index():
    same = decide_merge(torch.ones(1, 6, 3), 3)
    assert same.kept.tolist() == [[3, 4, 5]]
    assert same.target.tolist() == [[0, 0, 0, 0, 1, 2]]
    # two pairs of opposites: all means are equal, 0 and 1 are equally similar to 2 and 3
    axes = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    for order in ("similarity", "raster"):
        merge = decide_merge(axes, 2, order=order)
        assert merge.kept.tolist() == [[2, 3]]
        assert merge.target.tolist() == [[0, 0, 0, 1]]


def test_a_tie_is_received_by_the_lower_index_whatever_the_slots():
    # 4 is merged and equally similar to 0 and 3; 3 comes first in the order of similarity
    tokens = torch.tensor([[[1.0, 1.0, 0.0], [-1.0, -0.5, 0.5], [0.0, 0.1, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
    tokens[0, 3] = torch.tensor([1.0, -1.0, 0.0])
    values = []
    for order in ("similarity", "raster"):
        merge = decide_merge(tokens, 4, order=order)
        assert merge.target[0].tolist().count(int(merge.target[0, 4])) == 2
        assert merge.kept[0, merge.target[0, 4]] == 0
        values.append(apply_merge(tokens, merge).sort(dim=1).values)
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


def test_an_all_zero_token_makes_no_nan_and_attracts_nothing():
    torch.manual_seed(0)
    tokens = torch.randn(1, 8, 4).abs()
    tokens[0, 3] = 0
    merge = decide_merge(tokens, 3)
    merged = apply_merge(tokens, merge)
    assert merged.isfinite().all()
    slot = merge.kept[0].tolist().index(3)  # similar to nothing, so the most distinctive among positive vectors
    assert merge.sizes()[0, slot] == 1
    assert slot == 2


@pytest.mark.parametrize("padding", [0.0, 1e4, float("nan"), float("inf")])
def test_masked_tokens_influence_nothing(padding):
    torch.manual_seed(0)
    tokens = torch.randn(2, 10, 4)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, [0, 4]] = False
    mask[1, 7:] = False
    padded = tokens.masked_fill(~mask[..., None], padding).requires_grad_()
    merge = decide_merge(padded, 4, mask)
    merged = apply_merge(padded, merge)
    for row in range(2):
        alone = tokens[row : row + 1, mask[row]]
        expected = decide_merge(alone, 4)
        index = mask[row].nonzero().squeeze(-1)
        assert merge.kept[row].tolist() == index[expected.kept[0]].tolist()
        assert merge.target[row, mask[row]].equal(expected.target[0])
        torch.testing.assert_close(merged[row : row + 1], apply_merge(alone, expected))
    assert (merge.target[~mask] == -1).all()
    merged.sum().backward()
    assert (padded.grad[~mask] == 0).all()
    assert (padded.grad[mask] > 0).all()


def test_padding_takes_a_slot_only_where_valid_tokens_run_out():
    tokens = torch.randn(1, 6, 4)
    mask = torch.tensor([[False, True, False, True, False, False]])
    merge = decide_merge(tokens, 4, mask)
    assert set(merge.kept[0].tolist()) > {1, 3}
    merged = apply_merge(tokens, merge)
    valid = [merge.kept[0].tolist().index(i) for i in (1, 3)]
    torch.testing.assert_close(merged[0, valid], tokens[0, [1, 3]], rtol=0, atol=0)
    assert (merged[0, [s for s in range(4) if s not in valid]] == 0).all()
    assert 3 in valid  # the last slot holds a valid token in the order of similarity
    everything = merge_tokens(tokens, 6, mask)
    torch.testing.assert_close(everything, tokens * mask[..., None], rtol=0, atol=0)
    nothing = decide_merge(tokens, 2, torch.zeros(1, 6, dtype=torch.bool))
    assert (apply_merge(tokens, nothing) == 0).all()


def test_the_gradient_is_one_over_the_size_of_the_group():
    tokens = torch.randn(2, 9, 4, requires_grad=True)
    merge = decide_merge(tokens, 3)
    assert not merge.kept.requires_grad
    apply_merge(tokens, merge).sum().backward()
    expected = 1 / merge.sizes().gather(1, merge.target).float()
    torch.testing.assert_close(tokens.grad, expected[..., None].expand(-1, -1, 4))


@pytest.mark.parametrize("autocast", [False, True])
def test_similarities_are_fp32_in_every_dtype(autocast):
    torch.manual_seed(0)
    tokens = (torch.randn(1, 64, 16) * 0.1 + 1).bfloat16()  # all similarities near 1: half precision would tie them
    expected = decide_merge(tokens.float(), 20)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        merge = decide_merge(tokens, 20)
        merged = apply_merge(tokens.float() if autocast else tokens, merge)
    assert merge.kept.equal(expected.kept)
    assert merge.target.equal(expected.target)
    assert merged.dtype == (torch.float32 if autocast else torch.bfloat16)
    exact = apply_merge(tokens.float(), expected)
    torch.testing.assert_close(merged.float(), exact, rtol=0 if autocast else 2**-7, atol=0)


def test_batched_equals_one_by_one():
    tokens = torch.randn(4, 10, 5)
    together = merge_tokens(tokens, 4)
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], merge_tokens(tokens[row : row + 1], 4))


def test_bad_arguments_are_refused():
    tokens = torch.randn(1, 5, 2)
    for keep in (0, 6):
        with pytest.raises(ValueError, match=f"keep: {keep} of 5 tokens"):
            decide_merge(tokens, keep)
    with pytest.raises(ValueError, match="order: 'random' is unknown"):
        decide_merge(tokens, 2, order="random")


def test_sizes_count_what_a_merge_says():
    merge = Merge(torch.tensor([[0, 2]]), torch.tensor([[0, 1, 1, -1]]))
    assert merge.sizes().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("count", "keep", "rounds", "expected"),
    [
        (1024, 256, 1, [256]),
        (1024, 256, 2, [512, 256]),
        (576, 100, 3, [322, 180, 100]),
        (5, 4, 3, [4]),
        (6, 1, 2, [3, 1]),
    ],
)
def test_rounds_divide_by_the_same_factor(count, keep, rounds, expected):
    assert merge_rounds(count, keep, rounds) == expected


@pytest.mark.parametrize("order", ["similarity", "raster"])
@pytest.mark.parametrize("weighted", [True, False])
def test_rounds_equal_one_shot_merges_one_after_the_other(weighted, order):
    """By hand: which original tokens every slot stands for, with the weight each has in its mean."""
    torch.manual_seed(0)
    tokens = torch.randn(2, 18, 4)
    found = merge_tokens(tokens, 4, order=order, rounds=3, weighted=weighted)
    for image, result in zip(tokens, found, strict=True):
        shares = torch.eye(18)  # row: a slot; column: the weight of an original token in its mean
        for left in merge_rounds(18, 4, 3):
            merge = decide_merge((shares @ image)[None], left, order=order if left == 4 else "raster")
            members = merge.assignment()[0].float()
            sizes = (shares > 0).sum(1).float() if weighted else torch.ones(len(shares))
            weights = members * sizes
            shares = (weights / weights.sum(1, keepdim=True)) @ shares
        torch.testing.assert_close(result, shares @ image)
        if weighted:  # every original token of a slot counts the same
            assert all(len(row[row > 0].round(decimals=5).unique()) == 1 for row in shares)


def test_weights_change_later_rounds_only():
    torch.manual_seed(0)
    tokens = torch.randn(1, 20, 3)
    torch.testing.assert_close(merge_tokens(tokens, 5, weighted=True), merge_tokens(tokens, 5, weighted=False))
    assert not torch.allclose(merge_tokens(tokens, 5, rounds=3), merge_tokens(tokens, 5, rounds=3, weighted=False))


def test_sizes_weigh_the_mean():
    tokens = torch.tensor([[[1.0, 0.0], [0.9, 0.0], [0.0, 1.0]]])
    merge = decide_merge(tokens, 2)
    found = apply_merge(tokens, merge, torch.tensor([[3.0, 1.0, 2.0]]))
    expected = {(0.975, 0.0), (0.0, 1.0)}
    assert {tuple(round(float(x), 6) for x in token) for token in found[0]} == expected


def test_a_mask_is_for_one_round():
    with pytest.raises(ValueError, match="mask: with 2 rounds"):
        merge_tokens(torch.randn(1, 4, 2), 2, torch.ones(1, 4, dtype=torch.bool), rounds=2)
