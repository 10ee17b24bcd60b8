"""From a validated configuration to the objects a model is built from: text config, tokenizer, plan, model config."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.llama import LlamaConfig

from skipvision_train.config.plans import build_plan
from skipvision_train.config.specs import ModelSpec, SkipSpec, TrainConfig
from skipvision_train.data.placeholder import free, listed, taken
from skipvision_train.data.templates.pieces import find_token
from skipvision_train.errors import CheckpointError, ConfigError, PlanError, first_line
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import (
    CONNECTORS,
    ConnectorConfig,
    build_connector_config,
    connector_kind,
)
from skipvision_train.models.weights import check_pointers
from skipvision_train.plans.methods import ffn_skip, vskip
from skipvision_train.plans.plan import SkipPlan, compose

LLAMA3_IMAGE_TOKEN_ID = 128002
"""``<|reserved_special_token_0|>``; assumed where a dry run has no tokenizer."""


def text_config(cfg: TrainConfig) -> LlamaConfig:
    """The language model's configuration: of the previous stage, of ``model.llm``, or of ``model.text``.

    Raises:
        CheckpointError: a directory without a readable ``config.json``.
        ConfigError: the checkpoint to start from is no Skip-Vision model.
    """
    if cfg.stage.start_from is not None:
        previous = _read_config("stage.start_from", cfg.stage.start_from)
        if not isinstance(previous, SkipVisionConfig):
            raise ConfigError(
                f"stage.start_from: {cfg.stage.start_from} holds a {previous.model_type} model, not a Skip-Vision one; "
                "give a language model as model.llm"
            )
        path, found = "stage.start_from", previous.text_config
    elif cfg.model.llm is not None:
        path, found = "model.llm", _read_config("model.llm", cfg.model.llm)
    else:
        return LlamaConfig(**dataclasses.asdict(cfg.model.text))
    if not isinstance(found, LlamaConfig):
        raise ConfigError(f"{path}: its language model is of type {found.model_type}; a llama model is needed")
    return found


def _read_config(path: str, directory: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        _check_there(path, directory)
        raise CheckpointError(f"{path}: {directory} has no readable config.json: {first_line(error)}") from error


def _check_there(path: str, directory: str) -> None:
    """Refuse a path that leads nowhere or to git-lfs pointers; asked after a failure alone, since names of a filled hub
    cache are no paths."""
    if not Path(directory).exists():
        raise CheckpointError(f"{path}: {directory} does not exist")
    check_pointers(Path(directory))


def load_tokenizer(cfg: TrainConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of ``model.tokenizer``, the previous stage or ``model.llm``; None if none of them is set.

    Raises:
        CheckpointError: the directory does not exist, or holds no tokenizer; with the field that names it.
    """
    sources = {
        "model.tokenizer": cfg.model.tokenizer,
        "stage.start_from": cfg.stage.start_from,
        "model.llm": cfg.model.llm,
    }
    path, directory = next(((path, value) for path, value in sources.items() if value is not None), ("", None))
    if directory is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        _check_there(path, directory)
        other = "" if path == "model.tokenizer" else "; name one as model.tokenizer"
        raise CheckpointError(f"{path}: {directory} holds no tokenizer: {first_line(error)}{other}") from error


def image_token_id(tokenizer: PreTrainedTokenizerBase | None, token: str, template: str) -> int:
    """The id of the placeholder.

    Args:
        tokenizer: None where a dry run has none.
        token: ``model.image_token``.
        template: ``stage.template``.

    Raises:
        ConfigError: the tokenizer does not have it, or it means something else (``data.placeholder``).
    """
    if tokenizer is None:
        return LLAMA3_IMAGE_TOKEN_ID
    found = find_token(tokenizer, token)
    if found is None:
        raise ConfigError(
            f"model.image_token: the tokenizer has no token {token!r}; {_other_token(tokenizer, template)}"
        )
    added = tokenizer.added_tokens_decoder.get(found)
    is_special = added is not None and added.special
    meaning = taken(tokenizer, template).get(found) if is_special else "no special token, so that a text may spell it"
    if meaning is not None:
        raise ConfigError(f"model.image_token: {token!r} is {meaning}; {_other_token(tokenizer, template)}")
    return found


def _other_token(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Overrides that name a free token, quoted for Hydra inside of quotes for the shell."""
    overrides = [shlex.quote(f'model.image_token="{name}"') for name in free(tokenizer, template)]
    return f"use a special token that is free, {listed(overrides)}"


def connector_config(values: Mapping[str, Any]) -> ConnectorConfig:
    """``model.connector`` with its types checked.

    Raises:
        ConfigError: an unknown type of connector, or fields that it does not have or that are of another type; if they
            are another connector's, as where ``connector@model.connector=mqt`` exchanges that of a model whose own file
            sets keys, the message says so.
    """
    kind = connector_kind(values)
    fields = {name: value for name, value in values.items() if name != "type"}
    try:
        OmegaConf.merge(OmegaConf.structured(kind), fields)
    except OmegaConfBaseException as error:
        if (left := _left_over(kind, fields)) is not None:
            raise ConfigError(left) from error
        known = ", ".join(field.name for field in dataclasses.fields(kind))
        raise ConfigError(f"connector.{error.full_key}: {first_line(error)}; the fields are {known}") from error
    return build_connector_config(values)


def _left_over(kind: type[ConnectorConfig], fields: Mapping[str, Any]) -> str | None:
    """The message for fields of another connector than ``kind``, with the way out; None where a field is just wrong."""
    wrong = {name: value for name, value in fields.items() if not _fits(kind, name, value)}
    if not wrong.keys() - {field.name for field in dataclasses.fields(kind)}:
        return None
    other = next((name for name, each in CONNECTORS.items() if all(_fits(each, *item) for item in wrong.items())), None)
    if other is None:
        return None
    name = next(name for name, each in CONNECTORS.items() if each is kind)
    keys = " and ".join(f"{key}={value}".replace(" ", "") for key, value in wrong.items())
    way = "model=sv_cos" if name == "resampler" else f"experiment=llava connector@model.connector={name}"
    return (
        f"connector.type: {name}, with {keys} of connector {other}: the chosen model sets them itself, whatever the "
        f"connector; take one that does not, such as {way}"
    )


def _fits(kind: type[ConnectorConfig], name: str, value: Any) -> bool:
    try:
        OmegaConf.merge(OmegaConf.structured(kind), {name: value})
    except OmegaConfBaseException:
        return False
    return True


def stage_plan(cfg: TrainConfig, depth: int) -> SkipPlan:
    """The plan that ``plan`` names, for a model of ``depth`` layers.

    Raises:
        ConfigError: as :func:`build_plan`; or ``own`` without a previous stage.
    """
    own = None
    if cfg.plan.method == "own" and cfg.stage.start_from is not None:
        previous = _read_config("stage.start_from", cfg.stage.start_from)
        own = previous.plan_or_dense() if isinstance(previous, SkipVisionConfig) else None
    return build_plan(cfg.plan, depth, own=own)


def skipped_layers(skip: SkipSpec, depth: int) -> tuple[int, ...]:
    """The layers that ``stage.skip`` names, the first to be skipped first; empty where it names none.

    Raises:
        ConfigError: layers that a model of ``depth`` layers does not have.
    """
    if skip.count is not None:
        if skip.count > depth:
            raise ConfigError(f"stage.skip.count: {skip.count}; the model has {depth} layers, use 1 to {depth}")
        return tuple(reversed(range(depth - skip.count, depth)))
    layers = tuple(skip.layers or ())
    if unknown := sorted(layer for layer in layers if layer >= depth):
        raise ConfigError(f"stage.skip.layers: {unknown} do not exist; the model has layers 0 to {depth - 1}")
    return layers


def stage_plans(cfg: TrainConfig, depth: int) -> tuple[SkipPlan, ...]:
    """The plans that a stage goes through: entry k skips the first k layers of ``stage.skip`` beside ``plan``.

    The last one is the plan that the finished model carries.

    Raises:
        ConfigError: ``plan`` or ``stage.skip`` does not fit the depth, or they contradict each other.
    """
    base, layers = stage_plan(cfg, depth), skipped_layers(cfg.stage.skip, depth)
    return (base, *(_beside(base, cfg.stage.skip, layers[:k]) for k in range(1, len(layers) + 1)))


def _beside(base: SkipPlan, skip: SkipSpec, layers: Sequence[int]) -> SkipPlan:
    """``base`` and what ``skip`` leaves out, in ``layers``."""
    attention, ffn = vskip(layers, skip.bypass), ffn_skip(layers)
    plans = {"attention": [attention], "ffn": [ffn], "both": [attention, ffn]}[skip.part]
    try:
        plan = compose([base, *plans], " + ".join(plan.name for plan in plans) if base.is_dense else None)
    except PlanError as error:
        raise ConfigError(f"stage.skip: beside plan {base.name}: {error}") from error
    return dataclasses.replace(plan, provenance=base.provenance)


def model_config(cfg: TrainConfig, tokenizer: PreTrainedTokenizerBase | None) -> SkipVisionConfig:
    """Everything ``config.json`` of the stage's finished model will hold.

    Raises:
        ConfigError: the tokenizer does not fit the vocabulary, the plan needs more registers than the reducer has, or
            what :func:`text_config`, :func:`stage_plans` and :func:`image_token_id` raise.
    """
    text = text_config(cfg)
    if tokenizer is not None:
        _check_vocabulary(cfg, tokenizer, text.vocab_size)
    token = image_token_id(tokenizer, cfg.model.image_token, cfg.stage.template)
    plan = stage_plans(cfg, text.num_hidden_layers)[-1]
    try:
        return SkipVisionConfig(
            text_config=text,
            **{name: dataclasses.asdict(getattr(cfg.model, name)) for name in ("vision", "tiling", "reducer")},
            connector=connector_config(cfg.model.connector),
            image_token_id=min(token, text.vocab_size - 1) if tokenizer is None else token,
            skip_plan=None if plan.is_dense else plan.to_dict(),
        )
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from error


def _check_vocabulary(cfg: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse ids without a row of the embedding; the largest id counts, since vocabularies may have gaps."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest < rows:
        return
    if (source := cfg.stage.start_from or cfg.model.llm) is not None:
        raise ConfigError(f"model.tokenizer: its token {token!r} has id {largest}, but {source} has {rows} rows")
    raise ConfigError(
        f"model.text.vocab_size: {rows} is less than the tokenizer's {largest + 1} rows: "
        f"its token {token!r} has id {largest}"
    )


def check_vision_facts(model: ModelSpec, facts: dict[str, Any], source: str) -> None:
    """Compare ``model.vision`` with what a checkpoint's weights fix.

    ``image_size`` and ``depths`` are the run's choice, everything else is the weights': with the wrong activation or
    the wrong means features are silently wrong.

    Raises:
        ConfigError: naming the first field that disagrees.
    """
    for name, right in facts.items():
        value = getattr(model.vision, name)
        if name == "image_size":
            continue
        right = list(right) if isinstance(right, tuple) else right
        if value != right:
            raise ConfigError(f"model.vision.{name}: {value}, but the weights of {source} need {right}")


def source_path(value: str | None) -> Path | None:
    """A path, or None."""
    return None if value is None else Path(value)
