"""What training makes of a few records of every source: their images, tokens and labels, for people to look at.

Nothing is encoded here in a way of its own: a record goes through ``RecordDataset``, as in training, and what is shown
is read from the ``Example`` that comes out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from skipvision_train.data.dataset import RecordDataset
from skipvision_train.data.images import image_size
from skipvision_train.data.mixture import Mixture
from skipvision_train.data.processor import Example, SkipVisionProcessor
from skipvision_train.data.records import Record, Turn, count_markers
from skipvision_train.data.streams import Lane, Streams
from skipvision_train.data.templates import IGNORED, get_template
from skipvision_train.data.tiling import tile_grid
from skipvision_train.errors import DataError
from skipvision_train.models.settings import TilingConfig, VisionConfig
from skipvision_train.plans.rules import TokenKind

UNFINISHED = "\ufffd"
"""What tokenizers write for bytes that are not yet a character."""

LONGEST = 8
"""Tokens that are joined at most in the hope of a whole character."""


@dataclass(frozen=True)
class Token:
    """A token that is no visual one.

    Attributes:
        id: its id.
        text: what it adds to the text; empty where it is only a part of a character that the next tokens finish.
        special: a control token, whatever its text is; a user who spells one gets others.
        supervised: the loss is computed on it.
    """

    id: int
    text: str
    special: bool
    supervised: bool


@dataclass(frozen=True)
class ImageRun:
    """The tokens of one image.

    Attributes:
        number: of the image in the sample, from 0.
        runs: kinds in their order, each with how many follow each other.
        supervised: positions with a label; 0 unless something is wrong.
    """

    number: int
    runs: tuple[tuple[TokenKind, int], ...]
    supervised: int = 0

    @property
    def counts(self) -> dict[TokenKind, int]:
        """Tokens of each kind, in the order in which the kinds appear."""
        totals: dict[TokenKind, int] = {}
        for kind, count in self.runs:
            totals[kind] = totals.get(kind, 0) + count
        return totals


@dataclass(frozen=True)
class Picture:
    """An image as the model sees it, from the pixels that it is given.

    Attributes:
        name: of the file.
        width: of the image before, in pixels.
        height: likewise.
        columns: of local tiles; 1 without tiling.
        rows: likewise.
        view: the global view, square.
        local: the local tiles put together; None without tiling.
    """

    name: str
    width: int
    height: int
    columns: int
    rows: int
    view: Image.Image
    local: Image.Image | None


@dataclass(frozen=True)
class Sample:
    """A record and what becomes of it.

    Attributes:
        source: name of its source.
        place: where it stands in the data, in words.
        record: None if not even that can be read.
        problem: why it cannot be used; then there is nothing below.
        pictures: its images.
        tokens: the row: an ``ImageRun`` for every image, a ``Token`` for everything else.
        length: positions of the row.
        kept_turns: so many of the record's turns are in the row; ``max_length`` cut the others.
        cut_tokens: tokens of the turns that were cut.
    """

    source: str
    place: str
    record: Record | None
    problem: str | None = None
    pictures: tuple[Picture, ...] = ()
    tokens: tuple[Token | ImageRun, ...] = ()
    length: int = 0
    kept_turns: int = 0
    cut_tokens: int = 0

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return sum(count for run in self.tokens if isinstance(run, ImageRun) for _, count in run.runs)

    @property
    def supervised(self) -> int:
        """Tokens that the loss is computed on."""
        return sum(int(token.supervised) for token in self.tokens)


@dataclass(frozen=True)
class SourceSummary:
    """The shown samples of one source; means are over the usable ones, 0 without any.

    Attributes:
        name: of the source.
        format: of its files.
        records: records that an epoch takes from it; None where nobody counted (streaming).
        shown: samples.
        unusable: of these, samples with a problem.
        text_only: usable samples without an image.
        cut: usable samples that ``max_length`` cut.
        length: tokens, mean.
        visual: visual tokens, mean.
        supervised: supervised tokens, mean.
    """

    name: str
    format: str
    records: int | None
    shown: int
    unusable: int
    text_only: int
    cut: int
    length: float
    visual: float
    supervised: float


@dataclass(frozen=True)
class Encoder:
    """How training encodes records; fields as of ``RecordDataset``."""

    processor: SkipVisionProcessor
    template: str
    max_length: int | None
    draft: bool = False
    resizer: str = "auto"

    def example(self, record: Record) -> Example:
        """The training sample.

        Raises:
            DataError: the record cannot be used.
        """
        dataset = RecordDataset(
            [record], self.processor, self.template, self.max_length, draft=self.draft, resizer=self.resizer
        )
        example = dataset[0]
        assert example is not None  # only a policy that skips gives None
        return example

    def sample(self, drawn: Sample) -> Sample:
        """A drawn record with everything that training makes of it, or with the reason why it cannot be used."""
        record = drawn.record
        if record is None:
            return drawn
        try:
            example = self.example(record)
            sizes = [image_size(image, f"{record.id} of {record.source}") for image in record.images]
        except DataError as error:
            return replace(drawn, problem=str(error))
        kept, cut = self._kept(record, example)
        return replace(
            drawn,
            pictures=tuple(pictures(record, sizes, example, self.processor)),
            tokens=tuple(token_row(example, self.processor)),
            length=len(example.input_ids),
            kept_turns=kept,
            cut_tokens=cut,
        )

    def _kept(self, record: Record, example: Example) -> tuple[int, int]:
        """How many turns are in the row, and how many tokens the others would have been."""
        lengths = [self.processor.tokens_of(tiles) for tiles in example.image_tiles]
        whole = self._ids(record.turns, lengths)
        if whole == example.input_ids:
            return len(record.turns), 0
        ends = [i for i, turn in enumerate(record.turns, 1) if turn.role == "assistant"]
        for end in ends:
            turns = record.turns[:end]
            if self._ids(turns, lengths[: count_markers(turns)]) == example.input_ids:
                return end, len(whole) - len(example.input_ids)
        raise AssertionError("a row that is not the beginning of its record")

    def _ids(self, turns: Sequence[Turn], lengths: Sequence[int]) -> list[int]:
        template, processor = get_template(self.template), self.processor
        return template.encode(turns, processor.tokenizer, lengths, processor.image_token_id).input_ids


def draw(records: Mixture | Streams, count: int, seed: int, buffer: int = 1000) -> Iterator[Sample]:
    """``count`` records of every source, fewer if it has fewer, chosen by seed and the source's name; not yet encoded.

    Args:
        records: of a mixture in their order; of a stream the first as a single lane shuffles them.
        count: of each source.
        seed: of the choice.
        buffer: of a stream, records that are shuffled together.

    Raises:
        DataError: a stream that cannot be read at all. A record that cannot be read is a sample with a problem.
    """
    if isinstance(records, Streams):
        for stream in records.parts:
            for reference in islice(stream.references(Lane(0, 1, seed, buffer)), count):
                yield _read(stream.source.name, records.where(reference), reference.read)
        return
    first = 0
    for part in records.parts:
        name = part.source.name
        chosen = random.Random(f"{seed}/{name}").sample(range(len(part)), min(count, len(part)))
        for position in sorted(chosen):
            yield _read(name, f"record {first + position}", partial(part.record, position))
        first += len(part)


def _read(source: str, place: str, read: Callable[[], Record]) -> Sample:
    try:
        return Sample(source, place, read())
    except DataError as error:
        return Sample(source, place, None, str(error))


def summaries(records: Mixture | Streams, samples: Sequence[Sample]) -> list[SourceSummary]:
    """A line per source, also for one without a sample."""
    found = []
    for part in records.parts:
        mine = [sample for sample in samples if sample.source == part.source.name]
        usable = [sample for sample in mine if sample.problem is None]
        found.append(
            SourceSummary(
                name=part.source.name,
                format=part.source.format,
                records=None if isinstance(records, Streams) else len(part),  # type: ignore[arg-type]
                shown=len(mine),
                unusable=len(mine) - len(usable),
                text_only=sum(not sample.pictures for sample in usable),
                cut=sum(sample.cut_tokens > 0 for sample in usable),
                length=_mean([sample.length for sample in usable]),
                visual=_mean([sample.visual for sample in usable]),
                supervised=_mean([sample.supervised for sample in usable]),
            )
        )
    return found


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def token_row(example: Example, processor: SkipVisionProcessor) -> Iterator[Token | ImageRun]:
    """The row of an example: text token by token, each image as one."""
    ids, labels = example.input_ids, example.labels
    special = {index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    images = iter(enumerate(example.image_tiles))
    place = 0
    while place < len(ids):
        if ids[place] == processor.image_token_id:
            number, tiles = next(images)
            end = place + processor.tokens_of(tiles)
            kinds = groupby(TokenKind(kind) for kind in example.token_kinds[place:end])
            supervised = sum(label != IGNORED for label in labels[place:end])
            yield ImageRun(number, tuple((kind, len(list(run))) for kind, run in kinds), supervised)
        else:
            end = place
            while end < len(ids) and ids[end] != processor.image_token_id:
                end += 1
            texts = token_texts(ids[place:end], processor.tokenizer)
            for index, text in zip(range(place, end), texts, strict=True):
                yield Token(ids[index], text, ids[index] in special, labels[index] != IGNORED)
        place = end


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text, so that the texts together are the text.

    A token is decoded behind the one before it, because many tokenizers drop the space of a first word. Where several
    tokens spell one character, the last of them has it and the others are empty.
    """
    texts: list[str] = []
    before: list[int] = []
    group: list[int] = []
    for place, token in enumerate(ids):
        group.append(token)
        text = _text_behind(before, group, tokenizer)
        is_open = text.endswith(UNFINISHED) and len(group) < LONGEST and place + 1 < len(ids)
        texts.append("" if is_open else text)
        if not is_open:
            before, group = group, []
    return texts


def _text_behind(before: Sequence[int], group: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    def decoded(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    start, whole = decoded(before), decoded([*before, *group])
    return whole[len(start) :] if whole.startswith(start) else decoded(group)


def pictures(
    record: Record, sizes: Sequence[tuple[int, int]], example: Example, processor: SkipVisionProcessor
) -> Iterator[Picture]:
    """The images of a record from the pixel values of its example.

    Args:
        record: for the images' names.
        sizes: width and height of every image.
        example: of the record.
        processor: that encoded it.
    """
    vision, tiling = VisionConfig(**processor.vision), TilingConfig(**processor.tiling)
    first = 0
    for image, (width, height), tiles in zip(record.images, sizes, example.image_tiles, strict=True):
        assert example.pixel_values is not None
        views = colours(example.pixel_values[first : first + tiles], vision)
        columns, rows = tile_grid(width, height, tiling, vision.image_size)
        local = None if tiles == 1 else Image.fromarray(_together(views[1:], columns, rows))
        name = image.name or image.path.name
        yield Picture(name, width, height, columns, rows, Image.fromarray(views[0]), local)
        first += tiles


def colours(pixels: Tensor, vision: VisionConfig) -> NDArray[np.uint8]:
    """(N, S, S, 3) uint8 of (N, 3, S, S) normalised pixel values; undoes ``images.normalise``."""
    values = pixels.permute(0, 2, 3, 1).double().numpy() * np.array(vision.image_std) + np.array(vision.image_mean)
    levels: NDArray[np.uint8] = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return levels


def _together(tiles: NDArray[np.uint8], columns: int, rows: int) -> NDArray[np.uint8]:
    """(rows * S, columns * S, 3) of (columns * rows, S, S, 3) in raster order."""
    side = tiles.shape[1]
    grid = tiles.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid).reshape(rows * side, columns * side, 3)
