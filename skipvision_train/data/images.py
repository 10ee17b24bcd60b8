"""Image files to model pixels: decode, pad to a square, resize, normalise."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from skipvision_train.errors import DataError
from skipvision_train.models.configuration import VisionConfig

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded (a 256 MiB RGB image; Pillow's own limit for a warning)."""

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
    NotImplementedError,
    struct.error,
    Image.DecompressionBombError,
)


def load_image(path: str | Path, record_id: str) -> Image.Image:
    """Decode an image file completely, upright, as RGB; transparency is laid on white.

    Args:
        path: the content decides the format, not the extension. A missing file is looked for under the same name
            with another of ``SUFFIXES``.
        record_id: named in errors.

    Raises:
        DataError: naming file and record: missing, no image, truncated, or more than ``MAX_PIXELS``.
    """
    path = _existing(Path(path), record_id)
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path} (record {record_id}): {image.width} x {image.height} pixels; at most {MAX_PIXELS} are read"
                )
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except _DECODER_ERRORS as error:
        raise DataError(f"{path} (record {record_id}): no image that can be decoded: {error}") from error


def to_pixels(images: Sequence[Image.Image], vision: VisionConfig) -> Tensor:
    """Pad to a square with the mean colour, resize (bicubic, antialiased), normalise; LLaVA's ``pad`` arrangement.

    Padding is half on each side of the shorter dimension; an odd pixel goes right or below.

    Args:
        images: of any size; other modes than RGB are converted as ``to_rgb`` does.
        vision: ``image_size`` (S), ``image_mean`` and ``image_std`` are used.

    Returns:
        (len(images), 3, S, S) float32.
    """
    side = vision.image_size
    red, green, blue = (int(255 * value) for value in vision.image_mean)
    pixels = np.empty((len(images), 3, side, side), dtype=np.float32)
    for image, planes in zip(images, pixels, strict=True):
        rgb = image if image.mode == "RGB" else to_rgb(image)
        square = _pad_to_square(rgb, (red, green, blue))
        if square.width != side:
            square = square.resize((side, side), Image.Resampling.BICUBIC)
        levels = np.asarray(square)
        # Plane by plane: arithmetic along an innermost axis of three channels is several times slower.
        for channel, (mean, std) in enumerate(zip(vision.image_mean, vision.image_std, strict=True)):
            np.multiply(levels[..., channel], np.float32(1 / (255 * std)), out=planes[channel])
            planes[channel] -= np.float32(mean / std)
    return torch.from_numpy(pixels)


def _existing(path: Path, record_id: str) -> Path:
    if path.is_file():
        return path
    for suffix in SUFFIXES:
        if (other := path.with_suffix(suffix)).is_file():
            return other
    raise DataError(f"{path} (record {record_id}): no such image file")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit grey is scaled, not clipped; transparency is laid on white."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits per pixel; convert() would clip, not scale
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
