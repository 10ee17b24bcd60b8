"""Plans side by side: the same answers as ``evaluate``, differences and costs by hand, methods brought to a share."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from skipvision_train.analysis.flops import layer_flops, sequence_flops
from skipvision_train.analysis.tradeoff import pictures, points_of
from skipvision_train.calibration.scores import ScoreTable
from skipvision_train.data.records import Turn
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.evaluation.bench import (
    Answers,
    Wanted,
    ask_plans,
    assemble,
    conversation_of,
    differences,
    mean_prompt,
    plan_cost,
)
from skipvision_train.evaluation.bench_results import BenchResult, markdown
from skipvision_train.evaluation.equal_flops import (
    METHODS,
    Order,
    at_share,
    fastv_layer,
    flops_share,
    layer_orders,
)
from skipvision_train.evaluation.evaluate import predict
from skipvision_train.evaluation.results import Prediction
from skipvision_train.evaluation.timing import PlanTimes, Spread, measure_answers
from skipvision_train.inference import Assistant, Conversation, Sampling
from skipvision_train.plans import LayerRule, TokenKind, dense, fastv, skip_ffn, vskip, vtw
from skipvision_train.plans.rules import VISUAL


@pytest.fixture
def assistant(model, processor):
    return Assistant(model, processor)


@pytest.fixture
def plans():
    return {"dense": dense().bind(3), "vskip": vskip([0, 1, 2]).bind(3), "fastv": fastv(1, 0.25).bind(3)}


# --- answers -------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_evaluate_under_every_plan(assistant, records, plans):
    former = assistant.plan
    found = ask_plans(assistant, plans, records, batch_size=5, max_new_tokens=6)
    for name, plan in plans.items():
        with assistant.under(plan):
            expected = predict(assistant.model, assistant.processor, records, 3, 6)
        assert [p.output for p in found.predictions[name]] == [p.output for p in expected]
        assert [p.score for p in found.predictions[name]] == [p.score for p in expected]
        assert list(found.prompts) == [p.tokens for p in expected]
    outputs = {name: [p.output for p in own] for name, own in found.predictions.items()}
    assert outputs["dense"] != outputs["vskip"] != outputs["fastv"]  # the plans did run
    assert assistant.plan == former


def test_the_likeliest_choice_is_evaluates(assistant, records, plans):
    extras = {"metric": "multiple_choice_likelihood", "choices": ["red", "blue", "some other colour"]}
    asked = [replace(record, extras=extras) if record.task == "colour" else record for record in records]
    found = ask_plans(assistant, plans, asked, batch_size=4, max_new_tokens=4)
    for name, plan in plans.items():
        with assistant.under(plan):
            expected = predict(assistant.model, assistant.processor, asked, 4, 4)
        assert [p.output for p in found.predictions[name]] == [p.output for p in expected]


def test_every_question_is_answered_with_one_of_its_own_choices(assistant, records, plans):
    """Behind questions of another metric, in batches of two."""
    metric = "multiple_choice_likelihood"
    own = [[f"{i} red", f"{i} blue"] for i in range(5)]
    asked = [records[0]] + [
        replace(record, turns=(record.turns[0], Turn("assistant", two[1])), extras={"metric": metric, "choices": two})
        for record, two in zip(records, own, strict=False)
    ]
    found = ask_plans(assistant, {"dense": plans["dense"]}, asked, 2, 4).predictions["dense"]
    assert all(answer.output in two for answer, two in zip(found[1:], own, strict=True))


def test_the_last_question_is_asked_behind_the_former_turns(assistant, records, plans):
    said = (Turn("user", "Which?"), Turn("assistant", "blue"), Turn("user", "And now?"), Turn("assistant", "red"))
    several = replace(records[-1], turns=said, images=())
    assert conversation_of(several).turns == said[:3]
    (found,) = ask_plans(assistant, {"dense": plans["dense"]}, [several], 1, 4).predictions["dense"]
    with assistant.under(plans["dense"]):
        expected = assistant.ask("And now?"), assistant.reply(Conversation(said[:3]), Sampling(4)).text
    assert (found.question, found.answer, found.output) == ("And now?", "red", expected[1])
    assert found.output != expected[0]


# --- differences ---------------------------------------------------------------------------------------------------


def test_the_difference_is_that_of_the_means_over_tasks():
    questions = [("1", "a"), ("2", "a"), ("3", "a"), ("4", "a"), ("5", "b"), ("6", "b")]
    scores = {"dense": [1, 1, 0, 0, 1, 0], "other": [1, 0, 0, 0, 1, 1], "same": [1, 1, 0, 0, 1, 0]}
    found = differences(questions, scores, "dense")
    # Task a: 1/4 - 2/4; task b: 2/2 - 1/2; their mean.
    assert found["other"].value == pytest.approx((-0.25 + 0.5) / 2)
    assert found["other"].low < found["other"].value < found["other"].high
    for name in ("dense", "same"):
        assert (found[name].value, found[name].low, found[name].high) == (0, 0, 0)


def test_intervals_are_paired_and_agree_with_a_slow_bootstrap():
    rng = random.Random(3)
    base = [float(rng.random() < 0.5) for _ in range(200)]
    other = [score if rng.random() < 0.9 else 1 - score for score in base]
    questions = [(str(i), "ab"[i % 2]) for i in range(200)]
    found = differences(questions, {"dense": base, "other": other}, "dense")["other"]
    means = []
    for _ in range(2000):
        tasks = []
        for k in range(2):
            rows = [i for i in range(200) if i % 2 == k]
            drawn = [rng.choice(rows) for _ in rows]
            tasks.append(sum(other[i] - base[i] for i in drawn) / len(rows))
        means.append(sum(tasks) / 2)
    means.sort()
    assert found.low == pytest.approx(means[50], abs=0.012)
    assert found.high == pytest.approx(means[1949], abs=0.012)
    # Unpaired, two means of 200 coin flips would be twice 0.07 apart.
    assert found.high - found.low < 0.12


# --- cost ----------------------------------------------------------------------------------------------------------


def test_cost_by_hand(assistant):
    """Two prompts; V-Skip in layer 0, all visual tokens gone before layer 2."""
    config = assistant.model.config.text_config
    plan = replace(vtw(2), rules=(LayerRule(no_attention=VISUAL),)).bind(3)
    prompts = [{"text": 4, "skipped": 6}, {"text": 2, "skipped": 8, "retained": 2}]
    expected = dense_flops = kv = 0.0
    width = config.num_key_value_heads * config.head_dim
    for prompt in prompts:
        counts = {TokenKind[name.upper()]: n for name, n in prompt.items()}
        text = {TokenKind.TEXT: counts[TokenKind.TEXT]}
        layers = [(counts, plan.rules[0]), (counts, LayerRule()), (text, LayerRule())]
        expected += sum(layer_flops(config, own, rule).total for own, rule in layers) / 2
        dense_flops += 3 * layer_flops(config, counts, LayerRule()).total / 2
        held = 2 * sum(counts.values()) + counts[TokenKind.TEXT]
        kv += 2 * held * width * 4 / 2
    cost = plan_cost(assistant, prompts, plan)
    assert cost.flops == pytest.approx(expected)
    assert cost.share == pytest.approx(expected / dense_flops)
    assert cost.kv_bytes == pytest.approx(kv)  # four bytes: the model is in fp32
    assert cost.live == pytest.approx({"text": 3, "skipped": 7 * 2 / 3, "retained": 2 / 3})
    assert cost.visual_queries == pytest.approx(1 / 3)  # layer 1 alone
    assert cost.visual_ffn == pytest.approx(2 / 3)
    assert mean_prompt(prompts) == {"text": 3, "retained": 1, "skipped": 7}


def test_equal_prompts_count_as_often_as_they_occur(assistant):
    plan = vtw(2).bind(3)
    small, large = {"text": 4, "skipped": 6}, {"text": 2, "skipped": 30}
    one, other = plan_cost(assistant, [small], plan), plan_cost(assistant, [large], plan)
    cost = plan_cost(assistant, [small, large, small, small], plan)
    assert cost.flops == pytest.approx((3 * one.flops + other.flops) / 4)
    assert cost.kv_bytes == pytest.approx((3 * one.kv_bytes + other.kv_bytes) / 4)
    assert cost.live == pytest.approx({kind: (3 * one.live[kind] + other.live[kind]) / 4 for kind in one.live})
    assert (cost.visual_queries, cost.visual_ffn) == pytest.approx((2 / 3, 2 / 3))


def test_prompts_without_images_have_no_visual_work(assistant):
    cost = plan_cost(assistant, [{"text": 4}], vskip([0]).bind(3))
    assert (cost.share, cost.visual_queries, cost.visual_ffn) == (1, 0, 0)


# --- equal FLOPs ---------------------------------------------------------------------------------------------------


COUNTS = {TokenKind.TEXT: 30.0, TokenKind.RETAINED: 40.0, TokenKind.SKIPPED: 200.0}


@pytest.fixture
def deep(text_config_factory):
    return text_config_factory(num_hidden_layers=8)


@pytest.fixture
def orders():
    return {name: Order((5, 3, 7, 1, 0, 2, 4, 6), "by vig") for name in ("vskip", "ffn_skip", "shortv")}


@pytest.mark.parametrize("method", ["ffn_skip", "shortv", "fastv", "fastv+vskip", "pyramiddrop", "vtw", "vskip"])
@pytest.mark.parametrize("share", [0.6, 0.85])
def test_no_other_strength_is_closer(method, share, deep, orders):
    found = at_share(method, share, deep, COUNTS, orders)
    assert found.share == pytest.approx(
        sequence_flops(deep, COUNTS, found.plan).total / sequence_flops(deep, COUNTS, dense().bind(8)).total
    )
    others = [vtw(layer).bind(8) for layer in range(1, 8)] if method == "vtw" else []
    if method == "fastv":
        others = [fastv(1, keep / 100).bind(8) for keep in range(1, 100)]
        assert abs(found.share - share) < 0.01
    if method == "vskip":
        others = [vskip((5, 3, 7, 1, 0, 2, 4, 6)[:n]).bind(8) for n in range(1, 9)]
    for other in others:
        assert abs(flops_share(deep, COUNTS, other) - share) >= abs(found.share - share)


def test_layers_come_in_the_order_of_the_scores(deep, orders):
    found = at_share("shortv", 0.62, deep, COUNTS, orders)
    silent = found.plan.layers_without_attention()
    assert set(silent) == set((5, 3, 7, 1, 0, 2, 4, 6)[: len(silent)])
    assert found.setting == f"layers {', '.join(map(str, silent))} (by vig)"


def test_pyramids_keep_the_same_share_at_every_drop(deep, orders):
    first, second, third = (drop.keep for drop in at_share("pyramiddrop", 0.6, deep, COUNTS, orders).plan.drops)
    assert 0 < first < 1
    assert (second, third) == pytest.approx((first**2, first**3), abs=1e-6)


def test_both_methods_save_a_part(deep, orders):
    found = at_share("fastv+vskip", 0.7, deep, COUNTS, orders).plan
    assert len(found.drops) == 1
    assert found.layers_without_attention()
    alone = vskip(found.layers_without_attention()).bind(8)
    assert 0.7 < flops_share(deep, COUNTS, alone) < 1


def test_what_has_nothing_to_leave_out_is_left_out(deep, orders):
    retained = {TokenKind.TEXT: 5.0, TokenKind.RETAINED: 10.0}
    assert at_share("skip_ffn", 0.8, deep, retained, orders) is None
    assert at_share("skip_ffn", 0.8, deep, COUNTS, orders).plan == skip_ffn().bind(8)
    assert at_share("skip_kv", 0.8, deep, COUNTS, orders).share == 1
    shallow = SimpleNamespace(num_hidden_layers=3)
    assert at_share("pyramiddrop", 0.8, shallow, COUNTS, orders) is None


@pytest.mark.parametrize(
    ("method", "share", "message"), [("fast", 0.5, "methods: 'fast'"), ("vtw", 1.0, "equal_flops: 1")]
)
def test_wrong_methods_and_shares(method, share, message, deep, orders):
    with pytest.raises(ConfigError, match=message):
        at_share(method, share, deep, COUNTS, orders)


@pytest.mark.parametrize(("depth", "layer"), [(2, 1), (4, 1), (28, 2), (32, 2), (40, 2), (80, 5)])
def test_fastv_keeps_its_relative_depth(depth, layer):
    assert fastv_layer(depth) == layer


def test_positions_in_three_dimensions_are_kept(deep, orders):
    assert at_share("pyramiddrop", 0.5, deep, COUNTS, orders).plan.drops[0].positions == "renumber"
    deep.rope_parameters = {"rope_type": "default", "mrope_section": [1, 1]}
    assert at_share("pyramiddrop", 0.5, deep, COUNTS, orders).plan.drops[0].positions == "keep"


@pytest.fixture
def calibration(tmp_path):
    values = {"vig": [3.0, 1.0, 2.0], "shortv": [1.0, 3.0, 2.0]}
    for name, scores in values.items():
        table = ScoreTable(name, "zero", torch.tensor(scores)[:, None].double(), ("s",), ("",))
        (tmp_path / f"scores_{name}.json").write_text(json.dumps(table.to_dict()))
    (tmp_path / "vig.json").write_text(json.dumps({"scores": values["vig"], "layers": [1], "model_hash": "abc"}))
    return tmp_path


def test_every_method_takes_its_own_scores_or_the_deepest(calibration):
    found = layer_orders(3, str(calibration), "abc")
    assert found["vskip"] == Order((1, 2, 0), "by vig")
    assert found["shortv"] == Order((0, 2, 1), "by shortv")
    assert found["ffn_skip"] == Order((2, 1, 0), "the deepest")
    assert set(layer_orders(3).values()) == {Order((2, 1, 0), "the deepest")}


def test_the_scores_that_chose_the_plan_go_before_the_mean_over_the_samples(calibration):
    (calibration / "vig.json").write_text(json.dumps({"scores": [1.0, 3.0, 2.0], "layers": [0], "strategy": "vig"}))
    assert layer_orders(3, str(calibration))["vskip"] == Order((0, 2, 1), "by vig")


def test_calibrations_of_other_models_are_refused(calibration):
    with pytest.raises(ConfigError, match="scores of 3 layers, the model has 4"):
        layer_orders(4, str(calibration))
    with pytest.raises(ConfigError, match="another model"):
        layer_orders(3, str(calibration), "def")
    with pytest.raises(DataError, match="nothing: no such file"):
        layer_orders(3, str(calibration / "nothing"))


def test_scores_that_rank_no_methods_layers_are_refused(calibration):
    for file in calibration.glob("scores_*.json"):
        file.unlink()
    (calibration / "vig.json").write_text(json.dumps({"scores": [3.0, 1.0, 2.0], "layers": [1], "strategy": "random"}))
    with pytest.raises(ConfigError, match="has scores of random; methods here use vig, vig_ffn, shortv"):
        layer_orders(3, str(calibration))


def test_every_method_has_a_strength(deep, orders):
    assert all(at_share(method, 0.7, deep, COUNTS, orders) for method in METHODS)


# --- times ---------------------------------------------------------------------------------------------------------


def test_times_take_turns_and_the_first_repeat_is_thrown_away(assistant, records, plans, monkeypatch):
    order, former = [], assistant.plan
    use = assistant.use
    monkeypatch.setattr(assistant, "use", lambda plan: (order.append(plan.name), use(plan)))
    ticks = iter(float(i * i) for i in range(1000))
    monkeypatch.setattr("skipvision_train.evaluation.timing._now", lambda device: next(ticks))
    batches = [assistant.encode([conversation_of(records[0])])]
    chosen = {name: plans[name] for name in ("dense", "vskip")}
    times = measure_answers(assistant, batches, chosen, repeats=2, decode_tokens=3)
    assert order == ["dense", "vskip", "vskip", "dense", "dense", "vskip", former.name]
    # The clock reads 0, 1, 4, 9, ...: the k-th prefill of all takes 4 k + 1 s; the first round is k = 0 and 1.
    assert times["dense"].prefill_ms == Spread(15000, 13000, 17000)  # k = 3 and 4
    assert times["vskip"].prefill_ms == Spread(15000, 9000, 21000)  # k = 2 and 5
    assert times["dense"].first_token_ms.low > 0


def test_the_cache_is_counted_at_the_end_of_the_answer(assistant, records, plans):
    batch = assistant.encode([conversation_of(records[0])])
    times = measure_answers(assistant, [batch], {"dense": plans["dense"]}, repeats=1, decode_tokens=4)
    config = assistant.model.config.text_config
    room = held = batch["input_ids"].shape[1]
    for _ in range(4):  # the last token is not fed back; a cache that is full takes a sixteenth more than it needs
        held += 1
        room = room if held <= room else held + held // 16
    assert times["dense"].kv_bytes == 3 * 2 * room * config.num_key_value_heads * config.head_dim * 4


def test_nothing_to_time(assistant):
    with pytest.raises(ValueError, match="at least one batch"):
        measure_answers(assistant, [], {}, 1, 1)


# --- results -------------------------------------------------------------------------------------------------------


@pytest.fixture
def result(assistant, records, plans):
    """Made-up answers: the dense plan answers seven questions rightly, V-Skip six of these, FastV none."""
    right = {"dense": 7, "vskip": 6, "fastv": 0}

    def made(name):
        texts = [record.turns[-1].text if i < right[name] else "?" for i, record in enumerate(records)]
        return [
            Prediction(r.id, r.task, (), "", r.turns[-1].text, text, float(text != "?"))
            for r, text in zip(records, texts, strict=True)
        ]

    answers = Answers({name: made(name) for name in plans}, [{"text": 10, "skipped": 5}] * len(records))
    spread = Spread(2.0, 1.5, 4.0)
    wanted = {name: Wanted(plan, f"how {name} is set") for name, plan in plans.items()}
    times = {"dense": PlanTimes(spread, spread, spread, 100.0)}
    return assemble(assistant, wanted, records, answers, times, {"device": "here", "versions": {"torch": "2"}})


def test_rows_by_hand(result):
    dense_row, vskip_row, fastv_row = result.rows
    assert dense_row.tasks["colour"].value == 1
    assert dense_row.tasks["count"].value == 0.25
    assert dense_row.mean.value == pytest.approx((1 + 0.25 + 0 + 0) / 4)
    assert vskip_row.difference.value == pytest.approx(-0.25 / 4)
    assert vskip_row.changed == 1 / 14
    assert fastv_row.changed == 7 / 14
    assert fastv_row.difference.value == pytest.approx(-dense_row.mean.value)
    assert dense_row.cost.share == 1


def test_a_bench_survives_its_file(result, tmp_path):
    result.save(tmp_path / "bench.json")
    assert BenchResult.load(tmp_path) == result


@pytest.mark.parametrize("content", ["{}", '{"format_version": 1, "rows": [{}], "facts": {}, "prompt": {}}', "[1]"])
def test_other_files_are_no_bench(content, tmp_path):
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(DataError, match=r"bench\.json: not a bench"):
        BenchResult.load(tmp_path)


def test_tables(result):
    text = markdown(result)
    assert "* device: here" in text
    assert "* versions: torch 2" in text
    assert "| vskip | how vskip is set | 25.0 (" in text
    assert "| -6.2 (" in text
    assert "| 2 (1.5 to 4) |" in text
    assert "| 7.1 % |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_pictures_hold_every_row_that_has_the_cost(result):
    found = pictures(result)
    assert set(found) == {"tradeoff", "tradeoff_latency"}
    assert len(found["tradeoff"].axes[0].containers) == 3
    assert set(points_of(result, "tradeoff_latency")) == {"dense"}
    point = points_of(result, "tradeoff_latency")["dense"]
    assert (point.x, point.spread) == (2.0, (1.5, 4.0))
    untimed = replace(result, rows=result.rows[1:])
    assert set(pictures(untimed)) == {"tradeoff"}
