"""The memory of the CPU that each process of a stage takes for its weights, before an engine shards them; no data.

A language model of random bf16 weights is written to a temporary folder, sharded, beside a finished stage with its
decoder. Then ``--processes`` load them together, in fp32 and in bf16, by ``build_model`` and by ``start_stage``.

    python benchmarks/host_memory.py
    python benchmarks/host_memory.py --layers 4 --processes 4

Linux only: every figure is a difference of two readings of ``/proc/self/smaps_rollup``, and at its peak of ``RssAnon``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from skipvision_train.models.build import build_model, start_stage
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import MlpConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, VisionConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROADS = ("parts", "stage")
ROLLUP = ("Pss", "Private_Clean", "Private_Dirty")


def configuration(args: argparse.Namespace) -> SkipVisionConfig:
    """A decoder of the wanted size behind a tower that is too small to count."""
    text = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
    )
    vision = VisionConfig(image_size=32, patch_size=8, width=64, layers=1, heads=1, mlp_ratio=2.0, depths=(1,))
    return SkipVisionConfig(
        text_config=text, vision=vision, connector=MlpConfig(), reducer=ReducerConfig.off(), image_token_id=3
    )


def write_checkpoints(config: SkipVisionConfig, folder: Path, shard: str) -> int:
    """``llm`` and ``stage`` below the folder; returns the model's parameters."""
    torch.set_default_dtype(torch.bfloat16)
    model = SkipVisionForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.language_model.save_pretrained(folder / "llm", max_shard_size=shard)
    model.save_pretrained(folder / "stage", max_shard_size=shard)
    for file in folder.rglob("*.safetensors"):  # pages that are still to be written count as written by who maps them
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return sum(parameter.numel() for parameter in model.parameters())


def load(road: str, folder: Path, dtype: torch.dtype) -> SkipVisionForConditionalGeneration:
    """The model, by the way that a first stage takes or a later one."""
    config = SkipVisionConfig.from_pretrained(folder / "stage")
    if road == "stage":
        return start_stage(folder / "stage", config, dtype)[0]
    return build_model(config, llm=folder / "llm", dtype=dtype)[0]


def rollup() -> dict[str, int]:
    """Bytes of this process: its own pages, and its share of those that it has together with others (Pss)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0][:-1] in ROLLUP}


class Peak:
    """The most anonymous memory that this process has while the block runs, looked at every millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = self._now(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.bytes = max(self.bytes, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def readings(road: str, dtype: torch.dtype, folder: Path, together: Barrier) -> Iterator[dict[str, int]]:
    """What a process has more than before: with the weights loaded, and when each has been read, as a copy to a GPU
    does."""
    before = rollup()
    together.wait()
    with Peak() as peak:
        start = peak.bytes
        model = load(road, folder, dtype)
    for when in ("loaded", "read"):
        if when == "read":
            for parameter in model.parameters():
                parameter.detach().view(-1).view(torch.uint8).max()
        together.wait()
        now = rollup()
        yield {"peak": peak.bytes - start, **{field: now[field] - before[field] for field in ROLLUP}}
        together.wait()


def measure(folder: Path, together: Barrier, results: Any) -> None:
    """One process: all roads and types, after what first use imports and keeps."""
    torch.set_num_threads(1)
    load("stage", folder / "small", torch.bfloat16), load("parts", folder / "small", torch.float32)
    for road in ROADS:
        for name, dtype in DTYPES.items():
            for when, found in zip(("loaded", "read"), readings(road, dtype, folder, together), strict=True):
                results.put({"road": road, "dtype": name, "when": when, **found})


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The largest of all processes, per road, type and moment."""
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(args.processes), context.Queue()
    workers = [context.Process(target=measure, args=(folder, together, results)) for _ in range(args.processes)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in range(len(workers) * len(ROADS) * len(DTYPES) * 2)]
    for worker in workers:
        worker.join()
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for each in found:
        key = (each["road"], each["dtype"], each["when"])
        row = rows.setdefault(key, each)
        row |= {field: max(row[field], each[field]) for field in (*ROLLUP, "peak")}
    return [rows[road, dtype, when] for road in ROADS for dtype in DTYPES for when in ("loaded", "read")]


def lines(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A Markdown table, in MB."""
    yield "| road | type | when | private, written | private, clean | Pss | peak while loading |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for case in results:
        fields = ("Private_Dirty", "Private_Clean", "Pss", "peak")
        sizes = " | ".join(f"{case[field] / 1e6:.0f}" for field in fields)
        yield f"| {case['road']} | {case['dtype']} | {case['when']} | {sizes} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, load, print."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="that load at the same time")
    parser.add_argument("--layers", type=int, default=16, help="of the decoder")
    parser.add_argument("--width", type=int, default=1536, help="of the decoder; heads are 64 wide")
    parser.add_argument("--ffn", type=int, default=4096, help="hidden size of the feed-forward network")
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens")
    parser.add_argument("--shard", default="300MB", help="size of a file")
    parser.add_argument("--folder", help="for the temporary files (bf16, twice)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        small = argparse.Namespace(**{**vars(args), "layers": 1, "width": 64, "ffn": 64, "vocabulary": 320})
        write_checkpoints(configuration(small), folder / "small", args.shard)
        parameters = write_checkpoints(configuration(args), folder, args.shard)
        results = run(args, folder)
    print(f"{parameters / 1e6:.0f} million parameters, {args.processes} processes, MB of the one that takes most\n")
    for line in lines(results):
        print(line)
    print(json.dumps([{**case, "parameters": parameters} for case in results]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
