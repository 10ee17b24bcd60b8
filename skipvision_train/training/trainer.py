"""transformers' ``Trainer`` with a learning rate per part, a loss per supervised token, and whole checkpoints."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import ProcessorMixin, Trainer, TrainerCallback, TrainingArguments

from skipvision_train.config.specs import StageSpec, TrainConfig
from skipvision_train.data.mixture import Mixture
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.training.batching import BatchArithmetic, EpochStart, count_tokens
from skipvision_train.training.callbacks import MetricsFile, ScheduledPlan
from skipvision_train.training.checkpoints import (
    FINISHED,
    MARKER,
    PARTIAL,
    CheckpointInfo,
    mark_complete,
    publish_model,
    remove_old,
    writing,
)
from skipvision_train.training.deepspeed_config import render
from skipvision_train.training.feed import Feed
from skipvision_train.training.plan_schedule import PlanSchedule
from skipvision_train.training.stages import parameter_groups

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StageParts:
    """What a stage is trained with, besides its configuration.

    Attributes:
        model: with ``requires_grad`` set.
        processor: stored with every checkpoint, so that each one is a model directory.
        records: what the recipe gives.
        feed: what is read of them, and in which order.
        collator: list of examples -> batch.
    """

    model: SkipVisionForConditionalGeneration
    processor: ProcessorMixin
    records: Mixture
    feed: Feed
    collator: Callable[[list[Any]], dict[str, Tensor]]


def engine_name(cfg: TrainConfig) -> str:
    """``none`` or ``zero<stage>``, as checkpoints record it."""
    return "none" if cfg.deepspeed is None else f"zero{cfg.deepspeed.stage}"


def training_arguments(cfg: TrainConfig, arithmetic: BatchArithmetic) -> TrainingArguments:
    """transformers' arguments for a stage. Sets up the process group; build the model before.

    (With ZeRO-3 arguments alive, transformers builds every model sharded, which a strict loader cannot fill.)

    Raises:
        ValueError: the number of steps is unknown.
    """
    trainer, stage = cfg.trainer, cfg.stage
    if arithmetic.steps is None:
        raise ValueError("the number of steps must be known before training")
    deepspeed = None
    if cfg.deepspeed is not None:
        deepspeed = render(cfg.deepspeed, trainer, arithmetic.accumulation, stage.max_grad_norm)
    return TrainingArguments(
        output_dir=trainer.output_dir,
        max_steps=arithmetic.steps,
        per_device_train_batch_size=trainer.per_device_batch,
        gradient_accumulation_steps=arithmetic.accumulation,
        average_tokens_across_devices=True,
        learning_rate=max(rate for rate in vars(stage.lr).values() if rate is not None),
        lr_scheduler_type=stage.schedule if stage.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(stage.warmup_ratio * arithmetic.steps),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=trainer.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=trainer.seed,
        logging_strategy="steps",
        logging_steps=trainer.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if trainer.save_every else "no",
        save_steps=trainer.save_every or 500,
        save_total_limit=None,  # checkpoints.remove_old does it, after the newest is known to be whole
        dataloader_num_workers=trainer.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_prefetch_factor=4 if trainer.workers else None,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=not trainer.progress_bar,
        report_to=[] if trainer.wandb == "off" else ["wandb"],
        run_name=stage.name,
        deepspeed=deepspeed,
    )


class StageTrainer(Trainer):
    """Runs one stage.

    Args:
        cfg: the validated configuration.
        parts: model, processor, data.
        arithmetic: batch sizes and steps.
        callbacks: further ones.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        parts: StageParts,
        arithmetic: BatchArithmetic,
        callbacks: tuple[TrainerCallback, ...] = (),
    ) -> None:
        self.cfg, self.parts, self.arithmetic = cfg, parts, arithmetic
        self.sampler = parts.feed.sampler(arithmetic.global_batch, cfg.trainer.seed)
        self.schedule = PlanSchedule.of(cfg, parts.model.plan.num_layers)
        self.run_dir = Path(cfg.trainer.output_dir)
        self._rates: dict[str, float] = {}
        self._tokens = torch.zeros(3, dtype=torch.long)
        self._last_log: tuple[int, float] | None = None
        super().__init__(
            model=parts.model,
            args=training_arguments(cfg, arithmetic),
            data_collator=parts.collator,
            train_dataset=parts.feed.dataset,
            callbacks=[
                MetricsFile(self.run_dir / METRICS),
                ScheduledPlan(parts.model, self.schedule),
                EpochStart(self.sampler),
                *callbacks,
            ],
        )

    @property
    def stage(self) -> StageSpec:
        """The stage's configuration."""
        return self.cfg.stage

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """torch's AdamW (betas 0.9 and 0.999) with the groups of the stage; before DeepSpeed shards the weights."""
        if self.optimizer is None:
            groups = parameter_groups(model or self.parts.model, self.stage.lr, self.stage.weight_decay)
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return self.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro batches of one step, and the number of supervised tokens of all processes' micro batches.

        The label of the first position is predicted by nothing and does not count.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        total = self.accelerator.gather(count_tokens(batches).to(device)[None]).sum(0)
        self._tokens = self._tokens.to(device) + total
        return batches, total[0].clamp_min(1)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in transformers; remembers the rates that the coming optimizer step applies."""
        if self.optimizer is not None:
            self._rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add rates per part, the layers that the step skipped, supervised tokens and speed since the last line."""
        if "loss" in logs:
            now = time.perf_counter()
            step, before = self._last_log or (self.state.global_step - 1, now)
            logs.pop("learning_rate", None)
            logs |= {f"lr/{part}": rate for part, rate in self._rates.items()}
            if self.schedule.layers:
                logs["skip/layers"] = self.schedule.skipped(self.state.global_step - 1, self.state.max_steps)
            supervised, real, places = self._tokens.tolist()
            logs |= {"supervised_tokens": supervised, "padding": round(1 - real / max(1, places), 4)}
            if now > before:
                samples = (self.state.global_step - step) * self.arithmetic.global_batch
                logs[f"{self.arithmetic.unit}_per_second"] = round(samples / (now - before), 3)
            self._tokens = torch.zeros_like(self._tokens)
            self._last_log = (self.state.global_step, now)
        super().log(logs, start_time)

    def info(self) -> CheckpointInfo:
        """What a checkpoint written now is written by."""
        return CheckpointInfo(self.state.global_step, self.arithmetic.processes, engine_name(self.cfg))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-N``; its marker comes last, when every process has written its share."""
        directory = self.run_dir / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and directory.exists():
            (directory / MARKER).unlink(missing_ok=True)
            shutil.rmtree(directory)
        self.accelerator.wait_for_everyone()
        with writing(directory):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                mark_complete(directory, self.info())
                remove_old(self.run_dir, self.cfg.trainer.keep_checkpoints, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A model directory that can be loaded, and can start the next stage: weights, processor, plan."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            directory = Path(output_dir or self.run_dir)
            self.parts.processor.save_pretrained(directory)
            self.parts.model.plan.save(directory / "plan.json")

    def save_finished(self) -> Path:
        """Write ``model``: all processes take part (ZeRO-3 gathers), the first one writes, checks and renames.

        Raises:
            CheckpointError: the model cannot be written or read back; there is no ``model`` then.
        """
        partial, final = self.run_dir / PARTIAL, self.run_dir / FINISHED
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with writing(partial):
            self.save_model(str(partial), _internal_call=True)
            if self.is_world_process_zero():
                (partial / "training_args.bin").unlink(missing_ok=True)
                publish_model(partial, final, self._expected())
        self.accelerator.wait_for_everyone()
        return final

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Full shapes of all parameters; under ZeRO-3 the local shard's shape says nothing."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.parts.model.named_parameters()
        }


def start_wandb(cfg: TrainConfig) -> None:
    """Tell wandb, by the environment that it reads, where and whether to log."""
    if cfg.trainer.wandb != "off":
        os.environ["WANDB_MODE"] = cfg.trainer.wandb
        os.environ["WANDB_PROJECT"] = cfg.trainer.wandb_project
        os.environ["WANDB_DIR"] = str(Path(cfg.trainer.output_dir).absolute())
