"""The tokenizer's own chat template, with masks made by construction.

The template is rendered with a marker in place of every turn's text, once for every turn that is added: what stands
around the markers is the template's, and each rendering must begin with the one before. So the answers and the tokens
that end them are known before anything is tokenized, and a text of a user that spells a control token stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from skipvision_train.data.records import IMAGE_MARKER, Turn
from skipvision_train.data.templates.base import Template
from skipvision_train.data.templates.pieces import Piece, content, split_special, tokenizer_name
from skipvision_train.errors import DataError

DATE = "26 Jul 2024"
"""What templates that write today's date are given (LLaMA-3.1's own default): a sample is the same on every day."""

# Characters of a private use area: no template looks at them, and none writes them.
_MARK = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Slot:
    """Where the text of a turn stands."""

    turn: int


@dataclass(frozen=True)
class Outline:
    """How a template writes turns of these roles.

    Attributes:
        rendered: the whole rendering, with markers for the turns' texts.
        blocks: one per question and answer.
        end: the token that ends an answer, None without an answer.
    """

    rendered: str
    blocks: list[list[Piece | Slot]]
    end: int | None


_OUTLINES: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, tuple[str, ...]], Outline]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenizerTemplate(Template):
    """The tokenizer's own chat template.

    Refused are templates that write earlier turns differently when more follow, that leave out or change what was
    said, that write words of their own before an answer, no token behind it, or the date of the day.
    """

    name: str = "tokenizer"

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """See :class:`Template`. None if the template does not write the tokenizer's ``bos_token``."""
        first = _outline(tokenizer, ("user",)).blocks[0][0]
        writes_bos = isinstance(first, Piece) and first.content == [tokenizer.bos_token_id]
        return tokenizer.bos_token_id if writes_bos else None

    def end(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """See :class:`Template`. The first special token that the template writes behind an answer."""
        end = _outline(tokenizer, ("user", "assistant")).end
        assert end is not None
        return end

    def blocks(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, images: Iterator[Piece]
    ) -> list[list[Piece]]:
        """See :class:`Template`."""
        outline = _outline(tokenizer, tuple(turn.role for turn in turns))
        said = [
            content(turn.text, images) if turn.role == "user" else [Piece(turn.text.strip(), turn.role == "assistant")]
            for turn in turns
        ]
        _check_said(outline, turns, said, tokenizer)
        return [
            [piece for part in block for piece in (said[part.turn] if isinstance(part, Slot) else [part])]
            for block in outline.blocks
        ]


def _outline(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> Outline:
    """Kept per tokenizer: it depends on the roles alone, and rendering takes longer than tokenizing."""
    known = _OUTLINES.setdefault(tokenizer, {})
    key = (str(tokenizer.chat_template), roles)
    if key not in known:
        known[key] = _make_outline(tokenizer, roles)
    return known[key]


def _make_outline(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> Outline:
    messages = [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]
    blocks: list[list[Piece | Slot]] = []
    ends = set()
    done, slots = "", 0
    for index, role in enumerate(roles):
        if role != "user":
            continue
        opened = _render(messages[: index + 1], True, tokenizer)
        block = _parts(_behind(done, opened, index, tokenizer), range(slots, index + 1), tokenizer)
        done, slots = opened, index + 1
        if slots < len(roles):
            closed = _render(messages[: slots + 1], False, tokenizer)
            answer, end = _answer(_parts(_behind(opened, closed, slots, tokenizer), [slots], tokenizer), tokenizer)
            block += answer
            ends.add(end)
            done, slots = closed, slots + 1
        blocks.append(block)
    if len(ends) > 1:
        tokens = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(ends))))
        raise _refused(tokenizer, f"ends answers in different ways: {tokens}")
    return Outline(done, blocks, next(iter(ends), None))


def _render(messages: Sequence[dict[str, str]], prompt: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise DataError(f"tokenizer {tokenizer_name(tokenizer)!r} has no chat template; name another template")
    source = str(tokenizer.chat_template)
    if "strftime_now" in source and "date_string" not in source:
        raise _refused(tokenizer, "writes the date of the day, so that a sample would change from day to day")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, date_string=DATE
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"template tokenizer: {tokenizer_name(tokenizer)!r} cannot write the turns {roles}: {error}"
        ) from error
    return str(text)


def _behind(before: str, whole: str, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    if not whole.startswith(before):
        raise _refused(tokenizer, f"writes the turns before turn {index} differently once that turn follows")
    return whole[len(before) :]


def _parts(text: str, turns: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece | Slot]:
    """The template's own pieces, and the slots of just these turns in their order."""
    split = _MARK.split(text)
    if list(map(int, split[1::2])) != list(turns):
        raise _refused(tokenizer, f"does not write the text of turn {turns[-1]} once, behind what was said before")
    parts: list[Piece | Slot] = []
    for index, part in enumerate(split):
        if index % 2:
            parts.append(Slot(int(part)))
        else:
            parts.extend(split_special(part, tokenizer))
    return parts


def _answer(parts: Sequence[Piece | Slot], tokenizer: PreTrainedTokenizerBase) -> tuple[list[Piece | Slot], int]:
    """An answer's parts, supervised up to the first id behind its text, and that id."""
    result: list[Piece | Slot] = []
    spoken, end = False, None
    for part in parts:
        if isinstance(part, Slot):
            spoken = True
        elif not spoken and not (isinstance(part.content, str) and part.content.isspace()):
            raise _refused(tokenizer, f"writes {_shown(part, tokenizer)!r} between the prompt and the answer")
        elif end is None:
            part = Piece(part.content, supervised=True)
            if isinstance(part.content, list):
                end = part.content[0]
        result.append(part)
    if end is None:
        raise _refused(tokenizer, "writes no special token behind an answer, so that generation would not stop")
    return result, end


def _shown(piece: Piece, tokenizer: PreTrainedTokenizerBase) -> str:
    return piece.content if isinstance(piece.content, str) else str(tokenizer.convert_ids_to_tokens(piece.content[0]))


def _check_said(
    outline: Outline, turns: Sequence[Turn], said: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compare with a rendering of the real texts: some templates look into a text and cut parts of it out."""
    texts = ["".join(IMAGE_MARKER if p.is_image else str(p.content) for p in pieces) for pieces in said]
    expected = _MARK.sub(lambda match: texts[int(match[1])], outline.rendered)
    messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, texts, strict=True)]
    if _render(messages, turns[-1].role == "user", tokenizer) != expected:
        raise DataError(
            f"template tokenizer: the chat template of {tokenizer_name(tokenizer)!r} does not write the turns' texts "
            "as they are"
        )


def _refused(tokenizer: PreTrainedTokenizerBase, reason: str) -> DataError:
    return DataError(f"template tokenizer: the chat template of {tokenizer_name(tokenizer)!r} {reason}; name another")
