"""``skipvision sketches``: write the embedded data set and its starting checkpoints."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from skipvision_train.errors import ConfigError
from skipvision_train.sketches.settings import DataSize, LanguageSize, SketchSettings, VisionSize

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Settings of ``skipvision sketches``."""

    output: str = "outputs/sketches"
    """Folder to write; it must not hold anything else."""
    data: DataSize = field(default_factory=DataSize)
    """The splits."""
    llm: LanguageSize = field(default_factory=LanguageSize)
    """The language model that training starts from."""
    vision: VisionSize = field(default_factory=VisionSize)
    """The vision tower that training starts from."""
    processes: int | None = None
    """Worker processes; null takes one per core. Their number changes nothing in the files."""


def run(cfg: Config) -> None:
    """Write the files, or find that they are there."""
    from skipvision_train.sketches.writer import write_sketches

    processes = cfg.processes or os.cpu_count() or 1
    if processes < 1:
        raise ConfigError(f"processes: {processes}; at least 1")
    manifest = write_sketches(Path(cfg.output), SketchSettings(cfg.data, cfg.llm, cfg.vision), processes)
    total = sum(split["images"] for split in manifest["splits"].values())
    log.info("%s: %d images", cfg.output, total)
