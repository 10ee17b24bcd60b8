"""``skipvision export``: a checkpoint of a run, shards of DeepSpeed included, as a plain model directory."""

from __future__ import annotations

from dataclasses import dataclass

from skipvision_train.errors import ConfigError

DTYPES = ("fp32", "bf16")


@dataclass
class Config:
    """Settings of ``skipvision export``. What it writes is what a finished run's ``model`` is."""

    checkpoint: str = "???"
    """A ``checkpoint-N`` folder, or a model directory to convert."""
    output: str = "???"
    """The directory to write; it must not exist. It appears whole or not at all."""
    dtype: str | None = None
    """fp32 or bf16; null as stored. fp32 of a run that kept bf16 weights takes the fp32 masters out of DeepSpeed's
    shards."""


def run(cfg: Config) -> None:
    """Export.

    Raises:
        ConfigError: a field cannot be.
        CheckpointError: the checkpoint is damaged, or lacks what was asked for.
    """
    if cfg.dtype is not None and cfg.dtype not in DTYPES:
        raise ConfigError(f"dtype: {cfg.dtype!r} is unknown; use {', '.join(DTYPES)} or null")
    from pathlib import Path

    from skipvision_train.training.export import export

    export(Path(cfg.checkpoint), Path(cfg.output), cfg.dtype)
