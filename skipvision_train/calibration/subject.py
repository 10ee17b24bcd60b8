"""What is calibrated: our own model or a vision-language model of transformers, and a hash that tells models apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from skipvision_train.errors import CheckpointError, ConfigError, SkipVisionError
from skipvision_train.evaluation.loading import PRECISIONS, choose_device, load_for_inference
from skipvision_train.models.configuration import SkipVisionConfig


def load_subject(
    path: str, device: str | None = None, precision: str | None = None
) -> tuple[PreTrainedModel, ProcessorMixin, bool]:
    """Open a model directory for calibration, from local files and without code of the checkpoint's.

    Args:
        path: one of our model directories, or one of transformers' for images and text.
        device: as torch names it; None takes the GPU if there is one.
        precision: ``fp32``, ``bf16`` or ``fp16``; None keeps what the checkpoint was saved in.

    Returns:
        The model in evaluation mode (ours under the plan it was trained with), its processor, and whether it is ours.

    Raises:
        CheckpointError: no model directory, incomplete, or no model of images and text.
        ConfigError: an unknown precision, or a device that this machine does not have.
    """
    is_ours = _model_type(path) == SkipVisionConfig.model_type
    try:
        if is_ours:
            return *load_for_inference(path, None, device, precision), True
        return *_load_other(path, device, precision), False
    except SkipVisionError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()  # of transformers' advice only the first line says what is wrong
        raise CheckpointError(
            f"checkpoint: {path} cannot be loaded: {reason[0] if reason else type(error).__name__}"
        ) from error


def _model_type(path: str) -> str:
    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"checkpoint: {path} is no model directory: it has no config.json")
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {file} is no model configuration: {error!r}") from error


def _load_other(path: str, device: str | None, precision: str | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision: {precision!r} is unknown; use one of {', '.join(PRECISIONS)}, or null")
    where = choose_device(device)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        path,
        dtype="auto" if precision is None else PRECISIONS[precision],
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"checkpoint: {path} lacks {', '.join(missing[:5])}{more}")
    processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return model.to(where).eval(), processor
