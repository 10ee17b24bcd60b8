"""``skipvision calibrate``: measure what each layer's visual attention adds, and write a V-Skip plan."""

from __future__ import annotations

import hashlib
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvision_train.errors import ConfigError

if TYPE_CHECKING:
    from skipvision_train.data.records import Record
    from skipvision_train.plans.plan import SkipPlan

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Settings of ``skipvision calibrate`` (V-Skip, Sec. 3.2 and 3.3)."""

    checkpoint: str = "???"
    """Model directory."""
    recipe: str = "???"
    """Calibration data: name of a file in ``data_recipes/`` or path of a recipe file, with ``:split`` where it has any.
    The paper finds that a plan fits best the task it was calibrated on."""
    data_root: str | None = None
    """Directory that the recipe's paths are relative to; null: the recipe file's own folder."""
    task: str | None = None
    """Calibrate on the records of this task alone; null takes all."""
    samples: int = 20
    """Records drawn at random; each costs one prefill per layer."""
    seed: int = 0
    """Seeds the draw."""
    layers: int | None = None
    """How many layers skip visual attention, those of the smallest gain; null takes half of them."""
    bypass: str = "zero"
    """What replaces the skipped attention: ``zero`` nothing, ``norm`` the normed layer input (Eq. 6 to the letter)."""
    batch_size: int = 4
    """Records per forward pass."""
    output: str = "???"
    """Folder for ``plan.json``, ``vig.json`` and ``vig.png``."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; null takes the GPU if there is one."""
    precision: str | None = None
    """``fp32``, ``bf16`` or ``fp16``; null keeps what the checkpoint was saved in. 16 bits blur small gains."""


def run(cfg: Config) -> None:
    """Draw samples, score layers, choose, write the plan with its provenance."""
    check(cfg)
    from skipvision_train.analysis.figures import to_png, vig_profile
    from skipvision_train.calibration.vig import select_layers, visual_information_gain
    from skipvision_train.data.recipes import load_recipe, load_records
    from skipvision_train.evaluation.evaluate import file_images, prompt_batches
    from skipvision_train.evaluation.loading import load_for_inference
    from skipvision_train.evaluation.results import write_json

    records = draw(load_records(load_recipe(cfg.recipe, cfg.data_root)), cfg)
    model, processor = load_for_inference(cfg.checkpoint, None, cfg.device, cfg.precision)
    count = _layer_count(cfg, model.plan.num_layers)
    log.info("%d samples, %d layers, base plan %s", len(records), model.plan.num_layers, model.plan.name)
    batches = list(prompt_batches(model, processor, records, file_images(records), cfg.batch_size))
    scores = visual_information_gain(model, batches, cfg.bypass).tolist()
    layers = select_layers(scores, count)
    plan = combine(model.plan, layers, cfg.bypass, provenance(cfg, records, model.plan, scores))

    output = Path(cfg.output)
    plan.save(output / "plan.json")
    write_json(output / "vig.json", {"scores": scores, "layers": layers, "plan": plan.name, **plan.provenance})
    title = f"Visual Information Gain, {cfg.task or 'all tasks'}"
    (output / "vig.png").write_bytes(to_png(vig_profile(scores, layers, title=title)))
    sys.stdout.write(table(scores, layers) + "\n" + plan.table() + "\n")
    log.info("wrote %s", output / "plan.json")


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        ConfigError: naming the field.
    """
    from skipvision_train.plans.rules import BYPASSES

    for name in ("samples", "batch_size"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{name}: {getattr(cfg, name)}; at least 1")
    if cfg.bypass not in BYPASSES:
        raise ConfigError(f"bypass: {cfg.bypass!r} is unknown; use {' or '.join(BYPASSES)}")


def draw(records: Sequence[Record], cfg: Config) -> list[Record]:
    """``cfg.samples`` records of ``cfg.task``, drawn by ``cfg.seed``.

    Raises:
        ConfigError: no such task, or fewer records than samples.
    """
    chosen = [r for r in records if cfg.task is None or r.task == cfg.task]
    if not chosen:
        tasks = sorted({r.task for r in records if r.task})
        raise ConfigError(f"task: no record of {cfg.recipe} has the task {cfg.task!r}; there are {', '.join(tasks)}")
    if len(chosen) < cfg.samples:
        raise ConfigError(f"samples: {cfg.samples}, but only {len(chosen)} records of {cfg.recipe} can be drawn")
    return random.Random(f"{cfg.seed}/calibrate").sample(chosen, cfg.samples)


def _layer_count(cfg: Config, depth: int) -> int:
    count = depth // 2 if cfg.layers is None else cfg.layers
    if not 1 <= count <= depth:
        raise ConfigError(f"layers: {count}; the model has {depth}, use 1 to {depth}")
    return count


def combine(base: SkipPlan, layers: Sequence[int], bypass: str, facts: dict[str, Any]) -> SkipPlan:
    """V-Skip on ``layers`` on top of what ``base`` leaves out."""
    from dataclasses import replace

    from skipvision_train.plans import compose, vskip

    plan = vskip(layers, bypass).bind(base.num_layers)
    name = "V-Skip" if base.is_dense else f"{base.name} + V-Skip"
    return replace(compose([base, plan], name), provenance=facts)


def provenance(cfg: Config, records: Sequence[Record], base: SkipPlan, scores: list[float]) -> dict[str, Any]:
    """How the plan was found: enough to find it again."""
    from skipvision_train.evaluation.loading import package_versions

    return {
        "method": "V-Skip, visual information gain KL(P || P without the layer's visual attention)",
        "checkpoint": cfg.checkpoint,
        "config_sha256": hashlib.sha256((Path(cfg.checkpoint) / "config.json").read_bytes()).hexdigest(),
        "base_plan": base.name,
        "recipe": cfg.recipe,
        "task": cfg.task,
        "records": [f"{r.source}/{r.id}" for r in records],
        "seed": cfg.seed,
        "bypass": cfg.bypass,
        "scores": scores,
        "versions": package_versions(),
    }


def table(scores: Sequence[float], layers: Sequence[int]) -> str:
    """Layer, gain, and whether the layer skips."""
    lines = [f"{'layer':>5}  {'VIG (nats)':>12}"]
    lines += [f"{i:>5}  {score:>12.4e}{'  skipped' if i in layers else ''}" for i, score in enumerate(scores)]
    return "\n".join(lines)
