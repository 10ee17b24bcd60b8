"""What is said about a sketch: its caption, and questions of seven tasks with short answers.

Every question stands alone: it names what it asks about and leans on no other turn. For every task the right answers
are equally likely, also once the question is known, so that guessing from the words scores at chance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from skipvision_train.sketches.scenes import COLOURS, SHAPES, Chart, Placed, Scene, Sketch, TextCard

TASKS = ("colour", "shape", "count", "relation", "text", "existence", "bar")
TASK_FAMILY = dict.fromkeys(TASKS, "scene") | {"text": "text", "bar": "chart"}
NUMBERS = ("one", "two", "three", "four", "five")
SCENE_TURNS = (("colour", 2), ("shape", 2), ("count", 1), ("relation", 2), ("existence", 2))
CAPTION_REQUESTS = ("Describe the image.", "What does the image show?", "Write down what you see.")

PHRASES = {
    "colour": ("What colour is the {a}?", "Which colour does the {a} have?"),
    "shape": ("What shape is the {a} object?", "Which shape does the {a} object have?"),
    "count": ("How many objects are there?", "What is the number of objects?"),
    "relation": ("Where is the {a}, seen from the {b}?", "On which side of the {b} is the {a}?"),
    "text": ("What does the text say?", "Which letters are written here?"),
    "existence": ("Is there a {a}?", "Does the image show a {a}?"),
    "bar": ("How tall is bar {a}?", "What is the height of bar {a}?"),
}


@dataclass(frozen=True)
class Question:
    """One question about one sketch with its only right answer."""

    task: str
    text: str
    answer: str


def caption(rng: random.Random, sketch: Sketch) -> str:
    """One line that names everything visible, in an order that its first words fix.

    A scene is listed by place (raster order), by shape, by colour (each in its fixed order) or by side; ``rng``
    chooses. Because the order is fixed, every word but the first can be told from the image, and because three of the
    lists name objects by what they are, a model learns to find an object by its shape or its colour.
    """
    if isinstance(sketch, TextCard):
        return f'text "{sketch.text}".'
    if isinstance(sketch, Chart):
        return "bars: " + ", ".join(f"{bar.name} {bar.height}" for bar in sketch.bars) + "."
    styles = ["place", "shape", "colour"] + ["side"] * bool(_relations(sketch))
    style = rng.choice(styles)
    return f"{style}: " + ", ".join(_listed(sketch, style)) + "."


def _listed(scene: Scene, style: str) -> list[str]:
    if style == "place":
        objects = [f"{o.place} {o.colour} {o.shape}" for o in scene.objects]
    elif style == "shape":
        by_shape = sorted(scene.objects, key=lambda o: SHAPES.index(o.shape))
        objects = [f"{o.shape} {o.colour} {o.place}" for o in by_shape]
    elif style == "colour":
        by_colour = sorted(scene.objects, key=lambda o: list(COLOURS).index(o.colour))
        objects = [f"{o.colour} {o.shape} {o.place}" for o in by_colour]
    else:
        pairs = sorted(_relations(scene), key=lambda p: (SHAPES.index(p[0].shape), SHAPES.index(p[1].shape)))
        return [f"{a.shape} {b.shape} {side}" for a, b, side in pairs]
    return [NUMBERS[len(objects) - 1], *objects]


def _phrase(rng: random.Random, task: str, answer: str, **names: str) -> Question:
    return Question(task, rng.choice(PHRASES[task]).format(**names), answer)


def _relations(scene: Scene) -> list[tuple[Placed, Placed, str]]:
    """Ordered pairs that share a row or a column, with the side on which the first stands, seen from the second."""
    pairs = []
    for a in scene.objects:
        for b in scene.objects:
            if a.row == b.row and a.column != b.column:
                pairs.append((a, b, "left" if a.column < b.column else "right"))
            elif a.column == b.column and a.row != b.row:
                pairs.append((a, b, "above" if a.row < b.row else "below"))
    return pairs


def _existence(rng: random.Random, scene: Scene) -> list[Question]:
    """One question about a shape and one about a colour with a shape, each with a fair coin for its answer."""
    there = {o.shape: o.colour for o in scene.objects}
    questions = []
    if len(there) < len(SHAPES):
        yes = rng.random() < 0.5
        shape = rng.choice([s for s in SHAPES if (s in there) == yes])
        questions.append(_phrase(rng, "existence", "yes" if yes else "no", a=shape))
    shape = rng.choice(list(there))
    yes = rng.random() < 0.5
    colour = there[shape] if yes else rng.choice([c for c in COLOURS if c != there[shape]])
    questions.append(_phrase(rng, "existence", "yes" if yes else "no", a=f"{colour} {shape}"))
    return questions


def ask(rng: random.Random, sketch: Sketch, task: str) -> list[Question]:
    """All questions of ``task`` about ``sketch``, in random order; empty where the sketch has none."""
    questions: list[Question] = []
    if isinstance(sketch, TextCard) and task == "text":
        questions = [_phrase(rng, task, sketch.text)]
    elif isinstance(sketch, Chart) and task == "bar":
        questions = [_phrase(rng, task, str(bar.height), a=bar.name) for bar in sketch.bars]
    elif isinstance(sketch, Scene):
        if task == "colour":
            questions = [_phrase(rng, task, o.colour, a=o.shape) for o in sketch.objects]
        elif task == "shape":
            questions = [_phrase(rng, task, o.shape, a=o.colour) for o in sketch.objects]
        elif task == "count":
            questions = [_phrase(rng, task, NUMBERS[len(sketch.objects) - 1])]
        elif task == "relation":
            questions = [_phrase(rng, task, side, a=a.shape, b=b.shape) for a, b, side in _relations(sketch)]
        elif task == "existence":
            questions = _existence(rng, sketch)
    rng.shuffle(questions)
    return questions


def conversation(rng: random.Random, sketch: Sketch) -> list[Question]:
    """Several questions about one sketch, in random order: the turns of one record for instruction tuning."""
    if isinstance(sketch, TextCard):
        return ask(rng, sketch, "text")
    if isinstance(sketch, Chart):
        return ask(rng, sketch, "bar")
    turns = [question for task, most in SCENE_TURNS for question in ask(rng, sketch, task)[:most]]
    rng.shuffle(turns)
    return turns
