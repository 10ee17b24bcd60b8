"""The shared sweep equals the plain procedure, everywhere it is offered, and costs what it should."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import transformers as hf
from tiny_vlms import IDS, TEXT, make_family, randomise
from torch.utils.flop_counter import FlopCounterMode

from skipvision_train.calibration.samples import Sample
from skipvision_train.calibration.scores import STRATEGIES, ScoreTable, kl_divergence, plan_divergence, score_layers
from skipvision_train.calibration.sweep import SweepOptions, read_logits, sweep
from skipvision_train.errors import ConfigError, PlanError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import LayerRule, compose, dense, fastv, pyramiddrop, skip_ffn, sparsevlm, vskip
from skipvision_train.plans.rules import VISUAL

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")


def sample_of(inputs, name="s", task="", positions=1):
    """The last ``positions`` tokens of a row are read."""
    read = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    read[:, -positions:] = True
    return Sample(name, task, inputs, read)


@cache
def family(name):
    return make_family(name)


def samples_of(name):
    tiny = family(name)
    return [sample_of(tiny.inputs(0), "two images", "a"), sample_of(tiny.inputs(1), "one image", "b", positions=2)]


@pytest.fixture
def ours(tiny_config):
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(tiny_config).eval()
    for parameter in model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def our_samples(model):
    image = [3] * len(model.config.image_token_kinds())
    rows = [[5, *image, 6, 7], [8, *image, 9, *image, 10, 11, 12]]
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    return [
        sample_of(
            {
                "input_ids": torch.tensor([row]),
                "pixel_values": torch.randn(row.count(3) // len(image), 3, size, size, generator=generator),
            },
            str(i),
            positions=1 + i,
        )
        for i, row in enumerate(rows)
    ]


def brute_force(model, samples, rule, base):
    """KL(P || P without) from whole forwards under explicit plans, without the code under test."""
    depth = base.num_layers
    values = torch.zeros(depth, len(samples), dtype=torch.float64)
    for column, sample in enumerate(samples):
        read = sample.read
        from skipvision_train import apply

        def log_probs(plan, sample=sample, read=read):
            with apply(model, plan), torch.no_grad():
                return model(**sample.inputs).logits[read].double().log_softmax(-1)

        p = log_probs(base)
        for layer in range(depth - 1):
            q = log_probs(base.with_rule(layer, rule))
            values[layer, column] = (p.exp() * (p - q)).sum(-1).mean()
    return values


@pytest.mark.parametrize("group", [1, 2, 9])
@pytest.mark.parametrize("name", FAMILIES)
def test_vig_equals_brute_force_on_models_of_transformers(name, group):
    samples, rule = samples_of(name), LayerRule(no_attention=VISUAL)
    expected = brute_force(family(name).model, samples, rule, dense().bind(3))
    got = sweep(family(name).model, samples, rule, kl_divergence, dense(), SweepOptions(group=group, max_rows=2))
    assert (expected[:-1] > 1e-5).all()
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-3)
    assert (got[-1] == 0).all()


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "random"])
@pytest.mark.parametrize("base", [dense(), skip_ffn(), compose([skip_ffn(), vskip([1])])], ids=lambda plan: plan.name)
def test_every_strategy_equals_the_plain_procedure_on_our_model(ours, strategy, base):
    """Plans that drop tokens are run plainly; a drop that keeps everything changes nothing else."""
    samples = our_samples(ours)
    plain = compose([base, fastv(1, 99, kinds=frozenset(["retained", "middle"]))])
    got = score_layers(ours, samples, strategy, base=base)
    expected = score_layers(ours, samples, strategy, base=plain)
    torch.testing.assert_close(got.values, expected.values, atol=2e-6, rtol=1e-3)
    assert got.values[:-1].max() > 1e-4
    assert ours.plan == ours.config.plan_or_dense()


def test_bypasses_differ(ours):
    samples = our_samples(ours)
    zero, norm = (score_layers(ours, samples, bypass=bypass).values for bypass in ("zero", "norm"))
    assert (zero[:-1] - norm[:-1]).abs().min() > 1e-6
    with pytest.raises(PlanError, match="cannot both hold"):
        score_layers(ours, samples, base=vskip([0], bypass="norm"))


def test_a_causal_lm_with_a_given_image_token():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()
    randomise(model)
    image = IDS["<image>"]
    samples = [sample_of({"input_ids": torch.tensor([[12, image, image, image, 13, 14]])})]
    got = sweep(model, samples, LayerRule(no_ffn=VISUAL), kl_divergence, dense(), SweepOptions(image_token_id=image))
    assert (got[:2] > 1e-5).all()


@pytest.mark.parametrize(
    "plan",
    [fastv(1, 1), pyramiddrop([1, 2], [0.5, 0.25]), sparsevlm(layers=[1], keep=[1])],
    ids=lambda plan: plan.name,
)
def test_the_prompts_last_token_ranks_what_a_plan_drops_also_in_front_of_an_answer(plan):
    """Causal: what predicts the answer's first token knows nothing of the answer, so that the prompt alone says it."""
    tiny = family("llava")
    prompt = tiny.inputs(1)
    answer = torch.tensor([[IDS["w20"], IDS["w3"], IDS["w11"]]])
    whole = dict(prompt, input_ids=torch.cat([prompt["input_ids"], answer], 1))
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    sample = sample_of(whole, positions=4)
    sample.read[:, -1] = False
    torch.testing.assert_close(
        read_logits(tiny.model, sample, plan)[:1], read_logits(tiny.model, sample_of(prompt), plan)
    )
    assert len(read_logits(tiny.model, sample, plan)) == 3
    with_labels = dict(whole, labels=torch.cat([torch.full_like(prompt["input_ids"], -100), answer], 1))
    assert not torch.equal(read_logits(tiny.model, sample, plan), read_logits(tiny.model, sample, dense()))
    from skipvision_train import apply

    with apply(tiny.model, plan), torch.no_grad():  # as in training
        expected = tiny.model(**with_labels).logits[sample.read]
    torch.testing.assert_close(read_logits(tiny.model, sample, plan), expected)


def test_the_same_on_our_model(ours):
    sample = our_samples(ours)[1]
    plan = compose([skip_ffn(), fastv(1, 2, kinds=frozenset(["retained", "middle"]))])
    ids = torch.cat([sample.inputs["input_ids"], torch.tensor([[40, 41]])], 1)
    longer = sample_of({**sample.inputs, "input_ids": ids}, positions=3)
    longer.read[:, -1] = False
    prompt = sample_of(sample.inputs)
    torch.testing.assert_close(read_logits(ours, longer, plan)[:1], read_logits(ours, prompt, plan))


# --- resuming, ranks, cost -----------------------------------------------------------------------------------------


def test_an_interrupted_sweep_goes_on_where_it_was(ours):
    samples, kept = our_samples(ours), {}
    whole = score_layers(ours, samples, options=SweepOptions(group=1)).values

    def stop(layer, values):
        kept[layer] = values
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_layers(ours, samples, options=SweepOptions(group=1, keep=stop))
    assert list(kept) == [0]
    seen = []
    options = SweepOptions(group=1, done=kept, keep=lambda layer, values: seen.append(layer))
    assert torch.equal(score_layers(ours, samples, options=options).values, whole)
    assert seen == [1]
    everything = dict(enumerate(whole[:-1]))
    assert torch.equal(score_layers(ours, samples, options=SweepOptions(done=everything)).values, whole)


def test_groups_and_shared_batches_change_rounding_alone(ours):
    samples = our_samples(ours)
    tables = [
        score_layers(ours, samples, options=SweepOptions(group=group, max_rows=rows)).values
        for group, rows in ((1, 1), (2, 1), (9, 9))
    ]
    for other in tables[1:]:
        torch.testing.assert_close(other, tables[0], atol=1e-7, rtol=1e-4)


def test_cost_is_at_most_055_of_one_forward_per_layer():
    """FLOPs of the decoder at 12 layers; the plain procedure is one dense forward and one per layer."""
    config = hf.LlamaConfig(**{**TEXT, "num_hidden_layers": 12, "num_key_value_heads": 4, "intermediate_size": 86})
    model = hf.LlamaForCausalLM(config).eval()
    image = IDS["<image>"]
    samples = [sample_of({"input_ids": torch.tensor([[12] * 6 + [image] * 60 + [13] * 5])})]
    rule = LayerRule(no_attention=VISUAL)
    with FlopCounterMode(display=False) as shared:
        sweep(model, samples, rule, kl_divergence, dense(), SweepOptions(image_token_id=image))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(**samples[0].inputs, logits_to_keep=1)
    assert shared.get_total_flops() <= 0.55 * 13 * forward.get_total_flops()


def test_kl_by_hand_and_its_direction():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log() + 3.0  # a constant cancels in the softmax
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(p, q).tolist() == pytest.approx([expected, 0.0], abs=1e-7)
    assert kl_divergence(q, p)[0].item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 20
    assert (kl_divergence(logits, logits + 1e-6) >= 0).all()


# --- tables --------------------------------------------------------------------------------------------------------


def test_a_score_that_is_no_number_never_ranks(ours):
    with torch.no_grad():
        ours.language_model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(ConfigError, match=r"layer 0: the score of sample 0 is nan.*precision=fp32"):
        score_layers(ours, our_samples(ours))


def test_random_ranks_all_but_the_last_layer_and_follows_its_seed(ours):
    samples = our_samples(ours)
    first, again, other = (score_layers(ours, samples, "random", seed=seed).mean() for seed in (0, 0, 5))
    assert torch.equal(first, again)
    assert sorted(first.tolist()) == [0, 1, 2]
    assert first[-1] == 0
    assert any(not torch.equal(score_layers(ours, samples, "random", seed=s).mean(), first) for s in range(5))
    assert other[-1] == 0


def test_plan_divergence_is_the_kl_of_the_whole_plan(ours):
    samples = our_samples(ours)
    one = plan_divergence(ours, samples, vskip([0]))
    torch.testing.assert_close(one, score_layers(ours, samples).values[0], atol=2e-6, rtol=1e-3)
    assert plan_divergence(ours, samples, dense()).tolist() == [0.0, 0.0]


def test_tables_by_task():
    table = ScoreTable(
        "vig", "zero", torch.tensor([[1.0, 2.0, 6.0], [0, 0, 0]]).double(), ("a", "b", "c"), ("x", "x", "y")
    )
    assert table.mean().tolist() == [3.0, 0.0]
    assert table.mean("x").tolist() == [1.5, 0.0]
    low, high = table.interval("x")[0].tolist()
    assert low == pytest.approx(1.5 - 1.959964 * 0.5)
    assert high == pytest.approx(1.5 + 1.959964 * 0.5)
    assert table.interval("y").tolist() == [[6.0, 6.0], [0.0, 0.0]]
    assert torch.equal(ScoreTable.from_dict(table.to_dict()).values, table.values)
    with pytest.raises(ConfigError, match="no sample has the task 'z'; there are x, y"):
        table.mean("z")


def test_unknown_strategies_and_empty_sets_are_refused(ours):
    with pytest.raises(ConfigError, match="strategy: 'gain' is unknown; use vig, "):
        score_layers(ours, our_samples(ours), "gain")
    with pytest.raises(ConfigError, match="samples: none given"):
        score_layers(ours, [])
