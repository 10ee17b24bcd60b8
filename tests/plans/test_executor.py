"""The executor against stock transformers and against its own invariants."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from skipvision_train.errors import PlanError
from skipvision_train.plans import (
    Drop,
    LayerRule,
    SkipPlan,
    TokenKind,
    TokenLayout,
    attach,
    compose,
    dense,
    fastv,
    ffn_skip,
    find_decoder,
    pyramiddrop,
    shortv,
    skip_ffn,
    vskip,
    vtw,
)
from skipvision_train.plans.attention import put_rows
from skipvision_train.plans.stages import Census, LiveTokens, select_queries

IMAGE_IN_TEXT = "ttrryssyttt"
PLANS = {
    "skip_ffn": skip_ffn(evict=()).bind(3),
    "vskip": vskip([0, 2]).bind(3),
    "vskip_norm": vskip([0, 1], bypass="norm").bind(3),
    "ffn_skip": ffn_skip([1]).bind(3),
    "shortv": shortv([0, 1, 2]).bind(3),
    "mixed": compose([vskip([1]), skip_ffn(evict=())]).bind(3),
}


def text(layout):
    return layout.kinds == TokenKind.TEXT


# --- oracle 1: nothing to skip is the stock model ------------------------------------------------------------------


def test_dense_plan_attaches_nothing(kit, model):
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with attach(model, dense().bind(3)) as attachment:
        assert not attachment.active
        assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name", PLANS)
def test_kinds_not_in_the_batch_change_no_bit(kit, model, name):
    layout = kit.layout_of("tttttyt", "..ttttt")
    ids = kit.ids_for(layout)
    stock = model(ids, attention_mask=layout.attention_mask, position_ids=layout.position_ids, use_cache=False).logits
    assert torch.equal(kit.logits_of(model, ids, layout, PLANS[name]), stock)


@pytest.mark.parametrize("name", PLANS)
def test_calls_without_a_layout_are_stock(kit, model, name):
    ids = kit.ids_for(kit.layout_of("ttttt"))
    stock = model(ids, use_cache=False).logits
    with attach(model, PLANS[name]):
        assert torch.equal(model(ids, use_cache=False).logits, stock)


def test_detach_restores_the_instance(kit, model):
    layout = kit.layout_of(IMAGE_IN_TEXT)
    ids = kit.ids_for(layout)
    stock = model(ids, use_cache=False).logits
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    names = list(model.state_dict())
    attachment = attach(model, PLANS["mixed"])
    assert list(model.state_dict()) == names
    assert not torch.equal(model(ids, token_layout=layout, use_cache=False).logits, stock)
    attachment.detach()
    attachment.detach()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(model(ids, use_cache=False).logits, stock)


def test_a_forward_set_by_somebody_else_is_used_and_given_back(kit, model):
    layer, calls = model.model.layers[1], []
    own = layer.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = counting
    with attach(model, vskip([0]).bind(3)):
        model(kit.ids_for(kit.layout_of("trt")), token_layout=kit.layout_of("trt"), use_cache=False)
    assert calls == [1]
    assert layer.__dict__["forward"] is counting


def test_other_instances_and_copies_are_independent(kit, model):
    layout = kit.layout_of(IMAGE_IN_TEXT)
    ids = kit.ids_for(layout)
    other = kit.make_model(seed=1)
    stock_other = other(ids, use_cache=False).logits
    with attach(model, PLANS["mixed"]):
        assert torch.equal(other(ids, use_cache=False).logits, stock_other)
        twin = copy.deepcopy(model)
        expected = model(ids, token_layout=layout, use_cache=False).logits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(twin(ids, token_layout=layout, use_cache=False).logits, expected)


def test_save_pretrained_while_attached(kit, model, tmp_path):
    ids = kit.ids_for(kit.layout_of("ttttt"))
    with attach(model, PLANS["mixed"]):
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


# --- oracles 2, 3, 7: what a plan may and may not change -----------------------------------------------------------


@pytest.mark.parametrize("make", [vskip, ffn_skip, shortv, lambda layers: vskip(layers, bypass="norm")])
def test_last_layer_changes_no_text_logit_and_earlier_layers_do(kit, model, make):
    layout = kit.layout_of("ttrrssttt", ".trsttrst")
    ids = kit.ids_for(layout)
    stock = kit.logits_of(model, ids, layout, dense().bind(3))
    last = kit.logits_of(model, ids, layout, make([2]).bind(3))
    # The same sums over fewer rows: matrix products of another shape round differently in the last bits.
    torch.testing.assert_close(last[text(layout)], stock[text(layout)], atol=2e-6, rtol=1e-6)
    assert (last - stock)[layout.is_kind(frozenset({TokenKind.SKIPPED}))].abs().max() > 1e-2
    first = kit.logits_of(model, ids, layout, make([0]).bind(3))
    assert (first - stock)[text(layout)].abs().max() > 1e-2
    before_image = layout.kinds.ne(TokenKind.TEXT).cumsum(-1).eq(0)
    torch.testing.assert_close(first[before_image], stock[before_image], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 1, 2]])
def test_shortv_is_vskip_and_ffn_skip(kit, model, layers):
    layout = kit.layout_of(IMAGE_IN_TEXT, "...ttrsrstt")
    ids = kit.ids_for(layout)
    both = compose([vskip(layers), ffn_skip(layers)]).bind(3)
    assert both.rules == shortv(layers).bind(3).rules
    a, b = (kit.logits_of(model, ids, layout, plan) for plan in (shortv(layers).bind(3), both))
    assert torch.equal(a, b)
    frozen = model.model
    with attach(model, shortv([0]).bind(3)), torch.no_grad():
        states = frozen(ids, token_layout=layout, use_cache=False, output_hidden_states=True).hidden_states
    visual = layout.is_kind(frozenset({TokenKind.RETAINED, TokenKind.SKIPPED}))
    assert torch.equal(states[1][visual], states[0][visual])
    assert not torch.equal(states[1][text(layout)], states[0][text(layout)])


def test_zero_and_norm_bypass_differ_by_the_normed_input(kit, model):
    layout = kit.layout_of(IMAGE_IN_TEXT)
    ids = kit.ids_for(layout)
    rule = {"no_attention": {"retained", "skipped"}, "no_ffn": {"retained", "skipped"}}
    states = {}
    for bypass in ("zero", "norm"):
        plan = SkipPlan(bypass, (LayerRule(**rule, bypass=bypass), LayerRule(), LayerRule()))
        with attach(model, plan), torch.no_grad():
            out = model(ids, token_layout=layout, use_cache=False, output_hidden_states=True)
        states[bypass] = out.hidden_states
    visual = layout.is_kind(frozenset({TokenKind.RETAINED, TokenKind.SKIPPED}))
    normed = model.model.layers[0].input_layernorm(states["zero"][0])
    torch.testing.assert_close((states["norm"][1] - states["zero"][1])[visual], normed[visual])
    assert torch.equal(states["norm"][1][~visual], states["zero"][1][~visual])
    assert not torch.allclose(states["norm"][2][text(layout)], states["zero"][2][text(layout)])


@pytest.mark.parametrize("name", PLANS)
def test_text_before_an_image_never_sees_it(kit, model, name):
    layout = kit.layout_of("tttrrysyttrsttt")
    ids = kit.ids_for(layout)
    changed = ids.clone()
    changed[0, 3:8] = (ids[0, 3:8] + 5) % 40
    a, b = (kit.logits_of(model, x, layout, PLANS[name]) for x in (ids, changed))
    assert torch.equal(a[:, :3], b[:, :3])
    assert (a - b)[:, 8:10].abs().min(-1).values.max() > 1e-4
    changed = ids.clone()
    changed[0, 10:12] = (ids[0, 10:12] + 5) % 40
    assert torch.equal(a[:, :10], kit.logits_of(model, changed, layout, PLANS[name])[:, :10])


@pytest.mark.parametrize("name", PLANS)
def test_batched_equals_one_by_one(kit, model, name):
    rows = ["ttrryssyttt", "...rrsstttt", ".....tttttt", "trst......."]
    layout = kit.layout_of(*rows)
    ids = kit.ids_for(layout)
    batched = kit.logits_of(model, ids, layout, PLANS[name])
    for i, row in enumerate(rows):
        real = layout.kinds[i] != TokenKind.PAD
        alone = kit.logits_of(model, ids[i : i + 1, real], kit.layout_of(row.strip(".")), PLANS[name])
        torch.testing.assert_close(batched[i, real], alone[0], atol=1e-5, rtol=1e-4)


def test_packed_equals_one_by_one_in_dense_layers_too(kit, model):
    """The first layer gathers queries, the others run stock attention: both must keep documents apart."""
    layout = kit.layout_of("ttrstrrst.", documents=[[0] * 5 + [1] * 4 + [2]])
    ids = kit.ids_for(layout)
    packed = kit.logits_of(model, ids, layout, vskip([0]).bind(3))
    for start, stop, row in ((0, 5, "ttrst"), (5, 9, "rrst")):
        alone = kit.logits_of(model, ids[:, start:stop], kit.layout_of(row), vskip([0]).bind(3))
        torch.testing.assert_close(packed[:, start:stop], alone, atol=1e-5, rtol=1e-4)


def test_only_active_tokens_are_computed(kit, model):
    """The point of a plan: rows of Q, O and FFN are saved, those of K and V are not, and padding costs nothing."""
    layout = kit.layout_of("ttrryssytt", "...rrsssst")
    rows = {}

    def count(name):
        return lambda module, args: rows.__setitem__(name, args[0].numel() // 16)

    layer = model.model.layers[1]
    parts = {"q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj, "o": layer.self_attn.o_proj, "ffn": layer.mlp}
    hooks = [module.register_forward_pre_hook(count(name)) for name, module in parts.items()]
    kit.logits_of(model, kit.ids_for(layout), layout, compose([vskip([1]), ffn_skip([1], {TokenKind.SKIPPED})]).bind(3))
    for hook in hooks:
        hook.remove()
    assert rows == {"q": 7, "k": 20, "o": 7, "ffn": 11}


def test_no_row_of_a_mask_is_empty(kit):
    """Kernels differ in what they make of a query without a key, or of no query at all: neither may reach them."""
    for rows in (("tts", "ss.", "..."), ("sss", "s..")):
        layout = kit.layout_of(*rows)
        text_only = Census(layout).live(frozenset({TokenKind.TEXT}))
        queries = select_queries(
            LiveTokens.whole(layout), layout.kinds == TokenKind.TEXT, text_only, torch.device("cpu")
        )
        assert queries.mask.shape == (len(rows), 1, max(1, rows[0].count("t")), 3)
        assert queries.mask.any(-1).all()


def test_the_attention_scale_is_the_layers_own(kit, model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.1
    layout = kit.layout_of(IMAGE_IN_TEXT)
    ids = kit.ids_for(layout)
    a, b = (kit.logits_of(model, ids, layout, plan)[text(layout)] for plan in (dense().bind(3), vskip([2]).bind(3)))
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-6)


# --- errors --------------------------------------------------------------------------------------------------------


def test_find_decoder(kit, model):
    assert find_decoder(model) is model.model
    assert find_decoder(model.model) is model.model
    holder = torch.nn.Module()
    holder.language_model, holder.vision = model, torch.nn.Linear(2, 2)
    assert find_decoder(holder) is model.model
    holder.second = kit.make_model()
    with pytest.raises(PlanError, match=r"several decoders \(language_model.model, second.model\)"):
        find_decoder(holder)


def test_find_decoder_says_what_is_missing(kit):
    with pytest.raises(PlanError, match="no module has a list named 'layers'"):
        find_decoder(torch.nn.Linear(2, 2))
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(PlanError, match=r"CLIPEncoderLayer.* has no input_layernorm, post_attention_layernorm"):
        find_decoder(CLIPVisionModel(CLIPVisionConfig(**small)))
    gemma = GemmaConfig(**small, vocab_size=40, num_key_value_heads=2, head_dim=8)
    with pytest.raises(PlanError, match="none of the known families llama, mistral"):
        find_decoder(GemmaForCausalLM(gemma))
    window = MistralConfig(**small, vocab_size=40, num_key_value_heads=2, sliding_window=4)
    with pytest.raises(PlanError, match="sliding window of 4"):
        find_decoder(MistralForCausalLM(window))


def test_attach_errors(kit, model):
    with pytest.raises(PlanError, match="'vskip' has 4 layers, the model has 3"):
        attach(model, vskip([0]).bind(4))
    with attach(model, PLANS["vskip"]), pytest.raises(PlanError, match="'shortv': plan 'vskip' is attached"):
        attach(model, PLANS["shortv"])
    attach(model, PLANS["shortv"]).detach()


def test_layers_over_several_devices_are_refused(kit, model):
    """As accelerate's dispatch leaves them; before a plan came, or with the plan that a model was built with."""
    layout = kit.layout_of("trst")
    attachment = attach(model, PLANS["vskip"])
    add_hook_to_module(model.model.layers[1], AlignDevicesHook("cpu", io_same_device=True))
    with pytest.raises(PlanError, match=r"^plan 'vskip': the model's layers are spread over devices \(device_map\)"):
        model(kit.ids_for(layout), token_layout=layout)
    attachment.detach()
    add_hook_to_module(model.model.layers[1], AlignDevicesHook("cpu", io_same_device=True))
    with pytest.raises(PlanError, match="spread over devices"):
        attach(model, PLANS["vskip"])
    attach(model, dense())


@pytest.mark.parametrize("plan", [fastv(1, 0.5), pyramiddrop((1, 2), (0.5, 0.25)), vtw(1)], ids=lambda plan: plan.name)
def test_an_answer_behind_the_image_is_predicted_in_training_as_in_use(kit, model, plan):
    """The token that predicts it, and ranks the others, is a visual one: it may not leave."""
    prompt, both = kit.layout_of("t" + "r" * 8), kit.layout_of("t" + "r" * 8 + "tt")
    ids = kit.ids_for(both)
    labels = torch.where(torch.arange(11) > 8, ids, -100)
    with attach(model, plan):
        trained = model(ids, token_layout=replace(both.with_labels(labels), read=None)).logits[:, 8]
        used = model(ids[:, :9], token_layout=prompt).logits[:, 8]
    torch.testing.assert_close(trained, used, atol=2e-6, rtol=1e-5)


def test_recycling_of_packed_documents_is_refused(kit, model):
    layout = kit.layout_of("trrrrttrrrrt")
    layout = TokenLayout.from_kinds(layout.kinds, torch.arange(12)[None] // 6)
    plan = SkipPlan("recycle", (LayerRule(),) * 3, drops=(Drop(1, 1, score="last_token", recycle=True),))
    with (
        attach(model, plan),
        pytest.raises(PlanError, match=r"^drop\.recycle: makes new tokens of prompts, not of"),
    ):
        model(kit.ids_for(layout), token_layout=layout)


def test_call_errors(kit, model):
    layout = kit.layout_of("trst")
    with attach(model, PLANS["vskip"]):
        with pytest.raises(PlanError, match=r"covers \(1, 4\) positions, the inputs have \(1, 5\)"):
            model(torch.ones(1, 5, dtype=torch.long), token_layout=layout)
        with pytest.raises(PlanError, match="has 4 dimensions"):
            model(kit.ids_for(layout), token_layout=layout, attention_mask=layout.visible()[:, None])
        with pytest.raises(PlanError, match="output_attentions"):
            model(kit.ids_for(layout), token_layout=layout, output_attentions=True)


def test_put_rows_is_index_copy_and_saves_nothing():
    """What autograd saves it asks for in the backward pass, which recomputes a layer too early for ZeRO-3."""

    def run(put):
        torch.manual_seed(0)
        tokens, values, packed = torch.ones(5, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(1) or tensor, lambda tensor: tensor):
            result = put(tokens, torch.tensor([4, 1]), values)
        (result * torch.arange(15.0).view(5, 3)).sum().backward()
        return (result.detach(), tokens.grad, values.grad), len(packed)

    ours, saved = run(put_rows)
    theirs, saved_by_torch = run(lambda tokens, rows, values: tokens.index_copy(0, rows, values))
    assert all(map(torch.equal, ours, theirs))
    assert saved == 0 < saved_by_torch


@pytest.mark.parametrize("plan", [dense(), skip_ffn(), vskip([1]), fastv(1)], ids=lambda plan: plan.name)
@pytest.mark.parametrize(
    ("rows", "documents"),
    [
        (("ttrryss", "tts...."), None),
        (("..ttrry", "tttrrys"), None),
        ((".ttrr.t", "tttrry."), None),
        (("ttrrytt", "tsrtss."), [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, -1]]),
    ],
    ids=["behind", "before", "around", "packed"],
)
@pytest.mark.parametrize(("attention", "backend"), [("sdpa", "auto"), ("sdpa", "sdpa"), ("eager", "auto")])
def test_training_sees_what_inference_sees(kit, rows, documents, plan, attention, backend):
    """Training leaves out masks that tell nothing; on real tokens the logits are those with a mask."""
    model = kit.make_model(attn_implementation=attention)
    layout = kit.layout_of(*rows, documents=documents)
    real = layout.kinds != TokenKind.PAD
    with attach(model, plan, backend, even_dense=True):
        found = [
            model.train(mode)(kit.ids_for(layout), token_layout=layout, use_cache=False).logits[real]
            for mode in (False, True)
        ]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
