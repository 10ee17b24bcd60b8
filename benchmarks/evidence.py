"""Methods at equal FLOPs on sketches, three seeds: accuracy per task, FLOPs, memory, time.

Per seed two trained models: a dense one, under which V-Skip, FFN-Skip, ShortV, VTW, FastV, FastV + V-Skip and
PyramidDrop run, each as strong as brings its decoder closest to each share of the dense FLOPs; and a Skip-Vision one,
under its own plan. Layers are ranked on prompts of the training split (20 by default), each method by its own score;
everything is measured on held-out questions.

python benchmarks/settings_study.py --data outputs/demo/data --settings cos --steps 500      # trains the models
python benchmarks/evidence.py --data outputs/demo/data --models outputs/settings_study/cos --output outputs/evidence

With a GPU: a wider and deeper model, data and training included.

python benchmarks/evidence.py --gpu --output outputs/evidence_gpu

Seeds that are measured are not measured again: start the same command again to go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import settings_study
from skip_native import once

from skipvision_train.calibration.samples import draw, record_samples, subtask
from skipvision_train.calibration.scores import score_layers
from skipvision_train.commands import bench as command
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.evaluation.bench import differences
from skipvision_train.evaluation.bench_results import BenchResult, Difference, Row, markdown
from skipvision_train.evaluation.metrics import Accuracy, accuracy
from skipvision_train.files import write_json
from skipvision_train.inference.assistant import Assistant
from skipvision_train.models.identity import model_hash

METHODS = ("vskip", "ffn_skip", "shortv", "vtw", "fastv", "fastv+vskip", "pyramiddrop")
STRATEGIES = ("vig", "vig_ffn", "shortv")
"""How the layers of V-Skip, FFN-Skip and ShortV are ranked."""

TRAINED = "Skip-Vision (trained)"
NAMES = {
    "dense": "dense",
    "vskip": "V-Skip",
    "ffn_skip": "FFN-Skip",
    "shortv": "ShortV",
    "vtw": "VTW",
    "fastv": "FastV",
    "fastv+vskip": "FastV + V-Skip",
    "pyramiddrop": "PyramidDrop",
}

GPU_DATA = (
    "llm.width=512",
    "llm.layers=16",
    "llm.heads=8",
    "llm.key_value_heads=4",
    "llm.ffn=1536",
    "vision.width=256",
    "vision.layers=6",
    "data.pretrain=48000",
    "data.sft=32000",
)
GPU_MODEL = ("model.vision.width=256", "model.vision.layers=6", "model.vision.heads=8", "model.vision.depths=[4,6]")
GPU_TRAINER = ("trainer.precision=bf16", "trainer.workers=8", "trainer.per_device_batch=64", "trainer.global_batch=64")
GPU_STEPS = (1500, 700)
"""Of the pretraining and of each fine-tuning."""


# --- measuring -----------------------------------------------------------------------------------------------------


def calibrate(assistant: Assistant, args: argparse.Namespace, folder: Path) -> None:
    """Scores of all layers on prompts of the training split, as ``skipvision calibrate`` writes them."""
    records = [r for r in load_records(load_recipe("sketches:sft", str(args.data))).read_all() if r.images]
    drawn = draw(records, args.samples, 0, subtask)
    samples = record_samples(assistant.model, assistant.processor, drawn)
    tables = {name: score_layers(assistant.model, samples, name) for name in STRATEGIES}
    for name, table in tables.items():
        write_json(folder / f"scores_{name}.json", table.to_dict())
    facts = {"strategy": "vig", "model_hash": model_hash(assistant.model), "layers": []}
    write_json(folder / "vig.json", {**facts, "scores": tables["vig"].mean().tolist()})


def measure(args: argparse.Namespace, kind: str, seed: int) -> BenchResult:
    """A model's bench; one that is there already is read."""
    folder = args.output / f"{kind}_{seed}"
    if (folder / "bench.json").is_file():
        return BenchResult.load(folder)
    experiment = {"dense": "sketches_dense", "trained": "sketches_sft"}[kind]
    cfg = command.Config(
        checkpoint=str(args.models / f"{experiment}_{seed}" / "model"),
        recipe="sketches:heldout",
        data_root=str(args.data),
        output=str(folder),
        batch_size=50,
        max_new_tokens=12,
        limit=args.limit,
        timing=args.timing,
        repeats=args.repeats,
        decode_tokens=12,
        device=args.device,
    )
    assistant = Assistant.open(cfg.checkpoint, device=cfg.device)
    if kind == "dense":
        cfg.equal_flops, cfg.methods = list(args.shares), list(METHODS)
        cfg.calibration = str(folder / "calibration")
        calibrate(assistant, args, folder / "calibration")
    command.check(cfg)
    result = command.bench(cfg, assistant, command.read_questions(cfg))
    result.save(folder / "bench.json")
    (folder / "bench.md").write_text(markdown(result))
    print(f"{folder.name}\n\n{markdown(result)}", flush=True)
    return result


# --- joining -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A method at a share, over all seeds.

    Attributes:
        name: of the method.
        budget: the share that was wanted; None for the two models themselves.
        settings: of each seed.
        share: decoder FLOPs over those of the dense model, mean.
        mean, deviation: of the seeds' scores.
        difference: to the dense model of the same seed, question by question.
        tasks: over all seeds' answers.
        kv: cache over that of the dense model.
        first_token, decode: times over the dense plan's in the same run, median of the seeds; None: not comparable.
    """

    name: str
    budget: float | None
    settings: list[str]
    share: float
    mean: float
    deviation: float | None
    difference: Difference
    tasks: dict[str, Accuracy]
    kv: float
    first_token: float | None
    decode: float | None


def join(dense: Sequence[BenchResult], trained: Sequence[BenchResult], shares: Sequence[float]) -> list[Line]:
    """The two models' own rows first, then every share's methods by name."""
    base = [row_of(result, "dense") for result in dense]
    lines = [line("dense", None, dense, base, base)]
    if trained:
        lines.append(line(TRAINED, None, trained, [row_of(result, "own") for result in trained], base, False))
    for share in shares:
        for method in METHODS:
            name = method if len(shares) == 1 else f"{method} at {share:g}"
            found = [row for result in dense for row in result.rows if row.name == name]
            if len(found) == len(dense):
                lines.append(line(NAMES[method], share, dense, found, base))
    return lines


def row_of(result: BenchResult, name: str) -> Row:
    """The row of that name."""
    return next(row for row in result.rows if row.name == name)


def line(
    name: str,
    budget: float | None,
    results: Sequence[BenchResult],
    rows: Sequence[Row],
    base: Sequence[Row],
    timed: bool = True,
) -> Line:
    """One method's rows of all seeds.

    Args:
        name: of the method.
        budget: the share that was wanted.
        results: that the rows are of.
        rows: one per seed.
        base: the dense rows of the same seeds.
        timed: the times were taken in turn with the dense row's.
    """
    questions = results[0].questions
    assert all(result.questions == questions for result in results)
    tasks = {}
    for task in rows[0].tasks:
        right = [s for row in rows for s, (_, own) in zip(row.scores, questions, strict=True) if own == task]
        tasks[task] = accuracy(round(sum(right)), len(right))
    means = [row.mean.value for row in rows]
    apart = differences(questions, {"base": seed_mean(base), "row": seed_mean(rows)}, "base")["row"]
    pairs = list(zip(rows, base, strict=True))
    ratios: dict[str, float | None] = {}
    for key in ("first_token_ms", "decode_ms"):
        known = [getattr(r.times, key).median / getattr(b.times, key).median for r, b in pairs if r.times and b.times]
        ratios[key] = statistics.median(known) if known and timed else None
    return Line(
        name=name,
        budget=budget,
        settings=[row.setting for row in rows],
        share=statistics.fmean(row.cost.flops / own.cost.flops for row, own in pairs),
        mean=statistics.fmean(means),
        deviation=statistics.stdev(means) if len(means) > 1 else None,
        difference=apart,
        tasks=tasks,
        kv=statistics.fmean(row.cost.kv_bytes / own.cost.kv_bytes for row, own in pairs),
        first_token=ratios["first_token_ms"],
        decode=ratios["decode_ms"],
    )


def seed_mean(rows: Sequence[Row]) -> list[float]:
    """Per question its mean score over seeds."""
    return [statistics.fmean(scores) for scores in zip(*(row.scores for row in rows), strict=True)]


def table(lines: Sequence[Line]) -> str:
    """Markdown: costs and means, then accuracy per task."""
    heads = ("method", "wanted", "of dense FLOPs", "mean of seeds (%)", "to dense (points)", "KV cache", "first token")
    found = [f"| {' | '.join(heads)} | per token |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    for own in lines:
        spread = "" if own.deviation is None else f" ± {100 * own.deviation:.1f}"
        apart = own.difference
        differs = f"{100 * apart.value:+.1f} ({100 * apart.low:+.1f} to {100 * apart.high:+.1f})"
        cells = [own.name, "" if own.budget is None else f"{100 * own.budget:.0f} %", f"{100 * own.share:.1f} %"]
        cells += [f"{100 * own.mean:.1f}{spread}", "" if own.name == "dense" else differs, f"{100 * own.kv:.0f} %"]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in (own.first_token, own.decode)]
        found.append(f"| {' | '.join(cells)} |")
    tasks = list(lines[0].tasks)
    found += ["", f"| method | wanted | {' | '.join(tasks)} |", "|---|---|" + "---:|" * len(tasks)]
    for own in lines:
        budget = "" if own.budget is None else f"{100 * own.budget:.0f} %"
        cells = [f"{100 * v.value:.0f} ({100 * v.low:.0f} to {100 * v.high:.0f})" for v in own.tasks.values()]
        found.append(f"| {own.name} | {budget} | {' | '.join(cells)} |")
    found += ["", "| method | wanted | setting, by seed |", "|---|---|---|"]
    for own in lines:
        budget = "" if own.budget is None else f"{100 * own.budget:.0f} %"
        same = list(dict.fromkeys(own.settings))
        found.append(f"| {own.name} | {budget} | {' / '.join(same if len(same) == 1 else own.settings)} |")
    return "\n".join(found)


# --- training on a GPU ---------------------------------------------------------------------------------------------


def train_large(args: argparse.Namespace) -> None:
    """Data and models of the GPU's size: one pretraining, per seed a dense and a Skip-Vision fine-tuning."""
    once(args.output, "data", ("sketches", f"output={args.data}", *GPU_DATA))
    start, (first, steps) = f"{args.models.name}/pretrain", GPU_STEPS
    parts = (f"model.llm={args.data}/start/llm", f"model.vision_weights={args.data}/start/vision")
    settings_study.train(args, start, "sketches_pretrain", first, *parts, *GPU_MODEL, *GPU_TRAINER)
    begin = f"stage.start_from={args.output / start / 'model'}"
    for seed in args.seeds:
        for experiment in ("sketches_dense", "sketches_sft"):
            run = f"{args.models.name}/{experiment}_{seed}"
            settings_study.train(args, run, experiment, steps, begin, f"trainer.seed={seed}", *GPU_MODEL, *GPU_TRAINER)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``--gpu`` names data and models itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the sketches data set")
    parser.add_argument("--models", type=Path, help="folder of sketches_dense_<seed> and sketches_sft_<seed>")
    parser.add_argument("--output", type=Path, default=Path("outputs/evidence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.87, 0.57], help="of the dense decoder's FLOPs")
    parser.add_argument("--samples", type=int, default=20, help="prompts of the training split that rank layers")
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--repeats", type=int, default=5, help="of the timing")
    parser.add_argument("--no-timing", dest="timing", action="store_false")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--gpu", action="store_true", help="train and measure a larger model")
    parser.add_argument("--only-train", action="store_true", help="with --gpu: end when the models are trained")
    args = parser.parse_args(words)
    if args.gpu:
        args.data, args.models = args.output / "data", args.output / "models"
    elif args.data is None or args.models is None:
        parser.error("give --data and --models, or --gpu")
    return args


def written(lines: Sequence[Line], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON form."""
    return {"facts": dict(facts), "lines": [asdict(own) for own in lines]}


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.gpu:
        train_large(args)
    if args.only_train:
        return
    dense = [measure(args, "dense", seed) for seed in args.seeds]
    trained = [measure(args, "trained", seed) for seed in args.seeds]
    lines = join(dense, trained, args.shares)
    write_json(args.output / "evidence.json", written(lines, dense[0].facts))
    (args.output / "evidence.md").write_text(table(lines) + "\n")
    print(table(lines))
    print(json.dumps(written(lines, dense[0].facts)))


if __name__ == "__main__":
    main()
