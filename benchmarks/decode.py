"""What a plan saves while decoding: time of a step and memory of the KV cache after prefill, dense against plans.

python benchmarks/decode.py                                             # CPU, 12 layers of width 1024
python benchmarks/decode.py --visual 576 2880 --steps 32
python benchmarks/decode.py --geometry llava_1_5_7b --visual 2880 --batch 1 8

Timed: decoder steps over given tokens, one by one, after a prefill under the same plan; without LM head, so that every
case does the same number of steps on the same tokens. An image is retained, middle, summary, skipped and summary
tokens. "cache" is what the keys and values hold allocated after prefill, "expected" what `kv_cache_bytes` says they
should; dense's row is what every plan's cache holds before anything leaves it. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from harness import (
    DTYPES,
    Case,
    Sample,
    Stopwatch,
    Timing,
    attached,
    chosen,
    common_parser,
    decoder_config,
    kind_counts,
    layout_keyword,
    make_decoder,
    make_layout,
    measure,
    median,
    parse,
    places,
    timing_of,
)
from output import finish, header, table
from transformers import LlamaModel

from skipvision_train.analysis.flops import decode_flops, kv_cache_bytes
from skipvision_train.plans import SkipPlan, TokenKind, TokenLayout, bytes_held, compose, fastv, skip_ffn, skip_kv, vtw
from skipvision_train.plans.cache import growing_cache

COLUMNS = {
    "ms": "ms per step",
    "time_ratio": "time of dense",
    "spread": "±",
    "flops_ratio": "FLOPs of dense",
    "realised": "realised",
    "cache_bytes": "cache MiB",
    "expected_bytes": "expected MiB",
    "cache_ratio": "cache of dense",
}


def skipping(level: str) -> SkipPlan:
    """Skip-FFN, with what leaves the cache by a row of Skip-Vision's Table 6."""
    return compose([skip_ffn(evict=()), skip_kv(level)])


CASES = (
    Case("skip_ffn, nothing evicted", lambda depth: skip_ffn(evict=())),
    Case("skip_ffn, small evicted", lambda depth: skipping("small")),
    Case("skip_ffn, middle + small evicted", lambda depth: skipping("middle + small")),
    Case("skip_ffn, all but summary evicted", lambda depth: skipping("all but summary")),
    Case("vtw", lambda depth: vtw(depth // 2)),
    Case("fastv", lambda depth: fastv(places((3,), depth)[0], 0.5), static=False),
)


def make_image(visual: int, retained: float, middle: float, summary: int) -> list[TokenKind]:
    """The kinds of an image's tokens; ``summary`` of them come on top of the ``visual`` ones, half before the skipped.

    Args:
        visual: retained, middle and skipped tokens together.
        retained: the share of them that Skip-FFN retains, middle ones included.
        middle: the share of the retained ones that are of a middle level.
        summary: the number of summary tokens.
    """
    kept = round(retained * visual)
    inner = round(middle * kept)
    kinds = [TokenKind.RETAINED] * (kept - inner) + [TokenKind.MIDDLE] * inner + [TokenKind.SUMMARY] * (summary // 2)
    return kinds + [TokenKind.SKIPPED] * (visual - kept) + [TokenKind.SUMMARY] * (summary - summary // 2)


@torch.inference_mode()
def decode(
    model: LlamaModel,
    embeds: torch.Tensor,
    layout: TokenLayout,
    tokens: torch.Tensor,
    plan: SkipPlan | None,
    timing: Timing,
) -> Sample:
    """Prefill ``embeds`` (B, T, C) under ``plan``, then feed ``tokens`` (steps, B, 1) one by one; seconds per step."""
    with attached(model, plan, timing.backend) as attachment:
        cache = growing_cache(model.config)
        model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **layout_keyword(attachment, layout))
        held = bytes_held(cache)
        with Stopwatch(embeds.device, timing.clock) as watch:
            for step in tokens:
                model(input_ids=step, past_key_values=cache, use_cache=True)
    return Sample(watch.seconds / len(tokens), watch.peak_bytes, held)


def measure_setting(
    model: LlamaModel, cases: Sequence[Case], layout: TokenLayout, steps: int, timing: Timing
) -> list[dict[str, Any]]:
    """All cases at one layout."""
    config, batch = model.config, layout.kinds.shape[0]
    counts = kind_counts(layout)
    embeds = torch.randn(*layout.kinds.shape, config.hidden_size, device=model.device, dtype=model.dtype)
    tokens = torch.randint(config.vocab_size, (steps, batch, 1), device=model.device)

    def run(plan: SkipPlan | None) -> Sample:
        return decode(model, embeds, layout, tokens, plan, timing)

    def flops(plan: SkipPlan) -> float:
        return sum(decode_flops(config, counts, plan, step).total for step in range(1, steps + 1)) / steps

    def describe(plan: SkipPlan, samples: Sequence[Sample]) -> dict[str, float | None]:
        return {
            "cache_bytes": median([sample.cache_bytes for sample in samples if sample.cache_bytes is not None]),
            "expected_bytes": batch * kv_cache_bytes(config, counts, plan, model.dtype.itemsize),
            "cache_ratio": None,
        }

    rows = measure(cases, config.num_hidden_layers, run, flops, describe, timing)
    for row in rows:
        if row["refused"] is None:
            row["cache_ratio"] = row["cache_bytes"] / rows[0]["cache_bytes"]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` as on the command line."""
    parser = common_parser(__doc__)
    parser.add_argument("--middle", type=float, default=0.5, help="share of the retained ones that are middle tokens")
    parser.add_argument("--summary", type=int, default=2, help="summary tokens of an image")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded after each prefill")
    args = parse(parser, argv)
    cases = chosen(CASES, args.plans)
    config = decoder_config(args)
    head = header(args, config)
    print("\n".join(f"{name}: {value}" for name, value in head.items()))
    model = make_decoder(config, DTYPES[args.dtype], args.device)

    results = []
    for visual in args.visual:
        image = make_image(visual, args.retained, args.middle, args.summary)
        for batch in args.batch:
            layout = make_layout(batch, image, args.text)
            rows = measure_setting(model, cases, layout, args.steps, timing_of(args))
            title = f"Decoding, batch {batch}, {args.steps} steps after {layout.kinds.shape[1]} tokens, {visual} visual"
            print("\n".join(table(title, COLUMNS, rows)), flush=True)
            results += [{**row, "geometry": args.geometry, "visual": visual, "batch": batch} for row in rows]
    finish(args, head, results)


if __name__ == "__main__":
    main()
