"""What a sketch shows: the three families of images as plain data, drawn at random from a seeded generator.

A sketch holds everything that its picture depends on, so that drawing is a pure function of it. Lengths and positions
are fractions of the side of the square canvas; x grows to the right, y grows downwards.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 60),
    "blue": (38, 84, 220),
    "yellow": (240, 196, 25),
    "purple": (150, 50, 190),
    "black": (28, 28, 30),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
MAX_OBJECTS = 5
LETTERS = "ACEHJKLPTUXZ"
MIN_LETTERS, MAX_LETTERS = 3, 6
LINE_LENGTH = 3
BAR_NAMES = "ABCD"
MIN_BARS = 2
MAX_HEIGHT = 6
FAMILIES = ("scene", "text", "chart")

# Share of the scenes that each split draws from, out of 16 buckets of a hash: no scene can stand in two splits.
SPLIT_BUCKETS = {"heldout": range(2), "sft": range(2, 9), "pretrain": range(9, 16)}


@dataclass(frozen=True)
class Paper:
    """The background: ``tint`` RGB in 0..255, ``noise`` standard deviation in grey levels, ``noise_seed`` its seed."""

    tint: tuple[int, int, int]
    noise: float
    noise_seed: int


@dataclass(frozen=True)
class Placed:
    """One object of a scene: names, grid cell (0..8 in raster order), centre, radius, and the RGB it is filled with."""

    shape: str
    colour: str
    cell: int
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def row(self) -> int:
        """Row of the grid, 0 at the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """Column of the grid, 0 at the left."""
        return self.cell % 3

    @property
    def place(self) -> str:
        """The cell in words, for example ``top left``."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """One to five objects in different cells, in raster order; no shape and no colour occurs twice."""

    paper: Paper
    objects: tuple[Placed, ...]

    @property
    def key(self) -> str:
        """What is shown, without the details of the drawing; equal keys never stand in two splits."""
        return "scene " + ", ".join(f"{o.cell} {o.colour} {o.shape}" for o in self.objects)


@dataclass(frozen=True)
class TextCard:
    """Three to six large letters, three to a line: ``x`` and ``y`` of the first letter's centre.

    ``pitch`` is the distance of two letters of a line, ``leading`` that of two lines, ``size`` the font's size;
    ``stroke`` thickens the letters, in 96ths of the canvas.
    """

    paper: Paper
    text: str
    x: float
    y: float
    pitch: float
    leading: float
    size: float
    stroke: int
    rgb: tuple[int, int, int]

    def centres(self) -> list[tuple[float, float]]:
        """The centre of every letter."""
        places = [(index % LINE_LENGTH, index // LINE_LENGTH) for index in range(len(self.text))]
        return [(self.x + column * self.pitch, self.y + line * self.leading) for column, line in places]

    @property
    def key(self) -> str:
        """What is shown, without the details of the drawing; equal keys never stand in two splits."""
        return f"text {self.text}"


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: its name, its height in grid lines, its colour, its edges, and its RGB."""

    name: str
    height: int
    colour: str
    left: float
    right: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Chart:
    """A bar chart with a grid line per unit: ``base`` is the y of height 0, ``unit`` the distance of two grid lines."""

    paper: Paper
    bars: tuple[Bar, ...]
    base: float
    unit: float

    @property
    def key(self) -> str:
        """What is shown, without the details of the drawing; equal keys never stand in two splits."""
        # Heights alone give 36 charts of two bars: far too few for a split of an eighth to be balanced.
        return "chart " + ", ".join(f"{b.name} {b.height} {b.colour}" for b in self.bars)


Sketch = Scene | TextCard | Chart


def random_sketch(rng: random.Random, family: str) -> Sketch:
    """A random sketch of ``family``: ``scene``, ``text`` or ``chart``."""
    if family == "scene":
        return _random_scene(rng)
    return _random_text(rng) if family == "text" else _random_chart(rng)


def split_sketch(rng: random.Random, family: str, split: str) -> Sketch:
    """A random sketch of ``family`` that belongs to ``split``: a hash of its key decides, so splits are disjoint."""
    while True:
        sketch = random_sketch(rng, family)
        if split_of(sketch) == split:
            return sketch


def split_of(sketch: Sketch) -> str:
    """The one split that may show this sketch."""
    bucket = hashlib.sha256(sketch.key.encode()).digest()[0] % 16
    return next(name for name, buckets in SPLIT_BUCKETS.items() if bucket in buckets)


def _paper(rng: random.Random) -> Paper:
    tint = (rng.randint(226, 255), rng.randint(226, 255), rng.randint(226, 255))
    return Paper(tint, rng.uniform(1.0, 5.0), rng.getrandbits(32))


def _vary(rng: random.Random, colour: str, amount: int = 14) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-amount, amount))) for c in COLOURS[colour])
    return r, g, b


def _random_scene(rng: random.Random) -> Scene:
    count = rng.randint(1, MAX_OBJECTS)
    cells = sorted(rng.sample(range(9), count))
    shapes = rng.sample(SHAPES, count)
    colours = rng.sample(list(COLOURS), count)
    objects = []
    for cell, shape, colour in zip(cells, shapes, colours, strict=True):
        x = (cell % 3 + 0.5) / 3 + rng.uniform(-0.03, 0.03)
        y = (cell // 3 + 0.5) / 3 + rng.uniform(-0.03, 0.03)
        objects.append(Placed(shape, colour, cell, x, y, rng.uniform(0.105, 0.13), _vary(rng, colour)))
    return Scene(_paper(rng), tuple(objects))


def _random_text(rng: random.Random) -> TextCard:
    length = rng.randint(MIN_LETTERS, MAX_LETTERS)
    text = "".join(rng.choice(LETTERS) for _ in range(length))
    lines = -(-length // LINE_LENGTH)
    top = rng.randint(0, 3 - lines)  # row of the 3 x 3 grid on which the first line stands
    return TextCard(
        paper=_paper(rng),
        text=text,
        x=1 / 6 + rng.uniform(-0.02, 0.02),
        y=(top + 0.5) / 3 + rng.uniform(-0.02, 0.02),
        pitch=rng.uniform(0.325, 0.340),
        leading=rng.uniform(0.325, 0.340),
        size=rng.uniform(0.29, 0.35),
        stroke=rng.randint(0, 2),
        rgb=_vary(rng, rng.choice(("black", "blue", "red", "purple"))),
    )


def _random_chart(rng: random.Random) -> Chart:
    count = rng.randint(MIN_BARS, len(BAR_NAMES))
    colours = rng.sample(list(COLOURS), count)
    pitch = 0.84 / count * rng.uniform(0.9, 1.0)
    width = pitch * rng.uniform(0.5, 0.7)
    start = 0.12 + rng.uniform(0.0, 0.04)
    bars = []
    for index, colour in enumerate(colours):
        left = start + index * pitch + (pitch - width) / 2
        height = rng.randint(1, MAX_HEIGHT)
        bars.append(Bar(BAR_NAMES[index], height, colour, left, left + width, _vary(rng, colour)))
    return Chart(_paper(rng), tuple(bars), base=0.84 + rng.uniform(-0.015, 0.015), unit=rng.uniform(0.118, 0.128))
