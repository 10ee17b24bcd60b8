"""Image files to model pixels: decode, pad to a square, resize, normalise. Several tiles: ``tiling.py``."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from skipvision_train.errors import DataError
from skipvision_train.models.settings import VisionConfig

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded (a 256 MiB RGB image; Pillow's own limit for a warning)."""

MAX_SIDE = 65_535
"""Longer images are refused: JPEG allows no more, and the memory for padding to a square grows with the side."""

SUFFIXES = (".jpg", ".png", ".gif", ".jpeg", ".webp")
"""Tried in this order where a file is missing: OCR-VQA is listed as .jpg and lies on disk with other extensions."""

# What Pillow's decoders raise on broken files besides OSError. A list, so that a bug of ours is not taken for one.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)


def load_image(path: str | Path, record_id: str) -> Image.Image:
    """Decode an image file completely, upright, as RGB (``to_rgb``); of an animation the first frame.

    Args:
        path: the content decides the format, not the extension. A missing file is looked for under the same name
            with another of ``SUFFIXES``.
        record_id: named in errors.

    Raises:
        DataError: naming file and record: missing, no image, truncated, more than ``MAX_PIXELS``, a side longer than
            ``MAX_SIDE``, or values that ``to_rgb`` refuses.
    """
    with _opened(_existing(Path(path), record_id), record_id) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def image_size(path: str | Path, record_id: str) -> tuple[int, int]:
    """Width and height in pixels of what ``load_image`` returns, from the file's header.

    Only a TIFF, and a PNG with metadata behind its pixels, is decoded for it.

    Args:
        path: as in ``load_image``.
        record_id: named in errors.

    Raises:
        DataError: as ``load_image``, but damage and refused values behind the header are not noticed.
    """
    path = _existing(Path(path), record_id)
    with _opened(path, record_id) as image:
        # Pillow turns a TIFF by itself while it decodes, and finds a PNG's late metadata only then.
        if image.format == "TIFF" or (image.format == "PNG" and _has_late_metadata(path)):
            ImageOps.exif_transpose(image, in_place=True)
            return image.size
        # Not image.getexif(): PNG's own version decodes the pixels to look behind them.
        is_turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.height, image.width) if is_turned else image.size


def to_pixels(images: Sequence[Image.Image], vision: VisionConfig) -> Tensor:
    """Pad to a square with the mean colour, resize (bicubic, antialiased), normalise; LLaVA's ``pad`` arrangement.

    Args:
        images: of any size; other modes than RGB are converted as ``to_rgb`` does.
        vision: ``image_size`` (S), ``image_mean`` and ``image_std`` are used.

    Returns:
        (len(images), 3, S, S) float32.

    Raises:
        DataError: see ``to_rgb`` and ``fit_square``.
    """
    colour = padding_colour(vision)
    return normalise([np.asarray(fit_square(to_rgb(image), vision.image_size, colour)) for image in images], vision)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode (RGB: the image itself). 16-bit grey is scaled, not clipped; transparency is laid on white.

    Raises:
        DataError: float values that are not all from 0 (black) to 1 (white), or integers of more than 16 bits: what
            is black and what is white there, nobody says.
        ValueError: a mode that Pillow cannot convert, such as LAB.
    """
    if image.mode == "F":
        return _grey(np.asarray(image), 1.0, "float").convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits per pixel; convert() would clip, not scale
        return _grey(np.asarray(image), 65535, "integer").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def padding_colour(vision: VisionConfig) -> tuple[int, int, int]:
    """The mean colour, rounded down as LLaVA does; close to 0 after normalisation."""
    red, green, blue = (int(255 * value) for value in vision.image_mean)
    return red, green, blue


def fit_square(
    image: Image.Image,
    side: int,
    colour: tuple[int, int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Pad to a square and resize to ``side``, as LLaVA does, but never by way of a square of more than ``MAX_PIXELS``.

    Padding is half on each side of the shorter dimension; an odd pixel goes right or below. Equal to padding first and
    resizing then, bit for bit, except for tall images whose square has more than ``MAX_PIXELS``: there the two passes
    of the resize change places, and values differ by rounding (2 of 255), or more where the overshoot beside a hard
    edge is cut off between the passes.

    Args:
        image: RGB.
        side: pixels.
        colour: of the padding.
        resample: how to resize.

    Raises:
        DataError: a side is longer than ``MAX_SIDE``.
    """
    width, height = image.size
    longest = max(width, height)
    _check_side(width, height)
    if height > width and longest**2 > MAX_PIXELS:
        transposed = fit_square(image.transpose(Image.Transpose.TRANSPOSE), side, colour, resample)
        return transposed.transpose(Image.Transpose.TRANSPOSE)
    if width > height:
        # Pillow resizes rows first, each by itself, and a row of padding stays what it is: so they are added after.
        image = image.resize((side, height), resample)
    if width != height:
        padded = Image.new("RGB", (image.width if width > height else longest, longest), colour)
        padded.paste(image, ((padded.width - image.width) // 2, (longest - height) // 2))
        image = padded
    return image if image.size == (side, side) else image.resize((side, side), resample)


def normalise(views: Sequence[NDArray[np.uint8]], vision: VisionConfig) -> Tensor:
    """Subtract the mean and divide by the deviation.

    Args:
        views: each (S, S, 3) uint8, with any strides.
        vision: ``image_size`` (S), ``image_mean`` and ``image_std`` are used.

    Returns:
        (len(views), 3, S, S) float32.
    """
    pixels = np.empty((len(views), 3, vision.image_size, vision.image_size), dtype=np.float32)
    for levels, planes in zip(views, pixels, strict=True):
        # Plane by plane: arithmetic along an innermost axis of three channels is several times slower.
        for channel, (mean, std) in enumerate(zip(vision.image_mean, vision.image_std, strict=True)):
            np.multiply(levels[..., channel], np.float32(1 / (255 * std)), out=planes[channel])
            planes[channel] -= np.float32(mean / std)
    return torch.from_numpy(pixels)


@contextmanager
def _opened(path: Path, record_id: str) -> Iterator[Image.Image]:
    """An image file with only its header read; whatever is wrong with it becomes a DataError."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
            _check_side(image.width, image.height)
            yield image
    except DataError as error:
        raise DataError(f"{path} (record {record_id}): {error}") from error
    except _DECODER_ERRORS as error:
        raise DataError(f"{path} (record {record_id}): no image that can be decoded: {error}") from error


def _existing(path: Path, record_id: str) -> Path:
    if path.is_file():
        return path
    for suffix in SUFFIXES:
        if (other := path.with_suffix(suffix)).is_file():
            return other
    raise DataError(f"{path} (record {record_id}): no such image file")


def _check_side(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise DataError(f"{width} x {height} pixels; sides of at most {MAX_SIDE} are read")


def _has_late_metadata(path: Path) -> bool:
    """True if a PNG file has a chunk behind its pixels that can hold an orientation."""
    has_pixels = False
    with path.open("rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", header)
            if has_pixels and name in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            has_pixels = has_pixels or name == b"IDAT"
            file.seek(length + 4, 1)
    return False


def _grey(values: NDArray[Any], white: float, kind: str) -> Image.Image:
    """8 bits per pixel from values between 0 and ``white``."""
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and highest <= white):  # so that NaN, which min and max pass on, is refused too
        raise DataError(f"{kind} grey values from {lowest:g} to {highest:g}; values from 0 to {white:g} can be read")
    if kind == "integer":
        return Image.fromarray((values >> 8).astype(np.uint8))
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))
