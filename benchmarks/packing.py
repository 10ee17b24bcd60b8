"""How full packed rows are, and what padding costs without packing, on lengths like LLaVA's mix665k; no data is read.

665,298 records, of which 40,688 have no image; every image has the same number of visual tokens; the text's length is
log-normal with a median of 150 tokens. How far it spreads is not published: several spreads are shown. A record is cut
to ``--max-length``.

    python benchmarks/packing.py
    python benchmarks/packing.py --records 20000 --pack-length 2048 --visual 258

Tokens over places are a property of the lengths, not of the machine. Seconds are those of planning all rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from numpy.typing import NDArray
from torch.utils.data import BatchSampler

from skipvision_train.data.lengths import QUANTILE
from skipvision_train.data.order import OrderRule
from skipvision_train.data.packing import Bins, pack, rows_of
from skipvision_train.training.batching import EpochSampler, Grouping

RECORDS, TEXT_ONLY, MEDIAN = 665_298, 40_688, 150
GLOBAL_BATCH, MICRO_BATCH = 128, 8
RANKS = (1, 2, 8)


def lengths_like_mix665k(
    records: int, visual: int, spread: float, max_length: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(records,) tokens of every record, and whether it has an image."""
    rng = np.random.default_rng(seed)
    text = np.maximum(8, np.exp(rng.normal(np.log(MEDIAN), spread, records)).round()).astype(np.int64)
    has_image = rng.permutation(records) >= round(records * TEXT_ONLY / RECORDS)
    return np.minimum(text + visual * has_image, max_length), has_image


def padding(lengths: NDArray[np.int64], grouping: Grouping | None) -> float:
    """The share of places that are padding in micro batches of an epoch without packing."""
    order = np.fromiter(EpochSampler(len(lengths), GLOBAL_BATCH, 0, None, grouping), np.int64)
    batches = lengths[order].reshape(-1, MICRO_BATCH)
    return round(float(1 - batches.sum() / (batches.max(1) * MICRO_BATCH).sum()), 4)


def steps_hash(bins: Bins, ranks: int) -> str:
    """Stands for the records of every step of an epoch, put together from what each rank reads."""
    sampler = EpochSampler(len(bins), GLOBAL_BATCH, 0, bins.rule(OrderRule()))
    each = GLOBAL_BATCH // ranks
    shares = [BatchSamplerShard(BatchSampler(sampler, each, False), ranks, rank) for rank in range(ranks)]
    digest = hashlib.sha256()
    for step in zip(*shares, strict=True):
        digest.update(repr(sorted(tuple(bins[row]) for share in step for row in share)).encode())
    return digest.hexdigest()[:16]


def estimated(
    lengths: NDArray[np.int64], has_image: NDArray[np.bool_], visual: int, capacity: int, noise: float
) -> dict[str, float]:
    """What planning by sizes gives, where bytes per token vary by so much from record to record."""
    rng = np.random.default_rng(1)
    seen = visual * has_image
    text = 4 * (lengths - seen) * np.exp(rng.normal(0, noise, len(lengths)))
    rate = np.quantile((lengths - seen) / np.maximum(1, text), QUANTILE)
    bins = pack(np.clip(np.ceil(text * rate) + seen, 1, lengths.max()).astype(np.int64), capacity)
    rows = sum(len(rows_of([int(n) for n in lengths[bins[i]]], capacity)) for i in range(len(bins)))
    full = float(lengths.sum() / (rows * capacity))
    return {"full": round(full, 4), "split": round((rows - len(bins)) / len(bins), 4)}


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result per number of visual tokens, spread and row length."""
    for visual in args.visual:
        for spread in args.spread:
            lengths, has_image = lengths_like_mix665k(args.records, visual, spread, args.max_length, args.seed)
            alone = {
                "padding": padding(lengths, None),
                "padding_length": padding(lengths, Grouping(lengths)),
                "padding_modality": padding(lengths, Grouping(lengths, has_image)),
            }
            for capacity in args.pack_length:
                start = time.perf_counter()
                bins = pack(lengths, capacity)
                seconds = time.perf_counter() - start
                hashes = {steps_hash(bins, ranks) for ranks in RANKS}
                yield {
                    "visual": visual,
                    "spread": spread,
                    "pack_length": capacity,
                    "records": args.records,
                    "mean_tokens": round(float(lengths.mean()), 1),
                    "rows": len(bins),
                    "full": round(bins.efficiency, 4),
                    "estimated": estimated(lengths, has_image, visual, capacity, args.noise),
                    "same_on_1_2_8_ranks": len(hashes) == 1,
                    "seconds": round(seconds, 1),
                    **alone,
                }


def lines(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table."""
    yield (
        "| visual | spread | row | records a row | full | by estimates | rows split | padding: shuffle | length | "
        "modality | same on 1, 2, 8 ranks | seconds |"
    )
    yield "|---:" * 12 + "|"
    for case in results:
        shares = [
            case["full"],
            case["estimated"]["full"],
            case["estimated"]["split"],
            case["padding"],
            case["padding_length"],
            case["padding_modality"],
        ]
        yield (
            f"| {case['visual']} | {case['spread']} | {case['pack_length']} | {case['records'] / case['rows']:.2f} | "
            + " | ".join(f"{share:.1%}" for share in shares)
            + f" | {'yes' if case['same_on_1_2_8_ranks'] else 'NO'} | {case['seconds']:.1f} |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and the results as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 258], help="tokens of an image")
    parser.add_argument("--spread", type=float, nargs="+", default=[0.6, 0.8, 1.0], help="sigma of the text's log")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--pack-length", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--noise", type=float, default=0.1, help="sigma of the log of bytes per token")
    parser.add_argument("--seed", type=int, default=0)
    results = list(cases(parser.parse_args(argv)))
    print("\n".join(lines(results)))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
