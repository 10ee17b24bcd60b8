"""``skipvision pipeline``: stages one after the other, each from the model of the one before it."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from skipvision_train.errors import ConfigError, SkipVisionError

log = logging.getLogger(__name__)

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What this process is sent, the stage that runs gets."""


@dataclass
class Config:
    """Settings of ``skipvision pipeline``."""

    stages: list[str] = field(default_factory=list)
    """Experiments in order, such as ``[cos_pretrain, sv_cos]``. From the second on, ``stage.start_from`` is the
    finished model of the one before."""
    output: str = "???"
    """Folder of the runs: ``<output>/1_cos_pretrain``, ``<output>/2_sv_cos``. Started again, finished stages are passed
    over and an interrupted one goes on."""
    overrides: list[str] = field(default_factory=list)
    """What follows ``skipvision train`` in every stage, such as ``['deepspeed=zero3','trainer.wandb=online']``."""
    first: list[str] = field(default_factory=list)
    """The same for the first stage alone: the weights that everything begins with."""
    each: list[str] = field(default_factory=list)
    """The same for single stages, one text per stage: ``['data.root=/a', 'data.root=/b data.pack=true']``."""
    launcher: str | None = None
    """A script that starts ``skipvision train`` with the words it is given, such as ``launch/torchrun.sh``; null starts
    it in one process. On several machines run the pipeline on each of them."""


def run(cfg: Config) -> None:
    """Run the stages.

    Raises:
        ConfigError: no stages, or another number of ``each``.
        SkipVisionError: a stage failed.
        SystemExit: a stage was stopped by a signal, with its status.
    """
    commands = stage_commands(cfg)
    for number, (name, command) in enumerate(commands, 1):
        log.info("stage %d of %d, %s: %s", number, len(commands), name, shlex.join(command))
        status = run_stage(command)
        if status in (128 + signal.SIGTERM, 128 + signal.SIGUSR1):
            log.warning(
                "stage %d of %d, %s, was stopped; start the same command again to go on", number, len(commands), name
            )
            raise SystemExit(status)
        if status:
            raise SkipVisionError(f"stage {number} of {len(commands)}, {name}, failed with exit status {status}")
    sys.stdout.write(f"{stage_folder(cfg, len(commands)) / 'model'}\n")


def stage_folder(cfg: Config, number: int) -> Path:
    """The run's folder of stage ``number``, counted from 1."""
    return Path(cfg.output) / f"{number}_{cfg.stages[number - 1].replace('/', '_')}"


def stage_commands(cfg: Config) -> list[tuple[str, list[str]]]:
    """Every stage's name, and the process to start.

    Raises:
        ConfigError: no stages, another number of ``each``, or a pipeline inside of a launcher.
    """
    if not cfg.stages:
        raise ConfigError("stages: none; name experiments, such as stages=[cos_pretrain,sv_cos]")
    if cfg.each and len(cfg.each) != len(cfg.stages):
        raise ConfigError(f"each: {len(cfg.each)} texts for {len(cfg.stages)} stages; give one per stage")
    if "RANK" in os.environ:
        raise ConfigError("launcher: the pipeline starts the launcher itself; run it directly, with launcher=...")
    start = [cfg.launcher] if cfg.launcher else [sys.executable, "-m", "skipvision_train", "train"]
    commands = []
    for number, name in enumerate(cfg.stages, 1):
        words = [f"experiment={name}", f"trainer.output_dir={stage_folder(cfg, number)}"]
        if number > 1:
            words.append(f"stage.start_from={stage_folder(cfg, number - 1) / 'model'}")
        own = cfg.first if number == 1 else []
        single = shlex.split(cfg.each[number - 1]) if cfg.each else []
        given = [*cfg.overrides, *own, *single]
        # Hydra's parser takes overrides in one run: options such as --config-dir=mine stand in front.
        options = [word for word in given if word.startswith("-")]
        commands.append((name, [*start, *options, *words, *(word for word in given if word not in options)]))
    return commands


def run_stage(command: Sequence[str]) -> int:
    """Start a process, hand signals on to it, and wait; its exit status, as a shell would give it.

    Raises:
        ConfigError: it cannot be started.
    """
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise ConfigError(f"launcher: {command[0]} cannot be started: {error.strerror}") from error
    before = {number: signal.signal(number, lambda got, _: process.send_signal(got)) for number in FORWARDED}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
