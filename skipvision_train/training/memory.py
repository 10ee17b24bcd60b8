"""What weights, gradients, optimizer states and activations take per process, and whether a device holds it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from skipvision_train.config.specs import DeepSpeedSpec, TrainConfig
from skipvision_train.errors import TrainingError
from skipvision_train.models.configuration import SkipVisionConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per process.

    Attributes:
        weights: of all parameters, frozen ones too.
        gradients: of trainable parameters.
        optimizer: AdamW's two moments, and the fp32 master weights under DeepSpeed's bf16.
    """

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def engine_casts(precision: str, deepspeed: DeepSpeedSpec | None) -> bool:
    """Whether an engine holds weights in bf16 and fp32 masters beside them.

    DeepSpeed (0.19.8) casts every parameter to bf16 before anything else (``engine._configure_distributed_model``), and
    makes its masters of those (``stage_1_and_2.py``, ``stage3.py``). Without DeepSpeed bf16 is autocast over fp32.
    """
    return precision == "bf16" and deepspeed is not None


def weights_dtype(cfg: TrainConfig) -> torch.dtype:
    """The type to load a stage's weights in: that which the engine gives them, so that nothing is lost by it.

    Maps that are to hold 4 bits are quantised before there is an engine, from weights as exact as the files have them.
    """
    packs = cfg.stage.lora is not None and cfg.stage.lora.quantize is not None
    return torch.bfloat16 if engine_casts(cfg.trainer.precision, cfg.deepspeed) and not packs else torch.float32


def estimate_memory(
    parameters: int,
    trainable: int,
    precision: str,
    deepspeed: DeepSpeedSpec | None,
    processes: int,
    packed: float = 0.0,
) -> MemoryEstimate:
    """Model state per process (Rajbhandari et al. 2020, "ZeRO", Sec. 3: 2 + 2 + 12 bytes per parameter under bf16).

    Without DeepSpeed weights stay fp32 and bf16 is autocast: 4 + 4 + 8 bytes. Stage 1 shards the optimizer states,
    2 the gradients as well, 3 the weights as well. What is offloaded to the CPU is still counted.

    Args:
        parameters: scalars of the model.
        trainable: those that train.
        precision: fp32 or bf16.
        deepspeed: None without DeepSpeed.
        processes: number of training processes.
        packed: bytes of weights in 4 bits, which ``parameters`` leave out; every process holds them all.
    """
    half = engine_casts(precision, deepspeed)
    stage = 0 if deepspeed is None else deepspeed.stage
    value = 2 if half else 4
    return MemoryEstimate(
        weights=packed + parameters * value / (processes if stage >= 3 else 1),
        gradients=trainable * value / (processes if stage >= 2 else 1),
        optimizer=trainable * (12 if half else 8) / (processes if stage >= 1 else 1),
    )


@dataclass(frozen=True)
class Rows:
    """The longest that one forward pass of one process can get.

    Attributes:
        count: rows.
        length: tokens of a row.
        tiles: images' tiles of all rows.
        supervised: tokens with a label.
    """

    count: int
    length: int
    tiles: int
    supervised: int


def estimate_activations(
    config: SkipVisionConfig,
    rows: Rows,
    precision: str,
    checkpointing: bool,
    vision_trains: bool,
    ffn_share: float = 1.0,
) -> float:
    """Bytes that the backward pass reads again, at most: decoder, LM head, the tower if it trains.

    Per token and decoder layer: inputs of the two norms (also in fp32) and of the projections, queries, keys, values
    and the attention's output, four times the feed-forward width; a flash or memory-efficient attention, which keeps
    no weights. Connector, merging, buffers of the communication and the allocator's gaps are not counted.

    Args:
        config: of the model.
        rows: of one forward pass.
        precision: fp32 or bf16.
        checkpointing: decoder layers and the tower's blocks keep their input alone, and one at a time is recomputed.
        vision_trains: the tower keeps its activations.
        ffn_share: of the tokens in all layers, those that run the feed-forward network; read without checkpointing,
            where one recomputed layer may be one that skips nothing.
    """
    text, vision, value = config.text_config, config.vision_config, 2 if precision == "bf16" else 4
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = head * text.num_attention_heads, head * text.num_key_value_heads
    share = 1.0 if checkpointing else ffn_share
    inner = 4 * text.intermediate_size * share
    layer = value * (4 * text.hidden_size + 3 * queries + 3 * keys + inner) + 8 * text.hidden_size
    tokens = rows.count * rows.length
    kept = (
        text.num_hidden_layers * value * text.hidden_size + layer if checkpointing else text.num_hidden_layers * layer
    )
    logits = rows.supervised * text.vocab_size * (value + 8)  # as the head gives them, in fp32, and their gradient
    tower = 0.0
    if vision_trains:
        patches = vision.grid**2 + 1
        per_token = vision.width * (8 * value + 16) + 2 * value * vision.width * vision.mlp_ratio
        depth = max(vision.depths)
        kept_per_token = depth * value * vision.width + per_token if checkpointing else depth * per_token
        tower = rows.tiles * patches * kept_per_token
    return tokens * kept + logits + tower


def remedies(cfg: TrainConfig, processes: int) -> str:
    """Settings that would take less memory and are not in use yet."""
    trainer, engine, lora = cfg.trainer, cfg.deepspeed, cfg.stage.lora
    packed = lora is not None and lora.quantize is not None
    ways = []
    if not trainer.gradient_checkpointing:
        ways.append("trainer.gradient_checkpointing=true")
    if trainer.per_device_batch > 1:
        ways.append(f"trainer.per_device_batch={trainer.per_device_batch // 2} (the global batch stays)")
    if trainer.precision != "bf16":
        ways.append("trainer.precision=bf16")
    if lora is not None and not packed and (engine is None or engine.stage < 3):
        ways.append("stage.lora.quantize=nf4")
    if processes > 1 and packed and (engine is None or engine.stage < 2):
        ways.append("deepspeed=zero2")
    elif processes > 1 and not packed and (engine is None or engine.stage < 3):
        ways.append("deepspeed=zero3" if engine is not None and engine.stage == 2 else "deepspeed=zero2 or zero3")
    if engine is not None and not engine.offload_optimizer:
        ways.append("deepspeed.offload_optimizer=true")
    if engine is not None and engine.stage == 3 and not engine.offload_param:
        ways.append("deepspeed.offload_param=true")
    ways.append(f"data.{'pack' if cfg.data.pack_length else 'max'}_length below {row_length(cfg)}")
    return f"try {', '.join(ways)}, or more processes"


def row_length(cfg: TrainConfig) -> int:
    """Tokens of the longest row."""
    return (cfg.data.pack_length or cfg.data.max_length) if cfg.data.pack else cfg.data.max_length


def check_memory(
    cfg: TrainConfig,
    config: SkipVisionConfig,
    parameters: int,
    trainable: int,
    processes: int,
    device: float,
    packed: float = 0.0,
) -> None:
    """Compare what a step needs with the memory of a device, and say by how much it is too small.

    Model state is exact enough to refuse to start; activations are those of the longest rows and give a warning.

    Args:
        cfg: the configuration.
        config: the model's.
        parameters: scalars of the model.
        trainable: those that train.
        processes: training processes.
        device: bytes of one device.
        packed: bytes of weights in 4 bits, which ``parameters`` leave out.

    Raises:
        TrainingError: the model state does not fit, with ``trainer.guards.memory=error``.
    """
    engine, trainer = cfg.deepspeed, cfg.trainer
    state = estimate_memory(parameters, trainable, trainer.precision, engine, processes, packed)
    held = state.gradients
    held += 0.0 if engine is not None and engine.offload_param else state.weights
    held += 0.0 if engine is not None and engine.offload_optimizer else state.optimizer
    visual, length = len(config.image_token_kinds()), row_length(cfg)
    count, tiles = trainer.per_device_batch, config.tiling_config.counts[-1]
    rows = Rows(count, length, count * tiles * max(1, length // visual), count * max(1, length - visual))
    activations = estimate_activations(
        config, rows, trainer.precision, trainer.gradient_checkpointing, cfg.stage.lr.vision is not None
    )
    log.info(
        "memory per process: model state %.1f GB, activations of the longest rows at most %.1f GB, device %.1f GB",
        held / 1e9, activations / 1e9, device / 1e9,
    )  # fmt: skip
    if held > device:
        message = (
            f"trainer.guards.memory: weights, gradients and optimizer take {held / 1e9:.1f} GB per process, the device "
            f"has {device / 1e9:.1f} GB: {(held - device) / 1e9:.1f} GB too little; {remedies(cfg, processes)}"
        )
        if trainer.guards.memory == "error":
            raise TrainingError(message)
        log.warning("%s", message)
    elif held + activations > device:
        log.warning(
            "the longest rows may take %.1f GB more than the device has; %s",
            (held + activations - device) / 1e9, remedies(cfg, processes),
        )  # fmt: skip
