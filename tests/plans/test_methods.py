"""Every builder and preset against the numbers that the papers and the public code print, typed here by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skipvision_train.errors import PlanError
from skipvision_train.plans import (
    DENSE_RULE,
    VISUAL,
    Drop,
    LayerRule,
    TokenKind,
    compose,
    dense,
    fastv,
    ffn_skip,
    preset,
    pyramiddrop,
    shortv,
    skip_ffn,
    skip_kv,
    sparsevlm,
    victor,
    vskip,
    vtw,
)
from skipvision_train.plans.presets import MODELS, VSKIP_COUNT

SKIPPED, MIDDLE, RETAINED = TokenKind.SKIPPED, TokenKind.MIDDLE, TokenKind.RETAINED
ALL = {
    "dense": dense(),
    "skip_ffn": skip_ffn(),
    "skip_kv": skip_kv(),
    "vskip": vskip([0, 2, 5]),
    "ffn_skip": ffn_skip([0, 2]),
    "shortv": shortv([1]),
    "vtw": vtw(),
    "fastv": fastv(),
    "pyramiddrop": pyramiddrop(),
    "sparsevlm": sparsevlm(),
    "sparsevlm+": sparsevlm(version=2),
    "victor": victor(),
}
DEPTH = {
    "llava_1_5_7b": 32,
    "llava_next_7b": 32,
    "llava_1_5_13b": 40,
    "llava_next_13b": 40,
    "qwen2_5_vl_7b": 28,
}


def by_layer(plan, depth=8):
    """What each layer leaves out: {layer: (no_attention, no_ffn)}, dense layers left out."""
    rules = plan.bind(depth).rules
    return {i: (set(rule.no_attention), set(rule.no_ffn)) for i, rule in enumerate(rules) if not rule.is_dense}


def drops_of(plan):
    """(layer, keep, score, scoring layer, positions) of every drop."""
    return [(d.layer, d.keep, d.score, d.score_layer, d.positions) for d in plan.drops]


def test_what_the_static_methods_skip():
    visual = {SKIPPED, MIDDLE, RETAINED}
    assert visual == VISUAL
    assert by_layer(dense()) == {}
    assert by_layer(vskip([4, 1])) == {1: (visual, set()), 4: (visual, set())}
    assert by_layer(ffn_skip([1])) == {1: (set(), visual)}
    assert by_layer(shortv([6, 1])) == {1: (visual, visual), 6: (visual, visual)}
    assert by_layer(skip_ffn(), 3) == {0: (set(), {SKIPPED}), 1: (set(), {SKIPPED}), 2: (set(), {SKIPPED})}
    assert by_layer(vskip([1], kinds={SKIPPED})) == {1: ({SKIPPED}, set())}
    assert vskip([1]).rules[1].bypass == "zero"
    assert vskip([1], bypass="norm").rules[1].bypass == "norm"
    assert vskip([]).is_dense
    for plan in (vskip([1]), ffn_skip([1]), shortv([1])):
        assert (plan.drops, plan.evict, plan.registers) == ((), frozenset(), 0)


def test_what_skip_vision_evicts():
    """Table 6; the paper's code keeps text, the coarse tokens, the summaries and the last local token."""
    assert skip_ffn().evict == {SKIPPED}
    assert skip_ffn(evict=()).evict == frozenset()
    assert skip_ffn().evict_when == "after_first_token"
    assert skip_ffn(["skipped", "summary"], ["skipped"], "before_first_token").evict_when == "before_first_token"
    levels = {level: set(skip_kv(level).evict) for level in ("small", "middle + small", "all but summary")}
    assert levels == {"small": {SKIPPED}, "middle + small": {SKIPPED, MIDDLE}, "all but summary": set(VISUAL)}
    assert skip_kv().evict == {SKIPPED}
    assert skip_kv("small", "before_first_token").evict_when == "before_first_token"
    assert by_layer(skip_kv()) == {}
    assert compose([skip_ffn(evict=()), skip_kv()], name="skip_ffn") == skip_ffn()


def test_vtw():
    assert drops_of(vtw()) == [(16, 0, "none", None, "keep")]
    assert vtw().drops[0].kinds == VISUAL
    assert vtw(5, kinds={SKIPPED}).drops[0].kinds == {SKIPPED}


def test_fastv():
    """K = 3, R = 50 %: ranked by the last row of layer K - 1; kept tokens keep their positions."""
    assert drops_of(fastv()) == [(3, 0.5, "last_token", 2, "keep")]
    assert fastv().drops[0].kept(576, 576) == 288
    assert fastv(2, 0.25).drops[0].kept(576, 576) == 144  # Skip-Vision's row of 29.4 %
    with pytest.raises(PlanError, match=r"drop\.layer: 0; the first layer that can drop so is 1"):
        fastv(0)


def test_pyramiddrop():
    """Half, a quarter and an eighth of 576 at the entry of layers 8, 16, 24, ranked by that layer's own weights."""
    plan = pyramiddrop()
    assert drops_of(plan) == [
        (8, 0.5, "last_token", 8, "renumber"),
        (16, 0.25, "last_token", 16, "renumber"),
        (24, 0.125, "last_token", 24, "renumber"),
    ]
    assert [drop.kept(576, 576) for drop in plan.drops] == [288, 144, 72]
    assert [drop.kept(575, 575) for drop in plan.drops] == [287, 143, 71]  # int() in the public code
    kept_in_place = pyramiddrop([4], [0.5], positions="keep")
    assert drops_of(kept_in_place) == [(4, 0.5, "last_token", 4, "keep")]
    with pytest.raises(PlanError, match="pyramiddrop: 3 layers but 2 shares; give one share per layer"):
        pyramiddrop(keep=(0.5, 0.25))


@pytest.mark.parametrize(
    ("version", "tokens", "kept"),
    [
        (1, 192, [300, 200, 110]),
        (1, 128, [303, 110, 36]),
        (1, 96, [238, 48, 26]),
        (1, 64, [66, 30, 17]),
        (2, 192, [300, 200, 118]),
        (2, 128, [238, 108, 60]),
        (2, 96, [246, 54, 28]),
        (2, 64, [66, 34, 20]),
    ],
)
def test_sparsevlm(version, tokens, kept):
    """At the exit of layers 2, 6 and 15, that is, at the entry of the next, ranked by their attention."""
    plan = sparsevlm(tokens, version)
    score, positions = ("raters", "renumber") if version == 1 else ("corrected_raters", "keep")
    assert plan.name == ("sparsevlm" if version == 1 else "sparsevlm+")
    assert drops_of(plan) == [
        (layer + 1, n, score, layer, positions) for layer, n in zip((2, 6, 15), kept, strict=True)
    ]
    assert [drop.recycle for drop in plan.drops] == [version == 1] * 3


def test_sparsevlm_of_ones_own():
    plan = sparsevlm(layers=[1, 4], keep=[0.5, 7])
    assert [(drop.layer, drop.keep) for drop in plan.drops] == [(2, 0.5), (5, 7)]
    with pytest.raises(PlanError, match="sparsevlm: version 3 is unknown; use 1 or 2"):
        sparsevlm(version=3)
    with pytest.raises(
        PlanError, match=r"sparsevlm: no table for 200 tokens; use one of \[192, 128, 96, 64\], or keep="
    ):
        sparsevlm(200)
    with pytest.raises(PlanError, match="sparsevlm: 3 layers but 1 amounts to keep; give one per layer"):
        sparsevlm(keep=[5])
    with pytest.raises(PlanError, match=r"drop\.recycle"):
        sparsevlm(keep=[5, 3, 0])


def test_victor():
    """At layer 3 all visual tokens leave; the registers are summary tokens and stay."""
    plan = victor()
    assert drops_of(plan) == [(3, 0, "none", None, "keep")]
    assert plan.registers == 8
    assert TokenKind.SUMMARY not in plan.drops[0].kinds
    assert victor(5, 256).registers == 256
    with pytest.raises(PlanError, match="victor: 0 registers; without registers the plan is vtw"):
        victor(registers=0)


@pytest.mark.parametrize("builder", [vskip, ffn_skip, shortv])
def test_layers_must_exist_and_differ(builder):
    with pytest.raises(PlanError, match=rf"{builder.__name__}: layers \[1, 1\] name a layer twice"):
        builder([1, 1])
    with pytest.raises(PlanError, match=rf"{builder.__name__}: layers \[-2, -1\] do not exist; layers count from 0"):
        builder([3, -1, -2])
    with pytest.raises(PlanError, match=rf"{builder.__name__}: layers \[3\] do not exist; the model has layers 0 to 2"):
        builder([0, 3]).bind(3)


def test_unknown_words():
    with pytest.raises(PlanError, match=r"skip_kv: level 'large' is unknown; use 'small', 'middle .* small', 'all but"):
        skip_kv("large")
    with pytest.raises(PlanError, match="bypass: 'ln' is unknown; use zero or norm"):
        vskip([1], bypass="ln")
    with pytest.raises(PlanError, match="'window' is no token kind"):
        skip_ffn(["window"])


@pytest.mark.parametrize("depth", [1, 3, 32])
def test_vtw_at_the_end_is_dense(depth):
    assert replace(vtw(depth).bind(depth), name="dense") == dense().bind(depth)
    assert vtw(depth).bind(depth + 1) != replace(dense().bind(depth + 1), name="vtw")


@pytest.mark.parametrize("layer", [1, 3, 16])
def test_fastv_that_keeps_nothing_is_vtw(layer):
    for nothing in (0, 0.0):
        assert replace(fastv(layer, keep=nothing), name="vtw") == vtw(layer)
    assert replace(fastv(layer, keep=1), name="vtw") != vtw(layer)


def test_shortv_is_vskip_and_ffn_skip():
    layers = [2, 0, 5]
    both = compose([vskip(layers, bypass="zero"), ffn_skip(layers)])
    assert both.rules == shortv(layers).rules
    assert replace(both, name="shortv") == shortv(layers)
    assert compose([vskip(layers, bypass="norm"), ffn_skip(layers)]).rules != shortv(layers).rules


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL)
@pytest.mark.parametrize("level", ["small", "middle + small", "all but summary"])
def test_every_plan_composes_with_the_skip_kv_cache(plan, level):
    whole = compose([plan, skip_kv(level)])
    assert whole.evict == plan.evict | skip_kv(level).evict
    assert replace(whole, name=plan.name, evict=plan.evict) == plan


def test_boosters_compose():
    """FastV + V-Skip (V-Skip, Table 2) and Skip-Vision + V-Skip."""
    layers = range(8, 27)
    boosted = compose([fastv(), vskip(layers)]).bind(32)
    assert boosted.drops == (Drop(3, 0.5),)
    assert [i for i, rule in enumerate(boosted.rules) if not rule.is_dense] == list(layers)
    both = compose([skip_ffn(), vskip([1])])
    assert both.rules == (
        LayerRule(no_ffn={SKIPPED}),
        LayerRule(no_attention=VISUAL, no_ffn={SKIPPED}),
    )
    assert both.rest == LayerRule(no_ffn={SKIPPED})
    assert both.evict == {SKIPPED}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["dense", "skip_ffn", "vtw", "fastv", "pyramiddrop", "sparsevlm", "victor"])
def test_presets_fit_their_model(method, model):
    plan = preset(method, model).bind(DEPTH[model])
    assert plan.name.startswith(method)
    assert plan.num_layers == DEPTH[model]
    assert plan.is_dense == (method == "dense")
    assert all(drop.layer < DEPTH[model] for drop in plan.drops)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("llava_1_5_7b", "31,29,30,28,0,26,27,25,24,22,23,21,2,3,20,18,17,12,19"),
        ("llava_1_5_13b", "39,32,28,36,27,37,29,30,1,38,25,31,2,26,23,34,0,33,35,22,24,21,20,17"),
        ("llava_next_7b", "31,29,30,28,26,27,22,24,21,23,25,20,19,17,18,15,12,0,2"),
        ("llava_next_13b", "39,32,29,36,27,30,37,23,25,31,26,2,28,22,33,35,34,24,38,21,20,18,1,17"),
    ],
)
def test_shortv_presets(model, layers):
    """The lists of ShortV's README; 19 layers of 32, 24 of 40."""
    published = sorted(int(layer) for layer in layers.split(","))
    plan = preset("shortv", model).bind(DEPTH[model])
    assert list(plan.layers_without_attention()) == list(plan.layers_without_ffn()) == published
    assert len(published) == VSKIP_COUNT[model] == {32: 19, 40: 24}[DEPTH[model]]


def test_vtw_presets():
    """V-Skip, Table 1: K = 16 (7B), 20 (13B), 7 (Qwen2.5-VL)."""
    found = {model: preset("vtw", model).drops[0].layer for model in MODELS}
    assert found == dict(zip(DEPTH, (16, 16, 20, 20, 7), strict=True))


def test_presets_where_positions_have_three_dimensions():
    assert preset("pyramiddrop", "llava_1_5_7b") == pyramiddrop()
    assert preset("sparsevlm", "llava_1_5_7b") == sparsevlm(192, version=1)
    for method in ("pyramiddrop", "sparsevlm"):
        assert {drop.positions for drop in preset(method, "qwen2_5_vl_7b").drops} == {"keep"}


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        ("vtw", "llava_2", "preset: model 'llava_2' is unknown; use llava_1_5_7b, .*qwen2_5_vl_7b"),
        ("vskip", "llava_1_5_7b", r"no published layers of 'vskip' for llava_1_5_7b; .*takes 19 of them.*calibrate"),
        ("vskip", "qwen2_5_vl_7b", r"takes 7 of them"),
        ("shortv", "qwen2_5_vl_7b", r"no published layers of 'shortv' for qwen2_5_vl_7b"),
        ("shorty", "llava_1_5_7b", r"no published layers of 'shorty'.*presets exist for dense, .*shortv, vtw"),
    ],
)
def test_presets_that_nobody_published(method, model, message):
    with pytest.raises(PlanError, match=message):
        preset(method, model)


def test_open_plans_leave_the_other_layers_dense():
    for name, plan in ALL.items():
        assert plan.rest == (LayerRule(no_ffn={SKIPPED}) if name == "skip_ffn" else DENSE_RULE)
