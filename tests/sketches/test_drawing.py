"""What is drawn is what the sketch says, read back from the pixels alone."""

import dataclasses
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from skipvision_train.sketches.drawing import draw
from skipvision_train.sketches.scenes import COLOURS, LETTERS, SHAPES, random_sketch

SIZE = 96


def sketches(family, count, seed=3):
    rng = random.Random(f"{seed}/{family}")
    return [random_sketch(rng, family) for _ in range(count)]


def pixels_of(sketch):
    return np.asarray(draw(sketch, SIZE), dtype=np.int64)


def ink(sketch):
    """(96, 96) bool: pixels that clearly differ from the paper."""
    return np.abs(pixels_of(sketch) - np.array(sketch.paper.tint)).max(-1) > 60


def nearest_colour(rgb):
    return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - rgb).sum())


def components(mask):
    """Number of 8-connected groups of at least 12 pixels, by flood fill."""
    left, found = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}, 0
    while left:
        frontier, size = [left.pop()], 0
        while frontier:
            y, x = frontier.pop()
            size += 1
            near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            hits = [place for place in near if place in left]
            left.difference_update(hits)
            frontier += hits
        found += size >= 12
    return found


def test_scene_shows_as_many_separate_objects_as_it_holds():
    counts = set()
    for scene in sketches("scene", 60):
        assert components(ink(scene)) == len(scene.objects), scene.key
        counts.add(len(scene.objects))
    assert counts == {1, 2, 3, 4, 5}


def test_object_has_its_colour_in_its_cell():
    for scene in sketches("scene", 60):
        image = pixels_of(scene)
        for placed in scene.objects:
            # A ring is empty in the middle; its band, about four pixels wide, is centred on 0.82 of the radius.
            ring = placed.shape == "ring"
            row, column = int(placed.y * SIZE), int((placed.x + 0.82 * placed.radius * ring) * SIZE)
            reach = 0 if ring else 1
            patch = image[row - 1 : row + 2, column - reach : column + reach + 1].reshape(-1, 3).mean(0)
            assert nearest_colour(patch) == placed.colour, (scene.key, placed)
            assert (int(placed.y * 3), int(placed.x * 3)) == (placed.row, placed.column)


def test_objects_stay_inside_their_cell():
    for scene in sketches("scene", 60):
        mask = ink(scene)
        filled = {(int(y) * 3 // SIZE, int(x) * 3 // SIZE) for y, x in zip(*np.nonzero(mask), strict=True)}
        assert filled == {(o.row, o.column) for o in scene.objects}, scene.key


def test_shapes_differ_in_how_they_fill_their_box():
    """Share of the bounding box that is inked, and whether its corners and its centre are: enough to tell all six."""
    seen = {}
    for scene in sketches("scene", 80):
        mask = ink(scene)
        for o in scene.objects:
            cell = mask[o.row * 32 : o.row * 32 + 32, o.column * 32 : o.column * 32 + 32]
            rows, columns = np.nonzero(cell.any(1))[0], np.nonzero(cell.any(0))[0]
            box = cell[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            height, width = box.shape
            corner = box[: height // 6 + 1, : width // 6 + 1].mean()
            centre = box[height // 2, width // 2]
            seen.setdefault(o.shape, []).append((box.mean(), corner, centre))
    assert set(seen) == set(SHAPES)
    average = {shape: np.array(rows, dtype=float).mean(0) for shape, rows in seen.items()}
    assert average["square"][0] > 0.9 > average["circle"][0] > 0.7
    assert average["ring"][2] == 0.0
    assert all(average[shape][2] == 1.0 for shape in SHAPES if shape != "ring")
    assert average["square"][1] > 0.8
    assert all(average[shape][1] < 0.4 for shape in SHAPES if shape != "square")
    assert average["star"][0] < average["triangle"][0] < average["circle"][0]
    assert average["cross"][0] < average["circle"][0]


def test_bar_is_as_high_in_pixels_as_the_chart_says():
    heights = set()
    for chart in sketches("chart", 40):
        image = pixels_of(chart)
        for bar in chart.bars:
            column = image[:, round((bar.left + bar.right) / 2 * SIZE)]
            own = np.abs(column - np.array(bar.rgb)).max(-1) < 45
            own[int(chart.base * SIZE) :] = False  # the name below the axis
            assert round(own.sum() / (chart.unit * SIZE)) == bar.height, chart.key
            heights.add(bar.height)
    assert heights == set(range(1, 7))


def glyph(letter, pixels, stroke):
    """Ink of one letter alone, (40, 40) in 0..1, centred."""
    image = Image.new("L", (40, 40), 0)
    font = ImageFont.load_default(size=pixels)
    ImageDraw.Draw(image).text((20, 20), letter, fill=255, font=font, anchor="mm", stroke_width=stroke)
    return np.asarray(image, dtype=float) / 255


def read_text(card):
    """The text of a card by matching every letter of the alphabet at every letter's place, three to a line."""
    grey = np.abs(pixels_of(card) - np.array(card.paper.tint)).max(-1).astype(float)
    padded = np.pad(grey, 20)
    templates = {letter: glyph(letter, round(card.size * SIZE), card.stroke) for letter in LETTERS}
    letters = ""
    for index in range(9):
        line, column = divmod(index, 3)
        x = round((card.x + column * card.pitch) * SIZE) + 20
        y = round((card.y + line * card.leading) * SIZE) + 20
        if y + 20 > padded.shape[0] or (padded[y - 14 : y + 14, x - 10 : x + 10] > 100).sum() < 10:
            break
        match = {name: agreement(padded, template, x, y) for name, template in templates.items()}
        letters += max(match, key=match.get)
    return letters


def agreement(grey, template, x, y):
    """Best correlation of a letter with the 28 columns around (x, y), give or take one pixel."""
    crops = (grey[y - 20 + dy : y + 20 + dy, x - 14 + dx : x + 14 + dx] for dx in (-1, 0, 1) for dy in (-1, 0, 1))
    return max(np.corrcoef(crop.ravel(), template[:, 6:34].ravel())[0, 1] for crop in crops)


def test_text_can_be_read_back_letter_by_letter():
    lengths = set()
    for card in sketches("text", 60):
        assert read_text(card) == card.text
        lengths.add(len(card.text))
    assert lengths == {3, 4, 5, 6}


@pytest.mark.parametrize("family", ["scene", "text", "chart"])
def test_drawing_is_a_pure_function_of_the_sketch(family):
    first, second = sketches(family, 2)
    assert draw(first, SIZE).tobytes() == draw(first, SIZE).tobytes()
    assert draw(first, SIZE).tobytes() != draw(second, SIZE).tobytes()
    assert draw(first, 64).size == (64, 64)
    noisier = dataclasses.replace(first, paper=dataclasses.replace(first.paper, noise_seed=first.paper.noise_seed ^ 1))
    assert draw(noisier, SIZE).tobytes() != draw(first, SIZE).tobytes()
