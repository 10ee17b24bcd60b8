"""A process that makes no progress is noticed, and every process's last word is told.

Each process has a thread that writes what the process does (phase, step, records) into the run's folder. Where nothing
has changed for too long the thread reads what the others wrote, logs it all, dumps the stacks of its own process and
ends it: launchers end the others then. It needs no collective, because what hangs is one.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)

EXIT_STATUS = 75
"""Of a process that was stuck (``EX_TEMPFAIL``: it may be tried again)."""

FOLDER = "ranks"


@dataclass(frozen=True)
class RankState:
    """What a process does.

    Attributes:
        rank: which one.
        host: its machine.
        pid: its number there.
        marks: how many phases it has begun; processes begin the same ones in the same order.
        phase: data, forward, backward, optimizer, save, samples or other.
        step: the one it works at, counted from 1.
        records: of the micro batch, or those that are being read.
        since: when the phase began, seconds since the epoch.
    """

    rank: int
    host: str
    pid: int
    marks: int
    phase: str
    step: int
    records: tuple[str, ...]
    since: float

    def line(self, now: float) -> str:
        """One line for a log."""
        records = f", records {', '.join(self.records[:4])}" if self.records else ""
        return (
            f"rank {self.rank} ({self.host}, process {self.pid}): {self.phase} of step {self.step} "
            f"for {now - self.since:.0f} s{records}"
        )


def behind(states: Mapping[int, RankState]) -> list[int]:
    """The ranks that the others wait for: those that have begun the fewest phases; none if all are equally far."""
    least = min(state.marks for state in states.values())
    ranks = [rank for rank, state in states.items() if state.marks == least]
    return ranks if len(ranks) < len(states) else []


def diagnosis(states: Mapping[int, RankState], processes: int, now: float) -> list[str]:
    """What to log: a line per process, and who is behind."""
    lines = [states[rank].line(now) for rank in sorted(states)]
    lines += [f"rank {rank}: nothing is known" for rank in range(processes) if rank not in states]
    if ranks := behind(states):
        lines.append(f"stuck: rank {', '.join(map(str, sorted(ranks)))}; the others wait for it")
    return lines


class Watchdog:
    """Watches one process. Use as a context; :meth:`begin` is called by the training loop.

    Args:
        run: the run's folder, which all processes can read.
        rank: this process.
        processes: how many there are.
        stuck_after: seconds without a new phase; 0 watches nothing.
        reading: the records that are being read now.
        end: ends the process.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        processes: int,
        stuck_after: float,
        reading: Callable[[], tuple[str, ...]] = tuple,
        end: Callable[[int], object] = os._exit,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self.rank, self.processes = run / FOLDER, rank, processes
        self.stuck_after, self.reading, self.end, self.now = stuck_after, reading, end, now
        self._marks, self._phase, self._step, self._since = 0, "other", 0, now()
        self._records: tuple[str, ...] = ()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, phase: str, step: int, records: tuple[str, ...] = ()) -> None:
        """The process begins something; costs a few assignments."""
        self._phase, self._step, self._records, self._since = phase, step, records, self.now()
        self._marks += 1

    def state(self) -> RankState:
        """What this process does."""
        records = self.reading() if self._phase == "data" else self._records
        return RankState(
            self.rank, socket.gethostname(), os.getpid(), self._marks, self._phase, self._step, records, self._since
        )

    def __enter__(self) -> None:
        self._since = self.now()
        if self.stuck_after and self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        # Others look right after the time is over; what they read may be so much too old.
        while not self._stop.wait(min(10.0, self.stuck_after / 8)):
            self.look()

    def look(self) -> None:
        """Write what this process does; if it has done so for too long, tell and end it."""
        state, stuck = self.state(), self.now() - self._since > self.stuck_after
        try:
            self._write(state)
        except OSError as error:  # a full or absent disk must not hide what hangs
            log.warning("%s cannot be written: %s", self.folder, error.strerror)
        if stuck:
            self._tell(state)
            self.end(EXIT_STATUS)

    def _write(self, state: RankState) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"rank-{self.rank}.json"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(state)))
        temporary.replace(file)

    def _tell(self, state: RankState) -> None:
        states = {self.rank: state, **self._others()}
        lines = diagnosis(states, self.processes, self.now())
        text = f"rank {self.rank} made no progress for {self.stuck_after:g} s (trainer.guards.stuck_after):\n  "
        # Not only the log: ranks other than the first may log nothing.
        sys.stderr.write(f"error: {text}" + "\n  ".join(lines) + "\n")
        sys.stderr.flush()
        try:
            with (self.folder / f"rank-{self.rank}.stacks.txt").open("w") as file:
                file.write(text + "\n  ".join(lines) + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            sys.stderr.write(f"the stacks cannot be written: {error}\n")
        faulthandler.dump_traceback(2)  # the process's own stderr, whatever sys.stderr is

    def _others(self) -> dict[int, RankState]:
        found = {}
        for rank in range(self.processes):
            try:
                content = json.loads((self.folder / f"rank-{rank}.json").read_text())
            except (OSError, ValueError):
                continue
            found[rank] = RankState(**{**content, "records": tuple(content["records"])})
        found.pop(self.rank, None)
        return found
