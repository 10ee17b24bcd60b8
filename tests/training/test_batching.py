"""The order of samples, the number of steps, and batches of which nothing is left."""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from counted import count_tokens
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from skipvision_train.config.specs import TrainerSpec
from skipvision_train.data.order import OrderRule
from skipvision_train.data.packing import PackedDataset, pack
from skipvision_train.data.processor import Example
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.plans import TokenKind
from skipvision_train.training.batching import (
    BatchArithmetic,
    ElasticQueries,
    EpochSampler,
    EpochStart,
    Grouping,
    TrainCollator,
)


@given(samples=st.integers(1, 60), batch=st.integers(1, 16), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_every_sample_is_seen_in_whole_batches(samples, batch, seed, epoch):
    sampler = EpochSampler(samples, batch, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert len(order) % batch == 0
    assert sorted(order[:samples]) == list(range(samples))
    assert len(order) - samples < batch
    assert order[samples:] == [order[i % samples] for i in range(len(order) - samples)]
    assert order == list(sampler)


def test_orders_differ_by_seed_and_epoch():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = EpochSampler(50, 5, seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize(
    ("epochs", "max_steps", "samples", "steps"),
    [(1.0, None, 100, 13), (2.0, None, 96, 24), (0.5, None, 100, 7), (0.001, None, 100, 1), (None, 5, 100, 5)],
)
def test_steps(epochs, max_steps, samples, steps):
    trainer = TrainerSpec(epochs=epochs, max_steps=max_steps, per_device_batch=2, global_batch=8)
    arithmetic = BatchArithmetic.of(trainer, samples, processes=2)
    assert (arithmetic.steps, arithmetic.accumulation, arithmetic.global_batch) == (steps, 2, 8)
    assert "2 samples x 2 processes x 2 accumulated = 8 per step" in arithmetic.line()


def test_packed_rows_are_called_so():
    trainer = TrainerSpec(epochs=1.0, per_device_batch=2, global_batch=8)
    line = BatchArithmetic.of(trainer, 20, processes=2, unit="rows").line()
    assert line == "2 rows x 2 processes x 2 accumulated = 8 per step; 3 steps over 20 rows"


def test_no_samples():
    with pytest.raises(ConfigError, match=r"^data\.recipe: it gives no records"):
        BatchArithmetic.of(TrainerSpec(epochs=1.0, per_device_batch=1, global_batch=1), 0, 1)


def test_a_batch_of_unusable_samples_supervises_nothing():
    collator = pickle.loads(pickle.dumps(TrainCollator(pad_id=7)))
    batch = collator([None, None])
    assert batch["input_ids"].tolist() == [[7, 7]]
    assert batch["token_kinds"].tolist() == [[TokenKind.TEXT] * 2]
    assert batch["labels"].tolist() == [[-100, -100]]
    assert "pixel_values" not in batch


def test_the_model_takes_such_a_batch(tiny_config):
    from skipvision_train.models.build import build_model

    model, _ = build_model(tiny_config)
    model.train()
    loss = model(**TrainCollator(7)([None]), num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


RULES = {
    "shuffle": OrderRule(),
    "shards": OrderRule("shards", (9, 14, 7, 20), 2),
    "sequential": OrderRule("sequential"),
}
SAMPLES, GLOBAL = 50, 8
LENGTHS = np.random.default_rng(0).integers(1, 100, SAMPLES)
HAS_IMAGE = np.random.default_rng(1).random(SAMPLES) < 0.7


def grouping(kind):
    return {"none": None, "length": Grouping(LENGTHS), "modality": Grouping(LENGTHS, HAS_IMAGE)}[kind]


def epoch_of(rule="shuffle", group="none", seed=3, epoch=1):
    sampler = EpochSampler(SAMPLES, GLOBAL, seed, RULES[rule], grouping(group))
    sampler.set_epoch(epoch)
    return list(sampler)


def chunks(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group", ["none", "length", "modality"])
def test_every_order_gives_every_sample_once_and_fills_the_last_batch_up(rule, group):
    order = epoch_of(rule, group)
    plain = epoch_of(rule)
    assert len(order) == 56
    # What fills up is the beginning of the order, whatever stands where.
    assert Counter(order) == Counter(range(SAMPLES)) + Counter(plain[:6])
    assert order == epoch_of(rule, group)


def test_orders_follow_their_rule():
    assert epoch_of("sequential")[:SAMPLES] == list(range(SAMPLES))
    owner = np.repeat(np.arange(4), RULES["shards"].shards)[epoch_of("shards")[:SAMPLES]].tolist()
    assert len(set(owner[:16])) == 2  # the two smallest shards have 16 samples together
    assert Counter(owner) == dict(enumerate(RULES["shards"].shards))


@pytest.mark.parametrize("rule", RULES)
def test_grouping_by_length_changes_no_global_batch(rule):
    plain, grouped = chunks(epoch_of(rule), GLOBAL), chunks(epoch_of(rule, "length"), GLOBAL)
    assert [sorted(batch) for batch in plain] == [sorted(batch) for batch in grouped]
    for batch in grouped:
        lengths = LENGTHS[batch].tolist()
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("rule", RULES)
def test_grouping_by_modality_mixes_only_the_last_batch(rule):
    batches = chunks(epoch_of(rule, "modality"), GLOBAL)
    mixed = [len(set(HAS_IMAGE[batch].tolist())) > 1 for batch in batches]
    assert mixed == [False] * 6 + [True]
    assert len({bool(HAS_IMAGE[batch[0]]) for batch in batches[:-1]}) == 2
    for batch in batches:
        assert LENGTHS[batch].tolist() == sorted(LENGTHS[batch].tolist(), reverse=True)


def padded(order, size):
    """The share of places that are padding, in micro batches of so many."""
    places = sum(LENGTHS[batch].max() * len(batch) for batch in chunks(order, size))
    return 1 - LENGTHS[order].sum() / places


@pytest.mark.parametrize("group", ["length", "modality"])
def test_grouping_saves_padding(group):
    assert padded(epoch_of(group=group), 2) < 0.5 * padded(epoch_of(), 2)


@pytest.mark.parametrize("group", ["none", "length", "modality"])
def test_global_batches_are_the_same_on_1_2_and_8_ranks(group):
    expected = [Counter(batch) for batch in chunks(epoch_of(group=group), GLOBAL)]
    for ranks, per_device in ((1, 1), (1, 4), (2, 2), (2, 4), (8, 1)):
        sampler = EpochSampler(SAMPLES, GLOBAL, 3, grouping=grouping(group))
        sampler.set_epoch(1)
        shares = [list(BatchSamplerShard(BatchSampler(sampler, per_device, False), ranks, r)) for r in range(ranks)]
        accumulation = GLOBAL // ranks // per_device
        steps = [
            Counter(i for share in shares for batch in share[s * accumulation : (s + 1) * accumulation] for i in batch)
            for s in range(len(expected))
        ]
        assert steps == expected


class Ids:
    """Sample ``i`` is the number ``i``."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return index


def run_epochs(packed, workers, rank, ranks, start):
    """The ids of every micro batch from step ``start`` on, in two epochs, driven as transformers' Trainer does it."""
    per_device, accumulation = 2, GLOBAL // 2 // ranks
    bins = pack(LENGTHS, 128, 3)
    dataset = PackedDataset(Ids(), bins) if packed else Ids()
    sampler = EpochSampler(len(dataset), GLOBAL, 3, bins.rule(OrderRule()) if packed else None)
    loader = DataLoader(dataset, per_device, sampler=sampler, num_workers=workers, collate_fn=list)
    loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
    steps = len(loader) // accumulation
    callback, seen = EpochStart(sampler), []
    for epoch in range(start // steps, 2):
        callback.on_epoch_begin(None, SimpleNamespace(global_step=max(start, epoch * steps)), None)
        skip = (start - epoch * steps) * accumulation if epoch == start // steps else 0
        now = skip_first_batches(loader, skip) if skip else loader
        now.set_epoch(epoch)
        wrapped = getattr(now.batch_sampler, "batch_sampler", None)
        if hasattr(wrapped, "set_epoch"):
            wrapped.set_epoch(epoch)
        seen += list(now)
    return seen


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_a_resumed_run_reads_the_same_samples(packed, workers):
    for ranks in (1, 2):
        for rank in range(ranks):
            whole = run_epochs(packed, 0, rank, ranks, start=0)
            accumulation = GLOBAL // 2 // ranks
            steps = len(whole) // accumulation
            # In the middle of the first epoch, between the two, and in the middle of the second.
            for start in (steps // 2 + 2,) if workers else (1, steps // 2, steps // 2 + 2):
                assert run_epochs(packed, workers, rank, ranks, start) == whole[start * accumulation :]


def test_every_sample_is_read_once_per_epoch_when_packed():
    whole = run_epochs(True, 0, 0, 1, 0)
    first = [i for batch in whole[: len(whole) // 2] for row in batch for i in row]
    fill_up = len(first) - SAMPLES
    assert set(first) == set(range(SAMPLES))
    assert 0 <= fill_up < GLOBAL * max(len(row) for batch in whole for row in batch)


def example(*ids, visual=0):
    kinds = [int(TokenKind.SKIPPED if i == 3 else TokenKind.TEXT) for i in ids]
    pixels = torch.zeros(visual, 3, 2, 2) if visual else None
    return Example(list(ids), [-100, *ids[1:]], kinds, pixels, (1,) * visual)


def test_packed_batches():
    collator = pickle.loads(pickle.dumps(TrainCollator(pad_id=0, pack_length=6)))
    batch = collator([[example(5, 6), None, example(7, 8, 9)], [None], [example(4)]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 0, 0, 0, 0]]
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1, 1], [0, -1, -1, -1, -1]]
    assert collator([[None], [None, None]])["input_ids"].tolist() == [[0, 0]]


def test_a_bin_that_turns_out_too_long_becomes_two_rows():
    batch = TrainCollator(pad_id=0, pack_length=6)([[example(1, 2, 3), example(4, 5, 6, 7), example(8, 9)]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 8, 9], [4, 5, 6, 7, 0]]
    with pytest.raises(DataError, match="a sample of 7 tokens does not fit"):
        TrainCollator(pad_id=0, pack_length=6)([[example(*range(7))]])


def test_an_elastic_number_of_queries_shortens_packed_rows():
    elastic = ElasticQueries(image_token_id=3, queries=4, seed=0)
    row = [example(1, 3, 3, 3, 3, 2, visual=1), example(5, 6), example(7, 3, 3, 3, 3, visual=1)]
    batch = TrainCollator(0, elastic, pack_length=20)([row])
    keep = elastic.draw(row)
    assert keep < 4  # or this test shows nothing
    assert batch["input_ids"].tolist() == [[1, *[3] * keep, 2, 5, 6, 7, *[3] * keep]]
    assert batch["document_ids"].tolist() == [[0] * (2 + keep) + [1, 1] + [2] * (1 + keep)]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_packing_changes_neither_supervised_nor_real_tokens(lengths):
    rows = [[example(*range(10, 10 + n)) for n in row] for row in lengths]
    packed = TrainCollator(0, pack_length=36)(rows)
    plain = [TrainCollator(0)([sample]) for row in rows for sample in row]
    assert count_tokens([packed])[:2].tolist() == count_tokens(plain)[:2].tolist()
    assert count_tokens([packed, packed])[2] == 2 * len(rows) * max(map(sum, lengths))
