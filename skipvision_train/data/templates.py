"""Chat formats: turns to token ids and labels.

Every id is written by construction: control tokens by id, text through the tokenizer with special tokens switched off.
Nothing is rendered to text and tokenized again, and no mask is found by searching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from skipvision_train.data.records import IMAGE_MARKER, Turn, check_turns, count_markers
from skipvision_train.errors import DataError

IGNORED = -100
"""Label of a position that is not supervised."""

BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"


@dataclass(frozen=True)
class Encoded:
    """Token ids with their labels.

    Attributes:
        input_ids: the image placeholder stands once per visual token.
        labels: as long as ``input_ids``: the id where it is supervised, ``IGNORED`` elsewhere.
        image_starts: index of each image's first placeholder, in order of appearance.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)

    def append(self, ids: Sequence[int], supervised: bool) -> None:
        """Add tokens at the end."""
        self.input_ids.extend(ids)
        self.labels.extend(ids if supervised else [IGNORED] * len(ids))


@dataclass(frozen=True)
class Piece:
    """A stretch of one sequence: text that is still to be tokenized, or ids.

    Attributes:
        content: text or ids.
        supervised: the loss is computed on it.
        is_image: the ids are the placeholders of one image.
    """

    content: str | list[int]
    supervised: bool = False
    is_image: bool = False


class Template(Protocol):
    """A chat format. Both methods raise DataError for turns that the format cannot express or a tokenizer without
    the control tokens."""

    @property
    def name(self) -> str:
        """As ``get_template`` knows it."""

    def encode(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        image_lengths: Sequence[int],
        image_token_id: int,
        max_length: int | None = None,
    ) -> Encoded:
        """Training sample.

        Args:
            turns: ends with an answer.
            tokenizer: LLaMA-3's, or another with its control tokens.
            image_lengths: visual tokens of each image, in order of the markers.
            image_token_id: the placeholder.
            max_length: so many tokens at most. Whole pairs of question and answer are left out at the end.

        Raises:
            DataError: the first pair is too long, or a pair with an image would be left out.
        """

    def encode_prompt(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        image_lengths: Sequence[int],
        image_token_id: int,
    ) -> Encoded:
        """Prompt for generation, up to where the answer begins; nothing is supervised.

        Args:
            turns: ends with a user's turn.
            tokenizer: as above.
            image_lengths: as above.
            image_token_id: as above.
        """


@dataclass(frozen=True)
class Llama3Template:
    """LLaMA-3's instruction format (llama3 ``ChatFormat``); every answer and its end-of-turn token is supervised.

    There is no default system prompt. Texts are stripped. Images and stretches of text within a turn are separated
    by a newline.
    """

    name: str = "llama3"

    def encode(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        image_lengths: Sequence[int],
        image_token_id: int,
        max_length: int | None = None,
    ) -> Encoded:
        """See :class:`Template`."""
        check_turns(turns, last="assistant")
        lengths = _image_lengths(turns, image_lengths)
        blocks: list[list[Piece]] = [[Piece([control_id(tokenizer, BOS)])]]
        for turn in turns:
            blocks[-1].extend(_llama3_turn(turn, tokenizer, lengths, image_token_id))
            if turn.role == "assistant":
                blocks.append([])
        return _assemble(blocks[:-1], tokenizer, max_length)

    def encode_prompt(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        image_lengths: Sequence[int],
        image_token_id: int,
    ) -> Encoded:
        """See :class:`Template`."""
        check_turns(turns, last="user")
        lengths = _image_lengths(turns, image_lengths)
        pieces = [Piece([control_id(tokenizer, BOS)])]
        for turn in turns:
            pieces.extend(_llama3_turn(turn, tokenizer, lengths, image_token_id))
        pieces.extend(_llama3_header("assistant", tokenizer))
        # An earlier answer is part of the prompt: nothing of a prompt is supervised.
        return _assemble([[Piece(p.content, False, p.is_image) for p in pieces]], tokenizer, None)


@dataclass(frozen=True)
class PlainTemplate:
    """Pretraining on captions: the image, the caption, end of turn. The question is discarded."""

    name: str = "plain"

    def encode(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        image_lengths: Sequence[int],
        image_token_id: int,
        max_length: int | None = None,
    ) -> Encoded:
        """See :class:`Template`. The only turns are a question and a caption."""
        check_turns(turns, last="assistant")
        if len(turns) != 2:
            raise DataError(f"template plain: one question and one caption are expected, found {len(turns)} turns")
        pieces = self._images(turns, tokenizer, image_lengths, image_token_id)
        pieces.append(Piece(turns[1].text.strip(), supervised=True))
        pieces.append(Piece([control_id(tokenizer, EOT)], supervised=True))
        return _assemble([pieces], tokenizer, max_length)

    def encode_prompt(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        image_lengths: Sequence[int],
        image_token_id: int,
    ) -> Encoded:
        """See :class:`Template`. The only turn is a user's, of which the images are kept."""
        check_turns(turns, last="user")
        if len(turns) != 1:
            raise DataError(f"template plain: a prompt is one user's turn, found {len(turns)} turns")
        return _assemble([self._images(turns, tokenizer, image_lengths, image_token_id)], tokenizer, None)

    def _images(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        image_lengths: Sequence[int],
        image_token_id: int,
    ) -> list[Piece]:
        lengths = _image_lengths(turns, image_lengths)
        images = [Piece([image_token_id] * length, is_image=True) for length in lengths]
        return [Piece([control_id(tokenizer, BOS)]), *images]


_TEMPLATES: dict[str, Template] = {"llama3": Llama3Template(), "plain": PlainTemplate()}


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
        DataError: an unknown name; there is no fallback.
    """
    if name not in _TEMPLATES:
        raise DataError(f"template {name!r} is unknown; use one of {', '.join(_TEMPLATES)}")
    return _TEMPLATES[name]


def control_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of a control token.

    Raises:
        DataError: the tokenizer lacks it.
    """
    found = tokenizer.convert_tokens_to_ids(token)
    # A tokenizer with an unknown token answers with that one's id.
    if not isinstance(found, int) or tokenizer.convert_ids_to_tokens(found) != token:
        raise DataError(f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} lacks the token {token}")
    return found


def _image_lengths(turns: Sequence[Turn], lengths: Sequence[int]) -> Iterator[int]:
    if (markers := count_markers(turns)) != len(lengths):
        raise DataError(f"{markers} {IMAGE_MARKER} markers in the turns, but {len(lengths)} images")
    return iter(lengths)


def _llama3_header(role: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    start, end = control_id(tokenizer, START_HEADER), control_id(tokenizer, END_HEADER)
    return [Piece([start]), Piece(role), Piece([end]), Piece("\n\n")]


def _llama3_turn(
    turn: Turn, tokenizer: PreTrainedTokenizerBase, lengths: Iterator[int], image_token_id: int
) -> list[Piece]:
    answer = turn.role == "assistant"
    user = turn.role == "user"
    content = _content(turn.text, lengths, image_token_id) if user else [Piece(turn.text.strip(), answer)]
    return [*_llama3_header(turn.role, tokenizer), *content, Piece([control_id(tokenizer, EOT)], answer)]


def _content(text: str, lengths: Iterator[int], image_token_id: int) -> list[Piece]:
    """A user's text: images and the stripped, non-empty stretches of text around them, joined by newlines."""
    pieces: list[Piece] = []
    pending = ""
    for index, part in enumerate(text.split(IMAGE_MARKER)):
        if index:
            if pending:
                pieces.append(Piece(pending))
            pieces.append(Piece([image_token_id] * next(lengths), is_image=True))
            pending = "\n"
        if part.strip():
            pending += part.strip() + "\n"
    # The newline that waits for something to follow is not written at the end of the turn.
    if pending := pending.removesuffix("\n"):
        pieces.append(Piece(pending))
    return pieces


def _assemble(blocks: list[list[Piece]], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Encoded:
    """Tokenize all texts in one call and join the blocks, leaving out whole blocks that do not fit."""
    texts = [piece.content for block in blocks for piece in block if isinstance(piece.content, str)]
    tokens = iter(_tokenize(texts, tokenizer))
    result = Encoded()
    full = False
    for index, block in enumerate(blocks):
        ids = [next(tokens) if isinstance(piece.content, str) else piece.content for piece in block]
        length = sum(map(len, ids))
        full = full or (max_length is not None and len(result.input_ids) + length > max_length)
        if not full:
            _extend(result, block, ids)
        elif index == 0:
            raise DataError(f"the first question and answer take {length} tokens, max_length is {max_length}")
        elif any(piece.is_image for piece in block):
            raise DataError(
                f"question and answer {index} hold an image and do not fit: {len(result.input_ids)} + {length} tokens, "
                f"max_length is {max_length}; an image is never cut"
            )
    return result


def _extend(result: Encoded, block: list[Piece], ids: list[list[int]]) -> None:
    for piece, tokens in zip(block, ids, strict=True):
        if piece.is_image:
            result.image_starts.append(len(result.input_ids))
        result.append(tokens, piece.supervised)


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text on its own; text that spells a special token stays text."""
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])
