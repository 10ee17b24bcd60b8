"""Which samples make up which optimizer step: the same for any number of processes, and after a resume."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from skipvision_train.config.specs import TrainerSpec
from skipvision_train.config.validate import accumulation
from skipvision_train.data.collate import IGNORED_LABEL, collate, keep_queries
from skipvision_train.data.processor import Example
from skipvision_train.errors import ConfigError
from skipvision_train.plans.rules import TokenKind


@dataclass(frozen=True)
class BatchArithmetic:
    """How samples, processes and steps relate.

    Attributes:
        samples: records of one epoch; None where the data is unknown.
        per_device: samples of one forward pass of one process.
        processes: training processes.
        accumulation: forward passes per optimizer step.
        steps: optimizer steps of the whole stage; None where the data is unknown and ``trainer.epochs`` counts.
    """

    samples: int | None
    per_device: int
    processes: int
    accumulation: int
    steps: int | None

    @classmethod
    def of(cls, trainer: TrainerSpec, samples: int | None, processes: int) -> BatchArithmetic:
        """Derive accumulation and steps.

        Raises:
            ConfigError: the batch does not divide, or there are no samples.
        """
        if samples == 0:
            raise ConfigError("data.recipe: it gives no records to train on")
        steps = trainer.max_steps
        if trainer.epochs is not None and samples is not None:
            steps = max(1, math.ceil(trainer.epochs * math.ceil(samples / trainer.global_batch)))
        return cls(samples, trainer.per_device_batch, processes, accumulation(trainer, processes), steps)

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.per_device * self.processes * self.accumulation

    def line(self) -> str:
        """One line for a log."""
        return (
            f"{self.per_device} samples x {self.processes} processes x {self.accumulation} accumulated = "
            f"{self.global_batch} per step; {'?' if self.steps is None else self.steps} steps over "
            f"{'unknown' if self.samples is None else self.samples} samples"
        )


class EpochSampler(Sampler[int]):
    """Shuffled indices of one epoch, in whole global batches.

    The order depends on seed and epoch alone, not on the number of processes. The last batch is filled up with indices
    from the beginning of the same order, so that every sample is seen and every step has the same size.
    """

    def __init__(self, samples: int, global_batch: int, seed: int) -> None:
        self.samples, self.global_batch, self.seed, self.epoch = samples, global_batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; accelerate's data loader calls it when an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.samples / self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        # Two integers in one: generators seeded with neighbouring numbers would repeat orders across (seed, epoch).
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for position in range(len(self)):
            yield order[position % self.samples]


@dataclass(frozen=True)
class ElasticQueries:
    """A number of queries for every batch (MQT, second stage): an even number up to ``queries``.

    It is drawn from the seed and the batch's own tokens: a resumed run, whatever its workers, draws the same.

    Attributes:
        image_token_id: the placeholder.
        queries: placeholders of a tile before the draw.
        seed: of the run.
    """

    image_token_id: int
    queries: int
    seed: int

    def draw(self, examples: Sequence[Example]) -> int:
        """The number for this batch."""
        content = zlib.crc32(repr([example.input_ids for example in examples]).encode())
        return 2 * random.Random(f"{self.seed}/{content}").randint(1, self.queries // 2)

    def shorten(self, examples: Sequence[Example]) -> list[Example]:
        """The batch with as many placeholders as drawn."""
        keep = self.draw(examples)
        return [keep_queries(example, self.image_token_id, self.queries, keep) for example in examples]


class TrainCollator:
    """Examples to a right-padded batch; a class, because worker processes pickle it.

    Args:
        pad_id: fills ``input_ids``.
        elastic: draws a number of queries for every batch; None leaves the layout.
    """

    def __init__(self, pad_id: int, elastic: ElasticQueries | None = None) -> None:
        self.pad_id = pad_id
        self.elastic = elastic

    def __call__(self, examples: Sequence[Example | None]) -> dict[str, Tensor]:
        """The batch of :func:`collate`, without the samples that were left out.

        If all were left out the batch is one row of two unsupervised tokens: it adds nothing to the loss, and this
        process still takes its part in the step, which under ZeRO all processes must.
        """
        if all(example is None for example in examples):
            tokens = torch.full((1, 2), self.pad_id)
            return {
                "input_ids": tokens,
                "attention_mask": torch.ones_like(tokens),
                "token_kinds": torch.full_like(tokens, int(TokenKind.TEXT)),
                "labels": torch.full_like(tokens, IGNORED_LABEL),
            }
        rows = [example for example in examples if example is not None]
        return collate(self.elastic.shorten(rows) if self.elastic else rows, padding_side="right", pad_id=self.pad_id)
