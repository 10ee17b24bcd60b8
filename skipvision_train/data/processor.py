"""Conversations and images to what the model takes; saved with the model, and loaded by ``AutoProcessor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from skipvision_train.data.collate import collate
from skipvision_train.data.images import load_image
from skipvision_train.data.messages import chat_template, conversation_turns, flat_messages
from skipvision_train.data.placeholder import free, listed, taken
from skipvision_train.data.records import Record, Turn
from skipvision_train.data.templates import Encoded, get_template, split_special, token_ids
from skipvision_train.data.tiling import draft_factor, num_tiles, to_tiles
from skipvision_train.errors import DataError
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.settings import TilingConfig, VisionConfig
from skipvision_train.plans.rules import TokenKind


@dataclass(frozen=True)
class Example:
    """One encoded sample.

    Attributes:
        input_ids: the image placeholder stands once per visual token.
        labels: as long as ``input_ids``, -100 where nothing is supervised; empty for a prompt.
        token_kinds: as long as ``input_ids``, :class:`TokenKind` values.
        pixel_values: (tiles, 3, S, S) float32, the images' tiles in order of appearance, or None without images.
        image_tiles: tiles of each image.
        record: id of the record that it was encoded from; empty for other samples.
        source: the record's source.
    """

    input_ids: list[int]
    labels: list[int]
    token_kinds: list[int]
    pixel_values: Tensor | None
    image_tiles: tuple[int, ...] = ()
    record: str = ""
    source: str = ""


class SkipVisionProcessor(ProcessorMixin):
    """Tokenizer, chat format, image preprocessing and the layout of an image's tokens.

    Args:
        tokenizer: a fast tokenizer with the template's control tokens. It needs no padding token.
        vision: fields of :class:`VisionConfig`.
        image_token_id: the placeholder, a special token of the tokenizer.
        image_tokens: for every number of tiles that an image can have (as text, for JSON), the kinds of its tokens in
            order, as runs ``[kind name, count]``.
        tiling: fields of :class:`TilingConfig`.
        template: the chat format that ``encode`` and prompts use unless told otherwise.
        chat_template: Jinja text for other programs; this class writes ids itself (``templates.py``).

    Raises:
        DataError: the template is unknown, or the placeholder is no special token of the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vision: dict[str, Any],
        image_token_id: int,
        image_tokens: Mapping[str, Sequence[Sequence[Any]]],
        tiling: dict[str, Any] | None = None,
        template: str = "llama3",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, chat_template=chat_template)
        get_template(template)
        self._vision_config, self._tiling_config = VisionConfig(**vision), TilingConfig(**(tiling or {}))
        self.vision, self.tiling = asdict(self._vision_config), asdict(self._tiling_config)
        self.image_token_id = image_token_id
        if not isinstance(image_tokens, Mapping):
            raise DataError(
                f"image_tokens: {image_tokens!r}; a mapping from numbers of tiles is needed, this processor was saved "
                "by another version: save it again with SkipVisionProcessor.from_config"
            )
        self.image_tokens = {str(tiles): [list(run) for run in runs] for tiles, runs in image_tokens.items()}
        self.template = template
        added = tokenizer.added_tokens_decoder.get(image_token_id)
        if added is None or not added.special:
            # Anything else could be typed by a user and would then stand for an image.
            raise DataError(
                f"image_token_id: {image_token_id} is no special token of tokenizer {tokenizer.name_or_path!r}; "
                "use the id of an unused special token, such as LLaMA-3's <|reserved_special_token_0|>"
            )
        self.image_token = str(added)
        self._kinds = {
            int(tiles): [int(TokenKind[kind.upper()]) for kind, count in runs for _ in range(int(count))]
            for tiles, runs in self.image_tokens.items()
        }

    @classmethod
    def from_config(
        cls, config: SkipVisionConfig, tokenizer: PreTrainedTokenizerBase, template: str = "llama3"
    ) -> SkipVisionProcessor:
        """The processor that fits a model. A template that is a chat format replaces the tokenizer's own chat template.

        LLaMA-3.1's inserts a dated system turn, for instance, that models trained here have not seen.

        Raises:
            DataError: as above, the tokenizer lacks the template's control tokens, or the placeholder is one of these,
                or begins or ends texts.
        """
        tokens = {str(tiles): _runs(config.image_token_kinds(tiles)) for tiles in config.tiling_config.counts}
        vision, tiling = asdict(config.vision_config), asdict(config.tiling_config)
        get_template(template).end(tokenizer)
        if (meaning := taken(tokenizer, template).get(config.image_token_id)) is not None:
            token = tokenizer.convert_ids_to_tokens(config.image_token_id)
            raise DataError(
                f"image_token_id: {config.image_token_id} ({token}) is {meaning}; use the id of a free special token: "
                f"{listed(free(tokenizer, template))}"
            )
        processor = cls(tokenizer, vision, config.image_token_id, tokens, tiling, template)
        if (text := chat_template(template, processor.image_token)) is not None:
            processor.chat_template = tokenizer.chat_template = text
        return processor

    def tiles_of(self, width: int, height: int) -> int:
        """How many tiles an image of this size in pixels becomes, the global view included."""
        return num_tiles(width, height, self._tiling_config, self._vision_config.image_size)

    def draft_factor(self, width: int, height: int) -> int:
        """By how much a JPEG of this size in pixels may be decoded smaller; its number of tiles stays the same."""
        return draft_factor(width, height, self._tiling_config, self._vision_config.image_size)

    def tokens_of(self, tiles: int) -> int:
        """How many placeholders an image of so many tiles has."""
        return len(self._kinds[tiles])

    @property
    def tokens_per_image(self) -> int:
        """How many placeholders an image has at most."""
        return max(map(len, self._kinds.values()))

    @property
    def pad_id(self) -> int:
        """What padding is filled with: any id but the placeholder's would do, since masks come from lengths."""
        pad = self.tokenizer.pad_token_id  # LLaMA-3 has none
        return int(pad) if pad not in (None, self.image_token_id) else self.end_id

    @property
    def end_id(self) -> int:
        """What ends an answer in the processor's template, whatever the tokenizer calls its end of sequence."""
        return get_template(self.template).end(self.tokenizer)

    def encode(
        self,
        sample: Record | Sequence[Turn],
        images: Sequence[Image.Image] = (),
        max_length: int | None = None,
        template: str | None = None,
        resizer: str = "auto",
    ) -> Example:
        """A training sample.

        Args:
            sample: a record, or turns that end with an answer.
            images: decoded, in order of their markers.
            max_length: see :meth:`Template.encode`.
            template: instead of the processor's own.
            resizer: see ``resizing.bicubic``.

        Raises:
            DataError: naming the record, if a record was given.
        """
        turns = sample.turns if isinstance(sample, Record) else sample
        tiles = [self.tiles_of(*image.size) for image in images]
        lengths = [self.tokens_of(count) for count in tiles]
        try:
            encoded = get_template(template or self.template).encode(
                turns, self.tokenizer, lengths, self.image_token_id, max_length
            )
        except DataError as error:
            if isinstance(sample, Record):
                raise DataError(f"record {sample.id} of {sample.source}: {error}") from error
            raise
        example = self._example(encoded, images, tiles, encoded.labels, resizer)
        return replace(example, record=sample.id, source=sample.source) if isinstance(sample, Record) else example

    def encode_prompt(
        self, turns: Sequence[Turn], images: Sequence[Image.Image] = (), template: str | None = None
    ) -> Example:
        """A prompt: turns that end with a user's, and the header of the answer. ``labels`` is empty.

        Raises:
            DataError: turns that the template cannot express, or markers and images that disagree.
        """
        tiles = [self.tiles_of(*image.size) for image in images]
        lengths = [self.tokens_of(count) for count in tiles]
        encoded = get_template(template or self.template).encode_prompt(
            turns, self.tokenizer, lengths, self.image_token_id
        )
        return self._example(encoded, images, tiles, [])

    def _example(
        self,
        encoded: Encoded,
        images: Sequence[Image.Image],
        tiles: Sequence[int],
        labels: list[int],
        resizer: str = "auto",
    ) -> Example:
        kinds = [int(TokenKind.TEXT)] * len(encoded.input_ids)
        for start, count in zip(encoded.image_starts, tiles, strict=True):
            kinds[start : start + self.tokens_of(count)] = self._kinds[count]
        pixels = [to_tiles(image, self._vision_config, self._tiling_config, resizer) for image in images]
        together = torch.cat(pixels) if len(pixels) > 1 else next(iter(pixels), None)  # one image is not copied
        return Example(encoded.input_ids, labels, kinds, together, tuple(tiles))

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
        images: Sequence[Image.Image] = (),
        padding_side: str = "left",
    ) -> BatchFeature | str | list[str] | Tensor:
        """Messages in the style of transformers to a batch.

        Args:
            conversation: messages ``{"role", "content"}``, or a list of such conversations. Content is text or a list
                of ``{"type": "text", "text"}`` and ``{"type": "image", "image": PIL image or path}`` (or ``"path"``).
            add_generation_prompt: end with the header of an answer. With False the conversation must end with an
                answer, is encoded as in training, and the batch has ``labels``.
            tokenize: False gives text in which an image is one placeholder token, for ``processor(text=, images=)``.
            return_dict: False gives ``input_ids`` alone.
            return_tensors: only ``pt``.
            images: the images of ``{"type": "image"}`` parts that bring none, in order of appearance.
            padding_side: of the shorter rows of a batch.

        Raises:
            DataError: content of an unknown form, or parts and images that disagree.
        """
        _check_tensors(return_tensors)
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        if not tokenize:
            texts = self.tokenizer.apply_chat_template(
                [flat_messages(messages, self.image_token) for messages in conversations],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            return texts if batched else texts[0]
        loose = iter(images)
        examples = []
        for messages in conversations:
            turns, found = conversation_turns(messages, loose)
            pictures = [_opened(image) for image in found]
            encode = self.encode_prompt if add_generation_prompt else self.encode
            examples.append(encode(turns, pictures))
        if unused := sum(1 for _ in loose):
            raise DataError(f"images: {unused} more than the conversation has image parts without an image")
        batch = BatchFeature(collate(examples, padding_side, self.pad_id))
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        padding: bool = True,
        padding_side: str = "left",
    ) -> BatchFeature:
        """Text that already is in the chat format (``apply_chat_template(..., tokenize=False)``), and its images.

        Special tokens in the text are special tokens: for text of users that may contain them use
        ``apply_chat_template``. The token that the template begins with is added where the text lacks it.

        Args:
            images: all images of all texts, in order of their placeholder tokens in the texts.
            text: one text or several, each image one placeholder token (``image_token``), which is expanded here.
            return_tensors: only ``pt``.
            padding: must stay True for texts of different lengths.
            padding_side: of the shorter rows.

        Raises:
            DataError: placeholders and images disagree, with both counts.
        """
        _check_tensors(return_tensors)
        texts = [text] if isinstance(text, str) else list(text or ())
        pictures = [images] if isinstance(images, Image.Image) else list(images or ())
        if not texts:
            raise DataError(
                "text: a text in the chat format is needed; apply_chat_template(..., tokenize=False) writes it"
            )
        rows = [self._parse(text) for text in texts]
        if (found := sum(row.count(self.image_token_id) for row in rows)) != len(pictures):
            raise DataError(
                f"{found} image tokens {self.image_token} in the text, but {len(pictures)} images; "
                "apply_chat_template(..., tokenize=False) writes one per image"
            )
        remaining = iter(pictures)
        examples = []
        for row in rows:
            mine = [next(remaining) for _ in range(row.count(self.image_token_id))]
            tiles = [self.tiles_of(*image.size) for image in mine]
            examples.append(self._example(self._expand(row, tiles), mine, tiles, []))
        if not padding and len({len(example.input_ids) for example in examples}) > 1:
            raise DataError("padding: texts of different lengths make no batch; set padding=True")
        return BatchFeature(collate(examples, padding_side, self.pad_id))

    def _parse(self, text: str) -> list[int]:
        """Ids of a text with special tokens; between them it is tokenized as templates do."""
        pieces = split_special(text, self.tokenizer)
        return [token for ids in token_ids(pieces, self.tokenizer) for token in ids]

    def _expand(self, row: list[int], tiles: Sequence[int]) -> Encoded:
        begin = get_template(self.template).begin(self.tokenizer)
        encoded, remaining = Encoded(), iter(tiles)
        for token in row if begin is None or row[:1] == [begin] else [begin, *row]:
            is_image = token == self.image_token_id
            if is_image:
                encoded.image_starts.append(len(encoded.input_ids))
            encoded.append([token] * (self.tokens_of(next(remaining)) if is_image else 1), supervised=False)
        return encoded

    @property
    def model_input_names(self) -> list[str]:
        """The keys of a prompt's batch."""
        return ["input_ids", "attention_mask", "token_kinds", "pixel_values", "image_tiles"]


def _runs(kinds: Sequence[TokenKind]) -> list[list[Any]]:
    return [[kind.name.lower(), len(list(run))] for kind, run in groupby(kinds)]


def _check_tensors(return_tensors: str) -> None:
    if return_tensors != "pt":
        raise DataError(f"return_tensors: {return_tensors!r}; only 'pt' is supported")


def _opened(image: Image.Image | str | Path) -> Image.Image:
    return image if isinstance(image, Image.Image) else load_image(image, "of the conversation")


AutoProcessor.register(SkipVisionConfig, SkipVisionProcessor, exist_ok=True)
