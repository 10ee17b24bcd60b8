"""Training runs on two processes that are started, watched and ended: shared by the parts of ``crash.py``."""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.checkpoints import MARKER, newest_complete

ENGINES = {
    "ddp": (),
    "zero2": ("deepspeed=zero2",),
    "zero3": ("deepspeed=zero3", "deepspeed.persistence_threshold=0"),
}
PLACES = ("step", "save")
LAUNCH = Path(__file__).parents[1] / "launch"
DEADLINE = 600
"""Seconds after which a run that shows nothing is a failure."""


@dataclass(frozen=True)
class Kill:
    """A moment and a victim.

    Attributes:
        place: ``step``: when the line of step ``at`` is there, and ``delay`` later; ``save``: when besides
            ``checkpoint-at`` holds ``files`` files, or is complete before they are seen.
        at: the step.
        victim: ``all`` processes and their launcher, the ``launcher`` alone, or ``one`` of the processes.
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
        who = f"rank {self.rank}" if self.victim == "one" else self.victim
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
    """``skipvision train`` on some processes, started by ``launch/torchrun.sh``.

    Args:
        words: what follows ``skipvision train``.
        log: gets the output.
        processes: how many.
        environment: further variables.
    """

    def __init__(
        self, words: Sequence[str], log: Path, processes: int = 2, environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # torchrun; ninja, for DeepSpeed
        own = {"PATH": path, "PROCESSES": str(processes), "MASTER_PORT": str(port)}
        own |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
        self.log, self.processes = log, processes
        with log.open("w") as output:
            self.launcher = psutil.Popen(
                [str(LAUNCH / "torchrun.sh"), *words], env={**os.environ, **own}, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

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

    def reach(self, run: Path, kill: Kill, before: int) -> None:
        """Wait for the moment.

        Args:
            run: the run's folder.
            kill: the moment.
            before: the step that this start continues from; the run cuts its metrics file to it first.

        Raises:
            RuntimeError: the run ended by itself.
            TimeoutError: the moment did not come.
        """
        wait_for(lambda: last_step(run) <= before or not self.running(), "a cut metrics file")
        wait_for(lambda: reached(run, kill) or not self.running(), str(kill))
        if not self.running():
            raise RuntimeError(f"{kill}: the run ended by itself; see {self.log}")
        time.sleep(kill.delay)

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


def resumed_step(run: Path) -> int:
    """The step that the next start continues from."""
    newest = newest_complete(run)
    return 0 if newest is None else newest[1].step


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


def next_kill(draw: random.Random, start: int, steps: int, every: int, combination: tuple[str, str]) -> Kill:
    """A moment that the next start reaches: within one interval of saving after the step it begins with."""
    place, victim = combination
    if place == "save":
        at = min((start // every + 1) * every, steps)
        return Kill(place, at, victim, draw.randrange(2), files=draw.randint(0, 16))
    at = min(start + draw.randint(1, every + 1), steps - 1)
    return Kill(place, at, victim, draw.randrange(2), delay=draw.uniform(0, 0.3))


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
    weights = max(distance(ours.get(name), theirs.get(name)) for name in set(ours) | set(theirs))
    losses = max((abs(a[1] - b[1]) for a, b in zip(*series, strict=False)), default=0.0)
    return {"same": series[0] == series[1] and weights == 0, "weights": weights, "losses": losses}


def distance(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """The largest difference of two weights; infinite if one is missing, of another shape or not a number."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return math.inf
    distance = float((ours.double() - theirs.double()).abs().max())
    return math.inf if math.isnan(distance) else distance
