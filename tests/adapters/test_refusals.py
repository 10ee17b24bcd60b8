"""What ``apply`` and a model under a plan refuse, and that a refusal leaves no trace."""

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from skipvision_train.adapters import apply
from skipvision_train.errors import PlanError
from skipvision_train.plans import compose, dense, ffn_skip, skip_ffn, victor, vskip, vtw

IMAGE = 5
STATIC = compose([vskip([0, 2], bypass="norm"), ffn_skip([1])])


def test_models_that_cannot_run_a_plan(kit):
    gemma = GemmaForCausalLM(GemmaConfig(**{**kit.text, "head_dim": 8}))
    with pytest.raises(PlanError, match=r"GemmaForCausalLM has no decoder of the LLaMA shape.*known families llama"):
        apply(gemma, STATIC)
    with pytest.raises(PlanError, match="Linear has no decoder"):
        apply(torch.nn.Linear(2, 2), STATIC)


@pytest.mark.parametrize(
    ("plan", "arguments", "message"),
    [
        (STATIC, {}, "configuration of LlamaForCausalLM names no image token; pass image_token_id"),
        (STATIC, {"image_token_id": []}, "names no image token"),
        (STATIC, {"image_token_id": 42}, "image_token_id: 42 is outside the vocabulary of 42 tokens"),
        (STATIC, {"image_token_id": [5, -1]}, "image_token_id: -1 is outside"),
        (STATIC, {"image_token_id": 5, "register_token_id": 42}, "register_token_id: 42 is outside"),
        (victor(1, 4), {"image_token_id": 5}, "'victor': needs 4 learned registers .* pass register_token_id"),
        (skip_ffn(["retained"], evict=()), {"image_token_id": 5}, "no_ffn of layer 0 concerns only retained tokens"),
        (skip_ffn(evict=["summary"]), {"image_token_id": 5}, "evict concerns only summary tokens, which Llama"),
        (vskip([1], kinds=["middle"]), {"image_token_id": 5}, "no_attention of layer 1 concerns only middle"),
        (vtw(1, kinds=["retained"]), {"image_token_id": 5}, "the drop at layer 1 concerns only retained"),
        (vskip([3]), {"image_token_id": 5}, r"layers \[3\] do not exist; the model has layers 0 to 2"),
        (vskip([0]).bind(4), {"image_token_id": 5}, "has 4 layers, the model has 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(lm, kit, plan, arguments, message):
    before = kit.state_of(lm)
    with pytest.raises(PlanError, match=message):
        apply(lm, plan, **arguments)
    assert kit.state_of(lm) == before


def test_a_configured_token_outside_the_vocabulary(kit):
    model = kit.make_family("llava").model
    model.config.image_token_index = 32000
    with pytest.raises(PlanError, match=r"config.image_token_id: 32000 is outside the vocabulary of 42"):
        apply(model, STATIC)


def test_a_plan_while_another_is_attached(llava, kit):
    with apply(llava.model, STATIC):
        inside = kit.state_of(llava.model)
        for plan in (vtw(1), dense()):
            with pytest.raises(PlanError, match="is attached to this model; detach it first"):
                apply(llava.model, plan)
        assert kit.state_of(llava.model) == inside
    apply(llava.model, vtw(1)).detach()


def test_attention_implementations(kit):
    model = kit.make_family("llava").model
    model.model.language_model.config._attn_implementation = "flex_attention"
    for plan in (skip_ffn(), vtw(1)):
        with pytest.raises(PlanError, match=r"'flex_attention' takes no mask.*attn_implementation='sdpa' or 'eager'"):
            apply(model, plan)
    apply(model, STATIC).detach()
    model.model.language_model.config._attn_implementation = "eager"
    apply(model, skip_ffn()).detach()


def test_calls_that_say_too_little(llava, lm):
    inputs = llava.inputs(0)
    padded = llava.inputs(0, 1)
    embeds = llava.model.get_input_embeddings()(inputs["input_ids"])
    with apply(llava.model, STATIC):
        with pytest.raises(PlanError, match="images are given, but input_ids nowhere hold 2"):
            llava.model(input_ids=torch.tensor([[12, 13]]), pixel_values=inputs["pixel_values"])
        with pytest.raises(PlanError, match="inputs_embeds: embeddings do not say"):
            llava.model(inputs_embeds=embeds)
        with pytest.raises(PlanError, match=r"attention_mask: found \(1, 1, 3, 3\)"):
            llava.model(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))
        with pytest.raises(PlanError, match="no static cache"):
            llava.model.generate(**padded, max_new_tokens=2, cache_implementation="static", disable_compile=True)
        llava.model(**inputs)
        with pytest.raises(PlanError, match="LlamaModel was called without LlavaForConditionalGeneration"):
            llava.decoder(inputs_embeds=embeds)
    text = torch.tensor([[20, 21]])
    with apply(lm, STATIC, image_token_id=IMAGE), pytest.raises(PlanError, match="text_only=True"):
        lm(text)
    with torch.no_grad(), apply(lm, STATIC, image_token_id=IMAGE, text_only=True):
        under_plan = lm(text).logits
    assert torch.equal(under_plan, lm(text).logits)
