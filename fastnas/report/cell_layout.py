"""Decides where the nodes, edges and edge labels of a cell go, so that each can be read.

Every node has a column of its own, left to right. Heights, bends of the edges and places of the
labels start from a plain guess and are then improved one at a time, each to its best value given
all others, until nothing moves. Lengths are in inches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ends = Sequence[tuple[int, int]]
Size = tuple[float, float]

NODE_RADIUS = 0.26
COLUMN = 1.9
LEVELS = np.array([-1.4, -0.7, 0.0, 0.7, 1.4])
INPUT_HEIGHT = 0.7
BENDS = np.array([0.0, 0.12, -0.12, 0.24, -0.24, 0.36, -0.36, 0.5, -0.5])
PLACES = np.linspace(0.26, 0.74, 9)
# The ends of a curve, where edges have to meet, do not count as crowded.
SAMPLES = np.linspace(0.12, 0.88, 25)
EDGE_GAP = 0.13
NODE_GAP = 0.12
SWEEPS = 8
MOST_ARRANGED = 40
"""Edges of a cell beyond which the plain guess is drawn; with 60 a sweep takes seconds."""

STEEPNESS_COST, BEND_COST, PLACE_COST = 0.5, 4.0, 2.0
NODE_HIT_COST, COVERED_COST, OVERLAP_COST = 50.0, 3.0, 3000.0


@dataclass(frozen=True)
class Placement:
    """Holds the places found for one cell.

    Attributes:
        nodes: centres, [nodes, 2].
        bends: for each edge the bend of matplotlib's "arc3" connection style, [edges].
        labels: centres of the edge labels, [edges, 2].
        extent: the corners, lower left and upper right, of all that is drawn, [2, 2].
    """

    nodes: Array
    bends: Array
    labels: Array
    extent: Array


def arrange(inputs: int, nodes: int, edges: Ends, label_sizes: Sequence[Size | None]) -> Placement:
    """Finds places for a cell.

    Args:
        inputs: how many of the nodes, the first ones, are inputs; they share the first column.
        nodes: number of nodes, the last being the output.
        edges: (source, target) of each edge.
        label_sizes: width and height of each edge's label, None for an edge without.
    """
    sweeps = SWEEPS if len(edges) <= MOST_ARRANGED else 0
    centres = _heights(inputs, nodes, edges, sweeps)
    bends = np.zeros(len(edges))
    places = np.full(len(edges), 0.5)
    lines = _lines(centres, edges, bends, SAMPLES)
    labels = _lines(centres, edges, bends, np.array([0.5]))[:, 0]
    for _ in range(sweeps):
        before = bends.copy(), places.copy()
        for edge, size in enumerate(label_sizes):
            others = [k for k in range(len(edges)) if k != edge]
            boxes = [_box(labels[k], other) for k in others if (other := label_sizes[k])]
            bends[edge], places[edge] = _best(
                edges[edge], size, centres, lines[others], np.array(boxes).reshape(-1, 2, 2)
            )
            start, end = centres[list(edges[edge])]
            lines[edge] = curve(start, end, bends[edge], SAMPLES)
            labels[edge] = curve(start, end, bends[edge], places[edge : edge + 1])[0]
        # A sweep that moves nothing would be followed by more of the same.
        if np.array_equal(before, (bends, places)):
            break
    drawn = np.concatenate([centres - NODE_RADIUS, centres + NODE_RADIUS, lines.reshape(-1, 2)])
    return Placement(centres, bends, labels, np.stack([drawn.min(axis=0), drawn.max(axis=0)]))


def curve(start: Array, end: Array, bend: float, at: Array) -> Array:
    """Returns points of matplotlib's "arc3" curve at parameters 0..1; [len(at), 2]."""
    # This is matplotlib's own formula, so that labels lie on the curves which it will draw.
    control = (start + end) / 2 + bend * (end - start)[::-1] * (1, -1)
    at = at[:, None]
    return (1 - at) ** 2 * start + 2 * at * (1 - at) * control + at**2 * end


def _lines(centres: Array, edges: Ends, bends: Array, at: Array) -> Array:
    """Returns all curves, [edges, len(at), 2]."""
    curves = [curve(centres[s], centres[t], bend, at) for (s, t), bend in zip(edges, bends)]
    return np.array(curves).reshape(len(edges), len(at), 2)


def _heights(inputs: int, nodes: int, edges: Ends, sweeps: int) -> Array:
    """Returns centres of the nodes that keep straight edges apart and off other nodes."""
    centres = np.zeros((nodes, 2))
    # All inputs stand in the first column.
    centres[:, 0] = np.maximum(np.arange(nodes) - inputs + 1, 0) * COLUMN
    if inputs > 1:
        centres[:inputs, 1] = np.linspace(INPUT_HEIGHT, -INPUT_HEIGHT, inputs)
    movable = range(inputs, nodes - 1)
    for node in movable:
        centres[node, 1] = LEVELS[1 if node % 2 else 3]
    for _ in range(sweeps):
        before = centres.copy()
        for node in movable:
            costs = []
            for level in LEVELS:
                centres[node, 1] = level
                costs.append(_cost_of_heights(centres, edges))
            centres[node, 1] = LEVELS[np.argmin(costs)]
        if np.array_equal(before, centres):
            break
    return centres


def _cost_of_heights(centres: Array, edges: Ends) -> float:
    lines = _lines(centres, edges, np.zeros(len(edges)), SAMPLES[::3])
    cost = STEEPNESS_COST * float(np.abs(lines[:, -1, 1] - lines[:, 0, 1]).sum())
    for k, line in enumerate(lines):
        cost += _closeness(line, lines[:k]) + _hits(line, edges[k], centres)
    return cost


def _best(
    edge: tuple[int, int], size: Size | None, centres: Array, others: Array, boxes: Array
) -> tuple[float, float]:
    """Finds the best bend of one edge and place of its label, where the others are as they are."""
    start, end = centres[list(edge)]
    nodes = np.stack([centres - NODE_RADIUS, centres + NODE_RADIUS], axis=1)
    taken = np.concatenate([boxes, nodes])
    points = others.reshape(-1, 2)
    lowest, best = np.inf, (0.0, 0.5)
    for bend in BENDS:
        line = curve(start, end, bend, SAMPLES)
        cost = BEND_COST * abs(bend) + _closeness(line, others) + _hits(line, edge, centres)
        cost += COVERED_COST * _covered(boxes, line)
        # The places of a label only add cost, so this bend cannot win any more.
        if cost >= lowest:
            continue
        if size is None:
            lowest, best = cost, (float(bend), 0.5)
            continue
        for place, centre in zip(PLACES, curve(start, end, bend, PLACES)):
            box = _box(centre, size)
            total = cost + PLACE_COST * abs(place - 0.5)
            total += COVERED_COST * _covered(box[None], points)
            total += OVERLAP_COST * _overlap(box, taken)
            if total < lowest:
                lowest, best = total, (float(bend), float(place))
    return best


def _closeness(line: Array, others: Array) -> float:
    """Measures how much of a line runs beside or across other lines, [others, samples, 2]."""
    apart = line[:, None, None] - others
    # Of each other line only the nearest point counts, or a long parallel would weigh by its
    # samples.
    squares = (apart * apart).sum(axis=-1).min(axis=-1)
    return float(np.exp(-squares / EDGE_GAP**2).sum())


def _hits(line: Array, edge: tuple[int, int], centres: Array) -> float:
    """Measures how deep a line runs through nodes that are not its ends."""
    # Both ends of an edge lie in nodes by nature.
    others = np.delete(centres, edge, axis=0)
    distances = np.linalg.norm(line[:, None] - others, axis=-1)
    return NODE_HIT_COST * float(np.clip(1 - (distances - NODE_RADIUS) / NODE_GAP, 0, 3).sum())


def _box(centre: Array, size: Size) -> Array:
    half = np.array(size) / 2
    return np.stack([centre - half, centre + half])


def _covered(boxes: Array, points: Array) -> int:
    """Counts how many times a box, [boxes, 2, 2], covers a point, [points, 2]."""
    low, high = boxes[:, :1], boxes[:, 1:]
    return int(((points > low) & (points < high)).all(axis=-1).sum())


def _overlap(box: Array, others: Array) -> float:
    """Returns the area a box shares with other boxes, [others, 2, 2]."""
    sides = np.minimum(box[1], others[:, 1]) - np.maximum(box[0], others[:, 0])
    return float(np.clip(sides, 0, None).prod(axis=-1).sum())
