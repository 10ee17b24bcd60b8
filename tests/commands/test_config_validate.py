"""Every cross-field rule names the field first, then the value and what would be right."""

from __future__ import annotations

import pytest

from skipvision_train.config.specs import (
    DataSpec,
    DeepSpeedSpec,
    ModelSpec,
    RatesSpec,
    StageSpec,
    TrainConfig,
    TrainerSpec,
)
from skipvision_train.config.validate import accumulation, check_sources, validate
from skipvision_train.errors import ConfigError
from skipvision_train.plans import skip_ffn


@pytest.fixture
def cfg(tmp_path):
    return TrainConfig(
        model=ModelSpec(plan="skip_ffn"),
        stage=StageSpec(lr=RatesSpec(connector=1e-3)),
        data=DataSpec(recipe="any"),
        trainer=TrainerSpec(output_dir=str(tmp_path), max_steps=3),
    )


def change(cfg, path, value):
    *parents, name = path.split(".")
    for parent in parents:
        cfg = getattr(cfg, parent)
    setattr(cfg, name, value)


def test_the_default_is_valid(cfg):
    validate(cfg, 1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.vision.image_size", 450, r"^model\.vision\.image_size: 450 is no multiple of .* 14"),
        ("model.connector.windows", [32, 5, 2], r"^model\.connector\.windows\[1\]: 5 does not divide the 32 x 32 grid"),
        ("model.connector.windows", [32, 4], r"^model\.connector\.queries: 3 levels, but .* has 2"),
        ("model.connector.queries", [16, 100, 1024], r"^model\.connector\.queries\[1\]: 100 is no multiple of .* 64"),
        ("model.connector.head_dim", 60, r"^model\.connector\.head_dim: 60 does not divide model\.vision\.width 1024"),
        ("model.reducer.local_keep", 2000, r"^model\.reducer\.local_keep: 2000 of 1024 tokens; use 1 to 1024"),
        ("model.reducer.summary", "all", r"^model\.reducer\.summary: 'all' is unknown; use both, former"),
        ("model.text.num_key_value_heads", 5, r"^model\.text\.num_key_value_heads: 5 does not divide .* 32"),
        ("model.text.num_hidden_layers", 0, r"^model\.text\.num_hidden_layers: 0 is out of range; use 1 or more"),
        ("model.plan", "none.json", r"^model\.plan: 'none.json' is neither dense nor skip_ffn nor a plan file"),
        ("stage.lr.connector", -1e-3, r"^stage\.lr\.connector: -0\.001 is out of range"),
        ("stage.lr.connector", None, r"^stage\.lr: every part is frozen; give at least one of vision, connector"),
        ("stage.template", "llama4", r"^stage\.template: template 'llama4' is unknown; use one of llama3, plain"),
        ("stage.schedule", "cosin", r"^stage\.schedule: 'cosin' is unknown; use cosine, linear, constant"),
        ("stage.warmup_ratio", 3.0, r"^stage\.warmup_ratio: 3\.0 is out of range; use 0 to less than 1"),
        ("data.max_length", 400, r"^data\.max_length: 400 has no room for text beside the 528 visual tokens"),
        ("data.max_length", 9000, r"^data\.max_length: 9000 is more than model\.text\.max_position_embeddings 8192"),
        ("data.on_error", "ignore", r"^data\.on_error: 'ignore' is unknown; use error, skip"),
        ("trainer.epochs", 1.0, r"^trainer\.max_steps: 3 with trainer\.epochs 1\.0; give exactly one"),
        ("trainer.max_steps", None, r"^trainer\.max_steps: None with trainer\.epochs None; give exactly one"),
        ("trainer.max_steps", 0, r"^trainer\.max_steps: 0 is out of range"),
        ("trainer.precision", "fp16", r"^trainer\.precision: 'fp16' is unknown; use fp32, bf16"),
        ("trainer.resume", "yes", r"^trainer\.resume: 'yes' is unknown; use auto, never"),
        ("trainer.wandb", "on", r"^trainer\.wandb: 'on' is unknown; use off, offline, online"),
        ("trainer.workers", -1, r"^trainer\.workers: -1 is out of range; use 0 or more"),
        ("deepspeed", DeepSpeedSpec(stage=4), r"^deepspeed\.stage: 4 is unknown; use 1, 2 or 3"),
        ("deepspeed", DeepSpeedSpec(offload_param=True), r"^deepspeed\.offload_param: true needs .*stage 3, not 2"),
        ("deepspeed", DeepSpeedSpec(extra={"bf16": {}}), r"^deepspeed\.extra: bf16 follows from"),
    ],
)  # fmt: skip
def test_rule(cfg, path, value, message):
    change(cfg, path, value)
    with pytest.raises(ConfigError, match=message):
        validate(cfg, 1)


def test_plan_deeper_than_the_model(cfg, tmp_path):
    skip_ffn().bind(40).save(tmp_path / "plan.json")
    cfg.model.plan = str(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match=r"^model\.plan: plan 'skip_ffn' has 40 layers, the model has 32"):
        validate(cfg, 1)
    cfg.model.text.num_hidden_layers = 40
    validate(cfg, 1)


def test_plan_without_skipped_tokens(cfg):
    cfg.model.reducer.skip_finest, cfg.model.reducer.local_keep = False, None
    cfg.model.reducer.summary, cfg.model.reducer.last_local_ffn = "none", False
    with pytest.raises(ConfigError, match=r"^model\.plan: skip_ffn skips nothing"):
        validate(cfg, 1)
    cfg.model.plan = "dense"
    validate(cfg, 1)


@pytest.mark.parametrize(
    ("per_device", "processes", "total", "steps"), [(8, 1, 128, 16), (8, 16, 128, 1), (3, 2, 6, 1)]
)
def test_accumulation(per_device, processes, total, steps):
    trainer = TrainerSpec(per_device_batch=per_device, global_batch=total)
    assert accumulation(trainer, processes) == steps
    assert per_device * processes * steps == total


@pytest.mark.parametrize(("total", "advice"), [(30, "24 or 32"), (4, "8")])
def test_global_batch_must_divide(total, advice):
    with pytest.raises(
        ConfigError, match=rf"^trainer\.global_batch: {total} is no multiple .* 4 x 2 .* = 8; use {advice}$"
    ):
        accumulation(TrainerSpec(per_device_batch=4, global_batch=total), 2)


def test_random_weights_must_be_asked_for(cfg, tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.llm: null would train from random weights.*from_scratch=true"):
        check_sources(cfg)
    cfg.model.llm = str(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.vision_weights: null would train from random weights"):
        check_sources(cfg)
    cfg.model.from_scratch = True
    check_sources(cfg)
    cfg.model.llm = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"^model\.llm: .*missing does not exist"):
        check_sources(cfg)


def test_start_from_gives_all_weights(cfg, tmp_path):
    cfg.stage.start_from = str(tmp_path)
    check_sources(cfg)
    cfg.model.llm = str(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.llm: must be null where stage\.start_from"):
        check_sources(cfg)
