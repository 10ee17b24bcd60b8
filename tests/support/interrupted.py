"""A run that is broken off before a step, as a crash would."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class InterruptionError(Exception):
    pass


class InterruptAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptionError
