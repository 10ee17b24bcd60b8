"""What every chat format has, and the encoding that formats share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from skipvision_train.data.records import Turn, check_turns
from skipvision_train.data.templates.pieces import Encoded, Piece, assemble, image_pieces, joined


@dataclass(frozen=True)
class Template(ABC):
    """A chat format. Its methods raise DataError for turns that the format cannot express and for a tokenizer that
    lacks the format's control tokens.

    A format says in pieces how turns are written (:meth:`blocks`); ids and labels follow from these, so a mask is made
    together with the text and never looked for. Every run of text between ids is tokenized as a text of its own.

    Attributes:
        name: as ``get_template`` knows it.
    """

    name: str

    @abstractmethod
    def begin(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The token that every sequence begins with, None for none."""

    @abstractmethod
    def end(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The token that ends an answer: the last one supervised, and where generation stops."""

    @abstractmethod
    def blocks(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, images: Iterator[Piece]
    ) -> list[list[Piece]]:
        """One block per question and answer; the system turn belongs to the first.

        Args:
            turns: checked by ``check_turns``. If they end with a user's turn, the last block ends where the answer
                would begin.
            tokenizer: for control tokens.
            images: the placeholders of the images that the turns show.
        """

    def encode(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        image_lengths: Sequence[int],
        image_token_id: int,
        max_length: int | None = None,
    ) -> Encoded:
        """Training sample: every answer is supervised, with the token that ends it.

        Args:
            turns: ends with an answer.
            tokenizer: one with the format's control tokens.
            image_lengths: visual tokens of each image, in order of the markers.
            image_token_id: the placeholder.
            max_length: so many tokens at most. Whole pairs of question and answer are left out at the end.

        Raises:
            DataError: the first pair is too long, or a pair with an image would be left out.
        """
        check_turns(turns, last="assistant")
        images = image_pieces(turns, image_lengths, image_token_id)
        return assemble(joined(self.blocks(turns, tokenizer, images)), tokenizer, max_length)

    def encode_prompt(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        image_lengths: Sequence[int],
        image_token_id: int,
    ) -> Encoded:
        """Prompt for generation, up to where the answer begins: the beginning of the training sample.

        Nothing is supervised: an earlier answer is part of the prompt.

        Args:
            turns: ends with a user's turn.
            tokenizer: as above.
            image_lengths: as above.
            image_token_id: as above.
        """
        check_turns(turns, last="user")
        images = image_pieces(turns, image_lengths, image_token_id)
        blocks = joined(self.blocks(turns, tokenizer, images))
        return assemble([[replace(piece, supervised=False) for piece in block] for block in blocks], tokenizer)


@dataclass(frozen=True)
class TurnTemplate(Template):
    """A format that writes turn after turn."""

    def blocks(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, images: Iterator[Piece]
    ) -> list[list[Piece]]:
        """See :class:`Template`."""
        blocks = [self.opening(turns, tokenizer)]
        for turn in turns:
            blocks[-1].extend(self.turn(turn, tokenizer, images))
            if turn.role == "assistant":
                blocks.append([])
        if turns[-1].role == "assistant":
            return blocks[:-1]
        blocks[-1].extend(self.header("assistant", tokenizer))
        return blocks

    @abstractmethod
    def opening(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """What stands before the first turn."""

    @abstractmethod
    def turn(self, turn: Turn, tokenizer: PreTrainedTokenizerBase, images: Iterator[Piece]) -> list[Piece]:
        """One turn, its header included; an answer and the token that ends it are supervised."""

    @abstractmethod
    def header(self, role: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """What stands before the words of a turn; in a prompt the last of it."""
