"""VQA accuracy: an answer against those of ten people, as the VQA challenge, TextVQA and VizWiz count it."""

from __future__ import annotations

import re
from collections.abc import Sequence

AGREEING = 3
"""So many of the other people must have given an answer for it to be fully right."""

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = frozenset({"a", "an", "the"})
_MARKS = ';/[]"{}()=+\\_-><@`,?!'

_SINGLE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
    "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
    "you'd you'll you're you've"
)
_SEVERAL = (
    "couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"
)


def _without_one_apostrophe(word: str) -> list[str]:
    places = [index for index, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


_CONTRACTIONS = {
    misspelt: word for word in f"{_SINGLE} {_SEVERAL}".split() for misspelt in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}  # the table of the challenge has this one the wrong way round

_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_AT_MOST = 32


def normalise_vqa(text: str) -> str:
    """An answer as the evaluation server compares it.

    In order: lower case; commas and question marks out; a space before 's; other punctuation out where a space is on
    either side of any of its kind, elsewhere a space in its place; periods out unless a digit follows; number words to
    ten as digits; articles out; apostrophes back into contractions. The server's quirks are kept, such as that only
    the first 32 periods go, because scores are compared with its scores.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = re.sub(r"[\n\t]", " ", text).strip()
    plain = text
    for mark in _MARKS:
        apart = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if apart else " ")
    plain = _PERIOD.sub("", plain, count=_PERIODS_AT_MOST)
    words = [_NUMBERS.get(word, word) for word in plain.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(output: str, answers: Sequence[str]) -> float:
    """In [0, 1]: the mean over the people, each left out once, of min(1, agreeing others / 3).

    Args:
        output: the model's answer.
        answers: one of each person; the challenge has ten.

    Raises:
        ValueError: too few answers for a full score.
    """
    if len(answers) <= AGREEING:
        raise ValueError(f"{len(answers)} answers; at least {AGREEING + 1}, the VQA challenge has 10")
    found = normalise_vqa(output)
    same = [normalise_vqa(answer) == found for answer in answers]
    agreeing = sum(same)
    return sum(min(1.0, (agreeing - own) / AGREEING) for own in same) / len(same)
