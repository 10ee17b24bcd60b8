"""Open a finished model for inference: evaluation, calibration and generation do it alike."""

from __future__ import annotations

from pathlib import Path

import torch

from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.methods import dense
from skipvision_train.plans.plan import SkipPlan

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_for_inference(
    checkpoint: str, plan: str | None = None, device: str | None = None, precision: str | None = None
) -> tuple[SkipVisionForConditionalGeneration, SkipVisionProcessor]:
    """The model in evaluation mode under the wanted plan, and its processor.

    Args:
        checkpoint: a model directory.
        plan: a plan file, ``dense``, or None for the plan the model was trained with.
        device: as torch names it; None takes the GPU if there is one.
        precision: ``fp32``, ``bf16`` or ``fp16``; None keeps what the checkpoint was saved in.

    Raises:
        CheckpointError: the directory is no complete model.
        ConfigError: an unknown precision, or a device this machine does not have.
        PlanError: a plan file that is missing, malformed or written for another depth.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision: {precision!r} is unknown; use one of {', '.join(PRECISIONS)}, or null")
    if not (Path(checkpoint) / "config.json").is_file():
        raise CheckpointError(f"checkpoint: {checkpoint} is no model directory: it has no config.json")
    dtype = "auto" if precision is None else PRECISIONS[precision]
    try:
        model = SkipVisionForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint: {checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from error
    model.set_plan(resolve_plan(plan, model))
    return model.to(_device(device)).eval(), SkipVisionProcessor.from_pretrained(checkpoint)


def resolve_plan(plan: str | None, model: SkipVisionForConditionalGeneration) -> SkipPlan:
    """The plan that a configuration names: None the model's own, ``dense``, or a file.

    Raises:
        PlanError: the file is missing, malformed, or of another depth.
    """
    depth = model.config.text_config.num_hidden_layers
    if plan is None:
        return model.config.plan_or_dense()
    if plan == "dense":
        return dense().bind(depth)
    return SkipPlan.load(plan).bind(depth)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is no device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name}, but torch finds no GPU on this machine; use cpu or null")
    return device


def package_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import transformers

    from skipvision_train import __version__

    return {"skipvision-train": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
