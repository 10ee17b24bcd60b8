"""How an image becomes square tiles: how many, which, and their pixels (``TilingConfig``)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from skipvision_train.data.images import fit_square, levels_of, normalise, padding_colour
from skipvision_train.data.resizing import bicubic, resize_lanczos
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


def draft_factor(width: int, height: int, tiling: TilingConfig, side: int) -> int:
    """By how much a JPEG may be decoded smaller (``load_image``): 1, 2, 4 or 8.

    The largest factor that leaves resizing to the tiles something to shrink, or nothing to do, in both directions, and
    that leaves the grid of tiles as it is. Arguments and errors as for ``tile_grid``.
    """
    columns, rows = tile_grid(width, height, tiling, side)
    for factor in (8, 4, 2):
        small = -(-width // factor), -(-height // factor)
        is_enough = small[0] >= columns * side and small[1] >= rows * side
        if tiling.mode != "aspect":
            is_enough = max(small) >= columns * side
        if is_enough and tile_grid(*small, tiling, side) == (columns, rows):
            return factor
    return 1


def to_tiles(image: Image.Image, vision: VisionConfig, tiling: TilingConfig, resizer: str = "auto") -> Tensor:
    """The tiles of one image: the global view first, then the local tiles in raster order.

    As the released Skip-Vision code makes them. ``none``: one view, as of ``to_pixels``. ``aspect``: the image is
    resized (bicubic) to the grid, and for the global view to one tile, both without padding. ``square``: the image,
    padded with the mean colour, is resized to the grid with Lanczos' filter, and the result (bicubic) to the global
    view.

    Args:
        image: of any size; other modes than RGB are converted as ``to_rgb`` does.
        vision: ``image_size`` (S), ``image_mean`` and ``image_std`` are used.
        tiling: see ``tile_grid``.
        resizer: see ``resizing.bicubic``.

    Returns:
        (``num_tiles``, 3, S, S) float32.

    Raises:
        DataError: see ``to_rgb``, ``fit_square`` and ``tile_grid``.
    """
    side, resize = vision.image_size, bicubic(resizer)
    columns, rows = tile_grid(*image.size, tiling, side)
    levels, colour = levels_of(image), padding_colour(vision)
    if tiling.mode == "none":
        return normalise([fit_square(levels, side, colour, resize)], vision)
    if tiling.mode == "square":
        whole = fit_square(levels, columns * side, colour, resize_lanczos)
        view = resize(whole, (side, side))
    else:
        whole = resize(levels, (rows * side, columns * side))
        view = resize(levels, (side, side))
    return normalise([view, *_cut(whole, columns, rows)], vision)


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
