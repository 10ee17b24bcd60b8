"""Build a model from parts, or start a stage from the previous stage's checkpoint. Strict, with a report.

In fp32 weights are copied tensor by tensor into a model that is made without them, so that there is one copy of them in
memory from the beginning. Only the connector and the position embedding, which change shape, are read before they are
copied. Half precision in a file is converted, which loses nothing.

In bf16, for an engine that would cast a model to it anyway, the decoder's weights, and all that a stage takes over as
they are, stay views of their files where those hold bf16 (:meth:`WeightFiles.views`). Everything else is made in fp32,
as it would be without, and rounded at the end: the model is the one in fp32 rounded, to the bit, and the random numbers
that new parts start from are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.loading import LoadReport
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.projector_formats import (
    OWN_PREFIX,
    check_connectors,
    load_projector,
    read_own,
    read_projector,
)
from skipvision_train.models.settings import ReducerConfig
from skipvision_train.models.vision import load_vision_weights, resize_position_embedding
from skipvision_train.models.vision_formats import VisionCheckpoint, read_vision_checkpoint
from skipvision_train.models.weights import WeightFiles

POSITION_EMBEDDING = "vision_tower.positional_embedding"

# Vicuna and LLaMA-2 files hold it; the model computes it.
_COMPUTED = "rotary_emb.inv_freq"


def meta_model(config: SkipVisionConfig) -> SkipVisionForConditionalGeneration:
    """The model on the meta device: shapes and counts without memory."""
    with torch.device("meta"):
        return SkipVisionForConditionalGeneration(config)


def build_model(
    config: SkipVisionConfig,
    llm: Path | None = None,
    vision: Path | None = None,
    vision_architecture: str | None = None,
    connector: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[SkipVisionForConditionalGeneration, LoadReport]:
    """Build a model from a LLaMA-architecture directory, a CLIP checkpoint and a projector; the reducer starts random.

    Args:
        config: its ``text_config`` must be the directory's own.
        llm: transformers directory of a causal LM, weights in safetensors or ``pytorch_model.bin``, in one file or
            sharded; None for random weights.
        vision: CLIP checkpoint in any form :func:`read_vision_checkpoint` reads; None for random weights.
        vision_architecture: open_clip name, needed if ``vision`` is a bare weights file.
        connector: weights in any form :func:`read_projector` reads; None for random weights.
        dtype: of all parameters, float32 or bfloat16; buffers stay as they are.

    Returns:
        the model; and which of its tensors no checkpoint gives, with what the checkpoints hold beyond it, as
        ``<part>.<name in the file>``.

    Raises:
        CheckpointError: a part is missing, incomplete or of other shapes.
        ConfigError: ``connector`` is a model directory with a connector of another kind.
    """
    given = {"language_model": llm, "vision_tower": vision, "connector": connector}
    language_model, report = None, LoadReport()
    if llm is not None:
        language_model, found = load_language_model(config.text_config, llm, dtype)
        report += found.within("language_model")
    model = SkipVisionForConditionalGeneration(config, language_model)
    if vision is not None:
        found = load_vision_weights(model.vision_tower, read_vision_checkpoint(vision, vision_architecture))
        report += found.within("vision_tower")
    if connector is not None:
        report += load_projector(model.connector, read_projector(connector, config)).within("connector")
    _round(model, dtype)
    fresh = tuple(name for name in model.state_dict() if given.get(name.split(".", 1)[0]) is None)
    return model, report + LoadReport(missing=fresh)


def check_parts(
    config: SkipVisionConfig,
    model: SkipVisionForConditionalGeneration,
    llm: Path | None = None,
    vision: VisionCheckpoint | None = None,
    connector: Path | None = None,
) -> None:
    """Refuse what :func:`build_model` would, by configurations and headers alone; nothing of a tensor is read.

    Args:
        config: of the model.
        model: from :func:`meta_model`, without adapters.
        llm, connector: as :func:`build_model`; a part that is None is not checked.
        vision: read without its contents.

    Raises:
        CheckpointError: a part is missing, incomplete or of other shapes.
        ConfigError: ``connector`` is a model directory with a connector of another kind, or cannot be scaled.
    """
    if llm is not None:
        _match_language_model(model.language_model, _open_language_model(llm))
    if vision is not None:
        load_vision_weights(model.vision_tower, vision)
    if connector is not None:
        load_projector(model.connector, read_projector(connector, config, contents=False))


def load_language_model(
    config: PreTrainedConfig, path: Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, LoadReport]:
    """A causal LM with the weights of a transformers directory.

    Args:
        config: of the LLaMA architecture.
        path: the directory.
        dtype: of its parameters, float32 or bfloat16.

    Raises:
        CheckpointError: no model directory; a tensor is missing or of another shape; the directory holds tensors that
            the architecture does not have, which would be left out of what it computes.
    """
    weights = _open_language_model(path)
    model = empty_language_model(config, dtype)
    sources, report = _match_language_model(model, weights)
    _fill(model, sources, weights, dtype)
    _check_tied(model, weights)
    return model, report


def _open_language_model(path: Path) -> WeightFiles:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; model.llm must be a transformers model directory")
    return WeightFiles.open(path)


def _match_language_model(model: PreTrainedModel, weights: WeightFiles) -> tuple[dict[str, str], LoadReport]:
    """Name in the model -> name in the files, which fit.

    Raises:
        CheckpointError: they do not; or there are tensors that the model has no place for.
    """
    sources, own = _sources(model, weights), model.state_dict()
    unused = [name for name in weights.tensors if name not in own]
    if unknown := [name for name in unused if not name.endswith(_COMPUTED)]:
        raise CheckpointError(
            f"{weights.source}: holds {len(unknown)} tensors the language model has no place for, first {unknown[0]}"
        )
    weights.check([(stored, own[name]) for name, stored in sources.items()], "the language model")
    return sources, LoadReport(unused=tuple(unused))


def empty_language_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM whose buffers are set and whose parameters are not: in fp32 they are allocated, else on "meta".

    Unset memory costs nothing until it is written, and random numbers that are overwritten would cost minutes.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if dtype != torch.float32:
        return model
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    model.tie_weights()
    return model


def _sources(model: PreTrainedModel, weights: WeightFiles) -> dict[str, str]:
    """Name in the model -> name in the files; of tied tensors the files hold one, under whichever name."""
    tied = model.all_tied_weights_keys
    sources = {name: name for name in model.state_dict() if name not in tied}
    for copy, original in tied.items():
        if original not in weights.tensors and copy in weights.tensors:
            sources[original] = copy
    return sources


def _fill(model: PreTrainedModel, sources: Mapping[str, str], weights: WeightFiles, dtype: torch.dtype) -> None:
    """Copy stored tensors, which fit, into a model, or put views of them in its parameters' place.

    Args:
        model: with parameters that :func:`empty_language_model` has not set, and others.
        sources: name in the model -> name in the files.
        weights: the files.
        dtype: float32 to copy, bfloat16 for views.
    """
    if dtype == torch.float32:
        own = model.state_dict()
        weights.copy([(stored, own[name]) for name, stored in sources.items()], "the model")
        return
    model.load_state_dict(weights.views(sources, dtype), strict=False, assign=True)
    model.tie_weights()


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring the parameters that are left to their type."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _check_tied(model: PreTrainedModel, weights: WeightFiles) -> None:
    """Refuse two stored tensors for one tied parameter unless they are equal.

    Raises:
        CheckpointError: they differ, so that one of the two would be lost.
    """
    for copy, original in model.all_tied_weights_keys.items():
        if copy in weights.tensors and original in weights.tensors:
            stored = weights.read([copy, original])
            if not torch.equal(*(stored[name].float() for name in (copy, original))):
                raise CheckpointError(
                    f"{weights.source}: {copy} differs from {original}, but config.json ties them (tie_word_embeddings)"
                )


def start_stage(
    checkpoint: Path, config: SkipVisionConfig, dtype: torch.dtype = torch.float32
) -> tuple[SkipVisionForConditionalGeneration, LoadReport]:
    """Build ``config``'s model with the weights of a previous stage's model directory.

    The resampler is scaled level by level and the position embedding interpolated (Chain-of-Sight); other connectors
    are copied. A reducer part that the previous stage did not have starts fresh, one that is no longer wanted is
    dropped; both are reported. Where one scorer for both summary tokens becomes two, both start from it. Registers
    start fresh too, but they are never dropped or changed in number.

    Args:
        checkpoint: the directory.
        config: of the model to build.
        dtype: of all parameters, float32 or bfloat16; buffers stay as they are.

    Raises:
        ConfigError: the previous stage was trained with another number of registers (Victor: such a model fails), with
            a connector of another type, or with a vision tower that computes otherwise; both values are named.
        CheckpointError: the directory is incomplete, or a tensor is missing or of another shape (named with both).
    """
    old, weights = _open_stage(checkpoint, config)
    model = SkipVisionForConditionalGeneration(config, empty_language_model(config.text_config, dtype))
    sources, report = _match_stage(config, model, old, weights)
    _fill(model, sources, weights, dtype)
    _check_tied(model, weights)
    _round(model, dtype)
    return model, report


def check_stage(checkpoint: Path, config: SkipVisionConfig, model: SkipVisionForConditionalGeneration) -> None:
    """Refuse what :func:`start_stage` would, by configurations and headers alone; nothing of a tensor is read.

    Args:
        checkpoint: the directory.
        config: of the model.
        model: from :func:`meta_model`, without adapters.

    Raises:
        ConfigError, CheckpointError: as :func:`start_stage`.
    """
    old, weights = _open_stage(checkpoint, config, contents=False)
    _match_stage(config, model, old, weights)


def _open_stage(
    checkpoint: Path, config: SkipVisionConfig, contents: bool = True
) -> tuple[SkipVisionConfig, WeightFiles]:
    """The previous stage's configuration, which fits ``config``, and its weights."""
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint}: no config.json; stage.start_from must be a finished stage's model directory"
        )
    old = SkipVisionConfig.from_pretrained(checkpoint)
    _check_registers(checkpoint, old, config)
    _check_vision(checkpoint, old, config)
    check_connectors(checkpoint, old, config)
    return old, WeightFiles.open(checkpoint, contents=contents)


def _match_stage(
    config: SkipVisionConfig, model: SkipVisionForConditionalGeneration, old: SkipVisionConfig, weights: WeightFiles
) -> tuple[dict[str, str], LoadReport]:
    """Give the model the connector and the positions, which may change their shape; where the rest comes from.

    Returns:
        name in the model -> name in the files, which fit, for all else that the files give.

    Raises:
        ConfigError: the resampler cannot be scaled.
        CheckpointError: weights do not fit; or there are tensors that the model has no place for.
    """
    sources = _stage_sources(model, old.reducer_config, weights)
    used = set(sources.values()) | {POSITION_EMBEDDING}
    unused = [name for name in weights.tensors if name not in used and not name.startswith(OWN_PREFIX)]
    unused = [name for name in unused if name not in model.all_tied_weights_keys]
    if unknown := [name for name in unused if not name.startswith(("reducer.", "vision_tower."))]:
        raise CheckpointError(
            f"{weights.source}: holds {len(unknown)} tensors the model has no place for, first {unknown[0]}"
        )
    load_projector(model.connector, read_own(weights, old, config))
    _load_positions(model, weights)
    own = model.state_dict()
    weights.check([(stored, own[name]) for name, stored in sources.items()], "the stage")
    fresh = tuple(name for name in own if name.startswith("reducer.") and name not in sources)
    return sources, LoadReport(missing=fresh, unused=tuple(unused))


def _stage_sources(
    model: SkipVisionForConditionalGeneration, old: ReducerConfig, weights: WeightFiles
) -> dict[str, str]:
    """Name in the model -> name in the files, for all that is copied as it is."""
    sources = _sources(model, weights)
    for name in list(sources):
        if name.startswith(OWN_PREFIX) or name == POSITION_EMBEDDING:
            del sources[name]
        elif name.startswith("reducer."):
            stored = _summary_source(name, model.config.reducer_config, old)
            if stored in weights.tensors:
                sources[name] = stored
            else:
                del sources[name]
    return sources


def _summary_source(name: str, new: ReducerConfig, old: ReducerConfig) -> str:
    """Which stored tensor of the reducer a reducer's tensor starts from.

    ``summary`` scores for the former token if there is one, else for the latter; ``latter_summary`` exists where they
    have a scorer each. A scorer starts from the one that did its work.
    """
    part = name.split(".")[1]
    if part not in ("summary", "latter_summary"):
        return name
    two = old.summary == "both" and old.summary_layers == "separate"
    latter = part == "latter_summary" or not new.has_former
    if latter and two:
        return name.replace(part, "latter_summary", 1)
    if part == "latter_summary" and not old.has_latter:
        return name
    return name.replace(part, "summary", 1)


def _load_positions(model: SkipVisionForConditionalGeneration, weights: WeightFiles) -> None:
    """The vision tower's position embedding, interpolated to the model's grid.

    Raises:
        CheckpointError: it is missing, is no square grid, or has another width.
    """
    if POSITION_EMBEDDING not in weights.tensors:
        raise CheckpointError(f"{weights.source}: the stage lacks {POSITION_EMBEDDING}")
    own = model.vision_tower.positional_embedding
    stored = weights.read([POSITION_EMBEDDING])[POSITION_EMBEDDING]
    if stored.dim() != 2 or stored.shape[1] != own.shape[1]:
        raise CheckpointError(
            f"{weights.source}: {POSITION_EMBEDDING} has shape {tuple(stored.shape)}, the model needs "
            f"{tuple(own.shape)}"
        )
    try:
        resized = resize_position_embedding(stored, model.config.vision_config.grid)
    except ValueError as error:
        raise CheckpointError(f"{weights.source}: {error}") from error
    with torch.no_grad():
        own.copy_(resized)


def _check_registers(checkpoint: Path, old: SkipVisionConfig, new: SkipVisionConfig) -> None:
    before, after = old.reducer_config.registers, new.reducer_config.registers
    if before not in (0, after):
        raise ConfigError(
            f"reducer.registers: {after}, but {checkpoint} was trained with {before}; keep {before}, or train anew"
        )


def _check_vision(checkpoint: Path, old: SkipVisionConfig, new: SkipVisionConfig) -> None:
    """Refuse a tower that would compute something else with the same weights: most of that no shape tells."""
    before, after = old.vision_config, new.vision_config
    for field in fields(before):
        if field.name in ("image_size", "layers", "depths"):
            continue
        had, wants = getattr(before, field.name), getattr(after, field.name)
        if had != wants:
            raise ConfigError(f"vision.{field.name}: {wants}, but {checkpoint} was trained with {had}")
