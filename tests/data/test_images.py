"""Decoding files as they lie on disks, and pixels against a slow computation of their own."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from skipvision_train.data import images as module
from skipvision_train.data.images import load_image, to_pixels, to_rgb
from skipvision_train.errors import DataError
from skipvision_train.models.configuration import VisionConfig


def save(image, path, **options):
    image.save(path, **options)
    return path


def pixels_of(image):
    return np.asarray(image).tolist()


def test_the_content_decides_not_the_extension(picture, tmp_path):
    original = picture(5, 4)
    path = save(original, tmp_path / "wrong.jpg", format="PNG")
    assert pixels_of(load_image(path, "7")) == pixels_of(original)


def test_another_extension_on_disk(picture, tmp_path):
    original = picture(5, 4)
    save(original, tmp_path / "cover.png")
    save(picture(5, 4, seed=1), tmp_path / "cover2.png")
    assert pixels_of(load_image(tmp_path / "cover.jpg", "7")) == pixels_of(original)


def test_exif_orientation_is_applied(picture, tmp_path):
    original = picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    path = save(original, tmp_path / "turned.png", exif=exif)
    loaded = load_image(path, "7")
    assert loaded.size == (4, 6)
    assert pixels_of(loaded) == np.rot90(np.asarray(original), -1).tolist()


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    loaded = load_image(save(Image.fromarray(rgba), tmp_path / "a.png"), "7")
    assert pixels_of(loaded) == [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    loaded = load_image(save(palette, tmp_path / "b.gif", transparency=1), "7")
    assert pixels_of(loaded) == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [("L", 77, 77), ("1", 255, 255), ("LA", (77, 255), 77), ("CMYK", (0, 0, 0, 255), 0), ("I;16", 0x4DFF, 0x4D)],
)
def test_modes(tmp_path, mode, value, expected):
    path = save(Image.new(mode, (3, 2), value), tmp_path / "x.tif")
    loaded = load_image(path, "7")
    assert (loaded.mode, loaded.size) == ("RGB", (3, 2))
    assert pixels_of(loaded) == [[[expected] * 3] * 3] * 2


def test_sixteen_bit_png_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    loaded = load_image(save(Image.fromarray(grey), tmp_path / "deep.png"), "7")
    assert pixels_of(loaded) == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]


def test_missing_file_names_file_and_record(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg \(record 7\): no such image file"):
        load_image(tmp_path / "gone.jpg", "7")
    with pytest.raises(DataError, match="no such image file"):
        load_image(tmp_path, "7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_refused_everywhere(picture, tmp_path, kind):
    buffer = io.BytesIO()
    picture(40, 40).save(buffer, kind)
    whole = buffer.getvalue()
    path = tmp_path / "cut.jpg"
    warnings.simplefilter("ignore")  # Pillow warns of truncated TIFF files before it gives up; pytest restores filters
    for length in range(0, len(whole) * 3 // 4, max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.jpg \(record 7\): no image that can be decoded"):
            load_image(path, "7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_damaged_files_give_an_image_or_a_data_error(picture, tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture(12, 12).save(buffer, kind, **({"exif": exif} if kind != "GIF" else {}))
    whole = bytearray(buffer.getvalue())
    random = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for _ in range(150):
        damaged = bytearray(whole)
        for place in random.integers(0, min(len(whole), 400), 4):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata before it decides
            try:
                assert load_image(path, "7").mode == "RGB"
            except DataError:
                continue


def test_text_is_no_image(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"page\.jpg \(record 7\)"):
        load_image(tmp_path / "page.jpg", "7")


def test_decompression_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    path = save(Image.new("1", (20000, 20000)), tmp_path / "bomb.png")
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"bomb\.png \(record 7\)"):
        load_image(path, "7")
    monkeypatch.setattr(module, "MAX_PIXELS", 99)
    path = save(Image.new("RGB", (10, 10)), tmp_path / "small.png")
    with pytest.raises(DataError, match="10 x 10 pixels; at most 99 are read"):
        load_image(path, "7")


def cubic(x):
    """Pillow's bicubic kernel, a = -0.5."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_matrix(source, target):
    """(target, source) weights of an antialiased bicubic resize: the kernel is as wide as the shrinking asks for."""
    scale = source / target
    width = max(scale, 1.0)
    weights = np.array([[cubic((j + 0.5 - (i + 0.5) * scale) / width) for j in range(source)] for i in range(target)])
    return weights / weights.sum(1, keepdims=True)


def slow_pixels(image, vision):
    """Padding and resizing as matrix products in double precision."""
    array = np.asarray(image, dtype=np.float64)
    height, width, _ = array.shape
    side = max(height, width)
    square = np.empty((side, side, 3))
    square[:] = [int(255 * m) for m in vision.image_mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = array
    matrix = resize_matrix(side, vision.image_size)
    across = np.einsum("jb,abc->ajc", matrix, square).clip(0, 255)  # Pillow clips after each of its two passes
    resized = np.einsum("ia,ajc->ijc", matrix, across).clip(0, 255)
    normed = (resized / 255 - np.array(vision.image_mean)) / np.array(vision.image_std)
    return torch.from_numpy(normed.transpose(2, 0, 1)).float()


@pytest.mark.parametrize("size", [(32, 32), (20, 11), (7, 40), (96, 96), (1, 1), (300, 2)])
def test_pixels_equal_a_slow_computation(picture, size):
    vision = VisionConfig(image_size=32, patch_size=4)
    image = picture(*size)
    found = to_pixels([image], vision)
    assert found.shape == (1, 3, 32, 32)
    assert found.dtype == torch.float32
    # Pillow rounds to whole grey levels after each pass: 1.5 levels, over 255 times the deviation.
    torch.testing.assert_close(found[0], slow_pixels(image, vision), atol=1.5 / 255 / 0.26, rtol=0)


def test_without_resizing_pixels_are_exact(picture):
    vision = VisionConfig(image_size=32, patch_size=4)
    image = picture(32, 32)
    torch.testing.assert_close(to_pixels([image], vision)[0], slow_pixels(image, vision), atol=1e-6, rtol=1e-6)


def test_padding_is_the_mean_and_becomes_zero():
    vision = VisionConfig(image_size=32, patch_size=4)
    found = to_pixels([Image.new("RGB", (32, 16), "white")], vision)[0]
    assert found[:, :8].abs().max() < 1 / 255 / 0.26
    assert found[:, 24:].abs().max() < 1 / 255 / 0.26
    assert found[:, 8:24].min() > 1.9


def test_several_images_and_other_modes(picture):
    vision = VisionConfig(image_size=32, patch_size=4)
    first, second = picture(20, 20), picture(9, 30, seed=1).convert("RGBA")
    both = to_pixels([first, second], vision)
    assert both.shape == (2, 3, 32, 32)
    assert both.is_contiguous()
    assert torch.equal(both[0], to_pixels([first], vision)[0])
    assert torch.equal(both[1], to_pixels([to_rgb(second)], vision)[0])
