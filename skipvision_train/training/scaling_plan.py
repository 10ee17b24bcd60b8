"""Memory, communication and time of a stage on any number of GPUs, per ZeRO stage: arithmetic, no weights, no GPU.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", Sec. 3, 5 and 7. With
``P`` parameters and ``n`` processes a step of one forward pass moves, per process, in elements and times (n - 1) / n:

* DistributedDataParallel, ZeRO-1 and ZeRO-2: 2 P. Gradients are reduced (P), new values come back (P).
* ZeRO-3: 3 P. Weights are gathered for the forward and for the backward pass (2 P), gradients are reduced (P).

ZeRO-2 reduces after every accumulated pass, because no process keeps all gradients, and ZeRO-3 moves everything for
every pass; the others once per step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from skipvision_train.config.specs import DeepSpeedSpec
from skipvision_train.training.memory import MemoryEstimate, estimate_memory
from skipvision_train.training.stages import PartReport

ENGINES = ("ddp", "zero1", "zero2", "zero3")
"""DistributedDataParallel without DeepSpeed, and DeepSpeed's stages."""

MOST_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (``stage3_max_live_parameters`` as it is rendered)."""


@dataclass(frozen=True)
class Cluster:
    """What the GPUs are and how they are connected. Bandwidths are those of one direction.

    Attributes:
        memory: bytes of one GPU.
        flops: per second that one GPU reaches while it computes.
        gpus_per_node: GPUs that share the fast connection.
        intra_node: bytes per second and GPU within a node.
        inter_node: bytes per second and node between nodes, all its network adapters together.
        storage: bytes per second that all nodes together write to the shared file system.
    """

    memory: float
    flops: float
    gpus_per_node: int
    intra_node: float
    inter_node: float
    storage: float

    def seconds(self, traffic: float, gpus: int) -> float:
        """How long a ring of ``gpus`` takes when each of them sends ``traffic`` bytes.

        A ring passes everything on through every node, so that the slower of the two connections sets the pace.
        """
        if gpus == 1:
            return 0.0
        slowest = self.intra_node if gpus <= self.gpus_per_node else min(self.intra_node, self.inter_node)
        return traffic / slowest


@dataclass(frozen=True)
class Parameters:
    """Scalars of a model in a stage.

    Attributes:
        total: all.
        trainable: those that train.
        reached: those that the backward pass goes through: of parts that train and of parts behind one that trains.
        packed: bytes of weights in 4 bits, which the others leave out.
    """

    total: int
    trainable: int
    reached: int
    packed: float = 0.0

    @classmethod
    def of(cls, parts: Sequence[PartReport]) -> Parameters:
        """Of parts in the order of the forward pass."""
        first = next(place for place, part in enumerate(parts) if part.trainable)
        return cls(
            total=sum(part.parameters for part in parts),
            trainable=sum(part.trainable for part in parts),
            reached=sum(part.parameters for part in parts[first:]),
        )


@dataclass(frozen=True)
class Batch:
    """How a global batch is divided.

    Attributes:
        micro: rows of one forward pass of one process.
        accumulation: forward passes per step.
        rows: of one step of all processes.
    """

    micro: int
    accumulation: int
    rows: int


def divide_batch(global_batch: int, per_device: int, gpus: int) -> Batch:
    """The largest micro batch up to ``per_device`` with which the global batch divides; else one row per process.

    Where there are more processes than rows, or no micro batch divides, the step grows to the next multiple of the
    processes.
    """
    for micro in range(per_device, 0, -1):
        if global_batch % (micro * gpus) == 0:
            return Batch(micro, global_batch // (micro * gpus), global_batch)
    passes = math.ceil(global_batch / gpus)
    return Batch(1, passes, passes * gpus)


def traffic(parameters: Parameters, engine: str, precision: str, gpus: int, accumulation: int) -> float:
    """Bytes that one process sends in one step, and receives as well.

    Args:
        parameters: of the stage.
        engine: one of :data:`ENGINES`.
        precision: fp32 or bf16; without DeepSpeed gradients are fp32 either way.
        gpus: processes.
        accumulation: forward passes of the step.
    """
    ring = (gpus - 1) / gpus
    value = 2 if precision == "bf16" and engine != "ddp" else 4
    reduced = returned = float(parameters.trainable)
    if engine == "zero2":
        reduced *= accumulation
    elif engine == "zero3":
        reduced *= accumulation
        returned = float(accumulation * (parameters.total + parameters.reached))
    return ring * value * (reduced + returned)


def model_state(
    parameters: Parameters, engine: str, precision: str, gpus: int, settings: DeepSpeedSpec
) -> MemoryEstimate:
    """Weights, gradients and optimizer states of one process, without what ``settings`` keep in the CPU's memory."""
    spec = None if engine == "ddp" else replace(settings, stage=int(engine[-1]))
    state = estimate_memory(parameters.total, parameters.trainable, precision, spec, gpus, parameters.packed)
    if spec is None:
        return state
    return replace(
        state,
        weights=0.0 if spec.offload_param and spec.stage == 3 else state.weights,
        optimizer=0.0 if spec.offload_optimizer else state.optimizer,
    )


def buffers(parameters: Parameters, engine: str, precision: str, settings: DeepSpeedSpec) -> float:
    """Bytes of communication buffers of one process, at most.

    DistributedDataParallel's buckets hold all gradients once more. DeepSpeed has one bucket, two where communication
    overlaps with computation; ZeRO-3 also keeps up to :data:`MOST_LIVE` gathered parameters.
    """
    if engine == "ddp":
        return 4.0 * parameters.trainable
    value = 2 if precision == "bf16" else 4
    buckets = value * settings.bucket_size * (2 if settings.overlap_comm else 1)
    return buckets + (value * min(parameters.total, MOST_LIVE) if engine == "zero3" else 0.0)


def checkpoint_bytes(parameters: Parameters, engine: str, precision: str) -> float:
    """Bytes of one checkpoint of all processes together.

    DeepSpeed stores the optimizer's two moments and fp32 masters (12 per trainable parameter), its own copy of the
    weights, and the model directory beside it; ZeRO-3's shards hold no copy but the masters. Without DeepSpeed: the
    model directory and the two moments.
    """
    if engine == "ddp":
        return parameters.packed + 4.0 * parameters.total + 8.0 * parameters.trainable
    value = 2 if precision == "bf16" else 4
    copies = 1 if engine == "zero3" else 2
    return copies * (parameters.packed + value * parameters.total) + 12 * parameters.trainable


@dataclass(frozen=True)
class Demand:
    """What a stage asks for, whatever it runs on.

    Attributes:
        parameters: of the model.
        precision: fp32 or bf16.
        settings: DeepSpeed's, whose stage is exchanged.
        flops: of one row in training, recomputation included.
        global_batch: rows of a step that is asked for.
        per_device: rows of one forward pass, at most.
        rows: of the whole stage; None where unknown.
        checkpointing: whether activations are recomputed.
    """

    parameters: Parameters
    precision: str
    settings: DeepSpeedSpec
    flops: float
    global_batch: int
    per_device: int
    rows: int | None
    checkpointing: bool


@dataclass(frozen=True)
class PlanRow:
    """One engine on so many GPUs. Bytes are per GPU, those of the checkpoint are of all.

    Attributes:
        gpus: processes.
        engine: one of :data:`ENGINES`.
        batch: how the global batch is divided.
        weights: bytes.
        gradients: bytes.
        optimizer: bytes.
        buffers: bytes, at most.
        activations: bytes without gradient checkpointing, at most.
        activations_checkpointed: bytes with it, at most.
        total: bytes with the checkpointing that the stage has.
        fits: whether ``total`` is within the GPU's memory.
        traffic: bytes sent per step.
        compute_seconds: of a step.
        traffic_seconds: of a step.
        hours: GPU hours of the stage if all communication is hidden, and if none is; None where the rows are unknown.
        checkpoint: bytes.
        checkpoint_seconds: to write it.
    """

    gpus: int
    engine: str
    batch: Batch
    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    activations_checkpointed: float
    total: float
    fits: bool
    traffic: float
    compute_seconds: float
    traffic_seconds: float
    hours: tuple[float, float] | None
    checkpoint: float
    checkpoint_seconds: float

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Of a step, if all communication is hidden behind computation, and if none is."""
        hidden = max(self.compute_seconds, self.traffic_seconds)
        return hidden, self.compute_seconds + self.traffic_seconds


def plan_row(demand: Demand, cluster: Cluster, gpus: int, engine: str, activations: tuple[float, float]) -> PlanRow:
    """Put one row together.

    Args:
        demand: of the stage.
        cluster: what it runs on.
        gpus: processes.
        engine: one of :data:`ENGINES`.
        activations: bytes of one row (of the batch) without and with gradient checkpointing.
    """
    parameters, precision = demand.parameters, demand.precision
    batch = divide_batch(demand.global_batch, demand.per_device, gpus)
    state = model_state(parameters, engine, precision, gpus, demand.settings)
    buffer = buffers(parameters, engine, precision, demand.settings) if gpus > 1 else 0.0
    whole, checkpointed = (batch.micro * size for size in activations)
    total = state.total + buffer + (checkpointed if demand.checkpointing else whole)
    sent = traffic(parameters, engine, precision, gpus, batch.accumulation)
    compute = batch.micro * batch.accumulation * demand.flops / cluster.flops
    moving = cluster.seconds(sent, gpus)
    hours = None
    if demand.rows is not None:
        steps = math.ceil(demand.rows / batch.rows)
        hours = steps * gpus / 3600 * max(compute, moving), steps * gpus / 3600 * (compute + moving)
    stored = checkpoint_bytes(parameters, engine, precision)
    return PlanRow(
        gpus=gpus,
        engine=engine,
        batch=batch,
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        buffers=buffer,
        activations=whole,
        activations_checkpointed=checkpointed,
        total=total,
        fits=total <= cluster.memory,
        traffic=sent,
        compute_seconds=compute,
        traffic_seconds=moving,
        hours=hours,
        checkpoint=stored,
        checkpoint_seconds=stored / cluster.storage,
    )
