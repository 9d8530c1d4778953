"""Holds what a landscape is asked for; the command line reads it without loading matplotlib."""

from __future__ import annotations

from dataclasses import dataclass

from fastnas.bounds import Bounds, whole
from fastnas.search.config import ConfigError
from fastnas.search.fields import SEEDS

STEPS = whole(2, 501)
EXTENTS = Bounds(0, 1e6, above=True)
IMAGES = whole(1, 10**9)


@dataclass(frozen=True)
class LandscapeSettings:
    """Says which points are computed, and on what.

    Args:
        steps: points along each direction.
        extent: of both directions, -extent to extent; 1 is as far as the logits are from 0.
        images: of those that the logits were searched on; None: all, at most 4,096.
        seed: of the two directions.
        device: None: the one that the search ran on.

    Raises:
        ConfigError: a number is out of its bounds.
    """

    steps: int = 11
    extent: float = 1.0
    images: int | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        try:
            STEPS.check("steps", self.steps)
            EXTENTS.check("extent", self.extent)
            SEEDS.check("seed", self.seed)
            if self.images is not None:
                IMAGES.check("images", self.images)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
