"""Draws a sketch: a pure function from a sketch and a size in pixels to an RGB image.

Shapes are drawn at twice the size and averaged down, so that edges are smooth. Letters are drawn with the font that
Pillow carries inside itself, so that no font of the system is needed.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from skipvision_train.sketches.scenes import MAX_HEIGHT, Chart, Placed, Scene, Sketch, TextCard

_GRID_GREY = (196, 196, 196)
_INK = (40, 40, 40)
_LEFT, _RIGHT = 0.12, 0.98  # the axis and the end of the grid lines of a chart, in fractions of the side


def draw(sketch: Sketch, size: int) -> Image.Image:
    """The picture of ``sketch``, RGB, ``size`` x ``size`` pixels, with its noise."""
    if isinstance(sketch, TextCard):
        image = Image.new("RGB", (size, size), sketch.paper.tint)
        _draw_text(ImageDraw.Draw(image), sketch, size)
    else:
        large = Image.new("RGB", (2 * size, 2 * size), sketch.paper.tint)
        pen = ImageDraw.Draw(large)
        if isinstance(sketch, Scene):
            for placed in sketch.objects:
                _draw_object(pen, placed, 2 * size)
        else:
            _draw_bars(pen, sketch, 2 * size)
        image = large.reduce(2)
        if isinstance(sketch, Chart):
            _draw_names(ImageDraw.Draw(image), sketch, size)
    return _with_noise(image, sketch.paper.noise, sketch.paper.noise_seed)


def _with_noise(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    """Add one grey value of noise per pixel, the same for the three channels."""
    pixels = np.asarray(image, dtype=np.float32)
    noise = np.random.default_rng(seed).standard_normal(pixels.shape[:2], dtype=np.float32) * deviation
    return Image.fromarray((pixels + noise[..., None]).round().clip(0, 255).astype(np.uint8))


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The ten corners of a five-pointed star that stands on two points."""
    corners = []
    for i in range(10):
        reach = radius if i % 2 == 0 else 0.42 * radius
        angle = math.pi * (i / 5 - 0.5)
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return corners


def _draw_object(pen: ImageDraw.ImageDraw, placed: Placed, size: int) -> None:
    x, y, r = placed.x * size, placed.y * size, placed.radius * size
    fill = placed.rgb
    if placed.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif placed.shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(1, round(0.36 * r)))
    elif placed.shape == "square":
        s = 0.88 * r
        pen.rectangle((x - s, y - s, x + s, y + s), fill=fill)
    elif placed.shape == "triangle":
        pen.polygon([(x, y - 1.1 * r), (x + 1.1 * r, y + 0.85 * r), (x - 1.1 * r, y + 0.85 * r)], fill=fill)
    elif placed.shape == "cross":
        arm = 0.3 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    elif placed.shape == "star":
        pen.polygon(_star(x, y, 1.15 * r), fill=fill)
    else:
        raise ValueError(f"no drawing for the shape {placed.shape!r}")


@functools.cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=pixels)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType, which its wheels contain"
    return font


def _draw_text(pen: ImageDraw.ImageDraw, card: TextCard, size: int) -> None:
    font = _font(round(card.size * size))
    stroke = round(card.stroke * size / 96)
    for letter, (x, y) in zip(card.text, card.centres(), strict=True):
        pen.text((x * size, y * size), letter, fill=card.rgb, font=font, anchor="mm", stroke_width=stroke)


def _draw_bars(pen: ImageDraw.ImageDraw, chart: Chart, size: int) -> None:
    line = max(1, size // 96)
    for level in range(1, MAX_HEIGHT + 1):
        y = (chart.base - level * chart.unit) * size
        pen.line((_LEFT * size, y, _RIGHT * size, y), fill=_GRID_GREY, width=line)
    for bar in chart.bars:
        top = (chart.base - bar.height * chart.unit) * size
        pen.rectangle((bar.left * size, top, bar.right * size, chart.base * size), fill=bar.rgb)
    pen.line((_LEFT * size, chart.base * size, _RIGHT * size, chart.base * size), fill=_INK, width=line)
    pen.line((_LEFT * size, 0.04 * size, _LEFT * size, chart.base * size), fill=_INK, width=line)


def _draw_names(pen: ImageDraw.ImageDraw, chart: Chart, size: int) -> None:
    names, numbers = _font(round(0.13 * size)), _font(round(0.09 * size))
    for bar in chart.bars:
        pen.text(((bar.left + bar.right) / 2 * size, 0.935 * size), bar.name, fill=_INK, font=names, anchor="mm")
    for level in range(1, MAX_HEIGHT + 1):
        y = (chart.base - level * chart.unit) * size
        pen.text((0.06 * size, y), str(level), fill=_INK, font=numbers, anchor="mm")
