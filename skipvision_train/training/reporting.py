"""Where the numbers of a run go besides ``metrics.jsonl``: the console, TensorBoard, Weights & Biases."""

from __future__ import annotations

import logging
import math
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from skipvision_train.training.callbacks import LineCallback

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

WANDB_ID = "wandb_id.txt"
TENSORBOARD = "tensorboard"


def plain(logs: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can say: a number that is not finite is None."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in logs.items()}


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """What a curve can show."""
    return {key: value for key, value in plain(logs).items() if isinstance(value, int | float)}


def remaining(seconds: float, done: int, left: int) -> str:
    """How long ``left`` steps take if ``done`` took so many seconds: ``0:12:30``, or ``?`` before the first one."""
    return str(timedelta(seconds=round(seconds / done * left))) if done else "?"


def progress_line(state: TrainerState, logs: Mapping[str, Any], eta: str) -> str:
    """One line of a log file."""
    loss = logs["loss"]
    shown = [f"step {state.global_step}/{state.max_steps}", f"loss {'none' if loss is None else f'{loss:.4f}'}"]
    if logs.get("tokens_per_second"):
        shown.append(f"{logs['tokens_per_second']:.0f} tokens/s")
    if "time/step" in logs:
        shown.append(f"{logs['time/step']:.3g} s/step, {100 * logs['time/data']:.0f} % of it data")
    return ", ".join([*shown, f"{eta} left"])


class Progress(LineCallback):
    """A bar with the time that is left, on a terminal; elsewhere a plain line for every logged step.

    Args:
        bar: show one where ``stream`` is a terminal.
        stream: where.
    """

    def __init__(self, bar: bool, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.show = bar and self.stream.isatty()
        self._bar: tqdm[Any] | None = None
        self._first, self._began = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count where the run continues."""
        self._first, self._began = state.global_step, time.monotonic()
        if self.show and state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, file=self.stream, dynamic_ncols=True, unit="step"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_line(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Show the loss."""
        if not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.set_postfix_str("loss " + ("none" if logs["loss"] is None else f"{logs['loss']:.4f}"))
            return
        seconds, done = time.monotonic() - self._began, state.global_step - self._first
        log.info("%s", progress_line(state, logs, remaining(seconds, done, state.max_steps - state.global_step)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TensorBoardCurves(LineCallback):
    """Writes every logged number for TensorBoard; a continued run hides what the interrupted one had written after it.

    Args:
        folder: of the event files; the same in every start of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open a file."""
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_line(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Write a line's numbers."""
        if self._writer is not None:
            for key, value in numbers(logs).items():
                self._writer.add_scalar(key, value, state.global_step)
            self._writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def wandb_run_id(run: Path) -> str:
    """The id under which this run's curves are kept, whichever start of it asks."""
    file = run / WANDB_ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


def wandb_mode(wanted: str) -> str:
    """``offline`` instead of ``online`` where there is no key, and say so.

    A key is what ``WANDB_API_KEY`` or the netrc file of ``wandb login`` holds; nothing is asked of the network.
    """
    if wanted != "online":
        return wanted
    import os
    from netrc import NetrcParseError, netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    key = os.environ.get("WANDB_API_KEY")
    if not key:
        try:
            key = (netrc(os.environ.get("NETRC")).authenticators(host) or (None, None, None))[2]
        except (OSError, NetrcParseError):
            key = None
    if key:
        return "online"
    log.warning(
        "trainer.wandb: online, but there is no key (WANDB_API_KEY, or `wandb login`); the run is kept offline in its "
        "folder: `wandb sync` uploads it later"
    )
    return "offline"


class WandbCurves(LineCallback):
    """Logs to Weights & Biases; every start of a run continues the same curves.

    Args:
        run: the run's folder; ``wandb`` in it holds what is logged.
        project: the project.
        mode: online or offline.
        name: of the run.
        config: the configuration.
    """

    def __init__(self, run: Path, project: str, mode: str, name: str, config: Mapping[str, Any]) -> None:
        self.run, self.project, self.mode, self.name, self.config = run, project, mode, name, dict(config)
        self._run: wandb.Run | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, or continue."""
        if not state.is_world_process_zero:
            return
        import wandb

        mode = "online" if wandb_mode(self.mode) == "online" else "offline"
        self._run = wandb.init(
            project=self.project,
            name=self.name,
            id=wandb_run_id(self.run),
            resume="allow",
            dir=str(self.run.absolute()),
            mode=mode,  # type: ignore[arg-type]
            config=self.config,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_line(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Log a line."""
        if self._run is not None:
            self._run.log({**numbers(logs), "step": state.global_step})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table of answers."""
        if self._run is not None and rows:
            import wandb

            table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            self._run.log({"samples": table, "step": step})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The run is over."""
        if self._run is not None:
            self._run.finish()
            self._run = None
