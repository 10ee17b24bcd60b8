"""Our dense training against transformers' own LLaVA under its own Trainer, and our loop against a bare one.

    OMP_NUM_THREADS=1 python benchmarks/training.py --clock cpu               # CPU: scaled down
    OMP_NUM_THREADS=1 python benchmarks/training.py --clock cpu --loop
    python benchmarks/training.py --geometry llava_1_5_7b --layers 8          # one GPU: Vicuna-7B's sizes

Both train connector and language model behind a frozen tower, on the same ragged records (log-normal text, some without
an image), read and encoded by the same code; random weights. Every round runs every case once, beginning with another
one; a case is a pass over the records: loading, forward, backward, clipping, AdamW, the trainer's own work. Ours runs
three times more with one saving switched off: packing, logits only where there are labels, the last layer only where it
is read; these cases go on training one model. With ``--loop`` instead: StageTrainer with all callbacks against a loop
of nothing but the step, on the same batches. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from harness import Sample, interleave, median
from output import _commit, _cpu_name
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from train_models import experiment_config
from training_data import SIZES, Sizes, write_workspace
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from skipvision_train.config.specs import TrainConfig
from skipvision_train.training.batching import BatchArithmetic
from skipvision_train.training.facts import FACTS, FactsCollator, model_inputs
from skipvision_train.training.run import assemble
from skipvision_train.training.stages import parameter_groups
from skipvision_train.training.trainer import StageParts, StageTrainer

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu``: seconds that the processor spent on this process, all its threads; for a machine that others use, too."""

WITHOUT = ("packing", "logits at labels", "last layer where read")
"""The savings that are switched off in turn."""


def configuration(args: argparse.Namespace, folder: Path, packed: bool) -> TrainConfig:
    """What our trainer is told."""
    sizes: Sizes = SIZES[args.geometry]
    batch = sizes.packed if packed else sizes.batch
    text = sizes.text | ({} if args.layers is None else {"num_hidden_layers": args.layers})
    fields = {f"model.text.{k}": v for k, v in text.items()} | {f"model.vision.{k}": v for k, v in sizes.vision.items()}
    fields |= {
        "model.from_scratch": "true", "model.tokenizer": folder / "tokenizer",
        "data.recipe": folder / "recipe.yaml", "data.max_length": sizes.row, "data.pack": str(packed).lower(),
        "stage.lr.reducer": "null", "stage.lr.llm": 1e-5, "stage.lr.connector": 1e-5, "data.root": "null",
        "trainer.epochs": 1, "trainer.per_device_batch": batch, "trainer.global_batch": 2 * batch,
        "trainer.precision": "bf16" if args.device != "cpu" else "fp32", "trainer.workers": args.workers,
        "trainer.save_every": 0, "trainer.last_layer": "supervised",
        "trainer.gradient_checkpointing": str(args.checkpointing).lower(),
        "trainer.progress_bar": "false", "trainer.output_dir": folder / f"run-{packed}",
    }  # fmt: skip
    cfg = experiment_config("llava", [f"{key}={value}" for key, value in fields.items()])
    cfg.deepspeed = None
    return cfg


class Span(TrainerCallback):
    """Seconds from the first step's begin to the last step's end."""

    def __init__(self, device: str, clock: str) -> None:
        self.device, self.clock = device, CLOCKS[clock]
        self.seconds = 0.0

    def now(self) -> float:
        """With all work of the device done."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return self.clock()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = -self.now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += self.now()


class Ours:
    """A pass over the records by :class:`StageTrainer`.

    Args:
        args: the options.
        folder: with records and tokenizer.
        without: a saving of :data:`WITHOUT` that is switched off; None runs with all.
        model: is trained further; None makes one. A GPU has no room for one of each case.
    """

    def __init__(
        self, args: argparse.Namespace, folder: Path, without: str | None, model: nn.Module | None = None
    ) -> None:
        self.args, self.without = args, without
        self.cfg = configuration(args, folder, packed=without != WITHOUT[0])
        torch.manual_seed(0)  # the same weights for all
        self.parts: StageParts = assemble(self.cfg)
        if model is not None:
            self.parts = replace(self.parts, model=model)
        self.parts.model.to(args.device)
        self.records, self.losses = 0, list[float]()

    def arithmetic(self) -> BatchArithmetic:
        """Whole steps of one pass."""
        found = BatchArithmetic.of(self.cfg.trainer, self.parts.feed.rows, 1, self.parts.feed.unit)
        return replace(found, steps=self.parts.feed.rows // self.cfg.trainer.global_batch)

    def trainer(self, span: Span) -> StageTrainer:
        """A new one, whose records are counted."""
        made, self.records = StageTrainer(self.cfg, self.parts, self.arithmetic(), (span,)), 0
        take = made.watch.take

        def counted(batches: Any) -> Any:
            facts = take(batches)
            self.records += sum(len(fact.samples) for fact in facts)
            return facts

        made.watch.take = counted
        return made

    def run(self) -> Sample:
        """Seconds per record."""
        clean(self.parts.model)
        self.parts.model.train_with(self.cfg.trainer.loss, read_supervised=self.without != WITHOUT[2])
        if self.without == WITHOUT[1]:
            self.parts.model._loss = MethodType(loss_of_all_logits, self.parts.model)
        span = Span(self.args.device, self.args.clock)
        trainer = self.trainer(span)
        trainer.run_from(None)
        self.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return Sample(span.seconds / self.records)


def loss_of_all_logits(
    model: Any, hidden: Tensor, labels: Tensor, read: Tensor | None, num_items_in_batch: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    """As :meth:`SkipVisionForConditionalGeneration._loss`, with logits at every position, as transformers' models."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    losses = F.cross_entropy(model.language_model.lm_head(hidden).float().flatten(0, 1), targets, reduction="none")
    items = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / items, losses.detach()[targets != -100]


def clean(model: nn.Module) -> None:
    """Free what the last run of any case has left, and take from ``model`` what was put around its methods.

    A trainer and its optimizer refer to each other: their memory is free only when the collector has seen them.
    """
    for name in ("_loss", "forward", "_original_forward"):
        model.__dict__.pop(name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Theirs:
    """A pass over the same records by transformers' model and Trainer.

    Args:
        args: the options.
        ours: whose records, tokens and sizes are taken.
        folder: for what the Trainer writes.
    """

    def __init__(self, args: argparse.Namespace, ours: Ours, folder: Path) -> None:
        self.args, self.ours, self.folder = args, ours, folder
        config = ours.parts.model.config
        vision = config.vision_config
        torch.manual_seed(0)
        with torch.device(args.device):
            self.model = LlavaForConditionalGeneration(
                LlavaConfig(
                    vision_config=CLIPVisionConfig(
                        hidden_size=vision.width, intermediate_size=int(vision.mlp_ratio * vision.width),
                        num_hidden_layers=vision.layers, num_attention_heads=vision.heads, image_size=vision.image_size,
                        patch_size=vision.patch_size, projection_dim=vision.width,
                    ),
                    text_config=LlamaConfig(**config.text_config.to_dict()),
                    image_token_id=config.image_token_id, vision_feature_layer=-2,
                )
            )  # fmt: skip
        self.model.model.vision_tower.requires_grad_(False)
        self.records, self.losses = 0, list[float]()

    def collate(self, examples: list[Any]) -> dict[str, Tensor]:
        """Padded rows, as transformers' processor makes them."""
        batch = self.ours.parts.collator(examples)
        return {k: batch[k] for k in ("input_ids", "attention_mask", "labels", "pixel_values") if k in batch}

    def run(self) -> Sample:
        """Seconds per record."""
        clean(self.model)
        span, trainer = Span(self.args.device, self.args.clock), self.ours.cfg.trainer
        dataset, batch = Whole(self.ours.parts.feed.dataset), trainer.per_device_batch
        made = Trainer(
            self.model,
            TrainingArguments(
                str(self.folder / "hf"), per_device_train_batch_size=batch,
                gradient_accumulation_steps=2, num_train_epochs=1, learning_rate=1e-5, logging_steps=1,
                lr_scheduler_type="cosine", save_strategy="no", report_to=[], remove_unused_columns=False,
                disable_tqdm=True, bf16=trainer.precision == "bf16", use_cpu=self.args.device == "cpu",
                gradient_checkpointing=self.args.checkpointing, dataloader_num_workers=self.args.workers,
                dataloader_drop_last=True,
            ),
            data_collator=self.collate,
            train_dataset=dataset,
            callbacks=[span],
        )  # fmt: skip
        made.train()
        self.records = len(dataset) // batch * batch  # the last batch is dropped; workers cannot count
        self.losses = [row["loss"] for row in made.state.log_history if "loss" in row]
        return Sample(span.seconds / self.records)


class Whole(Subset[Any]):
    """All of a data set."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, range(len(dataset)))


class Bare:
    """The steps of ``ours`` and nothing else: the same model, batches, groups, clipping and schedule."""

    def __init__(self, ours: Ours) -> None:
        self.ours = ours

    def run(self) -> Sample:
        """Seconds per record."""
        ours, cfg = self.ours, self.ours.cfg
        clean(ours.parts.model)
        device, model, records = ours.args.device, ours.parts.model.train(), 0
        optimizer = torch.optim.AdamW(parameter_groups(model, cfg.stage.lr, cfg.stage.weight_decay))
        steps, weights = ours.arithmetic().steps or 0, [p for p in model.parameters() if p.requires_grad]
        schedule = get_scheduler("cosine", optimizer, int(cfg.stage.warmup_ratio * steps), steps)
        loader = DataLoader(
            ours.parts.feed.dataset,
            cfg.trainer.per_device_batch,
            sampler=ours.parts.feed.sampler(cfg.trainer.global_batch, cfg.trainer.seed),
            collate_fn=FactsCollator(ours.parts.collator, [source.name for source in ours.parts.records.sources]),
            num_workers=cfg.trainer.workers,
            pin_memory=device != "cpu",
        )
        span = Span(device, ours.args.clock)
        span.on_train_begin()
        batches = iter(loader)
        for _ in range(steps):
            pair = [next(batches) for _ in range(2)]
            facts = [batch.pop(FACTS) for batch in pair]
            records += sum(len(fact.samples) for fact in facts)
            supervised = sum(fact.supervised for fact in facts)
            for batch, fact in zip(pair, facts, strict=True):
                moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                moved = model_inputs(moved, fact)  # the layout stays on the CPU: nothing waits for the GPU
                with torch.autocast(device, torch.bfloat16, enabled=cfg.trainer.precision == "bf16"):
                    loss = model(**moved, num_items_in_batch=supervised).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, cfg.stage.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        span.on_train_end()
        return Sample(span.seconds / records)


def ratio(samples: dict[str, list[Sample]], case: str, base: str) -> tuple[float, float]:
    """Time of a case over that of ``base`` in the same round: median, and half the range."""
    found = sorted(a.seconds / b.seconds for a, b in zip(samples[case], samples[base], strict=True))
    return median(found), (found[-1] - found[0]) / 2


def compare_models(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """transformers, ours, and ours without each saving."""
    ours: dict[str | None, Ours] = {None: Ours(args, folder, None)}
    ours |= {without: Ours(args, folder, without, ours[None].parts.model) for without in WITHOUT}
    theirs = Theirs(args, ours[WITHOUT[0]], folder)
    runs: dict[str, Callable[[], Sample]] = {"transformers": theirs.run, "ours": ours[None].run}
    runs |= {f"ours without {name}": ours[name].run for name in WITHOUT}
    samples, _ = interleave(runs, args.repeats, args.warmup, "record")
    rows = []
    for case in runs:
        over, spread = ratio(samples, case, "transformers")
        slower, _ = ratio(samples, case, "ours")
        rows.append(
            {
                "case": case,
                "samples_per_second": round(1 / median([s.seconds for s in samples[case]]), 3),
                "times_transformers": round(1 / over, 3),
                "spread": round(spread / over**2, 3),
                "time_of_ours": round(slower, 3),
            }
        )
    return rows


def compare_loops(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Our trainer over a bare loop."""
    ours = Ours(args, folder, None)
    samples, _ = interleave({"bare": Bare(ours).run, "ours": ours.run}, args.repeats, args.warmup, "record")
    over, spread = ratio(samples, "ours", "bare")
    step = median([s.seconds for s in samples["bare"]]) * ours.records / (ours.arithmetic().steps or 1)
    return [
        {"case": "overhead", "share": round(over - 1, 4), "spread": round(spread, 4), "step_seconds": round(step, 4)}
    ]


def options(argv: list[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=SIZES, default="cpu")
    parser.add_argument("--layers", type=int, help="another depth than the geometry's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--records", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--loop", action="store_true", help="our loop against a bare one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the table and JSON."""
    args = options(argv)
    where = _cpu_name() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    print(f"{where}; torch {torch.__version__}; commit {_commit()}; {args.geometry}; {args.clock} clock", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workspace(folder, SIZES[args.geometry], args.records)
        rows = (compare_loops if args.loop else compare_models)(args, folder)
    print("\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
