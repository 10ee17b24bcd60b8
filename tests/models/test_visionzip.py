"""VisionZip and the selection of tokens against brute force over Python lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_train.models.connector_settings import VisionZipConfig
from skipvision_train.models.features import VisionFeatures
from skipvision_train.models.mlp import MlpProjector
from skipvision_train.models.selection import partition, top_salient
from skipvision_train.models.visionzip import VisionZip, merge_contextual

PATCHES, WIDTH, HEAD, LLM = 25, 8, 4, 6


def features(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> VisionFeatures:
    torch.manual_seed(seed)
    return VisionFeatures(
        states=(torch.randn(batch, PATCHES, WIDTH).to(dtype),),
        cls=torch.randn(batch, WIDTH).to(dtype),
        saliency=torch.rand(batch, PATCHES),
        keys=torch.randn(batch, PATCHES, HEAD),
    )


def best(values: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep])


def brute_force_merge(tokens: list[list[float]], keys: list[list[float]], count: int) -> list[list[float]]:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    targets = list(range(0, len(tokens), max(1, len(tokens) // count)))[:count]
    members: dict[int, list[list[float]]] = {t: [] for t in targets}
    for i in range(len(tokens)):
        if i not in targets:
            members[max(targets, key=lambda t, i=i: cosine(keys[i], keys[t]))].append(tokens[i])
    merged = []
    for t in targets:
        mean = [sum(column) / len(members[t]) for column in zip(*members[t], strict=True)] or [0.0] * len(tokens[t])
        merged.append([a + b for a, b in zip(tokens[t], mean, strict=True)])
    return merged


@settings(max_examples=60, derandomize=True)
@given(values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40), data=st.data())
def test_the_most_salient_in_raster_order_ties_by_index(values, data):
    keep = data.draw(st.integers(0, len(values)))
    both = torch.tensor([values, values[::-1]])
    found = top_salient(both, keep)
    assert found.dtype == torch.int64
    assert found.tolist() == [best(values, keep), best(values[::-1], keep)]


@pytest.mark.parametrize("keep", [-1, 6])
def test_more_tokens_than_there_are_are_refused(keep):
    with pytest.raises(ValueError, match=f"keep: {keep} of 5 tokens; use 0 to 5"):
        top_salient(torch.rand(1, 5), keep)


@settings(max_examples=40, derandomize=True)
@given(data=st.data(), count=st.integers(1, 12))
def test_partition_loses_nothing_and_keeps_the_order(data, count):
    keep = data.draw(st.integers(0, count))
    kept = [data.draw(st.permutations(range(count)))[:keep] for _ in range(3)]
    tokens = torch.arange(3.0 * count).view(3, count, 1).repeat(1, 1, 2).requires_grad_()
    ours, rest = partition(tokens, torch.tensor(kept, dtype=torch.int64).view(3, keep))
    assert ours.shape == (3, keep, 2)
    assert rest.shape == (3, count - keep, 2)
    for row in range(3):
        assert (ours[row, :, 0] - row * count).tolist() == sorted(kept[row])
        assert (rest[row, :, 0] - row * count).tolist() == [i for i in range(count) if i not in kept[row]]
    (2 * ours.sum() + 3 * rest.sum()).backward()
    expected = [[2.0 if i in row else 3.0 for i in range(count)] for row in kept]
    assert tokens.grad[..., 1].tolist() == expected


@settings(max_examples=60, derandomize=True)
@given(seed=st.integers(0, 10**6), total=st.integers(1, 14), data=st.data())
def test_merging_equals_brute_force(seed, total, data):
    count = data.draw(st.integers(1, total))
    generator = torch.Generator().manual_seed(seed)
    tokens, keys = (torch.randn(2, total, width, generator=generator) for width in (5, 3))
    expected = [brute_force_merge(t.tolist(), k.tolist(), count) for t, k in zip(tokens, keys, strict=True)]
    torch.testing.assert_close(merge_contextual(tokens, keys, count), torch.tensor(expected))


def test_the_sum_of_target_and_mean_and_a_target_with_nothing_assigned():
    keys = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [3.0, 0.0]]])
    tokens = torch.tensor([[[1.0], [10.0], [100.0], [30.0]]])
    assert merge_contextual(tokens, keys, 2).tolist() == [[[21.0], [100.0]]]  # targets 0 and 2; 1 and 3 go to 0


def test_targets_alone_come_back_unchanged_and_too_many_are_refused():
    tokens, keys = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    assert torch.equal(merge_contextual(tokens, keys, 5), tokens)
    with pytest.raises(ValueError, match="contextual: 6 of 5 tokens that are not dominant; use 1 to 5"):
        merge_contextual(tokens, keys, 6)
    with pytest.raises(ValueError, match="contextual: 1 of 0 tokens"):
        merge_contextual(tokens[:, :0], keys[:, :0], 1)


def test_equal_cosines_go_to_the_first_target_and_zero_keys_make_no_nan():
    tokens = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    assert merge_contextual(tokens, torch.ones(1, 4, 3), 2).tolist() == [[[6.0], [4.0]]]
    assert merge_contextual(tokens, torch.zeros(1, 4, 3), 2).tolist() == [[[6.0], [4.0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_over_many_half_precision_tokens(dtype):
    """The sum of 600 such tokens is no fp16 number, their mean is."""
    tokens = torch.full((1, 601, 2), 200.0, dtype=dtype)
    merged = merge_contextual(tokens, torch.ones(1, 601, 2), 1)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.float(), torch.full((1, 1, 2), 400.0), rtol=4e-3, atol=0)


def test_autocast_moves_no_token():
    given = features(4, seed=3)
    exact = merge_contextual(given.states[0], given.keys, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merge_contextual(given.states[0], given.keys, 6), exact)


@pytest.mark.parametrize(("dominant", "contextual"), [(5, 4), (1, 3), (24, 2), (20, 6), (25, 1)])
def test_equals_brute_force(dominant, contextual):
    module, given = VisionZip(VisionZipConfig(dominant, contextual), WIDTH, LLM), features()
    (found,) = module(given)
    assert found.shape == (2, dominant + contextual, LLM)
    for row in range(2):
        state, keys = given.states[0][row].tolist(), given.keys[row].tolist()
        kept = best(given.saliency[row].tolist(), dominant - 1)
        rest = [i for i in range(PATCHES) if i not in kept]
        merged = brute_force_merge([state[i] for i in rest], [keys[i] for i in rest], contextual)
        expected = torch.tensor([given.cls[row].tolist(), *(state[i] for i in kept), *merged])
        torch.testing.assert_close(found[row], module.project(expected))


def test_more_tokens_than_patches_are_refused():
    with pytest.raises(ValueError, match="contextual: 3 of 2 tokens"):
        VisionZip(VisionZipConfig(24, 3), WIDTH, LLM)(features())


def test_the_projector_has_llavas_names_and_the_only_weights():
    names = list(VisionZip(VisionZipConfig(5, 4), WIDTH, LLM).state_dict())
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert isinstance(VisionZip(VisionZipConfig(5, 4, layers=1), WIDTH, LLM), MlpProjector)


def test_gradients_reach_every_token_and_no_score():
    given = features()
    tensors = (given.states[0], given.cls, given.saliency, given.keys)
    for tensor in tensors:
        tensor.requires_grad_()
    VisionZip(VisionZipConfig(5, 4), WIDTH, LLM)(given)[0].square().sum().backward()
    assert (given.states[0].grad.abs().sum(-1) > 0).all()
    assert given.cls.grad.abs().max() > 0
    assert given.saliency.grad is None
    assert given.keys.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_close(autocast):
    module = VisionZip(VisionZipConfig(5, 4), WIDTH, LLM)
    (exact,) = module(features())
    given = features(dtype=torch.float32 if autocast else torch.bfloat16)
    if not autocast:
        module = module.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (found,) = module(given)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=3e-2)


def test_a_tower_that_reads_no_attention_is_refused():
    with pytest.raises(ValueError, match="no class token, saliency or keys"):
        VisionZip(VisionZipConfig(5, 4), WIDTH, LLM)(VisionFeatures(states=features().states))
