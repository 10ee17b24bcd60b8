"""Orders of an epoch: permutations that can be read from any position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_train.data import order as order_module
from skipvision_train.data.order import Feistel, OrderRule, Sequential, ShardShuffled, Shuffled, walk
from skipvision_train.errors import ConfigError

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)


@st.composite
def orders(draw):
    kind = draw(st.sampled_from(["sequential", "shuffled", "feistel", "shards"]))
    seed, epoch = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    if kind == "shards":
        return ShardShuffled(tuple(draw(SHARDS)), seed, epoch, draw(st.integers(1, 4)))
    samples = draw(st.integers(1, 70))
    return {
        "sequential": Sequential(samples),
        "shuffled": Shuffled(samples, seed, epoch),
        "feistel": Feistel(samples, seed, epoch),
    }[kind]


@given(order=orders(), data=st.data())
def test_a_permutation_that_can_be_read_from_anywhere(order, data):
    whole = order.take(0, order.samples).tolist()
    assert sorted(whole) == list(range(order.samples))
    start = data.draw(st.integers(0, order.samples))
    stop = data.draw(st.integers(start, order.samples))
    fresh = type(order)(**{name: getattr(order, name) for name in order.__dataclass_fields__})
    assert fresh.take(start, stop).tolist() == whole[start:stop]
    assert order.take(0, order.samples).tolist() == whole


@pytest.mark.parametrize("samples", [1, 7, 100])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (3, 2)])
def test_shuffle_is_the_sequence_of_earlier_versions(samples, seed, epoch):
    generator = torch.Generator().manual_seed(seed * 1_048_576 + epoch)
    expected = torch.randperm(samples, generator=generator).tolist()
    assert list(walk(OrderRule().of(samples, seed, epoch), samples)) == expected


@pytest.mark.parametrize("make", [Shuffled, Feistel, lambda n, *key: ShardShuffled((n // 5,) * 5, *key, 2)])
def test_orders_differ_by_seed_and_epoch(make):
    keys = list(itertools.product(range(4), range(4)))
    assert len({tuple(make(50, *key).take(0, 50)) for key in keys}) == len(keys)


def test_feistel_sends_every_place_everywhere():
    """Over 700 seeds index i stands at place j about 100 times: within five standard deviations of a binomial."""
    found = np.zeros((7, 7))
    for seed in range(700):
        found[np.arange(7), Feistel(7, seed, 0).take(0, 7)] += 1
    assert abs(found - 100).max() < 5 * (700 * (1 / 7) * (6 / 7)) ** 0.5


def test_feistel_of_more_than_memory_holds():
    order = Feistel(65_000_000_000, 0, 0)
    places = order.take(64_999_000_000, 64_999_010_000)
    assert len(set(places.tolist())) == 10_000
    assert places.min() >= 0
    assert places.max() < order.samples
    # Neighbours end far from each other, on average a third of all places apart.
    assert abs(np.abs(np.diff(places)).mean() / order.samples - 1 / 3) < 0.01


def test_many_samples_are_not_listed(monkeypatch):
    assert isinstance(OrderRule().of(order_module.LARGEST_LIST, 0, 0), Shuffled)
    assert isinstance(OrderRule().of(order_module.LARGEST_LIST + 1, 0, 0), Feistel)


@given(shards=SHARDS, buffer=st.integers(1, 4), seed=st.integers(0, 5))
def test_few_shards_are_read_at_a_time_and_each_once(shards, buffer, seed):
    order = ShardShuffled(tuple(shards), seed, 0, buffer)
    owner = np.repeat(np.arange(len(shards)), shards)[order.take(0, sum(shards))]
    assert sum(order.buffers) == sum(shards)
    seen: set[int] = set()
    for size, start in zip(order.buffers, np.cumsum([0, *order.buffers]), strict=False):
        now = set(owner[start : start + size].tolist())
        assert len(now) <= buffer
        assert not now & seen
        seen |= now


def test_a_buffer_of_shards_is_shuffled():
    order = ShardShuffled((50, 50, 50, 50), 0, 0, 2)
    owner = order.take(0, 100) // 50
    assert 20 < (owner[:50] == owner[0]).sum() < 40  # two shards, mixed
    assert (np.diff(order.take(0, 100)) < 0).any()


@settings(max_examples=30)
@given(samples=st.integers(1, 50), length=st.integers(0, 120))
def test_walking_begins_again_behind_the_end(samples, length):
    order = Shuffled(samples, 1, 0)
    whole = order.take(0, samples).tolist()
    assert list(walk(order, length)) == [whole[i % samples] for i in range(length)]


def test_blocks_do_not_show(monkeypatch):
    whole = list(walk(Feistel(100, 0, 0), 250))
    monkeypatch.setattr(order_module, "_BLOCK", 7)
    assert list(walk(Feistel(100, 0, 0), 250)) == whole


def test_refusals():
    with pytest.raises(ConfigError, match=r"^data\.order: 'random' is unknown; use shuffle, shards, sequential"):
        OrderRule("random").of(3, 0, 0)
    with pytest.raises(ConfigError, match=r"^data\.order: shards needs .* of the 3, and 2 shards have 4"):
        OrderRule("shards", (1, 3)).of(3, 0, 0)
    with pytest.raises(ConfigError, match="and none are known"):
        OrderRule("shards").of(3, 0, 0)
