"""What a training step saves: the dense arrangement against Skip-Vision in the paper's three settings, in one run.

OMP_NUM_THREADS=1 python benchmarks/train_step.py --clock cpu              # CPU: scaled down, full token counts
python benchmarks/train_step.py --settings llava,cos --part step --repeats 9
python benchmarks/train_step.py --precision bf16_states --layers 16 --accumulation 4 --warmup 3 --repeats 9
                                                                           # one GPU: LLaMA3-8B and CLIP ViT-L/14

Timed: forward, backward, clipping and AdamW of the model that `skipvision train experiment=...` builds, on random
weights and images, with what that experiment trains (the tower in CoS alone); and the decoder's layers alone, forward
and backward. Both arrangements share their weights, and have the same rows: one image and --text tokens. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import TEXT_BEFORE, Sample, compare, interleave, median, parse_timing, timing_parser
from output import finish, header, table
from step_flops import peak_flops
from train_models import PRECISIONS, SETTINGS, Arrangement, Trainer, make_pair

from skipvision_train.config.specs import DeepSpeedSpec
from skipvision_train.training.memory import estimate_memory

PARTS = ("step", "decoder")

BATCH = {"cpu": {"cos": 2, "llava": 2, "llava_hd": 1}, "llama3_8b": {"cos": 4, "llava": 4, "llava_hd": 2}}
"""Rows by geometry and setting; the rows of LLaVA-HD are twice as long."""

COLUMNS = {
    "ms": "ms",
    "time_ratio": "time of dense",
    "spread": "±",
    "flops_ratio": "FLOPs of dense",
    "realised": "realised",
    "optimizer_ms": "optimizer ms",
    "compute_time_ratio": "time without it",
    "compute_realised": "realised",
    "mfu": "MFU",
    "saved_bytes": "saved MiB",
    "peak_bytes": "peak MiB",
}
DECODER_COLUMNS = {key: COLUMNS[key] for key in ("ms", "time_ratio", "spread", "flops_ratio", "realised", "mfu")} | {
    "paper_ratio": "by the paper's formula",
    "peak_bytes": "peak MiB",
}


def names(allowed: Sequence[str], text: str) -> list[str]:
    """The names in a comma-separated list, in its order.

    Raises:
        argparse.ArgumentTypeError: one that is not allowed.
    """
    found = text.split(",")
    if unknown := [name for name in found if name not in allowed]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; use {','.join(allowed)} or some of them")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with a message on values that cannot be."""
    parser = timing_parser(__doc__)
    parser.set_defaults(repeats=3, backend="auto")
    parser.add_argument("--geometry", choices=("cpu", "llama3_8b"), help="cpu on the CPU, llama3_8b elsewhere")
    parser.add_argument("--width", type=int, default=768, help="of the CPU geometry's decoder; a multiple of 256")
    parser.add_argument(
        "--settings", type=partial(names, tuple(SETTINGS)), default=list(SETTINGS), help=",".join(SETTINGS)
    )
    parser.add_argument("--part", type=partial(names, PARTS), default=list(PARTS), help="the whole step, the decoder")
    parser.add_argument("--batch", type=int, nargs="+", help="rows; one number, or one for each setting")
    parser.add_argument("--text", type=int, default=128, help="text tokens of a row")
    parser.add_argument("--supervised", type=int, default=64, help="of them, at its end")
    parser.add_argument("--accumulation", type=int, default=1, help="batches of an optimizer step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="autocast: fp32 weights, computed in bf16; bf16: bf16 weights, fp32 copies and moments in the optimizer; "
        "bf16_states: all of it in bf16; fp32 on the CPU and bf16 elsewhere unless given",
    )
    args = parse_timing(parser, argv)
    on_cpu = args.device == "cpu"
    args.geometry = args.geometry or ("cpu" if on_cpu else "llama3_8b")
    args.precision = args.dtype = args.precision or ("fp32" if on_cpu else "bf16")
    if args.width < 1 or args.width % 256:
        parser.error(f"--width {args.width}: a positive multiple of 256 is needed")
    args.batch = args.batch or [BATCH[args.geometry][setting] for setting in args.settings]
    if (smallest := min(args.layers or 1, args.accumulation, *args.batch)) < 1:
        parser.error(f"--layers, --batch, --accumulation: {smallest} among them; at least 1 is needed")
    if len(args.batch) not in (1, len(args.settings)):
        parser.error(f"--batch: {len(args.batch)} numbers for {len(args.settings)} settings; give one, or one for each")
    if not 1 <= args.supervised <= args.text - TEXT_BEFORE:
        parser.error(f"--supervised {args.supervised}: 1 to {args.text - TEXT_BEFORE} stand behind the image")
    args.batch = args.batch * len(args.settings) if len(args.batch) == 1 else args.batch
    return args


def memory_line(args: argparse.Namespace, skip: Arrangement) -> str:
    """What weights, gradients and Adam's states take, in all and per decoder layer; activations come on top."""

    def taken(parameters: int, trainable: int) -> float:
        if args.precision == "bf16":
            return estimate_memory(parameters, trainable, "bf16", DeepSpeedSpec(stage=1), 1).total
        total = estimate_memory(parameters, trainable, "fp32", None, 1).total
        return total / 2 if args.precision == "bf16_states" else total

    weights = list(skip.model.parameters())
    layer = sum(weight.numel() for weight in skip.model.language_model.model.layers[0].parameters())
    trainable = sum(weight.numel() for weight in weights if weight.requires_grad)
    total = taken(sum(weight.numel() for weight in weights), trainable)
    line = f"{total / 1e9:.1f} GB, of them {taken(layer, layer) / 1e9:.2f} per decoder layer"
    if args.device == "cpu":
        return line
    return f"{line}; the device has {torch.cuda.get_device_properties(args.device).total_memory / 1e9:.1f} GB"


def describe_part(
    args: argparse.Namespace, part: str, arrangement: Arrangement, whole: Arrangement, samples: dict[str, list[Sample]]
) -> dict[str, Any]:
    """One line of a table: an arrangement against the dense one, of the whole step or of the decoder alone."""
    own, base = samples[f"{part} {arrangement.name}"], samples[f"{part} {whole.name}"]

    def flops(of: Arrangement, checkpointing: bool) -> float:
        counted = of.flops(checkpointing)
        return counted.total if part == "step" else counted.decoder

    ratio = flops(arrangement, args.checkpointing) / flops(whole, args.checkpointing)
    row: dict[str, Any] = {"case": arrangement.name, "part": part, "refused": None} | compare(own, base, ratio)
    peaks = [sample.peak_bytes for sample in own if sample.peak_bytes is not None]
    rows = len(arrangement.batch["input_ids"]) * (args.accumulation if part == "step" else 1)
    per_second = rows * flops(arrangement, False) / median([sample.seconds for sample in own])
    fast = args.device != "cpu" and args.precision != "fp32"
    peak = peak_flops(torch.cuda.get_device_name(args.device)) if fast else None
    row |= {
        "peak_bytes": max(peaks, default=None),
        "flops_per_row": flops(arrangement, args.checkpointing),
        "flops_per_second": per_second,
        "mfu": None if peak is None else per_second / peak,
        "saved_bytes": None,
    }
    if part == "decoder":
        return row | {"paper_ratio": arrangement.paper_flops() / whole.paper_flops()}
    without = compare(_without_optimizer(own), _without_optimizer(base), ratio)
    return row | {
        "optimizer_ms": 1000 * median([sample.optimizer_seconds or 0.0 for sample in own]),
        "compute_time_ratio": without["time_ratio"],
        "compute_realised": without["realised"],
        "flops_of": vars(arrangement.flops(args.checkpointing)),
    }


def _without_optimizer(samples: Sequence[Sample]) -> list[Sample]:
    return [Sample(sample.seconds - (sample.optimizer_seconds or 0.0)) for sample in samples]


def measure_setting(args: argparse.Namespace, pair: Sequence[Arrangement]) -> list[dict[str, Any]]:
    """Both arrangements, both parts, interleaved; the whole steps first, the dense one first."""
    trainer = Trainer(args, pair[1])
    timed: dict[str, Callable[[Arrangement], Sample]] = {"step": trainer.step, "decoder": trainer.decoder}
    runs = {f"{part} {of.name}": partial(timed[part], of) for part in args.part for of in pair}
    samples, _ = interleave(runs, args.repeats, args.warmup, "step")
    rows = [describe_part(args, part, of, pair[0], samples) for part in args.part for of in pair]
    if not args.checkpointing:  # what it keeps is hidden from the hooks that count
        saved = {of.name: trainer.saved_bytes(of) for of in pair}
        rows = [row | {"saved_bytes": saved[row["case"]] if row["part"] == "step" else None} for row in rows]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` as on the command line."""
    args = parse(argv)
    head: dict[str, Any] = {}
    results = []
    for setting, batch in zip(args.settings, args.batch, strict=True):
        pair = make_pair(args, setting, batch)
        if not head:
            head = header(args, pair[0].config.text_config)
            print("\n".join(f"{name}: {value}" for name, value in head.items()))
        vision, lengths = pair[0].config.vision_config, [of.batch["input_ids"].shape[1] for of in pair]
        print(f"\n{setting}: tower of {max(vision.depths)} layers, width {vision.width}; model state", end=" ")
        print(memory_line(args, pair[1]), flush=True)
        rows = measure_setting(args, pair)
        what = f"batch {batch}, {lengths[0]} tokens dense, {lengths[1]} under Skip-Vision, {args.text} of them text"
        for part, title, columns in (("step", "Training step", COLUMNS), ("decoder", "Decoder alone", DECODER_COLUMNS)):
            if part in args.part:
                print("\n".join(table(f"{title}, {what}", columns, [r for r in rows if r["part"] == part])), flush=True)
        common = {"setting": setting, "batch": batch, "geometry": args.geometry, "tokens": lengths}
        results += [{**row, **common} for row in rows]
        del pair
        gc.collect()  # a model refers to itself in circles, and the next setting needs its memory
        torch.cuda.empty_cache()
    finish(args, head, results)


if __name__ == "__main__":
    main()
