"""KL and accuracy against the number of skipped layers; searches compared; transfer of plans between tasks.

python benchmarks/skip_curves.py --checkpoint outputs/demo/sft/model --data outputs/demo/data --output outputs/curves

Layers are chosen on 20 samples (--samples) of the held-out split, a task's own on 20 of that task (--task-samples); KL
and accuracy are measured on others. ``skipvision report evaluations=[...] vig=[outputs/curves]`` shows it all.
Run again with the same settings, it goes on after the last finished point of the curves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from skipvision_train.analysis.calibration_figures import (
    budget_curves,
    functional_asymmetry,
    join_seeds,
    transfer_matrix,
)
from skipvision_train.analysis.figures import to_png
from skipvision_train.calibration import curves, search
from skipvision_train.calibration.samples import Sample, draw, record_samples, subtask
from skipvision_train.calibration.scores import STRATEGIES, ScoreTable, plan_divergence, score_layers
from skipvision_train.calibration.session import mean_kinds
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.data.records import Record
from skipvision_train.evaluation.evaluate import predict
from skipvision_train.evaluation.metrics import Accuracy, accuracy
from skipvision_train.evaluation.results import Prediction
from skipvision_train.files import read_json, write_json
from skipvision_train.inference.loading import load_for_inference
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import SkipPlan, compose, ffn_skip, shortv, vskip
from skipvision_train.plans.rules import TokenKind

MEASURED = tuple(name for name, strategy in STRATEGIES.items() if strategy.divergence is not None)
TOP: dict[str, tuple[str, Callable[..., SkipPlan]]] = {
    "V-Skip": ("vig", vskip),
    "FFN-Skip": ("vig_ffn", ffn_skip),
    "ShortV by VIG": ("vig_block", shortv),
}
"""Methods with one rule: the strategy that ranks its layers, and the plan of the chosen ones."""


@dataclass
class Bench:
    """A model and the samples that everything is measured on.

    Attributes:
        model: under its own plan, on top of which every plan stands.
        processor: the model's.
        chosen_on: layers are chosen on these.
        by_task: per task, a task's own layers are chosen on these.
        held_out: KL is measured on these.
        asked: accuracy is measured on these.
        kinds: positions of each kind, mean over ``held_out``.
        answers: per plan, what it answered.
        costs: per plan, its KL on ``held_out``.
    """

    model: SkipVisionForConditionalGeneration
    processor: Any
    chosen_on: list[Sample]
    by_task: dict[str, list[Sample]]
    held_out: list[Sample]
    asked: list[Record]
    kinds: dict[TokenKind, float]
    answers: dict[SkipPlan, list[Prediction]] = field(default_factory=dict)
    costs: dict[SkipPlan, Tensor] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return self.model.plan.num_layers

    def kl(self, plan: SkipPlan, samples: Sequence[Sample] | None = None) -> Tensor:
        """(samples,) KL(P || P under the plan), both on top of the model's own plan; None takes the held-out ones.

        Those of equal plans are measured once.
        """
        own, key = self.model.plan, replace(plan.bind(self.depth), name="")
        if samples is not None:
            return plan_divergence(self.model, samples, compose([own, plan]), base=own)
        if key not in self.costs:
            self.costs[key] = plan_divergence(self.model, self.held_out, compose([own, plan]), base=own)
        return self.costs[key]

    def flops(self, plan: SkipPlan) -> float:
        """Prefill of the decoder under ``plan`` on top of the model's own, over the dense one."""
        return search.flops_ratio(
            self.model.config.text_config, self.kinds, compose([self.model.plan, plan]).bind(self.depth)
        )

    def scores(self, strategy: str, plan: SkipPlan | None = None, seed: int = 0) -> ScoreTable:
        """All layers' scores on top of ``plan``, by default the model's own."""
        return score_layers(self.model, self.chosen_on, strategy, base=plan or self.model.plan, seed=seed)

    def mean_scores(self, strategy: str, plan: SkipPlan) -> Tensor:
        """(layers,) what a search asks for."""
        return self.scores(strategy, plan).mean()

    def predictions(self, plan: SkipPlan) -> list[Prediction]:
        """The answers to ``asked`` under ``plan`` on top of the model's own; plans that are equal are asked once."""
        key = replace(plan.bind(self.depth), name="")
        if key not in self.answers:
            own = self.model.plan
            self.model.set_plan(compose([own, plan]))
            try:
                self.answers[key] = predict(self.model, self.processor, self.asked, 50, 12)
            finally:
                self.model.set_plan(own)
        return self.answers[key]

    def accuracy(self, plan: SkipPlan, task: str | None = None) -> Accuracy:
        """Exact match, on all questions or on those of one task."""
        right = [p.correct for p in self.predictions(plan) if task in (None, p.task)]
        return accuracy(sum(right), len(right))


def prepare(args: argparse.Namespace) -> Bench:
    """Load and draw: what layers are chosen on is never measured on."""
    records = list(load_records(load_recipe("sketches:heldout", args.data)))
    tasks = sorted({subtask(record) for record in records})
    # Tasks take turns in a draw, so these are the first records of every task's order.
    first = max(args.samples, args.task_samples * len(tasks))
    drawn = draw(records, first + args.questions, args.seed, subtask)
    model, processor = load_for_inference(args.checkpoint, device="cpu")
    own = {task: draw(records, args.task_samples, args.seed, subtask, task) for task in tasks}
    held_out = record_samples(model, processor, drawn[first : first + args.held_out])
    return Bench(
        model,
        processor,
        chosen_on=record_samples(model, processor, drawn[: args.samples]),
        by_task={task: record_samples(model, processor, found) for task, found in own.items()},
        held_out=held_out,
        asked=drawn[first:],
        kinds=mean_kinds(model, held_out, None),
    )


# --- curves over the number of layers ------------------------------------------------------------------------------


def measured(bench: Bench, tables: Mapping[str, ScoreTable], args: argparse.Namespace) -> list[curves.Curve]:
    """KL, accuracy and FLOPs of every method at every N; finished points are kept in ``curves.json``."""
    orders = {name: search.rank_layers(table.mean()) for name, table in tables.items()}
    for seed in range(args.random_seeds):
        orders[f"random/{seed}"] = search.rank_layers(bench.scores("random", seed=seed).mean())
    plans = {n: curves.methods_at(n, bench.depth, orders) for n in range(bench.depth + 1)}
    file, settings = args.output / "curves.json", {k: str(v) for k, v in vars(args).items() if k != "output"}
    saved = read_json(file) if file.is_file() else {}
    same = saved.get("settings") == settings
    done = curves.points_of([curves.Curve.from_dict(c) for c in saved["curves"]]) if same else {}

    def write(found: Sequence[curves.Curve]) -> None:
        write_json(file, {"settings": settings, "curves": [curve.to_dict() for curve in found]})

    def keep(name: str, point: curves.Point) -> None:
        done[name, point.n] = point
        names = dict.fromkeys(name for name, _ in done)
        write([curves.Curve(own, tuple(p for (key, _), p in done.items() if key == own)) for own in names])

    found = curves.measure_curves(plans, bench.kl, bench.flops, bench.accuracy, done=dict(done), keep=keep)
    write(found)
    return found


# --- searches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One search's plan at one budget.

    Attributes:
        budget, name: which.
        layers: what skips where.
        flops: of the dense prefill.
        chosen: mean KL on the samples that the search has seen, nats.
        kl: on held-out samples.
        difference: of ``kl`` to that of the budget's first plan, sample by sample.
    """

    budget: str
    name: str
    layers: str
    flops: float
    chosen: float
    kl: search.Estimate
    difference: search.Estimate


def compared(bench: Bench, budget: str, plans: Mapping[str, SkipPlan]) -> list[Row]:
    """The final plans of one budget on the held-out samples; the first is what the others are compared with."""
    rows = []
    for found in search.compare(plans, bench.kl):
        plan = plans[found.name]
        chosen = float(bench.kl(plan, bench.chosen_on).mean())
        row = Row(budget, found.name, layers_of(bench, plan), bench.flops(plan), chosen, found.kl, found.difference)
        rows.append(row)
    return rows


def layers_of(bench: Bench, plan: SkipPlan) -> str:
    """Layers without visual attention, and those without FFN for any visual token."""
    own, bound = bench.model.plan, compose([bench.model.plan, plan]).bind(bench.depth)
    pairs = list(enumerate(zip(bound.rules, own.rules, strict=True)))
    attention = ", ".join(str(i) for i, (rule, base) in pairs if rule.no_attention != base.no_attention)
    ffn = ", ".join(str(i) for i, (rule, base) in pairs if rule.no_ffn != base.no_ffn)
    return "; ".join(f"{part} {layers}" for part, layers in (("attention", attention), ("FFN", ffn)) if layers)


def greedy_rows(bench: Bench, tables: Mapping[str, ScoreTable]) -> list[Row]:
    """Top-N against greedy at every N, for every method with one rule."""
    rows = []
    for method, (strategy, build) in TOP.items():
        rule = STRATEGIES[strategy].rule("zero")
        order = search.greedy(partial(bench.mean_scores, strategy), bench.model.plan, rule, bench.depth).order
        for n in range(1, bench.depth + 1):
            top = build(search.select_layers(tables[strategy].mean(), n))
            plans = {f"{method} top-N": top, f"{method} greedy": build(order[:n])}
            rows += compared(bench, f"N = {n}", plans)
    return rows


def joint_rows(bench: Bench, tables: Mapping[str, ScoreTable]) -> list[Row]:
    """At the FLOPs of V-Skip and of ShortV by VIG at every N: the methods with one rule against the joint search.

    A method with one rule takes as many layers as the budget needs. All plans are within the budget, none is on it but
    the one that names it.
    """
    depth = bench.depth
    top = {
        method: [build(search.select_layers(tables[strategy].mean(), n)) for n in range(depth + 1)]
        for method, (strategy, build) in TOP.items()
    }
    rows = []
    for owner in ("V-Skip", "ShortV by VIG"):
        for n, owned in enumerate(top[owner][1:], start=1):
            target = bench.flops(owned) + 1e-9
            plans = {owner: owned}
            for method, choices in top.items():
                fitting = [plan for plan in choices if bench.flops(plan) <= target]
                if method != owner and fitting:
                    plans[method] = fitting[0]
            for rescore in (False, True):
                plans["joint, scored again" if rescore else "joint"] = joint(bench, target, rescore)
            rows += compared(bench, f"{owner}, N = {n}", plans)
    return rows


def joint(bench: Bench, target: float, rescore: bool) -> SkipPlan:
    """The plan of the joint search."""
    strategies = {"attention": "vig", "ffn": "vig_ffn"}
    return search.joint(
        lambda plan, part: bench.mean_scores(strategies[part], plan),
        bench.model.plan,
        target,
        text_config=bench.model.config.text_config,
        kind_counts=bench.kinds,
        rescore=rescore,
    ).plan


def search_table(rows: Sequence[Row]) -> str:
    """Markdown; a line per plan."""
    lines = [
        "| budget | search | skips | FLOPs (%) | KL where chosen | KL held out (nats) | difference to the first |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        kl, difference = (f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]" for e in (row.kl, row.difference))
        cells = [row.budget, row.name, row.layers, f"{100 * row.flops:.1f}", f"{row.chosen:.3g}", kl, difference]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- transfer ------------------------------------------------------------------------------------------------------


def transfer(bench: Bench) -> dict[str, Any]:
    """Mean KL and accuracy of every task's plan on every task's held-out samples, at half of the layers."""
    tasks = sorted(bench.by_task)
    plans = {}
    for task, samples in bench.by_task.items():
        scores = score_layers(bench.model, samples, base=bench.model.plan).mean()
        plans[task] = vskip(search.select_layers(scores, bench.depth // 2)).bind(bench.depth)
    columns = {task: [i for i, sample in enumerate(bench.held_out) if sample.task == task] for task in tasks}
    kl = {plan: bench.kl(plan) for plan in set(plans.values())}
    return {
        "calibrated_on": tasks,
        "evaluated_on": tasks,
        "layers": {task: list(plans[task].layers_without_attention()) for task in tasks},
        "kl": [[float(kl[plans[task]][columns[other]].mean()) for other in tasks] for task in tasks],
        "accuracy": [[bench.accuracy(plans[task], other).value for other in tasks] for task in tasks],
    }


def transfer_table(matrix: Mapping[str, Any], quantity: str) -> str:
    """Markdown; a row per task calibrated on."""
    columns, scale = matrix["evaluated_on"], 100 if quantity == "accuracy" else 1
    lines = [f"| calibrated on | layers | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for task, row in zip(matrix["calibrated_on"], matrix[quantity], strict=True):
        layers = ", ".join(map(str, matrix["layers"][task]))
        lines.append(f"| {task} | {layers} | {' | '.join(f'{scale * value:.3g}' for value in row)} |")
    return "\n".join(lines)


# --- all of it -----------------------------------------------------------------------------------------------------


def draw_pictures(
    output: Path, found: Sequence[curves.Curve], tables: Mapping[str, ScoreTable], matrix: Mapping[str, Any]
) -> None:
    joined = join_seeds(found)
    tasks = matrix["calibrated_on"]
    pictures = {
        "kl_n": budget_curves(joined),
        "kl_flops": budget_curves(joined, "flops_ratio"),
        "asymmetry": functional_asymmetry(
            {name: tables[name].mean().tolist() for name in ("vig", "vig_ffn", "vig_block")}
        ),
        "transfer": transfer_matrix(matrix["kl"], tasks, tasks),
        "transfer_accuracy": transfer_matrix(matrix["accuracy"], tasks, tasks, "accuracy"),
    }
    for name, figure in pictures.items():
        (output / f"{name}.png").write_bytes(to_png(figure))


def heaviest(values: Tensor, share: float = 0.05) -> float:
    """What the prompts of the largest KL, a ``share`` of all, have of its sum: how far the mean hangs on a few."""
    ordered = values.sort(descending=True).values
    return float(ordered[: max(1, int(share * len(ordered)))].sum() / ordered.sum())


def verdict(found: Sequence[curves.Curve]) -> dict[str, Any]:
    """VIG's KL beside every random choice's at equal N."""
    vig = {point.n: point.kl.value for curve in found if curve.name == "V-Skip" for point in curve.points}
    points = [{"n": p.n, "random": p.kl.value, "vig": vig[p.n]} for c in found if "random" in c.name for p in c.points]
    return {"vig_not_above_random": all(p["vig"] <= p["random"] for p in points), "points": points}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="folder of the sketches data set")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=20, help="to choose layers with")
    parser.add_argument("--task-samples", type=int, default=20, help="to choose a task's own layers with, per task")
    parser.add_argument("--held-out", type=int, default=700, help="prompts to measure KL on")
    parser.add_argument("--questions", type=int, default=700, help="to measure accuracy on")
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    bench = prepare(args)
    args.output.mkdir(parents=True, exist_ok=True)
    tables = {name: bench.scores(name) for name in MEASURED}
    for name, table in tables.items():
        write_json(args.output / f"scores_{name}.json", table.to_dict())
    layers = list(search.select_layers(tables["vig"].mean(), bench.depth // 2))
    write_json(args.output / "vig.json", {"scores": tables["vig"].mean().tolist(), "layers": layers})

    rows = [*greedy_rows(bench, tables), *joint_rows(bench, tables)]
    write_json(args.output / "searches.json", {"searches": [asdict(row) for row in rows]})
    print(search_table(rows), end="\n\n", flush=True)
    matrix = transfer(bench)
    write_json(args.output / "transfer.json", matrix)
    for quantity in ("kl", "accuracy"):
        print(transfer_table(matrix, quantity), end="\n\n", flush=True)
    found = measured(bench, tables, args)
    print(curves.table(found))
    draw_pictures(args.output, found, tables, matrix)
    half = bench.kl(vskip(layers))
    print(json.dumps({**verdict(found), "kl_of_the_heaviest_5_percent": heaviest(half)}))


if __name__ == "__main__":
    main()
