"""Where image files come from and what is wrong with them: references, formats, damage, bombs, smaller decoding."""

from __future__ import annotations

import io
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision_train.data import images as module
from skipvision_train.data.images import image_facts, image_size, load_image, to_pixels
from skipvision_train.data.records import ImageRef
from skipvision_train.data.tiling import draft_factor, tile_grid
from skipvision_train.errors import DataError
from skipvision_train.models.settings import TilingConfig, VisionConfig


def save(image, path, **options):
    image.save(path, **options)
    return path


def pixels_of(image):
    return np.asarray(image).tolist()


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_another_extension_on_disk(picture, tmp_path):
    original = picture(5, 4)
    save(original, tmp_path / "cover.png")
    save(picture(5, 4, seed=1), tmp_path / "cover2.png")
    assert pixels_of(load_image(tmp_path / "cover.jpg", "7")) == pixels_of(original)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_images_in_memory_and_within_a_file(picture, tmp_path, kind):
    original = picture(5, 4).convert("P").convert("RGB")
    data = encoded(original, kind, **({"lossless": True} if kind == "WEBP" else {}))
    tar = tmp_path / "shard.tar"
    tar.write_bytes(b"before" * 9 + data + b"behind" * 9)
    refs = [
        ImageRef(tmp_path / "row 3", data=data),
        ImageRef(tar, 54, len(data), name="3.jpg"),
        ImageRef(save(original, tmp_path / "x", format=kind, **({"lossless": True} if kind == "WEBP" else {}))),
    ]
    for ref in refs:
        loaded = load_image(ref, "7")
        assert pixels_of(loaded) == pixels_of(original)
        assert loaded.mode == "RGB"
        assert image_size(ref, "7") == (5, 4)


@pytest.mark.parametrize("read", [load_image, image_facts])
def test_errors_name_the_image_within_its_file(tmp_path, read):
    tar = tmp_path / "shard.tar"
    tar.write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"shard\.tar!3\.jpg \(record 7\): no image .* begins with b'image'; JPEG, PNG"):
        read(ImageRef(tar, 3, 5, name="3.jpg"), "7")
    with pytest.raises(DataError, match=r"^record 7: \S+shard\.tar!3\.jpg: 5 of 9 bytes are there"):
        read(ImageRef(tar, 10, 9, name="3.jpg"), "7")
    with pytest.raises(DataError, match=r"^row 3 \(record 7\): no image that can be decoded: it is empty$"):
        read(ImageRef("row 3", data=b""), "7")


def test_a_link_out_of_the_root_is_refused_under_every_extension(picture, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    save(picture(), tmp_path / "secret.png")
    (root / "a.png").symlink_to(tmp_path / "secret.png")
    for name in ("a.png", "a.jpg"):
        with pytest.raises(DataError, match="outside of the image root"):
            load_image(ImageRef(root / name, root=root), "7")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.jpg", "", "/", "."])
def test_names_that_no_file_has(name):
    with pytest.raises(DataError, match=r"\(record 7\): no such image file"):
        load_image(name, "7")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "ICO", "JPEG2000", "PCX", "SGI"])
def test_formats_that_are_not_read(tmp_path, kind):
    """Pillow would hand EPS to Ghostscript."""
    path = save(Image.new("RGB", (16, 16)), tmp_path / "x.jpg", format=kind)
    with pytest.raises(DataError, match=r"x\.jpg \(record 7\): no image that can be decoded: it begins with"):
        load_image(path, "7")


def test_formats_that_this_pillow_lacks_are_left_out(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMATS", (*module.FORMATS, "FORMAT OF THE FUTURE"))
    module._known_formats.cache_clear()
    assert load_image(save(picture(5, 4), tmp_path / "x.png"), "7").size == (5, 4)
    module._known_formats.cache_clear()


@pytest.mark.parametrize(
    ("name", "kind", "is_misnamed"),
    [
        ("a.jpg", "JPEG", False),
        ("a.JPEG", "JPEG", False),
        ("a.jpg", "MPO", False),
        ("a.tif", "TIFF", False),
        ("a.jpg", "PNG", True),
        ("a.png", "GIF", True),
        ("a.gif", "JPEG", True),
        ("a", "PNG", False),
        ("a.image", "PNG", False),
    ],
)
def test_wrong_extensions_are_seen(picture, tmp_path, name, kind, is_misnamed):
    options = {"save_all": True, "append_images": [picture(5, 4)]} if kind == "MPO" else {}
    path = save(picture(5, 4), tmp_path / name, format=kind, **options)
    refs = (path, ImageRef(path), ImageRef("row", data=path.read_bytes(), name=name))
    for facts in (image_facts(ref, "7") for ref in refs):
        assert (facts.width, facts.height, facts.format, facts.is_misnamed) == (5, 4, kind, is_misnamed)
    assert load_image(path, "7").size == (5, 4)


def test_a_file_under_another_extension_is_misnamed(picture, tmp_path):
    save(picture(5, 4), tmp_path / "cover.png")
    assert image_facts(tmp_path / "cover.jpg", "7").is_misnamed
    assert not image_facts(tmp_path / "cover.png", "7").is_misnamed


def test_missing_file_names_file_and_record(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg \(record 7\): no such image file"):
        load_image(tmp_path / "gone.jpg", "7")
    with pytest.raises(DataError, match="no such image file"):
        load_image(tmp_path, "7")
    with pytest.raises(DataError, match=r"gone\.jpg \(record 7\): no such image file"):
        image_size(tmp_path / "gone.jpg", "7")


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


@pytest.mark.parametrize("text", ["<html>404</html>", ""])
@pytest.mark.parametrize("read", [load_image, image_size])
def test_text_and_empty_files_are_no_images(tmp_path, text, read):
    (tmp_path / "page.png").write_text(text)
    with pytest.raises(DataError, match=r"page\.png \(record 7\): no image that can be decoded"):
        read(tmp_path / "page.png", "7")


def test_decompression_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    path = save(Image.new("1", (20000, 20000)), tmp_path / "bomb.png")
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"bomb\.png \(record 7\)"):
        load_image(path, "7")
    monkeypatch.setattr(module, "MAX_PIXELS", 99)
    path = save(Image.new("RGB", (10, 10)), tmp_path / "small.png")
    for read in (load_image, image_size):
        with pytest.raises(DataError, match=r"small\.png \(record 7\): 10 x 10 pixels; at most 99 are read"):
            read(path, "7")


def test_sides_beyond_those_of_a_jpeg_are_refused(tmp_path):
    image = Image.new("RGB", (1, 65536))
    path = save(image, tmp_path / "line.png")
    for read in (load_image, image_size):
        with pytest.raises(DataError, match=r"line\.png \(record 7\): 1 x 65536 pixels; sides of at most 65535"):
            read(path, "7")
    with pytest.raises(DataError, match="1 x 65536 pixels; sides of at most 65535 are read"):
        to_pixels([image], VisionConfig(image_size=32, patch_size=4))


def scans_repeated(size, count):
    """A progressive JPEG whose last scan, which changes little, comes ``count`` times more."""
    data = encoded(Image.new("RGB", size, "gray"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def test_jpegs_of_endless_scans_are_refused_before_decoding():
    """20 kB that would keep the decoder busy for minutes, had they a few megapixels more."""
    bomb = ImageRef("bomb.jpg", data=scans_repeated((2000, 2000), 1200))
    for read in (load_image, image_facts):
        with pytest.raises(
            DataError, match=r"bomb\.jpg \(record 7\): 1210 scans of 4000000 pixels; at most 1118 scans"
        ):
            read(bomb, "7")
    assert load_image(ImageRef("odd.jpg", data=scans_repeated((64, 64), 100)), "7").size == (64, 64)


def photo(picture, width, height, kind="JPEG", **options):
    """Smooth shapes, as a file in memory."""
    image = picture(12, 9).resize((width, height), Image.Resampling.BICUBIC)
    return ImageRef(f"photo.{kind}", data=encoded(image, kind, **options))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(640, 480), (33, 17), (9, 8)])
def test_jpegs_are_decoded_smaller_on_demand(picture, size, factor):
    small = load_image(photo(picture, *size, quality=95), "7", lambda width, height: factor)
    assert small.size == tuple(-(-side // factor) for side in size)


@settings(max_examples=100)
@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from(["none", "aspect", "square"]))
def test_what_is_decoded_smaller_has_the_same_tiles(width, height, mode):
    tiling = TilingConfig(mode, 4)
    ref = ImageRef("grey.jpg", data=encoded(Image.new("L", (width, height)), "JPEG"))
    small = load_image(ref, "7", partial(draft_factor, tiling=tiling, side=28))
    columns, rows = tile_grid(width, height, tiling, 28)
    assert tile_grid(*small.size, tiling, 28) == (columns, rows)
    if small.size != (width, height):
        assert max(small.size) >= columns * 28
        assert mode != "aspect" or min(small.width - columns * 28, small.height - rows * 28) >= 0


def test_smaller_decoding_shows_the_same_picture(picture):
    """Smooth shapes hardly change; what detail does, docs and benchmarks say."""
    ref, vision = photo(picture, 1280, 960, quality=95), VisionConfig(image_size=224, patch_size=14)
    whole, small = (to_pixels([load_image(ref, "7", shrink)], vision) for shrink in (None, lambda width, height: 4))
    difference = (whole - small).abs() * 255 * torch.tensor(vision.image_std)[:, None, None]
    assert 0 < difference.mean() < 1
    assert difference.max() < 12


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_shrinking_asks_for_the_upright_size(picture, orientation):
    asked = []
    ref = photo(picture, 64, 32, exif=exif_of(orientation))
    small = load_image(ref, "7", lambda width, height: asked.append((width, height)) or 2)
    upright = (64, 32) if orientation in (1, 3) else (32, 64)
    assert asked == [upright]
    assert small.size == (upright[0] // 2, upright[1] // 2)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_other_formats_keep_their_size(picture, kind):
    assert load_image(photo(picture, 64, 32, kind), "7", lambda width, height: 2).size == (64, 32)
