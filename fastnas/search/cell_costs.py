"""Measures what each candidate of a space costs in the network that a search derives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import nn

from fastnas.data.source import ImageSource
from fastnas.nn import EVAL_NETWORKS, count_parameters
from fastnas.nn.cost import WARM_UPS, clock, spent
from fastnas.processes import here
from fastnas.search.config import ConfigError, SearchConfig
from fastnas.spaces import AnyGenotype, CellType, Space
from fastnas.strategies import Strategy
from fastnas.strategies.cost import CostTable, CostTarget, CostTerm
from fastnas.strategies.precision import Precision

REPEATS = 9
"""Passes whose median is the latency of a candidate."""


def cost_of_search(
    config: SearchConfig,
    strategy: Strategy,
    space: Space,
    images: ImageSource,
    device: torch.device,
) -> CostTerm | None:
    """Returns the cost in the loss of the logits, as `cost` says; None where it says nothing.

    Raises:
        ConfigError: a network of the space cannot be built and run.
    """
    if config.cost is None:
        return None
    target, precision = CostTarget.of(config.cost), Precision(config.precision, device)

    def build(genotype: AnyGenotype) -> nn.Module:
        kind = EVAL_NETWORKS[space.layout]
        sizes = config.train_channels, images.classes, config.resolved("train_layers")
        found: nn.Module = kind(genotype, *sizes, in_channels=images.channels)
        return found

    # What it draws for weights that are thrown away must not move the generators of the run.
    with torch.random.fork_rng([]):
        try:
            found = cost_table(target.kind, space, build, images.shape, precision, device)
            # Of several processes the first one's clock holds for all.
            table = here().first_says(found)
        except ValueError as error:
            raise ConfigError(f"cost is {config.cost!r}, but {error}") from error
    weight = 1.0 if config.cost_weight is None else config.cost_weight
    return CostTerm(target, weight, table, strategy.shares, space, device)


def cost_table(
    kind: str,
    space: Space,
    build: Callable[[AnyGenotype], Any],
    image: Sequence[int],
    precision: Precision,
    device: torch.device,
) -> CostTable:
    """Returns the costs of the candidates of a space, on one image in evaluation mode.

    The network is run with every edge and the k-th candidate on each, for each k: an operation on
    an edge costs there what it costs among two edges a node.

    Args:
        kind: "macs", "params" or "latency" (in ms, by the clock of the device).
        build: returns the network of a genotype, as it is trained.
        image: its shape, [C, H, W].
    """
    edges: dict[CellType, list[dict[str, float]]] = {
        cell: [{} for _ in space.edges] for cell in space.cell_types
    }
    fixed = []
    for k in range(max(map(space.num_candidates, space.cell_types))):
        # Counts need no values, so their networks are on "meta", which computes nothing.
        with nullcontext() if kind == "latency" else torch.device("meta"):
            network = build(_of_column(space, k)).eval()
        places = [
            (cell, e, op) for cell, operations in network.edges() for e, op in enumerate(operations)
        ]
        if kind == "latency":
            network = network.to(device)
        modules = [op for *_, op in places]
        costs, rest = _costs(kind, network, modules, image, precision, device)
        fixed.append(rest)
        for (cell, e, _), cost in zip(places, costs):
            names = space.candidates(cell)[e]
            # An edge of `none` is not there; a cell type may have fewer candidates than the other.
            if k < len(names) and not _is_absent(space, names[k]):
                edges[cell][e][names[k]] = edges[cell][e].get(names[k], 0.0) + cost
    return CostTable(float(median(fixed)), _complete(edges, space))


def _costs(
    kind: str,
    network: nn.Module,
    modules: Sequence[nn.Module],
    image: Sequence[int],
    precision: Precision,
    device: torch.device,
) -> tuple[list[float], float]:
    """Returns the cost of each module, and of all that is in none of them."""
    if kind == "params":
        counts = [float(count_parameters(module)) for module in modules]
        return counts, count_parameters(network) - sum(counts)
    x = torch.zeros(1, *image, device=device if kind == "latency" else "meta")
    with torch.no_grad():
        if kind == "macs":
            from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

            with FlopCounterMode(display=False) as counter:
                found, total = spent(
                    lambda: network(x), modules, lambda: counter.get_total_flops() / 2
                )
            return found, total - sum(found)
        with precision.autocast():
            runs = [
                spent(lambda: network(x), modules, clock(device)) for _ in range(WARM_UPS + REPEATS)
            ][WARM_UPS:]
    found = [median(times) for times in zip(*(times for times, _ in runs))]
    return found, max(0.0, median(total for _, total in runs) - sum(found))


def _of_column(space: Space, k: int) -> AnyGenotype:
    """Returns the cells with every edge, on each its k-th candidate, or its last."""
    cells: dict[CellType, list[tuple[tuple[str, int], ...]]] = {}
    for cell in space.cell_types:
        nodes: list[list[tuple[str, int]]] = [[] for _ in range(space.nodes)]
        for (source, target), names in zip(space.edges, space.candidates(cell)):
            name = names[min(k, len(names) - 1)]
            stands_in = "skip_connect" if _is_absent(space, name) else name
            nodes[target - space.inputs].append((stands_in, source))
        cells[cell] = list(map(tuple, nodes))
    genotype: AnyGenotype = space.cell_layout.genotype(cells)
    return genotype


def _is_absent(space: Space, name: str) -> bool:
    return name == "none" and not space.cell_layout.derives_none


def _complete(
    edges: dict[CellType, list[dict[str, float]]], space: Space
) -> dict[CellType, list[dict[str, float]]]:
    """Returns the costs of all candidates, 0 of `none` and of cells that the network lacks."""
    return {
        cell: [
            {name: row.get(name, 0.0) for name in names}
            for row, names in zip(edges[cell], space.candidates(cell))
        ]
        for cell in space.cell_types
    }
