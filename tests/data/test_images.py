"""Decoding files as they lie on disks, and pixels against a slow computation of their own."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from skipvision_train.data.images import image_size, load_image, to_pixels, to_rgb
from skipvision_train.errors import ConfigError, DataError
from skipvision_train.models.settings import VisionConfig


def save(image, path, **options):
    image.save(path, **options)
    return path


def pixels_of(image):
    return np.asarray(image).tolist()


def test_the_content_decides_not_the_extension(picture, tmp_path):
    original = picture(5, 4)
    path = save(original, tmp_path / "wrong.jpg", format="PNG")
    assert pixels_of(load_image(path, "7")) == pixels_of(original)


# What is done to the stored pixels (height, width, channels) to see them upright, by the EXIF standard's numbers.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "WEBP", "lossless": True}, {"format": "TIFF"}])
def test_exif_orientation_is_applied(picture, tmp_path, orientation, options):
    original = picture(6, 4)
    path = save(original, tmp_path / "turned", exif=exif_of(orientation), **options)
    expected = UPRIGHT[orientation](np.asarray(original))
    loaded = load_image(path, "7")
    assert pixels_of(loaded) == expected.tolist()
    assert image_size(path, "7") == loaded.size == expected.shape[1::-1]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_rotated_photos(tmp_path, orientation):
    """A JPEG whose quarters have four grey levels: lossy, but recognisable."""
    quarters = np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((16, 24), dtype=np.uint8))
    path = save(Image.fromarray(quarters), tmp_path / "photo.jpg", exif=exif_of(orientation))
    loaded = np.asarray(load_image(path, "7"))[..., 0].astype(int)
    expected = UPRIGHT[orientation](quarters)
    assert loaded.shape == expected.shape
    assert abs(loaded - expected).max() < 10
    assert image_size(path, "7") == expected.shape[::-1]


def chunks_of(png):
    """[(name, bytes of the whole chunk)] of a PNG file."""
    found, place = [], 8
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        found.append((png[place + 4 : place + 8], png[place : place + length + 12]))
        place += length + 12
    return found


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


XMP = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<rdf:Description tiff:Orientation="6"/>'


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("kind", ["exif", "xmp"])
def test_orientation_of_a_png_wherever_it_stands(picture, tmp_path, place, kind):
    original = picture(6, 4)
    buffer = io.BytesIO()
    original.save(buffer, "PNG", exif=exif_of(6))
    chunks = chunks_of(buffer.getvalue())
    orientation = dict(chunks)[b"eXIf"] if kind == "exif" else chunk(b"iTXt", XMP)
    rest = [data for name, data in chunks if name != b"eXIf"]
    rest.insert(1 if place == "before" else -1, orientation)
    path = tmp_path / "turned.png"
    path.write_bytes(buffer.getvalue()[:8] + b"".join(rest))
    assert image_size(path, "7") == (4, 6)
    assert pixels_of(load_image(path, "7")) == np.rot90(np.asarray(original), -1).tolist()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_size_of_every_format(picture, tmp_path, kind):
    path = save(picture(7, 5), tmp_path / "x.jpg", format=kind)
    assert image_size(path, "7") == (7, 5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_size_is_read_from_the_header(picture, tmp_path, kind):
    path = save(picture(70, 50), tmp_path / "x.jpg", format=kind)
    path.write_bytes(path.read_bytes()[:1000])
    assert image_size(path, "7") == (70, 50)
    with pytest.raises(DataError, match="no image that can be decoded"):
        load_image(path, "7")


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    loaded = load_image(save(Image.fromarray(rgba), tmp_path / "a.png"), "7")
    assert pixels_of(loaded) == [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    loaded = load_image(save(palette, tmp_path / "b.gif", transparency=1), "7")
    assert pixels_of(loaded) == [[[10, 20, 30], [255, 255, 255]]]


def test_partial_transparency_of_a_palette_and_transparent_colours(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    assert pixels_of(load_image(save(palette, tmp_path / "a.png"), "7")) == [[[10, 20, 30], [200, 100, 0]]]
    loaded = load_image(save(palette, tmp_path / "b.png", transparency=bytes([255, 51])), "7")
    assert pixels_of(loaded) == [[[10, 20, 30], [244, 224, 204]]]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    path = save(rgb, tmp_path / "c.png", transparency=(4, 5, 6))
    assert pixels_of(load_image(path, "7")) == [[[1, 2, 3], [255, 255, 255]]]
    with Image.open(path) as image:  # as a caller opens it
        assert pixels_of(to_rgb(image)) == [[[1, 2, 3], [255, 255, 255]]]
    grey = Image.fromarray(np.array([[[77, 255], [77, 51]]], dtype=np.uint8), mode="LA")
    assert pixels_of(load_image(save(grey, tmp_path / "d.png"), "7")) == [[[77] * 3, [219] * 3]]


def test_rgb_is_not_copied(picture):
    image = picture()
    assert to_rgb(image) is image


@pytest.mark.parametrize(("ink", "rgb"), [((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 255, 0), (0, 255, 0))])
def test_cmyk_jpeg_as_adobe_writes_it(tmp_path, ink, rgb):
    """Adobe stores the inks inverted and marks the file."""
    path = save(Image.new("CMYK", (16, 16), ink), tmp_path / "print.jpg", quality=100)
    assert b"Adobe" in path.read_bytes()
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert abs(np.asarray(load_image(path, "7")).astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("options", [{"format": "GIF"}, {"format": "WEBP", "lossless": True}])
def test_of_an_animation_the_first_frame(tmp_path, options):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    path = save(frames[0], tmp_path / "moving", save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert pixels_of(load_image(path, "7")) == [[[255, 0, 0]] * 6] * 4
    assert image_size(path, "7") == (6, 4)


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


def test_sixteen_bit_grey_of_either_byte_order(tmp_path):
    grey = np.array([[0, 256], [0x8000, 0xFFFF]], dtype=np.uint16)
    for order in "<>":
        mode = "I;16" if order == "<" else "I;16B"
        image = Image.frombytes(mode, (2, 2), grey.astype(f"{order}u2").tobytes())
        loaded = load_image(save(image, tmp_path / "deep.tif"), "7")
        assert pixels_of(loaded) == [[[0] * 3, [1] * 3], [[128] * 3, [255] * 3]]


def test_float_grey_is_scaled(tmp_path):
    grey = np.array([[0, 0.25, 0.999, 1]], dtype=np.float32)
    loaded = load_image(save(Image.fromarray(grey), tmp_path / "float.tif"), "7")
    assert pixels_of(loaded) == [[[0] * 3, [64] * 3, [255] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([0, 1.5], "float grey values from 0 to 1.5; values from 0 to 1 can be read"),
        ([-0.5, 1], "float grey values from -0.5 to 1;"),
        ([0.5, np.nan], "float grey values from nan to nan;"),
        ([0.5, np.inf], "float grey values from 0.5 to inf;"),
        ([0, 65536], "integer grey values from 0 to 65536; values from 0 to 65535 can be read"),
        ([-1, 5], "integer grey values from -1 to 5;"),
    ],
)
def test_values_without_a_known_white_are_refused(tmp_path, values, found):
    dtype = np.int32 if found.startswith("integer") else np.float32
    image = Image.fromarray(np.array([values], dtype=dtype))
    with pytest.raises(DataError, match=rf"scan\.tif \(record 7\): {found}"):
        load_image(save(image, tmp_path / "scan.tif"), "7")
    with pytest.raises(DataError, match=f"^{found}"):
        to_pixels([image], VisionConfig(image_size=32, patch_size=4))


@pytest.mark.parametrize("resizer", ["torch", "pillow"])
def test_pixels_by_either_resizer(picture, resizer):
    vision = VisionConfig(image_size=32, patch_size=4)
    for size in [(20, 11), (7, 40), (96, 96)]:
        found = to_pixels([picture(*size)], vision, resizer)[0]
        torch.testing.assert_close(found, slow_pixels(picture(*size), vision), atol=2.5 / 255 / 0.26, rtol=0)
    with pytest.raises(ConfigError, match="resizer: 'fast' is unknown"):
        to_pixels([picture()], vision, "fast")


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
    found = to_pixels([image], vision, "pillow")
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
