"""Visual Information Gain on tiny models, and the choice of layers."""

import math

import pytest
import torch
from torch.nn import functional as F

from skipvision_train.calibration.vig import kl_divergence, select_layers, visual_information_gain
from skipvision_train.errors import PlanError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import VISUAL, LayerRule, TokenKind, TokenLayout, dense, skip_ffn, vskip
from skipvision_train.plans.executor import attach


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(tiny_config).eval()
    with torch.no_grad():
        for layer in model.language_model.model.layers:  # at the initial scale attention moves the logits by 1e-3
            for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
                projection.weight.mul_(12)
    return model


def make_batch(model, prompts, seed=0):
    """Left-padded prompts of (tokens before, tokens after) one image each."""
    generator = torch.Generator().manual_seed(seed)
    image = [model.config.image_token_id] * len(model.config.image_token_kinds())
    rows = []
    for before, after in prompts:
        words = torch.randint(10, 300, (before + after,), generator=generator).tolist()
        rows.append(words[:before] + image + words[before:])
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    size = model.config.vision_config.image_size
    pixels = torch.randn(len(rows), 3, size, size, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_kinds": model.token_kinds(ids, mask),
        "pixel_values": pixels,
    }


def next_token_log_probs(model, batch, plan):
    """The last position's log probabilities under ``plan``, through the executor alone."""
    layout = TokenLayout.from_kinds(batch["token_kinds"])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    features = model.encode_images(batch["pixel_values"])
    embeds = embeds.masked_scatter((batch["input_ids"] == model.config.image_token_id)[..., None], features)
    attachment = attach(model.language_model, plan)
    extra = {"token_layout": layout} if attachment.active else {}
    with attachment:
        hidden = model.language_model.model(
            inputs_embeds=embeds,
            attention_mask=layout.attention_mask,
            position_ids=layout.position_ids,
            use_cache=False,
            **extra,
        ).last_hidden_state
    return model.language_model.lm_head(hidden[:, -1]).double().log_softmax(-1)


@pytest.mark.parametrize("bypass", ["zero", "norm"])
@pytest.mark.parametrize("base", [dense().bind(3), skip_ffn().bind(3)], ids=lambda plan: plan.name)
def test_scores_are_the_kl_of_explicit_runs(model, base, bypass):
    batches = [make_batch(model, [(2, 3), (0, 7)]), make_batch(model, [(4, 4)], seed=1)]
    model.set_plan(dense().bind(3))
    expected = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            full = next_token_log_probs(model, batch, base)
            for layer in range(2):
                plan = base.with_rule(layer, LayerRule(no_attention=VISUAL, bypass=bypass))
                without = next_token_log_probs(model, batch, plan)
                expected[layer] += F.kl_div(without, full, reduction="sum", log_target=True) / 3
    model.set_plan(base)
    scores = visual_information_gain(model, batches, bypass=bypass)
    assert scores.dtype == torch.float64
    assert expected[0] > 1e-5
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9)
    assert model.plan == base


def test_last_layer_is_zero_when_it_is_really_run(model):
    batch = make_batch(model, [(2, 3), (0, 7)])
    with torch.no_grad():
        full = model(**batch, logits_to_keep=1).logits[:, -1]
        model.set_plan(vskip([2]).bind(3))
        without = model(**batch, logits_to_keep=1).logits[:, -1]
    assert torch.equal(full, without)
    assert kl_divergence(full, without).tolist() == [0, 0]
    model.set_plan(dense().bind(3))
    assert visual_information_gain(model, [batch])[-1] == 0


def test_prompts_without_images_gain_nothing(model):
    ids = torch.randint(10, 300, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert visual_information_gain(model, [batch]).tolist() == [0, 0, 0]


def test_batching_does_not_change_the_scores(model):
    together = make_batch(model, [(2, 3), (0, 7)])
    size = len(together["input_ids"])
    single = [{key: value[i : i + 1] for key, value in together.items()} for i in range(size)]
    torch.testing.assert_close(
        visual_information_gain(model, [together]), visual_information_gain(model, single), rtol=1e-3, atol=1e-9
    )


def test_other_kinds_can_be_chosen(model):
    batch = make_batch(model, [(2, 3)])
    only_skipped = visual_information_gain(model, [batch], kinds=frozenset({TokenKind.SKIPPED}))
    assert not torch.allclose(only_skipped, visual_information_gain(model, [batch]), rtol=1e-3, atol=0)


def test_plan_is_restored_after_an_error(model, monkeypatch):
    batch = make_batch(model, [(2, 3)])
    base = skip_ffn().bind(3)
    model.set_plan(base)
    with torch.no_grad():
        before = model(**batch, logits_to_keep=1).logits
    stock, calls = model.language_model.lm_head.forward, []

    def failing(hidden):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return stock(hidden)

    monkeypatch.setattr(model.language_model.lm_head, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        visual_information_gain(model, [batch])
    monkeypatch.undo()
    assert model.plan == base
    with torch.no_grad():
        assert torch.equal(model(**batch, logits_to_keep=1).logits, before)


def test_contradicting_bypass_is_refused_and_the_plan_kept(model):
    base = vskip([1], bypass="norm").bind(3)
    model.set_plan(base)
    with pytest.raises(PlanError, match="bypass"):
        visual_information_gain(model, [make_batch(model, [(2, 3)])])
    assert model.plan == base


def test_right_padding_and_empty_calibration_sets_are_refused(model):
    batch = {key: value.flip(-1) for key, value in make_batch(model, [(2, 3), (0, 7)]).items()}
    with pytest.raises(ValueError, match="left padded"):
        visual_information_gain(model, [batch])
    with pytest.raises(ValueError, match="at least one batch"):
        visual_information_gain(model, [])


def test_kl_by_hand_and_its_direction():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log() + 3.0  # a constant cancels in the softmax
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(p, q).tolist() == pytest.approx([expected, 0.0], abs=1e-7)
    assert kl_divergence(q, p)[0].item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)


def test_kl_is_never_negative():
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 20
    assert (kl_divergence(logits, logits + 1e-6) >= 0).all()


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


@pytest.mark.parametrize(("scores", "n"), [([0.0], 2), ([0.0], -1), ([float("nan"), 0.0], 1), ([float("inf")], 0)])
def test_select_refuses(scores, n):
    with pytest.raises(ValueError, match="layers"):
        select_layers(scores, n)
