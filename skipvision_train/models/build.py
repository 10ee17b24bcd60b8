"""Build a model from parts, or start a stage from the previous stage's checkpoint. Strict, with a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.loading import LoadReport
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.scaling import scale_resampler
from skipvision_train.models.vision import load_vision_weights, resize_position_embedding
from skipvision_train.models.vision_formats import read_vision_checkpoint

POSITION_EMBEDDING = "positional_embedding"


def meta_model(config: SkipVisionConfig) -> SkipVisionForConditionalGeneration:
    """The model on the meta device: shapes and counts without memory."""
    with torch.device("meta"):
        return SkipVisionForConditionalGeneration(config)


def build_model(
    config: SkipVisionConfig,
    llm: Path | None = None,
    vision: Path | None = None,
    vision_architecture: str | None = None,
) -> tuple[SkipVisionForConditionalGeneration, LoadReport]:
    """Build a model from a LLaMA-architecture directory and a CLIP checkpoint; connector and reducer start random.

    Args:
        config: its ``text_config`` must be the directory's own.
        llm: transformers directory of a causal LM; None for random weights.
        vision: CLIP checkpoint in any form :func:`read_vision_checkpoint` reads; None for random weights.
        vision_architecture: open_clip name, needed if ``vision`` is a bare weights file.

    Raises:
        CheckpointError: a part is missing, incomplete or of other shapes.
    """
    language_model = None if llm is None else _load_language_model(config, llm)
    model = SkipVisionForConditionalGeneration(config, language_model)
    report = LoadReport(missing=(), unused=())
    if vision is not None:
        report = load_vision_weights(model.vision_tower, read_vision_checkpoint(vision, vision_architecture))
    return model, report


def _load_language_model(config: SkipVisionConfig, path: Path) -> PreTrainedModel:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; model.llm must be a transformers model directory")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config.text_config, output_loading_info=True, local_files_only=True, dtype=torch.float32
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot load the language model: {error}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{path}: the language model lacks {len(missing)} tensors, first {missing[0]}")
    return model


def read_state(directory: Path) -> dict[str, Tensor]:
    """All tensors of a transformers directory, single or sharded safetensors.

    Raises:
        CheckpointError: no weights, or a file that is damaged; the message names it.
    """
    index = directory / "model.safetensors.index.json"
    files = [directory / "model.safetensors"]
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(load_file(file))
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: missing; {directory} is not a complete model directory") from error
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged or truncated safetensors file: {error}") from error
    return state


def _adapt(state: dict[str, Tensor], old: SkipVisionConfig, new: SkipVisionConfig) -> dict[str, Tensor]:
    """Bring the vision position embedding and the resampler of ``old`` to the shapes of ``new``."""
    vision = {k: v for k, v in state.items() if k.startswith("vision_tower.")}
    for key, value in vision.items():
        if key.endswith(POSITION_EMBEDDING):
            vision[key] = resize_position_embedding(value, new.vision_config.grid)
    prefix = "connector."
    connector = scale_resampler(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
        old.connector_config,
        old.vision_config.grid,
        new.connector_config,
        new.vision_config.grid,
    )
    rest = {k: v for k, v in state.items() if not k.startswith(("vision_tower.", prefix))}
    return {**vision, **{prefix + k: v for k, v in connector.items()}, **rest}


def start_stage(checkpoint: Path, config: SkipVisionConfig) -> tuple[SkipVisionForConditionalGeneration, LoadReport]:
    """Build ``config``'s model with the weights of a previous stage's model directory.

    The resampler is scaled level by level and the position embedding interpolated (Chain-of-Sight); a reducer that the
    previous stage did not have starts fresh, one that is no longer wanted is dropped; both are reported. So do
    registers start fresh, but they are never dropped or changed in number.

    Raises:
        ConfigError: the previous stage was trained with another number of registers (Victor: such a model fails).
        CheckpointError: the directory is incomplete, or a tensor is missing or of another shape (named with both).
    """
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint}: no config.json; init_from must be a finished stage's model directory")
    old = SkipVisionConfig.from_pretrained(checkpoint)
    before, after = old.reducer_config.registers, config.reducer_config.registers
    if before not in (0, after):
        raise ConfigError(
            f"reducer.registers: {after}, but {checkpoint} was trained with {before}; keep {before}, or train anew"
        )
    state = _adapt(read_state(checkpoint), old, config)
    model = SkipVisionForConditionalGeneration(config)
    own = model.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(own[name].shape)}"
            )
    missing, unused = model.load_state_dict(state, strict=False)
    tied = set(model.all_tied_weights_keys)
    missing = [name for name in missing if name not in tied]
    if lost := [name for name in missing if not name.startswith("reducer.")]:
        raise CheckpointError(f"{checkpoint}: lacks {len(lost)} tensors of the model, first {lost[0]}")
    if unknown := [name for name in unused if not name.startswith(("reducer.", "vision_tower."))]:
        raise CheckpointError(
            f"{checkpoint}: holds {len(unknown)} tensors the model has no place for, first {unknown[0]}"
        )
    return model, LoadReport(missing=tuple(missing), unused=tuple(unused))
