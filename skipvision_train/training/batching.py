"""Which samples make up which optimizer step: the same for any number of processes, and after a resume."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipvision_train.config.specs import TrainerSpec
from skipvision_train.config.validate import accumulation
from skipvision_train.data.collate import IGNORED_LABEL, collate, collate_packed, keep_queries
from skipvision_train.data.order import OrderRule, walk
from skipvision_train.data.packing import rows_of
from skipvision_train.data.processor import Example
from skipvision_train.data.streaming import StreamDataset
from skipvision_train.errors import ConfigError
from skipvision_train.plans.rules import TokenKind


@dataclass(frozen=True)
class BatchArithmetic:
    """How samples, processes and steps relate.

    Attributes:
        samples: records of one epoch, or packed rows; None where the data is unknown.
        per_device: samples of one forward pass of one process.
        processes: training processes.
        accumulation: forward passes per optimizer step.
        steps: optimizer steps of the whole stage; None where the data is unknown and ``trainer.epochs`` counts.
        unit: what a sample is called in logs.
    """

    samples: int | None
    per_device: int
    processes: int
    accumulation: int
    steps: int | None
    unit: str = "samples"

    @classmethod
    def of(cls, trainer: TrainerSpec, samples: int | None, processes: int, unit: str = "samples") -> BatchArithmetic:
        """Derive accumulation and steps.

        Raises:
            ConfigError: the batch does not divide, or there are no samples.
        """
        if samples == 0:
            raise ConfigError("data.recipe: it gives no records to train on")
        steps = trainer.max_steps
        if trainer.epochs is not None and samples is not None:
            steps = max(1, math.ceil(trainer.epochs * math.ceil(samples / trainer.global_batch)))
        return cls(samples, trainer.per_device_batch, processes, accumulation(trainer, processes), steps, unit)

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.per_device * self.processes * self.accumulation

    def line(self) -> str:
        """One line for a log."""
        return (
            f"{self.per_device} {self.unit} x {self.processes} processes x {self.accumulation} accumulated = "
            f"{self.global_batch} per step; {'?' if self.steps is None else self.steps} steps over "
            f"{'unknown' if self.samples is None else self.samples} {self.unit}"
        )


@dataclass(frozen=True, eq=False)
class Grouping:
    """Samples of like length stand together, so that there is less to pad.

    A global batch is sorted by length, the longest first: what one process takes at once is then of like length. That
    changes no step. With ``has_image`` a global batch has either only samples with images or only ones without, except
    the last (``group_by_modality_length`` of LLaVA, whose mega-batch is a global batch as well).

    Attributes:
        lengths: (samples,) about how many tokens each sample has.
        has_image: (samples,) bool, or None to leave global batches as the order makes them.
    """

    lengths: NDArray[np.integer]
    has_image: NDArray[np.bool_] | None = None

    def arrange(self, indices: Iterable[int], global_batch: int) -> Iterator[int]:
        """The same indices in another order; their number is a multiple of ``global_batch``.

        A batch comes when its last sample does: it takes no more memory than two batches, and a file that is read in
        order is still read in order by and large.
        """
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for index in indices:
            queue = waiting[True if self.has_image is None else bool(self.has_image[index])]
            queue.append(index)
            if len(queue) == global_batch:
                yield from self._sorted(queue)
                queue.clear()
        yield from self._sorted(waiting[True] + waiting[False])

    def _sorted(self, batch: list[int]) -> list[int]:
        return sorted(batch, key=lambda index: -int(self.lengths[index]))


class EpochSampler(Sampler[int]):
    """The indices of one epoch, in whole global batches.

    The order depends on seed and epoch alone, not on the number of processes. The last batch is filled up with indices
    from the beginning of the same order, so that every sample is seen and every step has the same size.

    Args:
        samples: how many there are: records, or packed rows.
        global_batch: samples of one step.
        seed: of the run.
        rule: the order; None shuffles.
        grouping: puts samples of like length together.
    """

    def __init__(
        self,
        samples: int,
        global_batch: int,
        seed: int,
        rule: OrderRule | None = None,
        grouping: Grouping | None = None,
    ) -> None:
        self.samples, self.global_batch, self.seed, self.epoch = samples, global_batch, seed, 0
        self.rule = rule or OrderRule()
        self.grouping = grouping

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; see also :class:`EpochStart`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.samples / self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        indices = walk(self.rule.of(self.samples, self.seed, self.epoch), len(self))
        return indices if self.grouping is None else self.grouping.arrange(indices, self.global_batch)


class EpochStart(TrainerCallback):
    """Tells the sampler which epoch begins, resumed or not.

    transformers and accelerate tell it themselves, except where several processes resume in the middle of an epoch: the
    sampler is wrapped twice then, and ``set_epoch`` of the outer wrapper does not reach it (accelerate 1.15).
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Derive the epoch from the steps done."""
        self.sampler.set_epoch(state.global_step * self.sampler.global_batch // len(self.sampler))


class StreamStart(TrainerCallback):
    """Tells a stream the step that its loader begins with, resumed or not; nothing is skipped by reading it.

    The trainer counts from 0 after a resume, since nothing is skipped, and derives the epoch from that; it is put
    right.
    """

    def __init__(self, stream: StreamDataset) -> None:
        self.stream = stream

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loader's workers start after this."""
        self.stream.step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A stream has one epoch, which ends with the stage."""
        state.epoch = state.global_step / state.max_steps


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
        pack_length: tokens of a packed row; None makes a row of every sample.
    """

    def __init__(self, pad_id: int, elastic: ElasticQueries | None = None, pack_length: int | None = None) -> None:
        self.pad_id = pad_id
        self.elastic = elastic
        self.pack_length = pack_length

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of :func:`collate`, or of :func:`collate_packed`, without the samples that were left out.

        If all were left out the batch is one row of two unsupervised tokens: it adds nothing to the loss, and this
        process still takes its part in the step, which under ZeRO all processes must.

        Args:
            items: examples; with ``pack_length`` lists of examples, each of which makes a row (or several, if the
                lengths that the bins were planned with were too small). None is an example that was left out.
        """
        return self.batch(self.rows(items))

    def rows(self, items: Sequence[Any]) -> list[list[Example]]:
        """The samples of every row of the batch, as the batch holds them."""
        bins: list[list[Example]] = [
            [example for example in (item if self.pack_length else [item]) if example is not None] for item in items
        ]
        bins = [examples for examples in bins if examples]
        if self.elastic and bins:
            shortened = iter(self.elastic.shorten([example for examples in bins for example in examples]))
            bins = [[next(shortened) for _ in examples] for examples in bins]
        if self.pack_length is None:
            return bins
        return [row for examples in bins for row in self._split(examples)]

    def batch(self, rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        """The tensors of :meth:`rows`."""
        if not rows:
            return self._nothing()
        if self.pack_length is None:
            return collate([examples[0] for examples in rows], padding_side="right", pad_id=self.pad_id)
        return collate_packed(rows, self.pad_id)

    def _split(self, examples: list[Example]) -> list[list[Example]]:
        rows = rows_of([len(example.input_ids) for example in examples], self.pack_length or 0)
        return [[examples[place] for place in row] for row in rows]

    def _nothing(self) -> dict[str, Tensor]:
        tokens = torch.full((1, 2), self.pad_id)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "token_kinds": torch.full_like(tokens, int(TokenKind.TEXT)),
            "labels": torch.full_like(tokens, IGNORED_LABEL),
        }
