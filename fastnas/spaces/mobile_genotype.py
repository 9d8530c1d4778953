"""Holds the genotype of the MobileNet-like space: a column and the sizes that it was found at."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastnas.bounds import Bounds, whole
from fastnas.checks import check_number, short
from fastnas.spaces import strict_json
from fastnas.spaces.genotype import AnyGenotype
from fastnas.spaces.mobile import (
    MOBILE_ARCHITECTURES,
    SKIP,
    Column,
    MobileSpace,
    format_column,
    parse_column,
)

MOBILENET = "mobilenet"
"""What the space is called, and the key of a column in JSON."""
WIDTHS = Bounds(0, 16, above=True)
STRIDES = whole(1, 2)
_KEYS = (MOBILENET, "width", "stem_stride")
_COLUMN = re.compile(rf"\s*(k[0-9]+_e[0-9]+|{SKIP})(\s|$)")


def mobile_space(width: float = 1.0, stem_stride: int = 2) -> MobileSpace:
    """Returns the published space in these sizes, as `MobileGenotype` has them."""
    return MobileSpace(stem_stride=stem_stride).scaled(width)


@dataclass(frozen=True)
class MobileGenotype:
    """Holds an architecture of the MobileNet-like space, and how its network is scaled.

    Args:
        architecture: a block for each layer.
        width: what all channels of the published space are multiplied with.
        stem_stride: of the first convolution, 2 or, for small images, 1.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    architecture: Column
    width: float = 1.0
    stem_stride: int = 2

    def __post_init__(self) -> None:
        check_number("width", self.width)
        if self.width not in WIDTHS:
            raise ValueError(f"width is {short(self.width)}; a number is needed, {WIDTHS}")
        checked = self.space.checked(self.architecture)
        object.__setattr__(self, "architecture", checked)

    @property
    def space(self) -> MobileSpace:
        return mobile_space(self.width, self.stem_stride)

    @property
    def text(self) -> str:
        """Returns the blocks by name, as `fastnas.spaces.parse_column` reads them."""
        return format_column(self.architecture)

    def to_json(self) -> str:
        """Writes what `read_column` reads back to an equal genotype."""
        return json.dumps(dict(zip(_KEYS, (self.text, self.width, self.stem_stride))))


Architecture = AnyGenotype | MobileGenotype
"""What a search ends with: cells, or a column."""


def begins_column(text: str) -> bool:
    """Tells whether a text, unless it is JSON, is meant for a column: a name, or blocks by name."""
    return text.strip() in MOBILE_ARCHITECTURES or bool(_COLUMN.match(text))


def read_column(text: str) -> MobileGenotype | None:
    """Reads a column; returns None for a text that is of another kind.

    Args:
        text: the name of a published one (`fastnas.spaces.MOBILE_ARCHITECTURES`), the names of its
            blocks, as in ``k3_e6 k5_e3 skip ...``, or JSON with these under "mobilenet", and
            optionally "width" and "stem_stride".

    Raises:
        ValueError: it is meant for one, and is none; the message says what is wrong and where.
    """
    name = text.strip()
    if name in MOBILE_ARCHITECTURES:
        return MobileGenotype(MOBILE_ARCHITECTURES[name])
    if _COLUMN.match(text):
        return MobileGenotype(parse_column(text))
    if not name.startswith("{"):
        return None
    try:
        value = strict_json.loads(text)
    except ValueError:
        # Whoever reads cells says what is wrong with the JSON.
        return None
    return _of_value(value) if isinstance(value, dict) and MOBILENET in value else None


def _of_value(value: Mapping[str, Any]) -> MobileGenotype:
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise ValueError(f"unknown key {short(unknown[0])}; allowed: {', '.join(_KEYS)}")
    column, sizes = value[MOBILENET], {k: v for k, v in value.items() if k != MOBILENET}
    if not isinstance(column, str):
        raise ValueError(f"{MOBILENET} is {short(column)}; names of blocks in a text are needed")
    try:
        return MobileGenotype(parse_column(column), **sizes)
    except TypeError as error:  # what is of another type in JSON is a wrong text here
        raise ValueError(str(error)) from error
