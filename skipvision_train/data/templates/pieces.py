"""What chat formats are built of: stretches of text and ids, and how they become tokens and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from skipvision_train.data.records import IMAGE_MARKER, Turn, count_markers
from skipvision_train.errors import DataError

IGNORED = -100
"""Label of a position that is not supervised."""

# What stands before a text that goes on behind another one while it is tokenized; cut off again. Nothing merges with
# a line break in the vocabularies of LLaMA, Mistral or Qwen; the colon is for tokenizers that turn breaks into spaces.
_ANCHORS = ("\n", ":")


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
        continues: text that goes on behind other text. Sentencepiece tokenizers begin every other text with a space.
    """

    content: str | list[int]
    supervised: bool = False
    is_image: bool = False
    continues: bool = False


def control_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of a control token.

    Raises:
        DataError: the tokenizer lacks it.
    """
    found = find_token(tokenizer, token)
    if found is None:
        raise DataError(f"tokenizer {tokenizer_name(tokenizer)!r} lacks the token {token}")
    return found


def find_token(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The token's id, None if it has none of its own."""
    found = tokenizer.convert_tokens_to_ids(token)
    # A tokenizer with an unknown token answers with that one's id.
    return found if isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token else None


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a message calls the tokenizer."""
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def image_pieces(turns: Sequence[Turn], lengths: Sequence[int], image_token_id: int) -> Iterator[Piece]:
    """The placeholders of every image, in order of the markers.

    Raises:
        DataError: markers and images disagree.
    """
    if (markers := count_markers(turns)) != len(lengths):
        raise DataError(f"{markers} {IMAGE_MARKER} markers in the turns, but {len(lengths)} images")
    return iter([Piece([image_token_id] * length, is_image=True) for length in lengths])


def content(text: str, images: Iterator[Piece]) -> list[Piece]:
    """A user's text: images and the stripped, non-empty stretches of text around them, joined by newlines."""
    pieces: list[Piece] = []
    pending = ""
    for index, part in enumerate(text.split(IMAGE_MARKER)):
        if index:
            if pending:
                pieces.append(Piece(pending))
            pieces.append(next(images))
            pending = "\n"
        if part.strip():
            pending += part.strip() + "\n"
    # The newline that waits for something to follow is not written at the end of the turn.
    if pending := pending.removesuffix("\n"):
        pieces.append(Piece(pending))
    return pieces


def joined(blocks: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """Neighbouring texts of a block as one, so that they are tokenized as they stand.

    A text that is supervised stays apart from one that is not, and one that begins a block from the block before.
    """
    result: list[list[Piece]] = []
    before: Piece | None = None
    for block in blocks:
        pieces: list[Piece] = []
        for piece in block:
            if piece.content == "":
                continue
            if isinstance(piece.content, str) and before is not None and isinstance(before.content, str):
                if pieces and before.supervised == piece.supervised:
                    piece = replace(pieces.pop(), content=before.content + piece.content)
                else:
                    piece = replace(piece, continues=True)
            pieces.append(piece)
            before = piece
        result.append(pieces)
    return result


def split_special(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Text in which special tokens are spelled out, as texts and ids; text of users must never come here."""
    added = {str(token): (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
    if not added:
        return [Piece(text)] if text else []
    # The longest spelling first: one added token may begin with another.
    spellings = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
    parts = re.split(f"({spellings})", text)
    pieces: list[Piece] = []
    for index, part in enumerate(parts):
        if index % 2:
            pieces.append(Piece([added[part][0]]))
            continue
        # Some tokens swallow the white space beside them (Phi-3's).
        if index and added[parts[index - 1]][1].rstrip:
            part = part.lstrip()
        if index + 1 < len(parts) and added[parts[index + 1]][1].lstrip:
            part = part.rstrip()
        if part:
            pieces.append(Piece(part))
    return pieces


def token_ids(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each piece; all texts are tokenized in one call, and what spells a special token stays text.

    Raises:
        DataError: the tokenizer writes a text behind another one in no way that could be separated.
    """
    texts = [(_ANCHORS[0] if piece.continues else "") + p for piece in pieces if isinstance(p := piece.content, str)]
    rows = iter(_tokenize([*texts, _ANCHORS[0]], tokenizer))
    found = [next(rows) if isinstance(piece.content, str) else piece.content for piece in pieces]
    anchor = next(rows)
    for index, piece in enumerate(pieces):
        if not piece.continues:
            continue
        if found[index][: len(anchor)] == anchor:
            found[index] = found[index][len(anchor) :]
        else:
            found[index] = _ids_behind_text(str(piece.content), tokenizer)
    return found


def _ids_behind_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    for anchor in _ANCHORS[1:]:
        before, both = _tokenize([anchor, anchor + text], tokenizer)
        if both[: len(before)] == before:
            return both[len(before) :]
    raise DataError(
        f"tokenizer {tokenizer_name(tokenizer)!r} merges {text[:20]!r} with the text before it, so that question and "
        "answer cannot be told apart"
    )


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])


def assemble(
    blocks: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Encoded:
    """Join the blocks, leaving out whole blocks at the end that do not fit.

    Args:
        blocks: pairs of question and answer.
        tokenizer: for the texts.
        max_length: in tokens; None for no limit.

    Raises:
        DataError: the first block is too long, or a block with an image would be left out.
    """
    ids = iter(token_ids([piece for block in blocks for piece in block], tokenizer))
    result = Encoded()
    full = False
    for index, block in enumerate(blocks):
        tokens = [next(ids) for _ in block]
        length = sum(map(len, tokens))
        full = full or (max_length is not None and len(result.input_ids) + length > max_length)
        if not full:
            _extend(result, block, tokens)
        elif index == 0:
            raise DataError(f"the first question and answer take {length} tokens, max_length is {max_length}")
        elif any(piece.is_image for piece in block):
            raise DataError(
                f"question and answer {index} hold an image and do not fit: {len(result.input_ids)} + {length} tokens, "
                f"max_length is {max_length}; an image is never cut"
            )
    return result


def _extend(result: Encoded, block: Sequence[Piece], tokens: Sequence[list[int]]) -> None:
    for piece, ids in zip(block, tokens, strict=True):
        if piece.is_image:
            result.image_starts.append(len(result.input_ids))
        result.append(ids, piece.supervised)
