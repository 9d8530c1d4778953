"""Lists the layouts of cells by name."""

from typing import Any

from fastnas.checks import check_type
from fastnas.spaces.darts import DARTS
from fastnas.spaces.genotype import AnyGenotype
from fastnas.spaces.graph import GRAPH
from fastnas.spaces.layout import Layout
from fastnas.spaces.nb201 import NB201

LAYOUTS: dict[str, Layout[Any]] = {layout.name: layout for layout in (DARTS, NB201, GRAPH)}

READING_ORDER: tuple[Layout[Any], ...] = (NB201, GRAPH, DARTS)
"""DARTS comes last: it takes, and complains about, every text that is of no other layout."""


def layout_of(genotype: AnyGenotype) -> Layout[Any]:
    """Returns the layout of a genotype's cells."""
    check_type("genotype", genotype, AnyGenotype)
    return LAYOUTS[genotype.layout]
