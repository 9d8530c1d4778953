"""Draws a genotype: its cells as graphs from left to right."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import networkx as nx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

from fastnas.checks import typed
from fastnas.report.cell_layout import NODE_RADIUS, Array, Placement, arrange
from fastnas.report.figures import picture_path, save_figure, write_title
from fastnas.spaces import AnyGenotype, layout_of
from fastnas.spaces.layout import DrawnCell

FONT_SIZE = 9.0
LABEL_PADDING = 0.05
MARGIN = 0.4
HEADING = 0.35
POINTS_PER_INCH = 72

FAMILY_COLOURS = {
    "separable convolution": "#0072B2",
    "dilated convolution": "#C4500A",
    "other convolution": "#7B3FA0",
    "pooling": "#00845F",
    "skip": "#3C3C3C",
    "none": "#B5B5B5",
    "other operation": "#9A7B00",
}
DEAD_ALPHA = 0.35
OUTPUT_COLOUR = "#A8A8A8"
INPUT_FILL, NODE_FILL, OUTPUT_FILL, DEAD_FILL = "#DDEBF7", "#FFF4D6", "#E4F1DE", "#F4F4F4"


@typed
def draw_genotype(genotype: AnyGenotype, path: Path | str, *, title: str = "") -> None:
    """Draws the cells of a genotype, one above the other, and saves the picture.

    Args:
        genotype: the cells to draw. Several operations between the same two nodes are all
            drawn. Nodes without a state (see `Genotype.live_nodes`) and what leaves them are pale.
        path: where to write; the suffix .png or .svg chooses the format.
        title: a line above the picture.

    Raises:
        ValueError: if the path has another suffix.
    """
    path = picture_path(path)
    save_figure(genotype_figure(genotype, title=title), path)


@typed
def genotype_figure(genotype: AnyGenotype, *, title: str = "") -> Figure:
    """Returns what `draw_genotype` saves: a figure with one axes for each cell."""
    cells = layout_of(genotype).drawn_cells(genotype)
    placements = [_lay_out(cell) for cell in cells]
    boxes = [_extent(placement) for placement in placements]
    width = max(right - left for left, right, _, _ in boxes)
    heights = [top - bottom for _, _, bottom, top in boxes]
    headline, legend = (HEADING if title else 0.1), HEADING
    total = headline + sum(heights) + HEADING * len(cells) + legend
    # This is `Figure` and not pyplot, which keeps global state and a list of open figures.
    figure = Figure(figsize=(width, total))
    if title:
        write_title(figure, title, y=1 - 0.5 * headline / total, va="center", fontsize=13)
    top = total - headline
    for cell, placement, box, height in zip(cells, placements, boxes, heights):
        top -= HEADING + height
        axes = figure.add_axes((0, top / total, 1, height / total))
        axes.set_title(cell.title, fontsize=11, fontweight="bold")
        _draw(axes, cell, placement)
        middle = (box[0] + box[1]) / 2
        # All cells have the scale of the widest, so an inch is an inch in each.
        axes.set_xlim(middle - width / 2, middle + width / 2)
        axes.set_ylim(box[2], box[3])
        axes.set_aspect("equal")
        axes.set_axis_off()
    families = {_family(op) for cell in cells for _, _, op in cell.edges if op is not None}
    figure.legend(
        handles=[
            Line2D([], [], color=colour, linewidth=2, label=family)
            for family, colour in FAMILY_COLOURS.items()
            if family in families
        ],
        loc="lower center",
        ncols=len(families),
        frameon=False,
        fontsize=FONT_SIZE,
    )
    return figure


def _family(op: str) -> str:
    for start, family in (
        ("sep_conv", "separable convolution"),
        ("dil_conv", "dilated convolution"),
        ("skip", "skip"),
        ("none", "none"),
    ):
        if op.startswith(start):
            return family
    if "pool" in op:
        return "pooling"
    return "other convolution" if "conv" in op else "other operation"


def _lay_out(cell: DrawnCell) -> Placement:
    sizes = [None if op is None else _label_size(op) for _, _, op in cell.edges]
    ends = [(source, target) for source, target, _ in cell.edges]
    return arrange(cell.inputs, len(cell.names), ends, sizes)


@cache
def _label_size(text: str) -> tuple[float, float]:
    # The size comes from the font's outlines, as nothing is drawn yet that could be measured.
    box = TextPath((0, 0), text, size=FONT_SIZE).get_extents()
    width, height = box.width / POINTS_PER_INCH, FONT_SIZE / POINTS_PER_INCH
    return width + 2 * LABEL_PADDING, height + 2 * LABEL_PADDING


def _extent(placement: Placement) -> tuple[float, float, float, float]:
    low, high = placement.extent[0] - MARGIN, placement.extent[1] + MARGIN
    return float(low[0]), float(high[0]), float(low[1]), float(high[1])


def _draw(axes: Axes, cell: DrawnCell, placement: Placement) -> None:
    # Several operations may join the same two nodes, each an edge of its own.
    graph = nx.MultiDiGraph()
    for node, name in enumerate(cell.names):
        graph.add_node(node, name=name)
    places = {node: tuple(centre) for node, centre in enumerate(placement.nodes)}
    # networkx takes areas in square points.
    node_size = (2 * NODE_RADIUS * POINTS_PER_INCH) ** 2
    for (source, target, op), bend, label in zip(cell.edges, placement.bends, placement.labels):
        key = graph.add_edge(source, target, op=op)
        colour = OUTPUT_COLOUR if op is None else FAMILY_COLOURS[_family(op)]
        alpha = DEAD_ALPHA if source in cell.dead else 1.0
        nx.draw_networkx_edges(
            graph,
            places,
            edgelist=[(source, target, key)],
            ax=axes,
            edge_color=colour,
            alpha=alpha,
            width=1.0 if op is None else 1.6,
            style="dotted" if op == "none" else "solid",
            arrowsize=11,
            node_size=node_size,
            connectionstyle=f"arc3,rad={bend}",
        )
        if op is not None:
            _write_label(axes, op, label, colour, alpha)
    nx.draw_networkx_nodes(
        graph,
        places,
        ax=axes,
        node_size=node_size,
        node_color=[_fill(cell, node) for node in graph],
        edgecolors=["#BBBBBB" if node in cell.dead else "#555555" for node in graph],
    )
    nx.draw_networkx_labels(
        graph, places, dict(graph.nodes(data="name")), font_size=FONT_SIZE + 1, ax=axes
    )


def _write_label(axes: Axes, op: str, centre: Array, colour: str, alpha: float) -> None:
    axes.text(
        float(centre[0]),
        float(centre[1]),
        op,
        color=colour,
        alpha=alpha,
        fontsize=FONT_SIZE,
        ha="center",
        va="center",
        zorder=3,
        bbox={"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"},
    )


def _fill(cell: DrawnCell, node: int) -> str:
    if node in cell.dead:
        return DEAD_FILL
    if node < cell.inputs:
        return INPUT_FILL
    return OUTPUT_FILL if node == len(cell.names) - 1 else NODE_FILL
