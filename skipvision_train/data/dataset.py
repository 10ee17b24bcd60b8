"""Records as a map-style data set, with a policy for the ones that cannot be used."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence

from torch.utils.data import Dataset

from skipvision_train.data.images import load_image
from skipvision_train.data.processor import Example, SkipVisionProcessor
from skipvision_train.data.records import Record
from skipvision_train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4
"""Of English text under LLaMA-3's tokenizer, roughly; used for length grouping only."""


class RecordDataset(Dataset["Example | None"]):
    """Encodes record ``i`` when asked for item ``i``.

    Args:
        records: what ``load_records`` gives.
        processor: encodes them.
        template: chat format; None is the processor's own.
        max_length: longest sequence in tokens; later pairs of question and answer are left out, images never.
        on_error: a record that cannot be used (broken image, too long) is an ``error``, or is counted, logged and
            replaced by None (``skip``), which ``collate`` leaves out of the batch.
        error_budget: with ``skip``: one more than so many unusable records is an error. Counted over all workers
            of one training process.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: SkipVisionProcessor,
        template: str | None = None,
        max_length: int | None = None,
        on_error: str = "error",
        error_budget: int = 100,
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
        self._skipped = multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def skipped(self) -> int:
        """How many unusable records were met so far; a record that is met again counts again."""
        return int(self._skipped.value)

    def __getitem__(self, index: int) -> Example | None:
        """Encode one record.

        Raises:
            DataError: naming the record; or that the budget is spent, naming the count.
        """
        record = self.records[index]
        try:
            return self._encode(record)
        except DataError as error:
            if self.on_error == "error":
                raise
            with self._skipped.get_lock():
                self._skipped.value += 1
                count = int(self._skipped.value)
            if count > self.error_budget:
                raise DataError(
                    f"{count} records could not be used, data.error_budget is {self.error_budget}; the last: {error}"
                ) from error
            logger.warning("left out record %s of %s (%d so far): %s", record.id, record.source, count, error)
            return None

    def _encode(self, record: Record) -> Example:
        images = [load_image(path, f"{record.id} of {record.source}") for path in record.images]
        return self.processor.encode(record, images, self.max_length, self.template)

    @property
    def lengths(self) -> list[int]:
        """Approximate length of every sample in tokens, for grouping by length: no image is read, nothing tokenized.

        The visual part is exact, the text is estimated from its characters.
        """
        visual = self.processor.tokens_per_image
        return [
            len(record.images) * visual + sum(len(turn.text) for turn in record.turns) // CHARACTERS_PER_TOKEN
            for record in self.records
        ]
