"""Every cross-field rule names the field first, then the value and what would be right."""

from __future__ import annotations

import pytest

from skipvision_train.config.plans import PlanSpec
from skipvision_train.config.specs import (
    DataSpec,
    DeepSpeedSpec,
    LoraSpec,
    ModelSpec,
    RatesSpec,
    ReducerSpec,
    StageSpec,
    TrainConfig,
    TrainerSpec,
    VisionSpec,
)
from skipvision_train.config.validate import accumulation, check_sources, validate
from skipvision_train.errors import ConfigError
from skipvision_train.plans import skip_ffn


@pytest.fixture
def cfg(tmp_path):
    return TrainConfig(
        model=ModelSpec(),
        plan=PlanSpec("skip_ffn"),
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
        ("model.connector", {"windows": [32, 5, 2]}, r"^model\.connector\.windows\[1\]: 5 does not divide the 32 x"),
        ("model.connector", {"windows": [32, 4]}, r"^model\.connector\.queries: 3 levels, but .* has 2"),
        ("model.connector", {"queries": [16, 100, 1024]}, r"^model\.connector\.queries\[1\]: 100 is no multiple"),
        ("model.connector", {"head_dim": 60}, r"^model\.connector\.head_dim: 60 does not divide vision\.width 1024"),
        ("model.reducer.local_keep", 2000, r"^model\.reducer\.local_keep: 2000 of 1024 tokens; use 1 to 1024"),
        ("model.reducer.summary", "all", r"^model\.reducer\.summary: 'all' is unknown; use none, former"),
        ("model.connector", {"windows": "4,2"}, r"^model\.connector\.windows: .*; the fields are windows, queries"),
        ("model.connector", {"type": "mlp", "layer": 2}, r"^model\.connector\.layer: .*; the fields are layers, pool"),
        ("model.connector", {"type": "mpl"}, r"^model\.connector\.type: 'mpl' is unknown; use resampler, mlp"),
        ("model.connector", {"type": "mlp"}, r"^model\.vision\.depths: \[15, 22\]; this connector reads one"),
        ("model.tiling.mode", "grid", r"^model\.tiling\.mode: 'grid' is unknown; use none, aspect, square"),
        ("model.tiling.mode", "square", r"^model\.tiling\.mode: square with reducer\.split finest; use"),
        ("model.reducer.split", "tiles", r"^model\.reducer\.split: tiles needs tiling\.mode aspect or square"),
        ("model.reducer.split", "saliency", r"^model\.reducer\.retain: None with reducer\.split saliency"),
        ("model.text.num_key_value_heads", 5, r"^model\.text\.num_key_value_heads: 5 does not divide .* 32"),
        ("model.text.num_hidden_layers", 0, r"^model\.text\.num_hidden_layers: 0 is out of range; use 1 or more"),
        ("plan", PlanSpec("file", path="none.json"), r"^plan: none\.json: no such plan file"),
        ("plan", PlanSpec("skipffn"), r"^plan\.method: 'skipffn' is unknown; use own, dense, skip_ffn"),
        ("stage.lr.connector", -1e-3, r"^stage\.lr\.connector: -0\.001 is out of range"),
        ("stage.lr.connector", None, r"^stage\.lr: every part is frozen; give at least one of vision, connector"),
        ("stage.template", "llama4", r"^stage\.template: template 'llama4' is unknown; use one of llama3, plain"),
        ("stage.schedule", "cosin", r"^stage\.schedule: 'cosin' is unknown; use cosine, linear, constant"),
        ("stage.warmup_ratio", 3.0, r"^stage\.warmup_ratio: 3\.0 is out of range; use 0 to less than 1"),
        ("data.max_length", 400, r"^data\.max_length: 400 has no room for text beside the 530 visual tokens"),
        ("data.max_length", 9000, r"^data\.max_length: 9000 is more than model\.text\.max_position_embeddings 8192"),
        ("data.on_error", "ignore", r"^data\.on_error: 'ignore' is unknown; use error, skip"),
        ("trainer.epochs", 1.0, r"^trainer\.max_steps: 3 with trainer\.epochs 1\.0; give exactly one"),
        ("trainer.max_steps", None, r"^trainer\.max_steps: None with trainer\.epochs None; give exactly one"),
        ("trainer.max_steps", 0, r"^trainer\.max_steps: 0 is out of range"),
        ("trainer.precision", "fp16", r"^trainer\.precision: 'fp16' is unknown; use fp32, bf16"),
        ("trainer.resume", "yes", r"^trainer\.resume: 'yes' is unknown; use auto, never"),
        ("trainer.wandb", "on", r"^trainer\.wandb: 'on' is unknown; use off, offline, online"),
        ("trainer.seed", -1, r"^trainer\.seed: -1 is out of range; use 0 or more"),
        ("trainer.seed", 2**32, r"^trainer\.seed: 4294967296 is out of range; use at most 4294967295"),
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


QUERIES = [16, 256, 1024]
LEFT = (
    r"^model\.connector\.type: {0}, with {1} of connector resampler: .*; take one that does not, such as "
    r"experiment=llava connector@model\.connector={0}$"
)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            {"type": "mqt", "queries": QUERIES, "keep": 256, "windows": [32, 4, 2]},
            LEFT.format("mqt", r"queries=\[16,256,1024\] and windows=\[32,4,2\]"),
        ),
        ({"type": "mlp", "queries": QUERIES}, LEFT.format("mlp", r"queries=\[16,256,1024\]")),
        ({"type": "resampler", "pool": 2}, r"type: resampler, with pool=2 of connector mlp: .*, such as model=sv_cos$"),
        ({"type": "resampler", "queries": 16}, r"^model\.connector\.queries: .*; the fields are windows, queries"),
        ({"type": "mqt", "windows": [4], "pool": 2}, r"^model\.connector\.(windows|pool): .*; the fields are queries"),
    ],
)
def test_keys_of_another_connector(cfg, kind, message):
    cfg.model.connector = kind
    with pytest.raises(ConfigError, match=message):
        validate(cfg, 1)


def test_saliency_needs_a_block_to_rank_by(cfg):
    cfg.model = ModelSpec(
        vision=VisionSpec(image_size=336, depths=[0]),
        connector={"type": "mlp"},
        reducer=ReducerSpec(split="saliency", retain=100, local_keep=156, former_over="retained"),
    )
    with pytest.raises(ConfigError, match=r"^model\.vision\.depths: \[0\] ends with the embedding output"):
        validate(cfg, 1)
    cfg.model.reducer.retain_by = "similarity"
    validate(cfg, 1)
    cfg.model.reducer.retain_by, cfg.model.vision.depths = "attention", [1]
    validate(cfg, 1)


def test_plan_deeper_than_the_model(cfg, tmp_path):
    skip_ffn().bind(40).save(tmp_path / "plan.json")
    cfg.plan = PlanSpec("file", path=str(tmp_path / "plan.json"))
    with pytest.raises(ConfigError, match=r"^plan: plan 'skip_ffn' has 40 layers, the model has 32"):
        validate(cfg, 1)
    cfg.model.text.num_hidden_layers = 40
    validate(cfg, 1)


@pytest.mark.parametrize("method", ["skip_ffn", "skip_kv"])
def test_plan_without_skipped_tokens(cfg, method):
    cfg.model.reducer = ReducerSpec(split="none", local_keep=None, summary="none", last_local_ffn=False)
    cfg.plan = PlanSpec(method)
    with pytest.raises(
        ConfigError, match=rf"^plan\.method: {method} skips nothing where model\.reducer\.split is none"
    ):
        validate(cfg, 1)
    cfg.plan = PlanSpec("dense")
    validate(cfg, 1)


@pytest.mark.parametrize(
    ("retain", "message"),
    [
        (0, r"^model\.reducer\.retain: 0 of 576 tokens; use 1 to 575"),
        (576, r"^model\.reducer\.retain: 576 of 576 tokens; use 1 to 575"),
        (500, r"^model\.reducer\.local_keep: 156 of 76 tokens; use 1 to 76"),
    ],
)
def test_more_tokens_than_there_are(cfg, retain, message):
    cfg.model.vision = VisionSpec(image_size=336, depths=[23])
    cfg.model.connector = {"type": "mlp"}
    cfg.model.reducer = ReducerSpec(split="saliency", retain=retain, local_keep=156, former_over="retained")
    with pytest.raises(ConfigError, match=message):
        validate(cfg, 1)
    cfg.model.reducer.retain = 100
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

    cfg.model.llm, cfg.model.connector_weights = str(tmp_path), str(tmp_path / "none.bin")
    with pytest.raises(ConfigError, match=r"^model\.connector_weights: .*none\.bin does not exist"):
        check_sources(cfg)


@pytest.mark.parametrize(
    ("rates", "what"),
    [
        (RatesSpec(connector=1e-3, llm=1e-5), "train the language model on"),
        (RatesSpec(llm=1e-5), "train the language model on"),
        (RatesSpec(vision=1e-5), "freeze"),
    ],
)
@pytest.mark.parametrize("lora", [None, LoraSpec()])
def test_a_forgotten_projector_is_an_error(cfg, tmp_path, rates, what, lora):
    cfg.model.llm = cfg.model.vision_weights = str(tmp_path)
    cfg.stage.lora = lora
    check_sources(cfg)  # pretraining: the connector alone
    cfg.stage.lr = rates
    message = rf"^model\.connector_weights: null would {what} a connector of random weights; .*from_scratch=true$"
    with pytest.raises(ConfigError, match=message):
        check_sources(cfg)
    cfg.model.connector_weights = str(tmp_path)
    check_sources(cfg)
    cfg.model.connector_weights, cfg.model.from_scratch = None, True
    check_sources(cfg)
    cfg.model.from_scratch = False
    cfg.stage.start_from, cfg.model.llm, cfg.model.vision_weights = str(tmp_path), None, None
    check_sources(cfg)


@pytest.mark.parametrize("part", ["llm", "vision_weights", "connector_weights"])
def test_start_from_gives_all_weights(cfg, tmp_path, part):
    cfg.stage.start_from = str(tmp_path)
    check_sources(cfg)
    setattr(cfg.model, part, str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^model\.{part}: must be null where stage\.start_from"):
        check_sources(cfg)
