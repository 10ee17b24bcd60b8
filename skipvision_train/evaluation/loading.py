"""Open a finished model for inference: evaluation, calibration and generation do it alike."""

from __future__ import annotations

from pathlib import Path

import torch

from skipvision_train.config.plans import PlanSpec, build_plan, load_bank
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.identity import model_hash
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_for_inference(
    checkpoint: str, plan: PlanSpec | None = None, device: str | None = None, precision: str | None = None
) -> tuple[SkipVisionForConditionalGeneration, SkipVisionProcessor]:
    """The model in evaluation mode under the wanted plan, and its processor.

    Args:
        checkpoint: a model directory.
        plan: what the configuration says; None is the plan that the model was trained with.
        device: as torch names it; None takes the GPU if there is one.
        precision: ``fp32``, ``bf16`` or ``fp16``; None keeps what the checkpoint was saved in.

    Raises:
        CheckpointError: the directory is no complete model.
        ConfigError: an unknown precision, or a device this machine does not have.
        ConfigError: a plan that does not fit the model, or a plan file that is none.
        PlanError: a plan bank of another model.
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
    if plan is not None and plan.method == "bank":
        load_bank(plan, model_hash(model))
    own = model.config.plan_or_dense()
    model.set_plan(build_plan(plan or PlanSpec("own"), own.num_layers, own=own))
    return model.to(choose_device(device)).eval(), SkipVisionProcessor.from_pretrained(checkpoint)


def choose_device(name: str | None) -> torch.device:
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
