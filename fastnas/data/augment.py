"""Crops, flips and cuts out at random, for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.checks import check_fields, typed
from fastnas.processes import WHOLE, Share
from fastnas.reference.arguments import check_floating, check_shape
from fastnas.transfer import to_device


@dataclass(frozen=True)
class Augment:
    """Shifts, flips and cuts out, drawn independently for each image, in this order.

    Attributes:
        crop: the largest shift in pixels; the image is padded by as much on every side and a
            window of the old size is cut at a random place.
        flip: mirror left and right with probability one half.
        cutout: side in pixels of a square of zeros around a random pixel, clipped at the
            border; 0 for none.

    Raises:
        TypeError: if crop or cutout is not an integer.
        ValueError: if one is negative.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("crop", "cutout"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; expected 0 or more pixels")

    @typed
    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator,
        *,
        fill: Tensor | None = None,
        share: Share = WHOLE,
    ) -> Tensor:
        """Augments one batch.

        Args:
            images: float [B, C, H, W] on any device.
            generator: a CPU generator; the draws are made there, so they are the same
                whatever the device of the images.
            fill: [C], the value of the padding; zeros if None. The public DARTS code pads before
                it normalises, which is `-mean / std` here.
            share: which part of a batch the images are: each is changed as in the whole batch.

        Returns:
            A tensor of the same shape, dtype and device; the images themselves where nothing
            is switched on.

        Raises:
            TypeError: if the images or the fill are not dense and floating point.
            ValueError: if their shapes are others, or the generator is not on the CPU.
        """
        check_floating("images", images)
        if images.dim() != 4:
            raise ValueError(f"images have shape {list(images.shape)}; expected [B, C, H, W]")
        if generator.device.type != "cpu":
            raise ValueError(f"generator is on {generator.device}; expected a CPU generator")
        if fill is not None:
            check_floating("fill", fill)
            check_shape("fill", fill, [images.shape[1]])
            if fill.is_meta:
                raise ValueError("fill is on the meta device; its values are needed")
        if not (self.crop or self.flip or self.cutout):
            return images
        # All numbers go in one copy, which nothing waits for.
        whole = torch.Size((images.shape[0] * share.size, *images.shape[1:]))
        draws = to_device(share.of(self.draw(whole, generator)), images.device)
        down, right, mirrored, centre_row, centre_column = draws[:, :, None]

        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        if self.crop or self.flip:
            # The mirror turns the window that was cut, so the shift is added after it.
            source_columns = torch.where(mirrored == 1, width - 1 - columns, columns)
            images = _window(images, rows + down, source_columns + right, fill)
        if self.cutout:
            hole = _outer(
                _within(rows, centre_row, self.cutout), _within(columns, centre_column, self.cutout)
            )
            images = images.masked_fill(hole, 0)
        return images

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draws the random numbers for one batch of this shape [B, C, H, W].

        Returns:
            int64 [5, B] on the CPU: where the window starts in the image (row and column,
            -crop .. crop), whether it is mirrored (0 or 1), the pixel in the middle of the
            cutout (row and column).
        """
        batch, _, height, width = shape
        flips = 2 if self.flip else 1
        ranges = (
            (-self.crop, self.crop + 1),
            (-self.crop, self.crop + 1),
            (0, flips),
            (0, height),
            (0, width),
        )
        # Every number is drawn, also those of what is off: switching one off leaves the others' as
        # they are.
        return torch.stack([torch.randint(*r, (batch,), generator=generator) for r in ranges])


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None, :, None] & columns[:, None, None, :]


def _within(positions: Tensor, centre: Tensor, side: int) -> Tensor:
    # A square of an even side reaches one pixel further before its centre, as in the public code.
    offset = positions - centre + side // 2
    return (offset >= 0) & (offset < side)


def _window(images: Tensor, rows: Tensor, columns: Tensor, fill: Tensor | None) -> Tensor:
    """Gathers images[b, c, rows[b, i], columns[b, j]], and `fill` where that lies outside."""
    height, width = images.shape[2:]
    source_rows, source_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    source = source_rows[:, :, None] * width + source_columns[:, None, :]
    # One gather moves every image by its own shift: a loop over images would be a launch an image.
    index = source.flatten(1)[:, None, :].expand(-1, images.shape[1], -1)
    taken = images.flatten(2).gather(2, index).view(images.shape)
    inside = _outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    padding = images.new_zeros(()) if fill is None else fill.to(images)[:, None, None]
    return torch.where(inside, taken, padding)
