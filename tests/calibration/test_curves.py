"""KL and accuracy against N: which plans stand for a method, what is measured, and what is not measured again."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import skipvision_train
from skipvision_train.calibration.curves import Curve, Point, measure_curves, methods_at, points_of, table
from skipvision_train.calibration.search import Estimate, flops_ratio
from skipvision_train.errors import ConfigError
from skipvision_train.evaluation.metrics import Accuracy, accuracy
from skipvision_train.plans import TokenKind, dense, ffn_skip, shortv, vskip, vtw

ORDERS = {
    "vig": (3, 1, 2, 0),
    "random/0": (3, 0, 1, 2),
    "random/1": (3, 2, 1, 0),
    "cosine": (3, 2, 0, 1),
    "vig_ffn": (3, 0, 2, 1),
    "shortv": (3, 1, 0, 2),
}


def same(plan, other):
    return (plan.rules, plan.drops, plan.evict) == (other.rules, other.drops, other.evict)


def test_every_method_skips_its_own_layers():
    plans = methods_at(2, 4, ORDERS)
    expected = {
        "V-Skip": vskip([1, 3]),
        "V-Skip random 0": vskip([0, 3]),
        "V-Skip random 1": vskip([2, 3]),
        "V-Skip cosine": vskip([2, 3]),
        "FFN-Skip": ffn_skip([0, 3]),
        "ShortV": shortv([1, 3]),
        "VTW": vtw(2),
    }
    assert list(plans) == list(expected)
    for name, plan in plans.items():
        assert same(plan, expected[name].bind(4)), name
        assert plan.name == name
    assert methods_at(2, 4, {"vig": ORDERS["vig"]}, bypass="norm")["V-Skip"].rules[1].bypass == "norm"


def test_nothing_and_everything():
    assert all(plan.is_dense for plan in methods_at(0, 4, ORDERS).values())
    everything = methods_at(4, 4, ORDERS)
    assert same(everything["V-Skip"], everything["V-Skip random 1"])
    assert same(everything["ShortV"], shortv([0, 1, 2, 3]).bind(4))
    assert [drop.layer for drop in everything["VTW"].drops] == [0]


@pytest.mark.parametrize("n", range(1, 5))
def test_n_is_the_number_of_layers_that_every_method_relieves(n):
    counts = {TokenKind.TEXT: 5, TokenKind.SKIPPED: 7}
    for name, plan in methods_at(n, 4, ORDERS).items():
        live = skipvision_train.analysis.flops.live_counts(counts, plan)
        relieved = [not rule.is_dense or not now[TokenKind.SKIPPED] for rule, now in zip(plan.rules, live, strict=True)]
        assert sum(relieved) == n, name


@pytest.mark.parametrize(
    ("n", "orders", "message"),
    [
        (5, {}, "count: 5 of 4 layers"),
        (-1, {}, "count: -1 of 4 layers"),
        (1, {"entropy": (0, 1, 2, 3)}, "orders: no method chooses its layers by 'entropy'; use vig, "),
        (1, {"vig": (0, 1, 2)}, r"orders.vig: \[0, 1, 2\] does not name each of the layers 0 to 3 once"),
        (1, {"random/7": (0, 1, 1, 2)}, "orders.random/7"),
    ],
)
def test_methods_refuse(n, orders, message):
    with pytest.raises(ConfigError, match=message):
        methods_at(n, 4, orders)


class Fake:
    """Measures a plan by counting what it leaves out, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def divergence(self, plan):
        self.asked.append(plan.name)
        size = len(plan.layers_without_attention()) + 10 * len(plan.layers_without_ffn()) + 100 * len(plan.drops)
        return torch.tensor([size - 0.5, size + 0.5])

    def accuracy(self, plan):
        return accuracy(9 - len(plan.layers_without_attention()), 10)

    def ratio(self, plan):
        return 1 - 0.1 * len(plan.layers_without_attention())


PLANS = {n: methods_at(n, 4, ORDERS) for n in (2, 0, 4)}
KEYS = ("n", "kl", "accuracy", "flops_ratio")


def test_curves_hold_what_was_measured():
    fake = Fake()
    curves = measure_curves(PLANS, fake.divergence, fake.ratio, fake.accuracy)
    assert [curve.name for curve in curves] == list(PLANS[2])
    assert [[point.n for point in curve.points] for curve in curves] == [[0, 2, 4]] * len(curves)
    by_name = {curve.name: curve.points for curve in curves}
    assert [point.kl.value for point in by_name["V-Skip"]] == [0, 2, 4]
    assert [point.kl.value for point in by_name["ShortV"]] == [0, 22, 44]
    assert [point.kl.value for point in by_name["VTW"]] == [0, 100, 100]
    half = 1.959964 * math.sqrt(0.5) / math.sqrt(2)
    assert by_name["V-Skip"][1].kl.high - 2 == pytest.approx(half, abs=1e-6)
    assert [point.accuracy.value for point in by_name["V-Skip"]] == [0.9, 0.7, 0.5]
    assert by_name["V-Skip"][1].accuracy == accuracy(7, 10)
    assert [point.flops_ratio for point in by_name["V-Skip"]] == pytest.approx([1, 0.8, 0.6])


def test_equal_plans_are_measured_once():
    fake = Fake()
    measure_curves(PLANS, fake.divergence, fake.ratio)
    # N = 0: one dense plan. N = 2: random 1 and cosine agree. N = 4: all of V-Skip's variants agree.
    assert fake.asked == [
        "V-Skip",
        *("V-Skip", "V-Skip random 0", "V-Skip random 1", "FFN-Skip", "ShortV", "VTW"),
        *("V-Skip", "FFN-Skip", "ShortV", "VTW"),
    ]


def test_equal_plans_at_different_n_keep_their_n():
    fake, plan = Fake(), dense().bind(4)
    (curve,) = measure_curves({1: {"A": plan}, 3: {"A": plan}}, fake.divergence, fake.ratio)
    assert ([point.n for point in curve.points], fake.asked) == ([1, 3], ["A"])


def test_an_interrupted_run_goes_on_where_it_stopped():
    whole = measure_curves(PLANS, Fake().divergence, Fake().ratio, Fake().accuracy)
    kept, first = {}, Fake()

    def keep(name, point):
        kept[name, point.n] = point
        if len(kept) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_curves(PLANS, first.divergence, first.ratio, first.accuracy, keep=keep)
    second, new = Fake(), {}
    curves = measure_curves(
        PLANS,
        second.divergence,
        second.ratio,
        second.accuracy,
        done=kept,
        keep=lambda name, point: new.update({(name, point.n): point}),
    )
    assert curves == whole
    assert len(first.asked) + len(second.asked) == 11
    assert not set(kept) & set(new)
    assert {**kept, **new} == points_of(curves)
    third = Fake()
    assert measure_curves(PLANS, third.divergence, third.ratio, done=points_of(curves)) == whole
    assert third.asked == []


def test_a_done_point_stands_for_equal_plans():
    done = {("V-Skip", 0): Point(0, Estimate(0, 0, 0), None, 1.0)}
    fake = Fake()
    curves = measure_curves({0: PLANS[0]}, fake.divergence, fake.ratio, done=done)
    assert fake.asked == []
    assert [curve.points for curve in curves] == [(done["V-Skip", 0],)] * len(curves)


def test_divergences_that_are_not_finite_are_refused_with_their_place():
    with pytest.raises(ConfigError, match=r"V-Skip, N = 2: divergence: needs finite values"):
        measure_curves({2: PLANS[2]}, lambda plan: torch.tensor([math.inf]), lambda plan: 1.0)


def test_json_round_trip():
    fake = Fake()
    for measure in (fake.accuracy, None):
        curves = measure_curves(PLANS, fake.divergence, fake.ratio, measure)
        text = json.dumps([curve.to_dict() for curve in curves])
        assert [Curve.from_dict(data) for data in json.loads(text)] == curves


def test_the_table_is_markdown_with_intervals():
    points = (
        Point(0, Estimate(0.0, 0.0, 0.0), None, 1.0),
        Point(19, Estimate(0.01234, 0.01, 0.0146), Accuracy(0.5, 0.25, 0.75, 4), 0.9),
    )
    assert table([Curve("V-Skip", points), Curve("VTW", points[:1])]).split("\n") == [
        "| method | N | KL (nats) | accuracy (%) | FLOPs (%) |",
        "|---|---:|---:|---:|---:|",
        "| V-Skip | 0 | 0 [0, 0] | - | 100.0 |",
        "| V-Skip | 19 | 0.0123 [0.01, 0.0146] | 50.0 [25.0, 75.0] | 90.0 |",
        "| VTW | 0 | 0 [0, 0] | - | 100.0 |",
    ]


def test_curves_of_a_real_model(text_config_factory):
    torch.manual_seed(0)
    config = text_config_factory(3)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.25)
    ids = torch.randint(10, 300, (4, 14))
    ids[:, 2:10] = 3

    @torch.no_grad()
    def log_probs(plan):
        with skipvision_train.apply(model, plan, image_token_id=3):
            return model(ids).logits[:, -1].double().log_softmax(-1)

    full, counts = log_probs(dense()), {TokenKind.TEXT: 6, TokenKind.SKIPPED: 8}

    def kl_from_full(other):
        return F.kl_div(other, full, reduction="none", log_target=True).sum(-1)

    orders = {"vig": (2, 0, 1), "random/0": (1, 2, 0), "vig_ffn": (2, 1, 0), "shortv": (2, 0, 1)}
    curves = measure_curves(
        {n: methods_at(n, 3, orders) for n in range(4)},
        lambda plan: kl_from_full(log_probs(plan)),
        lambda plan: flops_ratio(config, counts, plan),
    )
    kl = {curve.name: [point.kl.value for point in curve.points] for curve in curves}
    ratios = {curve.name: [point.flops_ratio for point in curve.points] for curve in curves}
    assert {values[0] for values in kl.values()} == {0}
    for name in ("V-Skip", "FFN-Skip", "ShortV"):
        assert abs(kl[name][1]) < 1e-9 < 1e-4 < kl[name][2]  # the last layer is free
    assert min(kl["V-Skip random 0"][1], kl["VTW"][1]) > 1e-4
    for name, values in ratios.items():
        assert values[0] == 1, name
        assert values == sorted(values, reverse=True), name
    text = torch.tensor([0, 1, 10, 11, 12, 13])  # VTW at N = 3: the visual tokens were never there, positions kept
    with torch.no_grad():
        alone = model(ids[:, text], position_ids=text[None].expand(4, -1)).logits[:, -1].double().log_softmax(-1)
    assert kl["VTW"][3] == pytest.approx(float(kl_from_full(alone).mean()), rel=1e-4)
    dense_alone = flops_ratio(config, {TokenKind.TEXT: 6}, dense().bind(3))
    assert dense_alone == 1
    assert ratios["VTW"][3] < ratios["ShortV"][3] < min(ratios["V-Skip"][3], ratios["FFN-Skip"][3])
