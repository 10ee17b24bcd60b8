"""What the benchmarks print: a header that says what ran where, a Markdown table per setting, and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

SHARES = ("realised", "compute_realised", "mfu")
"""Columns that are shown in percent."""


def header(args: argparse.Namespace, config: PreTrainedConfig) -> dict[str, Any]:
    """What a reader needs to know about a run: hardware, versions, commit, model, command."""
    cuda = args.device.startswith("cuda")
    return {
        "command": args.command,
        "hardware": torch.cuda.get_device_name(args.device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
        + platform.python_version(),
        "commit": _commit(),
        "model": f"{args.geometry}: {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"FFN {config.intermediate_size}, {config.num_attention_heads} heads, {config.num_key_value_heads} key heads",
        "dtype": args.dtype,
        "attention": f"sdpa; under a plan {args.backend}",
        "rounds": f"{args.repeats} timed, {args.warmup} before them, {args.clock} clock",
    }


def _cpu_name() -> str:
    """The processor's name and how many of its cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit of this checkout, with a mark if files differ from it."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return (commit + (" with changes" if git("status", "--porcelain") else "")) if commit else "unknown"


def table(title: str, columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table.

    Args:
        title: the line above it.
        columns: heading by key of a row.
        rows: the results; a refused case shows its reason in place of numbers.
    """
    yield f"\n{title}\n"
    yield "| case | " + " | ".join(columns.values()) + " |"
    yield "|---|" + "---|" * len(columns)
    for row in rows:
        cells = [_cell(key, row[key]) for key in columns]
        if row["refused"] is not None:
            cells = [f"refused: {row['refused']}"] + [""] * (len(columns) - 1)
        yield f"| {row['case']} | " + " | ".join(cells) + " |"


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in SHARES:
        return f"{100 * value:.0f} %"
    if key.endswith("bytes"):
        return f"{value / 2**20:.1f}"
    return f"{value:.1f}" if key.endswith("ms") else f"{value:.3f}"


def finish(args: argparse.Namespace, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write ``--json`` and print the results as the last line."""
    if args.json is not None:
        args.json.write_text(json.dumps({"header": head, "results": rows}, indent=2) + "\n")
    print(json.dumps(rows))
