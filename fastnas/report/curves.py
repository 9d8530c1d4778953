"""Draws the course of a search from its history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from fastnas.checks import typed
from fastnas.report.figures import picture_path, save_figure

FIRST, SECOND = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    counts: bool = False
    limits: tuple[float, float] | None = None


PANELS = (
    _Panel("loss", "cross entropy", (("train_loss", "train"), ("valid_loss", "validation"))),
    _Panel(
        "accuracy",
        "share of images",
        (("train_accuracy", "train"), ("valid_accuracy", "validation")),
    ),
    _Panel(
        "skip connections",
        "edges of the genotype",
        (("skips_normal", "normal cell"), ("skips_reduce", "reduction cell")),
        counts=True,
    ),
    _Panel(
        "alpha entropy",
        "share of log K, mean over edges",
        (("entropy_normal", "normal cell"), ("entropy_reduce", "reduction cell")),
        limits=(0.0, 1.0),
    ),
    _Panel(
        "dominant eigenvalue",
        "of the architecture's Hessian",
        (("eigenvalue", "validation"),),
    ),
    _Panel("skips", "layers of the column", (("skips", "column"),), counts=True),
    _Panel(
        "alpha entropy",
        "share of log K, mean over layers",
        (("entropy", "column"),),
        limits=(0.0, 1.0),
    ),
)

DRAWN = ("epoch", *(key for panel in PANELS for key, _ in panel.lines))


@typed
def draw_history(history: Sequence[Mapping[str, object]], path: Path | str) -> None:
    """Draws losses, accuracies, skip counts and alpha entropies over the epochs of a search.

    Args:
        history: one entry for each epoch, with the key `epoch` and any of `train_loss`,
            `valid_loss` (nats), `train_accuracy`, `valid_accuracy` (0..1), `skips_normal`,
            `skips_reduce` (edges), `entropy_normal`, `entropy_reduce` (shares of log K),
            `eigenvalue` (of the Hessian in the logits, nats), and of a column `skips` (layers) and
            `entropy`. Others are ignored, those missing or None left
            out; a panel without any line is not drawn.
        path: where to write; the suffix .png or .svg chooses the format.

    Raises:
        ValueError: if the path has another suffix, the history is empty, an entry has no
            epoch, or none has anything to draw.
    """
    path = picture_path(path)
    save_figure(history_figure(history), path)


@typed
def draw_best_so_far(accuracies: Sequence[float], path: Path | str) -> None:
    """Draws the best accuracy after 1, 2, ... evaluations, of which there is at least one."""
    if not len(accuracies):
        raise ValueError("accuracies is empty; those of one or more evaluations are needed")
    figure = Figure(figsize=(5, 3.2), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.add_subplot()
    axes.plot(range(1, len(accuracies) + 1), accuracies, color=FIRST, drawstyle="steps-post")
    axes.set_xlabel("evaluations")
    axes.set_ylabel("best accuracy so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


@typed
def history_figure(history: Sequence[Mapping[str, object]]) -> Figure:
    """Returns what `draw_history` saves: a figure with one axes for each panel."""
    if not history:
        raise ValueError("history is empty; expected an entry for at least one epoch")
    for position, entry in enumerate(history):
        if "epoch" not in entry:
            raise ValueError(f"history[{position}] has no epoch; it has {', '.join(entry)}")
        for key in DRAWN:
            value = entry.get(key)
            if value is not None and not isinstance(value, int | float):
                raise TypeError(f"history[{position}] has {key} {value!r}; a number is needed")
    panels = [
        panel
        for panel in PANELS
        if any(entry.get(key) is not None for key, _ in panel.lines for entry in history)
    ]
    if not panels:
        keys = ", ".join(key for panel in PANELS for key, _ in panel.lines)
        raise ValueError(f"history has nothing to draw; expected any of {keys}")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(5 * columns, 3.2 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )
    for position, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(rows, columns, position), panel, history)
    return figure


def _draw(axes: Axes, panel: _Panel, history: Sequence[Mapping[str, Any]]) -> None:
    # Beyond that the markers run together into a thick line.
    marker = "o" if len(history) <= 30 else None
    for (key, label), colour in zip(panel.lines, (FIRST, SECOND)):
        points = [(entry["epoch"], entry[key]) for entry in history if entry.get(key) is not None]
        if points:
            epochs, values = zip(*points)
            axes.plot(
                epochs,
                values,
                color=colour,
                label=label,
                marker=marker,
                markersize=3,
                drawstyle="steps-mid" if panel.counts else "default",
            )
    axes.set_title(panel.title, fontsize=11, fontweight="bold")
    axes.set_xlabel("epoch")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.counts:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        # Counts begin at 0, or one skip more would look like a collapse.
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
