"""Skip-native training against V-Skip put on afterwards: three fine-tunings of one pretrained model, one plan.

after    fine-tuned under the experiment's own plan; V-Skip is put on the finished model
fixed    fine-tuned under that plan and V-Skip, in the same layers, from the first step on
widen    the same, the layers one after the other over the course of the training

All three are evaluated under the experiment's own plan and under the plan with V-Skip, where they cost the same. The
layers are those that add least to ``after`` (--choose vig), which favours it, or the deepest (--choose deepest).

python benchmarks/skip_native.py --pretrained outputs/demo/pretrain/model --data outputs/demo/data
python benchmarks/skip_native.py --pretrained ... --data ... --steps 300 --limit 100      # shorter

Finished steps are not run again: start the same command again to go on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from skipvision_train.analysis.flops import sequence_flops
from skipvision_train.analysis.image_flops import image_flops
from skipvision_train.calibration.search import rank_layers
from skipvision_train.config.resolve import load_tokenizer, model_config
from skipvision_train.config.specs import TrainConfig
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.evaluation.results import EvaluationResult
from skipvision_train.plans import SkipPlan, TokenKind
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.plan_schedule import PlanSchedule
from skipvision_train.training.run import open_dataset

CASES = ("after", "fixed", "widen")
COUNTED_SAMPLES = 200


def launch(words: Sequence[str]) -> None:
    """Run one ``skipvision`` command in a process of its own."""
    subprocess.run([sys.executable, "-m", "skipvision_train", *words], check=True)


def once(output: Path, name: str, words: Sequence[str]) -> None:
    """Run a command, unless the same one was finished before; one that was interrupted is started again.

    Raises:
        SystemExit: another command has been run under that name.
    """
    words = [str(word) for word in words]
    marker, text = output / "steps" / f"{name}.txt", shlex.join(["skipvision", *words]) + "\n"
    if marker.exists():
        if marker.read_text() != text:
            raise SystemExit(f"{output}: {name} was run as {marker.read_text().strip()}; use another --output")
        return
    print(f"$ {text}", end="", flush=True)
    launch(words)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(text)


def train(args: argparse.Namespace, case: str, *overrides: str) -> None:
    """One fine-tuning."""
    steps = () if args.steps is None else (f"trainer.max_steps={args.steps}", "trainer.epochs=null")
    paths = (
        f"stage.start_from={args.pretrained}",
        f"data.root={args.data}",
        f"trainer.output_dir={args.output / case}",
    )
    config = () if args.config_dir is None else ("--config-dir", args.config_dir)
    command = ("train", *config, f"experiment={args.experiment}", *paths, *steps, *overrides, *args.overrides)
    once(args.output, f"train_{case}", command)


def choose_layers(args: argparse.Namespace) -> list[int]:
    """The layers in which V-Skip is put on, the first to be skipped first."""
    depth = SkipPlan.load(args.output / "after" / "model" / "plan.json").num_layers
    count = depth // 2 if args.count is None else args.count
    if args.choose == "deepest":
        return list(reversed(range(depth)))[:count]
    folder = args.output / "calibration"
    data = (f"recipe={args.calibrate_on}", f"data_root={args.data}", f"samples={args.samples}")
    budget = ("budget=count", f"budget.count={count}")
    once(
        args.output,
        "calibrate",
        ("calibrate", f"checkpoint={args.output / 'after' / 'model'}", *data, *budget, f"output={folder}"),
    )
    return list(rank_layers(json.loads((folder / "vig.json").read_text())["scores"]))[:count]


def evaluate(args: argparse.Namespace, case: str, plan: str, source: str) -> EvaluationResult:
    """The accuracy of ``case`` under the plan of the model of ``source``."""
    folder = args.output / f"{case}_under_{plan}"
    data = (f"recipe={args.evaluate_on}", f"data_root={args.data}", f"batch_size={args.batch_size}")
    limit = () if args.limit is None else (f"limit={args.limit}",)
    model = f"checkpoint={args.output / case / 'model'}"
    plan_file = f"plan={args.output / source / 'model' / 'plan.json'}"
    once(args.output, folder.name, ("evaluate", model, plan_file, *data, *limit, f"output={folder}"))
    return EvaluationResult.load(folder / "evaluation.json")


def read_config(run: Path) -> TrainConfig:
    """What a run was configured to do."""
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), recorded))  # type: ignore[return-value]


def training_flops(run: Path) -> float:
    """FLOPs of a mean sample's forward pass, mean over the run's steps: decoder layers, vision tower, connector.

    Of the run's first samples. The LM head, which sees the supervised positions only, and what a backward pass costs
    beyond twice the forward pass are the same in all runs and left out.
    """
    cfg = read_config(run)
    tokenizer = load_tokenizer(cfg)
    config = model_config(cfg, tokenizer)
    _, dataset = open_dataset(cfg, SkipVisionProcessor.from_config(config, tokenizer, cfg.stage.template))
    kinds: Counter[int] = Counter()
    number = min(len(dataset), COUNTED_SAMPLES)
    for i in range(number):
        kinds.update(() if (example := dataset[i]) is None else map(int, example.token_kinds))
    counts = {TokenKind(kind): count / number for kind, count in kinds.items()}
    visual = sum(count for kind, count in counts.items() if kind != TokenKind.TEXT)
    text = config.text_config
    steps = read_metrics(run / "metrics.jsonl")[-1]["step"]
    schedule = PlanSchedule.of(cfg, text.num_hidden_layers)
    decoder = schedule.mean(lambda plan: sequence_flops(text, counts, plan).total, steps)
    return decoder + visual / len(config.image_token_kinds()) * image_flops(config).total


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| training | own plan | with V-Skip | training FLOPs |", "|---|---|---|---|"]
    for row in rows:
        cells = []
        for plan in ("base", "skip"):
            low, high = row[f"interval_{plan}"]
            cells.append(f"{100 * row[f'accuracy_{plan}']:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
        lines.append(f"| {row['case']} | {cells[0]} | {cells[1]} | {row['training_flops_ratio']:.3f} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", type=Path, required=True, help="model directory that all trainings start from")
    parser.add_argument("--data", type=Path, required=True, help="data root of the recipes")
    parser.add_argument("--output", type=Path, default=Path("outputs/skip_native"))
    parser.add_argument("--experiment", default="sketches_sft", help="of conf/experiment; its plan is the base")
    parser.add_argument("--config-dir", help="a folder with further experiments")
    parser.add_argument("--calibrate-on", default="sketches:sft", metavar="RECIPE")
    parser.add_argument("--evaluate-on", default="sketches:heldout", metavar="RECIPE")
    parser.add_argument("--count", type=int, help="layers that skip; half of them by default")
    parser.add_argument("--choose", choices=("vig", "deepest"), default="vig")
    parser.add_argument("--widen", type=float, nargs=2, default=(0.1, 0.8), metavar=("START", "END"))
    parser.add_argument("--steps", type=int, help="optimizer steps in place of the experiment's")
    parser.add_argument("--samples", type=int, default=20, help="of the calibration")
    parser.add_argument("--limit", type=int, help="questions per task; all by default")
    parser.add_argument("--batch-size", type=int, default=50, help="of the evaluation")
    parser.add_argument("overrides", nargs="*", help="further overrides of all three trainings")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    train(args, "after")
    layers = choose_layers(args)
    skip = ("stage.skip.count=null", f"stage.skip.layers=[{','.join(map(str, layers))}]")
    train(args, "fixed", *skip)
    train(args, "widen", *skip, f"stage.skip.widen=[{args.widen[0]},{args.widen[1]}]")

    rows: list[dict[str, Any]] = []
    reference = training_flops(args.output / "after")
    for case in CASES:
        row: dict[str, Any] = {"case": case, "layers": layers}
        for plan, source in (("base", "after"), ("skip", "fixed")):
            result = evaluate(args, case, plan, source)
            row[f"accuracy_{plan}"] = result.scores.mean.value
            row[f"interval_{plan}"] = [result.scores.mean.low, result.scores.mean.high]
            row[f"inference_flops_{plan}"] = result.cost.decoder_plan / result.cost.decoder_dense
        row["training_flops_ratio"] = training_flops(args.output / case) / reference
        row["last_loss"] = read_metrics(args.output / case / "metrics.jsonl")[-1]["loss"]
        rows.append(row)
    print(f"\n{args.experiment}, V-Skip in layers {sorted(layers)}; training FLOPs relative to after\n")
    print(table(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
