"""What a plan saves at prefill: a random LLaMA decoder, dense against every plan, interleaved in one run.

python benchmarks/prefill.py                                                        # CPU, 12 layers of width 1024
python benchmarks/prefill.py --visual 576 2880 --repeats 15
python benchmarks/prefill.py --geometry llava_1_5_7b --visual 576 2880 --batch 1 8  # one GPU, bf16
python benchmarks/prefill.py --plans vskip shortv --repeats 3                       # some cases

Timed: the decoder's forward over random embeddings into an empty KV cache, without LM head. The FLOPs are those of the
decoder layers. "realised" is the share of the saving in FLOPs that is a saving in time. The last line is JSON.
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
    last_layers,
    layout_keyword,
    make_decoder,
    make_layout,
    measure,
    parse,
    places,
    theoretical,
    timing_of,
)
from output import finish, header, table
from transformers import LlamaModel

from skipvision_train.plans import (
    SkipPlan,
    TokenKind,
    TokenLayout,
    compose,
    dense,
    fastv,
    ffn_skip,
    pyramiddrop,
    shortv,
    skip_ffn,
    sparsevlm,
    vskip,
    vtw,
)
from skipvision_train.plans.cache import growing_cache
from skipvision_train.plans.methods import SPARSEVLM_KEEP

VSKIP_SHARE = 19 / 32
"""V-Skip and ShortV take 19 of LLaVA-1.5-7B's 32 layers."""

COLUMNS = {
    "ms": "ms",
    "time_ratio": "time of dense",
    "spread": "±",
    "flops_ratio": "FLOPs of dense",
    "realised": "realised",
    "peak_bytes": "peak MiB",
}


def sparsevlm_shares(depth: int, version: int) -> SkipPlan:
    """SparseVLM's 192-token table as shares, so that it fits any number of visual tokens."""
    shares = [amount / 576 for amount in SPARSEVLM_KEEP[version][192]]
    return sparsevlm(version=version, layers=places((2, 6, 15), depth), keep=shares)


def fastv_at(depth: int) -> SkipPlan:
    """FastV with K = 3 of 32 layers and half of the visual tokens."""
    return fastv(places((3,), depth)[0], 0.5)


CASES = (
    Case("dense, attached", lambda depth: dense()),
    Case("vskip 1/2, zero", lambda depth: vskip(last_layers(1 / 2, depth))),
    Case("vskip 1/2, norm", lambda depth: vskip(last_layers(1 / 2, depth), bypass="norm")),
    Case("vskip 19/32, zero", lambda depth: vskip(last_layers(VSKIP_SHARE, depth))),
    Case("vskip 19/32, norm", lambda depth: vskip(last_layers(VSKIP_SHARE, depth), bypass="norm")),
    Case("ffn_skip 19/32", lambda depth: ffn_skip(last_layers(VSKIP_SHARE, depth))),
    Case("shortv 19/32", lambda depth: shortv(last_layers(VSKIP_SHARE, depth))),
    Case("skip_ffn", lambda depth: skip_ffn(evict=())),
    Case("vtw", lambda depth: vtw(depth // 2)),
    Case("fastv", fastv_at, static=False),
    Case("pyramiddrop", lambda depth: pyramiddrop(places((8, 16, 24), depth)), static=False),
    Case("sparsevlm", lambda depth: sparsevlm_shares(depth, 1), static=False),
    Case("sparsevlm+", lambda depth: sparsevlm_shares(depth, 2), static=False),
    Case(
        "fastv + vskip 19/32",
        lambda depth: compose([fastv_at(depth), vskip(last_layers(VSKIP_SHARE, depth))]),
        static=False,
    ),
)


@torch.inference_mode()
def prefill(
    model: LlamaModel, embeds: torch.Tensor, layout: TokenLayout, plan: SkipPlan | None, timing: Timing
) -> Sample:
    """One prefill of ``embeds`` (B, T, C) into a fresh cache; the stock model if ``plan`` is None."""
    with attached(model, plan, timing.backend) as attachment:
        keyword = layout_keyword(attachment, layout)
        cache = growing_cache(model.config)
        with Stopwatch(embeds.device, timing.clock) as watch:
            model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **keyword)
    return Sample(watch.seconds, watch.peak_bytes)


def measure_setting(
    model: LlamaModel, cases: Sequence[Case], layout: TokenLayout, timing: Timing
) -> list[dict[str, Any]]:
    """All cases at one layout."""
    embeds = torch.randn(*layout.kinds.shape, model.config.hidden_size, device=model.device, dtype=model.dtype)

    def run(plan: SkipPlan | None) -> Sample:
        return prefill(model, embeds, layout, plan, timing)

    def flops(plan: SkipPlan) -> float:
        return theoretical(model.config, layout, plan)

    def describe(plan: SkipPlan, samples: Sequence[Sample]) -> dict[str, float | None]:
        peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
        return {"peak_bytes": max(peaks, default=None)}

    return measure(cases, model.config.num_hidden_layers, run, flops, describe, timing)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` as on the command line."""
    args = parse(common_parser(__doc__), argv)
    cases = chosen(CASES, args.plans)
    config = decoder_config(args)
    head = header(args, config)
    print("\n".join(f"{name}: {value}" for name, value in head.items()))
    model = make_decoder(config, DTYPES[args.dtype], args.device)

    results = []
    for visual in args.visual:
        retained = round(args.retained * visual)
        image = [TokenKind.RETAINED] * retained + [TokenKind.SKIPPED] * (visual - retained)
        for batch in args.batch:
            layout = make_layout(batch, image, args.text)
            rows = measure_setting(model, cases, layout, timing_of(args))
            title = f"Prefill, batch {batch}: {args.text} text and {visual} visual tokens ({retained} retained)"
            print("\n".join(table(title, COLUMNS, rows)), flush=True)
            results += [{**row, "geometry": args.geometry, "visual": visual, "batch": batch} for row in rows]
    finish(args, head, results)


if __name__ == "__main__":
    main()
