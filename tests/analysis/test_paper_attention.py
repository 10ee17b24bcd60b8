"""Attention rows of generated tokens: equal to a slow sequence's maps, to eager attention's, and to what O projects."""

from contextlib import ExitStack
from functools import cache

import pytest
import torch
from tiny_vlms import make_family
from watched import Watched, make_ours, our_samples, prompt_embeds, sample_of

from skipvision_train.adapters import apply
from skipvision_train.analysis.attention_maps import (
    GENERATED,
    AttentionTrace,
    attention_maps,
    attention_row,
    trace_attention,
)
from skipvision_train.errors import ConfigError
from skipvision_train.plans import TokenKind, dense, fastv, pyramiddrop, skip_ffn, vtw
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.rules import VISUAL

PLANS = {
    "dense": dense(),
    "skip_ffn": skip_ffn(evict=()),
    "evicted": skip_ffn(),
    "evicted early": skip_ffn(evict=VISUAL, evict_when="before_first_token"),
    "vtw": vtw(1),
    "fastv": fastv(1, 0.5),
    "pyramiddrop": pyramiddrop((1, 2), (0.6, 0.3)),
}
TOKENS = 4


@pytest.fixture
def ours(tiny_config):
    return make_ours(tiny_config)


@pytest.mark.parametrize("name", ["dense", "skip_ffn", "evicted", "vtw", "fastv", "pyramiddrop"])
def test_rows_equal_a_slow_sequence(ours, name, monkeypatch):
    """The slow one runs prompt and generated tokens at once, and hides from the latter what is evicted."""
    model, processor = ours
    plan, kept = PLANS[name].bind(3), []
    monkeypatch.setattr(type(processor.tokenizer), "decode", lambda self, ids: kept.extend(ids) or "x")
    for sample in our_samples(model):
        kept.clear()
        trace = trace_attention(model, processor, sample, plan, TOKENS, heads=(2, 0))
        prompt = len(trace.kinds)
        new = model.language_model.model.embed_tokens(torch.tensor(kept)).detach()
        embeds = torch.cat([prompt_embeds(model, sample), new])
        kinds = torch.cat([trace.kinds, torch.full((len(kept),), int(TokenKind.TEXT))])
        slow = Watched(model.language_model, embeds, kinds, plan, prompt)
        assert trace.mean.shape == (len(kept), 3, prompt)
        for layer, seen in enumerate(slow.seen):
            held = [i for i in seen.live if i < prompt]
            for step in range(len(kept)):
                row = torch.zeros(4, prompt)
                places = [seen.live.index(i) for i in held]
                row[:, held] = seen.maps[:, seen.live.index(prompt + step)][:, places]
                torch.testing.assert_close(trace.mean[step, layer], row.mean(0), atol=2e-5, rtol=2e-3)
                for head in (0, 2):
                    torch.testing.assert_close(trace.heads[head][step, layer], row[head], atol=2e-5, rtol=2e-3)
        assert model.plan.is_dense


@pytest.mark.parametrize("name", PLANS)
def test_a_row_times_the_values_is_what_the_output_projection_gets(ours, name):
    model, _ = ours
    rows, mixed = [], []

    def behind(attention, args, kwargs, output):
        hidden = kwargs.get("hidden_states")
        if hidden is None or hidden.shape[1] != 1:
            return
        held = kwargs["past_key_values"].layers[attention.layer_idx]
        cos, sin = kwargs["position_embeddings"]
        row = attention_row(attention, hidden[0], (cos[0], sin[0]), held.keys[0])
        rows.append((row[:, None] @ held.values[0].repeat_interleave(2, dim=0))[:, 0].flatten())

    with ExitStack() as hooks, torch.no_grad(), apply(model, PLANS[name]):
        for layer in find_decoder(model).layers:
            attention = layer.self_attn
            hooks.callback(attention.register_forward_hook(behind, with_kwargs=True).remove)
            note = attention.o_proj.register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
            hooks.callback(note.remove)
        sample = our_samples(model)[1]
        model.generate(**sample.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    steps = [update.flatten() for update in mixed if update.numel() == 32][-len(rows) :]
    assert len(rows) == len(steps) >= 6
    torch.testing.assert_close(torch.stack(rows), torch.stack(steps), atol=1e-5, rtol=1e-4)


@cache
def family(name):
    return make_family(name)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_rows_of_other_models_equal_eager_attention(name):
    tiny, sample = family(name), sample_of(family(name).inputs(0))
    trace = trace_attention(tiny.model, tiny.processor, sample, dense(), TOKENS, heads=(1,))
    tiny.model.set_attn_implementation("eager")
    out = tiny.model.generate(
        **sample.inputs,
        max_new_tokens=TOKENS + 1,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    tiny.model.set_attn_implementation("sdpa")
    prompt = len(trace.kinds)
    assert len(trace.tokens) == TOKENS
    for step, layers in enumerate(out.attentions[1:]):
        for layer, maps in enumerate(layers):
            expected = maps[0, :, 0, :prompt]
            torch.testing.assert_close(trace.mean[step, layer], expected.mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(trace.heads[1][step, layer], expected[1], atol=1e-5, rtol=1e-4)


def test_eviction_is_seen_only_if_asked_for(ours):
    model, processor = ours
    samples = our_samples(model)
    seen = attention_maps(model, processor, samples, skip_ffn().bind(3), 2)
    hidden = attention_maps(model, processor, samples, skip_ffn().bind(3), 2, evict=True)
    assert (seen.evicted, hidden.evicted) == (False, True)
    assert (seen.mass()["skipped"].mean > 0).all()
    assert (hidden.mass()["skipped"].mean == 0).all()
    assert not attention_maps(model, processor, samples[:1], dense().bind(3), 1, evict=True).evicted


def test_mass_adds_up_and_the_first_end_token_is_put_off(ours):
    model, processor = ours
    with torch.no_grad():  # whatever stands there, the end token is likeliest
        model.language_model.lm_head.weight[processor.tokenizer.eos_token_id] = 0
        model.language_model.lm_head.weight.mul_(1e-3)
        model.language_model.lm_head.bias = torch.nn.Parameter(torch.zeros(320))
        model.language_model.lm_head.bias[processor.tokenizer.eos_token_id] = 9
    maps = attention_maps(model, processor, our_samples(model), dense().bind(3), TOKENS, heads=(1,))
    assert [len(trace.tokens) for trace in maps.traces] == [1, 1]
    for head in (None, 1):
        mass = maps.mass(head)
        assert list(mass) == ["text", "retained", "middle", "skipped", "summary", GENERATED]
        total = sum(estimate.mean for estimate in mass.values())
        torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))
        assert (mass[GENERATED].mean > 0).all()


def test_mass_of_a_made_up_row():
    kinds = torch.tensor([0, 1, 2, 2, 3, 0])
    rows = torch.tensor([[[0.1, 0.2, 0.05, 0.15, 0.1, 0.2]], [[0.3, 0.0, 0.25, 0.15, 0.1, 0.2]]])
    trace = AttentionTrace("s", kinds, ["a", "b"], rows, {})
    found = {name: round(float(value), 6) for name, value in trace.mass(rows).items()}
    assert found == {"text": 0.4, "retained": 0.1, "middle": 0, "skipped": 0.3, "summary": 0.1, GENERATED: 0.1}
    data = trace.to_dict()
    assert data["first_position"] == 1
    assert data["kinds"] == ["retained", "skipped", "skipped", "summary"]
    assert data["rows"] == [[0.1, 0.15, 0.15, 0.1]]


def test_a_head_that_is_not_there_is_named(ours):
    model, processor = ours
    with pytest.raises(ConfigError, match="heads: 4; the model has heads 0 to 3"):
        trace_attention(model, processor, our_samples(model)[0], dense(), 1, heads=(0, 4))
