"""The plan as data: what is refused, which forms are equal, how it is stored, printed and combined."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import pytest

from skipvision_train.errors import PlanError
from skipvision_train.plans import (
    DENSE_RULE,
    VISUAL,
    Drop,
    LayerRule,
    SkipPlan,
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
    victor,
    vskip,
    vtw,
)

SKIPPED, RETAINED, SUMMARY = TokenKind.SKIPPED, TokenKind.RETAINED, TokenKind.SUMMARY
ROUND_TRIPS = {
    "dense": dense().bind(2),
    "open": dense(),
    "skip_ffn": skip_ffn().bind(3),
    "open rules": vskip([1, 3], bypass="norm"),
    "summary too": skip_ffn(["skipped", "SUMMARY"], evict=["skipped"], evict_when="before_first_token").bind(3),
    "composed": compose([shortv([0]).bind(3), skip_ffn().bind(3)], name="both"),
    "a number": fastv(2, keep=1),
    "a share": fastv(2, keep=1.0),
    "every field of a drop": sparsevlm(128, version=1, kinds={SKIPPED}),
    "own weights": pyramiddrop().bind(32),
    "registers": victor(3, 16),
}


@pytest.mark.parametrize("plan", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_json_roundtrip(plan, tmp_path):
    path = tmp_path / "deep" / "plan.json"
    plan.save(path)
    again = SkipPlan.load(path)
    assert again == plan
    assert hash(again) == hash(plan)
    assert [type(drop.keep) for drop in again.drops] == [type(drop.keep) for drop in plan.drops]
    assert json.loads(path.read_text())["num_layers"] == (None if plan.rest else len(plan.rules))
    assert list(path.parent.iterdir()) == [path]


def test_the_file_format():
    """What version 2 looks like, typed by hand: files that exist must stay readable."""
    drop = {"layer": 3, "keep": 0.5, "kinds": ["middle", "retained", "skipped"], "score": "last_token"}
    drop |= {"weights": "previous", "positions": "keep", "rounding": "nearest", "recycle": False}
    rule = {"no_attention": ["retained"], "no_ffn": [], "bypass": "norm"}
    everywhere = {"no_attention": [], "no_ffn": ["middle", "retained", "skipped"], "bypass": "zero"}
    data = {"format_version": 2, "name": "p", "num_layers": None, "rules": [rule], "rest": everywhere, "drops": [drop]}
    data |= {"evict": ["skipped"], "evict_when": "after_first_token", "registers": 4, "provenance": {"seed": 1}}
    plan = SkipPlan.from_dict(data)
    rules = (LayerRule(no_attention=frozenset({RETAINED}), bypass="norm"),)
    assert plan == SkipPlan("p", rules, LayerRule(no_ffn=VISUAL), (Drop(3, 0.5),), {SKIPPED}, registers=4)
    assert plan.to_dict() == data
    least = SkipPlan.from_dict({"format_version": 2, "name": "q", "rules": [{}, {}]})
    assert least == SkipPlan("q", (DENSE_RULE, DENSE_RULE))


def test_provenance_is_carried_and_ignored_by_equality(tmp_path):
    plan = SkipPlan("p", (LayerRule(),), provenance={"seed": 3})
    plan.save(tmp_path / "p.json")
    assert SkipPlan.load(tmp_path / "p.json").provenance == {"seed": 3}
    assert plan == SkipPlan("p", (LayerRule(),))
    assert plan.bind(1).provenance == {"seed": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": [{"no_atention": []}]}, "not a plan: TypeError.*no_atention"),
        (
            {"rules": [{"no_ffn": ["visual"]}]},
            "'visual' is no token kind; use some of text, retained, .*middle",
        ),
        ({"rules": [{"no_ffn": ["pad"]}]}, "'pad' is no token kind"),
        ({"rules": [{"bypass": "one"}]}, "bypass: 'one' is unknown; use zero or norm"),
        ({"rules": []}, "rules: a plan needs one rule per decoder layer, found none"),
        ({"evict": ["text"]}, "evict: text cannot leave the cache"),
        ({"evict_when": "never"}, "evict_when: 'never' is unknown; use after_first_token or before_first_token"),
        ({"format_version": 1}, "format_version is 1, expected 2"),
        ({"num_layers": 7}, "num_layers is 7 but there are 1 rules"),
        ({"num_layers": 7, "rest": {}}, "num_layers is 7 but the plan has a rest, so it fits any depth"),
        ({"layers": 1}, "unknown fields layers; a plan has drops, evict, "),
        ({"rest": {"no_fnn": []}}, "not a plan: TypeError.*no_fnn"),
        ({"drops": [{"keep": 0.5}]}, "not a plan: TypeError.*layer"),
        ({"drops": [{"layer": 0.5}]}, "drop.layer: 0.5 is no layer; layers are whole numbers from 0"),
        ({"drops": [{"layer": 2}]}, "drops: layer 2 does not exist; the plan has 1 layers"),
        ({"registers": -1}, "registers: -1 is no number of tokens; use 0 or more"),
        ({"registers": 1.5}, "registers: 1.5 is no number of tokens"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**SkipPlan("p", (LayerRule(),)).to_dict(), **change}))
    with pytest.raises(PlanError, match=f"bad.json: .*{message}"):
        SkipPlan.load(path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(PlanError, match=rf"^{tmp_path}: cannot be read as a plan file: Is a directory"):
        SkipPlan.load(tmp_path)
    with pytest.raises(PlanError, match=r"none.json: no such plan file"):
        SkipPlan.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"name": ')
    with pytest.raises(PlanError, match=r"half.json: not JSON"):
        SkipPlan.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(PlanError, match="a plan is a JSON object, found list"):
        SkipPlan.load(tmp_path / "list.json")
    data = dense().bind(1).to_dict()
    del data["name"]
    with pytest.raises(PlanError, match=r"KeyError.*name"):
        SkipPlan.from_dict(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": -1}, r"drop\.keep: -1 is neither a number of tokens nor a share"),
        ({"keep": True}, r"drop\.keep: True is neither"),
        ({"keep": "half"}, r"drop\.keep: 'half' is neither"),
        ({"keep": float("nan")}, r"drop\.keep: nan is neither"),
        ({"keep": 1.5}, r"drop\.keep: a share is at most 1\.0, found 1\.5; write a whole number for a count"),
        ({"keep": 5, "score": "none"}, r"drop\.score: keeping 5 tokens needs a score"),
        ({"keep": 5, "score": "first"}, r"drop\.score: 'first' is unknown; use none, last_token, raters, corrected_ra"),
        ({"weights": "next"}, r"drop\.weights: 'next' is unknown; use previous, own"),
        ({"positions": "shift"}, r"drop\.positions: 'shift' is unknown; use keep, renumber"),
        ({"rounding": "up"}, r"drop\.rounding: 'up' is unknown; use nearest, down"),
        ({"kinds": ()}, r"drop\.kinds: name visual or summary tokens"),
        ({"kinds": ["text", "skipped"]}, r"drop\.kinds: .*text cannot be dropped"),
        ({"kinds": ["skiped"]}, r"drop\.kinds: 'skiped' is no token kind"),
        ({"layer": 0, "keep": 5}, r"drop\.layer: 0; the first layer that can drop so is 1"),
        ({"layer": -1}, r"drop\.layer: -1; the first layer that can drop so is 0"),
        ({"layer": True}, r"drop\.layer: True is no layer"),
        ({"recycle": True}, r"drop\.recycle: .*keep some"),
    ],
)
def test_drops_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(PlanError, match=message):
        Drop(**{"layer": 3, **fields})


def test_where_a_drop_may_stand_and_what_scores_it():
    assert Drop(0).score_layer is None
    assert Drop(1, 0.5).score_layer == 0
    assert Drop(0, 0.5, weights="own").score_layer == 0
    assert Drop(8, 0.5, weights="own").score_layer == 8
    assert (Drop(3, 0.5).needs_score, Drop(3, 0.5, weights="own").needs_score, Drop(3).needs_score) == (1, 0, 0)


@pytest.mark.parametrize(
    ("drop", "before", "original", "kept"),
    [
        (Drop(3, 0.5), 576, 576, 288),
        (Drop(3, 0.5), 5, 5, 2),  # 2.5: ties go to the even number
        (Drop(3, 0.5), 7, 7, 4),  # 3.5
        (Drop(3, 0.5, rounding="down"), 7, 7, 3),
        (Drop(3, 0.29, rounding="down"), 100, 100, 29),  # 0.29 * 100 is a little less than 29 in floating point
        (Drop(3, 0.25), 288, 576, 144),  # a share of the original ones, not of those still there
        (Drop(3, 0.5), 10, 576, 10),
        (Drop(3, 300), 576, 576, 300),
        (Drop(3, 300), 200, 576, 200),
        (Drop(3, 1.0), 41, 41, 41),
        (Drop(3, 1), 41, 41, 1),
        (Drop(3), 41, 41, 0),
        (Drop(3, 0.5), 0, 0, 0),
        (Drop(3, 0.5), 2109.5, 2109.5, 1054.75),  # a mean over samples stays one
    ],
)
def test_how_many_stay(drop, before, original, kept):
    assert drop.kept(before, original) == kept


def test_how_many_are_recycled():
    """276 leave: 30 % are 82, one more is 83, a tenth is 8, one more is 9."""
    drop = Drop(3, 300, score="raters", recycle=True)
    assert [drop.recycled(leaving) for leaving in (276, 100, 30, 29, 1, 0)] == [9, 4, 2, 1, 1, 0]
    assert Drop(3, 300).recycled(276) == 0


def test_equal_plans_have_one_form():
    rule = LayerRule(no_ffn=frozenset({SKIPPED}))
    same = [
        (SkipPlan("p", (rule, rule, rule), rest=rule), SkipPlan("p", rest=rule)),
        (SkipPlan("p", (rule, DENSE_RULE), rest=DENSE_RULE), SkipPlan("p", (rule,), rest=DENSE_RULE)),
        (SkipPlan("p", (rule,), drops=(Drop(1, 0.5),)), SkipPlan("p", (rule,))),
        (
            SkipPlan("p", rest=DENSE_RULE, drops=(Drop(9, 4), Drop(2, 8))),
            SkipPlan("p", rest=DENSE_RULE, drops=(Drop(2, 8), Drop(9, 4))),
        ),
        (SkipPlan("p", (rule,), evict_when="before_first_token"), SkipPlan("p", (rule,))),
        (LayerRule(no_ffn=["SKIPPED"], bypass="norm"), rule),
        (Drop(3, 0.0, score="raters", weights="own", rounding="down"), Drop(3, 0, score="none")),
        (Drop(3, 2, kinds=["skipped"]), Drop(3, 2, kinds=frozenset({SKIPPED}))),
    ]
    for one, other in same:
        assert one == other
        assert hash(one) == hash(other)
    assert Drop(3, 1) != Drop(3, 1.0)
    assert Drop(3, 1) != (3, 1)
    assert fastv(3, 1) != fastv(3, 1.0)
    assert SkipPlan("p", (rule, rule)) != SkipPlan("p", (rule,))
    assert SkipPlan("p", (rule,)) != SkipPlan("p", rest=rule)
    assert SkipPlan("p", (rule,), registers=1) != SkipPlan("p", (rule,))


def test_an_open_plan_and_its_depth():
    plan = vskip([1, 3])
    assert len(plan.rules) == 4
    bound = plan.bind(6)
    assert bound.num_layers == 6
    assert bound.rest is None
    assert [i for i, rule in enumerate(bound.rules) if rule.no_attention == VISUAL] == [1, 3]
    assert bound.bind(6) is bound
    assert plan.bind(4).rules == bound.rules[:4]
    assert skip_ffn().bind(3).rules == (LayerRule(no_ffn=frozenset({SKIPPED})),) * 3
    with pytest.raises(PlanError, match=r"'vskip' fits models of several depths; bind\(num_layers\)"):
        _ = plan.num_layers
    with pytest.raises(PlanError, match="fits models of several depths"):
        plan.check_depth(4)
    with pytest.raises(PlanError, match="plan 'vskip' has 6 layers, the model has 5"):
        bound.bind(5)
    with pytest.raises(PlanError, match=r"vskip: layers \[1, 3\] do not exist; the model has layers 0 to 0"):
        plan.bind(1)
    with pytest.raises(PlanError, match=r"pyramiddrop: layers \[16, 24\] do not exist; the model has layers 0 to 11"):
        pyramiddrop().bind(12)
    assert pyramiddrop().bind(24).drops == pyramiddrop().drops[:2]


def test_layers_of_a_plan():
    plan = compose([vskip([3, 1]), ffn_skip([4])])
    for either in (plan, plan.bind(5)):
        assert either.layers_without_attention() == (1, 3)
        assert either.layers_without_ffn() == (4,)
    assert skip_ffn().bind(3).layers_without_ffn() == (0, 1, 2)
    assert skip_ffn().layers_without_attention() == ()
    with pytest.raises(PlanError, match="fits models of several depths"):
        skip_ffn().layers_without_ffn()
    assert plan.drop_at(1) is None
    assert pyramiddrop().drop_at(16).keep == 0.25


def test_a_rule_can_be_added():
    rule = LayerRule(no_attention=VISUAL)
    assert dense().bind(4).with_rule(2, rule).rules == vskip([2]).bind(4).rules
    assert replace(dense().with_rule(2, rule), name="vskip") == vskip([2])
    assert skip_ffn().with_rule(2, rule).rules[2] == LayerRule(no_attention=VISUAL, no_ffn=frozenset({SKIPPED}))
    for plan, layer in ((dense().bind(4), 4), (dense().bind(4), -1), (vskip([1]), -1)):
        with pytest.raises(PlanError, match=f"layer {layer} does not exist"):
            plan.with_rule(layer, rule)


def test_what_counts_as_dense():
    assert dense().is_dense
    assert dense().bind(3).is_dense
    assert vtw(3).bind(3).is_dense
    for plan in (skip_ffn(), skip_kv(), vtw(2), vskip([1]), SkipPlan("e", (DENSE_RULE,), evict=frozenset({SKIPPED}))):
        assert not plan.is_dense


def leaves_out(plan, layer, kind):
    """What a layer leaves out for one kind, read off the plan by hand."""
    rule = plan.rules[layer] if layer < len(plan.rules) else plan.rest
    return kind in rule.no_attention, kind in rule.no_ffn


def test_compose_is_a_union_in_any_order():
    parts = [vskip([0, 5]), skip_ffn(VISUAL), ffn_skip([2]), pyramiddrop((3, 4), (9, 4)), skip_kv("all but summary")]
    whole = compose(parts)
    assert whole.name == "vskip + skip_ffn + ffn_skip + pyramiddrop + skip_kv"
    for layer in range(8):
        for kind in TokenKind:
            attention, ffn = zip(*(leaves_out(part, layer, kind) for part in parts), strict=True)
            assert leaves_out(whole, layer, kind) == (any(attention), any(ffn))
    assert whole.drops == parts[3].drops
    assert whole.evict == VISUAL
    for order in permutations(parts, 5):
        assert compose(order, name=whole.name) == whole
    for split in range(1, 5):
        grouped = [compose(parts[:split]), compose(parts[split:])]
        assert compose(grouped, name=whole.name) == whole
    assert compose([whole, whole, dense()], name=whole.name) == whole
    assert compose([part.bind(8) for part in parts], name=whole.name) == whole.bind(8)
    assert compose([parts[0].bind(8), *parts[1:]], name=whole.name) == whole.bind(8)
    assert compose([victor(3, 8), victor(3, 16)]).registers == 16


def test_layers_that_differ_compose():
    both = compose([vskip([0]), vskip([1], bypass="norm")])
    assert [rule.bypass for rule in both.rules] == ["zero", "norm"]
    assert compose([ffn_skip([0]), vskip([0], bypass="norm")]).rules[0].bypass == "norm"
    assert compose([vskip([1, 2]), vtw(3)]).drops == vtw(3).drops
    assert compose([vskip([2], kinds=VISUAL | {SUMMARY}), vtw(1)]).rules[2].no_attention > VISUAL
    assert compose([skip_ffn(), vtw(2)]).rest.no_ffn == {SKIPPED}  # wherever they are, so nothing contradicts
    assert compose([compose([skip_ffn(), vskip([1])]), vtw(2)]).rest.no_ffn == {SKIPPED}


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([], "compose: no plans given"),
        ([vskip([0]), vskip([0], bypass="norm")], r"bypass: '(zero|norm)' and '\w+' cannot both hold in one layer"),
        (
            [skip_ffn(), skip_kv(evict_when="before_first_token")],
            "compose: eviction after_first_token and before_first_token cannot both hold",
        ),
        ([dense().bind(3), dense().bind(4)], "has 4 layers, the model has 3"),
        ([dense().bind(3), vskip([3])], r"vskip: layers \[3\] do not exist; the model has layers 0 to 2"),
        ([fastv(8), pyramiddrop(positions="keep")], "drops: two at the entry of layer 8; give each a layer of its own"),
        ([fastv(3), fastv(3, 0.25)], "drops: two at the entry of layer 3"),
        ([fastv(3), pyramiddrop()], "drops: positions 'keep' and 'renumber' cannot both hold"),
        ([vskip([15, 16]), vtw(16)], "vskip has no_attention for retained, .* in layer 16, but all of .* at layer 16"),
        ([vtw(16), ffn_skip([20])], "ffn_skip has no_ffn for .* in layer 20, .* layer 16; name only layers before it"),
        ([shortv([4]), victor(3)], "shortv has no_attention .* in layer 4"),
        (
            [fastv(3), skip_ffn()],
            "layer rest: no_ffn concerns skipped, but the drop at layer 3 ranks retained, skipped, middle together, "
            ".*; rank only skipped, or leave out all of retained, skipped, middle",
        ),
        ([fastv(3), vskip([7], kinds={RETAINED})], "layer 7: no_attention concerns retained, but the drop at layer 3"),
        (
            [fastv(3), fastv(9, kinds={SUMMARY}), fastv(12, kinds={SKIPPED})],
            r"drops: layers 3 and 12 rank overlapping, different kinds \(retained, skipped, middle; skipped\)",
        ),
        ([fastv(3), skip_kv(evict_when="before_first_token")], "drops: .*before_first_token; use evict_when='after_"),
        ([vtw(3), skip_kv(evict_when="before_first_token")], "drops: .*before_first_token"),
    ],
)
def test_contradictions_are_refused(plans, message):
    orders = [plans] if "layers, the model" in message else permutations(plans)
    for order in orders:
        with pytest.raises(PlanError, match=message):
            compose(order)


def test_what_a_drop_leaves_can_still_be_told_apart():
    """The refusals end where the rule concerns all ranked kinds, none of them, or layers before the drop."""
    assert compose([fastv(3), ffn_skip([7])])
    assert compose([fastv(3, kinds={SKIPPED}), skip_ffn()])
    assert compose([fastv(3), vskip([7], kinds={SUMMARY})])
    assert compose([fastv(3), vskip([2], kinds={RETAINED})])
    assert compose([fastv(3, kinds={SKIPPED}), fastv(5, kinds={RETAINED})])


def test_table():
    plan = compose([vskip([1, 2], bypass="norm").bind(6), skip_ffn().bind(6)], name="p")
    assert plan.table().splitlines() == [
        "plan p: 6 layers",
        "  layer       0: no FFN for skipped",
        "  layer     1-2: no attention query for retained, skipped, middle (bypass norm); no FFN for skipped",
        "  layer     3-5: no FFN for skipped",
        "  KV cache: skipped leave after first token",
    ]
    assert dense().bind(32).table() == "plan dense: 32 layers\n  layer    0-31: dense"
    assert dense().table() == "plan dense: any depth\n  layer    rest: dense"


def test_table_of_drops():
    assert pyramiddrop((2, 4), (0.5, 8), kinds={SKIPPED}).bind(6).table().splitlines() == [
        "plan pyramiddrop: 6 layers",
        "  layer     0-1: dense",
        "  entry       2: 0.5 of skipped stay, ranked by last token of layer 2 (positions: renumber)",
        "  layer     2-3: dense",
        "  entry       4: 8 skipped stay, ranked by last token of layer 4 (positions: renumber)",
        "  layer     4-5: dense",
    ]
    assert compose([victor(3, 4), vskip([1, 2], kinds={SKIPPED})]).table().splitlines() == [
        "plan victor + vskip: any depth",
        "  layer       0: dense",
        "  layer     1-2: no attention query for skipped (bypass zero)",
        "  entry       3: all of retained, skipped, middle leave the sequence (positions: keep)",
        "  layer    rest: dense",
        "  4 learned registers behind every image",
    ]
    assert sparsevlm(layers=(0, 6, 9), keep=(30, 20, 10), kinds={SKIPPED}).table().splitlines()[1:3] == [
        "  layer    rest: dense",
        "  entry       1: 30 skipped stay, ranked by raters of layer 0, some of the others recycled "
        "(positions: renumber)",
    ]
    assert vtw(0, kinds={SKIPPED}).bind(2).table().splitlines()[1:] == [
        "  entry       0: all of skipped leave the sequence (positions: keep)",
        "  layer     0-1: dense",
    ]
