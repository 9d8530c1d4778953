"""Turns one picture file into bytes: its mode, its orientation, the square that is cut of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastnas.data.source import DataError, one_line

SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
GREY = ("1", "L", "LA", "La", *SIXTEEN_BITS)
FLOATS = "F"
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""Whatever a file is called: Pillow would start another program for PostScript."""
ORIENTATION = 0x0112
"""The EXIF tag; 5 to 8 stand for a picture that lies on its side."""
ATTEMPTS = 10
LONGEST_SIDE = 4 / 3
"""Of a random crop over its other side."""
KEPT_FOR_SCALING = 2
"""A JPEG is decoded at a half, a quarter or an eighth where that leaves so many times the pixels
that are wanted: reading a photograph for 64 pixels takes a third of the time, and the scaling
after it still averages."""

Bytes = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


@dataclass(frozen=True)
class Reading:
    """Says what becomes of each picture of a folder.

    Attributes:
        size: side of the result in pixels.
        channels: 1 for grey, 3 for RGB.
        crop_scale: the smallest share of a picture's area that a random crop has; 1: training
            pictures are cut as all others are.
        centre_share: share of the shorter side that the square in the middle has.
    """

    size: int
    channels: int
    crop_scale: float
    centre_share: float


def header_mode(path: str) -> str:
    """Returns the mode that Pillow names, of the header alone.

    Raises:
        DataError: it is no picture, or one of floats.
    """
    with _told(path), Image.open(path, formats=FORMATS) as image:
        return _known(image)


def read_picture(path: str, reading: Reading, rng: np.random.Generator | None) -> Bytes:
    """Reads a picture as uint8 [C, size, size].

    It is turned as its EXIF orientation says, a transparent one laid on white, 16 bits become 8.

    Args:
        rng: draws the crop; None: the square in the middle.

    Raises:
        DataError: it cannot be read.
    """
    with _told(path), Image.open(path, formats=FORMATS) as image:
        _known(image)
        width, height = _upright_size(image)
        side = min(width, height) * reading.centre_share
        box = _in_the_middle(width, height, side, side)
        if rng is not None and reading.crop_scale < 1:
            box = random_box(width, height, reading.crop_scale, rng)
        _decode_smaller(image, box, reading.size)
        upright = _plain(_upright(image), reading.channels)
        # The box is in pixels of the whole picture, which may have been decoded smaller.
        across, down = upright.width / width, upright.height / height
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        square = upright.resize((reading.size, reading.size), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(square)
    return pixels[None] if reading.channels == 1 else np.moveaxis(pixels, -1, 0)


def random_box(width: int, height: int, smallest: float, rng: np.random.Generator) -> Box:
    """Draws a crop as Inception and ImageNet networks are trained with (Szegedy et al., 2015).

    Its share of the area is uniform in `smallest` .. 1, its aspect log-uniform in 3/4 .. 4/3, its
    place uniform; where ten draws do not fit into the picture, it is the largest in the middle.
    """
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(smallest, 1)
        aspect = math.exp(rng.uniform(-math.log(LONGEST_SIDE), math.log(LONGEST_SIDE)))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left = int(rng.integers(0, width - across, endpoint=True))
            top = int(rng.integers(0, height - down, endpoint=True))
            return left, top, left + across, top + down
    widest, highest = min(width, height * LONGEST_SIDE), min(height, width * LONGEST_SIDE)
    return _in_the_middle(width, height, widest, highest)


def _in_the_middle(width: int, height: int, across: float, down: float) -> Box:
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Turns whatever a damaged file makes Pillow raise into one line that names it."""
    try:
        with warnings.catch_warnings():
            # Damaged EXIF data does not make a picture unreadable.
            warnings.filterwarnings("ignore", module=r"PIL\..*")
            yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{path}: cannot be read: no picture in a format that is known") from error
    except Exception as error:  # zlib.error, struct.error, SyntaxError and more
        reason = error.strerror if isinstance(error, OSError) else None
        raise DataError(f"{path}: cannot be read: {reason or one_line(error)}") from error


def _known(image: Image.Image) -> str:
    if image.mode == FLOATS:
        raise DataError("its pixels are floats, of an unknown range; expected 8 or 16 bits")
    return image.mode


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns the size that `_upright` will have; of a JPEG without decoding it."""
    if not _is_jpeg(image):
        return _upright(image).size
    try:
        on_its_side = image.getexif().get(ORIENTATION, 1) in range(5, 9)
    except Exception:  # damaged
        on_its_side = False
    return image.size[::-1] if on_its_side else image.size


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data: the picture stays as it lies
        return image


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def _decode_smaller(image: Image.Image, box: Box, size: int) -> None:
    """Lets a JPEG be decoded at a fraction of its size, where the crop stays large enough."""
    factor = min(box[2] - box[0], box[3] - box[1]) / (KEPT_FOR_SCALING * size)
    if factor >= 2 and _is_jpeg(image):
        width, height = image.size
        image.draft(None, (math.ceil(width / factor), math.ceil(height / factor)))


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """Returns a picture of any mode in mode L or RGB."""
    if image.mode in SIXTEEN_BITS:
        image = _eight_bits(image)
    if image.has_transparency_data:
        # What a transparent pixel holds is arbitrary; most programs show it on white.
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 0..65535 to 0..255, where Pillow would cut off everything above 255."""
    levels: NDArray[Any] = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 0xFFFF:
        raise DataError(f"its pixels are in {levels.min()}..{levels.max()}; expected 16 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
