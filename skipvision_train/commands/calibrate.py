"""``skipvision calibrate``: measure what each layer's visual computation adds; write plans that leave out the least."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from skipvision_train.config.calibration import BudgetSpec, StrategySpec
from skipvision_train.errors import ConfigError
from skipvision_train.folders import ResultsFolder

if TYPE_CHECKING:
    from skipvision_train.calibration.session import Session
    from skipvision_train.data.records import Record

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Settings of ``skipvision calibrate`` (V-Skip, Sec. 3.2 and 3.3)."""

    checkpoint: str = "???"
    """Model directory: ours, or a vision-language model of transformers."""
    recipe: str | None = None
    """Calibration data: name of a file in ``data_recipes/`` or path of a recipe file, with ``:split`` where it has any.
    The paper finds that a plan fits best the task it was calibrated on."""
    data_root: str | None = None
    """Directory that the recipe's paths are relative to; null: the recipe file's own folder."""
    prompts: str | None = None
    """Instead of a recipe: a JSONL file; a line has ``image`` or ``images``, ``prompt``, maybe ``answer``, ``task``."""
    task: str | None = None
    """Calibrate on the records of this task alone; null takes all, evenly."""
    bank: bool = False
    """A plan for every task besides the universal one, in ``<output>/bank``; ``samples`` are then drawn per task."""
    universal: str = "pooled"
    """Where the universal plan of a bank comes from: ``pooled``, every task alike, or the name of a task."""
    transfer: bool = False
    """Measure what every task's plan costs on every task's samples: a prefill per sample and task more."""
    samples: int = 20
    """Records drawn at random. Each costs about half a prefill per layer."""
    draws: int = 1
    """Draws of as many samples with the seeds ``seed``, ``seed + 1``, ...: the mean chooses, the spread is shown."""
    seed: int = 0
    """Seeds the draw."""
    positions: str = "next"
    """Whose distribution counts: ``next``, the first token of the answer, or ``answer``, all of the record's answer."""
    strategy: StrategySpec = field(default_factory=StrategySpec)
    """How layers are scored and chosen: a file of ``conf/strategy`` and its fields."""
    budget: BudgetSpec = field(default_factory=BudgetSpec)
    """How many layers skip: a file of ``conf/budget`` and its value; half of them if nothing is said."""
    output: str = "???"
    """Folder for ``plan.json``, ``vig.json``, ``scores.json``, pictures and the bank."""
    overwrite: bool = False
    """Replace the results of another configuration that stand in ``output``, and the finished layers of an interrupted
    one; without it they are refused. The same configuration goes on, or is measured again and its results replaced."""
    image_token_id: int | None = None
    """What stands for visual tokens, where the model's configuration does not say it."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; null takes the GPU if there is one."""
    precision: str | None = None
    """``fp32``, ``bf16`` or ``fp16``; null keeps what the checkpoint was saved in. 16 bits blur small gains."""
    max_rows: int = 8
    """Perturbed states that share a batch; fewer need less memory."""
    wandb_project: str | None = None
    """Log scores and pictures to this wandb project; null: do not."""


def run(cfg: Config) -> None:
    """Draw, score, choose, and write plans with their provenance."""
    check(cfg)
    from skipvision_train.calibration import outputs
    from skipvision_train.calibration.ranks import Ranks
    from skipvision_train.calibration.session import Session

    folder = ResultsFolder.open("calibrate", cfg, outputs.FILES)
    records = read_records(cfg)
    ranks = Ranks.start()
    try:
        session = Session.open(cfg, ranks, records)
        log_start(session)
        found = session.run()
        if ranks.rank == 0:
            with folder.writing() as output:
                pictures = outputs.write(session, found, output)
            session.forget()
            if cfg.wandb_project is not None:
                outputs.log_to_wandb(cfg.wandb_project, session, found, pictures)
            sys.stdout.write(outputs.report(session, found) + "\n")
            log.info("wrote %s", folder.path / "plan.json")
    finally:
        ranks.finish()


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        ConfigError: naming the field.
    """
    from skipvision_train.calibration.samples import POSITIONS
    from skipvision_train.calibration.scores import strategy_named
    from skipvision_train.config.calibration import SEARCHES
    from skipvision_train.plans.rules import BYPASSES

    for name in ("samples", "draws", "max_rows"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{name}: {getattr(cfg, name)}; at least 1")
    if (cfg.recipe is None) == (cfg.prompts is None):
        raise ConfigError("recipe: give either recipe=... or prompts=... (a JSONL file)")
    if cfg.bank and cfg.task is not None:
        raise ConfigError(f"bank: a bank holds a plan for every task; leave out task={cfg.task}")
    if cfg.universal != "pooled" and not cfg.bank:
        raise ConfigError(f"universal: {cfg.universal} is the universal plan of a bank; add bank=true, or use task=...")
    for name in ("bank", "transfer"):
        if getattr(cfg, name) and cfg.strategy.search != "top":
            raise ConfigError(
                f"{name}: strategy.search={cfg.strategy.search} finds one plan for all tasks; search each with task=..."
            )
    choices: list[tuple[str, str, tuple[str, ...]]] = [
        ("positions", cfg.positions, POSITIONS),
        ("strategy.bypass", cfg.strategy.bypass, BYPASSES),
        ("strategy.search", cfg.strategy.search, SEARCHES),
    ]
    for name, value, allowed in choices:
        if value not in allowed:
            raise ConfigError(f"{name}: {value!r} is unknown; use {' or '.join(allowed)}")
    strategy_named(cfg.strategy.name)
    cfg.budget.check(cfg.strategy.search)


def read_records(cfg: Config) -> list[Record]:
    """All records that could be drawn: those with images, each once."""
    from skipvision_train.calibration.samples import read_jsonl
    from skipvision_train.calibration.session import record_id
    from skipvision_train.data.recipes import load_recipe, load_records

    if cfg.prompts is not None:
        found = read_jsonl(cfg.prompts)
    else:
        found = load_records(load_recipe(str(cfg.recipe), cfg.data_root)).read_all()
    usable = list({record_id(record): record for record in found if record.images}.values())
    if not usable:
        raise ConfigError(
            f"recipe: none of the {len(found)} records of {cfg.recipe} shows an image; there is nothing to measure"
        )
    if len(usable) < len(found):
        log.info(
            "%d of %d records have an image and an id of their own; the others are not drawn", len(usable), len(found)
        )
    return usable


def log_start(session: Session) -> None:
    """One line on what is about to run."""
    log.info(
        "%d samples of %d tasks, %d layers, base plan %s, strategy %s",
        len(session.ids),
        len(set(session.tasks)),
        session.base.num_layers,
        session.base.name,
        session.cfg.strategy.name,
    )
