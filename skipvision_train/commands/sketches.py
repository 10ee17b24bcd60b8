"""``skipvision sketches``: write the embedded data set and its starting checkpoints."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from skipvision_train.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass
class DataConfig:
    """How many images each split holds."""

    pretrain: int = 12000
    """Images with a caption."""
    sft: int = 8000
    """Images with a conversation of several questions."""
    heldout: int = 1400
    """Images with one question each; the seven tasks take turns."""
    image_size: int = 96
    """Pixels per side."""
    seed: int = 0
    """All randomness follows from it."""


@dataclass
class LanguageConfig:
    """The LLaMA-architecture starting checkpoint (random weights)."""

    width: int = 128
    """Channels of the hidden states."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 4
    """Query heads."""
    key_value_heads: int = 2
    """Heads of keys and values."""
    ffn: int = 384
    """Hidden width of the FFN."""
    vocabulary: int = 512
    """Token ids in all."""


@dataclass
class VisionConfig:
    """The open_clip starting checkpoint (random weights)."""

    image_size: int = 96
    """Pixels per side that the position embedding is made for."""
    patch_size: int = 16
    """Pixels per side of a patch."""
    width: int = 128
    """Channels."""
    layers: int = 3
    """Blocks."""
    head_width: int = 32
    """Channels per attention head."""


@dataclass
class Config:
    """Settings of ``skipvision sketches``."""

    output: str = "outputs/sketches"
    """Folder to write; it must not hold anything else."""
    data: DataConfig = field(default_factory=DataConfig)
    """The splits."""
    llm: LanguageConfig = field(default_factory=LanguageConfig)
    """The language model that training starts from."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision tower that training starts from."""
    processes: int | None = None
    """Worker processes; null takes one per core. Their number changes nothing in the files."""


def run(cfg: Config) -> None:
    """Write the files, or find that they are there."""
    from dataclasses import asdict

    from skipvision_train.sketches.settings import DataSize, LanguageSize, SketchSettings, VisionSize
    from skipvision_train.sketches.writer import write_sketches

    processes = cfg.processes or os.cpu_count() or 1
    if processes < 1:
        raise ConfigError(f"processes: {processes}; at least 1")
    settings = SketchSettings(
        DataSize(**asdict(cfg.data)), LanguageSize(**asdict(cfg.llm)), VisionSize(**asdict(cfg.vision))
    )
    manifest = write_sketches(Path(cfg.output), settings, processes)
    total = sum(split["images"] for split in manifest["splits"].values())
    log.info("%s: %d images", cfg.output, total)
