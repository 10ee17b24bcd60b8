"""transformers' arguments for a stage."""

from __future__ import annotations

import logging
import math

import torch
from transformers import TrainingArguments

from skipvision_train.config.specs import TrainConfig
from skipvision_train.training.batching import BatchArithmetic
from skipvision_train.training.deepspeed_config import render

log = logging.getLogger(__name__)


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
    args = TrainingArguments(
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
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        dataloader_prefetch_factor=4 if trainer.workers else None,
        dataloader_persistent_workers=bool(trainer.workers) and not cfg.data.streaming,
        ignore_data_skip=cfg.data.streaming,  # a stream begins where it is told to
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,  # reporting.Progress shows one
        report_to=[],
        run_name=stage.name,
        deepspeed=deepspeed,
    )
    if args.n_gpu > 1:  # transformers would wrap the model in nn.DataParallel, which nothing here counts with
        log.warning("one of this machine's %d GPUs is used; launch/torchrun.sh takes them all", args.n_gpu)
        args._n_gpu = 1
    return args
