"""What is measured; the clock itself is not tested."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from skipvision_train.analysis.flops import kv_cache_bytes
from skipvision_train.evaluation.evaluate import file_images, prompt_batches
from skipvision_train.evaluation.timing import measure_plans
from skipvision_train.plans import TokenKind, bytes_held, dense, skip_ffn, vskip


@pytest.fixture
def batches(model, processor, records):
    return list(prompt_batches(model, processor, records[5:8], file_images(records[5:8]), 1))


def test_cache_bytes_are_those_of_the_arithmetic(model, batches):
    base = model.plan
    timings = measure_plans(
        model, batches, {"dense": dense().bind(3), "plan": skip_ffn().bind(3)}, repeats=1, decode_tokens=2
    )
    text = model.config.text_config
    counts = [{kind: int((b["token_kinds"] == kind).sum()) for kind in TokenKind} for b in batches]
    for name, plan in (("dense", dense().bind(3)), ("plan", skip_ffn().bind(3))):
        expected = sum(kv_cache_bytes(text, c, plan, bytes_per_value=4) for c in counts) / len(batches)
        assert timings[name].kv_bytes == expected
        assert timings[name].prefill_ms > 0
        assert timings[name].decode_ms > 0
    assert timings["plan"].kv_bytes < timings["dense"].kv_bytes
    assert model.plan == base


def test_plans_take_turns_and_the_first_round_is_thrown_away(model, batches, monkeypatch):
    order, base = [], model.plan
    set_plan = model.set_plan
    monkeypatch.setattr(model, "set_plan", lambda plan: (order.append(plan.name), set_plan(plan)))
    measure_plans(model, batches[:1], {"a": dense().bind(3), "b": vskip([1]).bind(3)}, repeats=2, decode_tokens=1)
    assert order == ["dense", "vskip", "vskip", "dense", "dense", "vskip", base.name]


def test_the_median_of_the_repeats_counts(model, batches, monkeypatch):
    clock = iter([t for ms in (9.0, 1.0, 5.0, 2.0) for t in (0.0, ms / 1000, 0.0, ms / 500)])
    monkeypatch.setattr("skipvision_train.evaluation.timing._now", lambda device: next(clock))
    timing = measure_plans(model, batches[:1], {"a": dense().bind(3)}, repeats=3, decode_tokens=2)["a"]
    assert timing.prefill_ms == pytest.approx(2.0)
    assert timing.decode_ms == pytest.approx(2.0)


def test_plan_is_restored_after_an_error(model, batches, monkeypatch):
    base = model.plan

    def failing(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.language_model.lm_head, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_plans(model, batches, {"dense": dense().bind(3)}, repeats=1)
    assert model.plan == base


def test_decoding_feeds_the_same_tokens_as_generate(model, batches):
    """The loop that is timed is the loop that is used."""
    fed = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: fed.append(args[0]))
    with handle:
        measure_plans(model, batches[:1], {"plan": model.plan}, repeats=1, decode_tokens=4)
    tokens = [t.item() for t in fed if t.shape == (1, 1)]
    expected = model.generate(**batches[0], max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert tokens == 2 * expected[0, -4:].tolist()


@pytest.mark.parametrize(("repeats", "decode_tokens"), [(0, 1), (1, 0)])
def test_nothing_to_measure(model, batches, repeats, decode_tokens):
    with pytest.raises(ValueError, match="at least one"):
        measure_plans(model, batches, {"dense": dense().bind(3)}, repeats, decode_tokens)


def test_a_view_of_a_large_cache_saves_nothing():
    cache = DynamicCache()
    full = torch.zeros(1, 2, 100, 4)
    cache.update(full[:, :, :10], full[:, :, 10:20], 0)
    cache.layers[0].keys = full[:, :, :10]
    cache.layers[0].values = full[:, :, 10:20]
    assert bytes_held(cache) == full.numel() * 4
