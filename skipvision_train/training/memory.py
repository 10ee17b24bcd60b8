"""What weights, gradients and optimizer states take per process, before activations."""

from __future__ import annotations

from dataclasses import dataclass

from skipvision_train.config.specs import DeepSpeedSpec


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


def estimate_memory(
    parameters: int, trainable: int, precision: str, deepspeed: DeepSpeedSpec | None, processes: int
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
    """
    half = precision == "bf16" and deepspeed is not None
    stage = 0 if deepspeed is None else deepspeed.stage
    value = 2 if half else 4
    return MemoryEstimate(
        weights=parameters * value / (processes if stage >= 3 else 1),
        gradients=trainable * value / (processes if stage >= 2 else 1),
        optimizer=trainable * (12 if half else 8) / (processes if stage >= 1 else 1),
    )
