"""Makes the expected cost of what a search derives a term of the loss of its logits.

With costs c of candidates, and shares s of 0 to 1 by which the derived network has them::

    E[cost] = c_fixed + sum over edges e and candidates k of s_ek c_ek
    loss    = L_valid + weight * max(0, E[cost] / target - 1)

E is linear in the shares, so that its gradient is that of ProxylessNAS (Cai et al., ICLR 2019,
arXiv 1812.00332, section 3.3: L_CE + lambda E[latency]), which has no target: a network is made
cheaper as long as that costs less accuracy than lambda says, and lambda has the unit of a cost. The
target is that of MnasNet (Tan et al., CVPR 2019, arXiv 1807.11626, eq. 2 and 3 with alpha = 0): the
ratio to it counts, and a network that meets it pays nothing. FBNet's factor alpha log(latency)^beta
(Wu et al., CVPR 2019, arXiv 1812.03443) has no target either; |E / target - 1| (TuNAS, Bender et
al., CVPR 2020, arXiv 2008.06120) would make a network that is too cheap dearer, whatever its
accuracy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnas.checks import short
from fastnas.spaces import CellType, Space

KINDS = ("macs", "params", "latency")
UNITS = {"s": 1e3, "ms": 1.0, "us": 1e-3}
"""Milliseconds in each."""
NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)(.*)", re.DOTALL)
LARGEST = 1e18


class CostTarget(NamedTuple):
    """Says which cost is to stay below what.

    Attributes:
        kind: "macs", "params" or "latency".
        value: multiply-adds of one image, parameters, or milliseconds for one.
    """

    kind: str
    value: float

    @classmethod
    def of(cls, text: str) -> CostTarget:
        """Reads a target such as "macs:300e6", "params:3e6" or "latency:12ms".

        Raises:
            TypeError, ValueError: it is none.
        """
        if not isinstance(text, str):
            raise TypeError(f"cost is {short(text)}; a text such as 'macs:300e6' is needed")
        kind, colon, value = text.partition(":")
        found = NUMBER.fullmatch(value)
        unit = found[2] if found else ""
        number = float(found[1]) if found else math.nan
        units = UNITS if kind == "latency" else {"": 1.0}
        if kind not in KINDS or not colon or unit not in units or not 0 < number <= LARGEST:
            raise ValueError(
                f"cost is {short(text)}; macs:NUMBER, params:NUMBER or latency:NUMBER with the unit"
                " s, ms or us is needed, the number above 0"
            )
        return cls(kind, number * units[unit])


class CostTable:
    """Holds what each candidate costs in the network that is derived.

    Args:
        fixed: what does not depend on the choice: stem, preprocessing, classifier.
        edges: cell type to, for each edge, candidate to cost, of all cells of the type together.
    """

    def __init__(self, fixed: float, edges: Mapping[CellType, list[dict[str, float]]]) -> None:
        self.fixed, self.edges = fixed, dict(edges)

    def of(self, space: Space, cell_type: CellType) -> list[list[float]]:
        """Returns the costs [E, K] of a space whose candidates are among these."""
        rows = zip(self.edges[cell_type], space.candidates(cell_type), strict=True)
        return [[row[name] for name in names] for row, names in rows]

    def state_dict(self) -> dict[str, Any]:
        return {"fixed": self.fixed, "edges": self.edges}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved table; ValueError where it is one of other candidates."""
        edges = {cell: [dict(row) for row in rows] for cell, rows in state["edges"].items()}
        names = {cell: [list(row) for row in rows] for cell, rows in edges.items()}
        costs = [cost for rows in edges.values() for row in rows for cost in row.values()]
        if names != {cell: [list(row) for row in rows] for cell, rows in self.edges.items()}:
            raise ValueError("its costs are of other candidates")
        if not all(type(c) is float and 0 <= c < math.inf for c in (*costs, state["fixed"])):
            raise ValueError("its costs are no finite numbers of 0 or more")
        self.fixed, self.edges = state["fixed"], edges


class CostTerm:
    """Computes E[cost] and its term of the loss, in float64.

    Args:
        target: what it is to stay below.
        weight: of the term.
        table: of the candidates.
        shares: maps the logits to the shares of the candidates, cell type to [E, K].
        space: of the logits.
        device: of the logits.
    """

    def __init__(
        self,
        target: CostTarget,
        weight: float,
        table: CostTable,
        shares: Callable[[Any, Space], Mapping[str, Tensor]],
        space: Space,
        device: torch.device | str = "cpu",
    ) -> None:
        self.target, self.weight, self.table, self._shares = target, weight, table, shares
        self.device = torch.device(device)
        self.enter(space)

    def enter(self, space: Space) -> None:
        """Goes to the space of a stage, whose candidates are among those of the table."""
        self.space = space
        self._costs = {
            cell: torch.tensor(self.table.of(space, cell), dtype=torch.float64, device=self.device)
            for cell in space.cell_types
        }

    def expected(self, arch: Any) -> Tensor:
        """Returns E[cost], [] in the unit of the target."""
        shares = self._shares(arch, self.space)
        # Not by a product of matrices: autocast would cast that to 16 bits.
        parts = [(shares[cell] * costs).sum() for cell, costs in self._costs.items()]
        return torch.stack(parts).sum() + self.table.fixed

    def __call__(self, arch: Any) -> Tensor:
        """Returns weight max(0, E[cost] / target - 1), float32."""
        return hinge(self.expected(arch), self.target.value, self.weight)

    def figures(self, arch: Any) -> dict[str, float]:
        """Returns what the history holds of it."""
        with torch.no_grad():
            return {f"expected_{self.target.kind}": float(self.expected(arch))}

    def state_dict(self) -> dict[str, Any]:
        return self.table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.table.load_state_dict(state)
        self.enter(self.space)


def hinge(expected: Tensor, target: float, weight: float) -> Tensor:
    """Returns weight max(0, expected / target - 1), float32."""
    return (weight * (expected / target - 1).clamp_min(0)).float()


class _Marks(NamedTuple):
    counted: Tensor
    """1 where a candidate is one that a derived edge may be, [E, K]."""
    nodes: Tensor
    """1 where an edge enters a node, [nodes, E]."""


@lru_cache(maxsize=64)  # made once: within a CUDA graph nothing may come from the host
def _marks(space: Space, cell_type: CellType, device: torch.device) -> _Marks:
    drops = not space.cell_layout.derives_none
    counted = [[not drops or op != "none" for op in row] for row in space.candidates(cell_type)]
    nodes = range(space.inputs, space.inputs + space.nodes)
    enters = [[target == node for _, target in space.edges] for node in nodes]
    return _Marks(
        torch.tensor(counted, dtype=torch.float64, device=device),
        torch.tensor(enters, dtype=torch.float64, device=device),
    )


def shares_of_weights(w: Tensor, space: Space, cell_type: CellType, fewer: bool = False) -> Tensor:
    """Returns the shares [E, K] of candidates that are derived by mixing weights w [E, K].

    Where a cell keeps all its edges (NAS-Bench-201), each has one operation::

        s_ek = w_ek / sum_k w_ek

    Where a node keeps m = 2 of its edges, two of its entries (e, k) are kept, `none` never. Which
    ones is decided by an order, which has no gradient; in its place stands a draw in proportion to
    the weights, two on average::

        s_ek = m w_ek / sum of w over all entries of the node but `none`;   s = 0 for `none`

    The weights of one-hot edges, 0 on what is dropped, give s = 1 for what is kept. While all edges
    weigh alike each is kept with the share m / n.

    Args:
        fewer: whether sums are only brought down to 1 and m, not up: a node may keep fewer, as by
            the threshold of FairDARTS. Then an edge has one operation at most, too.
    """
    count = space.cell_layout.edges_per_node
    marks = _marks(space, cell_type, w.device)
    w = w.double() * marks.counted
    if count is None or fewer:
        w = w * _to(1.0, w.sum(-1, keepdim=True), fewer)
    if count is None:
        return w
    by_node = (marks.nodes * w.sum(-1)).sum(-1)  # [nodes]
    factor = _to(float(count), by_node, fewer)
    return w * (marks.nodes * factor[:, None]).sum(0)[:, None]


def _to(wanted: float, total: Tensor, only_down: bool) -> Tensor:
    """Returns what brings a sum to the number that is wanted."""
    factor = wanted / total.clamp_min(torch.finfo(total.dtype).tiny)
    return factor.clamp_max(1.0) if only_down else factor
