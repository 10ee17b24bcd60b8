"""``skipvision evaluate``: accuracy per task, blind accuracy, cost and time of a model under a plan."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import ConfigError

if TYPE_CHECKING:
    from skipvision_train.data.processor import SkipVisionProcessor
    from skipvision_train.data.records import Record
    from skipvision_train.evaluation.metrics import Accuracy
    from skipvision_train.evaluation.results import EvaluationResult, Prediction, Timing
    from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
    from skipvision_train.plans.plan import SkipPlan

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Settings of ``skipvision evaluate``."""

    checkpoint: str = "???"
    """Model directory."""
    recipe: str = "???"
    """Questions: name of a file in ``data_recipes/`` or path of a recipe file, with ``:split`` where it has any. A
    record's last answer is scored by exact match; results are grouped by ``task``, or by source without one."""
    data_root: str | None = None
    """Directory that the recipe's paths are relative to; image paths in the result are relative to it as well."""
    output: str = "???"
    """Folder for ``evaluation.json``."""
    plan: PlanSpec = field(default_factory=lambda: PlanSpec("own"))
    """The plan: a file of ``conf/plan`` and its fields, or a plan file's path; ``own`` is what the checkpoint has."""
    batch_size: int = 16
    """Records per forward pass; does not change the answers."""
    max_new_tokens: int = 32
    """Where an answer without an end is cut."""
    limit: int | None = None
    """At most so many questions of each task, drawn by ``seed``; null asks all."""
    blind: bool = False
    """Ask everything twice more without the images: grey ones, and those of another question of the task."""
    timing: bool = False
    """Time prefill and decoding, dense against the plan."""
    timing_samples: int = 8
    """Questions that are timed, one by one."""
    seed: int = 0
    """Seeds ``limit`` and the shuffled images."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; null takes the GPU if there is one."""
    precision: str | None = None
    """``fp32``, ``bf16`` or ``fp16``; null keeps what the checkpoint was saved in."""


def run(cfg: Config) -> None:
    """Load, ask, count, write ``evaluation.json``, print the table."""
    for name in ("batch_size", "max_new_tokens", "timing_samples"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{name}: {getattr(cfg, name)}; at least 1")
    from skipvision_train.data.recipes import load_recipe, load_records
    from skipvision_train.evaluation.evaluate import blind_scores, predict, sample_cost
    from skipvision_train.evaluation.loading import load_for_inference, package_versions
    from skipvision_train.evaluation.results import EvaluationResult, Scores

    records = limit_per_task(load_records(load_recipe(cfg.recipe, cfg.data_root)), cfg.limit, cfg.seed)
    model, processor = load_for_inference(cfg.checkpoint, cfg.plan, cfg.device, cfg.precision)
    log.info("%d questions, plan %s, on %s", len(records), model.plan.name, model.device)
    root = None if cfg.data_root is None else Path(cfg.data_root)
    ask = partial(predict, model, processor, batch_size=cfg.batch_size, max_new_tokens=cfg.max_new_tokens, root=root)
    predictions = by_task(cfg.plan, model, records, ask) if is_mixed(cfg.plan) else ask(records)
    blind = None
    if cfg.blind:
        log.info("the same questions without their images")
        blind = blind_scores(model, processor, records, cfg.batch_size, cfg.max_new_tokens, cfg.seed)
    result = EvaluationResult(
        checkpoint=cfg.checkpoint,
        recipe=cfg.recipe,
        plan=model.plan,
        scores=Scores.of(predictions),
        cost=sample_cost(model, predictions),
        predictions=tuple(predictions),
        blind=blind,
        timing=time_plans(model, processor, records[: cfg.timing_samples]) if cfg.timing else None,
        seed=cfg.seed,
        versions=package_versions(),
    )
    result.save(Path(cfg.output) / "evaluation.json")
    sys.stdout.write(table(result) + "\n")
    log.info("wrote %s", Path(cfg.output) / "evaluation.json")


def is_mixed(plan: PlanSpec) -> bool:
    """Whether every record runs under its own task's plan."""
    return plan.method == "bank" and plan.task is None


def by_task(
    plan: PlanSpec,
    model: SkipVisionForConditionalGeneration,
    records: Sequence[Record],
    ask: Callable[[Sequence[Record]], list[Prediction]],
) -> list[Prediction]:
    """Ask every record under the plan that the bank holds for its task; the model's plan is the same afterwards.

    Raises:
        PlanError: the bank is another model's.
    """
    from skipvision_train.calibration.subject import model_hash
    from skipvision_train.config.plans import load_bank
    from skipvision_train.evaluation.evaluate import task_of

    bank, own = load_bank(plan, model_hash(model)), model.plan

    def run(task_plan: SkipPlan, rows: Sequence[int]) -> list[Prediction]:
        model.set_plan(task_plan)
        return ask([records[row] for row in rows])

    try:
        return bank.run_mixed([task_of(record) for record in records], run)
    finally:
        model.set_plan(own)


def limit_per_task(records: Sequence[Record], limit: int | None, seed: int) -> list[Record]:
    """At most ``limit`` records of each task, drawn by ``seed``, in the order of the data.

    Raises:
        ConfigError: ``limit`` is not positive.
    """
    from skipvision_train.evaluation.evaluate import task_of

    if limit is None:
        return list(records)
    if limit < 1:
        raise ConfigError(f"limit: {limit}; at least 1, or null for all")
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(task_of(record), []).append(index)
    chosen: list[int] = []
    for task, members in groups.items():
        chosen += random.Random(f"{seed}/limit/{task}").sample(members, min(limit, len(members)))
    return [records[index] for index in sorted(chosen)]


def time_plans(
    model: SkipVisionForConditionalGeneration, processor: SkipVisionProcessor, records: Sequence[Record]
) -> dict[str, Timing]:
    """Time the dense plan against the model's current one, one record at a time."""
    from skipvision_train.evaluation.evaluate import file_images, prompt_batches
    from skipvision_train.evaluation.timing import measure_plans
    from skipvision_train.plans import dense

    batches = list(prompt_batches(model, processor, records, file_images(records), 1))
    return measure_plans(model, batches, {"dense": dense().bind(model.plan.num_layers), "plan": model.plan})


def table(result: EvaluationResult) -> str:
    """Accuracy per task as text."""
    blind = result.blind.scores if result.blind else None
    lines = [f"{'task':<16}{'n':>7}{'accuracy':>11}{'95 % interval':>18}" + (f"{'blind':>9}" if blind else "")]

    def line(name: str, value: Accuracy, without: Accuracy | None) -> str:
        interval = f"{100 * value.low:.1f} to {100 * value.high:.1f}"
        seen = f"{name:<16}{value.total:>7}{100 * value.value:>10.1f}%{interval:>18}"
        return seen + (f"{100 * without.value:>8.1f}%" if without else "")

    for task, value in result.scores.tasks.items():
        lines.append(line(task, value, blind.tasks[task] if blind else None))
    lines.append(line("mean", result.scores.mean, blind.mean if blind else None))
    cost = result.cost
    share = 100 * cost.decoder_plan / cost.decoder_dense
    lines.append(
        f"plan {result.plan.name}: decoder {cost.decoder_plan / 1e9:.2f} GFLOPs a prompt, {share:.1f} % of dense"
    )
    for name, timing in (result.timing or {}).items():
        lines.append(
            f"{name}: prefill {timing.prefill_ms:.1f} ms, {timing.decode_ms:.1f} ms per token, "
            f"KV cache {timing.kv_bytes / 1024:.1f} KiB"
        )
    return "\n".join(lines)
