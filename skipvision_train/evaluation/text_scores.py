"""Answers as texts and numbers: edit distance (DocVQA), numbers within 5 % (ChartQA), an answer inside (OCRBench)."""

from __future__ import annotations

import math
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
TOLERANCE = 0.05

FORMULAS = "Handwritten Mathematical Expression Recognition"
"""The category of OCRBench that is compared without spaces and with case."""


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions of characters."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls(output: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity, for one question: in [0, 1], of the best answer; 0 below one half.

    Case and runs of white space do not count. As in the script of the DocVQA challenge the distance is divided by the
    length of the longer text as it was given, and one half itself is a score.
    """
    best = 0.0
    for answer in answers:
        longer = max(len(answer.upper()), len(output.upper()))
        distance = edit_distance(" ".join(answer.lower().split()), " ".join(output.lower().split()))
        best = max(best, 1.0 - distance / longer if longer else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def number(text: str) -> float | None:
    """The finite number that a text is, "5%" as 0.05; None for any other text."""
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def relaxed_match(output: str, answer: str) -> bool:
    """ChartQA's relaxed accuracy for one question: numbers within 5 % of the right one, other texts but for case.

    A right answer of zero has no 5 %: it is compared as a text.
    """
    output, answer = output.strip(), answer.strip()
    found, right = number(output), number(answer)
    if found is not None and right:
        return abs(found - right) / abs(right) <= TOLERANCE
    return output.lower() == answer.lower()


def contains_answer(output: str, answers: Sequence[str], category: str | None = None) -> bool:
    """OCRBench: one of the answers stands in the output, line breaks as spaces, case aside.

    Of handwritten formulas (:data:`FORMULAS`) case counts and spaces do not.
    """
    said = _formula(output) if category == FORMULAS else _line(output)
    return any((_formula(answer) if category == FORMULAS else _line(answer)) in said for answer in answers)


def _line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", "").replace(" ", "")
