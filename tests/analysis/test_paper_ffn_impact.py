"""FFN impact against a slow sequence and against stock hooks; shares of FLOPs against differences of whole counts."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_vlms import make_family
from watched import Watched, make_ours, our_samples, prompt_embeds, sample_of

from skipvision_train.analysis.ffn_impact import ffn_impact, flops_shares
from skipvision_train.analysis.flops import sequence_flops
from skipvision_train.analysis.geometry import load_geometry, text_config
from skipvision_train.analysis.probe import over_samples, plain, sample_kinds, watch_layers
from skipvision_train.plans import TokenKind, compose, dense, fastv, ffn_skip, pyramiddrop, skip_ffn, vskip, vtw
from skipvision_train.plans.rules import VISUAL

PLANS = {
    "dense": dense(),
    "skip_ffn": skip_ffn(),
    "vskip": compose([vskip([0, 1], bypass="norm"), skip_ffn()]),
    "vtw": vtw(1),
    "fastv": compose([fastv(1, 0.5), ffn_skip([2], kinds=VISUAL)]),
    "pyramiddrop": pyramiddrop((1, 2), (0.6, 0.3)),
}


@pytest.fixture
def ours(tiny_config):
    return make_ours(tiny_config)[0]


@pytest.mark.parametrize("name", PLANS)
def test_states_of_every_layer_equal_a_slow_sequence(ours, name):
    plan, seen = PLANS[name].bind(3), []
    for sample in our_samples(ours):
        kinds = sample.inputs["token_kinds"][0]
        slow = Watched(ours.language_model, prompt_embeds(ours, sample), kinds, plan)
        seen.clear()
        ours.set_plan(plan)
        with torch.no_grad(), watch_layers(ours, lambda s: seen.append((s, s.ffn_update()))):
            ours(**sample.inputs, use_cache=False)
        assert [states.index for states, _ in seen] == [0, 1, 2]
        for (states, update), expected, rule in zip(seen, slow.seen, plan.rules, strict=True):
            live = sorted(expected.live)
            order = [expected.live.index(i) for i in live]
            assert states.live.nonzero()[:, 0].tolist() == live
            ran = [i for i in live if TokenKind(int(kinds[i])) not in rule.no_ffn]
            assert states.ran.nonzero()[:, 0].tolist() == ran
            torch.testing.assert_close(states.attended[live], expected.attended[order], atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(states.leaving[live], expected.leaving[order], atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(update[live], expected.update[order], atol=2e-4, rtol=2e-4)


def slow_impact(model, samples, plan):
    """Per kind and layer the mean over samples of the mean over tokens, in loops."""
    ratios = {}
    for sample in samples:
        kinds = sample.inputs["token_kinds"][0].tolist()
        slow = Watched(model.language_model, prompt_embeds(model, sample), torch.tensor(kinds), plan)
        for layer, seen in enumerate(slow.seen):
            own = {}
            for place, i in enumerate(seen.live):
                ratio = float(seen.update[place].norm()) / float(seen.attended[place].norm())
                own.setdefault(TokenKind(kinds[i]), []).append(ratio)
            for kind, values in own.items():
                ratios.setdefault((kind, layer), []).append(sum(values) / len(values))
    return {key: sum(values) / len(values) for key, values in ratios.items()}


@pytest.mark.parametrize("name", ["dense", "skip_ffn", "vtw"])
def test_impact_is_the_mean_ratio_of_tokens_that_are_there(ours, name):
    plan, samples = PLANS[name].bind(3), our_samples(ours)
    found, expected = ffn_impact(ours, samples, plan), slow_impact(ours, samples, plan)
    assert {k.name for k in found.values} == {"TEXT", "RETAINED", "MIDDLE", "SKIPPED", "SUMMARY"}
    for kind, estimate in found.estimates().items():
        for layer, value in enumerate(estimate.mean.tolist()):
            if (kind, layer) in expected:
                assert value == pytest.approx(expected[kind, layer], rel=1e-4)
            else:  # dropped: nothing is left to measure
                assert value != value
                assert found.to_dict()["impact"][kind.name.lower()]["mean"][layer] is None
    assert name != "vtw" or (TokenKind.SKIPPED, 1) not in expected


def test_the_models_own_plan_is_back_and_no_hook_stays(ours):
    ours.set_plan(vskip([1]))
    ffn_impact(ours, our_samples(ours)[:1], skip_ffn().bind(3))
    assert ours.plan == vskip([1]).bind(3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())


@cache
def family(name):
    return make_family(name)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_other_models_equal_hooks_on_stock_modules(name):
    tiny = family(name)
    sample, norms = sample_of(tiny.inputs(1)), []
    hooks = []
    for layer in tiny.decoder.layers:
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: norms.append(args[0][0])))
        hooks.append(layer.mlp.register_forward_hook(lambda _, args, out: norms.append(out[0])))
    with torch.no_grad():
        tiny.model(**sample.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    visual = sample.inputs["input_ids"][0] == tiny.image_token_id
    assert ((sample_kinds(tiny.model, sample) == TokenKind.SKIPPED) == visual).all()
    found = ffn_impact(tiny.model, [sample], dense().bind(3)).estimates()
    assert set(found) == {TokenKind.TEXT, TokenKind.SKIPPED}
    for kind, own in ((TokenKind.SKIPPED, visual), (TokenKind.TEXT, ~visual)):
        expected = [
            (after.norm(dim=-1) / before.norm(dim=-1))[own].mean()
            for before, after in zip(norms[::2], norms[1::2], strict=True)
        ]
        torch.testing.assert_close(found[kind].mean.float(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_interval_over_samples_leaves_out_those_without_the_kind():
    nan = float("nan")
    found = over_samples(torch.tensor([[1.0, nan, nan], [3.0, 5.0, nan], [8.0, nan, nan]]))
    assert found.mean[:2].tolist() == [4.0, 5.0]
    # deviation sqrt((9 + 1 + 16) / 2), over sqrt(3)
    assert found.high[0].item() == pytest.approx(4 + 1.959964 * (13 / 3) ** 0.5)
    assert found.low[1] == found.high[1] == 5.0
    assert plain(found.mean) == [4.0, 5.0, None]


# --- Figure 2 ------------------------------------------------------------------------------------------------------


@given(st.floats(1, 5000), st.floats(0, 500), st.sampled_from(["llama3_8b", "llava_1_5_7b", "qwen2_5_vl_7b"]))
def test_share_is_what_skipping_all_visual_ffns_would_save(visual, text, name):
    config = text_config(load_geometry(name))
    (share,) = flops_shares(config, [visual], text)
    counts, depth = {TokenKind.TEXT: text, TokenKind.RETAINED: visual}, config.num_hidden_layers
    whole = sequence_flops(config, counts, dense().bind(depth)).total
    without = sequence_flops(config, counts, ffn_skip(range(depth), kinds=VISUAL).bind(depth)).total
    assert share.flops == pytest.approx(whole)
    assert share.visual_ffn == pytest.approx((whole - without) / whole)
    assert share.visual_ffn + share.text_ffn + share.projections + share.attention == pytest.approx(1)


def test_share_of_llava():
    """FFN-Skip in 19 of 32 layers leaves 5.58 of 8.54 TFLOPs."""
    (share,) = flops_shares(text_config(load_geometry("llava_1_5_7b")), [576], 66.64)
    assert share.visual_ffn * 19 / 32 == pytest.approx(1 - 5.58 / 8.54, abs=1e-3)
    assert share.text_ffn / share.visual_ffn == pytest.approx(66.64 / 576)
