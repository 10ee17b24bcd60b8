"""A run that is asked to stop: SIGTERM and SIGUSR1 end the current step, are agreed on by all processes, and save.

Launchers and schedulers differ in whom they tell (one process, a process group, a whole job step) and often tell twice,
once themselves and once through the launcher. So any process may hear it, all act in the same step, and only a signal
that comes clearly later than the first stops at once.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it takes a machine away."""

AGAIN_SECONDS = 2.0
"""A signal that comes sooner after the first one is the same request, passed on by a launcher."""


class Stopped(SystemExit):
    """The run saved and stopped because it was asked to.

    The exit status is 128 and the signal's number, as shells have it: 143 for SIGTERM, 138 for SIGUSR1.

    Attributes:
        step: optimizer steps done, all of which are in the newest checkpoint.
        signal: what asked.
    """

    def __init__(self, step: int, number: int) -> None:
        super().__init__(128 + number)
        self.step, self.signal = step, signal.Signals(number)


class StopRequest:
    """What this process was asked.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.number = 0
        self.since = 0.0
        self.process = os.getpid()

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler: note the first request; a second one ends the process as if nothing had caught it."""
        if os.getpid() != self.process:  # a forked helper; its parent decides
            return
        now = self.clock()
        if not self.number:
            self.number, self.since = number, now
        elif now - self.since > AGAIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self.process, number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle :data:`SIGNALS` meanwhile; must be entered in the main thread."""
        before = {number: signal.signal(number, self.hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StopOnSignal(TrainerCallback):
    """Save and stop after the step in which any process was asked to.

    After every step the processes take the largest signal number that one of them has heard: one number on the CPU, in
    a group of its own, so that nothing waits for a GPU. After the last step nothing is left to stop.

    Args:
        request: of this process.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.agreed = 0
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the group; every process does."""
        if args.world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree; ask the trainer for a line, a checkpoint and the end."""
        heard = torch.tensor(self.request.number)
        if self._group is not None:
            dist.all_reduce(heard, dist.ReduceOp.MAX, group=self._group)
        self.agreed = int(heard)
        if self.agreed and state.global_step < state.max_steps:
            log.warning("%s: saving step %d, then stopping", signal.Signals(self.agreed).name, state.global_step)
            control.should_log = control.should_save = control.should_training_stop = True


class ShieldedWorker:
    """``worker_init_fn`` of a loader whose workers leave :data:`SIGNALS` to the training process.

    Launchers signal whole process groups; a worker that died of it would take the step to be saved with it.

    Args:
        start: what else a worker does first.
    """

    def __init__(self, start: Callable[[int], None] | None) -> None:
        self.start = start

    def __call__(self, worker: int) -> None:
        """Runs in the worker."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.start is not None:
            self.start(worker)
