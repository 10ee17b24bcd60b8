"""A run that is ended again and again, against the same run left alone: weights, losses and steps that were lost.

python benchmarks/crash.py                                   # 20 kills each: 20 minutes on two cores
python benchmarks/crash.py --engines zero2 --kills 3 --steps 10
python benchmarks/crash.py --engines ddp zero2 zero3 --kills 0 --sigterm 5 --steps 60

Two processes train a model of 2.4 million weights on the embedded data set. Each start is ended by SIGKILL: all
processes or one of them, at a random moment of a step or of a save, chosen by the seed. Nothing in the package knows:
this script watches metrics.jsonl and the checkpoint folders. The last start runs to the end. ``--sigterm`` does the
same with SIGTERM and SIGUSR1 (``stopping.py``). A wrong weight or loss, more than one interval of saving lost, or a
stop that takes too long, loses a step or ends with another status is an error. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stopping
import torch
import transformers
from output import _commit, _cpu_name, finish, table
from two_processes import (
    ENGINES,
    PLACES,
    Kill,
    Launched,
    alive,
    complete,
    difference,
    last_step,
    next_kill,
    reached,
    resumed_step,
    wait_for,
)

__all__ = ["Launched", "alive", "reached", "wait_for"]

VICTIMS = ("all", "one")
COLUMNS = {"reached": "last step seen", "start": "next start from", "lost": "steps lost", "ended_s": "all ended, s"}
SKETCHES = ("data.pretrain=400", "data.sft=20", "data.heldout=7")


def crash(words: Sequence[str], run: Path, kill: Kill, log: Path, processes: int = 2) -> dict[str, Any]:
    """Start the run, end it at the moment, and say what is left.

    Raises:
        RuntimeError: it ended by itself.
        TimeoutError: the moment did not come, or a process did not end.
    """
    before = resumed_step(run)
    launched = Launched(words, log, processes)
    try:
        launched.reach(run, kill, before)
        seconds = launched.end(kill.victim, kill.rank)
    finally:
        launched.close()
    seen, start = last_step(run), resumed_step(run)
    row = {"case": str(kill), "refused": None, "reached": seen, "start": start, "lost": seen - start}
    return row | {"ended_s": seconds, "from": before}


def study(args: argparse.Namespace, engine: str, words: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """The kills, the last start, and the comparison with the run left alone as the last row."""
    draw = random.Random(f"{args.seed}/{engine}")
    run, rows = folder / f"{engine}-killed", []
    words = [*words, f"trainer.output_dir={run}"]
    combinations = itertools.cycle(itertools.product(PLACES, VICTIMS))
    for number in range(1, args.kills + 1):
        kill = next_kill(draw, resumed_step(run), args.steps, args.save_every, next(combinations))
        row = crash(words, run, kill, folder / f"{engine}-{number}.log")
        rows.append(row | {"engine": engine, "case": f"{number}: {kill}"})
        print(f"{engine} {number}: {kill}; lost {row['lost']} steps", file=sys.stderr, flush=True)
    complete(words, folder / f"{engine}-last.log")
    return [*rows, stopping.end_row(rows, args.steps, engine) | difference(run, folder / f"{engine}-whole")]


def complaints(rows: Sequence[dict[str, Any]], every: int) -> list[str]:
    """What is wrong with the rows of :func:`study`: a kill may cost the steps of one interval between checkpoints."""
    *kills, end = rows
    found = [
        f"{row['engine']} {row['case']}: lost {row['lost']} steps, with a checkpoint every {every}"
        for row in kills
        if not 0 <= row["lost"] <= every
    ]
    return found + stopping.end_complaints(end)


def prepare(folder: Path) -> list[str]:
    """Write the embedded data set; what follows ``skipvision train`` for every engine."""
    data = folder / "data"
    subprocess.run([sys.executable, "-m", "skipvision_train", "sketches", f"output={data}", *SKETCHES],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    start = [f"model.llm={data}/start/llm", f"model.vision_weights={data}/start/vision"]
    return ["experiment=sketches_pretrain", f"data.root={data}", *start]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["zero2", "zero3"])
    parser.add_argument("--kills", type=int, default=20, help="of each engine")
    parser.add_argument("--sigterm", type=int, default=0, help="stops of each engine by SIGTERM and SIGUSR1")
    parser.add_argument(
        "--grace",
        type=float,
        default=stopping.SCRIPT.grace,
        help="seconds that a stop may take; by default slurm.sbatch's",
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of the run")
    parser.add_argument("--save-every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="keeps runs and logs; by default a temporary one")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--words", nargs="*", help="what follows `skipvision train`, in place of the embedded data set's"
    )
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "benchmarks/crash.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def header(args: argparse.Namespace) -> dict[str, str]:
    """What a reader needs to know about a run."""
    return {
        "command": args.command,
        "hardware": _cpu_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": _commit(),
        "run": f"2 processes, fp32, {args.steps} steps, a checkpoint every {args.save_every}, seed {args.seed}",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` as on the command line."""
    args = parse(argv)
    head = header(args)
    print("\n".join(f"{name}: {value}" for name, value in head.items()), flush=True)
    results: list[dict[str, Any]] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        words = prepare(folder) if args.words is None else args.words
        words += [f"trainer.max_steps={args.steps}", "trainer.epochs=null", f"trainer.save_every={args.save_every}"]
        words += ["trainer.log_every=1", "trainer.progress_bar=false", "trainer.precision=fp32"]
        for engine in args.engines:
            whole = [*words, *ENGINES[engine]]
            complete([*whole, f"trainer.output_dir={folder / f'{engine}-whole'}"], folder / f"{engine}-whole.log")
            if args.kills:
                rows = study(args, engine, whole, folder)
                print("\n".join(table(f"{engine}, {args.kills} kills", COLUMNS, rows)), flush=True)
                wrong += complaints(rows, args.save_every)
                results += rows
            if args.sigterm:
                rows = stopping.study(args, engine, whole, folder)
                print("\n".join(table(f"{engine}, {args.sigterm} stops", stopping.COLUMNS, rows)), flush=True)
                wrong += stopping.complaints(rows, args.sigterm, args.grace)
                results += rows
    if args.sigterm:
        print(f"\n{stopping.SCRIPT}; here {args.grace:g} s; {stopping.summary(results)}")
    print("\n" + ("\n".join(f"WRONG: {line}" for line in wrong) or "all ends bit for bit those of the runs left alone"))
    finish(args, head, results)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
