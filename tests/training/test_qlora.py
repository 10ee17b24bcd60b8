"""Adapters on weights of 4 bits: against the same model with the weights written out, and what becomes of them."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from interrupted import InterruptAfter, InterruptionError
from launched import launch
from safetensors.torch import load_file
from torch import nn
from transformers import set_seed

from skipvision_train.commands.export import Config, run
from skipvision_train.config.specs import LoraSpec
from skipvision_train.config.validate import validate
from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.training import lora as lora_module
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.lora import held, merged
from skipvision_train.training.memory import estimate_memory, remedies
from skipvision_train.training.run import assemble, describe_stage, run_stage

pytest.importorskip("bitsandbytes")

LORA = "stage.lora={rank: 3, alpha: 6, targets: [q_proj, down_proj]}"
NF4 = "stage.lora={rank: 3, alpha: 6, targets: [q_proj, down_proj], quantize: nf4}"
CHOSEN = ("adapters@stage.lora=qlora", "stage.lora.rank=3", "stage.lora.targets=[q_proj,down_proj]")
MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Dettmers et al. 2023, App. E; and what a bit of sign, two of exponent and one of mantissa give, in order of codes.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_VALUES = tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))


@pytest.fixture
def make_cfg(make_cfg):
    """The tiny stage with maps that have whole blocks of 64 inputs."""
    return partial(make_cfg, "model.text.hidden_size=64", "model.text.intermediate_size=128")


def lora(quantize="nf4", double=True, targets="q_proj, down_proj"):
    kind = "" if quantize is None else f", quantize: {quantize}, double_quantize: {str(double).lower()}"
    return f"stage.lora={{rank: 3, alpha: 6, targets: [{targets}]{kind}}}"


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def written_out(state, weight, shape, values):
    """A packed weight by hand: two codes per byte, the first one high; the scale of a block of 64 times the code's."""
    packed, scales = state[weight].flatten(), state[f"{weight}.absmax"]
    if f"{weight}.nested_absmax" in state:
        offset = json.loads(bytes(state[f"{weight}.quant_state.bitsandbytes__nf4"].tolist()))["nested_offset"]
        blocks = state[f"{weight}.nested_absmax"].repeat_interleave(256)[: len(scales)]
        scales = state[f"{weight}.nested_quant_map"][scales.long()] * blocks + offset
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    blocks = scales.repeat_interleave(64)[: len(codes)]
    return (torch.tensor(values)[codes] * blocks).view(shape)


def layers_weights(model):
    """Name in the plain model -> shape, of the maps of the decoder's layers."""
    return {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith("language_model.model.layers.")
    }


def pair(make_cfg, *overrides, quantize="nf4", double=True, targets="q_proj, down_proj"):
    """A quantised model, and the plain one with the weights it computes with, adapters the same and not zero."""
    set_seed(0)
    four = assemble(make_cfg(lora(quantize, double, targets), *overrides))
    set_seed(0)
    plain = assemble(make_cfg(lora(None, targets=targets), *overrides))
    for name, parameter in four.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    state, values = four.model.state_dict(), NF4_VALUES if quantize == "nf4" else FP4_VALUES
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            if f"{name}.absmax" in state:
                before, after = parameter.clone(), written_out(state, name, parameter.shape, values)
                assert 0 < (before - after).norm() < 0.25 * before.norm()
                parameter.copy_(after)
            else:
                parameter.copy_(state[name])
    return four, plain


def loss_and_gradients(parts, precision="fp32"):
    parts.model.train()
    batch = parts.collator([parts.feed.dataset[i] for i in range(6)])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = parts.model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in parts.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("quantize", "double", "overrides"),
    [
        ("nf4", True, ("plan.method=skip_ffn",)),
        ("nf4", False, ("plan.method=dense",)),
        ("fp4", False, ("plan.method=skip_ffn", "trainer.gradient_checkpointing=true")),
        ("nf4", False, ("plan.method=skip_kv", "trainer.last_layer=all")),
        ("nf4", True, ("plan.method=dense", "stage.skip={count: 1, part: both}")),
    ],
)
def test_as_with_the_weights_written_out(make_cfg, quantize, double, overrides):
    four, plain = pair(make_cfg, *overrides, quantize=quantize, double=double, targets=", ".join(MAPS))
    loss, gradients = loss_and_gradients(four)
    expected, theirs = loss_and_gradients(plain)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert set(gradients) == set(theirs)
    assert sum("lora_" in name for name in gradients) == 2 * 2 * len(MAPS)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(gradients[name].any() for name in gradients if "lora_A" in name)


def test_bf16_computes_as_a_plain_map_under_autocast(make_cfg):
    four, plain = pair(make_cfg)
    loss, gradients = loss_and_gradients(four, "bf16")
    expected, _ = loss_and_gradients(plain, "bf16")
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    attention = four.model.language_model.model.layers[0].self_attn
    with torch.autocast("cpu", torch.bfloat16):
        found = [attention.k_proj(torch.randn(2, 64)), attention.q_proj(torch.randn(2, 64))]
    assert {value.dtype for value in found} == {torch.bfloat16}
    assert attention.k_proj(torch.randn(2, 64)).dtype == torch.float32  # no type stays from the first call


def test_only_adapters_and_other_parts_change_and_the_finished_model_is_what_was_trained(make_cfg, tmp_path):
    cfg = make_cfg(NF4, "stage.warmup_ratio=0", "stage.lr.vision=null")
    set_seed(cfg.trainer.seed)
    start = assemble(make_cfg("stage.lr.vision=null")).model
    before, shapes = {k: v.clone() for k, v in start.state_dict().items()}, layers_weights(start)
    final = run_stage(cfg)
    after, adapters = load_file(final / "model.safetensors"), load_file(final / "adapters.safetensors")
    packed = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert set(after) == set(before)
    assert len(shapes) == 2 * len(MAPS)
    for name, value in after.items():
        assert value.dtype == torch.float32
        if name not in shapes:
            same = torch.equal(value, before[name])
            assert same or name.startswith(("connector.", "reducer.")), name
            continue
        part = name.removesuffix(".weight")
        adapted = name.endswith(("q_proj.weight", "down_proj.weight"))
        expected = written_out(packed, f"{part}.base_layer.weight" if adapted else name, shapes[name], NF4_VALUES)
        if adapted:
            down, up = (adapters[f"{part}.lora_{which}.default.weight"] for which in "AB")
            assert up.any()
            expected = expected + 2.0 * (up @ down)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=name)
    assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith("connector."))

    parts = assemble(cfg)
    parts.model.load_state_dict(packed)
    plain = SkipVisionForConditionalGeneration.from_pretrained(final).eval()
    batch = parts.collator([parts.feed.dataset[i] for i in range(4)])
    del batch["labels"]
    with torch.no_grad():
        found, expected = plain(**batch).logits, parts.model.eval()(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_what_is_held(make_cfg, double):
    parts = assemble(make_cfg(lora(double=double)))
    state, shapes = parts.model.state_dict(), layers_weights(assemble(make_cfg()).model)
    weights = sum(rows * columns for rows, columns in shapes.values())
    names = [name for name in state if name.endswith(".absmax")]
    assert len(names) == len(shapes)
    packed = sum(state[name.removesuffix(".absmax")].nbytes for name in names)
    assert packed == weights / 2  # an eighth of fp32
    scales = sum(state[name].nbytes for name in names)
    assert scales == weights / 64 * (1 if double else 4)
    found = held(parts.model, parts_lora(double))
    assert found.packed == pytest.approx(packed + scales, rel=0.01)
    trainable = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    other = sum(p.numel() for p in parts.model.parameters() if p.dtype == torch.float32)
    assert (found.trainable, found.parameters) == (trainable, other)


def parts_lora(double):
    return LoraSpec(rank=3, alpha=6, targets=["q_proj", "down_proj"], quantize="nf4", double_quantize=double)


def test_resumed_is_as_uninterrupted_and_the_next_stage_starts_from_it(make_cfg, tmp_path):
    option = lora("fp4", double=True)
    whole = run_stage(make_cfg(option, f"trainer.output_dir={tmp_path / 'whole'}"))
    cfg = make_cfg(option, f"trainer.output_dir={tmp_path / 'two'}")
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(3),))
    resumed = run_stage(cfg)
    assert losses(tmp_path / "two") == losses(tmp_path / "whole")
    one, two = (load_file(path / "model.safetensors") for path in (whole, resumed))
    assert all(torch.equal(two[name], value) for name, value in one.items())
    following = make_cfg(
        option, f"stage.start_from={whole}", "model.from_scratch=false", f"trainer.output_dir={tmp_path / 'next'}",
        "trainer.max_steps=1",
    )  # fmt: skip
    assert run_stage(following).is_dir()


def test_a_state_brings_its_scales(make_cfg):
    """Into a model of other weights: what is computed is what the state's model computes."""
    set_seed(0)
    one = assemble(make_cfg(NF4))
    set_seed(1)
    two = assemble(make_cfg(NF4))
    batch = one.collator([one.feed.dataset[i] for i in range(4)])
    with torch.no_grad():
        expected, other = one.model(**batch).loss, two.model(**batch).loss
        assert not torch.equal(expected, other)
        two.model.load_state_dict(one.model.state_dict())
        assert torch.equal(two.model(**batch).loss, expected)
    state = {name: value for name, value in one.model.state_dict().items() if not name.endswith("k_proj.weight.absmax")}
    state = {name: value for name, value in state.items() if "k_proj.weight." not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*k_proj\.weight\.absmax"):
        two.model.load_state_dict(state)


@pytest.mark.parametrize("option", [LORA, NF4])
def test_a_checkpoint_exports_merged(make_cfg, tmp_path, option):
    final = run_stage(make_cfg(option))
    checkpoint = tmp_path / "run" / "checkpoint-4"
    run(Config(str(checkpoint), str(tmp_path / "out")))
    expected = load_file(final / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in final.iterdir()}
    run(Config(str(checkpoint), str(tmp_path / "half"), "bf16"))
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in expected.items())

    bare = tmp_path / "bare"  # not called checkpoint-N: no marker is asked for
    shutil.copytree(checkpoint, bare)
    (bare / "lora.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds adapters, first .* no lora\.json"):
        run(Config(str(bare), str(tmp_path / "again")))


def test_merged_in_half_precision_is_half_precision(make_cfg):
    """As DeepSpeed's bf16 holds the model; what is unpacked is fp32 first, the result is of the adapters' type."""
    model = assemble(make_cfg(NF4)).model.bfloat16()
    plain, adapters = merged(model.state_dict(), parts_lora(True))
    assert {value.dtype for value in plain.values()} == {torch.bfloat16}
    assert {value.dtype for value in adapters.values()} == {torch.bfloat16}


def test_a_dry_run_counts_four_bits(make_cfg):
    cfg = make_cfg(NF4, "stage.lr.vision=null")
    text = describe_stage(cfg)
    counted = held(assemble(cfg).model, cfg.stage.lora)
    estimate = estimate_memory(counted.parameters, counted.trainable, "fp32", None, 1, counted.packed)
    assert f"= {estimate.total / 1e6:.3f} MB per process" in text
    assert estimate.weights == 4 * counted.parameters + counted.packed
    assert f"{counted.trainable:,} train" in text
    assert "its maps in 4 bits (nf4)" in text


def test_what_is_advised_where_memory_lacks(make_cfg):
    assert "stage.lora.quantize=nf4" in remedies(make_cfg(LORA), 2)
    advice = remedies(make_cfg(NF4), 2)
    assert "zero2" in advice
    assert "zero3" not in advice
    assert "quantize" not in advice


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("stage.lora={quantize: int8}",), r"^stage\.lora\.quantize: 'int8' is unknown; use nf4, fp4"),
        (("stage.lora={double_quantize: false}",), r"^stage\.lora\.double_quantize: false without stage\.lora\.quant"),
        ((NF4, "deepspeed={stage: 3}"), r"^stage\.lora\.quantize: nf4 with deepspeed\.stage 3"),
        ((NF4, "stage.ema_decay=0.9"), r"^stage\.ema_decay: 0\.9 with stage\.lora"),
        ((NF4, "stage.lr.llm=null"), r"^stage\.lora: adapters train at stage\.lr\.llm"),
    ],
)
def test_refusals(make_cfg, overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(make_cfg(*overrides), 1)
    validate(make_cfg(NF4, "deepspeed={stage: 2}"), 1)


def test_without_bitsandbytes(make_cfg, monkeypatch):
    monkeypatch.setattr(lora_module, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(ConfigError, match=r"nf4 needs bitsandbytes \(pip install 'skipvision-train\[qlora\]'\)"):
        assemble(make_cfg(NF4))
    with pytest.raises(ConfigError, match=r"needs bitsandbytes"):
        describe_stage(make_cfg(NF4))
    assemble(make_cfg(LORA))


def test_maps_without_whole_blocks(make_cfg):
    """bitsandbytes 0.50.2 unpacks them to wrong values on a CPU: the hand-made decoding above has shown it."""
    with pytest.raises(ConfigError, match=r"^stage\.lora\.quantize: nf4 .* of 64, but 0\.mlp\.down_proj has 96"):
        assemble(make_cfg(NF4, "model.text.intermediate_size=96"))


def test_a_run_of_before_goes_on(make_cfg, tmp_path):
    """Its record has no field for 4 bits."""
    with pytest.raises(InterruptionError):
        run_stage(make_cfg(LORA), (InterruptAfter(3),))
    record = tmp_path / "run" / "config.yaml"
    lines = [line for line in record.read_text().splitlines() if "quantize" not in line]
    assert len(lines) == len(record.read_text().splitlines()) - 2
    record.write_text("\n".join(lines))
    assert run_stage(make_cfg(LORA)).is_dir()
    record.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"stage\.lora\.quantize \(None before, nf4 now\)"):
        run_stage(make_cfg(NF4))


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_stop_and_go_on_with_one(workspace, tmp_path, precision):
    """Under ZeRO-2, as one process that is not stopped but for the order of sums; the export is the finished model."""
    wide = ("model.text.hidden_size=64", "model.text.intermediate_size=128", "trainer.per_device_batch=1")
    options = (*CHOSEN, *wide, "deepspeed=zero2", f"trainer.precision={precision}", "trainer.keep_checkpoints=0")
    alone, run_dir = tmp_path / "alone", tmp_path / "run"
    launch(workspace, alone, *options, processes=1)
    launch(workspace, run_dir, *options, processes=2)
    shutil.rmtree(run_dir / "model")
    shutil.rmtree(run_dir / "checkpoint-4")
    launch(workspace, run_dir, *options, processes=1)
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-5 if precision == "fp32" else 2e-2)
    finished = load_file(run_dir / "model" / "model.safetensors")
    assert {value.dtype for value in finished.values()} == {torch.bfloat16 if precision == "bf16" else torch.float32}
    run(Config(str(run_dir / "checkpoint-4"), str(tmp_path / "out")))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert set(exported) == set(finished)
    assert all(torch.equal(exported[name], value) for name, value in finished.items())
    run(Config(str(run_dir / "checkpoint-4"), str(tmp_path / "masters"), "fp32"))
    masters = load_file(tmp_path / "masters" / "model.safetensors")
    assert all(torch.allclose(masters[name], value.float(), rtol=2**-6, atol=2**-9) for name, value in finished.items())
