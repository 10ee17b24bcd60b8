"""Cache layers that grow in place, against transformers' own, which copy themselves at every step."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from skipvision_train.plans import bytes_held
from skipvision_train.plans.cache import GrowingLayer, extended, growing_cache


def states(batch, length):
    return torch.randn(batch, 2, length, 3), torch.randn(batch, 2, length, 3)


STEPS = {
    "update": st.integers(1, 70),
    "crop": st.integers(1, 40),
    "reorder": st.randoms(use_true_random=False),
    "repeat": st.just(2),
    "offload": st.none(),
    "reset": st.none(),
}
STEP = st.sampled_from(sorted(STEPS)).flatmap(lambda name: st.tuples(st.just(name), STEPS[name]))


@settings(max_examples=100)
@given(st.lists(STEP, max_size=12))
def test_it_holds_what_the_stock_layer_holds(steps):
    """Whatever is done to a cache in between: growing afterwards finds the right end of the right memory."""
    own, stock, batch = GrowingLayer(), DynamicLayer(), 2
    for name, value in [("update", 5), *steps, ("update", 1)]:
        length = stock.get_seq_length()
        if name == "update":
            new = states(batch, value)
            seen = [layer.update(*new) for layer in (own, stock)]
            assert all(map(torch.equal, *seen))
        elif name == "crop" and value < length:
            [layer.crop(-value) for layer in (own, stock)]
        elif name == "reorder":
            rows = torch.tensor([value.randrange(batch) for _ in range(batch)])
            [layer.reorder_cache(rows) for layer in (own, stock)]
        elif name == "repeat" and batch < 8 and length:
            [layer.batch_repeat_interleave(value) for layer in (own, stock)]
            batch *= value
        elif name == "offload":
            own.offload()
        elif name == "reset":
            [layer.reset() for layer in (own, stock)]
        assert own.get_seq_length() == stock.get_seq_length()
        if stock.get_seq_length():
            assert torch.equal(own.keys, stock.keys)
            assert torch.equal(own.values, stock.values)


def test_memory_is_exact_at_first_and_then_at_most_a_sixteenth_more():
    cache = growing_cache(LlamaConfig(num_hidden_layers=1))
    position = 2 * 3 * 2 * 3 * 4  # keys and values, 3 rows, 2 heads of 3 numbers of 4 bytes
    sizes, places = [], []
    for length in (40, *[1] * 14):
        cache.update(*states(3, length), 0)
        sizes.append(bytes_held(cache) / position)
        places.append(cache.layers[0].keys.data_ptr())
    assert sizes == [40, *[43] * 3, *[46] * 3, *[49] * 3, *[53] * 4, 57]
    assert sum(before != after for before, after in pairwise(places)) == 5


VIEWS = {
    "cut off in front": lambda memory: memory.transpose(1, 2)[:, :, 2:9],
    "some rows": lambda memory: memory.transpose(1, 2)[:1, :, :9],
    "the first head": lambda memory: memory.transpose(1, 2)[:, :1, :9],
    "the second head": lambda memory: memory.transpose(1, 2)[:, 1:, :9],
    "heads before positions": lambda memory: memory.view(2, 2, 40, 3)[:, :, :9],
    "numbers before heads": lambda memory: memory.view(2, 40, 3, 2).permute(0, 3, 1, 2)[:, :, :9],
}


@pytest.mark.parametrize("view", VIEWS)
def test_memory_of_another_shape_is_left_alone(view):
    memory = torch.randn(2, 40, 2, 3)
    held, before = VIEWS[view](memory), memory.clone()
    new = torch.randn(*held.shape[:2], 4, 3)
    assert torch.equal(extended(held, new), torch.cat([held, new], dim=2))
    assert torch.equal(memory, before)


def test_what_was_seen_before_stays_as_it_was():
    layer = GrowingLayer()
    layer.update(*states(1, 33))
    seen = [layer.update(*states(1, 1))[0] for _ in range(40)]
    copies = [keys.clone() for keys in seen]
    layer.update(*states(1, 20))
    assert all(map(torch.equal, seen, copies))


def test_gradients_go_through_the_cache():
    """In-place growth would change what autograd has saved."""
    first, second = (tuple(part.requires_grad_() for part in states(1, n)) for n in (64, 1))
    layer = GrowingLayer()
    layer.update(*first)
    keys, values = layer.update(*second)
    total = keys.square().sum() + values.square().sum()
    layer.update(*states(1, 1))
    total.backward()
    for part in (*first, *second):
        assert torch.equal(part.grad, 2 * part.detach())


def test_a_cache_of_inference_mode_grows_outside_of_it():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*states(1, 33))
        inside = layer.update(*states(1, 1))[0].clone()
    new = states(1, 1)
    keys, _ = layer.update(*new)
    assert torch.equal(keys, torch.cat([inside, new[0]], dim=2))


def test_the_same_tokens_are_generated(kit, model):
    layout = kit.layout_of("trrsssttt", "..trssttt")
    kwargs = {"attention_mask": layout.attention_mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    caches = growing_cache(model.config), DynamicCache(config=model.config)
    answers = [model.generate(kit.ids_for(layout), past_key_values=cache, **kwargs) for cache in caches]
    assert answers[0].shape == (2, 49)
    assert torch.equal(*answers)


def test_layers_with_a_window_stay_what_they_are():
    windowed = growing_cache(MistralConfig(num_hidden_layers=2, sliding_window=4))
    assert GrowingLayer not in [type(layer) for layer in windowed.layers]
    assert {type(layer) for layer in growing_cache(LlamaConfig(num_hidden_layers=2)).layers} == {GrowingLayer}
