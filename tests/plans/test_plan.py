"""The plan as data: what is refused, how it is stored, printed and combined."""

import json

import pytest

from skipvision_train.errors import PlanError
from skipvision_train.plans import (
    LayerRule,
    SkipPlan,
    TokenKind,
    compose,
    dense,
    ffn_skip,
    shortv,
    skip_ffn,
    vskip,
)

VARIED = [
    dense(2),
    skip_ffn(3),
    skip_ffn(3, kinds=["skipped", "SUMMARY"], evict=(), evict_when="before_first_token"),
    vskip(4, [1, 3], bypass="norm"),
    compose([shortv(3, [0]), skip_ffn(3)], name="both"),
]


@pytest.mark.parametrize("plan", VARIED, ids=lambda plan: plan.name)
def test_json_roundtrip(plan, tmp_path):
    path = tmp_path / "deep" / "plan.json"
    plan.save(path)
    again = SkipPlan.load(path)
    assert again == plan
    assert hash(again) == hash(plan)
    assert json.loads(path.read_text())["num_layers"] == plan.num_layers
    assert list(path.parent.iterdir()) == [path]


def test_provenance_is_carried_and_ignored_by_equality(tmp_path):
    plan = SkipPlan("p", (LayerRule(),), provenance={"seed": 3})
    plan.save(tmp_path / "p.json")
    assert SkipPlan.load(tmp_path / "p.json").provenance == {"seed": 3}
    assert plan == SkipPlan("p", (LayerRule(),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": [{"no_atention": []}]}, "not a plan: TypeError.*no_atention"),
        ({"rules": [{"no_ffn": ["visual"]}]}, "no_ffn: 'visual' is no token kind; use some of text, retained"),
        ({"rules": [{"no_ffn": ["pad"]}]}, "'pad' is no token kind"),
        ({"rules": [{"bypass": "one"}]}, "bypass: 'one' is unknown; use zero or norm"),
        ({"rules": []}, "needs one rule per decoder layer"),
        ({"evict": ["text"]}, "text cannot leave the cache"),
        ({"evict_when": "never"}, "evict_when: 'never' is unknown"),
        ({"format_version": 9}, "format_version is 9, expected 1"),
        ({"num_layers": 7}, "num_layers is 7 but there are 1 rules"),
        ({"layers": 1}, "unknown fields layers"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**SkipPlan("p", (LayerRule(),)).to_dict(), **change}))
    with pytest.raises(PlanError, match=f"bad.json: .*{message}"):
        SkipPlan.load(path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(PlanError, match=r"none.json: no such plan file"):
        SkipPlan.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"name": ')
    with pytest.raises(PlanError, match=r"half.json: not JSON"):
        SkipPlan.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(PlanError, match="a plan is a JSON object, found list"):
        SkipPlan.load(tmp_path / "list.json")
    data = dense(1).to_dict()
    del data["name"]
    with pytest.raises(PlanError, match=r"KeyError.*name"):
        SkipPlan.from_dict(data)


def test_builders_refuse_layers_that_do_not_exist():
    with pytest.raises(PlanError, match=r"vskip: layers \[3\] do not exist; the model has layers 0 to 2"):
        vskip(3, [0, 3])
    with pytest.raises(PlanError, match="name a layer twice"):
        ffn_skip(3, [1, 1])


def test_builders_say_what_the_methods_skip():
    visual = frozenset({TokenKind.RETAINED, TokenKind.SKIPPED})
    assert vskip(3, [1]).rules[1] == LayerRule(no_attention=visual)
    assert vskip(3, [1]).rules[0].is_dense
    assert ffn_skip(3, [1]).rules[1] == LayerRule(no_ffn=visual)
    assert shortv(3, [1]).rules[1] == LayerRule(no_attention=visual, no_ffn=visual)
    assert skip_ffn(3).rules == (LayerRule(no_ffn=frozenset({TokenKind.SKIPPED})),) * 3
    assert skip_ffn(3).evict == {TokenKind.SKIPPED}
    assert dense(3).is_dense
    assert not SkipPlan("e", dense(3).rules, evict=frozenset({TokenKind.SKIPPED})).is_dense


def test_layers_of_a_plan():
    plan = compose([vskip(5, [3, 1]), ffn_skip(5, [4])])
    assert plan.layers_without_attention() == (1, 3)
    assert plan.layers_without_ffn() == (4,)
    with pytest.raises(PlanError, match="has 5 layers, the model has 4"):
        plan.check_depth(4)


def test_compose_is_union_and_commutes():
    a, b = vskip(4, [0, 1]), skip_ffn(4)
    both = compose([a, b])
    assert both.name == "vskip + skip_ffn"
    assert both.rules == compose([b, a]).rules
    assert both.evict == b.evict
    assert compose([a, a]).rules == a.rules
    assert compose([a, dense(4)]).rules == a.rules
    assert dense(4).with_rule(2, a.rules[0]).rules == vskip(4, [2]).rules


def test_compose_refuses_contradictions():
    with pytest.raises(PlanError, match="no plans"):
        compose([])
    with pytest.raises(PlanError, match="'zero' and 'norm' cannot both hold"):
        compose([vskip(3, [0]), vskip(3, [0], bypass="norm")])
    assert compose([vskip(3, [0]), vskip(3, [1], bypass="norm")]).rules[1].bypass == "norm"
    with pytest.raises(PlanError, match="eviction after_first_token and before_first_token"):
        compose([skip_ffn(3), skip_ffn(3, evict_when="before_first_token")])
    with pytest.raises(PlanError, match="has 4 layers, the model has 3"):
        compose([dense(3), dense(4)])


def test_table():
    plan = compose([vskip(6, [1, 2], bypass="norm"), skip_ffn(6)], name="p")
    assert plan.table() == "\n".join([
        "plan p: 6 layers",
        "  layer       0: no FFN for skipped",
        "  layer     1-2: no attention query for retained, skipped (bypass norm); no FFN for skipped",
        "  layer     3-5: no FFN for skipped",
        "  KV cache: skipped leave after first token",
    ])  # fmt: skip
    assert dense(32).table() == "plan dense: 32 layers\n  layer    0-31: dense"
