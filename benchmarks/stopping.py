"""SIGTERM and SIGUSR1 in a run on two processes: the part of ``crash.py`` that ``--sigterm`` starts.

A start is asked to stop at a random moment of a step or of a save, as Slurm does it (every process of the job step, and
the launcher), by the launcher alone, or by one training process alone. Measured: seconds from the signal until the last
process has ended, and until the newest checkpoint was whole; the exit status of the training processes; the steps done
that this checkpoint lacks.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from two_processes import (
    LAUNCH,
    PLACES,
    Kill,
    Launched,
    alive,
    complete,
    difference,
    last_step,
    next_kill,
    resumed_step,
    wait_for,
)

from skipvision_train.training.checkpoints import MARKER, is_finished

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TOLD = ("all", "one", "launcher")
COLUMNS = {"saved_s": "checkpoint whole, s", "ended_s": "all ended, s"}
COLUMNS |= {"reached": "last step seen", "start": "next start from", "lost": "steps lost"}
PATIENCE = 30
"""Seconds beyond the grace period after which the processes are killed."""

ENTRY = """#!/usr/bin/env python
import os, pathlib, signal, subprocess, sys
rank = subprocess.Popen([sys.executable, *sys.argv[1:]])
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
code = rank.wait()
code = code if code >= 0 else 128 - code
pathlib.Path(os.environ["EXIT_CODES"], os.environ["RANK"]).write_text(str(code))
sys.exit(code)
"""
"""Between torchrun and a training process: torchrun does not tell the exit status of processes that it has ended."""


@dataclass(frozen=True)
class Grace:
    """Seconds that ``launch/slurm.sbatch`` assumes.

    Attributes:
        grace: from Slurm's signal to the end of the job's time.
        shutdown: of these, before the launcher kills the training processes.
    """

    grace: float
    shutdown: float

    def __str__(self) -> str:
        return f"grace period of launch/slurm.sbatch: {self.grace:g} s, {self.shutdown:g} s before torchrun kills"

    @classmethod
    def read(cls, text: str) -> Grace:
        """From the script.

        Raises:
            ValueError: it does not say them.
        """
        asked = re.search(r"^#SBATCH --signal=\S*@(\d+)$", text, re.MULTILINE)
        waits = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", text)
        if asked is None or waits is None:
            raise ValueError("slurm.sbatch: no --signal=...@SECONDS, or no TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
        return cls(float(asked[1]), float(waits[1]))


SCRIPT = Grace.read((LAUNCH / "slurm.sbatch").read_text())


class Told(Launched):
    """A run whose training processes leave their exit status.

    Args:
        words: what follows ``skipvision train``.
        log: gets the output.
        folder: for the status of each process; made.
    """

    def __init__(self, words: Sequence[str], log: Path, folder: Path) -> None:
        folder.mkdir()
        entry = folder / "entry"
        entry.write_text(ENTRY)
        entry.chmod(0o755)
        self.folder = folder
        own = {"PYTHON_EXEC": str(entry), "EXIT_CODES": str(folder)}
        own["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = f"{SCRIPT.shutdown:g}"
        super().__init__(words, log, environment=own)

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by rank; each is the child of an entry."""
        return {rank: child for rank, entry in super().ranks().items() for child in entry.children()}

    def tell(self, kill: Kill, number: int, patience: float) -> tuple[float, float]:
        """Send the signal; when, by the clock of files, and seconds until every process has ended.

        Those that are left after ``patience`` seconds are killed.
        """
        everything = [self.launcher, *self.launcher.children(recursive=True)]
        some = {"all": everything, "launcher": everything[:1]}
        told = some.get(kill.victim) or [self.ranks()[kill.rank]]
        when, begin = time.time(), time.monotonic()
        for process in told:
            if process.is_running():
                process.send_signal(number)
        try:
            wait_for(lambda: not (self.running() or any(map(alive, everything))), "the end", patience)
        except TimeoutError:
            for process in filter(alive, everything):
                process.kill()
        return when, time.monotonic() - begin

    def statuses(self) -> list[int]:
        """Exit status by rank, as shells have it: 143 after SIGTERM, 137 after SIGKILL."""
        return [int(file.read_text()) for file in sorted(self.folder.iterdir()) if file.name.isdigit()]


def choice(number: int) -> tuple[signal.Signals, str, str]:
    """Signal, place and who is told, of a stop counted from 0: twelve in a row are all there are."""
    return SIGNALS[number // 2 % 2], PLACES[number % 2], TOLD[number % 3]


def stop(
    words: Sequence[str], run: Path, kill: Kill, number: signal.Signals, log: Path, grace: float
) -> dict[str, Any]:
    """Start the run, ask it to stop at the moment, and say how it did.

    Raises:
        RuntimeError: it ended by itself.
        TimeoutError: the moment did not come.
    """
    before = resumed_step(run)
    launched = Told(words, log, log.with_suffix(".status"))
    try:
        launched.reach(run, kill, before)
        when, seconds = launched.tell(kill, number, grace + PATIENCE)
    finally:
        launched.close()
    seen, start, statuses = last_step(run), resumed_step(run), launched.statuses()
    marker = run / f"checkpoint-{start}" / MARKER
    saved = marker.stat().st_mtime - when if start > before else None
    case = f"{number.name} to {kill}; status {' '.join(map(str, statuses))}"
    row = {"case": case, "refused": None, "ended_s": seconds, "reached": seen, "start": start, "lost": seen - start}
    return row | {
        "saved_s": saved,
        "from": before,
        "signal": int(number),
        "statuses": statuses,
        "finished": is_finished(run),
    }


def study(args: argparse.Namespace, engine: str, words: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """The stops, the last start, and the comparison with the run left alone as the last row."""
    draw = random.Random(f"{args.seed}/{engine}/stopping")
    run, rows = folder / f"{engine}-stopped", list[dict[str, Any]]()
    words = [*words, f"trainer.output_dir={run}"]
    for count in itertools.count():
        if count == args.sigterm or (rows and rows[-1]["finished"]):
            break
        number, *combination = choice(count)
        kill = next_kill(draw, resumed_step(run), args.steps, args.save_every, (combination[0], combination[1]))
        row = stop(words, run, kill, number, folder / f"{engine}-stop-{count + 1}.log", args.grace)
        rows.append(row | {"engine": engine, "case": f"{count + 1}: {row['case']}"})
        print(f"{engine} {rows[-1]['case']}; {row['ended_s']:.1f} s", file=sys.stderr, flush=True)
    complete(words, folder / f"{engine}-stop-last.log")
    return [*rows, end_row(rows, args.steps, engine) | difference(run, folder / f"{engine}-whole")]


def end_row(rows: Sequence[Mapping[str, Any]], steps: int, engine: str) -> dict[str, Any]:
    """The row of the last start, but for the comparison."""
    whole = {"case": "the end", "refused": None, "reached": steps, "start": None, "saved_s": None, "ended_s": None}
    return whole | {"lost": sum(row["lost"] for row in rows), "engine": engine, "from": None}


def end_complaints(end: Mapping[str, Any]) -> list[str]:
    """What is wrong with the last start."""
    if end["same"]:
        return []
    how = f"weights by up to {end['weights']:g}, losses by up to {end['losses']:g}"
    return [f"{end['engine']}: the end differs from that of the run left alone: {how}, or the steps are not the same"]


def complaints(rows: Sequence[Mapping[str, Any]], wanted: int, grace: float) -> list[str]:
    """What is wrong with the rows of :func:`study`.

    Args:
        rows: stops, and the last start.
        wanted: stops that were asked for.
        grace: seconds that each may take.
    """
    *stops, end = rows
    found = [f"{row['engine']} {row['case']}: {fault}" for row in stops for fault in stop_faults(row, grace)]
    if len(stops) < wanted:
        found.append(f"{end['engine']}: {len(stops)} of {wanted} stops before the run was over; use more --steps")
    return found + end_complaints(end)


def stop_faults(row: Mapping[str, Any], grace: float) -> list[str]:
    """What is wrong with a stop: too slow, another exit status, a step without a checkpoint or none at all."""
    if row["finished"]:
        return ["the run was over before it could stop; use more --steps"]
    found, status = [], 128 + row["signal"]
    if row["ended_s"] > grace:
        found.append(f"ended after {row['ended_s']:.1f} s, the grace period is {grace:g} s")
    if row["statuses"] != [status] * 2:
        found.append(f"the status of both processes should be {status}")
    if row["lost"] != 0:
        found.append(f"step {row['reached']} was done, the newest whole checkpoint is of step {row['start']}")
    if row["start"] <= row["from"]:
        found.append(f"no step since {row['from']}, with which it began, was saved")
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How long the stops took."""
    times = sorted(row["ended_s"] for row in rows if "signal" in row)
    return f"{len(times)} stops took {times[0]:.1f} to {times[-1]:.1f} s" if times else "no stop"
