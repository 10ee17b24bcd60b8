"""Where a plan has to hold besides a plain forward: other caches, conversations, checkpointing, accelerators."""

from dataclasses import replace

import pytest
import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

from skipvision_train.errors import PlanError
from skipvision_train.plans import (
    LayerRule,
    SkipPlan,
    TokenKind,
    TokenLayout,
    attach,
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

STATIC = {
    "skip_ffn": skip_ffn(evict=()),
    "vskip": vskip([0, 2], bypass="norm"),
    "shortv": shortv([0, 1]),
}
DROPPING = {
    "vtw": vtw(1),
    "fastv": fastv(2, 0.5),
    "fastv, vskip": compose([fastv(1, 0.5), vskip([2], bypass="norm")]),
    "pyramiddrop": pyramiddrop((0, 2), (0.6, 0.3)),
    "sparsevlm": sparsevlm(layers=(0, 1), keep=(3, 2)),
    "sparsevlm+": sparsevlm(version=2, layers=(0, 1), keep=(3, 2)),
}
ROWS = ["ttrrssytrrt", "..trrssssst", ".......tttt"]

HAS_FP8 = "Fp8QuantizedLayer" in vars(cache_utils)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="this transformers has no quantised cache that runs on a CPU")


# --- no device is waited for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STATIC, *DROPPING, "eviction"])
def test_a_prefill_reads_no_value_of_a_device_tensor(kit, name):
    """On the meta device there are no values: asking for one, as a device synchronisation does, fails."""
    plan = {**STATIC, **DROPPING, "eviction": skip_ffn()}[name]
    model = kit.make_model().to("meta")
    # Rows of one length: transformers' own code looks at a padding mask (and, without a cache, at the positions).
    layout = kit.layout_of("ttrrssytrrt", "ttrrsssssst", "ttttttttttt")
    with attach(model, plan):
        ids = kit.ids_for(layout).to("meta")
        out = model(ids, token_layout=layout, past_key_values=DynamicCache())
    assert out.logits.shape == (*ids.shape, 40)
    with pytest.raises(RuntimeError):
        out.logits.sum().item()


# --- other caches --------------------------------------------------------------------------------------------------


def greedy(model, ids, layout, plan, cache, steps=4):
    """Logits (B, steps, V) of greedy decoding by hand."""
    mask, positions, logits = layout.attention_mask, layout.position_ids, []
    with attach(model, plan) as attachment, torch.no_grad():
        extra = {"token_layout": layout} if attachment.active else {}
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **extra)
        for _ in range(steps):
            logits.append(out.logits[:, -1])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            positions = positions[:, -1:] + 1
            token = logits[-1].argmax(-1)[:, None]
            out = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("name", STATIC)
def test_a_static_cache_holds_the_same(kit, model, name):
    layout = kit.layout_of(*ROWS)
    ids, plan = kit.ids_for(layout), STATIC[name]
    expected = greedy(model, ids, layout, plan, DynamicCache())
    got = greedy(model, ids, layout, plan, StaticCache(config=model.config, max_cache_len=32))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@needs_fp8
@pytest.mark.parametrize("name", STATIC)
def test_a_quantised_cache_is_used_as_stock_attention_uses_it(kit, name):
    """The prefill attends to exact keys, decoding to rounded ones: as under a plan that skips nothing."""
    model = kit.make_model()
    layout = kit.layout_of(*ROWS)
    ids, plan = kit.ids_for(layout), STATIC[name]
    exact = greedy(model, ids, layout, plan, DynamicCache())
    rounded = greedy(model, ids, layout, plan, QuantizedCache("fp8", model.config))
    assert torch.equal(rounded[:, 0], exact[:, 0])
    assert 1e-4 < (rounded[:, 1] - exact[:, 1]).abs().max() < 2.0


@pytest.mark.parametrize("plan", [vtw(1), fastv(1), skip_ffn()], ids=lambda plan: plan.name)
def test_caches_that_cannot_shrink_are_refused(kit, model, plan):
    layout = kit.layout_of("ttrrsst")
    caches = [StaticCache(config=model.config, max_cache_len=16)]
    caches += [QuantizedCache("fp8", model.config)] if HAS_FP8 else []
    for cache in caches:
        with (
            attach(model, plan),
            pytest.raises(PlanError, match=f"a {type(cache).__name__} cannot give up.*DynamicCache"),
        ):
            model(kit.ids_for(layout), token_layout=layout, past_key_values=cache)


# --- conversations: images onto a filled cache ---------------------------------------------------------------------


@pytest.mark.parametrize("name", STATIC)
def test_a_second_image_later_equals_the_whole_conversation(kit, model, name):
    whole, cut = kit.layout_of("ttrrssytttrsstt", "..ttrrsttttrsst"), 9
    ids, plan = kit.ids_for(whole), STATIC[name]
    expected = kit.logits_of(model, ids, whole, plan)
    cache, mask = DynamicCache(), whole.attention_mask
    with attach(model, plan), torch.no_grad():
        first, second = whole.columns(0, cut), whole.columns(cut, 15)
        model(ids[:, :cut], token_layout=first, past_key_values=cache)
        positions = second.position_ids
        got = model(
            ids[:, cut:], attention_mask=mask, position_ids=positions, token_layout=second, past_key_values=cache
        )
    torch.testing.assert_close(got.logits, expected[:, cut:], atol=2e-5, rtol=1e-4)


def test_a_second_image_is_refused_where_tokens_leave(kit, model):
    layout = kit.layout_of("ttrrsst")
    ids = kit.ids_for(layout)
    for plan in (vtw(1), skip_ffn(), compose([shortv([1]), skip_kv("small")])):
        cache = DynamicCache()
        with attach(model, plan), torch.no_grad():
            model(ids, token_layout=layout, past_key_values=cache)
            with pytest.raises(PlanError, match="needs an empty KV cache, this one holds 7 positions; start again"):
                model(ids, token_layout=layout, past_key_values=cache)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with attach(model, shortv([1])), torch.no_grad():
        model(ids, token_layout=layout, past_key_values=cache)
        with pytest.raises(PlanError, match="StaticCache that holds 7 positions cannot take more images"):
            model(ids, token_layout=layout, past_key_values=cache)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STATIC, *DROPPING])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(kit, name, reentrant):
    """Layers that are run again must drop what they dropped the first time."""
    plan = {**STATIC, **DROPPING}[name]
    layout = kit.layout_of(*ROWS)
    gradients = []
    for checkpointing in (False, True):
        model = kit.make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with attach(model, plan):
            logits = model(kit.ids_for(layout), token_layout=layout, use_cache=False).logits
            (logits.square() * layout.attention_mask[..., None]).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DROPPING)
def test_drops_take_part_in_autocast_and_bfloat16(kit, model, name):
    layout = kit.layout_of(*ROWS)
    ids, text = kit.ids_for(layout), layout.kinds == TokenKind.TEXT
    with torch.autocast("cpu", torch.bfloat16):
        mixed = kit.logits_of(model, ids, layout, DROPPING[name].bind(3))[text]
    half = kit.logits_of(model.bfloat16(), ids, layout, DROPPING[name].bind(3))[text]
    for rounded in (mixed, half):
        assert torch.isfinite(rounded).all()


# --- oracle 4 ------------------------------------------------------------------------------------------------------


def test_withdrawing_at_the_depth_is_dense_and_keeping_all_too(kit, model):
    layout = kit.layout_of(*ROWS)
    ids = kit.ids_for(layout)
    stock = kit.logits_of(model, ids, layout, dense().bind(3))
    assert vtw(3).bind(3).is_dense
    real = layout.kinds != TokenKind.PAD
    for plan in (fastv(1, 1.0), fastv(1, 99), pyramiddrop((1, 2), (1.0, 1.0)), sparsevlm(layers=(0,), keep=(99,))):
        assert torch.equal(kit.logits_of(model, ids, layout, plan.bind(3))[real], stock[real])


@pytest.mark.parametrize("layer", [1, 2])
def test_keeping_nothing_is_withdrawing(kit, model, layer):
    layout = kit.layout_of(*ROWS)
    ids = kit.ids_for(layout)
    a, b = (kit.logits_of(model, ids, layout, plan.bind(3)) for plan in (vtw(layer), fastv(layer, 0)))
    assert torch.equal(a, b)


def test_positions_alone_tell_two_policies_apart(kit, model):
    """With the same scores, kept and renumbered positions differ, and agree while nothing stands behind a gap."""
    layout = kit.layout_of("ttrrsstt")
    ids = kit.ids_for(layout)
    keep, renumber = (pyramiddrop((1,), (0.5,), positions=policy).bind(3) for policy in ("keep", "renumber"))
    a, b = (kit.logits_of(model, ids, layout, plan) for plan in (keep, renumber))
    assert torch.equal(a[:, :2], b[:, :2])
    assert (a - b)[:, -1].abs().max() > 1e-3


def test_renumbering_rejects_positions_of_several_dimensions(kit, model):
    layout = kit.layout_of("ttrrsstt")
    positions = layout.position_ids.expand(3, -1, -1)
    with attach(model, pyramiddrop((1,), (0.5,))), pytest.raises(PlanError, match=r"3 dimensions.*positions='keep'"):
        model(kit.ids_for(layout), position_ids=positions, token_layout=layout)


def test_registers_must_be_there(kit, model):
    plan = SkipPlan("victor", (LayerRule(),) * 3, drops=vtw(1).drops, registers=2)
    with attach(model, plan), torch.no_grad():
        model(kit.ids_for(kit.layout_of("trryyt", "...ttt")), token_layout=kit.layout_of("trryyt", "...ttt"))
        layout = kit.layout_of("ttttt", "trryt")
        with pytest.raises(PlanError, match=r"row 1 has an image and 1 registers.*the plan needs 2"):
            model(kit.ids_for(layout), token_layout=layout)


def test_a_documents_last_token_is_never_dropped(kit, model):
    """The next token is predicted from it, also where a prompt ends with an image."""
    layout = TokenLayout.from_kinds(torch.tensor([[0, 1, 1, 1]]))
    ids = kit.ids_for(layout)
    got = kit.logits_of(model, ids, layout, vtw(1).bind(3))
    torch.testing.assert_close(got, kit.slow_logits(model, ids, layout, vtw(1).bind(3)), atol=2e-5, rtol=1e-4)
    stock = kit.logits_of(model, ids, layout, dense().bind(3))
    assert (got - stock)[0, -1].abs().max() > 1e-3


# --- what nobody reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STATIC, *DROPPING])
def test_the_last_layer_computes_only_what_is_read(kit, model, name):
    plan, layout = {**STATIC, **DROPPING}[name].bind(3), kit.layout_of(*ROWS)
    ids, rows = kit.ids_for(layout), []
    read = layout.last_tokens() | ((layout.kinds == TokenKind.TEXT) & (layout.position_ids == 1))
    expected = kit.logits_of(model, ids, layout, plan)
    hook = model.model.layers[2].mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[-2]))
    got = kit.logits_of(model, ids, replace(layout, read=read), plan)
    hook.remove()
    torch.testing.assert_close(got[read], expected[read], atol=2e-6, rtol=1e-5)
    assert rows == [int(read.sum())]
