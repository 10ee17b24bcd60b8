"""Open a finished model for inference: evaluation, calibration and generation do it alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from skipvision_train.config.plans import PlanSpec, build_plan, load_bank
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.errors import CheckpointError, ConfigError, SkipVisionError, first_line
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.identity import model_hash
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.weights import check_pointers

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
        CheckpointError: the directory is no complete model, or not one of ours.
        ConfigError: an unknown precision, or a device this machine does not have.
        ConfigError: a plan that does not fit the model, or a plan file that is none.
        PlanError: a plan bank of another model.
    """
    dtype, where = _dtype(precision), choose_device(device)
    if (kind := _model_type(checkpoint)) != SkipVisionConfig.model_type:
        raise CheckpointError(
            f"checkpoint: {checkpoint} holds a model of transformers ({kind}); only models of this project are "
            "evaluated; skipvision bench scores others"
        )
    with readable(checkpoint), _bars_on_terminals():
        model = SkipVisionForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
    processor = load_processor(checkpoint)
    if plan is not None and plan.method == "bank":
        load_bank(plan, model_hash(model))
    own = model.config.plan_or_dense()
    model.set_plan(build_plan(plan or PlanSpec("own"), own.num_layers, own=own))
    with readable(checkpoint):  # a GPU too small for it, too
        return model.to(where).eval(), processor


def load_processor(checkpoint: str) -> SkipVisionProcessor:
    """The processor of one of our model directories.

    Raises:
        CheckpointError: the directory has none, or that of another model.
    """
    check_model_directory(checkpoint, "processor_config.json")
    with readable(checkpoint):
        try:
            return SkipVisionProcessor.from_pretrained(checkpoint)
        except TypeError as error:
            reason = f"has no processor of a Skip-Vision model: {error}"
            raise CheckpointError(f"checkpoint: {checkpoint} {reason}") from error


@contextmanager
def readable(checkpoint: str) -> Iterator[None]:
    """Reading a model directory: what transformers, safetensors and tokenizers raise becomes one line.

    Raises:
        CheckpointError: the directory cannot be read; names the file if it is a git-lfs pointer.
    """
    try:
        yield
    except SkipVisionError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        check_pointers(Path(checkpoint))
        raise CheckpointError(f"checkpoint: {checkpoint} cannot be loaded: {first_line(error)}") from error


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """transformers' bar of the weights that it has loaded is nothing for log files."""
    hides = not sys.stderr.isatty() and is_progress_bar_enabled()
    if hides:
        disable_progress_bar()
    try:
        yield
    finally:
        if hides:
            enable_progress_bar()


def check_model_directory(path: str, file: str = "config.json") -> None:
    """A run's folder is given more often than the ``model`` in it.

    Raises:
        CheckpointError: ``file`` is not in the folder ``path``; names ``path``/model if it is there.
    """
    folder = Path(path)
    if (folder / file).is_file():
        return
    hint = f"; {folder / 'model'} has one" if (folder / "model" / file).is_file() else ""
    raise CheckpointError(f"checkpoint: {path} is no model directory: it has no {file}{hint}")


def _dtype(precision: str | None) -> torch.dtype | str:
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision: {precision!r} is unknown; use one of {', '.join(PRECISIONS)}, or null")
    return "auto" if precision is None else PRECISIONS[precision]


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


def load_model(
    path: str, device: str | None = None, precision: str | None = None
) -> tuple[PreTrainedModel, ProcessorMixin, bool]:
    """Open a model directory from local files and without code of the checkpoint's.

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
    kind = _model_type(path)
    is_ours = kind == SkipVisionConfig.model_type
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise CheckpointError(
            f"checkpoint: {path} holds a model of text ({kind}), which sees no images; give one of ours, or a "
            "vision-language model of transformers"
        )
    if is_ours:
        return *load_for_inference(path, None, device, precision), True
    with readable(path), _bars_on_terminals():
        return *_load_other(path, device, precision), False


def _model_type(path: str) -> str:
    check_model_directory(path)
    file = Path(path) / "config.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {file} is no model configuration: {error!r}") from error


def _load_other(path: str, device: str | None, precision: str | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    where = choose_device(device)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=_dtype(precision),
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
