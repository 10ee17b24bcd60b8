"""What ``loader.py`` compares: photos, and ways from a JPEG file to the model's pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from skipvision_train.data.images import load_image, padding_colour
from skipvision_train.data.tiling import draft_factor, tile_grid, to_tiles
from skipvision_train.models.settings import TilingConfig, VisionConfig

SIZES = ((640, 480), (480, 640), (640, 427), (800, 600), (1024, 768), (1280, 720), (1920, 1080))
"""Of photos, as data sets have them: COCO's, and those of cameras and screens."""

SETTINGS = {
    "336": (VisionConfig(image_size=336), TilingConfig("none")),
    "448": (VisionConfig(image_size=448), TilingConfig("none")),
    "hd": (VisionConfig(image_size=336), TilingConfig("aspect", 4)),
}
"""LLaVA's input; CoS's; LLaVA-HD: up to four tiles of 336 by the image's aspect ratio, and the global view."""

DECODE = "decoding alone"
OURS = "ours"
BASE = "CLIPImageProcessor"
"""Of transformers 5: on torchvision. Speed is given in relation to it."""

SCENE = 2048


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        name: how the table calls it.
        run: a file to pixels, (tiles, 3, S, S) float32, or None where none are made.
    """

    name: str
    run: Callable[[Path], Tensor | None]


def write_photos(folder: Path, count: int, sizes: Sequence[tuple[int, int]], quality: int) -> list[Path]:
    """JPEG files with the statistics of photos: structure of every scale, hard edges, the noise of a sensor.

    Args:
        folder: where.
        count: files, of each size in turn.
        sizes: widths and heights.
        quality: of the JPEGs.
    """
    random = np.random.default_rng(0)
    scenes = [_scene(random) for _ in range(min(4, count))]
    files = []
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        scene = scenes[number % len(scenes)]
        top, left = random.integers(0, SCENE - height + 1), random.integers(0, SCENE - width + 1)
        noise = random.normal(0, 3, (height, width, 1)).astype(np.float32)
        levels = (scene[top : top + height, left : left + width] + noise).clip(0, 255).astype(np.uint8)
        files.append(folder / f"{number:04}_{width}x{height}.jpg")
        Image.fromarray(levels).save(files[-1], quality=quality)
    return files


def _scene(random: np.random.Generator) -> NDArray[np.float32]:
    """(SCENE, SCENE, 3) levels: noise of every octave, stronger the coarser, and a few plain rectangles."""
    scene = np.full((SCENE, SCENE, 3), 118, dtype=np.float32)
    for octave in range(2, 11):
        cells = Image.fromarray(random.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        grown = np.asarray(cells.resize((SCENE, SCENE), Image.Resampling.BICUBIC), dtype=np.float32)
        scene += (grown - 128) * 0.8 / 1.4 ** (octave - 2)
    for _ in range(60):
        left, top, width, height = random.integers(10, SCENE // 4, 4) * (4, 4, 1, 1)
        scene[top : top + height, left : left + width] += random.normal(0, 40, 3)
    return scene


def cases(setting: str) -> list[Case]:
    """The lines of a setting's table, decoding and ours first."""
    vision, tiling = SETTINGS[setting]
    processor = {
        kind: kind(
            size={"shortest_edge": vision.image_size},
            crop_size={"height": vision.image_size, "width": vision.image_size},
            image_mean=list(vision.image_mean),
            image_std=list(vision.image_std),
        )
        for kind in (CLIPImageProcessor, CLIPImageProcessorPil)
    }
    shrink = partial(draft_factor, tiling=tiling, side=vision.image_size)
    return [
        Case(DECODE, decode),
        Case(OURS, lambda file: to_tiles(load_image(file, file.name), vision, tiling)),
        Case("ours, resizer pillow", lambda file: to_tiles(load_image(file, file.name), vision, tiling, "pillow")),
        Case("ours, JPEG draft", lambda file: to_tiles(load_image(file, file.name, shrink), vision, tiling)),
        Case(BASE, partial(by_processor, processor[CLIPImageProcessor], vision, tiling)),
        Case("CLIPImageProcessorPil", partial(by_processor, processor[CLIPImageProcessorPil], vision, tiling)),
        Case("torchvision", partial(by_torchvision, vision, tiling)),
    ]


def decode(file: Path) -> None:
    """An RGB image, and nothing done with it."""
    load_image(file, file.name)


def by_processor(
    processor: CLIPImageProcessor | CLIPImageProcessorPil, vision: VisionConfig, tiling: TilingConfig, file: Path
) -> Tensor:
    """As LLaVA does: padded to a square, or cut into tiles, with Pillow; the rest by transformers' processor."""
    image, side = Image.open(file).convert("RGB"), vision.image_size
    if tiling.mode == "none":
        views = [_expand_to_square(image, padding_colour(vision))]
    else:
        columns, rows = tile_grid(*image.size, tiling, side)
        whole = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        boxes = [(c * side, r * side, (c + 1) * side, (r + 1) * side) for r in range(rows) for c in range(columns)]
        views = [image.resize((side, side), Image.Resampling.BICUBIC), *(whole.crop(box) for box in boxes)]
    pixels = processor(views, return_tensors="pt")["pixel_values"]
    assert isinstance(pixels, Tensor)
    return pixels


def _expand_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    width, height = image.size
    longest = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (longest, longest), colour)
    square.paste(image, ((longest - width) // 2, (longest - height) // 2))
    return square


def by_torchvision(vision: VisionConfig, tiling: TilingConfig, file: Path) -> Tensor:
    """Decoded by Pillow, all else with torchvision's functions for tensors of 8 bits."""
    pixels, side = tv.pil_to_tensor(Image.open(file).convert("RGB")), vision.image_size
    if tiling.mode == "none":
        height, width = pixels.shape[1:]
        across, down = max(height - width, 0), max(width - height, 0)
        borders = [across // 2, down // 2, across - across // 2, down - down // 2]
        views = _resize(tv.pad(pixels, borders, fill=list(padding_colour(vision))), side, side)[None]
    else:
        columns, rows = tile_grid(pixels.shape[2], pixels.shape[1], tiling, side)
        whole = _resize(pixels, rows * side, columns * side).unflatten(2, (columns, side)).unflatten(1, (rows, side))
        views = torch.cat([_resize(pixels, side, side)[None], whole.permute(1, 3, 0, 2, 4).flatten(0, 1)])
    return tv.normalize(tv.to_dtype(views, torch.float32, scale=True), list(vision.image_mean), list(vision.image_std))


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    return tv.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)


def difference(found: Tensor, expected: Tensor, vision: VisionConfig) -> tuple[float, float]:
    """Mean and largest difference of two (tiles, 3, S, S) in levels of 255."""
    levels = (found - expected).abs() * 255 * torch.tensor(vision.image_std)[:, None, None]
    return levels.mean().item(), levels.max().item()
