"""Follows a stage from inside the trainer: what its processes do, what steps hold, take and cost, what goes wrong."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipvision_train.config.specs import TrainConfig
from skipvision_train.data.mixture import Mixture
from skipvision_train.data.recipes import load_recipe, load_records
from skipvision_train.data.streams import Streams
from skipvision_train.errors import TrainingError
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.training.callbacks import read_metrics
from skipvision_train.training.clock import StepClock
from skipvision_train.training.facts import FACTS, BatchFacts
from skipvision_train.training.guards import BatchLoss, LossSpikes, NonfiniteGuard
from skipvision_train.training.lora import held
from skipvision_train.training.memory import check_memory
from skipvision_train.training.metrics import Gather, Meter, time_logs
from skipvision_train.training.reporting import TENSORBOARD, Progress, TensorBoardCurves, WandbCurves, plain
from skipvision_train.training.samples import SAMPLES, SampleTables, held_samples
from skipvision_train.training.watchdog import Watchdog
from skipvision_train.training.work import WorkCounter, peak_tflops

log = logging.getLogger(__name__)

NONFINITE = "nonfinite.jsonl"


class Watch(TrainerCallback):
    """What :class:`.trainer.StageTrainer` tells about its steps.

    Args:
        cfg: the configuration.
        model: the model itself.
        sources: names of the recipe's sources.
        watchdog: of this process.
        device: of this process.
        processes: training processes.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        model: SkipVisionForConditionalGeneration,
        sources: Sequence[str],
        watchdog: Watchdog,
        device: torch.device,
        processes: int,
    ) -> None:
        guards, run, rates = cfg.trainer.guards, Path(cfg.trainer.output_dir), dataclasses.asdict(cfg.stage.lr)
        parts = [part for part, rate in rates.items() if rate is not None]
        self.cfg, self.model, self.watchdog, self.device, self.processes = cfg, model, watchdog, device, processes
        self.clock = StepClock(device.type == "cuda")
        self.meter = Meter(WorkCounter(model.config, parts, cfg.stage.lora is not None), sources, parts, device)
        self.guard = NonfiniteGuard(guards.nonfinite_budget, run / NONFINITE, writes=watchdog.rank == 0)
        self.spikes = LossSpikes()
        self.metrics = run / "metrics.jsonl"
        self.peak = _peak_flops(cfg, device, processes)
        self.step = self.steps = self._logged = 0  # done, of the stage, done at the last line
        self._skipped = False
        self._skipped_since = 0
        self._queue: deque[BatchFacts] = deque()
        self._batch: BatchFacts | None = None
        self._seen: list[tuple[BatchFacts, Tensor]] = []

    def begin(self, phase: str) -> None:
        """What happens from now on is of this phase."""
        records = self._batch.samples if self._batch is not None and phase in ("forward", "backward") else ()
        self.clock.mark(phase)
        self.watchdog.begin(phase, self.step + 1, records)

    def take(self, batches: Sequence[dict[str, Any]]) -> list[BatchFacts]:
        """The facts of a step's micro batches, which are taken out of them."""
        facts = [batch.pop(FACTS) for batch in batches]
        self._queue.extend(facts)
        self._seen.clear()
        self._skipped = False
        self.meter.count(facts, self.model.plan)
        step, trainer = self.step + 1, self.cfg.trainer
        self.meter.norms.due = step == 1 or step % trainer.log_every == 0 or step >= self.steps
        return facts

    @property
    def batch(self) -> BatchFacts | None:
        """The micro batch whose passes run now."""
        return self._batch

    def next_batch(self) -> None:
        """The forward pass of the next micro batch begins."""
        self._batch = self._queue.popleft()
        self.begin("forward")

    def losses(self, loss: Tensor, token_losses: Tensor) -> None:
        """A micro batch's loss, and that of its supervised tokens; its backward pass begins."""
        if self._batch is not None:
            self._seen.append((self._batch, loss.detach()))
            self.meter.add_losses(token_losses, self._batch)
        self.begin("backward")

    def hook(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer's step begins; under DeepSpeed that is inside the backward pass of the last micro batch."""
        if self.clock.phase != "optimizer":
            self.begin("optimizer")
        self.meter.norms.hook(optimizer, args, kwargs)

    def batch_losses(self) -> list[BatchLoss]:
        """The step's micro batches on this process."""
        return [
            BatchLoss(self.watchdog.rank, value if math.isfinite(value) else None, facts.samples)
            for facts, value in ((facts, float(loss)) for facts, loss in self._seen)
        ]

    def leave_out(self, batches: Sequence[BatchLoss]) -> None:
        """The step is not finite, and weights and optimizer stay as they are.

        Args:
            batches: of all processes.

        Raises:
            TrainingError: it is one too many.
        """
        self._skipped = True
        self._skipped_since += 1
        self.guard.skipped(self.step + 1, batches)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what an interrupted run knew."""
        self.step = self._logged = state.global_step
        self.steps = state.max_steps
        self.guard.begin(state.global_step)
        if self.metrics.exists():
            for row in read_metrics(self.metrics):
                if row["step"] <= state.global_step and row["loss"] is not None:
                    self.spikes.score(row["loss"])
        self.clock.read()
        self.begin("other")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step is done."""
        self._batch = None
        self.meter.end_step(self._skipped)
        self.step = state.global_step
        self.begin("other")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint has been written."""
        self.begin("other")

    def line(self, logs: dict[str, Any], gather: Gather) -> dict[str, Any]:
        """What a line of metrics says besides what transformers does. All processes call it.

        Args:
            logs: with ``loss``, a mean over the steps since the last line, in which those left out count 0.
            gather: see :data:`.metrics.Gather`.
        """
        steps, skipped = self.step - self._logged, self._skipped_since
        totals, spent = self.meter.read(gather), self.clock.read()
        logs["loss"] = logs["loss"] * steps / (steps - skipped) if steps > skipped else None
        logs |= totals.logs(self.model.plan.num_layers)
        times = time_logs(spent, steps)
        if times:
            logs |= times | totals.speed(times["time/step"] * steps, self.peak)
        norms = totals.norms(logs.get("grad_norm"))
        logs |= norms | {"guards/nonfinite_steps": self.guard.count}
        logs |= self._spike(logs["loss"])
        self._logged, self._skipped_since = self.step, 0
        return plain(logs)

    def _spike(self, loss: float | None) -> dict[str, float]:
        score = None if loss is None else self.spikes.score(loss)
        if score is None:
            return {}
        threshold = self.cfg.trainer.guards.spike_threshold
        if threshold and score > threshold:
            log.warning(
                "step %d: the loss %.4g lies %.0f usual deviations above the median of the last lines", self.step, loss,
                score,
            )  # fmt: skip
        return {"guards/loss_deviation": round(score, 3)}


def _peak_flops(cfg: TrainConfig, device: torch.device, processes: int) -> float | None:
    """Of all devices, per second."""
    peak = cfg.trainer.peak_tflops
    if peak is None and device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(device), cfg.trainer.precision)
    return None if peak is None else peak * 1e12 * processes


def check_device_memory(cfg: TrainConfig, model: SkipVisionForConditionalGeneration) -> None:
    """Before the first step: does it fit? Says nothing without a GPU. Call before weights are sharded.

    Raises:
        TrainingError: it does not.
    """
    if cfg.trainer.guards.memory == "off" or not torch.cuda.is_available():
        return
    device = int(os.environ.get("LOCAL_RANK", "0"))
    total = torch.cuda.get_device_properties(device).total_memory
    counted = held(model, cfg.stage.lora)
    check_memory(
        cfg,
        cast(SkipVisionConfig, model.config),
        counted.parameters,
        counted.trainable,
        int(os.environ.get("WORLD_SIZE", "1")),
        float(total),
        counted.packed,
    )


def reporters(
    cfg: TrainConfig,
    model: SkipVisionForConditionalGeneration,
    processor: Any,
    records: Mixture | Streams,
    watch: Watch,
) -> list[TrainerCallback]:
    """Console, curves and tables, as the configuration wants them.

    Raises:
        SkipVisionError: the samples' recipe cannot be read.
    """
    trainer, run = cfg.trainer, Path(cfg.trainer.output_dir)
    found: list[TrainerCallback] = [Progress(trainer.progress_bar)]
    if trainer.tensorboard:
        found.append(TensorBoardCurves(run / TENSORBOARD))
    curves = None
    if trainer.wandb != "off":
        curves = WandbCurves(run, trainer.wandb_project, trainer.wandb, cfg.stage.name, dataclasses.asdict(cfg))
        found.append(curves)
    if trainer.watch.sample_every:
        if isinstance(records, Streams) or trainer.watch.sample_recipe is not None:
            records = load_records(load_recipe(trainer.watch.sample_recipe or cfg.data.recipe, cfg.data.root))
        held = held_samples(records, processor, cfg.stage.template, trainer.watch.sample_count)
        if not held:
            raise TrainingError("trainer.watch.sample_every: none of the samples can be used; the log says why")
        found.append(
            SampleTables(
                model,
                processor,
                held,
                trainer.watch.sample_every,
                trainer.watch.sample_tokens,
                run / SAMPLES,
                together=cfg.deepspeed is not None and cfg.deepspeed.stage == 3,
                tell=None if curves is None else curves.samples,
                begin=watch.begin,
            )
        )
    return found
