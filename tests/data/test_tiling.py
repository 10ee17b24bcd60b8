"""The grid of an image against a brute force, and tiles against resizing the whole image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision_train.data import images
from skipvision_train.data.images import fit_square, load_image, to_pixels
from skipvision_train.data.resizing import resize_lanczos, resize_pillow
from skipvision_train.data.tiling import draft_factor, num_tiles, tile_grid, to_tiles
from skipvision_train.errors import DataError
from skipvision_train.models.settings import TilingConfig, VisionConfig

VISION = VisionConfig(image_size=16, patch_size=4)
NONE, ASPECT, SQUARE = TilingConfig("none"), TilingConfig("aspect", 4), TilingConfig("square", 4)
COLOUR = (122, 116, 104)  # of the padding: OpenAI's mean colour

tilings = st.one_of(
    st.just(NONE),
    st.builds(TilingConfig, st.just("aspect"), st.integers(1, 12)),
    st.builds(TilingConfig, st.just("square"), st.sampled_from([1, 4, 9])),
)


def slow_grid(width, height, max_tiles, side):
    """All grids at once; of the closest ones the largest that the image fills by half, or else the smallest."""
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
    distances = [abs(width / height - c / r) for c, r in grids]
    closest = [grid for grid, distance in zip(grids, distances, strict=True) if distance == min(distances)]
    filled = [grid for grid in closest if width * height > side * side * math.prod(grid) / 2]
    return max(filled, key=math.prod) if filled else min(closest, key=math.prod)


@settings(max_examples=300)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 30), st.sampled_from([14, 336, 448]))
def test_the_aspect_rule_equals_a_brute_force(width, height, max_tiles, side):
    tiling = TilingConfig("aspect", max_tiles)
    assert tile_grid(width, height, tiling, side) == slow_grid(width, height, max_tiles, side)


@settings(max_examples=200)
@given(st.integers(1, 30), st.data())
def test_the_aspect_rule_where_grids_are_equally_close(max_tiles, data):
    """Sizes that random ones hardly hit: exactly a grid's ratio, or halfway between those of two grids."""
    grid = st.tuples(st.integers(1, max_tiles), st.integers(1, max_tiles)).filter(lambda g: g[0] * g[1] <= max_tiles)
    (a, b), (c, d), scale = data.draw(grid), data.draw(grid), data.draw(st.integers(1, 20))
    width, height = (a * d + c * b) * scale, 2 * b * d * scale
    tiling = TilingConfig("aspect", max_tiles)
    assert tile_grid(width, height, tiling, 14) == slow_grid(width, height, max_tiles, 14)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((336, 336), (1, 1)),  # 2 x 2 is as close, but the image is a quarter of it
        ((475, 475), (1, 1)),  # 225,625 pixels: just below half of 2 x 2
        ((476, 476), (2, 2)),
        ((640, 480), (2, 2)),  # a ratio of 1.33 is closer to 1 than to 2
        ((300, 200), (1, 1)),  # 1.5 is as far from 1 as from 2
        ((420, 280), (2, 1)),
        ((600, 400), (2, 2)),
        ((640, 400), (2, 1)),
        ((400, 640), (1, 2)),
        ((5000, 1), (4, 1)),
        ((1, 5000), (1, 4)),
        ((1, 1), (1, 1)),
    ],
)
def test_the_aspect_rule_by_hand(size, grid):
    assert tile_grid(*size, ASPECT, 336) == grid
    assert num_tiles(*size, ASPECT, 336) == 1 + grid[0] * grid[1]


def test_none_and_square_do_not_depend_on_the_size():
    for size in [(1, 1), (5000, 1), (336, 600)]:
        assert (tile_grid(*size, NONE, 336), num_tiles(*size, NONE, 336)) == ((1, 1), 1)
        assert (tile_grid(*size, TilingConfig("square", 9), 336), num_tiles(*size, SQUARE, 336)) == ((3, 3), 5)


@pytest.mark.parametrize("tiling", [NONE, ASPECT, SQUARE])
def test_an_image_without_pixels_is_refused(tiling):
    with pytest.raises(DataError, match="an image of 0 x 5 pixels; it needs at least one"):
        num_tiles(0, 5, tiling, 336)
    with pytest.raises(DataError, match="an image of 5 x 0 pixels; it needs at least one"):
        to_tiles(Image.new("RGB", (5, 0)), VISION, tiling)


@settings(max_examples=80)
@given(st.integers(1, 90), st.integers(1, 90), tilings)
def test_counts_agree(width, height, tiling):
    tiles = to_tiles(Image.new("RGB", (width, height), "red"), VISION, tiling)
    assert tiles.shape == (num_tiles(width, height, tiling, 16), 3, 16, 16)
    assert (tiles.dtype, tiles.is_contiguous()) == (torch.float32, True)
    assert len(tiles) in tiling.counts


def test_every_count_of_the_aspect_rule_occurs():
    tiling = TilingConfig("aspect", 7)
    sizes = [(16 * columns, 16) for columns in range(1, 8)]
    assert tuple(num_tiles(*size, tiling, 16) for size in sizes) == tiling.counts


def normed(image):
    """(3, height, width) in double precision."""
    levels = np.asarray(image, dtype=np.float64) / 255
    return torch.from_numpy(((levels - VISION.image_mean) / VISION.image_std).transpose(2, 0, 1)).float()


def pasted(tiles, columns):
    """Local tiles side by side again."""
    rows = [torch.cat(list(row), dim=2) for row in tiles.split(columns)]
    return torch.cat(rows, dim=1)


def padded(image):
    """LLaVA's square, with the whole square in memory."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [((40, 30), 4, (2, 2)), ((90, 31), 6, (3, 1)), ((31, 90), 6, (1, 3)), ((47, 30), 6, (3, 2)), ((5, 4), 4, (1, 1))],
)
def test_aspect_tiles_are_the_resized_image_without_padding(picture, size, max_tiles, grid):
    image, (columns, rows) = picture(*size), grid
    tiles = to_tiles(image, VISION, TilingConfig("aspect", max_tiles), "pillow")
    whole = normed(image.resize((16 * columns, 16 * rows), Image.Resampling.BICUBIC))
    torch.testing.assert_close(pasted(tiles[1:], columns), whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tiles[0], normed(image.resize((16, 16), Image.Resampling.BICUBIC)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [(40, 30), (31, 90), (7, 3), (32, 32), (1, 1)])
@pytest.mark.parametrize("per_side", [1, 2, 3])
def test_square_tiles_are_the_padded_and_resized_image(picture, size, per_side):
    image = picture(*size)
    tiles = to_tiles(image, VISION, TilingConfig("square", per_side**2), "pillow")
    whole = padded(image).resize((16 * per_side, 16 * per_side), Image.Resampling.LANCZOS)
    torch.testing.assert_close(pasted(tiles[1:], per_side), normed(whole), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tiles[0], normed(whole.resize((16, 16), Image.Resampling.BICUBIC)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [(40, 30), (31, 90)])
def test_square_of_four_is_what_the_released_scripts_run(picture, size):
    """They pad and resize to twice the side, and hand the result to the aspect rule."""
    image = picture(*size)
    prepared = padded(image).resize((32, 32), Image.Resampling.LANCZOS)
    for resizer in ("pillow", "torch"):
        assert torch.equal(to_tiles(image, VISION, SQUARE, resizer), to_tiles(prepared, VISION, ASPECT, resizer))


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (31, 90), (1, 1)])
def test_without_tiling_pixels_are_as_ever(picture, size):
    image = picture(*size)
    for resizer in ("pillow", "torch"):
        assert torch.equal(to_tiles(image, VISION, NONE, resizer), to_pixels([image], VISION, resizer))
    whole = padded(image).resize((16, 16), Image.Resampling.BICUBIC)
    torch.testing.assert_close(to_tiles(image, VISION, NONE, "pillow")[0], normed(whole), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tiling", [NONE, ASPECT, SQUARE])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (20000, 1)])
def test_extreme_images_of_one_colour_keep_it(tiling, size):
    tiles = to_tiles(Image.new("RGB", size, COLOUR), VISION, tiling)
    assert len(tiles) in tiling.counts
    torch.testing.assert_close(tiles, normed(Image.new("RGB", (16, 16), COLOUR)).expand_as(tiles), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tiling", [NONE, ASPECT, SQUARE])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_images_of_other_modes_equal_their_file(picture, tmp_path, tiling, mode):
    rgb = picture(40, 30)
    image = Image.fromarray(np.asarray(rgb)[..., 0].astype(np.uint16) * 257) if mode == "I;16" else rgb.convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "x.tif")
    expected = to_tiles(load_image(tmp_path / "x.tif", "7"), VISION, tiling)
    assert torch.equal(to_tiles(image, VISION, tiling), expected)
    assert expected[0].std() > 0.1


@pytest.mark.parametrize("tiling", [NONE, ASPECT, SQUARE])
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (1000, 200)])
def test_the_fast_resizer_differs_by_rounding_alone(picture, tiling, size):
    """One level of 255 in each of the two passes where no edge overshoots, and on average next to nothing."""
    vision = VisionConfig(image_size=112, patch_size=14)
    image = picture(12, 9).resize(size, Image.Resampling.BILINEAR)
    exact, fast = (to_tiles(image, vision, tiling, resizer) for resizer in ("pillow", "torch"))
    levels = (exact - fast).abs() * 255 * torch.tensor(vision.image_std)[:, None, None]
    assert levels.max() < 2.01
    assert levels.mean() < 0.02


@settings(max_examples=300)
@given(st.integers(1, 5000), st.integers(1, 5000), tilings, st.sampled_from([14, 336]))
@example(28, 67, ASPECT, 14)  # 1 x 2 tiles, but at half the size, 14 x 34, 1 x 3 would be closer
def test_the_draft_factor_leaves_resizing_something_to_shrink(width, height, tiling, side):
    factor = draft_factor(width, height, tiling, side)
    grid = tile_grid(width, height, tiling, side)

    def is_allowed(factor):
        small = math.ceil(width / factor), math.ceil(height / factor)
        if tile_grid(*small, tiling, side) != grid:
            return False
        if tiling.mode == "aspect":
            return all(have >= tiles * side for have, tiles in zip(small, grid, strict=True))
        return max(small) >= grid[0] * side

    assert factor == max([1, *(f for f in (2, 4, 8) if is_allowed(f))])


@pytest.mark.parametrize(
    ("size", "tiling", "factor"),
    [
        ((1920, 1080), NONE, 4),
        ((1920, 1080), SQUARE, 2),
        ((1920, 1080), ASPECT, 2),  # 2 x 1 tiles: 672 x 336
        ((1344, 1344), ASPECT, 2),
        ((1342, 1342), ASPECT, 1),  # 671 are less than two tiles
        ((640, 480), NONE, 1),
        ((5000, 40), NONE, 8),
        ((5000, 40), ASPECT, 1),
    ],
)
def test_the_draft_factor_by_hand(size, tiling, factor):
    assert draft_factor(*size, tiling, 336) == factor


RESIZES = {Image.Resampling.BICUBIC: resize_pillow, Image.Resampling.LANCZOS: resize_lanczos}


@settings(max_examples=60)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 70), st.sampled_from(list(RESIZES)), st.integers(0, 9))
def test_fitting_equals_padding_first_bit_for_bit(width, height, side, resample, seed):
    levels = np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    found = fit_square(levels, side, COLOUR, RESIZES[resample])
    assert np.array_equal(found, padded(Image.fromarray(levels)).resize((side, side), resample))


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_extreme_images_equal_padding_first(picture, size):
    found = fit_square(np.asarray(picture(*size)), 32, COLOUR, resize_pillow)
    assert np.array_equal(found, padded(picture(*size)).resize((32, 32), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(1, 900), (200, 900), (899, 900)])
def test_tall_images_with_a_huge_square_equal_padding_first_to_rounding(picture, size, monkeypatch):
    expected = padded(picture(*size)).resize((40, 40), Image.Resampling.BICUBIC)
    monkeypatch.setattr(images, "MAX_PIXELS", 900**2 - 1)
    found = fit_square(np.asarray(picture(*size)), 40, COLOUR, resize_pillow)
    assert abs(found.astype(int) - np.asarray(expected, dtype=int)).max() <= 2


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (20000, 3)])
def test_extreme_images_need_no_huge_square(size):
    """Resizing gets no more than a strip as long as the image and 32 wide, of 3 bytes per pixel."""
    given = []

    def resize(levels, wanted):
        given.append(levels.size)
        return resize_pillow(levels, wanted)

    width, height = size
    found = fit_square(np.full((height, width, 3), 200, dtype=np.uint8), 32, COLOUR, resize)
    assert found.shape == (32, 32, 3)
    assert max(given) <= 3 * 32 * max(size)
