"""Yes or no: how POPE and MME read an answer."""

from __future__ import annotations

from typing import Literal

Label = Literal["yes", "no"]

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "ocr",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's subtasks, in lower case."""

_MME_READS = 4


def label_of(answer: str) -> Label:
    """A record's right answer.

    Raises:
        ValueError: neither yes nor no.
    """
    label = answer.strip().rstrip(".").lower()
    if label == "yes":
        return "yes"
    if label == "no":
        return "no"
    raise ValueError(f"the answer is {answer!r:.80}; yes or no is expected")


def read_pope(output: str) -> Label:
    """POPE's rule: an answer whose first sentence holds "no" or "not" is a no, every other one is a yes.

    Its script knows "No" and "no" between spaces alone; here case and the kind of white space do not matter.
    """
    words = output.split(".")[0].replace(",", "").lower().split()
    return "no" if "no" in words or "not" in words else "yes"


def says_yes_or_no(output: str) -> bool:
    """Whether one of the two words is there at all, so that POPE's rule read something."""
    return not {"yes", "no", "not"}.isdisjoint(output.lower().replace(",", " ").replace(".", " ").split())


def read_mme(output: str) -> Label | None:
    """MME's rule: "y" or "n" alone, or "yes" or else "no" within the first four characters; periods do not count."""
    said = output.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said)  # type: ignore[return-value]
    start = said[:_MME_READS]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else None
