"""Describes search spaces and genotypes as plain data; nothing here needs torch."""

from fastnas.spaces.darts_text import from_darts, to_darts, to_fairdarts, to_ptdarts
from fastnas.spaces.edge_table import Edge, EdgeTable, EdgeTerm
from fastnas.spaces.genotype import AnyGenotype, Genotype, parameter_free_count, skip_count
from fastnas.spaces.genotype_formats import FORMATS, dump, from_json, parse, to_json
from fastnas.spaces.graph import GraphGenotype
from fastnas.spaces.layout import CELL_TYPES, CellType, Layout
from fastnas.spaces.layouts import LAYOUTS, layout_of
from fastnas.spaces.mobile import (
    MOBILE_ARCHITECTURES,
    MobileSpace,
    format_column,
    parse_column,
)
from fastnas.spaces.mobile_genotype import MobileGenotype
from fastnas.spaces.nb201 import NB201_OPS, NB201Genotype, from_nb201, to_nb201
from fastnas.spaces.operations import DARTS_PRIMITIVES, EDGE_OPS, OPS, PARAMETER_FREE
from fastnas.spaces.space import SPACES, Space, get_space, uniform_space

__all__ = [
    "CELL_TYPES",
    "DARTS_PRIMITIVES",
    "EDGE_OPS",
    "FORMATS",
    "LAYOUTS",
    "MOBILE_ARCHITECTURES",
    "NB201_OPS",
    "OPS",
    "PARAMETER_FREE",
    "SPACES",
    "AnyGenotype",
    "CellType",
    "Edge",
    "EdgeTable",
    "EdgeTerm",
    "Genotype",
    "GraphGenotype",
    "Layout",
    "MobileGenotype",
    "MobileSpace",
    "NB201Genotype",
    "Space",
    "dump",
    "format_column",
    "from_darts",
    "from_json",
    "from_nb201",
    "get_space",
    "layout_of",
    "parameter_free_count",
    "parse",
    "parse_column",
    "skip_count",
    "to_darts",
    "to_fairdarts",
    "to_json",
    "to_nb201",
    "to_ptdarts",
    "uniform_space",
]
