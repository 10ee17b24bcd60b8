"""A run that is killed again and again, against the same run left alone: weights, losses and steps that were lost.

python benchmarks/crash.py                                   # 20 kills each; ZeRO-2 took 24 minutes on two busy cores
python benchmarks/crash.py --engines zero2 --kills 3 --steps 10

Two processes train a model of 2.4 million weights on the embedded data set. Each start is ended by SIGKILL: all
processes or one of them, at a random moment of a step or of a save, chosen by the seed. Nothing in the package knows:
this script watches metrics.jsonl and the checkpoint folders. The last start runs to the end. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from output import _commit, _cpu_name, finish, table
from safetensors.torch import load_file

from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.checkpoints import MARKER, newest_complete

ENGINES = {
    "ddp": (),
    "zero2": ("deepspeed=zero2",),
    "zero3": ("deepspeed=zero3", "deepspeed.persistence_threshold=0"),
}
PLACES = ("step", "save")
VICTIMS = ("all", "one")
COLUMNS = {"reached": "last step seen", "start": "next start from", "lost": "steps lost", "ended_s": "all ended, s"}
SKETCHES = ("data.pretrain=400", "data.sft=20", "data.heldout=7")
DEADLINE = 600
"""Seconds after which a run that shows nothing is a failure."""


@dataclass(frozen=True)
class Kill:
    """A moment and a victim.

    Attributes:
        place: ``step``: when the line of step ``at`` is there, and ``delay`` later; ``save``: when besides
            ``checkpoint-at`` holds ``files`` files, or is complete before they are seen.
        at: the step.
        victim: ``all`` processes and their launcher, or ``one`` of them.
        rank: which one.
        delay: seconds.
        files: of the checkpoint.
    """

    place: str
    at: int
    victim: str
    rank: int = 0
    delay: float = 0.0
    files: int = 0

    def __str__(self) -> str:
        who = "all" if self.victim == "all" else f"rank {self.rank}"
        return f"{who}, {'after step' if self.place == 'step' else 'in save'} {self.at}"


def wait_for(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> None:
    """Look every two milliseconds.

    Raises:
        TimeoutError: naming what did not come.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not seen in {seconds:g} s")
        time.sleep(0.002)


class Launched:
    """``skipvision train`` on some processes under torchrun.

    Args:
        words: what follows ``skipvision train``.
        log: gets the output.
        processes: how many.
    """

    def __init__(self, words: Sequence[str], log: Path, processes: int = 2) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command += [f"--master_port={port}", "-m", "skipvision_train", "train", *words]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, for DeepSpeed
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.log, self.processes = log, processes
        with log.open("w") as output:
            self.launcher = psutil.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by rank."""
        found = {}
        for child in self.launcher.children():
            try:
                found[int(child.environ()["RANK"])] = child
            except (psutil.Error, KeyError):
                continue
        return found

    def running(self) -> bool:
        """False once the launcher has ended."""
        return self.launcher.poll() is None

    def end(self, victim: str, rank: int) -> float:
        """SIGKILL; seconds until every process has ended.

        Raises:
            TimeoutError: one hangs; it is killed before.
        """
        ranks, begin = self.ranks(), time.monotonic()
        everything = [self.launcher, *ranks.values()]
        for process in everything if victim == "all" else [ranks[rank]]:
            process.send_signal(signal.SIGKILL)
        try:
            wait_for(lambda: not any(map(alive, everything)), "the end of all processes", 120)
        finally:
            self.close()
        return time.monotonic() - begin

    def close(self) -> None:
        """Leave nothing behind."""
        for process in [*self.ranks().values(), self.launcher] if self.running() else []:
            process.kill()
        self.launcher.wait()


def alive(process: psutil.Process) -> bool:
    """True for a process that still does something."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def last_step(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 without one."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return 0
    lines = file.read_text().splitlines()
    return next((row["step"] for row in reversed(read_metrics(file))), 0) if lines else 0


def reached(run: Path, kill: Kill) -> bool:
    """True at the moment that ``kill`` describes."""
    if last_step(run) < kill.at:
        return False
    if kill.place == "step":
        return True
    folder = run / f"checkpoint-{kill.at}"
    if (folder / MARKER).exists():
        return True
    return folder.is_dir() and sum(path.is_file() for path in folder.rglob("*")) >= kill.files


def crash(words: Sequence[str], run: Path, kill: Kill, log: Path, processes: int = 2) -> dict[str, Any]:
    """Start the run, end it at the moment, and say what is left.

    Raises:
        RuntimeError: it ended by itself.
        TimeoutError: the moment did not come, or a process did not end.
    """
    before = resumed_step(run)
    launched = Launched(words, log, processes)
    try:
        wait_for(lambda: last_step(run) <= before or not launched.running(), "a cut metrics file")
        wait_for(lambda: reached(run, kill) or not launched.running(), str(kill))
        if not launched.running():
            raise RuntimeError(f"{kill}: the run ended by itself; see {log}")
        time.sleep(kill.delay)
        seconds = launched.end(kill.victim, kill.rank)
    finally:
        launched.close()
    seen, start = last_step(run), resumed_step(run)
    row = {"case": str(kill), "refused": None, "reached": seen, "start": start, "lost": seen - start}
    return row | {"ended_s": seconds, "from": before}


def resumed_step(run: Path) -> int:
    """The step that the next start continues from."""
    newest = newest_complete(run)
    return 0 if newest is None else newest[1].step


def complete(words: Sequence[str], log: Path, processes: int = 2) -> None:
    """Start the run and let it finish.

    Raises:
        RuntimeError: it failed.
    """
    launched = Launched(words, log, processes)
    try:
        wait_for(lambda: not launched.running(), "the end of the run")
    finally:
        launched.close()
    if launched.launcher.returncode:
        raise RuntimeError(f"the run failed; see {log}:\n{log.read_text()[-3000:]}")


def difference(run: Path, reference: Path) -> dict[str, Any]:
    """How far a run is from another: series of losses, and the largest distance of a weight."""
    series = [[(row["step"], row["loss"]) for row in read_metrics(path / "metrics.jsonl")] for path in (run, reference)]
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (run, reference))
    weights = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    losses = max((abs(a[1] - b[1]) for a, b in zip(*series, strict=False)), default=0.0)
    same = series[0] == series[1] and set(ours) == set(theirs)
    return {"same": same and all(torch.equal(ours[k], theirs[k]) for k in theirs), "weights": weights, "losses": losses}


def next_kill(draw: random.Random, start: int, steps: int, every: int, combination: tuple[str, str]) -> Kill:
    """A moment that the next start reaches: within one interval of saving after the step it begins with."""
    place, victim = combination
    if place == "save":
        at = min((start // every + 1) * every, steps)
        return Kill(place, at, victim, draw.randrange(2), files=draw.randint(0, 16))
    at = min(start + draw.randint(1, every + 1), steps - 1)
    return Kill(place, at, victim, draw.randrange(2), delay=draw.uniform(0, 0.3))


def study(args: argparse.Namespace, engine: str, words: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """The uninterrupted run, the kills, the last start, and the comparison as the last row."""
    draw = random.Random(f"{args.seed}/{engine}")
    reference, run = folder / f"{engine}-whole", folder / f"{engine}-killed"
    words = [*words, *ENGINES[engine]]
    complete([*words, f"trainer.output_dir={reference}"], folder / f"{engine}-whole.log")
    words = [*words, f"trainer.output_dir={run}"]
    rows = []
    combinations = itertools.cycle(itertools.product(PLACES, VICTIMS))
    for number in range(1, args.kills + 1):
        kill = next_kill(draw, resumed_step(run), args.steps, args.save_every, next(combinations))
        row = crash(words, run, kill, folder / f"{engine}-{number}.log")
        rows.append(row | {"engine": engine, "case": f"{number}: {kill}"})
        print(f"{engine} {number}: {kill}; lost {row['lost']} steps", file=sys.stderr, flush=True)
    complete(words, folder / f"{engine}-last.log")
    whole = {"case": "the end", "refused": None, "reached": args.steps, "start": None, "ended_s": None}
    total = {"lost": sum(row["lost"] for row in rows), "engine": engine, "from": None}
    return [*rows, whole | total | difference(run, reference)]


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
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        words = prepare(folder) if args.words is None else args.words
        words += [f"trainer.max_steps={args.steps}", "trainer.epochs=null", f"trainer.save_every={args.save_every}"]
        words += ["trainer.log_every=1", "trainer.progress_bar=false", "trainer.precision=fp32"]
        for engine in args.engines:
            rows = study(args, engine, words, folder)
            print("\n".join(table(f"{engine}, {args.kills} kills", COLUMNS, rows)), flush=True)
            end = rows[-1]
            verdict = "bit for bit the same" if end["same"] else "DIFFERENT"
            print(f"\nagainst the run left alone: {verdict}; weights {end['weights']:g}, losses {end['losses']:g}")
            results += rows
    finish(args, head, results)


if __name__ == "__main__":
    main()
