"""The joint search over attention and FFN rules, against savings counted by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from skipvision_train.calibration.search import flops_ratio, joint, part_rules, rank_layers, select_layers
from skipvision_train.errors import ConfigError
from skipvision_train.plans import TokenKind, dense, fastv, ffn_skip, shortv, vskip, vtw

COUNTS = {TokenKind.TEXT: 20, TokenKind.RETAINED: 4, TokenKind.SKIPPED: 36}


def saved_by_hand(config):
    """FLOPs per layer, and what each part saves there, for 40 visual of 60 tokens."""
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head
    attention = 2 * 2 * 40 * width * width + 2 * 2 * 40 * 60 * width
    ffn = 3 * 2 * 40 * width * config.intermediate_size
    whole = 2 * 60 * width * (2 * width + 2 * keys) + 4 * 60 * 60 * width + 6 * 60 * width * config.intermediate_size
    return {"attention": attention, "ffn": ffn}, whole


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=6), st.floats(0.35, 1))
def test_joint_takes_the_smallest_score_per_flop_until_the_target_is_met(text_config_factory_once, costs, target):
    depth = len(costs)
    config = text_config_factory_once(depth)
    saved, whole = saved_by_hand(config)
    ranking = sorted(
        ((costs[i][p] / saved[part], i, p, part) for i in range(depth) for p, part in enumerate(saved)),
    )
    expected, left = [], depth * whole
    for _, i, _, part in ranking:
        if left / (depth * whole) <= target:
            break
        expected.append((i, part))
        left -= saved[part]

    def score(plan, part):
        assert plan == dense().bind(depth)  # scored once, on the base
        return torch.tensor([pair[part == "ffn"] for pair in costs], dtype=torch.float64)

    if left / (depth * whole) > target:
        with pytest.raises(ConfigError, match="target"):
            joint(score, dense().bind(depth), target, text_config=config, kind_counts=COUNTS)
        return
    found = joint(score, dense().bind(depth), target, text_config=config, kind_counts=COUNTS)
    assert list(found.order) == expected
    assert list(found.trail) == [costs[i][part == "ffn"] for i, part in expected]
    assert found.flops_ratio == pytest.approx(left / (depth * whole))
    assert found.plan.layers_without_attention() == tuple(sorted(i for i, part in expected if part == "attention"))
    assert found.plan.layers_without_ffn() == tuple(sorted(i for i, part in expected if part == "ffn"))


@pytest.fixture(scope="module")
def text_config_factory_once():
    """One configuration per depth: hypothesis may not use a fixture that is made for every test function."""
    configs = {
        depth: LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=depth,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        for depth in range(1, 7)
    }
    return configs.__getitem__


def test_joint_with_one_part_is_the_ranking_of_that_part(text_config_factory):
    scores, config = [0.5, 0.1, 0.4, 0.1, 0.0], text_config_factory(5)
    rules = {"attention": part_rules()["attention"]}
    two = flops_ratio(config, COUNTS, vskip([1, 4]).bind(5))
    for target, n in ((1.0, 0), (two, 2), (math.nextafter(two, 0), 3)):
        found = joint(
            lambda plan, part: torch.tensor(scores),
            dense().bind(5),
            target,
            text_config=config,
            kind_counts=COUNTS,
            rules=rules,
        )
        assert tuple(layer for layer, _ in found.order) == rank_layers(scores)[:n]
        assert found.flops_ratio <= target
        assert found.plan.rules == vskip(select_layers(scores, n)).bind(5).rules


def test_a_cheap_layer_that_saves_little_loses(text_config_factory):
    """Behind a drop a layer has fewer visual tokens: a quarter of the saving at half the score is the worse bargain."""
    base = fastv(2, 0.25).bind(4)
    config = text_config_factory(4)
    target = flops_ratio(config, COUNTS, base) - 1e-6
    found = joint(
        lambda plan, part: torch.tensor([0.4, 0.5, 0.2, 0.3]),
        base,
        target,
        text_config=config,
        kind_counts=COUNTS,
        rules={"ffn": part_rules()["ffn"]},
    )
    assert found.order == ((0, "ffn"),)
    assert found.plan.drops == base.drops
    gone = joint(
        lambda plan, part: torch.tensor([0.4, 0.5, 0.0, 0.0]),
        vtw(2).bind(4),
        flops_ratio(config, COUNTS, vtw(2).bind(4)) - 1e-6,
        text_config=config,
        kind_counts=COUNTS,
    )
    assert gone.order[0][0] == 0  # layers 2 and 3 cost nothing and save nothing


def test_both_parts_of_a_layer_make_it_a_shortv_layer(text_config_factory):
    config = text_config_factory(3)
    target = flops_ratio(config, COUNTS, shortv([1]).bind(3))
    found = joint(
        lambda plan, part: torch.tensor([1.0, 0.0, 1.0]),
        dense().bind(3),
        target,
        text_config=config,
        kind_counts=COUNTS,
    )
    assert found.order == ((1, "attention"), (1, "ffn"))
    assert found.plan.rules == shortv([1]).bind(3).rules
    assert (found.plan.name, found.flops_ratio) == ("joint", target)


def test_scoring_again_sees_what_one_table_cannot(text_config_factory):
    """Without its attention, layer 0's FFN is worth nothing any more, and layer 1's attention becomes precious."""
    config, single = text_config_factory(3), {"attention": [0.1, 0.2, 9.0], "ffn": [0.9, 0.8, 9.0]}

    def cost(attention, ffn):
        total = sum(single["attention"][i] for i in attention) + sum(single["ffn"][i] for i in ffn)
        return total - (0.8 if 0 in attention and 0 in ffn else 0) + (7 if {0, 1} <= set(attention) else 0)

    def of(plan):
        return cost(plan.layers_without_attention(), plan.layers_without_ffn())

    def score(plan, part):
        asked.append((plan, part))
        return torch.tensor([of(plan.with_rule(i, part_rules()[part])) - of(plan) for i in range(3)])

    target = flops_ratio(config, COUNTS, shortv([0]).bind(3))
    asked, results = [], {}
    for rescore in (False, True):
        asked.clear()
        results[rescore] = joint(
            score, dense().bind(3), target, text_config=config, kind_counts=COUNTS, rescore=rescore
        )
        assert len(asked) == (2 * len(results[rescore].order) if rescore else 2)
    assert results[True].order == ((0, "attention"), (0, "ffn"))
    assert results[False].order[:2] == ((0, "attention"), (1, "attention"))
    assert of(results[True].plan) < of(results[False].plan)
    assert sum(results[True].trail) == pytest.approx(of(results[True].plan))


def test_an_unreachable_target_is_refused_with_the_smallest_ratio(text_config_factory):
    config, counts = text_config_factory(3), {TokenKind.TEXT: 21, TokenKind.SKIPPED: 40}
    smallest = flops_ratio(config, counts, shortv([0, 1, 2]).bind(3))

    def never(plan, part):
        raise AssertionError("nothing needs to be scored for this answer")

    options = {"text_config": config, "kind_counts": counts}
    with pytest.raises(ConfigError, match=r"target: 0\.1 of the dense FLOPs cannot be reached") as refused:
        joint(never, dense().bind(3), 0.1, **options)
    named = float(str(refused.value).split("leaves ")[1].split(",")[0])
    assert round(smallest, 4) < smallest  # so that rounding it as usual would name what cannot be reached
    assert named == pytest.approx(smallest, abs=1e-4)
    found = joint(lambda plan, part: torch.zeros(3), dense().bind(3), named, **options)  # it can be asked for
    assert len(found.order) == 6
    with pytest.raises(ConfigError, match="target: nan"):
        joint(never, dense().bind(3), math.nan, **options)
    half = joint(lambda plan, part: torch.ones(3), ffn_skip([0]).bind(3), 0.92, **options)
    assert half.order == ()
    assert half.plan.rules == ffn_skip([0]).bind(3).rules
