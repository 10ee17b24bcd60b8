"""Rules between fields. Every message begins with the field's path and says the value and what would be accepted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvision_train.config.specs import (
    DataSpec,
    DeepSpeedSpec,
    ModelSpec,
    SkipSpec,
    StageSpec,
    TextSpec,
    TrainConfig,
    TrainerSpec,
)
from skipvision_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from skipvision_train.models.configuration import SkipVisionConfig

SKIP_PARTS = ("attention", "ffn", "both")
GROUPS = ("none", "length", "modality")
PACK_BY = ("measured", "estimated")
LOSSES = ("chunked", "plain", "liger")
RESIZERS = ("auto", "torch", "pillow")
FOUR_BITS = ("nf4", "fp4")
OWNED_BY_THE_RUN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "zero_optimization",
    "bf16",
    "fp16",
)


def validate(cfg: TrainConfig, world_size: int) -> None:
    """Check everything that needs neither weights nor data.

    Args:
        cfg: the composed configuration.
        world_size: number of training processes.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    _check_text(cfg.model.text)
    # A checkpoint says its depth itself; what needs it is checked where it is read.
    depth = cfg.model.text.num_hidden_layers if cfg.model.llm is None and cfg.stage.start_from is None else None
    config = _check_model(cfg.model)
    _check_plan(cfg, depth)
    _check_stage(cfg.stage)
    _check_skip(cfg.stage.skip, depth)
    _check_data(cfg, len(config.image_token_kinds()))
    _check_trainer(cfg.trainer, world_size)
    _check_stream(cfg, world_size)
    if cfg.deepspeed is not None:
        _check_deepspeed(cfg.deepspeed)
        if cfg.deepspeed.stage == 3 and cfg.stage.ema_decay is not None:
            raise ConfigError(
                f"stage.ema_decay: {cfg.stage.ema_decay} with deepspeed.stage 3, where no process holds the weights; "
                "use deepspeed.stage 2, or null"
            )
        if cfg.deepspeed.stage == 3 and cfg.stage.lora is not None and cfg.stage.lora.quantize is not None:
            raise ConfigError(
                f"stage.lora.quantize: {cfg.stage.lora.quantize} with deepspeed.stage 3, which cannot shard weights of "
                "4 bits; use deepspeed.stage 1 or 2, or null"
            )


def check_sources(cfg: TrainConfig) -> None:
    """Refuse to train from random weights that nobody asked for. A dry run needs no weights and skips this.

    Without the connector's weights a stage must train it, and not a language model (or adapters) on what it gives.

    Raises:
        ConfigError: a part without weights, and ``model.from_scratch`` is false; or as :func:`check_paths`.
    """
    check_paths(cfg)
    if cfg.stage.start_from is not None or cfg.model.from_scratch:
        return
    for path, value, what in (
        ("model.llm", cfg.model.llm, "the directory of a LLaMA-architecture model"),
        ("model.vision_weights", cfg.model.vision_weights, "a CLIP checkpoint"),
    ):
        if value is None:
            raise ConfigError(
                f"{path}: null would train from random weights; give {what}, set stage.start_from, or say "
                "model.from_scratch=true"
            )
    rates = cfg.stage.lr
    if cfg.model.connector_weights is None and (rates.llm is not None or rates.connector is None):
        why = "train the language model on" if rates.llm is not None else "freeze"
        raise ConfigError(
            f"model.connector_weights: null would {why} a connector of random weights; give a projector, set "
            "stage.start_from to a pretraining stage's model, or say model.from_scratch=true"
        )


def check_paths(cfg: TrainConfig) -> None:
    """Refuse paths of weights that lead nowhere or contradict each other; none need be given.

    Raises:
        ConfigError: naming the field.
    """
    for name in ("llm", "vision_weights", "connector_weights"):
        if (value := getattr(cfg.model, name)) is None:
            continue
        if cfg.stage.start_from is not None:
            raise ConfigError(f"model.{name}: must be null where stage.start_from gives all weights")
        _exists(f"model.{name}", value)
    if cfg.stage.start_from is not None:
        _exists("stage.start_from", cfg.stage.start_from)


def accumulation(trainer: TrainerSpec, world_size: int) -> int:
    """Forward passes of one process per optimizer step.

    Raises:
        ConfigError: the global batch is no multiple of what the processes take at once.
    """
    at_once = trainer.per_device_batch * world_size
    steps, rest = divmod(trainer.global_batch, at_once)
    if rest or not steps:
        near = sorted({max(at_once, steps * at_once), (steps + 1) * at_once})
        raise ConfigError(
            f"trainer.global_batch: {trainer.global_batch} is no multiple of trainer.per_device_batch "
            f"{trainer.per_device_batch} x {world_size} processes = {at_once}; use {' or '.join(map(str, near))}"
        )
    return steps


def _one_of(path: str, value: str, allowed: Iterable[str]) -> None:
    if value not in (options := list(allowed)):
        raise ConfigError(f"{path}: {value!r} is unknown; use {', '.join(options)}")


def _at_least(path: str, value: float | None, least: float) -> None:
    if value is not None and not (value >= least and math.isfinite(value)):
        raise ConfigError(f"{path}: {value} is out of range; use {least} or more")


def _exists(path: str, value: str) -> None:
    if not Path(value).exists():
        raise ConfigError(f"{path}: {value} does not exist")


def _check_text(text: TextSpec) -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        _at_least(f"model.text.{name}", getattr(text, name), 1)
    _at_least("model.text.num_key_value_heads", text.num_key_value_heads, 1)
    if text.hidden_size % text.num_attention_heads or text.hidden_size // text.num_attention_heads % 2:
        raise ConfigError(
            f"model.text.hidden_size: {text.hidden_size} must be an even multiple of model.text.num_attention_heads "
            f"{text.num_attention_heads}"
        )
    if text.num_attention_heads % text.num_key_value_heads:
        raise ConfigError(
            f"model.text.num_key_value_heads: {text.num_key_value_heads} does not divide "
            f"model.text.num_attention_heads {text.num_attention_heads}"
        )


def _check_model(model: ModelSpec) -> SkipVisionConfig:
    from skipvision_train.config.resolve import connector_config
    from skipvision_train.models.configuration import SkipVisionConfig

    parts: dict[str, Any] = {name: dataclasses.asdict(getattr(model, name)) for name in ("vision", "tiling", "reducer")}
    try:
        config = SkipVisionConfig(**parts, connector=connector_config(model.connector))
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from error
    if config.readout == "attention" and model.vision.depths[-1] == 0:
        raise ConfigError(
            f"model.vision.depths: {model.vision.depths} ends with the embedding output, where nothing attends; name a "
            "depth of 1 or more last"
        )
    return config


def _check_plan(cfg: TrainConfig, depth: int | None) -> None:
    from skipvision_train.config.resolve import stage_plan

    skips = cfg.plan.method in ("skip_ffn", "skip_kv") and cfg.plan.kinds is None
    if skips and cfg.model.reducer.split == "none":
        raise ConfigError(
            f"plan.method: {cfg.plan.method} skips nothing where model.reducer.split is none; use plan=dense"
        )
    if depth is None:
        return
    ranked = [drop.score for drop in stage_plan(cfg, depth).drops if drop.score in ("raters", "corrected_raters")]
    if cfg.data.pack and ranked:
        raise ConfigError(
            f"data.pack: true under plan.method {cfg.plan.method}, whose drops rank by {ranked[0]}: that takes one "
            "record per row; use data.pack=false"
        )


def _check_stage(stage: StageSpec) -> None:
    from skipvision_train.data.templates import get_template

    rates = dataclasses.asdict(stage.lr)
    for part, rate in rates.items():
        if rate is not None and not 0 < rate < 1:
            raise ConfigError(f"stage.lr.{part}: {rate} is out of range; use a rate between 0 and 1, or null to freeze")
    if all(rate is None for rate in rates.values()):
        raise ConfigError(f"stage.lr: every part is frozen; give at least one of {', '.join(rates)} a rate")
    try:
        get_template(stage.template)
    except DataError as error:
        raise ConfigError(f"stage.template: {error}") from error
    _one_of("stage.schedule", stage.schedule, ("cosine", "linear", "constant"))
    if not 0 <= stage.warmup_ratio < 1:
        raise ConfigError(f"stage.warmup_ratio: {stage.warmup_ratio} is out of range; use 0 to less than 1")
    _at_least("stage.weight_decay", stage.weight_decay, 0)
    _at_least("stage.max_grad_norm", stage.max_grad_norm, 0)
    _check_options(stage)


def _check_options(stage: StageSpec) -> None:
    decay, ema, lora = stage.vision_layer_decay, stage.ema_decay, stage.lora
    if decay is not None and not 0 < decay <= 1:
        raise ConfigError(f"stage.vision_layer_decay: {decay} is out of range; use a number above 0 up to 1, or null")
    if decay is not None and stage.lr.vision is None:
        raise ConfigError(
            f"stage.vision_layer_decay: {decay}, but stage.lr.vision is null; give it a rate, or use null"
        )
    if ema is not None and not 0 < ema < 1:
        raise ConfigError(f"stage.ema_decay: {ema} is out of range; use a number between 0 and 1, or null")
    if lora is None:
        return
    if stage.lr.llm is None:
        raise ConfigError("stage.lora: adapters train at stage.lr.llm, which is null; give it a rate, or no adapters")
    _at_least("stage.lora.rank", lora.rank, 1)
    if not 0 < lora.alpha < math.inf:
        raise ConfigError(f"stage.lora.alpha: {lora.alpha} is out of range; use a number above 0")
    if not 0 <= lora.dropout < 1:
        raise ConfigError(f"stage.lora.dropout: {lora.dropout} is out of range; use 0 to less than 1")
    if lora.quantize is not None:
        _one_of("stage.lora.quantize", lora.quantize, FOUR_BITS)
    elif not lora.double_quantize:
        raise ConfigError(
            "stage.lora.double_quantize: false without stage.lora.quantize; set that to nf4 or fp4, or leave this out"
        )
    if ema is not None:
        raise ConfigError(f"stage.ema_decay: {ema} with stage.lora; an average of factors is none of weights, use null")


def _check_skip(skip: SkipSpec, depth: int | None) -> None:
    from skipvision_train.config.resolve import skipped_layers
    from skipvision_train.plans.rules import BYPASSES

    if skip.layers is None and skip.count is None:
        if skip != SkipSpec():
            raise ConfigError("stage.skip: names no layers; give stage.skip.layers=[...] or stage.skip.count=N")
        return
    if skip.layers is not None and skip.count is not None:
        raise ConfigError(f"stage.skip.layers: {skip.layers} with stage.skip.count {skip.count}; give one of them")
    _at_least("stage.skip.count", skip.count, 1)
    if skip.layers is not None:
        if not skip.layers:
            raise ConfigError("stage.skip.layers: [] names no layer; name some, or use null")
        if len(set(skip.layers)) != len(skip.layers):
            raise ConfigError(f"stage.skip.layers: {skip.layers} name a layer twice")
        _at_least("stage.skip.layers", min(skip.layers), 0)
    if depth is not None:
        skipped_layers(skip, depth)
    _one_of("stage.skip.part", skip.part, SKIP_PARTS)
    _one_of("stage.skip.bypass", skip.bypass, BYPASSES)
    if skip.part == "ffn" and skip.bypass != "zero":
        raise ConfigError(f"stage.skip.bypass: {skip.bypass} replaces an attention; stage.skip.part=ffn skips none")
    if skip.widen is not None and not (len(skip.widen) == 2 and 0 <= skip.widen[0] < skip.widen[1] <= 1):
        raise ConfigError(
            f"stage.skip.widen: {skip.widen}; use [start, end], two shares of the steps with 0 <= start < end <= 1"
        )


def _check_data(cfg: TrainConfig, tokens: int) -> None:
    data = cfg.data
    _one_of("data.on_error", data.on_error, ("error", "skip"))
    _at_least("data.error_budget", data.error_budget, 0)
    _one_of("data.resizer", data.resizer, RESIZERS)
    _check_batches(data)
    if data.max_length <= tokens:
        raise ConfigError(
            f"data.max_length: {data.max_length} has no room for text beside the {tokens} visual tokens of one image"
        )
    longest = cfg.model.text.max_position_embeddings
    if cfg.model.llm is None and cfg.stage.start_from is None and data.max_length > longest:
        raise ConfigError(
            f"data.max_length: {data.max_length} is more than model.text.max_position_embeddings {longest}"
        )


def _check_batches(data: DataSpec) -> None:
    from skipvision_train.data.order import ORDERS

    _one_of("data.order", data.order, ORDERS)
    _one_of("data.group", data.group, GROUPS)
    _one_of("data.pack_by", data.pack_by, PACK_BY)
    _at_least("data.shard_buffer", data.shard_buffer, 1)
    if not data.pack:
        if data.pack_length is not None:
            raise ConfigError(f"data.pack_length: {data.pack_length} without data.pack; set data.pack=true, or null")
        return
    if data.group != "none":
        raise ConfigError(f"data.group: {data.group} with data.pack; packed rows have no padding to save, use none")
    if data.pack_length is not None and data.pack_length < data.max_length:
        raise ConfigError(
            f"data.pack_length: {data.pack_length} is less than data.max_length {data.max_length}; a row must hold the "
            "longest record"
        )


def _check_stream(cfg: TrainConfig, world_size: int) -> None:
    data, trainer = cfg.data, cfg.trainer
    _at_least("data.stream_buffer", data.stream_buffer, 1)
    _at_least("data.stream_lanes", data.stream_lanes, 1)
    if not data.streaming:
        if data.stream_lanes is not None:
            raise ConfigError(
                f"data.stream_lanes: {data.stream_lanes} without data.streaming; set data.streaming=true, or null"
            )
        return
    if trainer.epochs is not None:
        raise ConfigError(
            f"trainer.epochs: {trainer.epochs} with data.streaming, which does not know how many records there are; "
            "use trainer.max_steps, and trainer.epochs=null"
        )
    if data.order == "shards":
        raise ConfigError("data.order: shards with data.streaming, which reads shard by shard anyway; use shuffle")
    if data.group != "none":
        raise ConfigError(f"data.group: {data.group} with data.streaming, which does not know lengths; use none")
    if data.pack:
        raise ConfigError("data.pack: true with data.streaming, which does not know lengths; use data.pack=false")
    if trainer.watch.sample_every and trainer.watch.sample_recipe is None:
        raise ConfigError("trainer.watch.sample_recipe: null with data.streaming; name a recipe to read as a whole")
    lanes = data.stream_lanes
    if lanes is not None and (lanes % world_size or trainer.global_batch % lanes):
        raise ConfigError(
            f"data.stream_lanes: {lanes} must be a multiple of the {world_size} processes and divide "
            f"trainer.global_batch {trainer.global_batch}; use null, or another number"
        )


def _check_trainer(trainer: TrainerSpec, world_size: int) -> None:
    if (trainer.max_steps is None) == (trainer.epochs is None):
        raise ConfigError(
            f"trainer.max_steps: {trainer.max_steps} with trainer.epochs {trainer.epochs}; give exactly one, the "
            "other null"
        )
    _at_least("trainer.max_steps", trainer.max_steps, 1)
    if trainer.epochs is not None and not 0 < trainer.epochs < math.inf:
        raise ConfigError(f"trainer.epochs: {trainer.epochs} is out of range; use a number above 0")
    for name in ("per_device_batch", "global_batch", "log_every"):
        _at_least(f"trainer.{name}", getattr(trainer, name), 1)
    for name in ("seed", "save_every", "keep_checkpoints", "workers"):
        _at_least(f"trainer.{name}", getattr(trainer, name), 0)
    if trainer.seed >= 2**32:  # NumPy's generator takes 32 bits
        raise ConfigError(f"trainer.seed: {trainer.seed} is out of range; use at most {2**32 - 1}")
    _one_of("trainer.precision", trainer.precision, ("fp32", "bf16"))
    _one_of("trainer.loss", trainer.loss, LOSSES)
    _one_of("trainer.last_layer", trainer.last_layer, ("supervised", "all"))
    _one_of("trainer.resume", trainer.resume, ("auto", "never"))
    _one_of("trainer.wandb", trainer.wandb, ("off", "offline", "online"))
    _check_watching(trainer)
    accumulation(trainer, world_size)


def _check_watching(trainer: TrainerSpec) -> None:
    guards, watch = trainer.guards, trainer.watch
    for name in ("nonfinite_budget", "spike_threshold", "stuck_after"):
        _at_least(f"trainer.guards.{name}", getattr(guards, name), 0)
    _one_of("trainer.guards.memory", guards.memory, ("error", "warn", "off"))
    _at_least("trainer.watch.sample_every", watch.sample_every, 0)
    _at_least("trainer.watch.sample_count", watch.sample_count, 1)
    _at_least("trainer.watch.sample_tokens", watch.sample_tokens, 1)
    if trainer.peak_tflops is not None and not 0 < trainer.peak_tflops < math.inf:
        raise ConfigError(f"trainer.peak_tflops: {trainer.peak_tflops} is out of range; use a number above 0, or null")


def _check_deepspeed(spec: DeepSpeedSpec) -> None:
    if spec.stage not in (1, 2, 3):
        raise ConfigError(f"deepspeed.stage: {spec.stage} is unknown; use 1, 2 or 3")
    if spec.offload_param and spec.stage != 3:
        raise ConfigError(
            f"deepspeed.offload_param: true needs sharded weights, so deepspeed.stage 3, not {spec.stage}; "
            "use deepspeed=zero3 or deepspeed.offload_param=false"
        )
    _at_least("deepspeed.bucket_size", spec.bucket_size, 1)
    if owned := sorted(set(spec.extra) & set(OWNED_BY_THE_RUN)):
        raise ConfigError(f"deepspeed.extra: {', '.join(owned)} follows from trainer, stage and deepspeed; remove it")
