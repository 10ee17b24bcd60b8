"""What the loader does in a second on one core: JPEG files to pixels, and conversations to batches of tokens.

python benchmarks/loader.py                                  # about ten minutes; CPU seconds of one thread
python benchmarks/loader.py --settings 336 --sizes 640x480 --images 50

Images are compared, in one run and interleaved, with transformers' CLIP processors, fed as LLaVA feeds them, and with
a plain torchvision pipeline: time, and how far their pixels are from ours. The last line is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
import transformers
from harness import CLOCKS, Sample, interleave, median
from loader_cases import BASE, DECODE, OURS, SCENE, SETTINGS, SIZES, Case, cases, difference, write_photos
from output import _commit, _cpu_name, finish, table
from PIL import Image, features
from transformers import PreTrainedTokenizerBase

from skipvision_train.data.collate import collate, collate_packed
from skipvision_train.data.packing import pack
from skipvision_train.data.processor import Example
from skipvision_train.data.records import Turn
from skipvision_train.data.templates import EOT, control_id, get_template
from skipvision_train.plans.rules import TokenKind
from skipvision_train.sketches.checkpoints import train_tokenizer

VOCABULARY = 512
BATCH = 8

IMAGE_COLUMNS = {
    "images_per_second": "images/s per core",
    "ms": "ms",
    "own_ms": "ms without decoding",
    "speed": f"speed of {BASE}",
    "spread": "±",
    "mean_levels": "mean difference, levels",
    "max_levels": "at most",
}
TOKEN_COLUMNS = {"tokens_per_second": "tokens/s per core", "ms": "ms", "filled": "places filled"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with a message on values that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="of the images")
    parser.add_argument("--images", type=int, default=140, help="photos, of each size in turn")
    parser.add_argument("--sizes", type=_size, nargs="+", default=list(SIZES), help="of the photos, such as 640x480")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--samples", type=int, default=2000, help="conversations; 0 leaves the tokens out")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="seconds of this thread, or of the wall clock")
    parser.add_argument("--json", type=Path, help="also write header and results to this file")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", *sys.argv] if argv is None else [parser.prog, *argv])
    for name, least in (("images", 1), ("samples", 0), ("repeats", 1), ("warmup", 0), ("length", 1024)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: at least {least} is needed")
    return args


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (
        cross and width.isdecimal() and height.isdecimal() and 0 < int(width) <= SCENE and 0 < int(height) <= SCENE
    ):
        raise argparse.ArgumentTypeError(f"{text!r}; use WIDTHxHEIGHT, up to {SCENE}x{SCENE}")
    return int(width), int(height)


def timed(run: Callable[[], object], clock: str) -> Sample:
    """One measurement."""
    start = CLOCKS[clock]()
    run()
    return Sample(CLOCKS[clock]() - start)


def measure_images(args: argparse.Namespace, setting: str, files: Sequence[Path]) -> list[dict[str, Any]]:
    """One object per way from a file to pixels; every round takes all files each way."""
    lines = cases(setting)

    def whole(case: Case) -> None:
        for file in files:
            case.run(file)

    runs = {case.name: partial(timed, partial(whole, case), args.clock) for case in lines}
    samples, _ = interleave(runs, args.repeats, args.warmup)
    seconds = {name: [sample.seconds for sample in taken] for name, taken in samples.items()}
    ours = next(case for case in lines if case.name == OURS)
    rows = []
    for case in lines:
        own, base = seconds[case.name], seconds[BASE]
        speeds = torch.tensor([b / a for a, b in zip(own, base, strict=True)], dtype=torch.float64)
        low, high = speeds.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
        row: dict[str, Any] = {"case": case.name, "setting": setting, "refused": None}
        row |= {"images_per_second": len(files) / median(own), "ms": 1000 * median(own) / len(files)}
        row |= {"own_ms": None, "speed": median(speeds.tolist()), "spread": (high - low) / 2}
        if case.name != DECODE:
            row["own_ms"] = row["ms"] - 1000 * median(seconds[DECODE]) / len(files)
        rows.append(row | compared(case, ours, setting, files))
    return rows


def compared(case: Case, ours: Case, setting: str, files: Sequence[Path]) -> dict[str, float | None]:
    """How far a case's pixels are from ours, in levels of 255, over all files."""
    if case.name in (DECODE, OURS):
        return {"mean_levels": None, "max_levels": None}
    found = []
    for file in files:
        own, reference = case.run(file), ours.run(file)
        assert own is not None
        assert reference is not None
        found.append(difference(own, reference, SETTINGS[setting][0]))
    return {"mean_levels": sum(mean for mean, _ in found) / len(found), "max_levels": max(most for _, most in found)}


def conversations(count: int, tokenizer: PreTrainedTokenizerBase) -> list[list[Turn]]:
    """Turns of the tokenizer's own words: one to eight questions and answers, most answers short, a few long."""
    random = np.random.default_rng(0)
    words = sorted(word for word in tokenizer.get_vocab() if word[0] == "Ġ" and word[1:].isalpha())
    text = tokenizer.convert_tokens_to_string(words).split()

    def said(mean: float) -> str:
        return " ".join(random.choice(text, 1 + min(200, int(random.lognormal(mean, 0.8)))))

    found = []
    for _ in range(count):
        pairs = [(said(2.3), said(2.8)) for _ in range(random.integers(1, 9))]
        found.append([Turn(r, t) for pair in pairs for r, t in zip(("user", "assistant"), pair, strict=True)])
    return found


def measure_tokens(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Encoding alone, and batches of encoded samples, padded and packed; no images."""
    tokenizer = train_tokenizer(VOCABULARY, 0)
    template, pad = get_template("llama3"), control_id(tokenizer, EOT)
    texts = conversations(args.samples, tokenizer)

    def encode(turns: Sequence[Turn]) -> Example:
        encoded = template.encode(turns, tokenizer, [], -1, args.length)
        return Example(encoded.input_ids, encoded.labels, [int(TokenKind.TEXT)] * len(encoded.input_ids), None)

    lengths = np.array([len(encode(turns).input_ids) for turns in texts])
    bins = pack(lengths, args.length)

    def batches(rows: Sequence[Sequence[int]], packed: bool) -> int:
        places = 0
        for row in rows:
            samples = [encode(texts[index]) for index in row]
            batch = collate_packed([samples], pad) if packed else collate(samples, "right", pad)
            places += args.length if packed else batch["input_ids"].numel()
        return places

    padded = [range(start, min(start + BATCH, len(texts))) for start in range(0, len(texts), BATCH)]
    full = [bins[index] for index in range(len(bins))]
    runs: dict[str, Callable[[], object]] = {
        "encoded": lambda: [encode(turns) for turns in texts],
        f"padded to batches of {BATCH}": partial(batches, padded, False),
        f"packed to rows of {args.length}": partial(batches, full, True),
    }
    samples, _ = interleave({name: partial(timed, run, args.clock) for name, run in runs.items()}, args.repeats, 1)
    places = (None, batches(padded, False), batches(full, True))
    rows: list[dict[str, Any]] = []
    for (name, taken), held in zip(samples.items(), places, strict=True):
        seconds, total = median([sample.seconds for sample in taken]), int(lengths.sum())
        row = {"case": name, "setting": "tokens", "refused": None, "tokens_per_second": total / seconds}
        rows.append(row | {"ms": 1000 * seconds / len(texts), "filled": held and total / held})
    return rows


def header(args: argparse.Namespace) -> dict[str, str]:
    """What a reader needs to know about a run."""
    return {
        "command": args.command,
        "hardware": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}, transformers "
        f"{transformers.__version__}, Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}",
        "commit": _commit(),
        "rounds": f"{args.repeats} timed, {args.warmup} before them, {args.clock} clock",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` as on the command line."""
    args = parse(argv)
    torch.set_num_threads(1)
    head = header(args)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_photos(Path(folder), args.images, args.sizes, args.quality) if args.settings else []
        if files:
            sizes = [Image.open(file).size for file in files]
            bits = 8 * sum(file.stat().st_size for file in files) / sum(width * height for width, height in sizes)
            named = " ".join(f"{width}x{height}" for width, height in args.sizes)
            head["photos"] = f"{len(files)} of {named}, quality {args.quality}, {bits:.1f} bits per pixel"
        print("\n".join(f"{name}: {value}" for name, value in head.items()), flush=True)
        for setting in args.settings:
            rows = measure_images(args, setting, files)
            vision, tiling = SETTINGS[setting]
            title = f"Images, {setting}: {vision.image_size} pixels, tiling {tiling.mode}"
            print("\n".join(table(title, IMAGE_COLUMNS, rows)), flush=True)
            results += rows
    if args.samples:
        rows = measure_tokens(args)
        print("\n".join(table(f"Text of {args.samples} conversations", TOKEN_COLUMNS, rows)), flush=True)
        results += rows
    finish(args, head, results)


if __name__ == "__main__":
    main()
