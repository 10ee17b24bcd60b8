"""``skipvision evaluate``: scores per task, blind scores, cost and time of a model under a plan."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvision_train.config.plans import PlanSpec
from skipvision_train.errors import ConfigError
from skipvision_train.folders import ResultsFolder

if TYPE_CHECKING:
    from PIL.Image import Image

    from skipvision_train.data.processor import SkipVisionProcessor
    from skipvision_train.data.records import Record
    from skipvision_train.evaluation.evaluate import ImageSource
    from skipvision_train.evaluation.metrics import Accuracy
    from skipvision_train.evaluation.results import (
        BlindScores,
        EvaluationResult,
        Prediction,
        SampleCost,
        Scores,
        Timing,
    )
    from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
    from skipvision_train.plans.plan import SkipPlan

    Groups = Sequence[tuple[SkipPlan, list[int]]]

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Settings of ``skipvision evaluate``."""

    checkpoint: str = "???"
    """Model directory."""
    recipe: str = "???"
    """Questions: name of a file in ``data_recipes/`` or path of a recipe file, with ``:split`` where it has any. A
    record's last answer is what is asked for; results are grouped by ``task``, or by source without one."""
    metric: str | None = None
    """How answers are scored where neither the record nor its source names a ``metric`` (``docs/evaluation.md``); null
    is exact match."""
    data_root: str | None = None
    """Directory that the recipe's paths are relative to; image paths in the result are relative to it as well."""
    output: str = "???"
    """Folder for ``evaluation.json``."""
    overwrite: bool = False
    """Replace the results of another configuration that stand in ``output``; without it they are refused. The same
    configuration is measured again, and its results are replaced."""
    plan: PlanSpec = field(default_factory=lambda: PlanSpec("own"))
    """The plan: a file of ``conf/plan`` and its fields, or a plan file's path; ``own`` is what the checkpoint has."""
    batch_size: int = 16
    """Records per forward pass; does not change the answers but for rounding in 16 bits."""
    max_new_tokens: int = 32
    """Where an answer without an end is cut."""
    limit: int | None = None
    """At most so many questions of each task, drawn by ``seed``, of MME in pairs; null asks all."""
    blind: bool = False
    """Ask everything twice more without the images: grey ones, and those of another question of the task."""
    timing: bool = False
    """Time prefill and decoding, dense against the plan; of a bank, against its universal plan."""
    timing_samples: int = 8
    """Questions that are timed, one by one."""
    seed: int = 0
    """Seeds ``limit``, the shuffled images and resampled intervals."""
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
    from skipvision_train.evaluation.evaluate import blind_scores, derange, file_images, task_of
    from skipvision_train.evaluation.results import EvaluationResult, Scores
    from skipvision_train.evaluation.tasks import check_targets, with_metric
    from skipvision_train.inference.loading import load_for_inference, package_versions

    folder = ResultsFolder.open("evaluate", cfg, ("evaluation.json",))
    records = with_metric(load_records(load_recipe(cfg.recipe, cfg.data_root)).read_all(), cfg.metric)
    check_targets(records, task_of)
    records = limit_per_task(records, cfg.limit, cfg.seed)
    if cfg.blind:
        derange(records, cfg.seed)  # what cannot be shuffled is noticed here, not behind the evaluation
    model, processor = load_for_inference(cfg.checkpoint, cfg.plan, cfg.device, cfg.precision)
    plan, groups = plan_groups(cfg.plan, model, records)
    log.info("%d questions, plan %s, on %s", len(records), plan.name, model.device)
    answers = partial(ask, cfg, model, processor, records, groups)
    predictions = answers(file_images(records))
    blind = None
    if cfg.blind:
        log.info("the same questions without their images")
        if is_mixed(cfg.plan):
            blind = blind_by_task(answers, records, cfg.seed)
        else:
            blind = blind_scores(model, processor, records, cfg.batch_size, cfg.max_new_tokens, cfg.seed)
    result = EvaluationResult(
        checkpoint=cfg.checkpoint,
        recipe=cfg.recipe,
        plan=plan,
        scores=Scores.of(predictions, cfg.seed),
        cost=mean_cost(model, predictions, groups),
        predictions=tuple(predictions),
        blind=blind,
        timing=time_plans(model, processor, records[: cfg.timing_samples]) if cfg.timing else None,
        seed=cfg.seed,
        versions=package_versions(),
    )
    with folder.writing() as output:
        result.save(output / "evaluation.json")
    sys.stdout.write(table(result) + "\n")
    log.info("wrote %s", folder.path / "evaluation.json")


def is_mixed(plan: PlanSpec) -> bool:
    """Whether every record runs under its own task's plan."""
    return plan.method == "bank" and plan.task is None


def plan_groups(
    spec: PlanSpec, model: SkipVisionForConditionalGeneration, records: Sequence[Record]
) -> tuple[SkipPlan, Groups]:
    """What the result names as its plan, and every plan with the indices of the records that run under it.

    That is the model's plan and all records, but for a bank without ``plan.task``: there the named plan has the rules
    of the universal one, and its provenance holds the plan of every task (``plans``).

    Raises:
        PlanError: a bank of another model.
    """
    from skipvision_train.config.plans import load_bank
    from skipvision_train.evaluation.evaluate import task_of
    from skipvision_train.models.identity import model_hash

    if spec.method != "bank":
        return model.plan, [(model.plan, list(range(len(records))))]
    bank = load_bank(spec, model_hash(model))
    if spec.task is not None:
        return model.plan, [(model.plan, list(range(len(records))))]
    tasks = [task_of(record) for record in records]
    facts = {"bank": str(bank.path), "plans": {task: bank.plan_for(task).to_dict() for task in sorted(set(tasks))}}
    return replace(model.plan, name=f"bank {bank.path}", provenance=facts), bank.groups(tasks)


def ask(
    cfg: Config,
    model: SkipVisionForConditionalGeneration,
    processor: SkipVisionProcessor,
    records: Sequence[Record],
    groups: Groups,
    images_of: ImageSource,
) -> list[Prediction]:
    """The answers to all records, each under its group's plan; the model's plan is the same afterwards.

    Args:
        cfg: batch size, length of answers and data root.
        model, processor: as loaded.
        records: the questions.
        groups: plans, and the indices of their records.
        images_of: what is shown, by the index in ``records``.
    """
    from skipvision_train.evaluation.evaluate import predict

    root = None if cfg.data_root is None else Path(cfg.data_root)
    own = model.plan
    found: dict[int, Prediction] = {}
    try:
        for plan, rows in groups:
            model.set_plan(plan)
            made = predict(
                model,
                processor,
                [records[row] for row in rows],
                cfg.batch_size,
                cfg.max_new_tokens,
                partial(_shown, images_of, rows),
                root,
            )
            found.update(zip(rows, made, strict=True))
    finally:
        model.set_plan(own)
    return [found[row] for row in range(len(records))]


def _shown(images_of: ImageSource, rows: Sequence[int], index: int) -> list[Image]:
    return images_of(rows[index])


def blind_by_task(
    answers: Callable[[ImageSource], list[Prediction]], records: Sequence[Record], seed: int
) -> BlindScores:
    """As ``evaluation.evaluate.blind_scores``, every record under its own task's plan."""
    from skipvision_train.evaluation.evaluate import file_images, grey_images, shuffled_images
    from skipvision_train.evaluation.results import BlindScores, Scores

    own = file_images(records)
    variants = {"grey": grey_images(own), "shuffled": shuffled_images(records, own, seed)}
    scores = {name: Scores.of(answers(source), seed) for name, source in variants.items()}
    best = max(scores, key=lambda name: scores[name].mean.value)
    return BlindScores(best, scores[best], {name: score.mean.value for name, score in scores.items()})


def mean_cost(
    model: SkipVisionForConditionalGeneration, predictions: Sequence[Prediction], groups: Groups
) -> SampleCost:
    """Cost of a prefill, mean over all prompts, each under its group's plan; the model's is the same afterwards."""
    from skipvision_train.evaluation.evaluate import sample_cost
    from skipvision_train.evaluation.results import SampleCost

    own, costs = model.plan, []
    try:
        for plan, rows in groups:
            model.set_plan(plan)
            costs.append((len(rows), asdict(sample_cost(model, [predictions[row] for row in rows]))))
    finally:
        model.set_plan(own)

    def mean(values: Iterable[float]) -> float:
        return sum(rows * value for (rows, _), value in zip(costs, values, strict=True)) / len(predictions)

    means: dict[str, Any] = {}
    for name, first in costs[0][1].items():
        if isinstance(first, dict):
            means[name] = {key: mean(cost[name][key] for _, cost in costs) for key in first}
        else:
            means[name] = mean(cost[name] for _, cost in costs)
    return SampleCost(**means)


def limit_per_task(records: Sequence[Record], limit: int | None, seed: int) -> list[Record]:
    """At most ``limit`` records of each task, drawn by ``seed``, in the order of the data; MME's pairs stay together.

    Raises:
        ConfigError: ``limit`` is not positive, or less than a pair.
    """
    from skipvision_train.evaluation.evaluate import task_of
    from skipvision_train.evaluation.tasks import target_of

    if limit is None:
        return list(records)
    if limit < 1:
        raise ConfigError(f"limit: {limit}; at least 1, or null for all")
    tasks: dict[str, dict[object, list[int]]] = {}
    for index, record in enumerate(records):
        target = target_of(record)
        unit = (target.category, target.group) if target.metric == "mme" else index
        tasks.setdefault(task_of(record), {}).setdefault(unit, []).append(index)
    chosen: list[int] = []
    for task, units in tasks.items():
        if (size := max(map(len, units.values()))) > limit:
            raise ConfigError(f"limit: {limit}; task {task!r} scores {size} questions together, so at least {size}")
        drawn = random.Random(f"{seed}/limit/{task}").sample(list(units.values()), min(limit // size, len(units)))
        chosen += [index for unit in drawn for index in unit]
    return [records[index] for index in sorted(chosen)]


def time_plans(
    model: SkipVisionForConditionalGeneration, processor: SkipVisionProcessor, records: Sequence[Record]
) -> dict[str, Timing]:
    """Time the dense plan against the model's current one (a bank's universal plan), one record at a time."""
    from skipvision_train.evaluation.evaluate import file_images, prompt_batches
    from skipvision_train.evaluation.timing import measure_plans
    from skipvision_train.plans import dense

    batches = list(prompt_batches(model, processor, records, file_images(records), 1))
    return measure_plans(model, batches, {"dense": dense().bind(model.plan.num_layers), "plan": model.plan})


def table(result: EvaluationResult) -> str:
    """Scores per task as text, and beneath them the figures of benchmarks that have their own."""
    blind = result.blind.scores if result.blind else None
    lines = [f"{'task':<16}{'n':>7}{'accuracy':>11}{'95 % interval':>18}" + (f"{'blind':>9}" if blind else "")]

    def line(name: str, value: Accuracy, without: Accuracy | None) -> str:
        interval = f"{100 * value.low:.1f} to {100 * value.high:.1f}"
        seen = f"{name:<16}{value.total:>7}{100 * value.value:>10.1f}%{interval:>18}"
        return seen + (f"{100 * without.value:>8.1f}%" if without else "")

    for task, value in result.scores.tasks.items():
        lines.append(line(task, value, blind.tasks[task] if blind else None))
    lines.append(line("mean", result.scores.mean, blind.mean if blind else None))
    lines += figure_lines(result.scores)
    cost = result.cost
    share = 100 * cost.decoder_plan / cost.decoder_dense
    lines.append(
        f"plan {result.plan.name}: decoder {cost.decoder_plan / 1e9:.2f} GFLOPs a prompt, {share:.1f} % of dense"
    )
    mixed = "bank" in result.plan.provenance
    for name, timing in (result.timing or {}).items():
        timed = "the universal plan" if mixed and name == "plan" else name
        lines.append(
            f"{timed}: prefill {timing.prefill_ms:.1f} ms, {timing.decode_ms:.1f} ms per token, "
            f"KV cache {timing.kv_bytes / 1024:.1f} KiB"
        )
    return "\n".join(lines)


def figure_lines(scores: Scores) -> list[str]:
    """A line per figure of the tasks that have any: shares in per cent, points with what could be reached."""
    lines = []
    for task, figures in scores.details.items():
        if figures:
            lines.append(f"{task} ({scores.metrics[task]})")
        for name, figure in figures.items():
            scale, sign, digits = (100, "%", 1) if figure.maximum == 1 else (1, f" of {figure.maximum:.0f}", 2)
            low, high = (f"{scale * bound:.{digits}f}" for bound in (figure.low, figure.high))
            lines.append(f"  {name}: {scale * figure.value:.{digits}f}{sign} ({low} to {high}), n {figure.total}")
    return lines
