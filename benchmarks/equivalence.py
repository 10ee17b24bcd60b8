"""One stage in many arrangements that must not matter: the loss series of each against that of one process, in fp32.

    OMP_NUM_THREADS=1 python benchmarks/equivalence.py
    OMP_NUM_THREADS=1 python benchmarks/equivalence.py --cases checkpointing packed zero3 --steps 20

Every step takes all of the 12 records (some without an image), so that packed rows, micro batches and processes divide
the same step in different ways. All parts train. Printed per arrangement: the largest difference of a step's loss from
the reference (relative), the mean of the signed differences, which shows a drift that single steps hide, and the
largest difference of the final weights. More than the tolerances is an error. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from output import _commit, _cpu_name
from safetensors.torch import load_file
from training_data import SIZES, write_workspace
from two_processes import distance

from skipvision_train.config.specs import TrainConfig
from skipvision_train.models import loss
from skipvision_train.resources import resource_dir
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.run import assemble, run_stage

RECORDS = 12
LOSS, DRIFT, WEIGHTS = 5e-6, 1e-6, 1e-5
"""Tolerances: of a step's loss and of the mean difference, relative; of weights, absolute, at a learning rate of 1e-3
(Adam divides by the gradient's size, so that noise in a gradient near zero becomes a step)."""

ENTRY = """import sys
import skipvision_train.models.loss as loss
loss.SLICE = int(sys.argv.pop(1))
from skipvision_train.cli import main
main()
"""
"""Starts the command line with so many logits at a time: by default a model this small never needs slices."""


@dataclass(frozen=True)
class Case:
    """An arrangement.

    Attributes:
        overrides: of the reference's configuration.
        processes: training processes.
        held: logits at a time.
    """

    overrides: tuple[str, ...] = ()
    processes: int = 1
    held: int = 2**25


def micro(batch: int) -> str:
    """Rows of a forward pass of a process."""
    return f"trainer.per_device_batch={batch}"


PACKED = ("data.pack=true", "data.pack_length=384", "trainer.global_batch={rows}")
WHOLE = "deepspeed.persistence_threshold=0"  # under ZeRO-3 every tensor is sharded, as those of large models are
REFERENCE = "one process"
CASES = {
    REFERENCE: Case(),
    "accumulation 2": Case((micro(6),)),
    "accumulation 4": Case((micro(3),)),
    "checkpointing": Case(("trainer.gradient_checkpointing=true",)),
    "packed": Case((*PACKED, micro(1))),
    "loss in slices": Case(held=999),
    "plain loss": Case(("trainer.loss=plain",)),
    "all of the last layer": Case(("trainer.last_layer=all",)),
    "two processes": Case((micro(6),), 2),
    "two processes, accumulation 2": Case((micro(3),), 2),
    "zero1": Case(("deepspeed=zero2", "deepspeed.stage=1", micro(6)), 2),
    "zero2": Case(("deepspeed=zero2", micro(6)), 2),
    "zero2, accumulation 2, checkpointing": Case(
        ("deepspeed=zero2", micro(3), "trainer.gradient_checkpointing=true"), 2
    ),
    "zero3": Case(("deepspeed=zero3", WHOLE, micro(6)), 2),
    "zero3, accumulation 6, checkpointing, loss in slices": Case(
        ("deepspeed=zero3", WHOLE, micro(1), "trainer.gradient_checkpointing=true"), 2, held=99
    ),
    "zero3, packed": Case(("deepspeed=zero3", WHOLE, *PACKED, micro(1)), 2),
}


def prepare(folder: Path, steps: int, plan: str) -> None:
    """Records, tokenizer and ``experiment=same``."""
    sizes = SIZES["tiny"]
    write_workspace(folder, sizes, RECORDS)
    stage = {
        "defaults": [{"override /model": "llava"}, {"override /plan": plan}],
        "model": {"from_scratch": True, "tokenizer": str(folder / "tokenizer"), "text": sizes.text}
        | {"vision": sizes.vision, "reducer": {"split": "saliency", "retain": 2, "local_keep": None}},
        "stage": {"lr": dict.fromkeys(("vision", "connector", "llm"), 1e-3), "warmup_ratio": 0.1},
        "data": {"recipe": str(folder / "recipe.yaml"), "root": None, "max_length": 256},
        "trainer": {"max_steps": steps, "epochs": None, "per_device_batch": RECORDS, "global_batch": RECORDS}
        | {"precision": "fp32", "workers": 0, "save_every": 0, "progress_bar": False, "gradient_checkpointing": False},
    }
    if plan == "dense":
        stage["model"]["reducer"] = {"split": "none", "local_keep": None}
    (folder / "conf" / "experiment").mkdir(parents=True)
    text = f"# @package _global_\n{yaml.safe_dump(stage, sort_keys=False)}"
    (folder / "conf" / "experiment" / "same.yaml").write_text(text)
    (folder / "entry.py").write_text(ENTRY)


def configuration(folder: Path, words: list[str]) -> TrainConfig:
    """As the command line composes it."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        search = f"hydra.searchpath=[file://{folder / 'conf'}]"
        composed = compose("train", overrides=[search, "experiment=same", *words])
    return OmegaConf.to_object(composed)  # type: ignore[return-value]


def packed_rows(folder: Path) -> int:
    """Rows that packing makes of the records."""
    (folder / "rows").mkdir()
    return assemble(configuration(folder, [*PACKED[:2], f"trainer.output_dir={folder / 'rows'}"])).feed.rows or 0


def run(case: Case, folder: Path, output: Path, rows: int) -> None:
    """Train: one process in this one, several by torchrun.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    words = [f"trainer.output_dir={output}", *(word.format(rows=rows) for word in case.overrides)]
    if case.processes == 1:
        loss.SLICE = case.held
        run_stage(configuration(folder, words))
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={case.processes}", f"--master-port={port}"]
    entry = [str(folder / "entry.py"), str(case.held), "train", "--config-dir", str(folder / "conf"), "experiment=same"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ninja is
    done = subprocess.run(
        [sys.executable, *launcher, *entry, *words],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])


def compare(name: str, run_dir: Path, reference: Path) -> dict[str, Any]:
    """A row of the table."""
    own, base = ([row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (run_dir, reference))
    differences = [(a - b) / b for a, b in zip(own, base, strict=True)]
    weights, whole = (load_file(path / "model" / "model.safetensors") for path in (run_dir, reference))
    found = {
        "case": name,
        "loss": max(map(abs, differences)),
        "drift": abs(sum(differences)) / len(differences),
        "weights": max(distance(weights.get(key), whole.get(key)) for key in set(weights) | set(whole)),
    }
    return found | {"same": found["loss"] <= LOSS and found["drift"] <= DRIFT and found["weights"] <= WEIGHTS}


def main(argv: list[str] | None = None) -> None:
    """Print the table and JSON; exit with 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[name for name in CASES if name != REFERENCE])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--plan", default="skip_ffn", help="of conf/plan")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.steps, args.plan)
        chosen = [REFERENCE, *(args.cases or [name for name in CASES if name != REFERENCE])]
        count = packed_rows(folder) if any("packed" in name for name in chosen) else 0
        for number, name in enumerate(chosen):
            run(CASES[name], folder, folder / f"run-{number}", count)
            rows.append(compare(name, folder / f"run-{number}", folder / "run-0"))
            sys.stderr.write(f"{name}: {rows[-1]}\n")
    print(f"{_cpu_name()}; commit {_commit()}; plan {args.plan}; {args.steps} steps")
    print(f"tolerances: {json.dumps({'loss': LOSS, 'drift': DRIFT, 'weights': WEIGHTS})}")
    print("\n| arrangement | largest difference of a loss | mean difference | weights | same |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {row['loss']:.1e} | {row['drift']:.1e} | {row['weights']:.1e} | {row['same']} |")
    print(json.dumps(rows))
    if not all(row["same"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
