"""A checkpoint as a model directory: weights in safetensors, configuration, processor, plan, no training state."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skipvision_train.config.specs import LoraSpec
from skipvision_train.errors import CheckpointError, ConfigError
from skipvision_train.files import write_json
from skipvision_train.models.build import meta_model
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.training.checkpoints import (
    MARKER,
    changed_files,
    publish_model,
    read_marker,
    writing,
)
from skipvision_train.training.ema import AVERAGE, averaged
from skipvision_train.training.lora import ADAPTERS, DOWN, SETTINGS, merged

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATE = re.compile(
    r"average|global_step|latest|universal|rng_state|scheduler\.pt|optimizer|trainer_state|training_args|zero_to_|DAMAGED|lora\.json"
    r"|model.*\.safetensors"
)
"""Beginnings of names that are training state, or weights, which are written anew."""


def export(checkpoint: Path, output: Path, dtype: str | None = None) -> None:
    """Write ``output``, beside it first; it gets its name when every tensor has been read back.

    Needs the model once in the CPU's memory; with masters out of DeepSpeed's shards twice, in fp32.

    Args:
        checkpoint: a ``checkpoint-N`` of a run, or a model directory.
        output: must not exist.
        dtype: a key of :data:`DTYPES`; None keeps what is stored.

    Raises:
        ConfigError: ``output`` exists, or ``checkpoint`` is no model directory.
        CheckpointError: files have changed or are missing, or fp32 is nowhere in them.
    """
    check(checkpoint, output)
    model = meta_model(read_config(checkpoint))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state, adapters = read_state(checkpoint, dtype)
    state = averaged(state, read_tensors(checkpoint, AVERAGE), model.all_tied_weights_keys)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(partial):
        partial.mkdir(parents=True)
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != MARKER and not STATE.match(file.name):
                shutil.copy(file, partial)
        write_weights(state, partial)
        if adapters:
            save_file(adapters, partial / ADAPTERS)
        publish_model(partial, output, expected)
    count, kinds = sum(t.numel() for t in state.values()), sorted({str(t.dtype)[6:] for t in state.values()})
    log.info("%s: %d tensors, %d parameters, %s", output, len(state), count, ", ".join(kinds))


def check(checkpoint: Path, output: Path) -> None:
    """Refuse what cannot be exported, before anything is read.

    Raises:
        ConfigError: ``output`` exists, or ``checkpoint`` is no model directory.
        CheckpointError: the checkpoint is not complete, or files have changed since it was written.
    """
    if output.exists():
        raise ConfigError(f"output: {output} exists; give another name")
    if not (checkpoint / "config.json").is_file():
        raise ConfigError(f"checkpoint: {checkpoint} has no config.json; give a checkpoint-N or a model directory")
    if re.fullmatch(r"checkpoint-\d+", checkpoint.resolve().name):
        if read_marker(checkpoint) is None:
            raise CheckpointError(f"{checkpoint}: not complete; take another checkpoint of the run")
        if changed := changed_files(checkpoint):
            raise CheckpointError(f"{checkpoint}: the content of {changed[0]} is not what was written; take another")


def read_config(checkpoint: Path) -> SkipVisionConfig:
    """The model's configuration.

    Raises:
        CheckpointError: it is not one of ours.
    """
    try:
        return SkipVisionConfig.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}/config.json: {error}") from error


def read_state(checkpoint: Path, dtype: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors, in ``dtype`` where they are floating point, with adapters merged; and the adapters by themselves.

    Raises:
        CheckpointError: there are no weights, fp32 is asked for and only less is there, or adapters of an earlier
            version, which does not say how they are merged.
    """
    state = read_tensors(checkpoint, "model*.safetensors")
    sharded = (checkpoint / "latest").is_file()
    floating = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if dtype == "fp32" and floating != {torch.float32}:
        if not sharded:
            kinds = ", ".join(sorted(str(kind)[6:] for kind in floating)) or "no weights"
            raise CheckpointError(
                f"{checkpoint}: dtype fp32, but it holds {kinds} and no fp32 masters; use bf16 or null"
            )
        state |= masters(checkpoint)  # scales of weights in 4 bits are no parameters: they are in the files alone
    elif not state:
        if not sharded:
            raise CheckpointError(f"{checkpoint}: holds no model*.safetensors and no shards of DeepSpeed")
        state = masters(checkpoint)
    adapters: dict[str, Tensor] = {}
    if (checkpoint / SETTINGS).is_file():
        state, adapters = merged(state, LoraSpec(**json.loads((checkpoint / SETTINGS).read_text())))
    elif adapter := next((name for name in state if DOWN in name), None):
        raise CheckpointError(
            f"{checkpoint}: holds adapters, first {adapter}, but no {SETTINGS} that says how to merge them; finish the "
            "run, its model has them merged"
        )
    if dtype is None:
        return state, adapters
    return {k: t.to(DTYPES[dtype]) if t.is_floating_point() else t for k, t in state.items()}, adapters


def read_tensors(checkpoint: Path, pattern: str) -> dict[str, Tensor]:
    """All tensors of the files with such names; none where there is no such file.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        return {name: value for file in sorted(checkpoint.glob(pattern)) for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: weights cannot be read: {error}") from error


def masters(checkpoint: Path) -> dict[str, Tensor]:
    """The fp32 weights of DeepSpeed's optimizer, put together from its shards; frozen ones as the model holds them.

    The shards are pickles: reading them runs what is in them. They are a run's own.

    Raises:
        CheckpointError: DeepSpeed cannot read them.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    except Exception as error:  # whatever DeepSpeed meets, the checkpoint cannot be used
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{checkpoint}: DeepSpeed's shards cannot be put together: {reason}") from error
    return {name: tensor.contiguous() for name, tensor in state.items()}


def write_weights(state: Mapping[str, Tensor], directory: Path) -> None:
    """``model.safetensors``, or files of at most 5 GB with an index; ``config.json`` learns the type.

    Raises:
        OSError: a file cannot be written.
    """
    split = split_torch_state_dict_into_shards(dict(state), filename_pattern="model{suffix}.safetensors")
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)
    config = json.loads((directory / "config.json").read_text())
    config["dtype"] = str(next(t.dtype for t in state.values() if t.is_floating_point()))[6:]
    write_json(directory / "config.json", config)
