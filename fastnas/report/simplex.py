"""Draws what a search has tried as points of the simplex of distributions over operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike

from fastnas.checks import typed
from fastnas.report.figures import save_figure

JITTER = 0.02
"""Of the radius: cells of one distribution would hide each other."""


@typed
def draw_simplex(
    shares: Mapping[str, ArrayLike], ops: Sequence[str], accuracies: Sequence[float], path: Path
) -> None:
    """Saves `simplex_figure`; the path's suffix .png or .svg chooses the format."""
    save_figure(simplex_figure(shares, ops, accuracies), path)


@typed
def simplex_figure(
    shares: Mapping[str, ArrayLike], ops: Sequence[str], accuracies: Sequence[float]
) -> Figure:
    """Draws each distribution at the mean of the operations' corners, weighted by its shares.

    Args:
        shares: cell type to those of n cells, [n, K].
        ops: K, a corner each.
        accuracies: n of them, the colours; the best is ringed.

    Raises:
        ValueError: there are no cell types, operations or accuracies, or other numbers of them.
    """
    K = len(ops)
    if not (shares and K and len(accuracies)):
        raise ValueError(
            f"shares has {len(shares)} cell types, ops {K} and accuracies {len(accuracies)} values;"
            " one or more of each are needed"
        )
    for cell_type, rows in shares.items():
        shape = np.shape(rows)
        if shape != (len(accuracies), K) or np.asarray(rows).dtype.kind not in "iuf":
            raise ValueError(
                f"shares of the {cell_type} cell have shape {list(shape)}; numbers of shape"
                f" {[len(accuracies), K]} are needed, for {K} ops and {len(accuracies)} accuracies"
            )
    # The first operation is at the top, the others follow clockwise.
    angles = np.pi / 2 - 2 * np.pi * np.arange(K) / K
    corners = np.stack([np.cos(angles), np.sin(angles)], 1)
    # The seed is fixed, so that equal results give equal pictures.
    rng, best = np.random.default_rng(0), int(np.argmax(accuracies))
    jitter = rng.normal(0, JITTER, (len(accuracies), 2))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(4.6 * len(shares) + 0.8, 4.6), layout=layout)
    panels, norm = [], Normalize(min(accuracies), max(accuracies))
    for number, (cell_type, rows) in enumerate(shares.items(), 1):
        axes = figure.add_subplot(1, len(shares), number)
        axes.fill(*corners.T, facecolor="none", edgecolor="0.7", linewidth=1)
        across, up = (np.asarray(rows) @ corners + jitter).T
        dots = axes.scatter(across, up, c=accuracies, s=18, cmap="viridis", norm=norm, linewidths=0)
        axes.plot(across[best], up[best], "o", color="#D55E00", markersize=10, fillstyle="none")
        for op, (x, y) in zip(ops, 1.12 * corners):
            side = "center" if abs(x) < 0.2 else "left" if x > 0 else "right"
            axes.text(x, y, op, ha=side, va="center", fontsize=8)
        axes.set_title(f"{cell_type} cell", fontsize=11, fontweight="bold", pad=16)
        axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        axes.set_axis_off()
        panels.append(axes)
    figure.colorbar(dots, ax=panels, label="accuracy", shrink=0.8)
    return figure
