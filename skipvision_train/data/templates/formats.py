"""The chat formats of LLaMA-3, LLaVA-1.5 (Vicuna) and Qwen, and the one of pretraining."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from skipvision_train.data.records import Turn
from skipvision_train.data.templates.base import Template, TurnTemplate
from skipvision_train.data.templates.pieces import Piece, content, control_id, find_token, tokenizer_name
from skipvision_train.errors import DataError

BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@dataclass(frozen=True)
class Llama3Template(TurnTemplate):
    """LLaMA-3's instruction format (llama3 ``ChatFormat``).

    There is no default system prompt. Texts are stripped. Images and stretches of text within a turn are separated
    by a newline.
    """

    name: str = "llama3"

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """See :class:`Template`."""
        return control_id(tokenizer, BOS)

    def end(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """See :class:`Template`. LLaMA-3's ``eos_token`` is another one in its base models."""
        return control_id(tokenizer, EOT)

    def opening(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """See :class:`TurnTemplate`."""
        return [Piece([control_id(tokenizer, BOS)])]

    def turn(self, turn: Turn, tokenizer: PreTrainedTokenizerBase, images: Iterator[Piece]) -> list[Piece]:
        """See :class:`TurnTemplate`."""
        return [*self.header(turn.role, tokenizer), *_words(turn, images), _end(turn, self.end(tokenizer))]

    def header(self, role: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """See :class:`TurnTemplate`."""
        start, end = control_id(tokenizer, START_HEADER), control_id(tokenizer, END_HEADER)
        return [Piece([start]), Piece(role), Piece([end]), Piece("\n\n")]


@dataclass(frozen=True)
class VicunaTemplate(TurnTemplate):
    """LLaVA-1.5's format (``conv_vicuna_v1``), for tokenizers with ``<s>`` and ``</s>``.

    ``<s>SYSTEM USER: QUESTION ASSISTANT: ANSWER</s>USER: ...``: no space behind ``</s>``, and none at the end of a
    prompt, where the answer's first token begins with it. As in LLaVA, text behind an image or ``</s>`` is tokenized
    as a text of its own: LLaMA-2's tokenizer begins it with a space.
    """

    name: str = "vicuna_v1"

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """See :class:`Template`."""
        return control_id(tokenizer, "<s>")

    def end(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """See :class:`Template`."""
        return control_id(tokenizer, "</s>")

    def opening(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """See :class:`TurnTemplate`."""
        start = Piece([control_id(tokenizer, "<s>")])
        return [start] if turns[0].role == "system" else [start, Piece(VICUNA_SYSTEM + " ")]

    def turn(self, turn: Turn, tokenizer: PreTrainedTokenizerBase, images: Iterator[Piece]) -> list[Piece]:
        """See :class:`TurnTemplate`."""
        words = _words(turn, images)
        if turn.role == "system":
            return [*words, Piece(" ")]
        if turn.role == "user":
            return [*self.header("user", tokenizer), *([Piece(" "), *words] if words else [])]
        return [
            *self.header("assistant", tokenizer),
            Piece(" ", supervised=True),
            *words,
            _end(turn, self.end(tokenizer)),
        ]

    def header(self, role: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """See :class:`TurnTemplate`."""
        return [Piece("USER:" if role == "user" else " ASSISTANT:")]


@dataclass(frozen=True)
class ChatMlTemplate(TurnTemplate):
    """ChatML: ``<|im_start|>ROLE\\nTEXT<|im_end|>\\n``, without a token at the beginning.

    Attributes:
        system: what stands in the system turn of a sample that has none; None writes none.
    """

    name: str = "chatml"
    system: str | None = None

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """See :class:`Template`."""
        return None

    def end(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """See :class:`Template`. Qwen's ``eos_token`` is another one in its base models."""
        return control_id(tokenizer, "<|im_end|>")

    def opening(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """See :class:`TurnTemplate`."""
        if self.system is None or turns[0].role == "system":
            return []
        return self.turn(Turn("system", self.system), tokenizer, iter(()))

    def turn(self, turn: Turn, tokenizer: PreTrainedTokenizerBase, images: Iterator[Piece]) -> list[Piece]:
        """See :class:`TurnTemplate`."""
        return [
            *self.header(turn.role, tokenizer),
            *_words(turn, images),
            _end(turn, self.end(tokenizer)),
            Piece("\n"),
        ]

    def header(self, role: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """See :class:`TurnTemplate`."""
        return [Piece([control_id(tokenizer, "<|im_start|>")]), Piece(f"{role}\n")]


@dataclass(frozen=True)
class PlainTemplate(Template):
    """Pretraining on captions: the image, the caption, end of turn. The question is discarded.

    With LLaMA-3's control tokens where the tokenizer has them, otherwise with the tokenizer's own ``bos_token``, which
    may be absent, and ``eos_token``.
    """

    name: str = "plain"

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """See :class:`Template`."""
        found = find_token(tokenizer, BOS)
        return tokenizer.bos_token_id if found is None else found

    def end(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """See :class:`Template`."""
        found = find_token(tokenizer, EOT)
        end = tokenizer.eos_token_id if found is None else found
        if end is None:
            raise DataError(f"tokenizer {tokenizer_name(tokenizer)!r} has no eos_token; template plain ends with it")
        return end

    def blocks(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, images: Iterator[Piece]
    ) -> list[list[Piece]]:
        """See :class:`Template`. The turns are a question and a caption; in a prompt the question alone."""
        prompt = turns[-1].role == "user"
        if len(turns) != (1 if prompt else 2):
            expected = "a prompt is one user's turn" if prompt else "one question and one caption are expected"
            raise DataError(f"template plain: {expected}, found {len(turns)} turns")
        begin = self.begin(tokenizer)
        block = [*([] if begin is None else [Piece([begin])]), *images]
        if not prompt:
            block += [Piece(turns[1].text.strip(), supervised=True), Piece([self.end(tokenizer)], supervised=True)]
        return [block]


def _words(turn: Turn, images: Iterator[Piece]) -> list[Piece]:
    if turn.role == "user":
        return content(turn.text, images)
    return [Piece(turn.text.strip(), supervised=turn.role == "assistant")]


def _end(turn: Turn, token: int) -> Piece:
    return Piece([token], supervised=turn.role == "assistant")
