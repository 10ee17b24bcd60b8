"""Where a step's time goes: data, forward, backward, optimizer, the rest."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

PHASES = ("data", "forward", "backward", "optimizer", "save", "samples", "other")


class StepClock:
    """Time between marks, summed by phase.

    On a GPU the marks are events on its stream: nothing waits for them until the times are read, and what counts is
    when the GPU gets there. Time in which it has nothing to do while data is waited for is data's.

    Args:
        cuda: marks are events of the current CUDA device.
        now: seconds, monotonic.
    """

    def __init__(self, cuda: bool = False, now: Callable[[], float] = time.perf_counter) -> None:
        self.cuda, self.now = cuda, now
        self.phase = "other"
        self._since = now()
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[torch.cuda.Event, str]] = []

    def mark(self, phase: str) -> None:
        """What happens from now on is of this phase."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((event, phase))
        else:
            now = self.now()
            self._spent[self.phase] += now - self._since
            self._since = now
        self.phase = phase

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the last reading; on a GPU this waits for the work that was given to it."""
        self.mark(self.phase)
        if self.cuda and self._events:
            self._events[-1][0].synchronize()
            for (start, phase), (end, _) in zip(self._events, self._events[1:], strict=False):
                self._spent[phase] += start.elapsed_time(end) / 1000
            self._events = self._events[-1:]
        spent, self._spent = self._spent, dict.fromkeys(PHASES, 0.0)
        return spent
