"""What happens between steps: the metrics file of a run, and the plan that the model is trained under."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipvision_train.errors import TrainingError
from skipvision_train.files import write_text
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.training.plan_schedule import PlanSchedule


class LineCallback(TrainerCallback):
    """Is told every logged line of metrics; the summary that transformers logs at the end is none."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hand on what has a ``loss``."""
        if logs is not None and "loss" in logs:
            self.on_line(state, logs)

    @abstractmethod
    def on_line(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """A line of the step ``state.global_step``."""


class MetricsFile(LineCallback):
    """Append every logged step to a JSON-lines file, on the first process; the last step is always logged.

    A run that continues from step N drops the lines after N that the interrupted run had written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the file back to the step that training continues from."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        replace_lines(self.path, kept)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a line after the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_line(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Write it."""
        if state.is_world_process_zero:
            append_lines(self.path, [{"step": state.global_step, **logs}])


class ScheduledPlan(TrainerCallback):
    """Keep the model, and the configuration that is saved with it, under the schedule's plan of the steps done.

    Set when training begins or continues, and after each optimizer step: all forward passes of a step, and the
    recomputation in its backward passes, run under one plan, and ``checkpoint-N`` carries the plan of step N.

    Args:
        model: the model itself, not an engine around it.
        schedule: which plan when.
    """

    def __init__(self, model: SkipVisionForConditionalGeneration, schedule: PlanSchedule) -> None:
        self.model, self.schedule = model, schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the plan of the first step to come."""
        self._set(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the plan of the next step; after the last one, the final plan."""
        self._set(state)

    def _set(self, state: TrainerState) -> None:
        plan = self.schedule.plan_at(state.global_step, state.max_steps)
        if plan != self.model.plan:
            self.model.set_plan(plan)
            self.model.config.skip_plan = None if plan.is_dense else plan.to_dict()


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a JSON-lines file.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error


def replace_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Have these rows, and nothing else, in a JSON-lines file.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off by a crash is left out."""
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return rows
