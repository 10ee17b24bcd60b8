"""What is known of a batch on the CPU, beside its tensors: which records are in it, and what its tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipvision_train.data.collate import IGNORED_LABEL
from skipvision_train.data.processor import Example
from skipvision_train.plans.rules import TokenKind
from skipvision_train.training.batching import TrainCollator

FACTS = "facts"
"""Key of a batch; taken out before the model sees it. It holds no tensor, so that nothing moves it to a device."""


@dataclass(frozen=True, eq=False)
class BatchFacts:
    """One micro batch.

    Attributes:
        samples: the records, ``id of source``, in the order of the batch.
        sources: (N,) int64, the source of every supervised token, row by row: a place in the recipe's list.
        kinds: (samples, number of kinds) int64, tokens of each :class:`TokenKind` of every sample.
        tiles: of every image.
        places: of the batch's tensors, padding included.
    """

    samples: tuple[str, ...]
    sources: NDArray[np.int64]
    kinds: NDArray[np.int64]
    tiles: tuple[int, ...]
    places: int

    @property
    def supervised(self) -> int:
        """Tokens that the loss is taken of."""
        return len(self.sources)


def batch_facts(samples: Sequence[Example], sources: Sequence[str], places: int) -> BatchFacts:
    """The facts of a batch.

    Args:
        samples: row by row, as the batch holds them.
        sources: names, those of the samples among them.
        places: of the batch.
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
        places=places,
    )


class FactsCollator:
    """A collator whose batches carry their :class:`BatchFacts`; made where the batch is, in the loader's workers.

    Args:
        collator: makes the batch.
        sources: names of the recipe's sources.
    """

    def __init__(self, collator: TrainCollator, sources: Sequence[str]) -> None:
        self.collator, self.sources = collator, tuple(sources)

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """The collator's batch and its facts."""
        rows = self.collator.rows(items)
        batch = self.collator.batch(rows)
        samples = [sample for row in rows for sample in row]
        return {**batch, FACTS: batch_facts(samples, self.sources, batch["input_ids"].numel())}
