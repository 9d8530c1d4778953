"""Draws an architecture of the MobileNet-like space: a column of blocks from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fastnas.checks import check_type, typed
from fastnas.report.figures import picture_path, save_figure, write_title
from fastnas.spaces import MobileSpace
from fastnas.spaces.mobile import MOBILE_SPACE, SKIP, Block, MobileLayer

WIDTH, ROW, GAP = 4.6, 0.3, 0.07
"""Inches of the picture, of a block's height and between two."""
PER_EXPANSION = 0.35
"""Inches of a block's width for each unit of its expansion."""
BESIDE = 0.25
FONT_SIZE = 8.0
FIXED_FILL, EDGE = "#EEEEEE", "#555555"
COLOURS = "viridis"


@typed
def draw_column(
    architecture: Sequence[Any],
    path: Path | str,
    *,
    space: MobileSpace = MOBILE_SPACE,
    title: str = "",
) -> None:
    """Draws the blocks of an architecture, one below the other, and saves the picture.

    The colour of a block is its kernel, its width the expansion; beside it stand the channels that
    it returns, and the stride where it is 2. A skip is a line.

    Args:
        architecture: a block for each layer of the space, `fastnas.spaces.parse_column` reads it.
        path: where to write; the suffix .png or .svg chooses the format.
        space: the column that it is of.
        title: a line above the picture.

    Raises:
        TypeError, ValueError: the path has another suffix, or the architecture is none of the
            space.
    """
    path = picture_path(path)
    save_figure(column_figure(architecture, space=space, title=title), path)


@typed
def column_figure(
    architecture: Sequence[Any], *, space: MobileSpace = MOBILE_SPACE, title: str = ""
) -> Figure:
    """Returns what `draw_column` saves: a figure with one axes, in inches."""
    check_type("architecture", architecture, list, tuple)
    blocks = space.checked(architecture)
    rows, pitch = len(blocks) + 2, ROW + GAP
    height = rows * pitch + 0.5 + (0.4 if title else 0.0)
    figure = Figure(figsize=(WIDTH, height))
    if title:
        write_title(figure, title, y=1 - 0.2 / height, va="center", fontsize=11)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-WIDTH / 2, WIDTH / 2)
    axes.set_ylim(0, height)
    axes.set_axis_off()
    top = height - (0.5 if title else 0.1)
    colours = _colours(space.kernels)
    widest = PER_EXPANSION * max(space.expansions)
    # The line of the features lies below the blocks, and is what a skip shows.
    axes.plot([0, 0], [top - (rows - 1) * pitch, top - GAP], color=EDGE, linewidth=1.2, zorder=0)
    _box(axes, top, widest, FIXED_FILL, "stem", f"{space.first}", "black")
    for i, (block, layer) in enumerate(zip(blocks, space.layers), 1):
        _draw(axes, top - i * pitch, block, layer, colours, widest)
    _box(axes, top - (rows - 1) * pitch, widest, FIXED_FILL, "head", f"{space.head}", "black")
    figure.legend(
        handles=[Patch(color=colours[k], label=f"{k}x{k}") for k in sorted(colours)],
        loc="lower center",
        ncols=len(colours),
        frameon=False,
        fontsize=FONT_SIZE,
    )
    return figure


def _colours(kernels: Sequence[int]) -> dict[int, Any]:
    """Maps each kernel to a colour, the larger the darker."""
    scale = matplotlib.colormaps[COLOURS]
    ordered = sorted(kernels, reverse=True)
    # The lightest third is no ground for white letters.
    return {k: scale(0.65 * i / max(1, len(ordered) - 1)) for i, k in enumerate(ordered)}


def _draw(
    axes: Axes,
    top: float,
    block: Block,
    layer: MobileLayer,
    colours: dict[int, Any],
    widest: float,
) -> None:
    if isinstance(block, str):
        middle = top - ROW / 2
        axes.text(0.08, middle, SKIP, fontsize=FONT_SIZE, va="center", color=EDGE)
        return
    kernel, expansion = block
    stride = ", stride 2" if layer.stride == 2 else ""
    beside = f"{layer.C_out}{stride}"
    width = PER_EXPANSION * expansion
    label = f"{kernel}x{kernel}, {expansion}"
    _box(axes, top, width, colours[kernel], label, beside, "white", widest)


def _box(
    axes: Axes,
    top: float,
    width: float,
    fill: Any,
    label: str,
    beside: str,
    colour: str,
    widest: float | None = None,
) -> None:
    """Draws a box with a label in it, and a text to the right of the widest one."""
    corner, middle = (-width / 2, top - ROW), top - ROW / 2
    axes.add_patch(Rectangle(corner, width, ROW, facecolor=fill, edgecolor=EDGE, linewidth=0.8))
    axes.text(0, middle, label, fontsize=FONT_SIZE, ha="center", va="center", color=colour)
    x = (widest or width) / 2 + BESIDE
    axes.text(x, middle, beside, fontsize=FONT_SIZE, va="center")
