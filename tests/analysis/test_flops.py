"""FLOPs by hand and against torch's own counter, which watches the executor."""

from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_flops import forward_counter
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from skipvision_train.analysis import flops
from skipvision_train.analysis.geometry import load_geometry, text_config
from skipvision_train.errors import PlanError
from skipvision_train.plans import (
    LayerRule,
    TokenKind,
    TokenLayout,
    attach,
    bytes_held,
    compose,
    dense,
    fastv,
    ffn_skip,
    pyramiddrop,
    shortv,
    skip_ffn,
    skip_kv,
    sparsevlm,
    victor,
    vskip,
    vtw,
)

LLAMA3_8B = text_config(load_geometry("llama3_8b"))


def _counted(module, *args, **kwargs):
    with forward_counter(module.model.rotary_emb) as counter, torch.no_grad():
        module(*args, **kwargs)
    return counter.get_flop_counts()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_prefill_agrees_with_the_counter_of_torch(text_config_factory, kv_heads):
    config = text_config_factory()
    config.num_key_value_heads = kv_heads
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    length = 23
    counts = _counted(model, torch.randint(4, 300, (1, length)), use_cache=False, logits_to_keep=1)
    layers = {name: sum(ops.values()) for name, ops in counts.items() if name.count(".") == 3 and ".layers." in name}
    assert len(layers) == config.num_hidden_layers

    expected = flops.sequence_flops(config, {TokenKind.TEXT: length, TokenKind.PAD: 7}, dense().bind(3))
    assert list(layers.values()) == [layer.total for layer in expected.layers]
    assert sum(counts["LlamaForCausalLM.lm_head"].values()) == flops.lm_head_flops(config)


KINDS = "ttt rrr mm ssssss yy tttt"
LETTERS = {
    "t": TokenKind.TEXT,
    "r": TokenKind.RETAINED,
    "m": TokenKind.MIDDLE,
    "s": TokenKind.SKIPPED,
    "y": TokenKind.SUMMARY,
}
COUNTED_PLANS = {
    "dense": dense(),
    "skip_ffn": skip_ffn(),
    "vskip": vskip([0, 2]),
    "vskip_norm": vskip([1], bypass="norm"),
    "vskip_of_some": vskip([1], kinds=frozenset({TokenKind.SKIPPED})),
    "ffn_skip": ffn_skip([1]),
    "shortv": shortv([0, 1, 2]),
    "skip_ffn + vskip": compose([skip_ffn(), vskip([1])]),
    "vtw": vtw(1),
    "vtw_0": vtw(0),
    "victor": victor(2, 2),
    "fastv": fastv(2, 0.5),
    "fastv_1": fastv(1, 3),
    "fastv_of_some": fastv(1, 2, kinds=frozenset({TokenKind.SKIPPED})),
    "fastv_keeps_all": fastv(1, 1.0),
    "fastv + vskip": compose([fastv(1, 4), vskip([1, 2])]),
    "fastv + shortv": compose([fastv(1, 4), shortv([0, 2])]),
    "pyramiddrop": pyramiddrop((1, 2), (0.5, 0.25)),
    "pyramiddrop_0": pyramiddrop((0, 2), (0.6, 0.3), positions="keep"),
    "sparsevlm_once": sparsevlm(layers=(0,), keep=(6,)),
    "sparsevlm": sparsevlm(layers=(0, 1), keep=(8, 4)),
    "sparsevlm+_once": sparsevlm(version=2, layers=(1,), keep=(0.5,)),
    "sparsevlm+": sparsevlm(version=2, layers=(0, 1), keep=(6, 3)),
}


def _kinds(letters):
    return [LETTERS[letter] for letter in letters.replace(" ", "")]


@pytest.mark.parametrize("plan", COUNTED_PLANS.values(), ids=COUNTED_PLANS)
def test_plans_agree_with_the_counter_of_torch(text_config_factory, plan):
    """Layer by layer what the executor really multiplies; the raters are sought in the first layer's forward."""
    config, kinds = text_config_factory(), _kinds(KINDS)
    torch.manual_seed(0)
    model, plan = LlamaForCausalLM(config).eval().requires_grad_(False), plan.bind(3)
    ids = torch.randint(4, 300, (1, len(kinds)))
    with attach(model, plan) as attachment, sdpa_kernel(SDPBackend.MATH):
        layout = TokenLayout.from_kinds(torch.tensor([[int(kind) for kind in kinds]]))
        given = {"token_layout": layout} if attachment.active else {}
        counts = _counted(model, ids, use_cache=False, logits_to_keep=1, **given)
    layers = [sum(ops.values()) for name, ops in counts.items() if name.count(".") == 3 and ".layers." in name]

    expected = flops.sequence_flops(config, Counter(kinds), plan, asking=4)
    totals = [layer.total for layer in expected.layers]
    totals[0] += expected.raters
    assert layers == pytest.approx(totals, rel=1e-12)


def test_skipped_kinds_cost_keys_and_values_only(tiny_text_config):
    """One skipped token more or less changes K, V and the width of the others' attention rows, nothing else."""
    rule = shortv([0]).bind(1).rules[0]
    base = {TokenKind.TEXT: 10, TokenKind.RETAINED: 5}
    more = {TokenKind.TEXT: 10, TokenKind.RETAINED: 6}
    a, b = (flops.layer_flops(tiny_text_config, counts, rule) for counts in (base, more))
    assert b.projections - a.projections == 2 * 32 * (2 * 16)
    assert b.attention - a.attention == 4 * 10 * 32
    assert b.ffn == a.ffn == 6 * 10 * 32 * 48


def test_dropped_tokens_cost_nothing_and_ranking_has_its_price(tiny_text_config):
    """Every number written out: 10 text tokens, 8 visual ones of which 4 and then 2 stay, one asking row."""
    counts = {TokenKind.TEXT: 10, TokenKind.RETAINED: 4, TokenKind.SKIPPED: 4}
    found = flops.sequence_flops(tiny_text_config, counts, pyramiddrop((1, 2), (0.5, 0.25)).bind(3))
    whole = flops.sequence_flops(tiny_text_config, counts, dense().bind(3))
    assert [layer.ffn for layer in found.layers] == [6 * n * 32 * 48 for n in (18, 14, 12)]
    assert [layer.attention for layer in found.layers] == [4 * n * n * 32 for n in (18, 14, 12)]
    # By the layer's own weights, over what was live before its drop.
    ranking = [2 * n * 32 * 16 + 2 * 32 * 32 + 2 * n * 32 for n in (18, 14)]
    assert [layer.score for layer in found.layers] == [0, *ranking]
    assert found.layers[0] == whole.layers[0]
    assert found.raters == whole.raters == 0


def test_raters_are_sought_once_and_ask_at_every_drop(tiny_text_config):
    """SparseVLM with recycling: 20 visual tokens, 10 stay and 1 is made of the others, then 5 and 1."""
    counts = {TokenKind.TEXT: 10, TokenKind.SKIPPED: 20}
    plan = sparsevlm(layers=(0, 1), keep=(10, 5)).bind(3)
    found = flops.sequence_flops(tiny_text_config, counts, plan, asking=6)
    assert [layer.ffn for layer in found.layers] == [6 * n * 32 * 48 for n in (30, 21, 16)]
    ranking = [2 * n * 32 * 16 + 2 * 6 * 32 * 32 + 2 * 6 * n * 32 for n in (30, 21)]
    assert [layer.score for layer in found.layers] == [*ranking, 0]
    assert found.raters == 2 * 20 * 6 * 32
    all_ask = flops.sequence_flops(tiny_text_config, counts, plan)
    assert all_ask.raters == 2 * 20 * 10 * 32
    assert found.total == sum(layer.total for layer in found.layers) + found.raters


@pytest.mark.parametrize("plan", [fastv(1, 1.0), fastv(1, 9), sparsevlm(layers=(0, 1), keep=(8, 8))])
def test_nothing_is_ranked_where_nothing_leaves(tiny_text_config, plan):
    counts = {TokenKind.TEXT: 10, TokenKind.RETAINED: 8}
    whole = flops.sequence_flops(tiny_text_config, counts, dense().bind(3))
    assert flops.sequence_flops(tiny_text_config, counts, plan.bind(3)) == whole


def test_kinds_that_are_ranked_together_stay_whole_together(tiny_text_config):
    """4 of 2 + 7 + 1 are fractions of each, in floats a little over 4; a second drop to 4 still ranks nothing."""
    counts = {TokenKind.TEXT: 5, TokenKind.RETAINED: 2, TokenKind.SKIPPED: 7, TokenKind.MIDDLE: 1}
    once, twice = (pyramiddrop(layers, (4,) * len(layers)).bind(3) for layers in ((1,), (1, 2)))
    found = flops.sequence_flops(tiny_text_config, counts, twice)
    assert found == flops.sequence_flops(tiny_text_config, counts, once)
    assert found.layers[2].ffn == pytest.approx(6 * 9 * 32 * 48, rel=1e-12)


@pytest.mark.parametrize("silent", ["", "s", "rms", "yrms"])
@pytest.mark.parametrize("letters", [KINDS, "tttt", "ttt rr tttt", "ssss tt", "t yy"])
def test_causal_attention_counts_the_visible_pairs(tiny_text_config, letters, silent):
    """Against the causal mask itself, row by row."""
    kinds, off = _kinds(letters), frozenset(LETTERS[letter] for letter in silent)
    visible = TokenLayout.from_kinds(torch.tensor([[int(kind) for kind in kinds]])).visible()[0]
    pairs = int(visible[torch.tensor([kind not in off for kind in kinds])].sum())
    before = next((i for i, kind in enumerate(kinds) if kind is not TokenKind.TEXT), len(kinds))
    rule = LayerRule(no_attention=off)
    full = flops.layer_flops(tiny_text_config, Counter(kinds), rule)
    causal = flops.layer_flops(tiny_text_config, Counter(kinds), rule, causal=True, text_before=before)
    assert causal.attention == 4 * pairs * 32
    assert (causal.projections, causal.ffn) == (full.projections, full.ffn)


def test_causal_count_of_a_sequence(tiny_text_config):
    """Dropping and causality together; more text before the image than there is text counts as all of it."""
    counts = {TokenKind.TEXT: 10, TokenKind.RETAINED: 8}
    found = flops.sequence_flops(tiny_text_config, counts, vtw(1).bind(2 + 1), causal=True)
    assert [layer.attention for layer in found.layers] == [4 * n * (n + 1) // 2 * 32 for n in (18, 10, 10)]
    silent = vskip([0, 1, 2]).bind(3)
    late, early = (
        flops.sequence_flops(tiny_text_config, counts, silent, causal=True, text_before=before).layers[0].attention
        for before in (99, 4)
    )
    assert late == 4 * 32 * 10 * 11 / 2  # no text behind the image sees it
    assert early - late == 4 * 32 * 6 * 8


def test_decode_step_agrees_with_the_counter_of_torch(tiny_text_config):
    tiny_text_config._attn_implementation = "eager"
    model = LlamaForCausalLM(tiny_text_config).eval()
    with torch.no_grad():
        cache = model(torch.randint(4, 300, (1, 9)), use_cache=True).past_key_values
    counts = _counted(model, torch.randint(4, 300, (1, 1)), past_key_values=cache)
    layers = [sum(ops.values()) for name, ops in counts.items() if name.count(".") == 3 and ".layers." in name]
    expected = flops.decode_flops(tiny_text_config, {TokenKind.TEXT: 9}, dense().bind(3))
    assert layers == [layer.total for layer in expected.layers]


def test_eviction_shrinks_cache_and_decode():
    counts = {TokenKind.TEXT: 60, TokenKind.RETAINED: 273, TokenKind.SUMMARY: 2, TokenKind.SKIPPED: 255}
    assert flops.kv_cache_bytes(LLAMA3_8B, counts, dense().bind(32)) == 590 * 32 * 2 * 1024 * 2
    assert flops.kv_cache_bytes(LLAMA3_8B, counts, skip_ffn().bind(32)) == 335 * 32 * 2 * 1024 * 2
    saved = (
        flops.decode_flops(LLAMA3_8B, counts, dense().bind(32)).total
        - flops.decode_flops(LLAMA3_8B, counts, skip_ffn().bind(32)).total
    )
    assert saved == 32 * 4 * 255 * 4096


def test_drops_shrink_cache_and_decode_of_later_layers(tiny_text_config):
    counts = {TokenKind.TEXT: 10, TokenKind.RETAINED: 4, TokenKind.SKIPPED: 4}
    plan = compose([fastv(1, 4), skip_kv()]).bind(3)  # of the 4 that stay, 2 are taken to be skipped ones
    held = [14, 12, 12]
    assert flops.kv_cache_bytes(tiny_text_config, counts, plan, 4) == 2 * sum(held) * 16 * 4
    decode = flops.decode_flops(tiny_text_config, counts, plan, step=3)
    assert [layer.attention for layer in decode.layers] == [4 * (n + 3) * 32 for n in held]
    assert [layer.ffn for layer in decode.layers] == [6 * 32 * 48] * 3


@pytest.mark.parametrize("name", ["dense", "skip_ffn", "vtw", "fastv", "pyramiddrop", "sparsevlm", "sparsevlm+"])
def test_cache_and_decode_agree_with_the_executor(text_config_factory, name):
    config, kinds, plan = text_config_factory(), _kinds(KINDS), COUNTED_PLANS[name].bind(3)
    torch.manual_seed(0)
    model, cache = LlamaForCausalLM(config).eval().requires_grad_(False), DynamicCache()
    with attach(model, plan) as attachment, torch.no_grad():
        layout = TokenLayout.from_kinds(torch.tensor([[int(kind) for kind in kinds]]))
        given = {"token_layout": layout} if attachment.active else {}
        model(torch.randint(4, 300, (1, len(kinds))), past_key_values=cache, use_cache=True, **given)
        held = bytes_held(cache)
        with sdpa_kernel(SDPBackend.MATH):
            counts = _counted(
                model, torch.randint(4, 300, (1, 1)), past_key_values=cache, position_ids=torch.tensor([[20]])
            )
    layers = [sum(ops.values()) for op, ops in counts.items() if op.count(".") == 3 and ".layers." in op]
    assert held == flops.kv_cache_bytes(config, Counter(kinds), plan, bytes_per_value=4)
    assert layers == [layer.total for layer in flops.decode_flops(config, Counter(kinds), plan).layers]


def test_plan_of_another_depth_is_refused(tiny_text_config):
    with pytest.raises(PlanError, match="5 layers, the model has 3"):
        flops.sequence_flops(tiny_text_config, {TokenKind.TEXT: 4}, dense().bind(5))
