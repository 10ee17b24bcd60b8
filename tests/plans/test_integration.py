"""The executor among the things transformers does around it: keywords, checkpointing, dtypes, backends, families."""

import inspect

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache

from skipvision_train.plans import TokenKind, attach, compose, dense, shortv, skip_ffn, vskip

IMAGE_IN_TEXT = "ttrryssyttt"
MIXED = compose([vskip([1]), skip_ffn(evict=())]).bind(3)


def text(layout):
    return layout.kinds == TokenKind.TEXT


def test_transformers_hands_unknown_keywords_to_the_layers(kit, model):
    """The executor relies on it. Should this fail after an update, the index tensors need another way."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs.get("unheard_of")), with_kwargs=True)
        for layer in model.model.layers
    ]
    model(kit.ids_for(kit.layout_of("ttt")), unheard_of="x", use_cache=False)
    for hook in hooks:
        hook.remove()
    assert seen == ["x"] * 3


def test_the_wrapped_forward_has_the_stock_order_of_arguments(kit, model):
    stock = list(inspect.signature(type(model.model).forward).parameters)[1:]
    with attach(model, vskip([0]).bind(3)):
        ours = list(inspect.signature(model.model.forward).parameters)
    assert ours[: len(stock) - 1] == stock[:-1]


# Deprecated in transformers 5.23, but the only name that 5.17 knows.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", [MIXED, vskip([0, 1], bypass="norm").bind(3)])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(kit, model, plan, reentrant):
    layout = kit.layout_of(IMAGE_IN_TEXT, "...ttrsrstt")
    ids = kit.ids_for(layout)

    def gradients():
        model.zero_grad()
        calls = []
        hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        with attach(model, plan):
            labels = ids.masked_fill(layout.kinds != TokenKind.TEXT, -100)
            model(ids, token_layout=layout, labels=labels).loss.backward()
        hook.remove()
        return len(calls), [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    plain_calls, plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls, checkpointed = gradients()
    assert (plain_calls, calls) == (1, 2)
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_no_cache_while_checkpointing(kit, model):
    """transformers drops the cache then; evicting from it would fail."""
    layout = kit.layout_of(IMAGE_IN_TEXT)
    model.train()
    model.gradient_checkpointing_enable()
    for plan in (skip_ffn().bind(3), skip_ffn(evict_when="before_first_token").bind(3)):
        with attach(model, plan):
            out = model(kit.ids_for(layout), token_layout=layout, use_cache=True, past_key_values=DynamicCache())
        assert out.past_key_values is None


def test_attention_dropout_acts_in_training_only(kit):
    model = kit.make_model(attention_dropout=0.5)
    layout = kit.layout_of(IMAGE_IN_TEXT)
    ids, plan = kit.ids_for(layout), vskip([0, 1, 2]).bind(3)
    assert torch.equal(*(kit.logits_of(model, ids, layout, plan) for _ in range(2)))
    model.train()
    assert not torch.equal(*(kit.logits_of(model, ids, layout, plan) for _ in range(2)))


def test_bfloat16_and_autocast(kit, model):
    layout = kit.layout_of(IMAGE_IN_TEXT, "...ttrsrstt")
    ids = kit.ids_for(layout)
    exact = kit.logits_of(model, ids, layout, MIXED)[text(layout)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = kit.logits_of(model, ids, layout, MIXED)[text(layout)]
    half = kit.logits_of(model.bfloat16(), ids, layout, MIXED)[text(layout)]
    for rounded in (mixed, half):
        assert (rounded.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(kit, implementation):
    layout = kit.layout_of("ttrstrrst", ".........", documents=[[0] * 5 + [1] * 4, [0] * 9])
    ids = kit.ids_for(layout)
    model = kit.make_model(attn_implementation=implementation)
    real = layout.kinds != TokenKind.PAD
    got = kit.logits_of(model, ids, layout, vskip([1]).bind(3))[real]
    torch.testing.assert_close(got, kit.slow_logits(model, ids, layout, vskip([1]).bind(3))[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [(MistralConfig, MistralForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)],
)
def test_other_families(kit, config_class, model_class):
    """The gathered code equals the stock code: the last layer changes no text, and skipping only padding nothing."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, sliding_window=None, attn_implementation="sdpa",
    )  # fmt: skip
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    layout = kit.layout_of("ttrrssttt", ".trsttrst")
    ids = kit.ids_for(layout)
    stock = kit.logits_of(model, ids, layout, dense().bind(2))
    last = kit.logits_of(model, ids, layout, shortv([1]).bind(2))
    torch.testing.assert_close(last[text(layout)], stock[text(layout)], atol=5e-6, rtol=1e-5)
    assert (kit.logits_of(model, ids, layout, vskip([0]).bind(2)) - stock)[text(layout)].abs().max() > 1e-2


def test_qwen2_5_vl_decoder_with_positions_in_three_dimensions(kit):
    torch.manual_seed(0)
    config = Qwen2_5_VLTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
    )  # fmt: skip
    decoder = Qwen2_5_VLTextModel(config).eval()
    layout = kit.layout_of("ttrrssttt", ".trsttrst")
    call = {"inputs_embeds": decoder.embed_tokens(kit.ids_for(layout)), "use_cache": False}
    call["position_ids"] = torch.stack([layout.position_ids, layout.position_ids // 2, layout.position_ids % 3])
    stock = decoder(**call, attention_mask=layout.attention_mask).last_hidden_state[text(layout)]
    for plan, changes in ((shortv([1]).bind(2), False), (shortv([0]).bind(2), True)):
        with attach(decoder, plan):
            got = decoder(**call, token_layout=layout).last_hidden_state[text(layout)]
        assert ((got - stock).abs().max() > 1e-5) == changes
