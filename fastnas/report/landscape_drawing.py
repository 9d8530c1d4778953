"""Draws the loss and the accuracy around the logits of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike, NDArray

from fastnas.checks import typed
from fastnas.report.figures import picture_path, save_figure

LEVELS = 8
CENTRE = "#D55E00"


@typed
def draw_landscape(
    offsets: Sequence[float], loss: ArrayLike, accuracy: ArrayLike, path: Path | str
) -> None:
    """Saves `landscape_figure`; the path's suffix .png or .svg chooses the format."""
    path = picture_path(path)
    save_figure(landscape_figure(offsets, loss, accuracy), path)


@typed
def landscape_figure(offsets: Sequence[float], loss: ArrayLike, accuracy: ArrayLike) -> Figure:
    """Returns two panels, loss and accuracy over two directions; a ring marks the logits found.

    Args:
        offsets: S >= 2 along both directions, increasing.
        loss, accuracy: numbers [S, S], the first axis along the first direction, drawn to the
            right; what is not finite is left white.

    Raises:
        ValueError: the offsets do not increase, or the numbers have another shape.
    """
    at = np.asarray(offsets, dtype=float)
    if at.ndim != 1 or len(at) < 2 or not (np.isfinite(at).all() and (np.diff(at) > 0).all()):
        raise ValueError("offsets are no two or more finite numbers that increase")
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(10, 4.2), layout=layout)
    panels = (("loss", loss, "cross entropy", "viridis_r"),
              ("accuracy", accuracy, "share of images", "viridis"))  # fmt: skip
    for number, (name, values, unit, colours) in enumerate(panels, 1):
        z = _grid(name, values, len(at))
        # pcolormesh has rows upwards, so the first direction becomes the horizontal axis.
        shown = np.ma.masked_invalid(z.T)
        axes = figure.add_subplot(1, 2, number)
        mesh = axes.pcolormesh(at, at, shown, cmap=colours, shading="nearest", rasterized=True)
        if shown.count() and shown.min() < shown.max():
            axes.contour(at, at, shown, LEVELS, colors="black", linewidths=0.5, alpha=0.6)
        if at[0] <= 0 <= at[-1]:
            axes.plot(0, 0, "o", color=CENTRE, markersize=8, fillstyle="none")
        axes.set_title(name, fontsize=11, fontweight="bold")
        axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
        figure.colorbar(mesh, ax=axes, label=unit)
    return figure


def _grid(name: str, values: ArrayLike, side: int) -> NDArray[np.float64]:
    try:
        z = np.asarray(values)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"{name} has rows of several lengths; {side} each are needed") from error
    if z.shape != (side, side) or z.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} has shape {list(z.shape)}; numbers of shape {[side, side]} are needed, for"
            f" {side} offsets"
        )
    return z.astype(np.float64)
