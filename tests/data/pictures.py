"""Small folders of pictures, whose pixels say which picture they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, height: int = 20, width: int = 24, channels: int = 3) -> Image.Image:
    """A picture of random blocks, which scaling and JPEG do not wash out."""
    shape = (-(-height // 4), -(-width // 4), *((channels,) if channels > 1 else ()))
    blocks = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)[:height, :width])


def write_class(
    folder: Path, count: int, seed: int, suffix: str = "png", channels: int = 3
) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        noise(seed * 1000 + i, 20 + i % 5, 24, channels).save(folder / f"{i:03d}.{suffix}")


def write_folder(
    root: Path,
    parts: Sequence[str] = ("train", "val"),
    classes: Sequence[str] = ("cat", "dog"),
    count: int = 6,
    suffix: str = "png",
    channels: int = 3,
) -> Path:
    """root/part/class/000.png and so on; root/class/000.png for the part ""."""
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            write_class(root / part / name, count, 10 * p + c, suffix, channels)
    return root
