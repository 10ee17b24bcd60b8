"""KL and accuracy against the number of skipped layers, for every method; and how plans transfer between tasks.

python benchmarks/skip_curves.py --checkpoint outputs/demo/sft/model --data outputs/demo/data --output outputs/curves

Layers are chosen on 20 samples (--samples) of the held-out split; KL and accuracy are measured on others. Writes what
``skipvision report vig=[outputs/curves]`` shows. Run again, it goes on after the last finished point.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from skipvision_train.analysis.calibration_figures import (
    budget_curves,
    functional_asymmetry,
    join_seeds,
    transfer_matrix,
)
from skipvision_train.analysis.figures import to_png
from skipvision_train.calibration import curves, search
from skipvision_train.calibration.samples import Sample, draw, record_samples, subtask
from skipvision_train.calibration.scores import ScoreTable, plan_divergence, score_layers
from skipvision_train.calibration.session import mean_kinds
from skipvision_train.calibration.subject import load_subject
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.data.records import Record
from skipvision_train.evaluation.evaluate import predict
from skipvision_train.evaluation.metrics import Accuracy, accuracy
from skipvision_train.evaluation.results import read_json, write_json
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import SkipPlan, compose, vskip

STRATEGIES = ("vig", "vig_ffn", "vig_block", "cosine", "shortv")


def measured_accuracy(
    model: SkipVisionForConditionalGeneration, processor: object, records: Sequence[Record], plan: SkipPlan
) -> Accuracy:
    """Exact match on ``records`` under ``plan`` on top of the model's own."""
    own = model.plan
    model.set_plan(compose([own, plan]))
    try:
        right = [p.correct for p in predict(model, processor, records, 50, 12)]
    finally:
        model.set_plan(own)
    return accuracy(sum(right), len(right))


def measured_kl(model: SkipVisionForConditionalGeneration, samples: Sequence[Sample], plan: SkipPlan) -> object:
    """KL(P || P under the plan), both on top of the model's own plan."""
    return plan_divergence(model, samples, compose([model.plan, plan]), base=model.plan)


def transfer(
    table: ScoreTable, n: int, depth: int, by_task: dict[str, list[Sample]], kl: Callable[..., object]
) -> dict[str, object]:
    """Mean KL of every task's plan on every task's held-out samples."""
    tasks = sorted(by_task)
    plans = {task: vskip(search.select_layers(table.mean(task), n)).bind(depth) for task in tasks}
    rows = [[float(kl(by_task[other], plans[task]).mean()) for other in tasks] for task in tasks]
    return {"calibrated_on": tasks, "evaluated_on": tasks, "kl": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="folder of the sketches data set")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=20, help="to choose layers with")
    parser.add_argument("--held-out", type=int, default=105, help="prompts to measure KL on")
    parser.add_argument("--questions", type=int, default=700, help="to measure accuracy on")
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    records = list(load_records(load_recipe("sketches:heldout", args.data)))
    drawn = draw(records, args.samples + args.questions, args.seed, subtask)
    model, processor, _ = load_subject(args.checkpoint, "cpu")
    depth = model.plan.num_layers
    chosen_on = record_samples(model, processor, drawn[: args.samples])
    held_out = record_samples(model, processor, drawn[args.samples : args.samples + args.held_out])
    asked = drawn[args.samples :]

    tables = {name: score_layers(model, chosen_on, name, base=model.plan) for name in STRATEGIES}
    orders = {name: search.rank_layers(table.mean()) for name, table in tables.items() if name != "vig_block"}
    for seed in range(args.random_seeds):
        random = score_layers(model, chosen_on, "random", base=model.plan, seed=seed)
        orders[f"random/{seed}"] = search.rank_layers(random.mean())

    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "curves.json"
    saved = [curves.Curve.from_dict(c) for c in read_json(file)["curves"]] if file.is_file() else []
    plans = {n: curves.methods_at(n, depth, orders) for n in range(depth + 1)}
    kinds = mean_kinds(model, held_out, None)
    ratio = partial(search.flops_ratio, model.config.text_config, kinds)
    found = curves.measure_curves(
        plans,
        partial(measured_kl, model, held_out),
        lambda plan: ratio(compose([model.plan, plan])),
        partial(measured_accuracy, model, processor, asked),
        done=curves.points_of(saved),
    )
    write_json(file, {"curves": [curve.to_dict() for curve in found]})
    for name, table in tables.items():
        write_json(args.output / f"scores_{name}.json", table.to_dict())
    layers = list(search.select_layers(tables["vig"].mean(), depth // 2))
    write_json(args.output / "vig.json", {"scores": tables["vig"].mean().tolist(), "layers": layers})
    by_task: dict[str, list[Sample]] = {}
    for sample in held_out:
        by_task.setdefault(sample.task, []).append(sample)
    matrix = transfer(tables["vig"], depth // 2, depth, by_task, partial(measured_kl, model))
    write_json(args.output / "transfer.json", matrix)

    joined = join_seeds(found)
    pictures = {"kl_n": budget_curves(joined), "kl_flops": budget_curves(joined, "flops_ratio")}
    pictures["asymmetry"] = functional_asymmetry(
        {name: tables[name].mean().tolist() for name in ("vig", "vig_ffn", "vig_block")}
    )
    pictures["transfer"] = transfer_matrix(matrix["kl"], matrix["calibrated_on"], matrix["evaluated_on"])
    for name, figure in pictures.items():
        (args.output / f"{name}.png").write_bytes(to_png(figure))
    print(curves.table(found))
    vig = {point.n: point.kl.value for curve in found if curve.name == "V-Skip" for point in curve.points}
    random = [{"n": p.n, "random": p.kl.value, "vig": vig[p.n]} for c in found if "random" in c.name for p in c.points]
    print(json.dumps({"vig_not_above_random": all(p["vig"] <= p["random"] for p in random), "points": random}))


if __name__ == "__main__":
    main()
