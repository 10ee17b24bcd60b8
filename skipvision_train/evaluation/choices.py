"""Multiple choice: which option an answer means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from skipvision_train.evaluation.metrics import normalise_answer

MOST_LETTERS = 10
"""A to J are letters of options where the record does not list its options."""

_STATED = re.compile(
    r"\b(?:answer|option|choice|choose|select|pick)\b(?:\s+(?:is|are|would be|should be))?"
    r"(?:\s+(?:the\s+)?(?:option|choice|letter|answer))?\s*[:=]?\s*[*\"'`(\[]*([A-Z])(?![A-Za-z'])",
    re.IGNORECASE,
)
_MENTIONED = re.compile(r"(?:option|choice)\s+[*\"'`(\[]*[A-Z]", re.IGNORECASE)
_NEXT_WORD = re.compile(r"[^\S\n]+([a-z]+)")
_JOINING = ("because", "since", "as", "and", "or", "but", "for", "which", "not")
_LEADING = re.compile(r"[*\"'`(\[]*([A-Z])(?:[*\"'`]*[.):,\]\n]|[*\"'`]+$)")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_ENDING = re.compile(r"(?<![A-Za-z0-9'])([A-Z])[\s.!*\"'`)\]]*$")
_PRAISED = re.compile(r"(?<![A-Za-z0-9'])([A-Z]) is (?:the )?(?:right|correct|best|answer)")
_ALONE = re.compile(r"(?<![A-Za-z0-9'])([A-Z])(?![A-Za-z0-9'])")


def read_letter(output: str, choices: Sequence[str] = ()) -> str | None:
    """The upper-case letter of the option that ``output`` names, or None.

    The first of these that finds one decides: the answer is nothing but a letter or an option's text; it begins with a
    marked letter ("B.", "(B)", "B: red"); it says "the answer is B" (the last time counts); one option's text alone
    occurs in it; one bracketed letter alone occurs in it, or one that "is right"; it ends with a capital letter; one
    alone occurs in it, where "A" and "I" are words.

    Args:
        output: the model's answer.
        choices: texts of the options in the order of their letters; without them A to J may be named.
    """
    letters = ascii_uppercase[: len(choices) or MOST_LETTERS]
    said = normalise_answer(output)
    options = [normalise_answer(choice) for choice in choices]
    if len(said) == 1 and said.upper() in letters:
        return said.upper()
    if said and said in options:
        return letters[options.index(said)]
    if (leading := _LEADING.match(output.strip())) and leading[1] in letters:
        return leading[1]
    stated = [letter for letter in _stated(output) if letter in letters]
    if stated:
        return stated[-1]
    return _named_option(said, options, letters) or _single(output, letters)


def _stated(output: str) -> list[str]:
    """Letters behind "the answer is" and the like. Small ones count in brackets or at the end alone: "a" is a word.

    "A" and "I" are words before a small word ("A dog") that does not join sentences ("A because"). "Option B is small"
    speaks of an option and chooses none.
    """
    found = []
    for match in _STATED.finditer(output):
        follows = _NEXT_WORD.match(output, match.end(1))
        is_word = match[1].upper() in "AI" and follows and follows[1] not in _JOINING
        if is_word or (follows and _MENTIONED.fullmatch(match[0])):
            continue
        before, after = output[match.start(1) - 1], output[match.end(1) :].strip(" .*\"'`")
        if match[1].isupper() or before in "([" or not after:
            found.append(match[1].upper())
    return found


def _named_option(said: str, options: Sequence[str], letters: str) -> str | None:
    """The letter of the one option that occurs as whole words; an option inside of a longer one that occurs is none."""
    found = [o for o in options if o and re.search(rf"(?<!\w){re.escape(o)}(?!\w)", said)]
    outer = [o for o in found if not any(o != other and o in other for other in found)]
    return letters[options.index(outer[0])] if len(set(outer)) == 1 and options.count(outer[0]) == 1 else None


def _single(output: str, letters: str) -> str | None:
    bracketed = {letter for letter in _BRACKETED.findall(output) if letter in letters}
    if bracketed:
        return bracketed.pop() if len(bracketed) == 1 else None
    for pattern, words in ((_PRAISED, ""), (_ENDING, ""), (_ALONE, "AI")):
        found = {letter for letter in pattern.findall(output) if letter in letters and letter not in words}
        if len(found) == 1:
            return found.pop()
    return None


def right_option(answer: str, choices: Sequence[str], letter_first: bool) -> int:
    """Index of the option that the right answer of a record names by its letter or its text.

    Args:
        answer: of the record.
        choices: texts of the options; none if the record does not list them.
        letter_first: what counts if both would do, as for options whose texts are letters.

    Raises:
        ValueError: it names none.
    """
    letters, said = ascii_uppercase[: len(choices) or MOST_LETTERS], answer.strip()
    by_text = next((index for index, choice in enumerate(choices) if choice.strip() == said), None)
    bare = normalise_answer(answer).upper()
    by_letter = letters.index(bare) if len(bare) == 1 and bare in letters else None
    found = (by_letter, by_text) if letter_first else (by_text, by_letter)
    for index in found:
        if index is not None:
            return index
    raise ValueError(f"the answer {answer!r:.80} is neither a letter from A to {letters[-1]} nor one of 'choices'")
