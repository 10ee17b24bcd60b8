"""Layer-wise decay of the tower's rate, adapters, and the moving average of the weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from interrupted import InterruptAfter, InterruptionError
from safetensors.torch import load_file
from transformers import set_seed

from skipvision_train.config.specs import RatesSpec
from skipvision_train.config.validate import validate
from skipvision_train.errors import ConfigError
from skipvision_train.models.build import meta_model
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.ema import WeightAverage
from skipvision_train.training.run import assemble, run_stage
from skipvision_train.training.stages import apply_rates, parameter_groups

LORA = "stage.lora={rank: 3, alpha: 6, targets: [q_proj, down_proj]}"


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def test_every_block_of_the_tower_has_its_rate(tiny_config):
    model, rates = meta_model(tiny_config), RatesSpec(vision=1e-3, llm=1e-2)
    apply_rates(model, rates)
    groups = parameter_groups(model, rates, 0.1, vision_layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    # The tower has the blocks that are read: as many as its deepest hidden state says.
    depth = len(model.vision_tower.transformer.resblocks)
    assert depth == 2
    for name, parameter in model.vision_tower.named_parameters():
        block = re.match(r"transformer\.resblocks\.(\d+)\.", name)
        expected = {None: 1e-3 / 4, 0: 1e-3 / 2, 1: 1e-3}[None if block is None else int(block[1])]
        assert rate[id(parameter)] == pytest.approx(expected), name
    assert {rate[id(p)] for p in model.language_model.parameters()} == {1e-2}
    assert [g["lr"] for g in groups if g["name"] == "vision"][-1] == 1e-3
    decays = {group["weight_decay"] for group in groups if group["name"] == "vision" and group["lr"] == 1e-3}
    assert decays == {0.0, 0.1}


def test_a_stage_with_layer_decay_logs_the_towers_own_rate(make_cfg, tmp_path):
    run_stage(make_cfg("stage.vision_layer_decay=0.5", "stage.warmup_ratio=0", "trainer.max_steps=2"))
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["lr/vision"] == pytest.approx(1e-3)


@pytest.mark.parametrize("plan", ["dense", "skip_ffn"])
def test_adapters_train_and_the_finished_model_is_plain(make_cfg, tmp_path, plan):
    cfg = make_cfg(LORA, f"plan.method={plan}", "stage.warmup_ratio=0")
    set_seed(cfg.trainer.seed)
    before = {k: v.clone() for k, v in assemble(make_cfg()).model.state_dict().items()}
    final = run_stage(cfg)
    after, adapters = load_file(final / "model.safetensors"), load_file(final / "adapters.safetensors")
    assert set(after) == set(before)
    assert len(adapters) == 2 * 2 * 2  # two maps, two layers, two factors
    for name, value in after.items():
        change = value - before[name]
        if not name.startswith("language_model."):
            continue
        if not name.endswith(("q_proj.weight", "down_proj.weight")):
            assert not change.any(), name
            continue
        part = name.removesuffix(".weight")
        down, up = (adapters[f"{part}.lora_{which}.default.weight"] for which in "AB")
        assert down.shape[0] == up.shape[1] == 3
        assert up.any()
        torch.testing.assert_close(change, 2.0 * (up @ down), rtol=0, atol=1e-6)
    assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith("connector."))

    # The last checkpoint, adapters in place, answers as the merged model does.
    parts = assemble(cfg)
    parts.model.load_state_dict(load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors"))
    plain = SkipVisionForConditionalGeneration.from_pretrained(final).eval()
    batch = parts.collator([parts.feed.dataset[i] for i in range(4)])
    labels = batch.pop("labels")
    with torch.no_grad():
        found, expected = plain(**batch).logits, parts.model.eval()(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert labels.shape == real.shape


@pytest.mark.parametrize("option", [LORA, "stage.ema_decay=0.5"])
def test_resumed_is_as_uninterrupted_and_the_next_stage_starts_from_it(make_cfg, tmp_path, option):
    whole = run_stage(make_cfg(option, f"trainer.output_dir={tmp_path / 'whole'}"))
    cfg = make_cfg(option, f"trainer.output_dir={tmp_path / 'two'}")
    with pytest.raises(InterruptionError):
        run_stage(cfg, (InterruptAfter(3),))
    resumed = run_stage(cfg)
    assert losses(tmp_path / "two") == losses(tmp_path / "whole")
    one, two = (load_file(path / "model.safetensors") for path in (whole, resumed))
    for name, value in one.items():
        assert torch.equal(two[name], value), name
    following = make_cfg(
        f"stage.start_from={whole}", "model.from_scratch=false", f"trainer.output_dir={tmp_path / 'next'}",
        "trainer.max_steps=1",
    )  # fmt: skip
    assert Path(run_stage(following)).is_dir()


def test_the_average_by_hand(make_cfg, tmp_path):
    cfg = make_cfg("stage.ema_decay=0.75", "trainer.save_every=1", "trainer.keep_checkpoints=0", "stage.lr.vision=null")
    set_seed(cfg.trainer.seed)
    average = {k: v.double() for k, v in assemble(cfg).model.state_dict().items()}
    found = load_file(run_stage(cfg) / "model.safetensors")
    for step in range(1, 5):
        weights = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        average = {name: 0.75 * value + 0.25 * weights[name].double() for name, value in average.items()}
    for name, value in found.items():
        torch.testing.assert_close(value.double(), average[name], rtol=0, atol=1e-6, msg=name)
    last = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert any(not torch.equal(found[name], last[name]) for name in found)


def test_an_average_begins_with_the_weights_or_with_what_was_loaded(tmp_path):
    """Of the weights that train, in fp32, whatever type they have."""
    model = torch.nn.Linear(1, 2, bias=True).bfloat16()
    model.all_tied_weights_keys = {}
    model.weight.data = torch.tensor([[1.0], [2.0]])
    model.bias.requires_grad = False
    average = WeightAverage(model, 0.75)
    average.on_train_begin(None, None, None)
    with torch.no_grad():
        model.weight.add_(4.0)
    assert average.average["weight"].tolist() == [[1.0], [2.0]]  # no view of what the steps change
    average.on_step_end(None, None, None)
    average.save(tmp_path)
    resumed = WeightAverage(model, 0.75)
    resumed.load(tmp_path)
    resumed.on_train_begin(None, None, None)
    assert {name: value.tolist() for name, value in resumed.average.items()} == {"weight": [[2.0], [3.0]]}
    found = resumed.replace({"weight": model.weight.bfloat16(), "bias": model.bias})
    assert (found["weight"].dtype, found["weight"].tolist()) == (torch.bfloat16, [[2.0], [3.0]])
    assert found["bias"] is model.bias


def test_a_checkpoint_without_the_average_is_refused(make_cfg, tmp_path):
    run_stage(make_cfg("trainer.max_steps=4"))
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(Exception, match=r"holds no average\.safetensors"):
        run_stage(make_cfg("trainer.max_steps=6", "stage.ema_decay=0.5"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("stage.vision_layer_decay=1.5",), r"^stage\.vision_layer_decay: 1\.5 is out of range"),
        (
            ("stage.vision_layer_decay=0.9", "stage.lr.vision=null"),
            r"^stage\.vision_layer_decay: .*stage\.lr\.vision is",
        ),
        (("stage.ema_decay=1.0",), r"^stage\.ema_decay: 1\.0 is out of range"),
        (("stage.ema_decay=0.9", "deepspeed={stage: 3}"), r"^stage\.ema_decay: 0\.9 with deepspeed\.stage 3"),
        (("stage.lora={rank: 0}",), r"^stage\.lora\.rank: 0"),
        (("stage.lora={alpha: 0}",), r"^stage\.lora\.alpha: 0\.0"),
        (("stage.lora={dropout: 1.0}",), r"^stage\.lora\.dropout: 1\.0"),
        (("stage.lora={rank: 2}", "stage.lr.llm=null"), r"^stage\.lora: adapters train at stage\.lr\.llm"),
        (("stage.lora={rank: 2}", "stage.ema_decay=0.9"), r"^stage\.ema_decay: 0\.9 with stage\.lora"),
        (("trainer.loss=fused",), r"^trainer\.loss: 'fused' is unknown; use chunked, plain, liger"),
        (("trainer.last_layer=none",), r"^trainer\.last_layer: 'none' is unknown; use supervised, all"),
    ],
)
def test_bad_options(make_cfg, overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(make_cfg(*overrides), 1)


def test_a_target_that_no_layer_has(make_cfg):
    with pytest.raises(
        ConfigError, match=r"^stage\.lora\.targets: c_attn is no linear map of the layers; use down_proj"
    ):
        assemble(make_cfg("stage.lora={targets: [q_proj, c_attn]}"))
