"""From a validated configuration to the objects a model is built from: text config, tokenizer, plan, model config."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.llama import LlamaConfig

from skipvision_train.config.specs import ModelSpec, SkipSpec, TrainConfig
from skipvision_train.errors import CheckpointError, ConfigError, PlanError
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.plans.methods import dense, ffn_skip, skip_ffn, vskip
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
        raise CheckpointError(f"{path}: {directory} has no readable config.json: {_first_line(error)}") from error


def load_tokenizer(cfg: TrainConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of ``model.tokenizer``, the previous stage or ``model.llm``; None if none of them is set.

    Raises:
        CheckpointError: the directory holds no tokenizer.
    """
    directory = cfg.model.tokenizer or cfg.stage.start_from or cfg.model.llm
    if directory is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.tokenizer: {directory} holds no tokenizer: {_first_line(error)}") from error


def image_token_id(tokenizer: PreTrainedTokenizerBase | None, token: str) -> int:
    """The id of the placeholder.

    Raises:
        ConfigError: the tokenizer does not have it.
    """
    if tokenizer is None:
        return LLAMA3_IMAGE_TOKEN_ID
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        special = [t for t in tokenizer.all_special_tokens if t != token][:8]
        raise ConfigError(
            f"model.image_token: the tokenizer has no token {token!r}; name one it never produces from text, "
            f"for instance an unused one of its special tokens {special}"
        )
    return int(vocabulary[token])


def resolve_plan(spec: str, depth: int) -> SkipPlan:
    """The plan that ``model.plan`` names, for a model of ``depth`` layers.

    Raises:
        ConfigError: a plan file that is none, or of another depth, or names layers that the model does not have.
    """
    if spec == "dense":
        return dense().bind(depth)
    if spec == "skip_ffn":
        return skip_ffn().bind(depth)
    try:
        return SkipPlan.load(spec).bind(depth)
    except PlanError as error:
        raise ConfigError(f"model.plan: {error}") from error


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
    """The plans that a stage goes through: entry k skips the first k layers of ``stage.skip`` beside ``model.plan``.

    The last one is the plan that the finished model carries.

    Raises:
        ConfigError: ``model.plan`` or ``stage.skip`` does not fit the depth, or they contradict each other.
    """
    base, layers = resolve_plan(cfg.model.plan, depth), skipped_layers(cfg.stage.skip, depth)
    return (base, *(_beside(base, cfg.stage.skip, layers[:k]) for k in range(1, len(layers) + 1)))


def _beside(base: SkipPlan, skip: SkipSpec, layers: Sequence[int]) -> SkipPlan:
    """``base`` and what ``skip`` leaves out, in ``layers``."""
    attention, ffn = vskip(layers, skip.bypass), ffn_skip(layers)
    plans = {"attention": [attention], "ffn": [ffn], "both": [attention, ffn]}[skip.part]
    try:
        plan = compose([base, *plans], " + ".join(plan.name for plan in plans) if base.is_dense else None)
    except PlanError as error:
        raise ConfigError(f"stage.skip: beside model.plan {base.name}: {error}") from error
    return dataclasses.replace(plan, provenance=base.provenance)


def model_config(cfg: TrainConfig, tokenizer: PreTrainedTokenizerBase | None) -> SkipVisionConfig:
    """Everything ``config.json`` of the stage's finished model will hold.

    Raises:
        ConfigError: the tokenizer does not fit the vocabulary, the plan needs more registers than the reducer has, or
            what :func:`text_config`, :func:`stage_plans` and :func:`image_token_id` raise.
    """
    text = text_config(cfg)
    if tokenizer is not None and len(tokenizer) > text.vocab_size:
        raise ConfigError(
            f"model.text.vocab_size: {text.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens"
        )
    token = image_token_id(tokenizer, cfg.model.image_token)
    plan = stage_plans(cfg, text.num_hidden_layers)[-1]
    try:
        return SkipVisionConfig(
            text_config=text,
            **{name: dataclasses.asdict(getattr(cfg.model, name)) for name in ("vision", "connector", "reducer")},
            image_token_id=min(token, text.vocab_size - 1) if tokenizer is None else token,
            skip_plan=None if plan.is_dense else plan.to_dict(),
        )
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from error


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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
