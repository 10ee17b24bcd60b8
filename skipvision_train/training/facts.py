"""What is known of a batch on the CPU, beside its tensors: which records are in it, and what its tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipvision_train.data.collate import IGNORED_LABEL
from skipvision_train.data.processor import Example
from skipvision_train.plans.layout import TokenLayout
from skipvision_train.plans.rules import TokenKind
from skipvision_train.training.batching import TrainCollator

FACTS = "facts"
"""Key of a batch; taken out before the model sees it. Nothing looks into it, and so nothing moves it to a device."""


@dataclass(frozen=True, eq=False)
class BatchFacts:
    """One micro batch.

    Attributes:
        samples: the records, ``id of source``, in the order of the batch.
        sources: (N,) int64, the source of every supervised token, row by row: a place in the recipe's list.
        kinds: (samples, number of kinds) int64, tokens of each :class:`TokenKind` of every sample.
        tiles: of every image.
        layout: of the batch, with what its labels say. On the CPU.
    """

    samples: tuple[str, ...]
    sources: NDArray[np.int64]
    kinds: NDArray[np.int64]
    tiles: tuple[int, ...]
    layout: TokenLayout

    @property
    def places(self) -> int:
        """Of the batch's tensors, padding included."""
        return self.layout.kinds.numel()

    @property
    def supervised(self) -> int:
        """Tokens that the loss is taken of."""
        return len(self.sources)


def batch_facts(samples: Sequence[Example], sources: Sequence[str], layout: TokenLayout) -> BatchFacts:
    """The facts of a batch.

    Args:
        samples: row by row, as the batch holds them.
        sources: names, those of the samples among them.
        layout: of the batch, with what its labels say.
    """
    number = {name: place for place, name in enumerate(sources)}
    # The first label of a sample is predicted by nothing.
    labelled = [sum(label != IGNORED_LABEL for label in sample.labels[1:]) for sample in samples]
    return BatchFacts(
        samples=tuple(f"{sample.record} of {sample.source}" for sample in samples),
        sources=np.repeat(np.array([number[sample.source] for sample in samples], np.int64), labelled),
        kinds=np.array(
            [np.bincount(sample.token_kinds, minlength=len(TokenKind)) for sample in samples], np.int64
        ).reshape(len(samples), len(TokenKind)),
        tiles=tuple(count for sample in samples for count in sample.image_tiles),
        layout=layout,
    )


def model_inputs(tensors: dict[str, Any], facts: BatchFacts) -> dict[str, Any]:
    """What the model takes of a batch: its tensors, and from the CPU what decides how the forward pass runs."""
    tiles = {"image_tiles": facts.tiles} if max(facts.tiles, default=1) > 1 else {}
    return {**tensors, **tiles, "token_layout": facts.layout}


class FactsCollator:
    """A collator whose batches carry their :class:`BatchFacts`; made where the batch is, in the loader's workers.

    What they say is no tensor of the batch: a copy on the GPU would have to be brought back.

    Args:
        collator: makes the batch.
        sources: names of the recipe's sources.
    """

    def __init__(self, collator: TrainCollator, sources: Sequence[str]) -> None:
        self.collator, self.sources = collator, tuple(sources)

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """The tensors of the collator's batch that the GPU reads, and the batch's facts."""
        rows = self.collator.rows(items)
        batch = self.collator.batch(rows)
        samples = [sample for row in rows for sample in row]
        kinds, documents = batch.pop("token_kinds"), batch.pop("document_ids", None)
        batch.pop("image_tiles", None)
        layout = TokenLayout.from_kinds(kinds, documents).with_labels(batch["labels"])
        return {**batch, FACTS: batch_facts(samples, self.sources, layout)}
