"""The whole model on tiny random weights: forward, loss, generation, saving, and plans from the outside."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, DynamicCache

from skipvision_train.errors import CheckpointError, ConfigError, PlanError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig
from skipvision_train.plans import (
    VISUAL,
    LayerRule,
    TokenKind,
    compose,
    dense,
    fastv,
    pyramiddrop,
    shortv,
    skip_ffn,
    victor,
    vskip,
    vtw,
)

IMAGE, LAYERS = 3, 3


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return SkipVisionForConditionalGeneration(tiny_config).eval()


def row(model, *parts):
    """Token ids of a row: numbers are text tokens, ``"i"`` is an image."""
    n = len(model.config.image_token_kinds())
    return [t for part in parts for t in ([IMAGE] * n if part == "i" else [part])]


def batch(model, rows, side="left", seed=1):
    """A padded batch of rows with random images; kinds are derived by the model."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, r in enumerate(rows):
        where = slice(length - len(r), None) if side == "left" else slice(0, len(r))
        ids[i, where], mask[i, where] = torch.tensor(r), 1
    images = sum(r.count(IMAGE) for r in rows) // len(model.config.image_token_kinds())
    out = {"input_ids": ids, "attention_mask": mask}
    if images:
        size = model.config.vision_config.image_size
        out["pixel_values"] = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return out


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def plans():
    everything = compose([skip_ffn(), vskip([0, 2], bypass="norm")]).bind(LAYERS)
    return [
        dense().bind(LAYERS),
        skip_ffn().bind(LAYERS),
        skip_ffn(evict=()).bind(LAYERS),
        shortv([1, 2]).bind(LAYERS),
        everything,
        vtw(2).bind(LAYERS),
        compose([fastv(1, 0.5, VISUAL), shortv([2])]).bind(LAYERS),
        compose([fastv(1, 0.5, frozenset({TokenKind.SKIPPED})), skip_ffn()]).bind(LAYERS),
        pyramiddrop((1, 2), (0.6, 0.3)).bind(LAYERS),
    ]


@torch.no_grad()
def test_dense_plan_is_the_stock_language_model_bit_for_bit(model):
    inputs = batch(model, [row(model, 5, "i", 6, 7)])
    embeds = model.language_model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == IMAGE] = model.encode_images(inputs["pixel_values"]).tokens
    stock = model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(logits(model, **inputs), stock)


def test_setting_a_plan_and_going_back_restores_the_output(model):
    inputs = batch(model, [row(model, 5, "i", 6, 7)])
    before = logits(model, **inputs)
    model.set_plan(skip_ffn().bind(LAYERS))
    assert not torch.equal(logits(model, **inputs), before)
    model.set_plan(dense().bind(LAYERS))
    assert torch.equal(logits(model, **inputs), before)


def test_last_layer_of_visual_tokens_is_never_read(model):
    inputs = batch(model, [row(model, 5, "i", 6, 7), row(model, "i", 8)])
    text = (inputs["input_ids"] != IMAGE) & (inputs["attention_mask"] == 1)
    before = logits(model, **inputs)
    rule = LayerRule(no_attention=VISUAL | {TokenKind.SUMMARY}, no_ffn=VISUAL | {TokenKind.SUMMARY})
    model.set_plan(dense().bind(LAYERS).with_rule(LAYERS - 1, rule))
    torch.testing.assert_close(logits(model, **inputs)[text], before[text], atol=1e-6, rtol=0)
    model.set_plan(dense().bind(LAYERS).with_rule(LAYERS - 2, rule))
    assert (logits(model, **inputs)[text] - before[text]).abs().max() > 1e-4


def test_image_tokens_arrive_in_their_places(model):
    """The second image of a row changes nothing before its first placeholder, and something after it."""
    inputs = batch(model, [row(model, 5, "i", 6, "i", 7)])
    start = inputs["input_ids"][0].tolist().index(6) + 1
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][1] += 1.0
    a, b = logits(model, **inputs), logits(model, **other)
    assert torch.equal(a[:, :start], b[:, :start])
    assert not torch.equal(a[:, start:], b[:, start:])


# A plan that ranks tokens keeps others with labels than without.
@pytest.mark.parametrize("plan", [p for p in plans() if all(d.score == "none" for d in p.drops)], ids=lambda p: p.name)
def test_loss_is_the_cross_entropy_of_supervised_positions(model, plan):
    model.set_plan(plan)
    inputs = batch(model, [row(model, 5, "i", 6, 7, 8), row(model, 9, 10)], side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    end = len(row(model, 5, "i", 6, 7, 8))
    labels[0, end - 2 : end], labels[1, 1] = torch.tensor([7, 8]), 10
    full = logits(model, **inputs)
    expected = F.cross_entropy(full[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=12).loss, expected * 3 / 12)


def test_in_training_the_token_before_each_answer_ranks_what_is_dropped(model):
    inputs = batch(model, [row(model, 5, "i", 6, 7, 8), row(model, 5, "i", 9)], side="right")
    labels, seen = torch.full_like(inputs["input_ids"], -100), []
    labels[0, -2:] = torch.tensor([7, 8])
    model.set_plan(fastv(1, 0.5))
    model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["token_layout"].asking), with_kwargs=True
    )
    model(**inputs, labels=labels)
    model(**inputs)
    assert seen[0].nonzero().tolist() == [[0, labels.shape[1] - 3]]
    assert seen[1] is None


def test_a_batch_with_nothing_supervised_has_loss_zero(model):
    inputs = batch(model, [row(model, 5, "i", 6)])
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    assert loss.item() == 0.0


def test_text_only_training_batch_touches_the_vision_path_with_zero_gradient(model):
    model.train()
    inputs = batch(model, [[5, 6, 7]])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    vision = [*model.vision_tower.parameters(), *model.connector.parameters(), *model.reducer.parameters()]
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in vision)
    assert model.language_model.lm_head.weight.grad.abs().max() > 0


def test_every_parameter_gets_a_gradient(model):
    model.train()
    inputs = batch(model, [row(model, 5, "i", 6, 7)])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # Softmax weights do not change when every score moves by the same amount: the paper's W has no bias.
    assert [n for n in without if "reducer" not in n or "bias" not in n] == []


@pytest.mark.parametrize("plan", plans(), ids=lambda p: p.name)
def test_gradient_checkpointing_gives_the_same_gradients(model, plan):
    model.train()
    model.set_plan(plan)
    inputs = batch(model, [row(model, 5, "i", 6, 7)])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_placeholders_and_images_must_agree(model):
    n = len(model.config.image_token_kinds())
    inputs = batch(model, [row(model, 5, "i", 6)])
    short = {k: v[:, :-2] if k != "pixel_values" else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match=rf"input_ids hold {n - 1} placeholders; an image has {n}"):
        model(**short)
    with pytest.raises(ValueError, match=rf"{n} image placeholders, but 2 images of 2 tiles give {2 * n}"):
        model(**inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    with pytest.raises(ValueError, match=f"{n} image placeholders but pixel_values is missing"):
        model(input_ids=inputs["input_ids"])


@pytest.mark.parametrize("plan", plans(), ids=lambda p: p.name)
def test_generation_of_a_ragged_batch_equals_one_by_one(model, plan):
    model.set_plan(plan)
    rows = [row(model, 5, "i", 6, 7), row(model, "i", 8, "i", 9, 10), [11, 12], row(model, 13, 14, 15, "i")]
    together = batch(model, rows)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    images = together["pixel_values"].split([1, 2, 1])
    for i, (r, pixels) in enumerate(zip(rows, [images[0], images[1], None, images[2]], strict=True)):
        single = {**batch(model, [r]), **({"pixel_values": pixels} if pixels is not None else {})}
        expected = model.generate(**single, **options)[:, len(r) :]
        assert got[i].tolist() == expected[0].tolist(), f"row {i}"


@pytest.mark.parametrize(
    "plan", [dense().bind(LAYERS), skip_ffn(evict=()).bind(LAYERS), shortv([0, 1]).bind(LAYERS)], ids=lambda p: p.name
)
def test_generation_without_eviction_does_not_depend_on_the_cache(model, plan):
    model.set_plan(plan)
    inputs = batch(model, [row(model, 5, "i", 6, 7), row(model, "i", 8)])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options))


def test_generation_evicts_skipped_tokens_and_keeps_the_first_token(model):
    inputs = batch(model, [row(model, 5, "i", 6, 7)])
    skipped = sum(kind == TokenKind.SKIPPED for kind in model.config.image_token_kinds())
    outputs, lengths = {}, {}
    for name, plan in {"all": skip_ffn(evict=()).bind(LAYERS), "evict": skip_ffn().bind(LAYERS)}.items():
        model.set_plan(plan)
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True, past_key_values=DynamicCache(),
        )  # fmt: skip
        outputs[name], lengths[name] = out.logits, [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert skipped == 5
    assert torch.equal(outputs["all"][0], outputs["evict"][0])
    assert not torch.equal(outputs["all"][1], outputs["evict"][1])
    assert [a - b for a, b in zip(lengths["all"], lengths["evict"], strict=True)] == [skipped] * LAYERS


@pytest.mark.parametrize("plan", [dense().bind(LAYERS), vskip([1]).bind(LAYERS)], ids=lambda p: p.name)
def test_images_onto_a_filled_cache_are_refused(model, plan):
    model.set_plan(plan)
    first, whole = batch(model, [row(model, 5, "i", 6)]), batch(model, [row(model, 5, "i", 6, 7, "i", 8)])
    rest = {**whole, "input_ids": whole["input_ids"][:, first["input_ids"].shape[1] :]}
    rest["pixel_values"] = whole["pixel_values"][1:]
    cache = model(**first, past_key_values=DynamicCache()).past_key_values
    with pytest.raises(ValueError, match=r"^pixel_values: images cannot follow on a filled KV cache"):
        model(**rest, past_key_values=cache)
    with pytest.raises(ValueError, match=r"^pixel_values: images cannot follow on a filled KV cache"):
        model.generate(**whole | {"pixel_values": rest["pixel_values"]}, past_key_values=cache, max_new_tokens=2)


def test_beams_carry_the_images_of_their_row(model):
    rows = [row(model, "i", 8, "i", 9), row(model, 5, "i", 6)]
    inputs = batch(model, rows)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(**inputs, **options)
    ids, expanded = model._expand_inputs_for_generation(
        2, input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]
    )
    assert [len(ids), len(expanded["pixel_values"])] == [4, 6]
    assert torch.equal(expanded["pixel_values"][:2], expanded["pixel_values"][2:4])
    beams = model.generate(**inputs, num_beams=2, num_return_sequences=1, length_penalty=0.0, **options)
    assert beams.shape == greedy.shape


@pytest.mark.parametrize("plan", [skip_ffn().bind(LAYERS), vskip([1]).bind(LAYERS)], ids=lambda p: p.name)
def test_saved_and_loaded_through_the_auto_class_is_the_same_model(tiny_config, tmp_path, plan):
    tiny_config.skip_plan = plan.to_dict()
    model = SkipVisionForConditionalGeneration(tiny_config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, SkipVisionForConditionalGeneration)
    assert loaded.plan == plan
    assert loaded.config.vision_config == tiny_config.vision_config
    inputs = batch(model, [row(model, 5, "i", 6, 7)])
    assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))


def test_loading_is_strict(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = sorted(n for n in state if n.startswith("connector"))[0]
    save_file({k: v for k, v in state.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        SkipVisionForConditionalGeneration.from_pretrained(tmp_path)


def test_a_copy_runs_on_its_own_weights(model):
    model.set_plan(skip_ffn().bind(LAYERS))
    inputs = batch(model, [row(model, 5, "i", 6)])
    before = logits(model, **inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logits(model, **inputs), before)
    assert not torch.equal(logits(twin, **inputs), before)


def test_plans_of_another_depth_are_refused(model, config_factory):
    with pytest.raises(PlanError, match="2 layers, the model has 3"):
        model.set_plan(dense().bind(2))
    with pytest.raises(PlanError, match="5 layers, the model has 3"):
        config_factory(skip_plan=skip_ffn().bind(5).to_dict())


def test_a_stored_plan_may_fit_several_depths(config_factory):
    config = config_factory(skip_plan=skip_ffn().to_dict())
    assert config.plan_or_dense() == skip_ffn().bind(LAYERS)
    with pytest.raises(PlanError, match=r"vskip: layers \[3\] do not exist; the model has layers 0 to 2"):
        config_factory(skip_plan=vskip([3]).to_dict())


def test_plans_that_need_registers_are_refused(config_factory):
    """Both where the plan is stored and where it is set; a model with more registers than that will do."""
    too_few = r"^reducer\.registers: {}, but plan 'victor' needs 4; .*reducer\.registers=4"
    plan = victor(LAYERS, 4)
    with pytest.raises(ConfigError, match=too_few.format(0)):
        config_factory(skip_plan=plan.to_dict())
    model = SkipVisionForConditionalGeneration(config_factory(reducer=ReducerConfig(local_keep=6, registers=3)))
    with pytest.raises(ConfigError, match=too_few.format(3)):
        model.set_plan(plan)
    assert model.plan == dense().bind(LAYERS)
    for registers in (4, 5):
        config = config_factory(reducer=ReducerConfig(local_keep=6, registers=registers), skip_plan=plan.to_dict())
        assert config.plan_or_dense().registers == 4


@pytest.mark.parametrize("arrangement", [ReducerConfig(local_keep=6), ReducerConfig.off()], ids=["skip", "dense"])
def test_text_after_the_image_reads_the_registers(config_factory, arrangement):
    torch.manual_seed(0)
    config = config_factory(reducer=dataclasses.replace(arrangement, registers=2))
    model = SkipVisionForConditionalGeneration(config).eval()
    inputs = batch(model, [row(model, 5, "i", 6, 7)])
    assert int((inputs["input_ids"] == IMAGE).sum()) == len(config.image_token_kinds())
    before = logits(model, **inputs)
    with torch.no_grad():
        model.reducer.registers += 1.0
    change = (logits(model, **inputs) - before).abs().amax(-1)[0]
    assert change[: -2 - 2].max() == 0
    assert change[-2:].min() > 1e-4


def test_victor_reads_the_image_before_the_drop_only(config_factory):
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(
        config_factory(reducer=dataclasses.replace(ReducerConfig.off(), registers=2))
    ).eval()
    rows = [row(model, 5, "i", 6, 7)]
    for layer, sees_image in ((0, False), (1, True)):
        model.set_plan(victor(layer, 2))
        one, other = (logits(model, **batch(model, rows, seed=seed))[0, -2:] for seed in (1, 2))
        assert ((one - other).abs().max() > 1e-4) == sees_image
        assert sees_image or torch.equal(one, other)
        with torch.no_grad():
            model.reducer.registers += 1.0
        changed = logits(model, **batch(model, rows, seed=2))[0, -2:]
        assert (changed - other).abs().amax(-1).min() > 1e-4


def test_dense_arrangement_has_no_reducer_weights(config_factory):
    config = config_factory(reducer=ReducerConfig.off())
    model = SkipVisionForConditionalGeneration(config)
    assert list(model.reducer.parameters()) == []
    assert [tuple(image.shape) for image in model.encode_images(torch.zeros(2, 3, 32, 32)).split()] == [(22, 32)] * 2


def test_config_json_holds_what_it_says(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "skipvision"
    resampler = {"windows": [8, 4, 2], "queries": [2, 4, 16], "head_dim": 16, "init_std": 0.02}
    assert stored["connector"] == {"type": "resampler", **resampler}


@pytest.mark.parametrize("plan", [dense(), skip_ffn()], ids=lambda p: p.name)
def test_training_keeps_no_cache(model, plan):
    model.set_plan(plan)
    inputs = batch(model, [row(model, 5, "i", 6, 7)])
    assert model.train()(**inputs, labels=inputs["input_ids"]).past_key_values is None
    assert model(**inputs, labels=inputs["input_ids"], use_cache=True).past_key_values is not None
