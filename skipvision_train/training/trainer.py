"""transformers' ``Trainer`` with a learning rate per part, a loss per supervised token, and whole checkpoints."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from skipvision_train.config.specs import StageSpec, TrainConfig
from skipvision_train.data.mixture import Mixture
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.streams import Streams
from skipvision_train.files import write_json
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans.transfer import upload
from skipvision_train.training.arguments import engine_name, training_arguments
from skipvision_train.training.batching import BatchArithmetic, EpochStart, StreamStart, TrainCollator
from skipvision_train.training.callbacks import MetricsFile, ScheduledPlan
from skipvision_train.training.checkpoints import (
    FINISHED,
    MARKER,
    PARTIAL,
    CheckpointInfo,
    changed_files,
    mark_complete,
    newest_complete,
    publish_model,
    remove_old,
    set_aside,
    shared_checksums,
    sync,
    writing,
)
from skipvision_train.training.ema import WeightAverage
from skipvision_train.training.facts import FactsCollator, model_inputs
from skipvision_train.training.feed import Feed
from skipvision_train.training.guards import explained_memory, poison
from skipvision_train.training.lora import ADAPTERS, SETTINGS, merged, plain_shapes
from skipvision_train.training.memory import remedies
from skipvision_train.training.plan_schedule import PlanSchedule
from skipvision_train.training.signals import ShieldedWorker, StopOnSignal, Stopped, StopRequest
from skipvision_train.training.stages import parameter_groups
from skipvision_train.training.universal import convert, put_right, remove
from skipvision_train.training.watchdog import Watchdog
from skipvision_train.training.watching import Watch, reporters

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
    processor: SkipVisionProcessor
    records: Mixture | Streams
    feed: Feed
    collator: TrainCollator


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
        self.stop = StopOnSignal(StopRequest())
        decay = cfg.stage.ema_decay
        self.average = None if decay is None else WeightAverage(parts.model, decay)
        self._finishing = False
        self._converted: Path | None = None
        self._groups: list[dict[str, Any]] = []
        self._rates: dict[str, float] = {}
        self._loss_before = torch.zeros(())
        self._last_log: tuple[int, float] | None = None
        sources = [source.name for source in parts.records.sources]
        args = training_arguments(cfg, arithmetic)
        patience, reading = cfg.trainer.guards.stuck_after, parts.feed.watched.reading
        dog = Watchdog(self.run_dir, args.process_index, args.world_size, patience, reading)
        self.watch = Watch(cfg, parts.model, sources, dog, args.device, args.world_size)
        super().__init__(
            model=parts.model,
            args=args,
            data_collator=FactsCollator(parts.collator, sources),
            train_dataset=parts.feed.dataset,
            callbacks=[
                MetricsFile(self.run_dir / METRICS),
                ScheduledPlan(parts.model, self.schedule),
                EpochStart(self.sampler) if parts.feed.stream is None else StreamStart(parts.feed.stream),
                *([] if self.average is None else [self.average]),
                *callbacks,
                self.stop,
                self.watch,
                *reporters(cfg, parts.model, parts.processor, parts.records, self.watch),
            ],
        )
        self.remove_callback(PrinterCallback)  # Progress says it

    @property
    def stage(self) -> StageSpec:
        """The stage's configuration."""
        return self.cfg.stage

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """torch's AdamW (betas 0.9 and 0.999) with the groups of the stage; before DeepSpeed shards the weights."""
        if self.optimizer is None:
            stage = self.stage
            groups = parameter_groups(model or self.parts.model, stage.lr, stage.weight_decay, stage.vision_layer_decay)
            self.optimizer = torch.optim.AdamW(groups)
            self.optimizer.register_step_pre_hook(self.watch.hook)
            self._groups = [
                {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
            ]
        return self.optimizer

    def run_from(self, start: tuple[Path, CheckpointInfo] | None) -> None:
        """Train from step 0 or a checkpoint; with the signals of :mod:`.signals` handled.

        Raises:
            Stopped: every process, after the checkpoint that one of them was asked for.
            CheckpointError: the checkpoint does not fit this number of processes and cannot be made to.
        """
        if start is not None and start[1].needs_conversion(self.arithmetic.processes):
            self._converted = start[0]
            if self.is_world_process_zero():
                convert(start[0], start[1].processes, self.arithmetic.processes)
            self.accelerator.wait_for_everyone()
            self.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
        if start is not None and self.average is not None:
            self.average.load(start[0])
        settings = remedies(self.cfg, self.args.world_size)
        with self.stop.request.listening(), self.watch.watchdog, explained_memory(settings):
            self.train(resume_from_checkpoint=None if start is None else str(start[0]))
        if self.state.global_step < self.state.max_steps and self.stop.agreed:
            raise Stopped(self.state.global_step, self.stop.agreed)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in transformers; after a conversion the optimizer is put right and what was converted is removed."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._converted is None:
            return
        engine, scheduler = cast(Any, self.model_wrapped), cast(Any, self.lr_scheduler)
        put_right(engine.optimizer.optimizer, self._groups, scheduler.get_last_lr())
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            remove(self._converted)

    def sound_start(self) -> tuple[Path, CheckpointInfo] | None:
        """The newest complete checkpoint whose content is what was written; the processes share the reading.

        One that has changed is named in the log, set aside, and the next older one is taken.
        """
        me, processes = self.args.process_index, self.args.world_size
        while (newest := newest_complete(self.run_dir)) is not None:
            path, info = newest
            changed = gather_object(changed_files(path, me, processes))
            if not changed:
                return path, info
            if self.is_world_process_zero():
                set_aside(path, changed)
            self.accelerator.wait_for_everyone()
        return None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in transformers, except for a stream, which knows itself what this process reads of it.

        Its workers leave signals to this process.
        """
        if (stream := self.parts.feed.stream) is not None:
            return DataLoader(
                stream,
                batch_size=self.args.per_device_train_batch_size,
                num_workers=self.args.dataloader_num_workers,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
                prefetch_factor=self.args.dataloader_prefetch_factor,
                worker_init_fn=ShieldedWorker(None),
                generator=torch.Generator(),  # for the workers' seeds: the global one is the model's
            )
        loader: Any = super().get_train_dataloader()  # accelerate's, around a loader of torch
        base = loader.base_dataloader
        base.worker_init_fn = ShieldedWorker(base.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return self.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro batches of one step, and the number of supervised tokens of all processes' micro batches.

        The label of the first position is predicted by nothing and does not count.
        """
        if self.state.global_step >= self.state.max_steps:  # died behind the last checkpoint, in the middle of an epoch
            self.control.should_training_stop = True
            return [], torch.ones((), device=device)
        self.watch.begin("data")
        self._loss_before = self._tr_loss.clone()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        mine = sum(facts.supervised for facts in self.watch.take(batches))
        total = self.accelerator.gather(upload(torch.tensor([mine]), device)).sum()
        return batches, total.clamp_min(1)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in transformers; the copies to a GPU do not wait for it."""
        device = self.args.device
        inputs = {name: upload(v, device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        return cast(dict[str, Any], super()._prepare_inputs(inputs))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in transformers; remembers the rates that the coming optimizer step applies."""
        if self.optimizer is not None:
            self._rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.watch.next_batch()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.begin("optimizer")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in transformers; a loss that is not finite makes gradients that are not."""
        if self.watch.batch is not None:
            inputs = model_inputs(inputs, self.watch.batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.watch.losses(loss, outputs.token_losses)
        return (poison(loss), outputs) if return_outputs else poison(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in transformers; a step that is not finite is left out, on all processes, whose norm is the same.

        Raises:
            TrainingError: it is one too many.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(norm):
            model.zero_grad()  # AdamW passes over what has no gradient; DeepSpeed has left the step out itself
            self._tr_loss.copy_(self._loss_before)
            self.watch.leave_out(gather_object(self.watch.batch_losses()))
            if self.accelerator.optimizer_step_was_skipped:
                cast(Any, self.lr_scheduler).step()  # the schedule goes on, with any engine
        return norm

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add rates per part, the layers that the step skipped, supervised tokens and speed since the last line."""
        if "loss" in logs:
            now = time.perf_counter()
            step, before = self._last_log or (self.state.global_step - 1, now)
            logs.pop("learning_rate", None)
            logs |= {f"lr/{part}": rate for part, rate in self._rates.items()}
            if self.schedule.layers:
                logs["skip/layers"] = self.schedule.skipped(self.state.global_step - 1, self.state.max_steps)
            logs = self.watch.line(logs, lambda numbers: self.accelerator.gather(numbers[None]))
            if now > before:
                samples = (self.state.global_step - step) * self.arithmetic.global_batch
                logs[f"{self.arithmetic.unit}_per_second"] = round(samples / (now - before), 3)
            self._last_log = (self.state.global_step, now)
        super().log(logs, start_time)

    def info(self) -> CheckpointInfo:
        """What a checkpoint written now is written by."""
        return CheckpointInfo(self.state.global_step, self.arithmetic.processes, engine_name(self.cfg))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-N``; its marker comes last, when every process has written its share and read it back.

        No process goes on before the marker is there: one that ends early makes launchers end the others.
        """
        self.watch.begin("save")
        directory = self.run_dir / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and directory.exists():
            (directory / MARKER).unlink(missing_ok=True)
            shutil.rmtree(directory)
        self.accelerator.wait_for_everyone()
        with writing(directory):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            sums = shared_checksums(directory, self.args.process_index, self.args.world_size, gather_object)
            if self.is_world_process_zero():
                if (metrics := self.run_dir / METRICS).exists():
                    sync(metrics)
                mark_complete(directory, self.info(), sums)
                remove_old(self.run_dir, self.cfg.trainer.keep_checkpoints, self.state.global_step)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A model directory that can be loaded, and can start the next stage: weights, processor, plan."""
        directory, adapters = Path(output_dir or self.run_dir), dict[str, Tensor]()
        if self._finishing and self.average is not None:
            state_dict = self.average.replace(state_dict or self.parts.model.state_dict())
        if self._finishing and self.stage.lora is not None:
            state_dict, adapters = merged(state_dict or self.parts.model.state_dict(), self.stage.lora)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            if adapters:
                save_file(adapters, directory / ADAPTERS)
            elif self.stage.lora is not None:
                write_json(directory / SETTINGS, asdict(self.stage.lora))
            if self.average is not None and not self._finishing:
                self.average.save(directory)
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
        self.watch.begin("save")
        with self.watch.watchdog, writing(partial):
            self._finishing = True
            self.save_model(str(partial), _internal_call=True)
            self._finishing = False
            if self.is_world_process_zero():
                (partial / "training_args.bin").unlink(missing_ok=True)
                publish_model(partial, final, self._expected())
        self.accelerator.wait_for_everyone()
        return final

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Full shapes of all parameters of the finished model."""
        return plain_shapes(self.parts.model)
