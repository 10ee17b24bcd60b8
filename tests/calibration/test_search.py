"""Budgets, agreement of seeds, and searches against exhaustive ones; real divergences of a tiny model at the end."""

import math
import statistics
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import skipvision_train
from skipvision_train.calibration.scores import ScoreTable
from skipvision_train.calibration.search import (
    Budget,
    Estimate,
    compare,
    count_for,
    flops_ratio,
    greedy,
    joint,
    part_rules,
    rank_layers,
    select_layers,
    stability,
    universal,
)
from skipvision_train.errors import ConfigError, PlanError
from skipvision_train.plans import VISUAL, LayerRule, TokenKind, dense, ffn_skip, shortv, skip_ffn, vskip

RULE = LayerRule(no_attention=VISUAL)
SCORES = st.lists(st.integers(0, 20).map(lambda i: i / 8), min_size=1, max_size=8)
"""Eighths: sums are exact, and ties are frequent."""


def table(values, tasks=None, strategy="vig", bypass="zero"):
    values = torch.tensor(values, dtype=torch.float64)
    columns = values.shape[1]
    return ScoreTable(strategy, bypass, values, tuple(f"s{i}" for i in range(columns)), tuple(tasks or [""] * columns))


# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "n", "layers"),
    [
        ([0.3, 0.1, 0.2, 0.0], 2, (1, 3)),
        ([0.0, 0.0, 0.0, 0.0], 2, (0, 1)),
        ([1.0, 0.5, 0.5, 0.5], 2, (1, 2)),
        ([1.0, 2.0], 0, ()),
        ([2.0, 1.0], 2, (0, 1)),
    ],
)
def test_select(scores, n, layers):
    assert select_layers(torch.tensor(scores), n) == layers
    assert select_layers(scores, n) == layers


@pytest.mark.parametrize(
    ("scores", "n"), [([0.0], 2), ([0.0], -1), ([float("nan"), 0.0], 1), ([float("inf")], 0), ([0.0, -math.inf], 1)]
)
def test_select_refuses(scores, n):
    with pytest.raises(ConfigError, match="layers"):
        select_layers(scores, n)


def test_scores_that_are_not_finite_are_named_and_never_rank():
    with pytest.raises(ConfigError, match=r"scores: those of layers \[1, 3\] are not finite: \[nan, inf\]"):
        rank_layers([0.0, math.nan, 1.0, math.inf])
    with pytest.raises(ConfigError, match=r"layers \[0\]"):
        count_for([math.nan, 0.0, 1.0], Budget(threshold=0.5))
    with pytest.raises(ConfigError, match="scores: there are none"):
        select_layers([], 0)


def test_ranking_is_the_order_in_which_layers_are_selected():
    scores = [0.3, 0.0, 0.3, 0.1]
    assert rank_layers(scores) == (1, 3, 0, 2)
    assert rank_layers(torch.tensor(scores)) == (1, 3, 0, 2)


@pytest.mark.parametrize(
    ("budget", "layers"),
    [
        (Budget(count=0), ()),
        (Budget(count=3), (0, 2, 3)),
        (Budget(share=0.0), ()),
        (Budget(share=0.5), (2, 3)),
        (Budget(share=0.79), (0, 2, 3)),
        (Budget(share=1), (0, 1, 2, 3, 4)),
        (Budget(threshold=0), (3,)),
        (Budget(threshold=0.25), (0, 2, 3)),
        (Budget(threshold=0.2499), (2, 3)),
        (Budget(total=0), (3,)),
        (Budget(total=0.374), (2, 3)),
        (Budget(total=0.375), (0, 2, 3)),
        (Budget(total=100), (0, 1, 2, 3, 4)),
    ],
)
def test_budgets(budget, layers):
    assert count_for(torch.tensor([0.25, 2.0, 0.125, 0.0, 1.0]), budget) == layers


@given(SCORES, st.integers(0, 40).map(lambda i: i / 8))
def test_budgets_are_what_exhaustive_search_finds(scores, nats):
    every = [c for n in range(len(scores) + 1) for c in combinations(range(len(scores)), n)]
    sums = {chosen: sum(scores[i] for i in chosen) for chosen in every}
    for n in range(len(scores) + 1):
        chosen = count_for(scores, Budget(count=n))
        assert len(chosen) == n
        assert sums[chosen] == min(total for other, total in sums.items() if len(other) == n)
    affordable = [other for other, total in sums.items() if total <= nats]
    chosen = count_for(scores, Budget(total=nats))
    assert chosen in affordable
    assert len(chosen) == max(map(len, affordable))
    below = count_for(scores, Budget(threshold=nats))
    assert [i in below for i in range(len(scores))] == [score <= nats for score in scores]


def test_shares_are_not_lost_to_rounding():
    assert len(count_for([0.0] * 100, Budget(share=0.29))) == 29
    assert len(count_for([0.0] * 7, Budget(share=0.5))) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "budget: none is given; give exactly one of count, share, threshold, total"),
        ({"count": 2, "total": 0.5}, "budget: count and total are given"),
        ({"count": -1}, "count: -1"),
        ({"count": 1.5}, "count: 1.5 is no number of layers"),
        ({"count": True}, "count: True is no number of layers"),
        ({"share": -0.1}, "share: -0.1"),
        ({"share": 1.01}, "share: 1.01"),
        ({"threshold": -1e-9}, "threshold: -1e-09"),
        ({"total": math.nan}, "total: nan"),
    ],
)
def test_budgets_that_say_nothing_or_too_much_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**fields)


def test_a_count_above_the_depth_is_refused():
    with pytest.raises(ConfigError, match="count: 4 of 3 layers"):
        count_for([0.0, 1.0, 2.0], Budget(count=4))


# --- seeds and tasks -----------------------------------------------------------------------------------------------


def test_stability_by_hand():
    seeds = [[[0.1, 0.3], [1.0, 1.0], [0.0, 0.0]], [[0.6], [0.5], [0.0]], [[0.2], [0.7], [0.0]]]
    scores = torch.stack([table(values).mean() for values in seeds])
    found = stability(scores, [select_layers(own, 2) for own in scores])
    means = [[0.2, 1.0, 0.0], [0.6, 0.5, 0.0], [0.2, 0.7, 0.0]]  # chosen: {0, 2}, {1, 2}, {0, 2}
    columns = list(zip(*means, strict=True))
    assert found.mean.tolist() == pytest.approx([statistics.mean(column) for column in columns])
    assert found.variance.tolist() == pytest.approx([statistics.variance(column) for column in columns])
    assert found.chosen.tolist() == pytest.approx([2 / 3, 1 / 3, 1])
    third = 1 / 3
    assert found.overlap.flatten().tolist() == pytest.approx([1, third, 1, third, 1, third, 1, third, 1])
    assert found.mean_overlap == pytest.approx((third + 1 + third) / 3)


def test_stability_of_a_single_seed_and_of_no_layers():
    alone = stability(torch.tensor([[0.1, 0.0]]), [[1]])
    assert (alone.variance.tolist(), alone.chosen.tolist(), alone.mean_overlap) == ([0, 0], [0, 1], 1)
    apart = stability(torch.tensor([[0.1, 0.0], [0.1, 0.2]]), [[1], [0]])
    assert (apart.chosen.tolist(), apart.mean_overlap) == ([0.5, 0.5], 0)
    nothing = stability(torch.tensor([[0.1, 0.0]] * 2), [[], []])
    assert (nothing.chosen.tolist(), nothing.mean_overlap) == ([0, 0], 1)


@pytest.mark.parametrize("other", [{"strategy": "cosine"}, {"bypass": "norm"}, {"values": [[0.0]]}])
def test_tables_of_different_kinds_are_refused(other):
    tables = [table([[0.1], [0.0]]), table(**{"values": [[0.1], [0.0]], **other})]
    with pytest.raises(ConfigError, match=r"scores: vig .* cannot be put together|scores: cosine .* put together"):
        universal(tables)
    with pytest.raises(ConfigError, match="no tables"):
        universal([])


def test_pooled_scores_count_every_task_the_same():
    several = table([[1, 3, 8], [0, 0, 6]], ["ocr", "ocr", "count"])
    assert universal(several).tolist() == [5, 3]
    assert universal(several, "ocr").tolist() == [2, 0]
    assert universal(several, "count").tolist() == [8, 6]
    apart = [table([[1, 3], [0, 0]], ["ocr"] * 2), table([[8], [6]], ["count"])]
    assert universal(apart).tolist() == [5, 3]
    seeds = [table([[1], [0]], ["ocr"]), table([[8, 3], [6, 0]], ["count", "ocr"])]
    assert universal(seeds).tolist() == [5, 3]
    assert universal(seeds, "ocr").tolist() == [2, 0]


def test_an_unknown_task_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="universal: no sample has the task 'chart'; use pooled or one of ocr, count"):
        universal(table([[1, 2], [0, 0]], ["ocr", "count"]), "chart")


# --- greedy --------------------------------------------------------------------------------------------------------


def added(cost):
    """Scores of one further layer from the cost of a set of layers without attention; records the plans asked for."""

    def score(plan):
        score.asked.append(plan)
        chosen = set(plan.layers_without_attention())
        return torch.tensor([cost(chosen | {i}) - cost(chosen) for i in range(plan.num_layers)], dtype=torch.float64)

    score.asked = []
    return score


@given(SCORES, st.data())
def test_greedy_is_top_n_where_scores_add_up(scores, data):
    n = data.draw(st.integers(0, len(scores)))
    score = added(lambda chosen: sum(scores[i] for i in chosen))
    found = greedy(score, dense().bind(len(scores)), RULE, n)
    assert set(found.order) == set(select_layers(scores, n))
    assert found.plan.rules == vskip(sorted(found.order)).bind(len(scores)).rules
    assert list(found.trail) == [scores[i] for i in found.order] == sorted(found.trail)
    assert len(score.asked) == n
    best = min(sum(scores[i] for i in chosen) for chosen in combinations(range(len(scores)), n))
    assert sum(found.trail) == best


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9))
def test_the_first_pick_is_top_1(scores):
    found = greedy(lambda plan: torch.tensor(scores, dtype=torch.float64), dense().bind(len(scores)), RULE, 1)
    assert found.order == select_layers(scores, 1)
    assert found.trail == (min(scores),)


def test_greedy_sees_that_two_layers_replace_each_other():
    """Layers 0 and 1 hold the same: either may go, not both. Top-N takes both."""

    def cost(chosen):
        single = {0: 0.1, 1: 0.1, 2: 0.25, 3: 0.5}
        return sum(single[i] for i in chosen) + (5 if {0, 1} <= set(chosen) else 0)

    score = added(cost)
    top = select_layers(score(dense().bind(4)), 2)
    found = greedy(score, dense().bind(4), RULE, 2)
    assert (top, found.order) == ((0, 1), (0, 2))
    assert cost(top) > cost(found.order) == min(map(cost, combinations(range(4), 2)))
    assert found.trail == pytest.approx((0.1, 0.25))


def test_greedy_grows_the_base_plan_and_leaves_its_layers_alone():
    base = skipvision_train.plans.compose([skip_ffn(), vskip([1, 3])]).bind(4)
    found = greedy(lambda plan: torch.tensor([0.3, 0.0, 0.2, 0.0]), base, RULE, 2)
    assert found.order == (2, 0)
    assert found.plan.layers_without_attention() == (0, 1, 2, 3)
    assert (found.plan.evict, found.plan.rules[0].no_ffn) == (base.evict, frozenset({TokenKind.SKIPPED}))
    with pytest.raises(ConfigError, match="count: 3 of 2 layers"):
        greedy(lambda plan: torch.zeros(4), base, RULE, 3)


def test_greedy_refuses_what_cannot_rank():
    base = dense().bind(3)
    with pytest.raises(ConfigError, match=r"layers \[1\] are not finite"):
        greedy(lambda plan: torch.tensor([0.0, math.nan, 1.0]), base, RULE, 1)
    with pytest.raises(ConfigError, match="scores: 2 for the 3 layers"):
        greedy(lambda plan: torch.zeros(2), base, RULE, 1)
    with pytest.raises(PlanError, match="bind"):
        greedy(lambda plan: torch.zeros(3), dense(), RULE, 1)


COUNTS = {TokenKind.TEXT: 20, TokenKind.RETAINED: 4, TokenKind.SKIPPED: 36}


# --- final plans ---------------------------------------------------------------------------------------------------


def test_comparison_by_hand():
    divergences = {"vskip": [0.1, 0.2, 0.6], "ffn_skip": [0.2, 0.3, 0.7]}
    rows = compare(
        {"A": vskip([0]).bind(2), "B": ffn_skip([1]).bind(2)}, lambda plan: torch.tensor(divergences[plan.name])
    )
    assert [(row.name, row.samples) for row in rows] == [("A", 3), ("B", 3)]
    half = 1.959964 * statistics.stdev(divergences["vskip"]) / math.sqrt(3)
    assert vars(rows[0].kl) == pytest.approx({"value": 0.3, "low": 0.3 - half, "high": 0.3 + half}, abs=1e-6)
    assert rows[1].kl.low < rows[0].kl.high  # the means' intervals overlap, and yet B is worse on every sample:
    assert rows[1].difference.low > 0
    assert vars(rows[1].difference) == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1}, abs=1e-6)
    assert rows[0].difference == Estimate(0, 0, 0)


def test_one_sample_has_an_interval_without_width():
    assert Estimate.of(torch.tensor([0.25])) == Estimate(0.25, 0.25, 0.25)


def test_comparisons_of_other_samples_or_of_no_numbers_are_refused():
    plans = {"A": vskip([0]), "B": ffn_skip([0])}
    with pytest.raises(ConfigError, match="divergence: 1 samples for B, 2 for A"):
        compare(plans, lambda plan: torch.zeros(2 if plan.name == "vskip" else 1))
    with pytest.raises(ConfigError, match="B: divergence: needs finite values"):
        compare(plans, lambda plan: torch.tensor([0.0 if plan.name == "vskip" else math.nan]))
    with pytest.raises(ConfigError, match="at least one sample"):
        compare(plans, lambda plan: torch.zeros(0))


# --- a real model --------------------------------------------------------------------------------------------------


@pytest.fixture
def divergence(text_config_factory):
    """KL(dense || plan) per sample of three prompts with an image each, by forwards of a tiny model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(text_config_factory(3)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.25)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, 300, (1, 14), generator=generator) for _ in range(3)]
    for start, ids in enumerate(prompts):
        ids[0, start : start + 8] = 3

    @torch.no_grad()
    def log_probs(plan):
        with skipvision_train.apply(model, plan, image_token_id=3):
            return torch.cat([model(ids).logits[:, -1] for ids in prompts]).double().log_softmax(-1)

    full = log_probs(dense())
    return lambda plan: F.kl_div(log_probs(plan), full, reduction="none", log_target=True).sum(-1)


def test_searches_on_a_real_model(divergence, text_config_factory):
    def score(plan, part="attention"):
        now, rule = divergence(plan).mean(), part_rules()[part]
        return torch.stack([divergence(plan.with_rule(i, rule)).mean() - now for i in range(3)])

    base, config = dense().bind(3), text_config_factory(3)
    table_of_base = score(base)
    assert table_of_base[2].abs() < 1e-9  # nobody reads what the last layer's visual tokens compute
    assert table_of_base[:2].min() > 1e-4
    found = greedy(score, base, RULE, 2)
    assert found.order[:1] == select_layers(table_of_base.round(decimals=9), 1) == (2,)
    assert found.plan.rules == vskip(sorted(found.order)).bind(3).rules

    target = flops_ratio(config, COUNTS, shortv([2]).bind(3)) - 1e-3  # the last layer's two parts, and one more
    both = joint(score, base, target, text_config=config, kind_counts=COUNTS, rescore=True)
    assert {*both.order[:2]} == {(2, "attention"), (2, "ffn")}
    assert len(both.order) == 3

    rows = compare({"greedy": found.plan, "joint": both.plan, "free": shortv([2])}, divergence)
    assert rows[0].kl.value == pytest.approx(sum(found.trail), abs=1e-9)
    assert rows[1].kl.value == pytest.approx(sum(both.trail), abs=1e-9)
    assert min(rows[0].kl.value, rows[1].kl.value) > 1e-4 > rows[2].kl.value
    every_pair = [float(divergence(vskip(pair)).mean()) for pair in combinations(range(3), 2)]
    assert rows[0].kl.value == pytest.approx(min(every_pair), abs=1e-9)
