"""Dense against Skip-Vision in the paper's three settings at the sketches' size: accuracy, FLOPs, training speed.

cos       49 tokens of the resampler; 36 of them skip and are merged to 18
llava     36 patches; 6 are retained by the class token's attention, 30 skip and are merged to 10
llava_hd  a global view and four tiles of 16 tokens; the tiles' 64 skip and are merged to 16

Per setting one pretraining (captions, dense), from which every seed's dense and Skip-Vision fine-tuning start, or with
``--own-pretraining`` one per seed. Seeds change the order of the data and the weights that start random.

python benchmarks/settings_study.py --data outputs/demo/data
python benchmarks/settings_study.py --data ... --settings cos --seeds 0 --pretrain-steps 200 --steps 100   # shorter

Finished steps are not run again: start the same command again to go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skip_native import once, training_flops

from skipvision_train.evaluation.metrics import accuracy
from skipvision_train.evaluation.results import EvaluationResult
from skipvision_train.training.callbacks import read_metrics

EXPERIMENTS = {
    "cos": ("sketches_pretrain", "sketches_dense", "sketches_sft"),
    "llava": ("sketches_llava_pretrain", "sketches_llava", "sketches_sv_llava"),
    "llava_hd": ("sketches_llava_hd_pretrain", "sketches_llava_hd", "sketches_sv_llava_hd"),
}
"""Setting -> experiments of the pretraining, of the dense and of the Skip-Vision fine-tuning."""

ARRANGEMENTS = ("dense", "Skip-Vision")


def train(args: argparse.Namespace, run: str, experiment: str, steps: int | None, *overrides: str) -> None:
    """One stage in a process of its own."""
    length = () if steps is None else (f"trainer.max_steps={steps}", "trainer.epochs=null")
    folder = (f"data.root={args.data}", f"trainer.output_dir={args.output / run}", "trainer.progress_bar=false")
    once(args.output, run.replace("/", "_"), ("train", f"experiment={experiment}", *folder, *length, *overrides))


def evaluate(args: argparse.Namespace, run: str) -> EvaluationResult:
    """Accuracy of a finished run on held-out sketches under its own plan."""
    folder = args.output / run / "evaluation"
    limit = () if args.limit is None else (f"limit={args.limit}",)
    data = ("recipe=sketches:heldout", f"data_root={args.data}", "batch_size=50", *limit)
    name = f"{run}_evaluation".replace("/", "_")
    once(args.output, name, ("evaluate", f"checkpoint={args.output / run / 'model'}", *data, f"output={folder}"))
    return EvaluationResult.load(folder / "evaluation.json")


def pretrained(args: argparse.Namespace, setting: str, seed: int) -> Path:
    """The model that a seed's fine-tunings start from. That of seed 0 is the one that all share otherwise."""
    own = bool(args.own_pretraining and seed)
    run = f"{setting}/pretrain_{seed}" if own else f"{setting}/pretrain"
    llm = f"model.llm={args.data}/start/llm"
    vision = (f"model.vision_weights={args.data}/start/vision",) if setting == "cos" else ()
    train(args, run, EXPERIMENTS[setting][0], args.pretrain_steps, llm, *vision, *([f"trainer.seed={seed}"] * own))
    return Path(args.output / run / "model")


def run_setting(args: argparse.Namespace, setting: str) -> list[dict[str, Any]]:
    """Train and evaluate a setting; one row per arrangement."""
    begins = [pretrained(args, setting, seed) for seed in args.seeds]
    rows = []
    for arrangement, experiment in zip(ARRANGEMENTS, EXPERIMENTS[setting][1:], strict=True):
        own = "_own" if args.own_pretraining else ""
        runs = [f"{setting}/{experiment}_{seed}{own if seed else ''}" for seed in args.seeds]
        for run, begin, seed in zip(runs, begins, args.seeds, strict=True):
            train(args, run, experiment, args.steps, f"stage.start_from={begin}", f"trainer.seed={seed}")
        results = [evaluate(args, run) for run in runs]
        rows.append(summary(args, setting, arrangement, runs, results))
    return rows


def summary(
    args: argparse.Namespace, setting: str, arrangement: str, runs: Sequence[str], results: Sequence[EvaluationResult]
) -> dict[str, Any]:
    """A row: accuracies over all seeds' answers with 95 % Wilson intervals, and the means of the seeds."""
    tasks = {}
    for task in results[0].scores.tasks:
        right = [p.correct for result in results for p in result.predictions if p.task == task]
        tasks[task] = accuracy(sum(right), len(right))
    means = [result.scores.mean.value for result in results]
    return {
        "setting": setting,
        "arrangement": arrangement,
        "tasks": {task: [score.value, score.low, score.high] for task, score in tasks.items()},
        "seeds": means,
        "flops": statistics.fmean(training_flops(args.output / run) for run in runs),
        "samples_per_second": [speed(args.output / run) for run in runs],
        "tokens": results[0].cost.tokens,
    }


def speed(run: Path) -> float:
    """Samples per second: the median of the logged ones. The first line has none."""
    logged = read_metrics(run / "metrics.jsonl")
    return statistics.median(line["samples_per_second"] for line in logged if "samples_per_second" in line)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation of the seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown: one line per setting and arrangement."""
    tasks = list(rows[0]["tasks"])
    lines = [
        f"| setting | | mean of seeds | {' | '.join(tasks)} | training FLOPs | training speed |",
        f"|---|---|---|{'---|' * len(tasks)}---|---|",
    ]
    dense = {row["setting"]: row for row in rows if row["arrangement"] == "dense"}
    for row in rows:
        cells = [f"{100 * v:.1f} ({100 * low:.1f} to {100 * high:.1f})" for v, low, high in row["tasks"].values()]
        base = dense[row["setting"]]
        pairs = zip(row["samples_per_second"], base["samples_per_second"], strict=True)
        mean, times = spread([100 * v for v in row["seeds"]], 1), spread([own / other for own, other in pairs], 2)
        share = row["flops"] / base["flops"]
        lines.append(
            f"| {row['setting']} | {row['arrangement']} | {mean} | {' | '.join(cells)} | {share:.3f} | {times} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sketches data set")
    parser.add_argument("--output", type=Path, default=Path("outputs/settings_study"))
    parser.add_argument("--settings", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--own-pretraining", action="store_true", help="every seed pretrains for itself, too")
    parser.add_argument("--pretrain-steps", type=int, help="fewer than the experiment's")
    parser.add_argument("--steps", type=int, help="of fine-tuning; fewer than the experiment's")
    parser.add_argument("--limit", type=int, help="questions per task")
    args = parser.parse_args()
    rows = [row for setting in args.settings for row in run_setting(args, setting)]
    (args.output / "study.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
