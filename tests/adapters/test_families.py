"""Plans on every supported family, with the family's own processor: several images of different sizes, left padding."""

import pytest
import torch

from skipvision_train.adapters import apply
from skipvision_train.errors import PlanError
from skipvision_train.plans import (
    TokenKind,
    compose,
    dense,
    fastv,
    ffn_skip,
    pyramiddrop,
    shortv,
    skip_ffn,
    skip_kv,
    sparsevlm,
    vskip,
    vtw,
)

STATIC = {
    "vskip": vskip([0, 2]),
    "vskip_norm": vskip([0, 1], bypass="norm"),
    "ffn_skip": ffn_skip([1]),
    "shortv": shortv([1]),
    "skip_ffn_only": skip_ffn(evict=()),
    "vskip_and_skip_ffn": compose([vskip([1]), skip_ffn(evict=())]),
    "vtw": vtw(1),
    "shortv_and_vtw": compose([shortv([0]), vtw(2)]),
}
EVICTING = {
    "skip_ffn": skip_ffn(),
    "before_first_token": compose([shortv([1]), skip_ffn(evict_when="before_first_token")]),
    "skip_kv": skip_kv("all but summary"),
    "vskip_and_skip_kv": compose([vskip([0], bypass="norm"), skip_kv()]),
}
RANKED = {
    "fastv": fastv(1, 0.5),
    "fastv_count": fastv(2, 3),
    "pyramiddrop": pyramiddrop(layers=(1,), keep=(0.5,), positions="keep"),
    "pyramiddrop_twice": pyramiddrop(layers=(0, 2), keep=(0.5, 0.25), positions="keep"),
    "sparsevlm+": sparsevlm(version=2, layers=(0,), keep=(0.5,)),
    "fastv_and_vskip": compose([fastv(1, 0.5), vskip([2])]),
    "fastv_and_skip_ffn": compose([fastv(1, 0.5, kinds=frozenset({TokenKind.SKIPPED})), skip_ffn()]),
}
RENUMBERING = {
    "pyramiddrop_renumber": pyramiddrop(layers=(1, 2), keep=(0.5, 0.25)),
    "sparsevlm": sparsevlm(layers=(0,), keep=(0.5,)),
    "sparsevlm_and_skip_kv": compose([sparsevlm(layers=(0,), keep=(3,)), skip_kv()]),
}
PLANS = {**STATIC, **EVICTING, **RANKED, **RENUMBERING}
MROPE_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def bound(plan, kit):
    return plan.bind(kit.layers)


@torch.no_grad()
def logits_of(family, inputs, plan):
    with apply(family.model, plan):
        return family.model(**inputs, use_cache=False).logits


def generate(family, inputs, plan, tokens=4):
    """Generated ids (B, tokens) and their logits (B, tokens, V)."""
    with apply(family.model, plan):
        out = family.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return out.sequences[:, -tokens:], torch.stack(out.logits, dim=1)


def text_positions(family, inputs):
    return (inputs["input_ids"] != family.image_token_id) & inputs["attention_mask"].bool()


# --- invariants ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_dense_plan_changes_no_bit_and_no_attribute(family, kit):
    inputs = family.inputs(0, 1, 2)
    stock = family.model(**inputs).logits
    before = kit.state_of(family.model)
    with apply(family.model, dense()):
        assert kit.state_of(family.model) == before
        assert torch.equal(family.model(**inputs).logits, stock)


@pytest.mark.parametrize("plan", PLANS)
def test_batches_without_images_run_stock_code(family, plan):
    inputs = family.inputs(2)
    with torch.no_grad():
        stock = family.model(**inputs, use_cache=False).logits
    assert torch.equal(logits_of(family, inputs, PLANS[plan]), stock)


@pytest.mark.parametrize("make", [vskip, ffn_skip, shortv, lambda layers: vskip(layers, bypass="norm")])
def test_the_last_layer_of_images_is_never_read_and_others_are(family, kit, make):
    inputs = family.inputs(0, 1, 2)
    text = text_positions(family, inputs)
    stock = logits_of(family, inputs, dense())
    last = logits_of(family, inputs, make([kit.layers - 1]))
    torch.testing.assert_close(last[text], stock[text], atol=1e-5, rtol=0)
    assert (last - stock)[inputs["input_ids"] == family.image_token_id].abs().max() > 1e-2
    middle = logits_of(family, inputs, make([1]))
    after_image = text & (inputs["input_ids"] == family.image_token_id).cumsum(-1).bool()
    assert ((middle - stock)[after_image].abs().amax(-1) > 1e-4).all()
    torch.testing.assert_close(middle[text & ~after_image], stock[text & ~after_image], atol=1e-5, rtol=0)


@pytest.mark.parametrize("plan", STATIC)
def test_logits_equal_the_slow_reference(family, kit, plan):
    inputs = family.inputs(0, 1, 2)
    text = text_positions(family, inputs)
    expected = kit.slow_logits(family, inputs, STATIC[plan].bind(kit.layers))
    torch.testing.assert_close(logits_of(family, inputs, STATIC[plan])[text], expected[text], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_batched_equals_one_by_one(family, name, plan):
    if name in MROPE_FAMILIES and plan in RENUMBERING:
        with pytest.raises(PlanError, match="positions"):
            generate(family, family.inputs(0), PLANS[plan])
        return
    ids, logits = generate(family, family.inputs(0, 1, 2), PLANS[plan])
    for row in range(3):
        own_ids, own_logits = generate(family, family.inputs(row), PLANS[plan])
        torch.testing.assert_close(logits[row], own_logits[0], atol=5e-5, rtol=1e-4)
        assert torch.equal(ids[row], own_ids[0])


@pytest.mark.parametrize("plan", {**EVICTING, **RANKED})
def test_dropping_and_evicting_change_what_images_say(family, plan):
    inputs = family.inputs(0)
    _, stock = generate(family, inputs, dense())
    _, changed = generate(family, inputs, PLANS[plan])
    assert (changed - stock)[0, 1].abs().max() > 1e-3


# --- leaving no trace ----------------------------------------------------------------------------------------------


def test_detach_restores_the_model_after_an_exception(family, kit):
    inputs = family.inputs(0, 1, 2)
    plan = compose([vskip([0]), skip_ffn()])
    with torch.no_grad():
        stock = family.model(**inputs).logits
    before, names = kit.state_of(family.model), list(family.model.state_dict())

    with pytest.raises(RuntimeError, match="inside the block"), apply(family.model, plan):  # noqa: PT012
        assert kit.state_of(family.model) != before
        assert list(family.model.state_dict()) == names
        raise RuntimeError("inside the block")
    assert kit.state_of(family.model) == before

    def broken(module, args):
        raise RuntimeError("inside a layer")

    handle = family.decoder.layers[1].mlp.register_forward_pre_hook(broken)
    applied = apply(family.model, plan)
    with pytest.raises(RuntimeError, match="inside a layer"):
        family.model(**inputs)
    handle.remove()
    assert not torch.equal(family.model(**inputs).logits, stock)
    applied.detach()
    applied.detach()
    assert kit.state_of(family.model) == before
    with torch.no_grad():
        assert torch.equal(family.model(**inputs).logits, stock)


# --- training ------------------------------------------------------------------------------------------------------


# Its new name does not exist in the oldest supported transformers.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated:FutureWarning")
@pytest.mark.parametrize("plan", ["vskip_and_skip_ffn", "fastv_and_vskip", "skip_ffn"])
def test_gradients_with_and_without_checkpointing_agree(kit, name, plan):
    family = kit.make_family(name)
    inputs = family.inputs(0, 1, 2, padding_side="right")
    text = text_positions(family, inputs)
    inputs["labels"] = inputs["input_ids"].where(text & (text.cumsum(-1) > 1), -100)
    family.model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            family.model.gradient_checkpointing_enable({"use_reentrant": False})
        family.model.zero_grad()
        with apply(family.model, PLANS[plan]):
            family.model(**inputs).loss.backward()
        gradients.append({key: p.grad.clone() for key, p in family.model.named_parameters() if p.grad is not None})
    assert any("layers.0.self_attn.q_proj" in key for key in gradients[0])
    assert any("vision" in key or "visual" in key for key in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-7, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
