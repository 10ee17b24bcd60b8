"""The order of samples on 1, 2 and 8 ranks, begun at step 0 and in the middle: hashes, the same where the steps are.

For each loader (map-style with every ``data.order``, packed rows, streams) the ids of every global step are put
together from what each rank reads; a step is what the optimizer sees, in whatever order ranks take its samples.
"resumed" is the hash of a run that stops in the middle and goes on from there. Streams are read by 0 and 2 workers.

    python benchmarks/order.py
    python benchmarks/order.py --recipe my_recipe.yaml --root /data --steps 100

Without ``--recipe`` some 20,000 records are written into a temporary folder. Exits with 1 if any hash differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset

from skipvision_train.data.mixture import Mixture
from skipvision_train.data.order import ORDERS, OrderRule
from skipvision_train.data.packing import pack
from skipvision_train.data.recipes import load_recipe, load_records, load_streams
from skipvision_train.data.streaming import StreamDataset, StreamShare
from skipvision_train.data.streams import Streams
from skipvision_train.data.watch import WatchedDataset
from skipvision_train.training.batching import EpochSampler

RANKS = (1, 2, 8)
GLOBAL_BATCH, MICRO_BATCH = 64, 4
SEED = 0

Steps = Callable[[int, int], Iterator[list[Any]]]
"""From a number of ranks and a first step to the ids of every step from there on."""


def write_recipe(folder: Path, files: int, records: int) -> Path:
    """Two sources of text in files of JSON lines."""
    for name, count in (("a", files), ("b", max(1, files // 4))):
        for number in range(count):
            turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
            lines = (json.dumps({"id": f"{name}/{number}/{i}", "conversations": turns}) for i in range(records))
            (folder / f"{name}-{number:03d}.jsonl").write_text("\n".join(lines))
    sources = [{"name": "a", "path": "a-*.jsonl"}, {"name": "b", "path": "b-*.jsonl", "weight": 0.5}]
    (path := folder / "recipe.yaml").write_text(yaml.safe_dump({"sources": sources}))
    return path


def sampled(sampler: EpochSampler, ids: Callable[[int], Any] = lambda index: index) -> Steps:
    """Steps of a map-style loader, as accelerate divides its batches among ranks and skips them on a resume."""

    def steps(ranks: int, first: int) -> Iterator[list[Any]]:
        accumulated = GLOBAL_BATCH // (MICRO_BATCH * ranks)
        shares = [
            iter(SkipBatchSampler(BatchSamplerShard(BatchSampler(sampler, MICRO_BATCH, False), ranks, rank), n))
            for rank, n in ((rank, first * accumulated) for rank in range(ranks))
        ]
        while step := [ids(i) for share in shares for batch in islice(share, accumulated) for i in batch]:
            yield step

    return steps


class Numbers(Dataset[int]):
    """Records by their numbers; nothing is read."""

    def __getitem__(self, index: int) -> int:
        return int(index)


def streamed(streams: Streams, workers: int) -> Steps:
    """Steps of a stream of eight lanes."""

    def steps(ranks: int, first: int) -> Iterator[list[Any]]:
        loaders = []
        for rank in range(ranks):
            share = StreamShare(max(RANKS), rank, ranks, MICRO_BATCH, GLOBAL_BATCH, SEED, 1000)
            data = StreamDataset(streams, WatchedDataset(Numbers(), streams.where, workers), share)
            data.step = first
            loaders.append(iter(DataLoader(data, MICRO_BATCH, num_workers=workers, collate_fn=list)))
        while True:
            batches = [islice(loader, GLOBAL_BATCH // (MICRO_BATCH * ranks)) for loader in loaders]
            yield list(chain(*chain(*batches)))

    return steps


def loaders(records: Mixture, streams: Streams) -> Iterator[tuple[str, Steps]]:
    """Every loader with its name."""
    for kind in ORDERS:
        rule = OrderRule(kind, records.shards if kind == "shards" else None)
        yield f"map, {kind}", sampled(EpochSampler(len(records), GLOBAL_BATCH, SEED, rule))
    lengths = np.random.default_rng(SEED).integers(50, 600, len(records))
    for kind in ORDERS:
        rule = OrderRule(kind, records.shards if kind == "shards" else None)
        bins = pack(lengths, 2048, SEED, rule)
        rows = EpochSampler(len(bins), GLOBAL_BATCH, SEED, bins.rule(rule))
        yield f"packed, {kind}", sampled(rows, lambda row, bins=bins: tuple(sorted(bins[row])))
    for workers in (0, 2):
        yield f"streaming, {workers} workers", streamed(streams, workers)


def digest(steps: Iterable[list[Any]]) -> str:
    """16 hexadecimal digits for the samples of every step."""
    content = hashlib.sha256()
    for step in steps:
        content.update(repr(sorted(step)).encode())
    return content.hexdigest()[:16]


def results(records: Mixture, streams: Streams, count: int) -> Iterator[dict[str, Any]]:
    """The hashes of every loader."""
    for name, steps in loaders(records, streams):
        found = {ranks: list(islice(steps(ranks, 0), count)) for ranks in RANKS}
        middle, end = len(found[2]) // 2, len(found[2])  # an epoch of packed rows may be shorter
        whole = {ranks: digest(each) for ranks, each in found.items()}
        resumed = digest([*found[2][:middle], *islice(steps(2, middle), end - middle)])
        yield {
            "loader": name,
            "steps": end,
            "hash": whole,
            "resumed": resumed,
            "same": {*whole.values(), resumed} == {whole[1]},
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and the results as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a recipe's file or name; without it, records are made up")
    parser.add_argument("--root", help="directory that the recipe's paths are relative to")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--files", type=int, default=32)
    parser.add_argument("--records", type=int, default=500, help="of a file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(args.recipe or write_recipe(Path(folder), args.files, args.records), args.root)
        found = list(results(load_records(recipe), load_streams(recipe), args.steps))
    print("| loader | steps | 1 rank | 2 ranks | 8 ranks | resumed, 2 ranks | same |\n|---|---:|---|---|---|---|---|")
    for case in found:
        hashes = " | ".join(case["hash"][ranks] for ranks in RANKS)
        print(
            f"| {case['loader']} | {case['steps']} | {hashes} | {case['resumed']} | {'yes' if case['same'] else 'NO'} |"
        )
    print(json.dumps(found))
    return 0 if all(case["same"] for case in found) else 1


if __name__ == "__main__":
    sys.exit(main())
