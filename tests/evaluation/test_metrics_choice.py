"""Letters, yes and no, read out of answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipvision_train.evaluation.choices import read_letter, right_option
from skipvision_train.evaluation.yes_no import label_of, read_mme, read_pope, says_yes_or_no

OPTIONS = ("a red ball", "ball", "two dogs", "none of them")


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("**B.** two", "B"),
        ("B) ball", "B"),
        ("B: ball", "B"),
        ("[B]", "B"),
        ("B\nbecause it is round", "B"),
        ("The answer is B", "B"),
        ("the answer is b.", "B"),
        ("The correct answer is (B).", "B"),
        ("Answer: B", "B"),
        ("I choose option B, since A is wrong", "B"),
        ("Perhaps the answer is A. No: the answer is B.", "B"),
        ("Option B is right", "B"),
        ("Answer: A\nExplanation: B is too small", "A"),
        ("Answer: B\nExplanation: C is too small", "B"),
        ("Answer: A\nThe sign shows it", "A"),
        ("The answer is B and not C", "B"),
        ("The answer is A because the car is painted so", "A"),
        ("The correct answer is A since option B is not visible", "A"),
        ("I choose option A because option B and option C are wrong", "A"),
        ("I choose option B because option A is wrong", "B"),
        ("The answer is A dog", None),
        ("Not A but B", "B"),
        ("It is A", "A"),
        ("A is correct", "A"),
        ("A red ball.", "A"),
        ("I see two dogs here", "C"),
        ("This is a red ball", "A"),  # "ball" stands inside of it
        ("a dog", None),
        ("The answer is a dog", None),
        ("A cat", None),
        ("(A) or (B)", "A"),  # begins with it
        ("Either (A) or (B)", None),
        ("ball and two dogs", None),
        ("E", None),
        ("(E)", None),
        ("", None),
        ("...", None),
        ("I don't know", None),
    ],
)
def test_letters(output, letter):
    assert read_letter(output, OPTIONS) == letter


def test_letters_without_options():
    assert [read_letter(text) for text in ("J", "K", "The answer is D.", "ball")] == ["J", None, "D", None]
    assert [read_letter(text) for text in ("I see a ball", "I like C here")] == [None, "C"]  # "I" is a word


@given(
    st.sampled_from("ABCD"),
    st.sampled_from(["{}", "({})", "{}.", "{}:", " {} ", "Answer: {}", "The answer is {}.", "the best option is ({})"]),
)
def test_every_form_reads_every_letter(letter, form):
    assert read_letter(form.format(letter), ("w1", "x1", "y1", "z1")) == letter


@pytest.mark.parametrize("output", ["Cats are nice", "Dad", "BAD", "C3PO", "don't", "vitamin-C-rich"])
def test_letters_inside_of_words_are_none(output):
    assert read_letter(output, ()) in (None, "C")
    if output != "vitamin-C-rich":
        assert read_letter(output, ()) is None


@pytest.mark.parametrize(
    ("answer", "choices", "letter_first", "index"),
    [
        ("B", OPTIONS, True, 1),
        ("(b)", OPTIONS, True, 1),
        ("two dogs", OPTIONS, True, 2),
        ("A", ("B", "A"), True, 0),
        ("A", ("B", "A"), False, 1),
        ("D", (), True, 3),
    ],
)
def test_right_options(answer, choices, letter_first, index):
    assert right_option(answer, choices, letter_first) == index


@pytest.mark.parametrize(("answer", "choices"), [("E", OPTIONS), ("dogs", OPTIONS), ("red", ())])
def test_right_options_that_are_none(answer, choices):
    with pytest.raises(ValueError, match="neither a letter from A to"):
        right_option(answer, choices, True)


@pytest.mark.parametrize(
    ("output", "pope", "mme", "said"),
    [
        ("Yes", "yes", "yes", True),
        ("yes, there is.", "yes", "yes", True),
        ("No.", "no", "no", True),
        ("NO", "no", "no", True),
        ("No, there is none", "no", "no", True),
        ("  n\n", "yes", "no", False),
        ("No\nthere is none", "no", "no", True),
        ("There is not. Yes!", "no", None, True),  # the first sentence decides
        ("I see one. No dog.", "yes", None, True),
        ("nothing", "yes", "no", False),  # MME: "no" within four characters
        ("Know", "yes", "no", False),
        ("y", "yes", "yes", False),
        ("N.", "yes", "no", False),
        ("x", "yes", None, False),
        ("A yes", "yes", None, True),  # "a ye"
        ("", "yes", None, False),
    ],
)
def test_yes_and_no(output, pope, mme, said):
    assert (read_pope(output), read_mme(output), says_yes_or_no(output)) == (pope, mme, said)


def test_labels():
    assert [label_of(text) for text in (" Yes.", "no")] == ["yes", "no"]
    with pytest.raises(ValueError, match="yes or no is expected"):
        label_of("maybe")
