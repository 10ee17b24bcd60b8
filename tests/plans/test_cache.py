"""Oracle 6 (the skip KV-cache) and oracle 8 (batched = one by one, in decoding)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from skipvision_train.errors import PlanError
from skipvision_train.plans import (
    SkipPlan,
    TokenKind,
    TokenLayout,
    attach,
    bytes_held,
    compose,
    dense,
    fastv,
    pyramiddrop,
    shortv,
    skip_ffn,
    skip_kv,
    sparsevlm,
    vskip,
    vtw,
)
from skipvision_train.plans.cache import EvictedLayer, check_evictable, evict, visible_slots

ROWS = ["ttrryssytt", "..rrsssstt", "......tttt", "trssrtrsst"]
AFTER = skip_ffn().bind(3)
BEFORE = skip_ffn(evict_when="before_first_token").bind(3)
PLANS = {
    "after": AFTER,
    "before": BEFORE,
    "no eviction": skip_ffn(evict=()).bind(3),
    "vskip": vskip([0, 2], bypass="norm").bind(3),
    "eviction only": SkipPlan("evict", dense().bind(3).rules, evict=frozenset({TokenKind.SKIPPED, TokenKind.RETAINED})),
    "all": compose(
        [shortv([1]).bind(3), skip_ffn(evict=("skipped", "summary"), evict_when="before_first_token").bind(3)]
    ),
    "vtw": vtw(1).bind(3),
    "vtw at once": vtw(0).bind(3),
    "fastv": fastv(1, 0.4).bind(3),
    "fastv, eviction": compose([fastv(1, 0.6), skip_kv("all but summary")]).bind(3),
    "fastv, vskip": compose([fastv(1, 0.4), vskip([0, 2])]).bind(3),
    "pyramiddrop": pyramiddrop((1, 2), (0.6, 0.3)).bind(3),
    "pyramiddrop, eviction": compose([pyramiddrop((1, 2), (0.6, 0.3)), skip_kv("small")]).bind(3),
    "sparsevlm": sparsevlm(layers=(0, 1), keep=(3, 2)).bind(3),
    "sparsevlm+": sparsevlm(version=2, layers=(0, 1), keep=(3, 2)).bind(3),
}


@torch.no_grad()
def decode(model, ids, layout, plan, steps=4, cache=None):
    """Greedy decoding by hand. Returns the ids (B, steps), the logits (B, steps, V) and the cache."""
    cache = DynamicCache() if cache is None else cache
    mask, positions = layout.attention_mask, layout.position_ids
    tokens, logits = [], []
    with attach(model, plan) as attachment:
        extra = {"token_layout": layout} if attachment.active else {}
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **extra)
        for _ in range(steps):
            logits.append(out.logits[:, -1])
            tokens.append(logits[-1].argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            positions = positions[:, -1:] + 1
            out = model(tokens[-1][:, None], attention_mask=mask, position_ids=positions, past_key_values=cache)
    return torch.stack(tokens, 1), torch.stack(logits, 1), cache


# --- against the slow reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("row", ["ttrryssytt", "ttrsssryt", "ttrrss", "tttt", "s", "ts"])
def test_decoding_equals_one_masked_forward(kit, model, name, row):
    """Prompt and generated tokens in one slow forward, in which later queries do not see what was evicted."""
    plan, layout = PLANS[name], kit.layout_of(row)
    ids = kit.ids_for(layout)
    # Evicting before the first token, the last prompt position comes after the eviction: it sees little, and stays.
    first_blind = len(row) - (plan.evict_when == "before_first_token")
    tokens, logits, _ = decode(model, ids, layout, plan)
    whole = TokenLayout.from_kinds(torch.cat([layout.kinds, torch.zeros_like(tokens)], dim=-1))
    with torch.no_grad():
        ids = torch.cat([ids, tokens], dim=-1)
        expected = kit.slow_logits(model, ids, whole, plan, lambda n: first_blind, prompt=len(row))
    torch.testing.assert_close(logits, expected[:, len(row) - 1 : -1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("row", ["ttrryssytt", "ttrrss", "..rrsstt"])
def test_before_first_token_returns_all_positions(kit, model, row):
    layout = kit.layout_of(row)
    ids = kit.ids_for(layout)
    real = layout.kinds != TokenKind.PAD
    with attach(model, BEFORE), torch.no_grad():
        out = model(ids, token_layout=layout, past_key_values=DynamicCache(), output_hidden_states=True)
        by_embeddings = model(
            inputs_embeds=model.model.embed_tokens(ids), token_layout=layout, past_key_values=DynamicCache()
        )
        as_tuple = model.model(ids, token_layout=layout, use_cache=True, return_dict=False)
    expected = kit.slow_logits(model, ids, layout, BEFORE, lambda n: n - 1)
    torch.testing.assert_close(out.logits[real], expected[real], atol=2e-5, rtol=1e-4)
    assert torch.equal(out.logits, by_embeddings.logits)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[-1], as_tuple[0])
    assert out.past_key_values.get_seq_length() == len(row)


# --- invariants ----------------------------------------------------------------------------------------------------


def test_after_first_token_leaves_the_first_token_alone(kit, model):
    layout = kit.layout_of(*ROWS)
    ids = kit.ids_for(layout)
    _, full, _ = decode(model, ids, layout, PLANS["no eviction"])
    _, after, _ = decode(model, ids, layout, AFTER)
    _, before, _ = decode(model, ids, layout, BEFORE)
    assert torch.equal(after[:, 0], full[:, 0])
    has_skipped = torch.tensor(["s" in row for row in ROWS])
    assert ((after - full)[has_skipped, 1].abs().amax(-1) > 1e-3).all()
    assert ((before - full)[has_skipped, 0].abs().amax(-1) > 1e-3).all()
    torch.testing.assert_close(after[~has_skipped], full[~has_skipped], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("plan", [AFTER, BEFORE])
def test_nothing_to_evict_changes_no_bit(kit, model, plan):
    layout = kit.layout_of("ttrrytt", "..trtrt")
    ids = kit.ids_for(layout)
    stock_tokens, stock, full = decode(model, ids, layout, dense().bind(3))
    tokens, logits, cache = decode(model, ids, layout, plan)
    assert torch.equal(logits, stock)
    assert torch.equal(tokens, stock_tokens)
    assert all(type(layer) is DynamicLayer for layer in cache.layers)
    assert bytes_held(cache) == bytes_held(full)


@pytest.mark.parametrize("plan", [AFTER, BEFORE])
def test_positions_are_not_renumbered(kit, model, plan):
    """Without position ids from the caller, step i stands at prompt length + i, as with a full cache."""
    layout, seen = kit.layout_of("ttrryssytt"), []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].flatten().tolist()), with_kwargs=True
    )
    with attach(model, plan), torch.no_grad():
        cache = DynamicCache()
        model(kit.ids_for(layout), token_layout=layout, past_key_values=cache)
        assert seen.pop(0) == list(range(9 if plan is BEFORE else 10))
        seen.clear()
        for i in range(3):
            assert cache.get_seq_length() == 10 + i
            model(torch.tensor([[7]]), past_key_values=cache)
    hook.remove()
    assert seen == [[10], [11], [12]]


def test_kept_keys_and_values_are_those_of_the_full_cache_and_memory_falls(kit, model):
    layout = kit.layout_of(*ROWS)
    ids = kit.ids_for(layout)
    caches = [DynamicCache(), DynamicCache()]
    for cache, plan in zip(caches, (PLANS["no eviction"], AFTER), strict=True):
        with attach(model, plan), torch.no_grad():
            model(ids, token_layout=layout, past_key_values=cache)
    keep = ((layout.kinds != TokenKind.SKIPPED) & (layout.kinds != TokenKind.PAD)).tolist()
    for full, evicted in zip(caches[0].layers, caches[1].layers, strict=True):
        for name in ("keys", "values"):
            for row, kept in enumerate(keep):
                columns = [i for i, kept_here in enumerate(kept) if kept_here]
                expected = getattr(full, name)[row][:, columns]
                assert torch.equal(getattr(evicted, name)[row][:, : len(columns)], expected)
                assert evicted.columns[row].tolist() == columns + [-1] * (8 - len(columns))
    longest = max(sum(kept) for kept in keep)
    assert longest == 8
    assert bytes_held(caches[1]) == bytes_held(caches[0]) * longest // 10
    assert (
        bytes_held(caches[1]) == 3 * 2 * (4 * 2 * longest * 4) * 4
    )  # layers, k and v, B * heads * slots * width, fp32


@pytest.mark.parametrize("name", PLANS)
def test_batched_decoding_equals_one_by_one(kit, model, name):
    layout = kit.layout_of(*ROWS)
    ids = kit.ids_for(layout)
    tokens, logits, _ = decode(model, ids, layout, PLANS[name])
    for i, row in enumerate(ROWS):
        alone = kit.layout_of(row.strip("."))
        own_tokens, own_logits, _ = decode(model, ids[i : i + 1, -alone.kinds.shape[1] :], alone, PLANS[name])
        torch.testing.assert_close(logits[i : i + 1], own_logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(tokens[i : i + 1], own_tokens)


def test_several_new_tokens_at_once_equal_one_after_the_other(kit, model):
    layout = kit.layout_of(*ROWS)
    ids, new = kit.ids_for(layout), torch.tensor([[5, 6, 7]] * len(ROWS))
    results = []
    for chunks in ((1, 1, 1), (3,), (2, 1)):
        cache, start, logits = DynamicCache(), 0, []
        mask, positions = layout.attention_mask, layout.position_ids[:, -1:]
        with attach(model, AFTER), torch.no_grad():
            model(ids, token_layout=layout, past_key_values=cache)
            for size in chunks:
                mask = torch.cat([mask, mask.new_ones(len(ROWS), size)], dim=-1)
                where = positions + 1 + start + torch.arange(size)
                piece = new[:, start : start + size]
                out = model(piece, attention_mask=mask, position_ids=where, past_key_values=cache)
                logits.append(out.logits)
                start += size
        results.append(torch.cat(logits, dim=1))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-4)


def test_eager_attention_decodes_the_same(kit):
    layout = kit.layout_of(*ROWS)
    ids = kit.ids_for(layout)
    for plan in (AFTER, BEFORE):
        _, a, _ = decode(kit.make_model(attn_implementation="sdpa"), ids, layout, plan)
        _, b, _ = decode(kit.make_model(attn_implementation="eager"), ids, layout, plan)
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# --- generate ------------------------------------------------------------------------------------------------------


class Captioner(LlamaForCausalLM):
    """Builds the layout of the first call from ``token_kinds``, which ``generate`` repeats for beams by itself.

    ``generate`` makes position ids for left-padded rows only if forward names them.
    """

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, token_kinds=None, **kwargs
    ):
        if token_kinds is not None and past_key_values.get_seq_length() == 0:
            kwargs["token_layout"] = TokenLayout.from_kinds(token_kinds)
        return super().forward(input_ids, attention_mask, position_ids, past_key_values=past_key_values, **kwargs)


@pytest.mark.parametrize("plan", [AFTER, BEFORE])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate(kit, model, plan, num_beams):
    model.__class__ = Captioner
    layout = kit.layout_of(*ROWS)
    ids = kit.ids_for(layout)

    def generate(ids, layout):
        with attach(model, plan):
            return model.generate(
                ids, attention_mask=layout.attention_mask, token_kinds=layout.kinds, max_new_tokens=6,
                do_sample=False, num_beams=num_beams, pad_token_id=0,
            )[:, ids.shape[1] :]  # fmt: skip

    batched = generate(ids, layout)
    for i, row in enumerate(ROWS):
        alone = kit.layout_of(row.strip("."))
        assert torch.equal(batched[i : i + 1], generate(ids[i : i + 1, -alone.kinds.shape[1] :], alone))
    if num_beams == 1:
        assert torch.equal(batched, decode(model, ids, layout, plan, steps=6)[0])


# --- the cache by itself -------------------------------------------------------------------------------------------


def filled(batch, length, layers=2):
    cache = DynamicCache()
    for i in range(layers):
        cache.update(torch.randn(batch, 2, length, 3), torch.randn(batch, 2, length, 3), i)
    return cache


@settings(max_examples=40)
@given(st.data())
def test_evict_and_batch_operations_on_random_sets(data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    keep = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length),
                                           min_size=batch, max_size=batch)))  # fmt: skip
    cache = filled(batch, length)
    old = [layer.keys for layer in cache.layers]
    evict(cache, keep)
    new_keys = torch.randn(batch, 2, 1, 3)
    for i in range(2):
        cache.update(new_keys, new_keys, i)
    rows = torch.arange(batch)
    choice = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=5)))
    operation = data.draw(st.sampled_from(["none", "reorder_cache", "batch_select_indices", "batch_repeat_interleave"]))
    if operation == "batch_repeat_interleave":
        cache.batch_repeat_interleave(2)
        rows = rows.repeat_interleave(2)
    elif operation != "none":
        getattr(cache, operation)(choice)
        rows = choice
    mask = torch.ones(len(rows), length + 2)
    mask[0, 0] = mask[-1, -1] = 0  # the second is the new token itself, which must see itself all the same
    for i, layer in enumerate(cache.layers):
        assert layer.get_seq_length() == length + 1
        assert layer.get_max_length() == -1
        visible = visible_slots(layer, mask, 1)
        assert visible[:, 0, -1].all()
        for j, row in enumerate(rows):
            seen = layer.keys[j][:, visible[j, 0, :-1]]
            columns = [c for c in range(length) if keep[row, c] and mask[j, c]]
            assert torch.equal(seen, torch.cat([old[i][row][:, columns], new_keys[row]], dim=1))


def test_crop_and_reset():
    cache = filled(2, 5)
    evict(cache, torch.tensor([[1, 0, 0, 1, 1], [1, 0, 0, 0, 1]]).bool())
    layer = cache.layers[0]
    kept = layer.keys
    layer.update(torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3))
    assert (layer.get_seq_length(), layer.physical_length) == (8, 6)
    assert layer.get_mask_sizes(1) == (7, 2)
    layer.crop(-2)
    assert (layer.get_seq_length(), layer.physical_length) == (6, 4)
    layer.crop(5)
    assert torch.equal(layer.keys, kept)
    with pytest.raises(PlanError, match="cannot remove 1 tokens, only the 0 generated"):
        layer.crop(-1)
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3))
    assert layer.get_seq_length() == 4


def test_a_view_counts_with_the_memory_it_holds():
    cache = filled(1, 8, layers=1)
    full = bytes_held(cache)
    assert full == 2 * (2 * 8 * 3) * 4
    cache.layers[0].keys = cache.layers[0].keys[:, :, :2]
    assert bytes_held(cache) == full


# --- errors --------------------------------------------------------------------------------------------------------


def test_caches_that_cannot_evict_are_refused(kit, model):
    with pytest.raises(
        PlanError, match=r"a StaticCache cannot give up single tokens.*pass past_key_values=DynamicCache"
    ):
        check_evictable(StaticCache(config=model.config, max_cache_len=8))
    cache = filled(1, 4)
    evict(cache, torch.ones(1, 4, dtype=torch.bool))
    assert isinstance(cache.layers[1], EvictedLayer)
    cache.update(torch.randn(1, 2, 1, 3), torch.randn(1, 2, 1, 3), 0)
    with pytest.raises(PlanError, match="holds 5 positions, the eviction is for 4"):
        evict(cache, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(PlanError, match="holds 4 positions, the eviction is for 3"):
        evict(filled(1, 4), torch.ones(1, 3, dtype=torch.bool))


def test_prefill_errors(kit, model):
    layout = kit.layout_of("trst")
    ids = kit.ids_for(layout)
    with attach(model, AFTER):
        cache = DynamicCache()
        model(ids, token_layout=layout, past_key_values=cache)
        with pytest.raises(PlanError, match=r"attention_mask: has shape \(1, 4\); .* the full length, \(1, 5\)"):
            model(ids[:, :1], attention_mask=torch.ones(1, 4), past_key_values=cache)
        with pytest.raises(PlanError, match="needs an empty KV cache, this one holds 4 positions"):
            model(ids, token_layout=layout, past_key_values=cache)
        filled_cache = DynamicCache()
        model(ids[:, :2], past_key_values=filled_cache)
        with pytest.raises(PlanError, match="an empty KV cache, this one holds 2 positions"):
            model(ids, token_layout=layout, past_key_values=filled_cache)
        packed = kit.layout_of("trst", documents=[[0, 0, 1, 1]])
        with pytest.raises(PlanError, match="packed documents cannot be decoded"):
            model(ids, token_layout=packed, past_key_values=DynamicCache())
    model.config._attn_implementation = "flash_attention_2"
    with attach(model, AFTER, "sdpa"), pytest.raises(PlanError, match="'flash_attention_2' takes no mask"):
        model(ids, token_layout=packed)
    layout = kit.layout_of("trst", "tst.")
    with attach(model, BEFORE), pytest.raises(PlanError, match="row 1 ends with padding"):
        model(kit.ids_for(layout), token_layout=layout, use_cache=True)


def test_a_cache_nobody_asked_for_is_not_made(kit, model):
    """The configuration's default ``use_cache`` would fill, and evict from, a cache in every training step."""
    layout = kit.layout_of("trst")
    assert model.config.use_cache
    for plan, made in ((AFTER, False), (PLANS["vskip"], True)):
        with attach(model, plan):
            out = model(kit.ids_for(layout), token_layout=layout)
        assert (out.past_key_values is not None) == made
    with attach(model, AFTER):
        out = model(kit.ids_for(layout), token_layout=layout, use_cache=True)
    assert out.past_key_values.layers[0].physical_length == 3
