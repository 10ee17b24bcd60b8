"""The order of samples, the number of steps, and batches of which nothing is left."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipvision_train.config.specs import TrainerSpec
from skipvision_train.errors import ConfigError
from skipvision_train.plans import TokenKind
from skipvision_train.training.batching import BatchArithmetic, EpochSampler, TrainCollator


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
