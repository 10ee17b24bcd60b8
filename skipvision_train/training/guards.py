"""What keeps a run from learning nonsense: steps that are not finite are left out, sudden losses are reported."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from skipvision_train.errors import TrainingError
from skipvision_train.training.callbacks import append_lines, read_metrics, replace_lines

log = logging.getLogger(__name__)

SHOWN = 16
"""Records that a message names."""


@dataclass(frozen=True)
class BatchLoss:
    """A micro batch of a step that was left out.

    Attributes:
        rank: whose.
        loss: None where it is not finite.
        samples: its records.
    """

    rank: int
    loss: float | None
    samples: tuple[str, ...]


def poison(loss: Tensor) -> Tensor:
    """``loss``, with gradients that are not finite where it is not.

    A process whose loss alone is infinite is seen by all in the norm of the joint gradient: no process needs to ask the
    others, and nothing waits for the GPU.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class NonfiniteGuard:
    """Counts steps that were left out, and stops where they are too many.

    Args:
        budget: so many are allowed.
        path: a JSON-lines file with the records of every such step; a continued run counts on.
        writes: this process writes the file.
    """

    def __init__(self, budget: int, path: Path, writes: bool) -> None:
        self.budget, self.path, self.writes = budget, path, writes
        self._steps: set[int] = set()

    @property
    def count(self) -> int:
        """Steps left out so far."""
        return len(self._steps)

    def begin(self, step: int) -> None:
        """Take over what the run counted up to the step that it continues from; a cut last line is left out."""
        rows = read_metrics(self.path) if self.path.exists() else []
        self._steps = {number for row in rows if (number := row["step"]) <= step}
        if self.writes and self.path.exists():
            replace_lines(self.path, rows)

    def skipped(self, step: int, batches: Sequence[BatchLoss]) -> None:
        """Note a step.

        Args:
            step: counted from 1.
            batches: of all processes.

        Raises:
            TrainingError: the budget is spent; with the records.
        """
        self._steps.add(step)
        guilty = [batch for batch in batches if batch.loss is None]
        records = [sample for batch in guilty or batches for sample in batch.samples]
        shown = ", ".join(records[:SHOWN]) + (f" and {len(records) - SHOWN} more" if len(records) > SHOWN else "")
        what = "the loss is not finite" if guilty else "the gradient is not finite though the loss is"
        ranks = sorted({batch.rank for batch in guilty or batches})
        where = f"{what} (rank {', '.join(map(str, ranks))}); records: {shown}"
        if self.writes:
            append_lines(self.path, [{"step": step, "batches": [asdict(batch) for batch in batches]}])
            log.warning("step %d is left out, %d of %d: %s", step, self.count, self.budget, where)
        if self.count > self.budget:
            raise TrainingError(
                f"step {step}: {where}; {self.count} steps were not finite, trainer.guards.nonfinite_budget is "
                f"{self.budget}; {self.path} lists them all. Look at the records, or lower stage.lr"
            )


class LossSpikes:
    """How far a loss lies above the last ones, in robust standard deviations.

    Args:
        window: losses that are looked back on.
        least: before there are so many, nothing is said.
    """

    def __init__(self, window: int = 100, least: int = 20) -> None:
        self.least = least
        self._last: deque[float] = deque(maxlen=window)

    def score(self, loss: float) -> float | None:
        """(loss - median) / (1.4826 median absolute deviation) of the losses before, and remember this one.

        The deviation is at least a hundredth of the median, so that a loss that hardly moves raises nothing.
        """
        score = None
        if len(self._last) >= self.least:
            middle = median(self._last)
            usual = 1.4826 * median(abs(value - middle) for value in self._last)
            score = (loss - middle) / max(usual, 0.01 * abs(middle), 1e-12)
        if math.isfinite(loss):
            self._last.append(loss)
        return score


@contextmanager
def explained_memory(settings: str) -> Iterator[None]:
    """Turn a GPU that runs out of memory into an error that says what to change.

    Args:
        settings: see :func:`.memory.remedies`.

    Raises:
        TrainingError: with torch's first line, which has the sizes.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". Of the allocated", maxsplit=1)[0].splitlines()[0]
        raise TrainingError(f"the GPU's memory is too small: {reason}; {settings}") from error
