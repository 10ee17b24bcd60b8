"""Damaged image bytes of every format end in an RGB image or a DataError, and in nothing else.

``FUZZ_IMAGES`` sets the number of cases (2,400 unless given), ``FUZZ_SEED`` the seed. What fails is printed as a seed.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, features

from skipvision_train.data.images import FORMATS, image_facts, load_image
from skipvision_train.data.records import ImageRef
from skipvision_train.data.tiling import draft_factor, to_tiles
from skipvision_train.errors import DataError
from skipvision_train.models.settings import TilingConfig, VisionConfig

CASES = int(os.environ.get("FUZZ_IMAGES", "2400"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))

VISION = VisionConfig(image_size=16, patch_size=4)
TILINGS = (TilingConfig("none"), TilingConfig("aspect", 4), TilingConfig("square", 4))

HEADER = 96
"""Where the first bytes of a format's fields are, and most mutations."""

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Where arithmetic on sizes and offsets tends to break."""


def encoded(image, kind, frames=False, **options):
    buffer = io.BytesIO()
    if frames:
        options |= {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def originals():
    """Whole files by name: all formats, with the modes, compressions and metadata that have code of their own."""
    random = np.random.default_rng(5)
    rgb = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((24, 18), Image.Resampling.BICUBIC)
    deep = Image.fromarray(random.integers(0, 65536, (11, 13), dtype=np.uint16))
    real = Image.fromarray(random.random((11, 13), dtype=np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = rgb.copy()
    alpha.putalpha(100)
    found = {
        "jpeg": encoded(rgb, "JPEG", exif=exif),
        "jpeg progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg grey": encoded(rgb.convert("L"), "JPEG"),
        "jpeg cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "mpo": encoded(rgb, "MPO", frames=True),
        "png": encoded(rgb, "PNG", exif=exif),
        "png palette": encoded(rgb.convert("P"), "PNG", transparency=3),
        "png alpha": encoded(alpha, "PNG"),
        "png 16 bit": encoded(deep, "PNG"),
        "png 1 bit": encoded(rgb.convert("1"), "PNG"),
        "gif": encoded(rgb, "GIF", frames=True),
        "gif transparent": encoded(rgb.convert("P"), "GIF", transparency=3),
        "webp": encoded(rgb, "WEBP", exif=exif),
        "webp lossless": encoded(alpha, "WEBP", frames=True, lossless=True),
        "bmp": encoded(rgb, "BMP"),
        "bmp palette": encoded(rgb.convert("P"), "BMP"),
        "ppm": encoded(rgb, "PPM"),
        "ppm 1 bit": encoded(rgb.convert("1"), "PPM"),
        "pgm 16 bit": encoded(deep, "PPM"),
        "tiff": encoded(rgb, "TIFF", exif=exif),
        "tiff 16 bit": encoded(deep, "TIFF"),
        "tiff float": encoded(real, "TIFF"),
        "tiff pages": encoded(rgb, "TIFF", frames=True),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[f"tiff {compression}"] = encoded(rgb, "TIFF", compression=compression)
    found["tiff float lzw"] = encoded(real, "TIFF", compression="tiff_lzw")
    found["tiff fax"] = encoded(rgb.convert("1"), "TIFF", compression="group4")
    if features.check("avif"):
        found["avif"] = encoded(rgb, "AVIF", exif=exif)
    return found


def flip_bits(data, random, others):
    for place in random.integers(0, len(data), random.integers(1, 9)):
        data[place] ^= 1 << int(random.integers(8))


def overwrite_header(data, random, others):
    for place in random.integers(0, min(HEADER, len(data)), random.integers(1, 4)):
        data[place] = int(random.integers(256))


def write_number(data, random, others):
    """One of ``NUMBERS`` in 1, 2 or 4 bytes of either order, anywhere."""
    size = int(random.choice([1, 2, 4]))
    place = int(random.integers(max(1, (HEADER if random.random() < 0.5 else len(data)) - size)))
    number = int(random.choice(NUMBERS)) % 256**size
    data[place : place + size] = number.to_bytes(size, "little" if random.random() < 0.5 else "big")


def truncate(data, random, others):
    del data[int(random.integers(len(data))) :]


def cut_out(data, random, others):
    start = int(random.integers(len(data)))
    del data[start : start + int(random.integers(1, 40))]


def repeat(data, random, others):
    start = int(random.integers(len(data)))
    piece = data[start : start + int(random.integers(1, 200))]
    data[start:start] = piece * int(random.integers(1, 20))


def splice(data, random, others):
    """The beginning of one file and the end of another."""
    other = others[int(random.integers(len(others)))]
    data[int(random.integers(len(data))) :] = other[int(random.integers(len(other))) :]


def overwrite_with_noise(data, random, others):
    start = int(random.integers(len(data)))
    count = min(len(data) - start, int(random.integers(1, 64)))
    data[start : start + count] = random.bytes(count)


MUTATIONS = (flip_bits, overwrite_header, write_number, truncate, cut_out, repeat, splice, overwrite_with_noise)


def mutated(files, case):
    """The bytes of a case, by its number alone."""
    random = np.random.default_rng((SEED, case))
    names = list(files)
    name = names[case % len(names)]
    data = bytearray(files[name])
    for _ in range(int(random.choice([1, 1, 2, 3]))):
        if data:
            MUTATIONS[int(random.integers(len(MUTATIONS)))](data, random, list(files.values()))
    return name, bytes(data)


def outcome(data, case):
    """``refused``, or ``image`` after its tiles were made and compared with what the header promised."""
    ref = ImageRef("fuzz", data=data)
    tiling = TILINGS[case % len(TILINGS)]
    shrink = None if case % 2 else lambda width, height: draft_factor(width, height, tiling, VISION.image_size)
    try:
        image = load_image(ref, f"case {case}", shrink)
    except DataError as error:
        if not str(error).startswith(f"fuzz (record case {case}): "):
            raise AssertionError(f"names no image and record: {error}") from error
        try:
            facts = image_facts(ref, f"case {case}")
        except DataError:
            return "refused"
        assert facts.format in (*FORMATS, "MPO")
        return "refused behind the header"
    assert image.mode == "RGB"
    facts = image_facts(ref, f"case {case}")
    if shrink is None:
        assert (facts.width, facts.height) == image.size
    if image.width * image.height < 1_000_000:
        tiles = to_tiles(image, VISION, tiling)
        assert len(tiles) in tiling.counts
        assert torch.isfinite(tiles).all()
    return "image"


@pytest.fixture(scope="module")
def files():
    return originals()


def test_whole_files_are_images(files):
    for number, (name, data) in enumerate(files.items()):
        assert outcome(data, number) == "image", name


def test_damaged_files_end_in_an_image_or_a_data_error(files):
    counts = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata and large images before it decides
        for case in range(CASES):
            name, data = mutated(files, case)
            try:
                counts[outcome(data, case)] += 1
            except Exception as error:
                raise AssertionError(f"FUZZ_SEED={SEED}, case {case}, {name}: {error!r}") from error
    assert sum(counts.values()) == CASES
    for kind in ("image", "refused", "refused behind the header"):  # otherwise the mutations were too mild or too wild
        assert counts[kind] > CASES / 50, counts
