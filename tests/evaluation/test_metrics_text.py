"""VQA accuracy, ANLS, relaxed accuracy and OCRBench's rule against values worked out by hand."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipvision_train.evaluation.text_scores import (
    FORMULAS,
    anls,
    contains_answer,
    edit_distance,
    number,
    relaxed_match,
)
from skipvision_train.evaluation.vqa import normalise_vqa, vqa_accuracy


@pytest.mark.parametrize(
    ("raw", "normalised"),
    [
        ("The Red Ball.", "red ball"),
        ("none", "0"),
        ("Ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("dog's bed", "dog 's bed"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("U.S.", "us"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("a - b-c", "bc"),  # one hyphen beside a space: all hyphens go without leaving one, and "a" is an article
        ("yes,\nit is?", "yes it is"),
        ("$5", "$5"),
        ("an", ""),
        ("." * 40 + "x", "." * 8 + "x"),  # the server takes away 32 periods
    ],
)
def test_vqa_normalisation(raw, normalised):
    assert normalise_vqa(raw) == normalised


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten(agreeing, score):
    """Three agree: who is one of them leaves two others (3 x 2/3), who is not leaves three (7 x 1), so 0.9."""
    answers = ["Two."] * agreeing + ["red"] * (10 - agreeing)
    assert vqa_accuracy("the 2", answers) == pytest.approx(score)


@given(st.lists(st.sampled_from(["yes", "Yes.", "no", "a no", "2", "two"]), min_size=4, max_size=12), st.randoms())
def test_vqa_accuracy_does_not_depend_on_the_order(answers, random):
    mixed = random.sample(answers, len(answers))
    assert vqa_accuracy("two", mixed) == pytest.approx(vqa_accuracy("2", answers))
    others = [[a for j, a in enumerate(answers) if j != i] for i in range(len(answers))]
    slow = [min(1, sum(a in ("2", "two") for a in rest) / 3) for rest in others]
    assert vqa_accuracy("2", answers) == pytest.approx(sum(slow) / len(slow))


def test_vqa_needs_people():
    with pytest.raises(ValueError, match="3 answers; at least 4"):
        vqa_accuracy("x", ["x"] * 3)


@cache
def slow_distance(a, b):
    """By definition."""
    if not a or not b:
        return len(a) + len(b)
    same = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(same, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance(first, second):
    assert edit_distance(first, second) == slow_distance(first, second) == edit_distance(second, first)


@pytest.mark.parametrize(
    ("output", "answers", "score"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5),  # one half itself counts
        ("abcd", ["axyz"], 0.0),
        ("Hello  World", ["hello world"], 1.0),
        ("nothing", ["sitting", "nothink"], 1 - 1 / 7),
        ("", ["abc"], 0.0),
        ("", [""], 1.0),
        ("a b  c", ["a b d"], 1 - 1 / 6),  # divided by the length as it was given
    ],
)
def test_anls(output, answers, score):
    assert anls(output, answers) == pytest.approx(score)


@given(st.text("abc ", max_size=8), st.lists(st.text("abc ", max_size=8), min_size=1, max_size=3))
def test_anls_is_the_best_answers(output, answers):
    assert anls(output, answers) == max(anls(output, [answer]) for answer in answers)
    assert anls(output, [*answers, output.upper()]) == 1
    assert 0 <= anls(output, answers) <= 1


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("105", "100", True),
        ("94.9", "100", False),
        ("-105", "-100", True),
        ("-100", "100", False),
        ("5%", "0.05", True),
        ("5.3%", "5%", False),
        ("5", "5%", False),
        ("0", "0", True),
        ("0.0", "0", False),  # no 5 % of nothing: texts
        ("0.01", "0", False),
        ("Yes", "yes ", True),
        ("yes it is", "yes", False),
        ("2005", "2010", True),  # the published rule, of years too
        ("inf", "inf", True),
        ("nan", "5", False),
        ("$100", "100", False),
    ],
)
def test_relaxed(output, answer, right):
    assert relaxed_match(output, answer) is right


@given(st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-3), st.floats(0.8, 1.2))
def test_relaxed_is_five_per_cent(value, factor):
    if abs(abs(factor - 1) - 0.05) > 1e-6:
        assert relaxed_match(repr(value * factor), repr(value)) == (abs(factor - 1) < 0.05)


def test_numbers():
    assert [number(text) for text in ("1e3", "7%", "%", "five", "nan", "inf")] == [1000, 0.07, None, None, None, None]


@pytest.mark.parametrize(
    ("output", "answers", "category", "right"),
    [
        ("It says OPEN today", ["open"], None, True),
        ("op en", ["open"], None, False),
        ("two\nlines", ["Two Lines"], "Regular Text Recognition", True),
        ("nothing", ["some", "thing"], None, True),
        (r"\frac { a } { b }", [r"\frac{a}{b}"], FORMULAS, True),
        ("x ^ 2 \n + 1", ["x^2+1"], FORMULAS, True),
        ("X", ["x"], FORMULAS, False),
        ("X", ["x"], "Digit String Recognition", True),
    ],
)
def test_ocrbench(output, answers, category, right):
    assert contains_answer(output, answers, category) is right
