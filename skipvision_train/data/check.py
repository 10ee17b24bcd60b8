"""A recipe read once from end to end: what cannot be used and why, how long samples are, which images are there twice.

Every record that a run would meet is parsed, its images are decoded, and its length is counted, in worker processes.
What they find adds up in a :class:`Tally` per source; only hashes grow with the data, by 16 bytes per image.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from skipvision_train.data.images import image_facts, load_image, located_ref
from skipvision_train.data.mixture import Part
from skipvision_train.data.records import MAX_ID_LENGTH, ImageRef, Record, move_image_first, text_bytes
from skipvision_train.data.sources import Selection
from skipvision_train.data.stores import RecordStore
from skipvision_train.data.templates import get_template
from skipvision_train.data.tiling import num_tiles
from skipvision_train.data.watch import WatchedDataset
from skipvision_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skipvision_train.models.configuration import SkipVisionConfig

CHUNK = 512
"""Records that a worker takes at once, at most."""

_READ = 1 << 20

# What is wrong with a record that cannot be read, by the message: the first that matches counts.
_REASONS = (
    ("marker_mismatch", re.compile(r"markers in the conversation, but \d+ images|images that it does not bring")),
    ("image_path", re.compile(r"is a URL;|must be relative to the image root|has no image_root|name holds half a")),
    ("too_large", re.compile(r"bytes of JSON; at most|opening brackets; at most|bytes of text; at most")),
    ("not_json", re.compile(r"^not JSON|^not UTF-8|stands twice in an object|is no JSON value")),
    ("turns", re.compile(r"^turns are |^turn \d+: |^message \d+|^text \d+: ")),
    (
        "fields",
        re.compile(r"' is missing; |' must be a |^an object is expected|are there; one of them|must be a path or"),
    ),
)
REASONS = (*(name for name, _ in _REASONS), "missing_image", "broken_image", "refused_image", "length", "other")
"""Why a record cannot be used. ``refused_image``: a file that may not or cannot be opened. ``length``: more tokens than
``max_length`` allows, or turns that the template cannot express."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A record that cannot be used.

    Attributes:
        index: in its source's files.
        id: the record's own, None where it has none or cannot be read.
        image: the first one that cannot be used, or the one that a record names which is unusable for another reason.
        reason: one of :data:`REASONS`.
        message: the error in full.
    """

    index: int
    id: str | None
    image: str | None
    reason: str
    message: str


@dataclass(slots=True)
class Tally:
    """What was found in records of one source; tallies add up.

    Records and images are counted once; ``occurrences``, ``bad_occurrences``, ``supervised`` and ``shapes`` as often as
    an epoch has them.

    Attributes:
        source: number of the source in the recipe.
        records: that were read.
        occurrences: in an epoch.
        text_only: usable records without an image.
        images: that readable records show: those found, and ``missing`` ones.
        missing: no file of that name, with any extension of ``SUFFIXES``.
        broken: files that cannot be decoded.
        refused: files that may not be opened (a link out of the image root), or cannot be (no permission, cut).
        misnamed: images that can be decoded and whose listed extension is wrong: another format's, or not the file's.
        bad_occurrences: of unusable records.
        supervised: tokens with a label; 0 without a tokenizer.
        text_bytes: of usable records.
        reasons: unusable records by reason.
        shapes: usable records by (text, tiles of every image, ascending); text is in tokens, or in bytes without a
            tokenizer, and without a model every image counts 1.
        sides: images that can be decoded by their longer side in pixels.
        digests: per image that can be decoded: hash of its bytes, hash of where it is; and of its pixels if wanted.
        bad: unusable records.
    """

    source: int
    records: int = 0
    occurrences: int = 0
    text_only: int = 0
    images: int = 0
    missing: int = 0
    broken: int = 0
    refused: int = 0
    misnamed: int = 0
    bad_occurrences: int = 0
    supervised: int = 0
    text_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    shapes: Counter[tuple[int, tuple[int, ...]]] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    digests: array[int] = field(default_factory=lambda: array("Q"))
    bad: list[Bad] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add what was found in further records of the same source."""
        assert self.source == other.source
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons.update(other.reasons)
        self.shapes.update(other.shapes)
        self.sides.update(other.sides)
        self.digests.extend(other.digests)
        self.bad.extend(other.bad)


_COUNTS = (
    *("records", "occurrences", "text_only", "images", "missing", "broken", "refused", "misnamed"),
    *("bad_occurrences", "supervised", "text_bytes"),
)


@dataclass(frozen=True)
class Measure:
    """Counts the tokens of a record, as exactly as what is known allows.

    Attributes:
        config: the model; None leaves images uncounted.
        tokenizer: None leaves text in bytes.
        template: chat format.
        max_length: of a sample in tokens; None is no limit. Read where a model is given.
    """

    config: SkipVisionConfig | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    template: str = "llama3"
    max_length: int | None = None

    def tiles(self, width: int, height: int) -> int:
        """Tiles of an image of this size in pixels; 1 without a model."""
        if self.config is None:
            return 1
        return num_tiles(width, height, self.config.tiling_config, self.config.vision_config.image_size)

    def visual(self, tiles: Sequence[int]) -> int:
        """Visual tokens of images of so many tiles; 0 without a model."""
        return 0 if self.config is None else sum(self._tokens[count] for count in tiles)

    @cached_property
    def _tokens(self) -> dict[int, int]:
        config = self.config
        return {} if config is None else {n: len(config.image_token_kinds(n)) for n in config.tiling_config.counts}

    def text(self, record: Record, tiles: Sequence[int]) -> tuple[int, int]:
        """Text of a sample, in tokens (bytes without a tokenizer), and how many tokens are supervised (0 without).

        Raises:
            DataError: the template refuses the turns, or the sample is too long.
        """
        if self.config is None or self.tokenizer is None:
            if self.max_length is not None and (visual := self.visual(tiles)) >= self.max_length:
                raise DataError(f"{visual} visual tokens; max_length is {self.max_length}")
            return text_bytes(record), 0
        lengths = [self._tokens[count] for count in tiles]
        encoded = get_template(self.template).encode(
            record.turns, self.tokenizer, lengths, self.config.image_token_id, self.max_length
        )
        return len(encoded.input_ids) - sum(lengths), sum(label != -100 for label in encoded.labels)


class RecordCheck(Dataset[Tally]):
    """Reads record ``i`` of a recipe and says what it found; each record that an epoch has once.

    Args:
        parts: the recipe's sources, opened.
        measure: counts tokens.
        pixels: hash the pixels of images, too.
    """

    def __init__(self, parts: Sequence[Part], measure: Measure, pixels: bool = False) -> None:
        self.parts = parts
        self.measure = measure
        self.pixels = pixels
        self._chosen = [_occurring(part.selection) for part in parts]
        counts = (
            part.selection.count if own is None else len(own) for part, own in zip(parts, self._chosen, strict=True)
        )
        self._bounds = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._bounds[-1]

    def __getitem__(self, place: int) -> Tally:
        """What is found in one record."""
        number, index = self.locate(place)
        part = self.parts[number]
        tally = Tally(number, records=1, occurrences=_times(part.selection, index))
        try:
            record = part.store[index]
        except DataError as error:
            self._refuse(tally, Bad(index, *_named(part.store, index), _reason(error), str(error)))
            return tally
        record = move_image_first(record) if part.source.image_first else record
        if (bad := self._look(tally, index, record)) is not None:
            self._refuse(tally, bad)
        return tally

    def locate(self, place: int) -> tuple[int, int]:
        """Number of the source, and the record's index in its files."""
        number = bisect_right(self._bounds, place) - 1
        own, inside = self._chosen[number], place - self._bounds[number]
        return number, inside if own is None else int(own[inside])

    def name(self, place: int) -> str:
        """Of a record, for messages.

        Raises:
            DataError: naming the record's place, where it cannot be read.
        """
        number, index = self.locate(place)
        store = self.parts[number].store
        return f"record {store[index].id} of {store.source} ({store.entries.where(index)})"

    def batches(self, workers: int) -> Iterator[list[int]]:
        """Stretches of records of one source that are read cheaply together; small enough to occupy all workers."""
        most = max(1, min(CHUNK, len(self) // (8 * max(1, workers))))
        for number, part in enumerate(self.parts):
            first, last, own = self._bounds[number], self._bounds[number + 1], self._chosen[number]
            begins = part.store.starts()
            places = begins if own is None else np.unique(np.searchsorted(own, begins))
            edges = [*(int(place) + first for place in places if place < last - first), last]
            for start, end in pairwise(edges):
                for begin in range(start, end, most):
                    yield list(range(begin, min(begin + most, end)))

    def _look(self, tally: Tally, index: int, record: Record) -> Bad | None:
        """Look at every image, and count tokens; what is wrong first, if anything."""
        found, sizes = None, []
        for number, image in enumerate(record.images):
            tally.images += 1
            # Of a file the name says where it is; bytes in a row have no name, or one that others have, too.
            place = str(image) if image.data is None else f"{record.source}\0{index}\0{number}"
            outcome = self._image(tally, image, f"{record.id} of {record.source}", place)
            if isinstance(outcome, tuple):
                sizes.append(outcome)
            elif found is None:
                found = Bad(index, record.id, str(image), outcome.reason, outcome.message)
        if found is not None:
            return found
        try:
            tiles = [self.measure.tiles(*size) for size in sizes]
            text, supervised = self.measure.text(record, tiles)
        except DataError as error:
            return Bad(index, record.id, None, "length", f"record {record.id} of {record.source}: {error}")
        tally.text_only = int(not record.images)
        tally.text_bytes = text_bytes(record)
        tally.supervised = supervised * tally.occurrences
        tally.shapes[text, tuple(sorted(tiles))] = tally.occurrences
        return None

    def _image(self, tally: Tally, image: ImageRef, name: str, place: str) -> tuple[int, int] | Bad:
        """Width and height of an image that can be decoded, or what is wrong with it."""
        stage = "missing"
        try:
            located = located_ref(image, name)
            stage = "refused"
            content = _digest(located)
            stage = "broken"
            facts = image_facts(image, name)
            decoded = load_image(image, name)
        except DataError as error:
            setattr(tally, stage, getattr(tally, stage) + 1)
            return Bad(-1, None, None, f"{stage}_image", str(error))
        tally.misnamed += facts.is_misnamed or located.path != image.path
        tally.sides[max(decoded.size)] += 1
        tally.digests.extend((content, _hash(place.encode())))
        if self.pixels:
            tally.digests.append(_hash(repr(decoded.size).encode() + decoded.tobytes()))
        return decoded.size

    @staticmethod
    def _refuse(tally: Tally, bad: Bad) -> None:
        tally.bad.append(bad)
        tally.reasons[bad.reason] += 1
        tally.bad_occurrences = tally.occurrences


def check_records(check: RecordCheck, workers: int, each: Callable[[Tally], None]) -> None:
    """Read everything, in the recipe's order whatever the number of workers.

    Args:
        check: the records.
        workers: processes that read; 0 reads in this one.
        each: called with the tally of every stretch of records of one source.

    Raises:
        DataError: a worker process was lost; the message names its record.
    """
    watched = WatchedDataset(check, check.name, workers)

    def read() -> None:
        # A generator of its own: a loader draws a seed, which is nobody's business here.
        loader = DataLoader(
            watched,
            batch_sampler=check.batches(workers),
            num_workers=workers,
            collate_fn=_together,
            generator=torch.Generator(),
        )
        for tally in loader:
            each(tally)

    with warnings.catch_warnings():
        # Pillow warns of odd metadata in files that it reads all the same; there is a line per file, for every worker.
        warnings.filterwarnings("ignore", module="PIL")
        # torch counts processor cores; here workers also wait for disks.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        try:
            watched.guard(read)
        except DataError as error:
            raise DataError(str(error).replace("trainer.workers", "workers")) from error


def _together(tallies: Sequence[Tally]) -> Tally:
    first = tallies[0]
    for tally in tallies[1:]:
        first.add(tally)
    return first


def _occurring(selection: Selection) -> NDArray[np.int64] | None:
    """The records that an epoch has, ascending; None for all. A weight below 1 leaves some of the chosen ones out."""
    return selection.chosen if selection.rounds else selection.extra


def _times(selection: Selection, index: int) -> int:
    """How often an epoch has a record."""
    place = int(np.searchsorted(selection.extra, index))
    return selection.rounds + int(place < len(selection.extra) and selection.extra[place] == index)


def _named(store: RecordStore, index: int) -> tuple[str | None, str | None]:
    """Id and image of an entry that is no record, if it says them."""
    try:
        entry = store.entries.entry(index)
    except DataError:
        return None, None
    fields = entry if isinstance(entry, dict) else {}
    identity, image = fields.get("id"), fields.get("image")
    return (
        str(identity)[:MAX_ID_LENGTH] if isinstance(identity, str | int) else None,
        image[:MAX_ID_LENGTH] if isinstance(image, str) else None,
    )


def _reason(error: DataError) -> str:
    # The cause is the message without place and id, which are the file's words and could say anything.
    message = str(error.__cause__ or error)
    return next((name for name, pattern in _REASONS if pattern.search(message)), "other")


def _digest(image: ImageRef) -> int:
    """64 bits of a hash of the image's bytes; a piece at a time, since nobody has said that the file is small."""
    digest = hashlib.blake2b(digest_size=8)
    with image.open() as file:
        try:
            while piece := file.read(_READ):
                digest.update(piece)
        except OSError as error:
            raise DataError(f"{image}: cannot be read: {error.strerror or error}") from error
    return int.from_bytes(digest.digest(), "little")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
