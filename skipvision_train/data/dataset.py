"""Records as a map-style data set, with a policy for the ones that cannot be used."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from skipvision_train.data.images import load_image
from skipvision_train.data.mixture import Mixture
from skipvision_train.data.processor import Example, SkipVisionProcessor
from skipvision_train.data.records import Record, text_bytes
from skipvision_train.data.streams import Streams
from skipvision_train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Of English text under LLaMA-3's tokenizer, roughly; used to plan batches only."""


class RecordDataset(Dataset["Example | None"]):
    """Encodes record ``i`` when asked for item ``i``.

    This is the one place that decides what happens to a record that cannot be used, whatever the reason: no JSON, a
    path that leaves the image root, a broken image, too long.

    Args:
        records: what ``load_records`` gives, or a list; of streams a record is asked for by its reference.
        processor: encodes them.
        template: chat format; None is the processor's own.
        max_length: longest sequence in tokens; later pairs of question and answer are left out, images never.
        on_error: a record that cannot be used is an ``error``, or is counted, logged and replaced by None (``skip``),
            which ``collate`` leaves out of the batch. A source of a recipe with ``max_malformed`` has its own budget
            instead.
        error_budget: with ``skip``: one more than so many unusable records is an error. Counted over all workers of one
            training process, and a record that is met again counts once.
        draft: decode large JPEGs smaller where that is enough (``load_image``).
        resizer: see ``resizing.bicubic``.
    """

    def __init__(
        self,
        records: Sequence[Record] | Streams,
        processor: SkipVisionProcessor,
        template: str | None = None,
        max_length: int | None = None,
        on_error: str = "error",
        error_budget: int = 100,
        *,
        draft: bool = False,
        resizer: str = "auto",
    ) -> None:
        if on_error not in ("error", "skip"):
            raise ConfigError(f"data.on_error: {on_error!r} is unknown; use error or skip")
        if error_budget < 0:
            raise ConfigError(f"data.error_budget: {error_budget}; use 0 or more")
        self.records = records
        self.processor = processor
        self.template = template
        self.max_length = max_length
        self.on_error = on_error
        self.error_budget = error_budget
        self._shrink = processor.draft_factor if draft else None
        self._resizer = resizer
        sources = records.sources if isinstance(records, Mixture | Streams) else ()
        own = sum(source.max_malformed or 0 for source in sources)
        # How many records were left out, and which: shared by the workers. The budgets bound them.
        most = error_budget + own
        self._left_out = multiprocessing.Array(
            "q", 1 + (most if isinstance(records, Streams) else min(most, len(records)))
        )

    def __len__(self) -> int:
        """How many records there are; nobody knows of streams, which raise TypeError."""
        return len(self.records)  # type: ignore[arg-type]

    @property
    def skipped(self) -> int:
        """How many unusable records were met so far."""
        return int(self._left_out[0])

    def __getitem__(self, index: int) -> Example | None:
        """Encode one record.

        Raises:
            DataError: naming the record; or that a budget is spent, naming the count.
        """
        try:
            record = self.records[index]
            images = [load_image(image, f"{record.id} of {record.source}", self._shrink) for image in record.images]
            return self.processor.encode(record, images, self.max_length, self.template, self._resizer)
        except DataError as error:
            self._leave_out(index, error)
            return None

    def _leave_out(self, index: int, error: DataError) -> None:
        """Count an unusable record against its budget.

        Raises:
            DataError: the error itself where nothing may be left out, or that the budget is spent.
        """
        name, budget = self._budget(index)
        if budget is None:
            raise error
        with self._left_out.get_lock():
            met = self._left_out[1 : 1 + self._left_out[0]]
            if index in met:
                return
            count = 1 + sum(self._budget(other)[0] == name for other in met)
            if count > budget:
                raise DataError(f"{count} records could not be used, {name} is {budget}; the last: {error}") from error
            self._left_out[0] += 1
            self._left_out[self._left_out[0]] = index
        number = "" if isinstance(self.records, Streams) else f" {index}"
        logger.warning("left out record%s (%d so far): %s", number, count, error)

    def _budget(self, index: int) -> tuple[str, int | None]:
        """What bounds the number of unusable records that this one counts among, and the bound; None allows none."""
        source = self.records.source_of(index) if isinstance(self.records, Mixture | Streams) else None
        if source is not None and source.max_malformed is not None:
            return f"max_malformed of {source.name}", source.max_malformed
        return "data.error_budget", self.error_budget if self.on_error == "skip" else None

    @property
    def lengths(self) -> list[int]:
        """Approximate length of every sample in tokens, to plan batches by: no image is read, nothing tokenized.

        The visual part is exact where every image has equally many tiles, and else its most; the text is estimated from
        its bytes. Of a mixture nothing is parsed either, and how many images a record has is an estimate, too.
        """
        visual = self.processor.tokens_per_image
        if isinstance(self.records, Mixture):
            images, text = self.records.image_counts.astype(np.int64), self.records.sizes
        else:
            records = [self.records[i] for i in range(len(self))]
            images = np.array([len(record.images) for record in records], np.int64)
            text = np.array([text_bytes(record) for record in records], np.int64)
        lengths: list[int] = (images * visual + text // BYTES_PER_TOKEN).tolist()
        return lengths
