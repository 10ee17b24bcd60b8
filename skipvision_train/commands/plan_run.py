"""``skipvision plan-run``: what a stage takes on any number of GPUs, per ZeRO stage. Needs no weights, data or GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skipvision_train.config.specs import TrainConfig
from skipvision_train.errors import ConfigError

if TYPE_CHECKING:
    from skipvision_train.models.configuration import SkipVisionConfig
    from skipvision_train.plans.plan import SkipPlan
    from skipvision_train.plans.rules import TokenKind
    from skipvision_train.training.plan_schedule import PlanSchedule
    from skipvision_train.training.scaling_plan import Cluster, Demand, Parameters, PlanRow

FORMATS = ("table", "json")


@dataclass
class Config(TrainConfig):
    """Settings of ``skipvision plan-run``: those of ``skipvision train``, and what the stage would run on."""

    gpus: list[int] = field(default_factory=lambda: [8, 16, 64, 512])
    """Numbers of GPUs, one process each."""
    engines: list[str] = field(default_factory=lambda: ["ddp", "zero1", "zero2", "zero3"])
    """ddp is training without DeepSpeed. Offloading and bucket sizes are those of ``deepspeed``."""
    gpus_per_node: int = 8
    """GPUs with a fast connection between them."""
    memory_gb: float = 80.0
    """Memory of one GPU in 10^9 bytes."""
    peak_tflops: float = 312.0
    """Of one GPU, in 10^12 FLOPs per second; the default is an A100's in bf16 without sparsity."""
    mfu: float = 0.4
    """Share of the peak that a GPU reaches while it computes, recomputation counted."""
    intra_node: float = 300.0
    """GB per second and GPU within a node, one direction; the default is the data sheet of an A100's NVLink."""
    inter_node: float = 200.0
    """GB per second and node between nodes, one direction; the default is eight adapters of 200 Gbit/s."""
    storage: float = 10.0
    """GB per second that the shared file system writes for all nodes together."""
    samples: int | None = None
    """Records of an epoch; null leaves the hours of the stage open, unless ``trainer.max_steps`` is given."""
    text_tokens: int = 128
    """Text tokens beside the image of a mean sample; read for FLOPs."""
    supervised_tokens: int = 64
    """Of them, those with a label; read for FLOPs and for the memory of logits."""
    row_tokens: int | None = None
    """Tokens of a row; read for the memory of activations. null is the longest row that ``data`` allows."""
    format: str = "table"
    """table, or json: one object on stdout and nothing else."""


def run(cfg: Config) -> None:
    """Check, count, print."""
    check(cfg)
    from skipvision_train.config.resolve import load_tokenizer, model_config
    from skipvision_train.config.validate import validate
    from skipvision_train.training.plan_schedule import PlanSchedule
    from skipvision_train.training.scaling_plan import plan_row

    validate(cfg, 1)
    config = model_config(cfg, load_tokenizer(cfg))
    parameters = count_parameters(cfg, config)
    schedule = PlanSchedule.of(cfg, config.text_config.num_hidden_layers)
    sample = sample_facts(cfg, config, schedule)
    activations = row_activations(cfg, config, schedule.plans[0])
    demand, hardware = stage_demand(cfg, parameters, sample), cluster(cfg)
    rows = [plan_row(demand, hardware, n, engine, activations) for n in cfg.gpus for engine in cfg.engines]
    facts = stage_facts(cfg, config, parameters, sample)
    if cfg.format == "json":
        listed = [dataclasses.asdict(row) | {"step_seconds": row.step_seconds} for row in rows]
        sys.stdout.write(json.dumps({"stage": facts, "rows": listed}) + "\n")
    else:
        sys.stdout.write(as_table(cfg, facts, rows) + "\n")


def count_parameters(cfg: Config, config: SkipVisionConfig) -> Parameters:
    """Of the stage's model, adapters and weights in 4 bits among them."""
    from skipvision_train.models.build import meta_model
    from skipvision_train.training.lora import add_adapters, held
    from skipvision_train.training.scaling_plan import Parameters
    from skipvision_train.training.stages import apply_rates

    model = meta_model(config)
    found = Parameters.of(apply_rates(model, cfg.stage.lr))
    if cfg.stage.lora is None:
        return found
    add_adapters(model, cfg.stage.lora)
    own = held(model, cfg.stage.lora)
    return dataclasses.replace(found, total=own.parameters, trainable=own.trainable, packed=own.packed)


def check(cfg: Config) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: naming the field.
    """
    from skipvision_train.training.scaling_plan import ENGINES

    if cfg.format not in FORMATS:
        raise ConfigError(f"format: {cfg.format!r} is unknown; use {', '.join(FORMATS)}")
    for engine in cfg.engines:
        if engine not in ENGINES:
            raise ConfigError(f"engines: {engine!r} is unknown; use some of {', '.join(ENGINES)}")
    if "zero3" in cfg.engines and cfg.stage.lora is not None and cfg.stage.lora.quantize is not None:
        raise ConfigError("engines: zero3 cannot shard weights of 4 bits (stage.lora.quantize); leave it out")
    for name in ("gpus", "engines"):
        if not getattr(cfg, name):
            raise ConfigError(f"{name}: [] leaves nothing to plan; give at least one")
    for count in cfg.gpus:
        if count < 1:
            raise ConfigError(f"gpus: {count} is out of range; use 1 or more")
    for name in ("gpus_per_node", "samples", "row_tokens"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is out of range; use 1 or more")
    for name in ("memory_gb", "peak_tflops", "intra_node", "inter_node", "storage", "mfu"):
        value = getattr(cfg, name)
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}: {value} is out of range; use a number above 0")
    if cfg.mfu > 1:
        raise ConfigError(f"mfu: {cfg.mfu} is out of range; use a share of the peak, at most 1")
    if not 0 <= cfg.supervised_tokens <= cfg.text_tokens:
        raise ConfigError(
            f"supervised_tokens: {cfg.supervised_tokens} of text_tokens {cfg.text_tokens}; use 0 to {cfg.text_tokens}"
        )


@dataclass(frozen=True)
class Sample:
    """A mean sample: one image and some text.

    Attributes:
        tokens: in the decoder.
        flops: of training on it, without recomputation.
        recomputed: FLOPs of recomputing activations, if they are.
        decoder_share: FLOPs of the decoder, of those without skipping.
        ffn_skipped: share of the tokens in all layers that run no feed-forward network.
        per_row: samples of one row.
    """

    tokens: int
    flops: float
    recomputed: float
    decoder_share: float
    ffn_skipped: float
    per_row: int


def sample_kinds(cfg: Config, config: SkipVisionConfig) -> tuple[int, ...]:
    """How many tokens of every kind a mean sample has, an image of the most tiles among them."""
    from skipvision_train.plans.rules import TokenKind

    kinds = config.image_token_kinds()
    return tuple(kinds.count(kind) + (cfg.text_tokens if kind is TokenKind.TEXT else 0) for kind in sorted(TokenKind))


def _counts(kinds: tuple[int, ...]) -> Mapping[TokenKind, int]:
    from skipvision_train.plans.rules import TokenKind

    return {TokenKind(kind): count for kind, count in enumerate(kinds) if count}


def sample_facts(cfg: Config, config: SkipVisionConfig, schedule: PlanSchedule) -> Sample:
    """What a mean sample costs; where the plan changes during the stage, the mean over its steps."""
    from skipvision_train.analysis.flops import sequence_flops
    from skipvision_train.analysis.image_flops import image_flops
    from skipvision_train.training.memory import row_length
    from skipvision_train.training.work import WorkCounter

    kinds, rates = sample_kinds(cfg, config), dataclasses.asdict(cfg.stage.lr)
    trains = [part for part, rate in rates.items() if rate is not None]
    counter = WorkCounter(config, trains, cfg.stage.lora is not None)
    tiles = config.tiling_config.counts[-1]
    around = counter.around([tiles], cfg.supervised_tokens)

    def mean(cost: Any) -> float:
        # A thousand steps stand for the stage's: only shares of them count.
        return float(cost(schedule.plans[-1]) if schedule.widen is None else schedule.mean(cost, 1000))

    done = mean(lambda plan: counter.sample(kinds, plan).flops)
    work = counter.sample(kinds, schedule.plans[-1])
    recomputed = 0.0
    if cfg.trainer.gradient_checkpointing:
        recomputed = mean(lambda plan: sequence_flops(config.text_config, _counts(kinds), plan).total)
        recomputed += image_flops(config, tiles).vision if cfg.stage.lr.vision is not None else 0.0
    return Sample(
        tokens=sum(kinds),
        flops=done + around,
        recomputed=recomputed,
        decoder_share=done / work.dense_flops,
        ffn_skipped=mean(lambda plan: counter.sample(kinds, plan).ffn_skipped) / work.token_layers,
        per_row=max(1, row_length(cfg) // sum(kinds)) if cfg.data.pack else 1,
    )


def row_activations(cfg: Config, config: SkipVisionConfig, plan: SkipPlan) -> tuple[float, float]:
    """Bytes of activations of one row of the batch, without and with gradient checkpointing, at most.

    The row holds one image and is text otherwise; a packed row holds as many images as have room.

    Args:
        cfg: checked.
        config: of the model.
        plan: of the stage's, the one that skips least.
    """
    from skipvision_train.analysis.flops import count_tokens, live_counts
    from skipvision_train.plans.rules import TokenKind
    from skipvision_train.training.memory import Rows, estimate_activations, row_length

    length = cfg.row_tokens or row_length(cfg)
    visual = config.image_token_kinds()
    if length < len(visual):
        raise ConfigError(f"row_tokens: {length} has no room for the {len(visual)} visual tokens of one image")
    images = max(1, length // (len(visual) + cfg.text_tokens)) if cfg.data.pack else 1
    counts: dict[TokenKind, float] = {kind: float(images * visual.count(kind)) for kind in set(visual)}
    counts[TokenKind.TEXT] = counts.get(TokenKind.TEXT, 0) + length - images * len(visual)
    layers = zip(live_counts(counts, plan), plan.rules, strict=True)
    share = sum(count_tokens(live, rule.no_ffn) for live, rule in layers) / (plan.num_layers * length)
    rows = Rows(1, length, images * config.tiling_config.counts[-1], images * cfg.supervised_tokens)
    vision = cfg.stage.lr.vision is not None
    whole, checkpointed = (
        estimate_activations(config, rows, cfg.trainer.precision, recompute, vision, share)
        for recompute in (False, True)
    )
    return whole, checkpointed


def stage_demand(cfg: Config, parameters: Parameters, sample: Sample) -> Demand:
    """The stage as the plan sees it."""
    from skipvision_train.config.specs import DeepSpeedSpec
    from skipvision_train.training.scaling_plan import Demand

    trainer = cfg.trainer
    rows = None if cfg.samples is None or trainer.epochs is None else trainer.epochs * cfg.samples / sample.per_row
    if trainer.max_steps is not None:
        rows = trainer.max_steps * trainer.global_batch
    return Demand(
        parameters=parameters,
        precision=trainer.precision,
        settings=cfg.deepspeed or DeepSpeedSpec(),
        flops=sample.per_row * (sample.flops + sample.recomputed),
        global_batch=trainer.global_batch,
        per_device=trainer.per_device_batch,
        rows=None if rows is None else math.ceil(rows),
        checkpointing=trainer.gradient_checkpointing,
    )


def cluster(cfg: Config) -> Cluster:
    """The hardware in bytes, seconds and FLOPs."""
    from skipvision_train.training.scaling_plan import Cluster

    return Cluster(
        memory=cfg.memory_gb * 1e9,
        flops=cfg.peak_tflops * 1e12 * cfg.mfu,
        gpus_per_node=cfg.gpus_per_node,
        intra_node=cfg.intra_node * 1e9,
        inter_node=cfg.inter_node * 1e9,
        storage=cfg.storage * 1e9,
    )


def stage_facts(cfg: Config, config: SkipVisionConfig, parameters: Parameters, sample: Sample) -> dict[str, Any]:
    """What does not depend on the number of GPUs."""
    from skipvision_train.training.memory import row_length

    return {
        "stage": cfg.stage.name,
        "parameters": parameters.total,
        "trainable": parameters.trainable,
        "packed_bytes": parameters.packed,
        "precision": cfg.trainer.precision,
        "plan": config.plan_or_dense().name,
        "gradient_checkpointing": cfg.trainer.gradient_checkpointing,
        "row_tokens": cfg.row_tokens or row_length(cfg),
        "samples_per_row": sample.per_row,
        "sample_tokens": sample.tokens,
        "sample_flops": sample.flops,
        "recomputed_flops": sample.recomputed,
        "decoder_share": sample.decoder_share,
        "ffn_skipped": sample.ffn_skipped,
    }


def as_table(cfg: Config, facts: Mapping[str, Any], rows: list[PlanRow]) -> str:
    """The result for people: what holds for all rows, then one line per engine and number of GPUs."""
    kept = "with" if facts["gradient_checkpointing"] else "without"
    packed = f", {facts['packed_bytes'] / 1e9:.2f} GB of weights in 4 bits" if facts["packed_bytes"] else ""
    lines = [
        f"{facts['stage']}: {facts['parameters'] / 1e9:.3f} billion parameters{packed}, "
        f"{facts['trainable'] / 1e9:.3f} train, {facts['precision']}, plan {facts['plan']}",
        f"a sample: {facts['sample_tokens']} tokens, {facts['sample_flops'] / 1e12:.1f} TFLOPs in training and "
        f"{facts['recomputed_flops'] / 1e12:.1f} recomputed; by skipping the decoder takes "
        f"{100 * facts['decoder_share']:.1f} % of its FLOPs, "
        f"{100 * facts['ffn_skipped']:.1f} % of its tokens run no FFN",
        f"memory in GB per GPU of {cfg.memory_gb:g}; activations of rows of {facts['row_tokens']} tokens, total {kept} "
        "gradient checkpointing",
        f"time at {cfg.mfu:g} of {cfg.peak_tflops:g} TFLOPs per second, {cfg.intra_node:g} GB/s per GPU within nodes "
        f"of {cfg.gpus_per_node}, {cfg.inter_node:g} GB/s per node between them; from all communication hidden to none",
        "",
    ]
    head: tuple[str, ...] = (
        "GPUs",
        "engine",
        "batch",
        "weights",
        "grads",
        "optim",
        "buffers",
        "acts",
        "recomp",
        "total",
        "fits",
    )
    head += ("sent GB", "sent s", "step s", "GPU hours", "ckpt GB", "ckpt s")
    table = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    lines += ["", "batch: rows of a process x accumulated passes = rows of a step", *_notes(cfg, rows)]
    return "\n".join(lines)


def _cells(row: PlanRow) -> tuple[str, ...]:
    memory = (row.weights, row.gradients, row.optimizer, row.buffers, row.activations, row.activations_checkpointed)
    low, high = row.step_seconds
    return (
        str(row.gpus),
        row.engine,
        f"{row.batch.micro}x{row.batch.accumulation}={row.batch.rows}",
        *(f"{size / 1e9:.1f}" for size in memory),
        f"{row.total / 1e9:.1f}",
        "yes" if row.fits else "no",
        f"{row.traffic / 1e9:.1f}",
        f"{row.traffic_seconds:.2f}",
        f"{low:.2f}-{high:.2f}",
        "?" if row.hours is None else f"{row.hours[0]:.0f}-{row.hours[1]:.0f}",
        f"{row.checkpoint / 1e9:.0f}",
        f"{row.checkpoint_seconds:.0f}",
    )


def _notes(cfg: Config, rows: list[PlanRow]) -> list[str]:
    """What a reader of the table would ask."""
    notes = []
    grown = sorted({row.gpus for row in rows if row.batch.rows != cfg.trainer.global_batch})
    if grown:
        notes.append(
            f"trainer.global_batch={cfg.trainer.global_batch} cannot be divided by {', '.join(map(str, grown))} GPUs: "
            "counted with the next multiple"
        )
    if any(row.hours is None for row in rows):
        notes.append("samples=... (records of an epoch) gives the GPU hours of the stage")
    return notes
