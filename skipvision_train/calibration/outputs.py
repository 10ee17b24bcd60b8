"""What a calibration leaves behind: plans, scores, pictures, and the table on the terminal."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from skipvision_train.analysis.calibration_figures import seed_bands, skip_map, transfer_matrix, vig_by_task
from skipvision_train.analysis.calibration_report import budgets_for, score_intervals, skipped_by_budget, task_scores
from skipvision_train.analysis.figures import log_figures, to_png
from skipvision_train.calibration import search
from skipvision_train.calibration.bank import BankFacts, PlanBank
from skipvision_train.calibration.scores import STRATEGIES, ScoreTable
from skipvision_train.calibration.session import UNIVERSAL, Found, Session
from skipvision_train.files import write_json
from skipvision_train.inference.loading import package_versions
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.plan import SkipPlan
from skipvision_train.plans.rules import TokenKind

log = logging.getLogger(__name__)

PICTURES = ("vig", "vig_by_task", "skip_map", "seeds", "transfer")
"""What may be drawn."""

FILES = (
    *("plan.json", "vig.json", "scores.json", "seeds.json", "transfer.json", "bank/*.json"),
    *(f"{name}.png" for name in PICTURES),
)
"""What may be written."""


def chosen_layers(session: Session, plan: SkipPlan) -> list[int]:
    """The layers in which ``plan`` leaves out more than the base plan."""
    return [i for i, (rule, base) in enumerate(zip(plan.rules, session.base.rules, strict=True)) if rule != base]


def source_of(session: Session, task: str) -> str:
    """The task whose samples chose the plan of ``task``; "" for all samples."""
    cfg = session.cfg
    return cfg.universal if task == UNIVERSAL and cfg.bank and cfg.universal != "pooled" else task


def provenance(session: Session, found: Found, task: str) -> dict[str, Any]:
    """How a plan was found: enough to find it again."""
    cfg, table = session.cfg, found.table
    source = source_of(session, task)
    scores = session.universal_scores(table) if task == UNIVERSAL else table.mean(task)
    return {
        "method": STRATEGIES[table.strategy].describe(),
        "strategy": table.strategy,
        "search": cfg.strategy.search,
        "checkpoint": cfg.checkpoint,
        "model_hash": session.model_hash,
        "base_plan": session.base.name,
        "recipe": cfg.recipe or cfg.prompts,
        "task": source or cfg.task,
        "universal": cfg.universal if task == UNIVERSAL and cfg.bank else None,
        "records": [name for name, own in zip(table.samples, table.tasks, strict=True) if source in (UNIVERSAL, own)],
        "positions": cfg.positions,
        "seed": cfg.seed,
        "draws": cfg.draws,
        "bypass": table.bypass,
        "scores": scores.tolist(),
        "versions": package_versions(),
    }


def write(session: Session, found: Found, output: Path) -> dict[str, Figure]:
    """Write those of :data:`FILES` that this calibration has into an empty folder; the pictures by file name."""
    cfg = session.cfg
    plans = {task: replace(plan, provenance=provenance(session, found, task)) for task, plan in found.plans.items()}
    universal = plans[UNIVERSAL]
    universal.save(output / "plan.json")
    facts = {**universal.provenance, "threshold": cfg.budget.threshold, "kl": asdict(found.cost)}
    layers = chosen_layers(session, universal)
    write_json(output / "vig.json", {**facts, "layers": layers, "plan": universal.name})
    write_json(output / "scores.json", found.table.to_dict())
    if cfg.draws > 1:
        write_json(output / "seeds.json", seeds(session, found.table))
    if cfg.transfer:
        write_json(output / "transfer.json", found.transfer())
    if cfg.bank:
        write_bank(session, found.table, plans, output / "bank")
    pictures = figures(session, found)
    for name, figure in pictures.items():
        (output / f"{name}.png").write_bytes(to_png(figure))
    return pictures


def seeds(session: Session, table: ScoreTable) -> dict[str, Any]:
    """Per draw its scores and the layers that they choose, as the report reads them, and how far the draws agree."""
    scores = torch.stack([session.universal_scores(table.of(drawn)) for drawn in session.drawn])
    if session.cfg.strategy.search != "top":  # a search does not choose by these scores alone
        return {"scores": scores.tolist(), "layers": [[] for _ in scores]}
    layers = [list(search.count_for(own, session.cfg.budget.layers())) for own in scores]
    found = search.stability(scores, layers)
    spread = {"variance": found.variance.tolist(), "overlap": found.mean_overlap}
    return {"scores": scores.tolist(), "layers": layers, **spread}


def write_bank(session: Session, table: ScoreTable, plans: Mapping[str, SkipPlan], path: Path) -> None:
    """One plan per task, and the universal one; ``plans`` know where they come from."""
    cfg = session.cfg
    tasks = {task: plan for task, plan in plans.items() if task != UNIVERSAL}
    facts = BankFacts(
        model_hash=session.model_hash,
        base_plan=session.base.name,
        strategy=table.strategy,
        bypass=table.bypass,
        seed=cfg.seed,
        samples={task: plan.provenance["records"] for task, plan in tasks.items()},
        versions=package_versions(),
        created=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
    PlanBank.create(path, tasks, plans[UNIVERSAL], facts)


def figures(session: Session, found: Found) -> dict[str, Figure]:
    """The pictures by file name, of :data:`PICTURES`."""
    table, layers = found.table, chosen_layers(session, found.plans[UNIVERSAL])
    tasks = task_scores(table)
    mean, unit = table.mean().tolist(), STRATEGIES[table.strategy].unit
    scores = session.universal_scores(table).tolist()

    def profile(lines: Mapping[str, list[float]]) -> Figure:
        intervals, threshold = score_intervals(table, scores), session.cfg.budget.threshold
        source = session.cfg.task if lines else source_of(session, UNIVERSAL) or session.cfg.task
        title = f"{table.strategy}, {source or 'all samples'}"
        return vig_by_task(lines, scores, intervals, layers, threshold, title=title, unit=unit)

    pictures = {"vig": profile({})}
    if len(tasks) > 1:
        pictures["vig_by_task"] = profile(tasks)
    rows = {**tasks, "all samples": mean} if len(tasks) > 1 else {"all samples": mean}
    pictures["skip_map"] = skip_map(
        skipped_by_budget(rows, budgets_for(len(mean))), len(mean), title=f"Layers that skip, by {table.strategy}"
    )
    if session.cfg.draws > 1:
        drawn = seeds(session, table)
        pictures["seeds"] = seed_bands(drawn["scores"], drawn["layers"], unit=unit)
    if session.cfg.transfer:
        matrix = found.transfer()
        title = "KL (nats) of tasks' plans, on the samples that chose them"
        pictures["transfer"] = transfer_matrix(
            matrix["kl"], matrix["calibrated_on"], matrix["evaluated_on"], title=title
        )
    return pictures


def log_to_wandb(project: str, session: Session, found: Found, pictures: Mapping[str, Figure]) -> None:
    """Scores and the plan's cost as a summary, and the pictures; ``WANDB_MODE=offline`` works."""
    import wandb

    run = wandb.init(project=project, job_type="calibrate")
    for layer, score in enumerate(session.universal_scores(found.table).tolist()):
        run.summary[f"score/layer_{layer}"] = score
    run.summary["kl"] = found.cost.value
    log_figures(run, pictures)
    run.finish()


def report(session: Session, found: Found) -> str:
    """The table for the terminal: score per layer and task, what skips, what that costs and saves."""
    table, universal = found.table, found.plans[UNIVERSAL]
    layers, scores = chosen_layers(session, universal), session.universal_scores(table).tolist()
    unit, intervals = STRATEGIES[table.strategy].unit, score_intervals(table, scores)
    lines = [f"{'layer':>5}  {f'{table.strategy} ({unit})':>18}  {'95 % interval':>22}"]
    for i, score in enumerate(scores):
        shown = "{:.2e} to {:.2e}".format(*intervals[i]) if intervals else ""
        lines.append(f"{i:>5}  {score:>18.4e}  {shown:>22}{'  skipped' if i in layers else ''}")
    lines += [universal.table(), saving(session, universal)]
    cost, samples, source = found.cost, len(table.samples), source_of(session, UNIVERSAL)
    lines.append(
        f"the whole plan moves the output by {cost.value:.3e} nats ({cost.low:.2e} to {cost.high:.2e}), on the "
        f"{samples} samples" + (f", {table.tasks.count(source)} of which chose it" if source else " that chose it")
    )
    drawn = seeds(session, table) if session.cfg.draws > 1 else {}
    if "overlap" in drawn:
        lines.append(f"{session.cfg.draws} draws: their layers overlap by {drawn['overlap']:.2f} (mean Jaccard index)")
    for task in sorted(set(found.plans) - {UNIVERSAL}):
        lines.append(f"{task}: layers {', '.join(map(str, chosen_layers(session, found.plans[task])))}")
    return "\n".join(lines)


def saving(session: Session, plan: SkipPlan) -> str:
    """What the plan leaves of the decoder's prefill, against dense and against the base plan, and of which prompt."""
    config = find_decoder(session.model).config
    ratio = search.flops_ratio(config, session.kind_counts, plan)
    text = f"prefill of the decoder: {100 * ratio:.1f} % of the dense FLOPs"
    if not session.base.is_dense:
        text += f" ({100 * search.flops_ratio(config, session.kind_counts, session.base):.1f} % without it)"
    counts = session.kind_counts
    words = counts.get(TokenKind.TEXT, 0.0)
    visual = sum(number for kind, number in counts.items() if kind not in (TokenKind.TEXT, TokenKind.PAD))
    return f"{text}, for {words:.0f} text and {visual:.0f} visual tokens, the samples' mean"
