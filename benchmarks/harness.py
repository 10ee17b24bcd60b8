"""What the benchmarks share: options, geometries, prompts, and interleaved timing.

Only ratios are claims. Every case runs once per round, next to the dense model of the same round; every round begins
with another case, so that neither drift of the machine nor a place in the order favours one. The ratio of a case is the
median over the rounds of its time divided by dense's time in the same round.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

from skipvision_train.analysis.flops import sequence_flops
from skipvision_train.errors import PlanError
from skipvision_train.plans import Attachment, SkipPlan, TokenKind, TokenLayout, attach, dense
from skipvision_train.plans.backends import BACKENDS

HEAD_WIDTH = 128
TEXT_BEFORE = 35
"""Where the image starts in LLaVA-1.5's prompt."""

PAPER_DEPTH = 32
"""The depth for which the papers name layers; other depths get the same relative places."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a decoder whose heads are 128 wide.

    Attributes:
        width: hidden size.
        ffn: hidden size of the feed-forward network.
        layers: depth.
        queries_per_key: query heads that share one key head; 1 without grouped-query attention.
    """

    width: int
    ffn: int
    layers: int
    queries_per_key: int = 1


GEOMETRIES = {
    "small": Geometry(512, 1376, 8),
    "cpu": Geometry(1024, 2752, 12),
    "llava_1_5_7b": Geometry(4096, 11008, 32),
    "llava_1_5_13b": Geometry(5120, 13824, 40),
    "llama3_8b": Geometry(4096, 14336, 32, 4),
}


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        name: how the table calls it.
        build: the plan for a depth.
        static: True if which tokens run what does not depend on their values.
    """

    name: str
    build: Callable[[int], SkipPlan]
    static: bool = True


@dataclass(frozen=True)
class Timing:
    """How a case is run and timed.

    Attributes:
        repeats: timed rounds.
        warmup: rounds before them.
        clock: one of ``CLOCKS``.
        backend: what computes attention in layers that a plan changes.
    """

    repeats: int = 1
    warmup: int = 0
    clock: str = "wall"
    backend: str = "auto"


@dataclass(frozen=True)
class Sample:
    """One measurement: seconds, and what else was measured (peak memory needs an accelerator).

    Attributes:
        seconds: of all that was timed.
        peak_bytes: the most memory that was allocated meanwhile.
        cache_bytes: what the KV cache held.
        optimizer_seconds: the part of ``seconds`` that the optimizer took.
    """

    seconds: float
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    optimizer_seconds: float | None = None


def timing_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="another depth than the geometry's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds that the processor spent on this process, for a machine that others use, too; one thread",
    )
    parser.add_argument("--json", type=Path, help="also write header and results to this file")
    return parser


def common_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that the benchmarks of plans take."""
    parser = timing_parser(description)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="cpu")
    parser.add_argument("--width", type=int, help="another width than the geometry's; the FFN scales with it")
    parser.add_argument("--visual", type=int, nargs="+", default=[576], help="visual tokens of a row; several are run")
    parser.add_argument("--text", type=int, default=67, help=f"text tokens of a row, {TEXT_BEFORE} before the image")
    parser.add_argument("--retained", type=float, default=0.5, help="share of the visual tokens that Skip-FFN retains")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows; several are run")
    parser.add_argument("--dtype", choices=DTYPES, help="fp32 on the CPU and bf16 elsewhere unless given")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="attention in layers that a plan changes")
    parser.add_argument("--plans", nargs="+", help="only cases whose name contains one of these")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, choose the dtype, and exit with a message on sizes that cannot be."""
    args = parse_timing(parser, argv)
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    unit = HEAD_WIDTH * GEOMETRIES[args.geometry].queries_per_key
    if args.width is not None and (args.width <= 0 or args.width % unit):
        parser.error(f"--width {args.width}: {args.geometry} needs a positive multiple of {unit}")
    if not 0 <= args.retained <= 1:
        parser.error(f"--retained {args.retained}: a share from 0 to 1 is needed")
    return args


def parse_timing(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, note the command, and exit with a message on options of :func:`timing_parser` that cannot be.

    ``parser`` has the option ``--text``, too.
    """
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", *sys.argv] if argv is None else [parser.prog, *argv])
    if args.text <= TEXT_BEFORE:
        parser.error(f"--text {args.text}: more than {TEXT_BEFORE} are needed, {TEXT_BEFORE} stand before the image")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1 is needed")
    if args.clock == "cpu" and (args.device != "cpu" or torch.get_num_threads() > 1):
        parser.error("--clock cpu: sees one thread of the processor; run with --device cpu and OMP_NUM_THREADS=1")
    return args


def timing_of(args: argparse.Namespace) -> Timing:
    """What the options say on timing."""
    return Timing(args.repeats, args.warmup, args.clock, args.backend)


def decoder_config(args: argparse.Namespace) -> LlamaConfig:
    """The decoder's configuration; the vocabulary is small, its LM head is not measured."""
    geometry = GEOMETRIES[args.geometry]
    width = args.width or geometry.width
    heads = width // HEAD_WIDTH
    return LlamaConfig(  # type: ignore[call-arg]
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=geometry.ffn * width // geometry.width,
        num_hidden_layers=args.layers or geometry.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // geometry.queries_per_key,
        max_position_embeddings=32768,
        attn_implementation="sdpa",
    )


def make_decoder(config: LlamaConfig, dtype: torch.dtype, device: str) -> LlamaModel:
    """A LLaMA decoder with random weights, made where and in the dtype in which it runs."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaModel._from_config(config, dtype=dtype).eval()


def make_layout(batch: int, image: Sequence[TokenKind], text: int) -> TokenLayout:
    """Equal rows, (batch, text + image): 35 text tokens, the image's, the rest of the text. On the CPU."""
    kinds = [TokenKind.TEXT] * TEXT_BEFORE + [*image] + [TokenKind.TEXT] * (text - TEXT_BEFORE)
    return TokenLayout.from_kinds(torch.tensor([[int(kind) for kind in kinds]] * batch))


def kind_counts(layout: TokenLayout) -> dict[TokenKind, float]:
    """How many positions of the first row are of each kind."""
    return {kind: int((layout.kinds[0] == kind).sum()) for kind in TokenKind}


def places(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """The layers of a paper's 32-layer model, at the same relative places of another depth; ascending, from 1 on."""
    found: list[int] = []
    for layer in layers:
        found.append(max(round(layer * depth / PAPER_DEPTH), found[-1] + 1 if found else 1))
    return tuple(found)


def last_layers(share: float, depth: int) -> tuple[int, ...]:
    """The last ``share`` of the layers. Which layers they are changes neither time nor FLOPs."""
    return tuple(range(depth - round(share * depth), depth))


def theoretical(config: LlamaConfig, layout: TokenLayout, plan: SkipPlan) -> float:
    """FLOPs of one row's prefill: decoder layers only, attention as a causal kernel computes it, scores included."""
    counts = kind_counts(layout)
    behind = counts[TokenKind.TEXT] - TEXT_BEFORE
    return sequence_flops(config, counts, plan, asking=behind, causal=True, text_before=TEXT_BEFORE).total


def chosen(cases: Sequence[Case], wanted: Sequence[str] | None) -> list[Case]:
    """The cases whose name contains one of ``wanted``; all if it is None. Exits if that leaves nothing."""
    found = [case for case in cases if wanted is None or any(part in case.name for part in wanted)]
    if not found:
        names = "; ".join(case.name for case in cases)
        raise SystemExit(f"--plans {' '.join(wanted or ())}: no such case; there are {names}")
    return found


def attached(model: LlamaModel, plan: SkipPlan | None, backend: str) -> AbstractContextManager[Attachment | None]:
    """The model under a plan, its attention computed by ``backend``; the stock model for None."""
    return nullcontext() if plan is None else attach(model, plan, backend=backend)


def layout_keyword(attachment: Attachment | None, layout: TokenLayout) -> dict[str, TokenLayout]:
    """What a prefill passes besides the embeddings: the layout, if the plan changed the decoder."""
    return {"token_layout": layout} if attachment is not None and attachment.active else {}


class Stopwatch:
    """Seconds between entry and exit of a ``with`` block, all work of the device included, and the peak memory."""

    def __init__(self, device: torch.device, clock: str) -> None:
        self.clock = CLOCKS[clock]
        self.device = device
        self.seconds = 0.0
        self.peak_bytes: int | None = None

    def __enter__(self) -> Stopwatch:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        self._start = self.clock()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        self.seconds = self.clock() - self._start


def interleave(
    runs: Mapping[str, Callable[[], Sample]], repeats: int, warmup: int, unit: str | None = None
) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """Run every case once per round, beginning with another case in every round.

    Args:
        runs: by case.
        repeats: timed rounds.
        warmup: rounds before them.
        unit: what a sample's seconds are of; print every sample when it is taken, so that a run which somebody ends
            leaves what it has measured. None: print nothing.

    Returns:
        The samples of the timed rounds by case, and for the cases whose plan was refused the reason.
    """
    names = list(runs)
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    refused: dict[str, str] = {}
    for number in range(warmup + repeats):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if name in refused:
                continue
            try:
                sample = runs[name]()
            except PlanError as error:
                refused[name] = str(error)
                continue
            if unit is not None:
                which = "warm-up" if number < warmup else f"round {number - warmup + 1}"
                print(f"{which}, {name}: {1000 * sample.seconds:.2f} ms per {unit}", flush=True)
            if number >= warmup:
                samples[name].append(sample)
    return {name: taken for name, taken in samples.items() if name not in refused}, refused


def compare(own: Sequence[Sample], base: Sequence[Sample], flops_ratio: float) -> dict[str, float | None]:
    """Time ratio (median over rounds, with half its interquartile range), and the share of the saving that arrived."""
    ratios = torch.tensor([a.seconds / b.seconds for a, b in zip(own, base, strict=True)], dtype=torch.float64)
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    saving = 1 - flops_ratio
    return {
        "ms": 1000 * median([sample.seconds for sample in own]),
        "time_ratio": middle,
        "spread": (high - low) / 2,
        "flops_ratio": flops_ratio,
        "realised": (1 - middle) / saving if abs(saving) > 1e-9 else None,
    }


def median(values: Sequence[float]) -> float:
    """The median, the mean of the middle two for an even number."""
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def measure(
    cases: Sequence[Case],
    depth: int,
    run: Callable[[SkipPlan | None], Sample],
    flops: Callable[[SkipPlan], float],
    describe: Callable[[SkipPlan, Sequence[Sample]], dict[str, float | None]],
    timing: Timing,
) -> list[dict[str, Any]]:
    """Time the stock model and every case, interleaved.

    Args:
        cases: what is compared with the stock model.
        depth: of the model.
        run: one measurement under a plan; None is the stock model.
        flops: what is timed, in FLOPs.
        describe: the columns that the benchmark adds.
        timing: how many rounds.

    Returns:
        One object per case, the stock model first: ``case``, ``static``, ``refused`` (a reason, or None), ``ms``,
        ``time_ratio``, ``spread``, ``flops_ratio``, ``realised`` and what ``describe`` adds.
    """
    stock = Case("dense", lambda depth: dense())
    plans: dict[str, SkipPlan] = {}
    refused: dict[str, str] = {}
    for case in (stock, *cases):
        try:
            plans[case.name] = case.build(depth).bind(depth)
        except PlanError as error:
            refused[case.name] = str(error)
    runs = {name: partial(run, None if name == stock.name else plan) for name, plan in plans.items()}
    samples, refused_running = interleave(runs, timing.repeats, timing.warmup)
    refused |= refused_running
    base, base_flops = samples[stock.name], flops(plans[stock.name])
    rows: list[dict[str, Any]] = []
    for case in (stock, *cases):
        row: dict[str, Any] = {"case": case.name, "static": case.static, "refused": refused.get(case.name)}
        if (taken := samples.get(case.name)) is not None:
            plan = plans[case.name]
            row |= compare(taken, base, flops(plan) / base_flops) | describe(plan, taken)
        else:
            row = dict.fromkeys(rows[0]) | row
        rows.append(row)
    return rows
