"""What a stage is fed with: the data set that its loader reads, and the order in which it does."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from skipvision_train.config.specs import TrainConfig
from skipvision_train.data.dataset import RecordDataset
from skipvision_train.data.lengths import estimated_lengths, measured_lengths
from skipvision_train.data.mixture import Mixture
from skipvision_train.data.order import OrderRule
from skipvision_train.data.packing import PackedDataset, pack
from skipvision_train.data.streaming import StreamDataset, StreamShare
from skipvision_train.data.streams import Streams
from skipvision_train.data.watch import WatchedDataset
from skipvision_train.errors import ConfigError
from skipvision_train.training.batching import EpochSampler, Grouping

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed:
    """What a stage is fed with.

    Attributes:
        dataset: what the loader reads: encoded records, lists of them that make a packed row, or a stream.
        rows: items of ``dataset``; None where nobody knows.
        unit: what an item is called.
        rule: the order of the items.
        grouping: puts like items together; None leaves the order.
        watched: knows which record a lost worker was reading.
        pack_length: tokens of a packed row; None without packing.
    """

    dataset: Dataset[Any]
    rows: int | None
    unit: str
    rule: OrderRule
    grouping: Grouping | None
    watched: WatchedDataset[Any]
    pack_length: int | None = None

    @property
    def stream(self) -> StreamDataset | None:
        """The data set, if it is a stream, which has its own order."""
        return self.dataset if isinstance(self.dataset, StreamDataset) else None

    def sampler(self, global_batch: int, seed: int) -> EpochSampler:
        """The order of the items, in whole global batches; of a stream, a place holder."""
        return EpochSampler(self.rows or 1, global_batch, seed, self.rule, self.grouping)


def open_feed(cfg: TrainConfig, records: Mixture | Streams, dataset: RecordDataset, run: Path) -> Feed:
    """Plan how a stage reads its data.

    Args:
        cfg: the validated configuration.
        records: the recipe's.
        dataset: encodes them.
        run: the run's folder, which keeps measured lengths.

    Raises:
        SkipVisionError: the data cannot be ordered or packed as ``cfg.data`` says.
    """
    data = cfg.data
    if isinstance(records, Streams):
        return _stream(cfg, records, dataset)
    if not len(records):
        raise ConfigError("data.recipe: it gives no records to train on")
    shards = records.shards if data.order == "shards" else None
    rule = OrderRule(data.order, shards, data.shard_buffer)
    watched = WatchedDataset(dataset, partial(_name, records), cfg.trainer.workers)
    if not data.pack:
        return Feed(watched, len(records), "samples", rule, _grouping(data.group, records, dataset), watched)
    capacity = data.pack_length or data.max_length
    bins = pack(_lengths(cfg, records, dataset, run), capacity, cfg.trainer.seed, rule)
    logger.info("%s", bins.line())
    return Feed(PackedDataset(watched, bins), len(bins), "rows", bins.rule(rule), None, watched, capacity)


def _stream(cfg: TrainConfig, streams: Streams, dataset: RecordDataset) -> Feed:
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    data, trainer = cfg.data, cfg.trainer
    share = StreamShare(
        lanes=data.stream_lanes or processes,
        rank=rank,
        processes=processes,
        per_device=trainer.per_device_batch,
        global_batch=trainer.global_batch,
        seed=trainer.seed,
        buffer=data.stream_buffer if data.order == "shuffle" else 0,
    )
    for line in streams.lines(share.lanes):
        logger.info("%s", line)
    watched = WatchedDataset(dataset, streams.where, trainer.workers)
    return Feed(StreamDataset(streams, watched, share), None, "samples", OrderRule(), None, watched)


def _name(records: Mixture, index: int) -> str:
    record = records[index]
    return f"record {record.id} of {record.source}"


def _grouping(group: str, records: Mixture, dataset: RecordDataset) -> Grouping | None:
    if group == "none":
        return None
    return Grouping(np.asarray(dataset.lengths), records.image_counts > 0 if group == "modality" else None)


def _lengths(cfg: TrainConfig, records: Mixture, dataset: RecordDataset, run: Path) -> NDArray[np.int32]:
    workers = cfg.trainer.workers
    if cfg.data.pack_by == "estimated":
        return estimated_lengths(dataset, records.sizes, records.image_counts, workers)
    processor = dataset.processor
    depends_on = (
        records.hash,
        processor.to_json_string(),
        processor.tokenizer.backend_tokenizer.to_str(),
        dataset.template,
        dataset.max_length,
    )
    key = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    return measured_lengths(dataset, workers, run / f"lengths-{key}.npy")
