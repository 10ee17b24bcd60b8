"""How long samples are in tokens, before they are encoded: estimated from sizes, or measured once and kept.

Packing wants them measured: a plan by estimates leaves room for their errors, which stays empty.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from skipvision_train.data.dataset import RecordDataset
from skipvision_train.data.images import image_size
from skipvision_train.data.records import Record
from skipvision_train.data.templates import get_template
from skipvision_train.errors import DataError

SAMPLE = 2000
"""Records that are measured to calibrate an estimate."""

QUANTILE = 0.9
"""An estimate takes as many tokens a byte as this share of the records has at most."""


def estimated_lengths(
    dataset: RecordDataset, text: NDArray[np.integer], images: NDArray[np.integer], workers: int = 0
) -> NDArray[np.int32]:
    """(records,) lengths from sizes, calibrated on :data:`SAMPLE` records that are measured; 1 to ``max_length``.

    Most are too long by a little. Where true lengths exceed a row after all, ``rows_of`` splits it.

    Args:
        dataset: encodes the records.
        text: (records,) bytes of each record's text.
        images: (records,) images of each record.
        workers: processes that measure.
    """
    seen = images.astype(np.int64) * dataset.processor.tokens_per_image
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLE)).round().astype(np.int64))
    words = np.maximum(0, _measure(dataset, chosen, workers) - seen[chosen])
    rate = float(np.quantile(words / np.maximum(1, text[chosen]), QUANTILE))
    longest = np.iinfo(np.int32).max if dataset.max_length is None else dataset.max_length
    return np.clip(np.ceil(text * rate) + seen, 1, longest).astype(np.int32)


def measured_lengths(dataset: RecordDataset, workers: int = 0, cache: Path | None = None) -> NDArray[np.int32]:
    """(records,) the exact length of every sample: texts are tokenized, of images at most the header is read.

    A record that cannot be used counts 1: the policy for it is applied when it is read for training.

    Args:
        dataset: of the samples.
        workers: processes that measure.
        cache: a ``.npy`` file that is read if it is there, and else written. Its name must stand for everything that
            lengths depend on: records, tokenizer, template, tiles, ``max_length``.

    Raises:
        DataError: the cache is not of so many records.
    """
    if cache is not None and cache.is_file():
        found: NDArray[np.int32] = np.load(cache, allow_pickle=False)
        if found.shape != (len(dataset),):
            raise DataError(f"{cache}: holds {len(found)} lengths, the data has {len(dataset)} records; delete it")
        return found
    lengths = _measure(dataset, np.arange(len(dataset)), workers)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f"{cache.stem}.{uuid.uuid4().hex}.tmp.npy")  # process ids repeat on other nodes
        np.save(temporary, lengths)
        temporary.replace(cache)
    return lengths


class _Lengths(Dataset[int]):
    """The length of each chosen record, 1 where it cannot be used."""

    def __init__(self, dataset: RecordDataset, chosen: NDArray[np.int64]) -> None:
        self.dataset, self.chosen = dataset, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> int:
        try:
            return record_length(self.dataset, self.dataset.records[int(self.chosen[place])])
        except DataError:
            return 1


def _measure(dataset: RecordDataset, chosen: NDArray[np.int64], workers: int) -> NDArray[np.int32]:
    # A loader draws a seed; drawn from the global generator it would change the weights that are drawn next.
    loader = DataLoader(
        _Lengths(dataset, chosen),
        batch_size=256,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    return np.fromiter((length for batch in loader for length in batch), dtype=np.int32, count=len(chosen))


def record_length(dataset: RecordDataset, record: Record) -> int:
    """Tokens of the sample that the data set makes of a record.

    Raises:
        DataError: the record cannot be encoded, or an image that must be looked at cannot be opened.
    """
    processor = dataset.processor
    if len(processor.image_tokens) == 1:  # every image has the same number of tiles
        visual = [processor.tokens_per_image] * len(record.images)
    else:
        name = f"{record.id} of {record.source}"
        tiles = [processor.tiles_of(*image_size(image, name)) for image in record.images]
        visual = [processor.tokens_of(count) for count in tiles]
    template = get_template(dataset.template or processor.template)
    encoded = template.encode(record.turns, processor.tokenizer, visual, processor.image_token_id, dataset.max_length)
    return len(encoded.input_ids)
