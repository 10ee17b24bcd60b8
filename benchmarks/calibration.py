"""What a calibration costs: the shared sweep against one forward per layer, in one run; ratios, and seconds on a GPU.

python benchmarks/calibration.py                                             # CPU: FLOPs and time at 12 layers
python benchmarks/calibration.py --geometry llava_1_5_7b --samples 20        # one GPU, bf16: a whole calibration
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from skipvision_train.analysis.geometry import load_geometry, text_config
from skipvision_train.calibration.samples import Sample
from skipvision_train.calibration.scores import kl_divergence
from skipvision_train.calibration.sweep import SweepOptions, read_logits, sweep
from skipvision_train.plans import LayerRule, dense
from skipvision_train.plans.rules import VISUAL

IMAGE = 5


def make_model(geometry: str, layers: int | None, device: str) -> LlamaForCausalLM:
    """A random LLaMA; ``cpu`` is 12 layers of width 512."""
    if geometry == "cpu":
        sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8}
        config = LlamaConfig(vocab_size=1000, **sizes)
    else:
        config = text_config(load_geometry(geometry))
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.float32 if device == "cpu" else torch.bfloat16).eval()


def make_samples(count: int, visual: int, text: int, device: str) -> list[Sample]:
    """Prompts of 35 text tokens, one image, the rest of the text; the last token is read."""
    generator, samples = torch.Generator().manual_seed(0), []
    for i in range(count):
        ids = torch.randint(10, 900, (1, visual + text), generator=generator)
        ids[:, 35 : 35 + visual] = IMAGE
        read = torch.zeros_like(ids, dtype=torch.bool)
        read[:, -1] = True
        samples.append(Sample(str(i), "", {"input_ids": ids.to(device)}, read))
    return samples


def plain(model: LlamaForCausalLM, samples: list[Sample]) -> torch.Tensor:
    """The paper's procedure: one dense prefill per sample, and one per layer."""
    depth, rule = model.config.num_hidden_layers, LayerRule(no_attention=VISUAL)
    base = dense().bind(depth)
    values = torch.zeros(depth, len(samples), dtype=torch.float64)
    for column, sample in enumerate(samples):
        sample = Sample(sample.id, "", {**sample.inputs, "logits_to_keep": 1}, sample.read[:, -1:])
        p = read_logits(model, sample, base, IMAGE)
        for layer in range(depth):
            q = read_logits(model, sample, base.with_rule(layer, rule), IMAGE)
            values[layer, column] = kl_divergence(p, q).mean()
    return values


def shared(model: LlamaForCausalLM, samples: list[Sample], max_rows: int) -> torch.Tensor:
    """The same from one sweep."""
    rule = LayerRule(no_attention=VISUAL)
    return sweep(model, samples, rule, kl_divergence, dense(), SweepOptions(IMAGE, group=8, max_rows=max_rows))


def seconds(run: Callable[[], torch.Tensor], device: str) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(run: Callable[[], torch.Tensor]) -> int:
    """What torch's counter sees."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main(argv: Sequence[str] | None = None) -> None:
    """Print every number when it is known, then the table and JSON; ``argv`` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="cpu")
    parser.add_argument("--layers", type=int, help="another depth than the geometry's")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--visual", type=int, default=576)
    parser.add_argument("--text", type=int, default=67)
    parser.add_argument("--max-rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    model = make_model(args.geometry, args.layers, args.device)
    samples = make_samples(args.samples, args.visual, args.text, args.device)
    runs = {"plain": lambda: plain(model, samples), "shared": lambda: shared(model, samples, args.max_rows)}
    depth = model.config.num_hidden_layers
    print(
        f"{args.geometry}, {depth} layers, {args.samples} samples of {args.visual} + {args.text} tokens, {args.device}",
        flush=True,
    )
    difference = (runs["plain"]() - runs["shared"]()).abs().max().item()
    print(f"largest difference of a score: {difference:.3g}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, args.device))
            print(f"round {number + 1}, {name}: {times[name][-1]:.2f} seconds", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    counts = {name: flops(run) for name, run in runs.items()}
    print(f"{'':<8}{'TFLOPs':>10}{'seconds':>10}")
    for name in runs:
        print(f"{name:<8}{counts[name] / 1e12:>10.3f}{medians[name]:>10.2f}")
    result = {
        "case": f"{args.geometry}-{depth}",
        "flops_ratio": counts["shared"] / counts["plain"],
        "time_ratio": medians["shared"] / medians["plain"],
        "seconds": medians["shared"],
        "largest_difference": difference,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
