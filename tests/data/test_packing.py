"""Bins: nothing lost, nothing too full, and few of them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_train.data import packing
from skipvision_train.data.order import OrderRule, ShardShuffled
from skipvision_train.data.packing import PackedDataset, best_penalty, fill, pack, rows_of
from skipvision_train.errors import DataError

CAPACITY = 30
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60).map(np.array)


def content(bins):
    return [bins[i] for i in range(len(bins))]


@st.composite
def rules(draw, samples):
    kind = draw(st.sampled_from(["shuffle", "shards", "sequential"]))
    if kind != "shards":
        return OrderRule(kind)
    cuts = sorted(draw(st.lists(st.integers(0, samples), max_size=5)))
    return OrderRule("shards", tuple(np.diff([0, *cuts, samples]).tolist()), draw(st.integers(1, 3)))


@given(lengths=LENGTHS, seed=st.integers(0, 3), data=st.data())
def test_every_sample_is_in_one_bin_and_no_bin_is_too_full(lengths, seed, data):
    rule = data.draw(rules(len(lengths)))
    bins = pack(lengths, CAPACITY, seed, rule)
    members = content(bins)
    assert sorted(itertools.chain(*members)) == list(range(len(lengths)))
    assert all(members)
    assert max(lengths[m].sum() for m in members) <= CAPACITY
    assert bins.tokens == lengths.sum()
    assert bins.efficiency == pytest.approx(lengths.sum() / (CAPACITY * len(members)))
    assert content(pack(lengths.copy(), CAPACITY, seed, rule)) == members
    assert sum(bins.windows) == len(bins)
    order = bins.rule(rule).of(len(bins), seed, 1)
    assert sorted(order.take(0, len(bins)).tolist()) == list(range(len(bins)))


def fewest(lengths):
    """The least number of bins, by trying every assignment."""

    def place(rest, bins):
        if not rest:
            return len(bins)
        options = [place(rest[1:], [*bins, rest[0]])]
        for i, used in enumerate(bins):
            if used + rest[0] <= CAPACITY:
                options.append(place(rest[1:], [*bins[:i], used + rest[0], *bins[i + 1 :]]))
        return min(options)

    return place(lengths, [])


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=7))
def test_close_to_the_least_number_of_bins(lengths):
    assert fewest(lengths) <= len(pack(np.array(lengths), CAPACITY)) <= fewest(lengths) + 1


@given(lengths=LENGTHS, penalty=st.integers(0, CAPACITY))
def test_patterns_use_the_histogram_up(lengths, penalty):
    histogram = np.bincount(lengths, minlength=CAPACITY + 1)
    patterns = fill(histogram, CAPACITY, penalty)
    used = np.zeros_like(histogram)
    for pattern, times in patterns:
        assert times > 0
        assert sum(pattern) <= CAPACITY
        np.add.at(used, list(pattern), times)
    assert np.array_equal(used, histogram)
    assert np.array_equal(histogram, np.bincount(lengths, minlength=CAPACITY + 1))  # left as it was


def test_a_bin_takes_what_leaves_least_space():
    assert fill(np.bincount([20, 9, 6, 4], minlength=31), 30, 0) == [((20, 6, 4), 1), ((9,), 1)]
    # The pair gains one token over the single 9: with a penalty of 1 that is not worth another sample.
    assert fill(np.bincount([20, 9, 6, 4], minlength=31), 30, 1) == [((20, 9), 1), ((6, 4), 1)]
    # Two of length 5 would leave nothing, but there is only one.
    assert fill(np.bincount([20, 6, 5, 3], minlength=31), 30, 0)[0] == ((20, 6, 3), 1)
    # One length twice, and a pattern of it as often as it goes.
    assert fill(np.bincount([15] * 7, minlength=31), 30, 0) == [((15, 15), 3), ((15,), 1)]


def test_the_penalty_saves_bins():
    lengths = like_mix665k(3000, 576, spread=1.0)
    fewer = best_penalty(lengths, 2048)
    histogram = np.bincount(lengths, minlength=2049)
    assert sum(t for _, t in fill(histogram, 2048, fewer)) < 0.98 * sum(t for _, t in fill(histogram, 2048, 0))


def like_mix665k(samples, visual, spread, longest=2048):
    rng = np.random.default_rng(0)
    text = np.maximum(8, np.exp(rng.normal(np.log(150), spread, samples)).round()).astype(np.int64)
    has_image = rng.random(samples) >= 40_688 / 665_298
    return np.minimum(text + visual * has_image, longest)


@pytest.mark.parametrize("spread", [0.6, 1.0])
@pytest.mark.parametrize(("visual", "capacity"), [(576, 4096), (258, 2048)])
def test_a_mixture_like_mix665k_fills_its_rows(visual, capacity, spread):
    lengths = like_mix665k(6000, visual, spread)
    assert pack(lengths, capacity).efficiency > 0.97


def test_bins_are_made_within_windows(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 100)
    shards = (30, 10, 40, 20)
    rule = OrderRule("shards", shards, 2)
    bins = pack(lengths, CAPACITY, 5, rule)
    order = ShardShuffled(shards, 5, 0, 2)
    window = np.repeat(np.arange(2), order.buffers)
    place = np.argsort(order.take(0, 100))
    of_bin = [{int(window[place[i]]) for i in members} for members in content(bins)]
    assert of_bin == [{0}] * bins.windows[0] + [{1}] * bins.windows[1]
    assert bins.rule(rule) == OrderRule("shards", bins.windows, 1)

    monkeypatch.setattr(packing, "SEQUENTIAL_WINDOW", 10)
    for members in content(pack(lengths, CAPACITY, 5, OrderRule("sequential"))):
        assert len({i // 10 for i in members}) == 1
        assert members == sorted(members)


def test_the_seed_decides_who_shares_a_bin():
    lengths = np.full(60, 10)
    assert content(pack(lengths, CAPACITY, 0)) == content(pack(lengths, CAPACITY, 0))
    assert content(pack(lengths, CAPACITY, 0)) != content(pack(lengths, CAPACITY, 1))


@pytest.mark.parametrize("wrong", [0, CAPACITY + 1])
def test_lengths_that_no_row_can_hold(wrong):
    with pytest.raises(DataError, match=rf"^sample 1 has {wrong} tokens; a row of data\.pack_length 30 holds 1 to 30"):
        pack(np.array([3, wrong]), CAPACITY)


def test_what_the_log_says():
    bins = pack(np.array([20, 10, 15, 15, 30]), CAPACITY)
    assert bins.line() == "packed 5 samples into 3 rows of 30 tokens: 1.67 samples a row, 100.00% full"
    with pytest.raises(IndexError, match="bin 3 of 3"):
        bins[3]


def test_the_packed_data_set_reads_the_bins_members():
    bins = pack(np.array([20, 10, 15, 15, 30]), CAPACITY, rule=OrderRule("sequential"))
    packed = PackedDataset([f"sample {i}" for i in range(5)], bins)
    assert len(packed) == 3
    assert [packed[i] for i in range(3)] == [["sample 0", "sample 1"], ["sample 2", "sample 3"], ["sample 4"]]


@given(lengths=st.lists(st.integers(1, CAPACITY), max_size=12))
def test_rows_by_true_lengths(lengths):
    rows = rows_of(lengths, CAPACITY)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(row == sorted(row) and sum(lengths[i] for i in row) <= CAPACITY for row in rows)
    if 0 < sum(lengths) <= CAPACITY:
        assert rows == [list(range(len(lengths)))]


def test_a_sample_longer_than_a_row():
    with pytest.raises(DataError, match=r"a sample of 31 tokens does not fit a row of data\.pack_length 30"):
        rows_of([3, 31], CAPACITY)


def test_the_benchmark(pytestconfig, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    import packing as benchmark

    benchmark.main(["--records", "2000", "--visual", "258", "--spread", "0.8", "--pack-length", "2048"])
    *table, last = capsys.readouterr().out.splitlines()
    (case,) = json.loads(last)
    assert len(table) == 3
    lengths, has_image = benchmark.lengths_like_mix665k(2000, 258, 0.8, 2048, 0)
    assert (~has_image).sum() == 122  # 6.1 %
    assert case["full"] == round(lengths.sum() / (case["rows"] * 2048), 4)
    assert case["same_on_1_2_8_ranks"]
    assert case["padding_modality"] < case["padding_length"] < case["padding"]
    assert 0.8 < case["estimated"]["full"] < case["full"]
