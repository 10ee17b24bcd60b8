"""How an image becomes square tiles: how many, which, and their pixels (``TilingConfig``)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from skipvision_train.data.images import fit_square, normalise, padding_colour, to_rgb
from skipvision_train.errors import DataError
from skipvision_train.models.settings import TilingConfig, VisionConfig


def tile_grid(width: int, height: int, tiling: TilingConfig, side: int) -> tuple[int, int]:
    """Columns and rows of the local tiles of an image.

    ``aspect`` is the rule of InternVL's ``dynamic_preprocess``, in floats as there: of all grids of at most
    ``max_tiles`` tiles the one whose aspect ratio is closest to the image's; of several equally close ones the largest
    whose area the image fills by more than half, or else the smallest.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        tiling: mode and largest number of tiles.
        side: pixels per side of a tile.

    Returns:
        (1, 1) for mode ``none``, where the only tile is the global view.

    Raises:
        DataError: the image has no pixel.
    """
    if min(width, height) < 1:
        raise DataError(f"an image of {width} x {height} pixels; it needs at least one")
    if tiling.mode == "none":
        return 1, 1
    if tiling.mode == "square":
        per_side = math.isqrt(tiling.max_tiles)
        return per_side, per_side
    best, smallest = (1, 1), math.inf
    for columns, rows in _grids(tiling.max_tiles):
        difference = abs(width / height - columns / rows)
        is_filled = width * height > 0.5 * side * side * columns * rows
        if difference < smallest or (difference == smallest and is_filled):
            best, smallest = (columns, rows), difference
    return best


def num_tiles(width: int, height: int, tiling: TilingConfig, side: int) -> int:
    """How many tiles an image has, the global view included; arguments and errors as for ``tile_grid``.

    Unlike InternVL's, an image of one local tile has a global view too (methods.md, section 2: the released Skip-Vision
    code always adds it).
    """
    columns, rows = tile_grid(width, height, tiling, side)
    return 1 if tiling.mode == "none" else 1 + columns * rows


def to_tiles(image: Image.Image, vision: VisionConfig, tiling: TilingConfig) -> Tensor:
    """The tiles of one image: the global view first, then the local tiles in raster order.

    As the released Skip-Vision code makes them. ``none``: one view, as of ``to_pixels``. ``aspect``: the image is
    resized (bicubic) to the grid, and for the global view to one tile, both without padding. ``square``: the image,
    padded with the mean colour, is resized to the grid with Lanczos' filter, and the result (bicubic) to the global
    view.

    Args:
        image: of any size; other modes than RGB are converted as ``to_rgb`` does.
        vision: ``image_size`` (S), ``image_mean`` and ``image_std`` are used.
        tiling: see ``tile_grid``.

    Returns:
        (``num_tiles``, 3, S, S) float32.

    Raises:
        DataError: see ``to_rgb``, ``fit_square`` and ``tile_grid``.
    """
    side = vision.image_size
    columns, rows = tile_grid(*image.size, tiling, side)
    rgb, colour = to_rgb(image), padding_colour(vision)
    if tiling.mode == "none":
        return normalise([np.asarray(fit_square(rgb, side, colour))], vision)
    if tiling.mode == "square":
        whole = fit_square(rgb, columns * side, colour, Image.Resampling.LANCZOS)
        view = whole.resize((side, side), Image.Resampling.BICUBIC)
    else:
        whole = rgb.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        view = rgb.resize((side, side), Image.Resampling.BICUBIC)
    return normalise([np.asarray(view), *_cut(np.asarray(whole), columns, rows)], vision)


@lru_cache
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of at most ``max_tiles`` tiles, by number of tiles.

    The order of grids of equally many tiles decides nothing, because two of them are never both the closest: with a > c
    in a x b and c x d, (a - 1) x b has fewer tiles and an aspect ratio between theirs.
    """
    every = ((columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1))
    return tuple(sorted(every, key=math.prod))


def _cut(levels: NDArray[np.uint8], columns: int, rows: int) -> list[NDArray[np.uint8]]:
    """Tiles in raster order, views of ``levels`` (rows * S, columns * S, 3)."""
    return [tile for row in np.split(levels, rows) for tile in np.split(row, columns, axis=1)]
