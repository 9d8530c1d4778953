"""Lists the networks of every layout of cells, by its name."""

from __future__ import annotations

from typing import Any

from fastnas.nn.cell import SearchNetwork
from fastnas.nn.eval_network import EvalNetwork
from fastnas.nn.nb201 import NB201SearchNetwork
from fastnas.nn.nb201_eval import NB201EvalNetwork

SEARCH_NETWORKS: dict[str, type[SearchNetwork]] = {
    kind.layout: kind for kind in (SearchNetwork, NB201SearchNetwork)
}
EVAL_NETWORKS: dict[str, Any] = {kind.layout: kind for kind in (EvalNetwork, NB201EvalNetwork)}
"""Called with a genotype, channels, classes, layers and options."""
