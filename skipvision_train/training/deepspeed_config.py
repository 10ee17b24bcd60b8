"""Render the chosen DeepSpeed settings to the dictionary that DeepSpeed reads as JSON."""

from __future__ import annotations

from typing import Any

from skipvision_train.config.specs import DeepSpeedSpec, TrainerSpec


def render(spec: DeepSpeedSpec, trainer: TrainerSpec, accumulation: int, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration.

    The optimizer is torch's AdamW from the trainer, with a group per part: DeepSpeed calls that untested, and would
    otherwise insist on its own compiled CPU Adam where states live on the CPU.
    """
    zero: dict[str, Any] = {
        "stage": spec.stage,
        "overlap_comm": spec.overlap_comm,
        "contiguous_gradients": True,
        "reduce_bucket_size": spec.bucket_size,
        "allgather_bucket_size": spec.bucket_size,
    }
    if spec.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if spec.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": spec.bucket_size // 4,
            "stage3_param_persistence_threshold": spec.persistence_threshold,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        if spec.offload_param:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": trainer.per_device_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": trainer.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        **spec.extra,
    }
