"""Image files to model pixels: decode, pad to a square, resize, normalise. Several tiles: ``tiling.py``."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from skipvision_train.data.records import ImageRef
from skipvision_train.data.resizing import Resize, bicubic
from skipvision_train.errors import DataError
from skipvision_train.models.settings import VisionConfig

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded (a 256 MiB RGB image; Pillow's own limit for a warning)."""

MAX_SIDE = 65_535
"""Longer images are refused: JPEG allows no more, and the memory for padding to a square grows with the side."""

MAX_SCANNED = 50 * MAX_PIXELS
"""Progressive JPEGs of more pixels times scans are refused: each of thousands of scans would go over all pixels."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM")
"""What is decoded. Pillow knows many more; EPS it would hand to Ghostscript, an interpreter of programs."""

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


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the header of an image says.

    Attributes:
        width: of what ``load_image`` returns without ``shrink``, pixels.
        height: likewise.
        format: one of ``FORMATS``, or ``MPO``, a JPEG with further images behind it.
        is_misnamed: the extension is another format's. The extension is the record's, not that of the file that was
            found in its place (``SUFFIXES``); none, or one that no format has, is not wrong.
    """

    width: int
    height: int
    format: str
    is_misnamed: bool


def load_image(
    ref: ImageRef | Path | str, record_id: str, shrink: Callable[[int, int], int] | None = None
) -> Image.Image:
    """Decode an image completely, upright, as RGB (``to_rgb``); of an animation the first frame.

    Args:
        ref: the content decides the format, not the extension. A missing file is looked for under the same name with
            another of ``SUFFIXES``.
        record_id: named in errors.
        shrink: from width and height the factor, 1, 2, 4 or 8, by which a JPEG is decoded smaller, each side divided by
            it and rounded up (by a smaller one if a side has fewer pixels); other formats keep their size.
            ``tiling.draft_factor`` chooses it. That saves up to a third of the time of decoding, but it is not the same
            as resizing: at the model's size pixels differ by 0.3 to 6 of 255 levels on average, most where there is
            fine detail, and by up to 70.

    Raises:
        DataError: naming image and record: missing, no image or none of ``FORMATS``, truncated, more than
            ``MAX_PIXELS``, a side longer than ``MAX_SIDE``, more than ``MAX_SCANNED``, values that ``to_rgb`` refuses,
            or what ``ImageRef.open`` says.
    """
    with _opened(located_ref(ref, record_id), record_id) as image:
        if shrink is not None and image.format == "JPEG":
            width, height = (image.height, image.width) if _is_turned(image) else image.size
            factor = shrink(width, height)
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def image_facts(ref: ImageRef | Path | str, record_id: str) -> ImageFacts:
    """Size and format of an image from its header.

    Only a TIFF, and a PNG with metadata behind its pixels, is decoded for it.

    Args:
        ref: as in ``load_image``.
        record_id: named in errors.

    Raises:
        DataError: as ``load_image``, but damage and refused values behind the header are not noticed.
    """
    located = located_ref(ref, record_id)
    listed = Path(str(ref)).suffix.lower()
    with _opened(located, record_id) as image:
        kind = image.format or ""
        # Pillow turns a TIFF by itself while it decodes, and finds a PNG's late metadata only then.
        if kind == "TIFF" or (kind == "PNG" and _has_late_metadata(located)):
            ImageOps.exif_transpose(image, in_place=True)
            width, height = image.size
        else:
            width, height = (image.height, image.width) if _is_turned(image) else image.size
        expected = Image.registered_extensions().get(listed, kind)
        return ImageFacts(width, height, kind, expected != kind and {expected, kind} != {"JPEG", "MPO"})


def image_size(ref: ImageRef | Path | str, record_id: str) -> tuple[int, int]:
    """Width and height in pixels of what ``load_image`` returns; arguments and errors as for ``image_facts``."""
    facts = image_facts(ref, record_id)
    return facts.width, facts.height


def to_pixels(images: Sequence[Image.Image], vision: VisionConfig, resizer: str = "auto") -> Tensor:
    """Pad to a square with the mean colour, resize (bicubic, antialiased), normalise; LLaVA's ``pad`` arrangement.

    Args:
        images: of any size; other modes than RGB are converted as ``to_rgb`` does.
        vision: ``image_size`` (S), ``image_mean`` and ``image_std`` are used.
        resizer: see ``resizing.bicubic``.

    Returns:
        (len(images), 3, S, S) float32.

    Raises:
        DataError: see ``to_rgb`` and ``fit_square``.
    """
    colour, resize = padding_colour(vision), bicubic(resizer)
    return normalise([fit_square(levels_of(image), vision.image_size, colour, resize) for image in images], vision)


def levels_of(image: Image.Image) -> NDArray[np.uint8]:
    """(height, width, 3) uint8, a copy, of an image of any mode; errors as for ``to_rgb``."""
    return np.array(to_rgb(image))


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


def fit_square(levels: NDArray[np.uint8], side: int, colour: tuple[int, int, int], resize: Resize) -> NDArray[np.uint8]:
    """Pad to a square and resize to ``side``, as LLaVA does, but never by way of a square of more than ``MAX_PIXELS``.

    Padding is half on each side of the shorter dimension; an odd pixel goes right or below. Equal to padding first and
    resizing then, bit for bit, except for tall images whose square has more than ``MAX_PIXELS``: there the two passes
    of the resize change places, and values differ by rounding (2 of 255), or more where the overshoot beside a hard
    edge is cut off between the passes.

    Args:
        levels: (height, width, 3).
        side: pixels.
        colour: of the padding.
        resize: how.

    Returns:
        (side, side, 3), of any strides.

    Raises:
        DataError: a side is longer than ``MAX_SIDE``.
    """
    height, width, _ = levels.shape
    longest = max(width, height)
    _check_side(width, height)
    if height > width and longest**2 > MAX_PIXELS:
        return fit_square(levels.swapaxes(0, 1), side, colour, resize).swapaxes(0, 1)
    if width > height:
        # A square is resized rows first, each by itself, and padding rows stay what they are: so they are added after.
        levels = resize(levels, (height, side)) if width != side else levels
    if width != height:
        levels = _padded(levels, longest, side if width > height else longest, colour)
    return levels if levels.shape == (side, side, 3) else resize(levels, (side, side))


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
def _opened(ref: ImageRef, record_id: str) -> Iterator[Image.Image]:
    """An image with only its header read; whatever is wrong with it becomes a DataError."""
    try:
        file = ref.open()
    except DataError as error:
        raise DataError(f"record {record_id}: {error}") from error
    try:
        with file, Image.open(file, formats=_known_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
            _check_side(image.width, image.height)
            if "progressive" in image.info:
                _check_scans(file, image.width * image.height)
            yield image
    except DataError as error:
        raise DataError(f"{ref} (record {record_id}): {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{ref} (record {record_id}): no image that can be decoded: {_beginning(ref)}") from error
    except _DECODER_ERRORS as error:
        raise DataError(f"{ref} (record {record_id}): no image that can be decoded: {error}") from error


def located_ref(ref: ImageRef | Path | str, record_id: str) -> ImageRef:
    """The same image, under the name that its file has on the disk."""
    ref = ref if isinstance(ref, ImageRef) else ImageRef(Path(ref))
    if not ref.is_file or os.path.isfile(ref.path):  # not Path.is_file, which raises on a name that is too long
        return ref
    for suffix in SUFFIXES if ref.path.name else ():
        if os.path.isfile(other := ref.path.with_suffix(suffix)):
            return replace(ref, path=other)
    raise DataError(f"{ref} (record {record_id}): no such image file")


@lru_cache
def _known_formats() -> tuple[str, ...]:
    """``FORMATS`` without those that this Pillow was built without; it refuses names that it does not know."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _beginning(ref: ImageRef) -> str:
    with ref.open() as file:
        start = file.read(12)
    return f"it begins with {start!r}; {', '.join(_known_formats())} are read" if start else "it is empty"


def _is_turned(image: Image.Image) -> bool:
    # Not image.getexif(): PNG's own version decodes the pixels to look behind them.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def _check_scans(file: BinaryIO, pixels: int) -> None:
    file.seek(0)  # Pillow seeks by itself before it decodes
    scans = file.read().count(b"\xff\xda")
    if scans * pixels > MAX_SCANNED:
        raise DataError(f"{scans} scans of {pixels} pixels; at most {MAX_SCANNED // pixels} scans are read")


def _check_side(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise DataError(f"{width} x {height} pixels; sides of at most {MAX_SIDE} are read")


def _has_late_metadata(ref: ImageRef) -> bool:
    """True if a PNG file has a chunk behind its pixels that can hold an orientation."""
    has_pixels = False
    with ref.open() as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", header)
            if has_pixels and name in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            has_pixels = has_pixels or name == b"IDAT"
            file.seek(length + 4, 1)
    return False


def _padded(levels: NDArray[np.uint8], height: int, width: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """(height, width, 3): the levels in the middle of a colour."""
    rows, columns, _ = levels.shape
    top, left = (height - rows) // 2, (width - columns) // 2
    padded = np.empty((height, width, 3), dtype=np.uint8)
    padding = np.tile(np.array(colour, dtype=np.uint8), (width, 1))  # whole rows: pixel by pixel takes much longer
    padded[:top], padded[top + rows :] = padding, padding
    middle = padded[top : top + rows]
    middle[:, :left], middle[:, left + columns :] = padding[:left], padding[left + columns :]
    middle[:, left : left + columns] = levels
    return padded


def _grey(values: NDArray[Any], white: float, kind: str) -> Image.Image:
    """8 bits per pixel from values between 0 and ``white``."""
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and highest <= white):  # so that NaN, which min and max pass on, is refused too
        raise DataError(f"{kind} grey values from {lowest:g} to {highest:g}; values from 0 to {white:g} can be read")
    if kind == "integer":
        return Image.fromarray((values >> 8).astype(np.uint8))
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))
