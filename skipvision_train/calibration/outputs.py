"""What a calibration leaves behind: plans, scores, pictures, and the table on the terminal."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from skipvision_train.analysis.calibration_figures import seed_bands, skip_map, vig_by_task
from skipvision_train.analysis.calibration_report import budgets_for
from skipvision_train.analysis.figures import log_figures, to_png, vig_profile
from skipvision_train.calibration import search
from skipvision_train.calibration.bank import BankFacts, PlanBank
from skipvision_train.calibration.scores import STRATEGIES, ScoreTable
from skipvision_train.calibration.session import UNIVERSAL, Session
from skipvision_train.evaluation.loading import package_versions
from skipvision_train.evaluation.results import write_json
from skipvision_train.plans.families import find_decoder
from skipvision_train.plans.plan import SkipPlan

if TYPE_CHECKING:
    from skipvision_train.commands.calibrate import Config

log = logging.getLogger(__name__)


def chosen_layers(session: Session, plan: SkipPlan) -> list[int]:
    """The layers in which ``plan`` leaves out more than the base plan."""
    return [i for i, (rule, base) in enumerate(zip(plan.rules, session.base.rules, strict=True)) if rule != base]


def provenance(session: Session, table: ScoreTable, task: str) -> dict[str, Any]:
    """How a plan was found: enough to find it again."""
    cfg = session.cfg
    named = [i for i, own in enumerate(table.tasks) if task in (UNIVERSAL, own)]
    return {
        "method": STRATEGIES[table.strategy].describe(),
        "strategy": table.strategy,
        "search": cfg.strategy.search,
        "checkpoint": cfg.checkpoint,
        "model_hash": session.model_hash,
        "base_plan": session.base.name,
        "recipe": cfg.recipe or cfg.prompts,
        "task": task or cfg.task,
        "records": [table.samples[i] for i in named],
        "positions": cfg.positions,
        "seed": cfg.seed,
        "draws": cfg.draws,
        "bypass": table.bypass,
        "scores": table.mean(task or None).tolist(),
        "versions": package_versions(),
    }


def write(cfg: Config, session: Session, table: ScoreTable, plans: Mapping[str, SkipPlan]) -> None:
    """Write everything below ``cfg.output``."""
    output = Path(cfg.output)
    plans = {task: replace(plan, provenance=provenance(session, table, task)) for task, plan in plans.items()}
    universal = plans[UNIVERSAL]
    universal.save(output / "plan.json")
    layers, scores = chosen_layers(session, universal), table.mean().tolist()
    facts = {**universal.provenance, "threshold": cfg.budget.threshold}
    write_json(output / "vig.json", {**facts, "scores": scores, "layers": layers, "plan": universal.name})
    write_json(output / "scores.json", table.to_dict())
    if cfg.draws > 1:
        write_json(output / "seeds.json", seeds(session, table))
    if cfg.bank:
        write_bank(cfg, session, table, plans)
    pictures = figures(session, table, plans)
    for name, figure in pictures.items():
        (output / f"{name}.png").write_bytes(to_png(figure))
    if cfg.wandb_project is not None:
        log_to_wandb(cfg.wandb_project, table, pictures)


def seeds(session: Session, table: ScoreTable) -> dict[str, Any]:
    """Per draw its scores and the layers that they choose, as the report reads them."""
    column = {name: i for i, name in enumerate(table.samples)}
    tables = [table.values[:, [column[name] for name in drawn]].mean(-1) for drawn in session.drawn]
    if session.cfg.strategy.search == "top":
        layers = [search.count_for(scores, session.cfg.budget.layers()) for scores in tables]
    else:
        layers = [()] * len(tables)
    return {"scores": [scores.tolist() for scores in tables], "layers": [list(own) for own in layers]}


def write_bank(cfg: Config, session: Session, table: ScoreTable, plans: Mapping[str, SkipPlan]) -> None:
    """One plan per task, and the universal one."""
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
    PlanBank.create(Path(cfg.output) / "bank", tasks, plans[UNIVERSAL], facts)


def figures(session: Session, table: ScoreTable, plans: Mapping[str, SkipPlan]) -> dict[str, Figure]:
    """The pictures by file name."""
    layers = chosen_layers(session, plans[UNIVERSAL])
    title = f"{table.strategy}, {session.cfg.task or 'all tasks'}"
    found = {"vig": vig_profile(table.mean().tolist(), layers, title=title)}
    if len(set(table.tasks)) > 1:
        tasks = {task: table.mean(task).tolist() for task in sorted(set(table.tasks))}
        found["vig_by_task"] = vig_by_task(
            tasks,
            table.mean().tolist(),
            interval=table.interval().tolist(),
            chosen=layers,
            threshold=session.cfg.budget.threshold,
            unit=STRATEGIES[table.strategy].unit,
        )
        depth = session.base.num_layers
        budgets = budgets_for(depth)
        orders = {task: search.rank_layers(table.mean(task)) for task in sorted(set(table.tasks))}
        found["skip_map"] = skip_map(
            {n: {task: sorted(order[:n]) for task, order in orders.items()} for n in budgets}, depth
        )
    if session.cfg.draws > 1:
        drawn = seeds(session, table)
        found["seeds"] = seed_bands(drawn["scores"], drawn["layers"], unit=STRATEGIES[table.strategy].unit)
    return found


def log_to_wandb(project: str, table: ScoreTable, pictures: Mapping[str, Figure]) -> None:
    """Scores as a summary and the pictures; ``WANDB_MODE=offline`` works."""
    import wandb

    run = wandb.init(project=project, job_type="calibrate")
    for layer, score in enumerate(table.mean().tolist()):
        run.summary[f"score/layer_{layer}"] = score
    log_figures(run, pictures)
    run.finish()


def report(session: Session, table: ScoreTable, plans: Mapping[str, SkipPlan]) -> str:
    """The table for the terminal: score per layer and task, what skips, what that saves."""
    universal = plans[UNIVERSAL]
    layers, mean, interval = chosen_layers(session, universal), table.mean(), table.interval()
    unit = STRATEGIES[table.strategy].unit
    lines = [f"{'layer':>5}  {f'{table.strategy} ({unit})':>18}  {'95 % interval':>22}"]
    for i, (score, (low, high)) in enumerate(zip(mean.tolist(), interval.tolist(), strict=True)):
        skipped = "  skipped" if i in layers else ""
        lines.append(f"{i:>5}  {score:>18.4e}  {f'{low:.2e} to {high:.2e}':>22}{skipped}")
    lines += [universal.table(), saving(session, universal)]
    for task in sorted(set(plans) - {UNIVERSAL}):
        lines.append(f"{task}: layers {', '.join(map(str, chosen_layers(session, plans[task])))}")
    return "\n".join(lines)


def saving(session: Session, plan: SkipPlan) -> str:
    """What the plan leaves of the decoder's prefill, against dense and against the base plan."""
    config = find_decoder(session.model).config
    ratio = search.flops_ratio(config, session.kind_counts, plan)
    text = f"prefill of the decoder: {100 * ratio:.1f} % of the dense FLOPs"
    if not session.base.is_dense:
        text += f" ({100 * search.flops_ratio(config, session.kind_counts, session.base):.1f} % without it)"
    return text
