"""Answers are right, alone and together; guessing from the words does not pay; splits are disjoint."""

import collections
import random

import pytest

from skipvision_train.sketches.questions import PHRASES, TASK_FAMILY, TASKS, ask, caption, conversation
from skipvision_train.sketches.scenes import (
    COLOURS,
    COLUMNS,
    FAMILIES,
    ROWS,
    SHAPES,
    SPLIT_BUCKETS,
    random_sketch,
    split_of,
    split_sketch,
)
from skipvision_train.sketches.writer import make_record

NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


def words(text):
    return text.replace("?", "").replace(",", "").split()


def right_answer(sketch, task, text):
    """The answer worked out from the question's words and the sketch's positions, without the generator's code."""
    said = words(text)
    if task == "text":
        return sketch.text
    if task == "bar":
        return {str(bar.height) for bar in sketch.bars if bar.name in said}.pop()
    shapes, colours = [w for w in said if w in SHAPES], [w for w in said if w in COLOURS]
    if task == "count":
        return next(word for word, number in NUMBER.items() if number == len(sketch.objects))
    if task == "existence":
        hits = [o for o in sketch.objects if o.shape in shapes and (not colours or o.colour in colours)]
        return "yes" if hits else "no"
    if task == "colour":
        return {o.colour for o in sketch.objects if o.shape in shapes}.pop()
    if task == "shape":
        return {o.shape for o in sketch.objects if o.colour in colours}.pop()
    first, second = shapes if text.startswith("Where") else reversed(shapes)
    a, b = (next(o for o in sketch.objects if o.shape == shape) for shape in (first, second))
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task):
    rng, seen = random.Random(task), set()
    for _ in range(150):
        sketch = random_sketch(rng, TASK_FAMILY[task])
        for question in ask(rng, sketch, task):
            assert question.answer == right_answer(sketch, task, question.text), (sketch.key, question)
            seen.add(question.text if task in ("count", "text") else question.answer)
    assert len(seen) >= 2


def test_tasks_ask_only_about_their_family():
    rng = random.Random(0)
    for family in FAMILIES:
        sketch = random_sketch(rng, family)
        assert [t for t in TASKS if TASK_FAMILY[t] != family and ask(rng, sketch, t)] == []


def test_relations_are_clear_by_a_wide_margin():
    rng = random.Random(4)
    for _ in range(150):
        scene = random_sketch(rng, "scene")
        for question in ask(rng, scene, "relation"):
            a, b = (next(o for o in scene.objects if o.shape == w) for w in words(question.text) if w in SHAPES)
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > 3 * min(abs(a.x - b.x), abs(a.y - b.y))


def test_questions_stand_alone_and_vary_in_wording():
    """No word points to another turn, and the answer follows from the sketch and the question alone."""
    rng, phrases = random.Random(5), collections.defaultdict(set)
    for _ in range(200):
        sketch = random_sketch(rng, rng.choice(FAMILIES))
        for question in conversation(rng, sketch):
            assert not {"it", "its", "that", "this", "other", "same", "also", "previous"} & set(words(question.text))
            assert question.answer == right_answer(sketch, question.task, question.text)
            phrases[question.task].add(words(question.text)[0])
    assert all(len(phrases[task]) == len(PHRASES[task]) for task in TASKS if task != "relation")


def test_turns_come_in_random_order():
    first = collections.Counter(
        conversation(r, random_sketch(r, "scene"))[0].task for r in map(random.Random, range(200))
    )
    assert set(first) == {"colour", "shape", "count", "relation", "existence"}
    assert max(first.values()) < 0.5 * sum(first.values())


@pytest.fixture(scope="module")
def heldout():
    return [make_record("heldout", index, seed=0)[1] for index in range(2800)]


def answers(records, task):
    rows = [r["conversations"] for r in records if r["task"] == task]
    return [(human["value"].removeprefix("<image>\n"), gpt["value"]) for human, gpt in rows]


# The share that always giving one answer would reach if answers were drawn evenly; 400 records per task, so that the
# most frequent of k even answers stays below 1/k + 4 standard deviations (at most 0.1).
CHANCE = {
    "colour": 1 / 6,
    "shape": 1 / 6,
    "count": 1 / 5,
    "relation": 1 / 4,
    "text": 0.0,
    "existence": 1 / 2,
    "bar": 1 / 6,
}


@pytest.mark.parametrize("task", TASKS)
def test_always_giving_the_most_frequent_answer_scores_at_chance(heldout, task):
    given = [answer for _, answer in answers(heldout, task)]
    assert len(given) == 400
    assert collections.Counter(given).most_common(1)[0][1] / 400 < CHANCE[task] + 0.1


@pytest.mark.parametrize("task", [t for t in TASKS if t != "text"])
def test_the_words_of_the_question_do_not_tell_the_answer(heldout, task):
    """The best rule "named things -> answer", learnt on one half of the records, scores near chance on the other."""

    def named(text):
        return tuple(w for w in words(text) if w in SHAPES or w in COLOURS or w in "ABCD")

    rows = answers(heldout, task)
    table = collections.defaultdict(collections.Counter)
    for text, answer in rows[:200]:
        table[named(text)][answer] += 1
    fallback = collections.Counter(a for _, a in rows[:200]).most_common(1)[0][0]
    hits = [
        answer == (table[named(text)] or {fallback: 1}).most_common(1)[0][0]
        for text, answer in rows[200:]
        if table[named(text)]
    ]
    assert len(hits) > 20
    assert sum(hits) / len(hits) < CHANCE[task] + 4 * (0.25 / len(hits)) ** 0.5


def test_heldout_charts_are_many_and_every_bars_heights_are_balanced(heldout):
    rows = answers(heldout, "bar")
    for name in "AB":
        heights = [answer for text, answer in rows if name in words(text)]
        assert collections.Counter(heights).most_common(1)[0][1] / len(heights) < 1 / 6 + 0.12
    charts = [make_record("heldout", index, seed=0)[0].key for index in range(TASKS.index("bar"), 2800, len(TASKS))]
    assert collections.Counter(charts).most_common(1)[0][1] <= 8


def test_kind_of_existence_question_does_not_tell_the_answer(heldout):
    """Questions about a shape alone and about a coloured shape are both right half of the time."""
    by_kind = collections.defaultdict(list)
    for text, answer in answers(heldout, "existence"):
        by_kind[any(w in COLOURS for w in words(text))].append(answer == "yes")
    assert len(by_kind) == 2
    for given in by_kind.values():
        assert abs(sum(given) / len(given) - 0.5) < 4 * (0.25 / len(given)) ** 0.5


def test_a_caption_names_everything_and_nothing_else():
    rng, styles = random.Random(8), set()
    for _ in range(200):
        scene = random_sketch(rng, "scene")
        style, _, rest = caption(rng, scene).rstrip(".").partition(": ")
        styles.add(style)
        parts = rest.split(", ")
        if style == "side":
            assert all(right_answer(scene, "relation", f"Where is {p}") == p.split()[2] for p in parts)
            continue
        assert NUMBER[parts[0]] == len(scene.objects)
        told = {frozenset(part.split()) for part in parts[1:]}
        assert told == {frozenset((o.shape, o.colour, ROWS[o.row], COLUMNS[o.column])) for o in scene.objects}
    assert styles == {"place", "shape", "colour", "side"}
    card, chart = random_sketch(rng, "text"), random_sketch(rng, "chart")
    assert caption(rng, card) == f'text "{card.text}".'
    assert caption(rng, chart) == "bars: " + ", ".join(f"{b.name} {b.height}" for b in chart.bars) + "."


@pytest.mark.parametrize("split", SPLIT_BUCKETS)
def test_a_sketch_belongs_to_one_split_whatever_its_drawing(split):
    rng = random.Random(split)
    for family in FAMILIES:
        assert split_of(split_sketch(rng, family, split)) == split


def test_every_bucket_belongs_to_one_split():
    assert sorted(b for buckets in SPLIT_BUCKETS.values() for b in buckets) == list(range(16))
