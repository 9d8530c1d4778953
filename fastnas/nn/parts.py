"""Holds what the fused ops run of a cell: its operations, their layers, and the edges' table.

Parts are made in two ways: of fastnas' own modules from the space that they were built for
(`built`), and of foreign modules by their structure (`fastnas.dropin.recognise`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple, cast

from torch import Tensor, nn

from fastnas.spaces import Edge, EdgeTable, EdgeTerm
from fastnas.spaces.edge_table import edge_term
from fastnas.spaces.operations import EDGE_KINDS, EDGE_OPERATIONS, OPERATIONS

PreprocessKind = Literal["relu_conv_bn", "factorized_reduce"]
Ends = Sequence[tuple[int, int]]
"""Of each edge the state that it leaves, inputs first, and the node that it enters."""


class Tensors(NamedTuple):
    """Holds what layers compute with: weights, and the statistics that batch norms keep."""

    params: list[Tensor]
    running: list[tuple[Tensor, Tensor]]
    """Mean and variance of each that keeps them."""
    counters: list[Tensor]
    """Those of `num_batches_tracked` that there are."""

    @classmethod
    def of(cls, convs: Sequence[nn.Conv2d], norms: Sequence[nn.BatchNorm2d]) -> Tensors:
        """Looks them up; the layers have them all."""
        # Dicts are four times as fast as attributes, of which a cell has 300.
        found = [norm._buffers for norm in norms]
        counters = [buffers["num_batches_tracked"] for buffers in found]
        pairs = [(buffers["running_mean"], buffers["running_var"]) for buffers in found]
        return cls(
            [conv._parameters["weight"] for conv in convs],  # type: ignore[misc]
            [(mean, var) for mean, var in pairs if mean is not None and var is not None],
            [counter for counter in counters if counter is not None],
        )


class Layers:
    """Holds convolutions and batch norms, in the order in which a fused op takes their tensors."""

    def __init__(
        self, convs: Sequence[nn.Conv2d] = (), norms: Sequence[nn.BatchNorm2d] = ()
    ) -> None:
        self.convs, self.norms = tuple(convs), tuple(norms)

    def tensors(self) -> Tensors:
        """Looks up what they compute with now: `functional_call` exchanges it for a call."""
        return Tensors.of(self.convs, self.norms)

    @property
    def eps(self) -> float:
        """Returns what all norms share, as they do `momentum`; of no norms, torch's default."""
        return self.norms[0].eps if self.norms else 1e-5

    @property
    def training(self) -> bool:
        """Tells whether the norms normalise by the batch, as far as it is theirs to say.

        All of them are in one mode, or else they are not fused. Frozen ones, in evaluation mode,
        may be part of a module in training.
        """
        return self.norms[0].training if self.norms else True

    @property
    def momentum(self) -> float:
        return cast(float, self.norms[0].momentum) if self.norms else 0.0


@dataclass(frozen=True)
class Candidate:
    """Holds an operation of a search network.

    Args:
        name: one that `mixed_edges` knows (`fastnas.spaces.operations.EDGE_OPERATIONS`), or none.
        stride: 1 or 2.
        convs, norms: in the order of the data (`fastnas.spaces.operations.EdgeKind`).
    """

    name: str
    stride: int
    convs: tuple[nn.Conv2d, ...] = ()
    norms: tuple[nn.BatchNorm2d, ...] = ()

    @property
    def is_open(self) -> bool:
        """Tells whether it is a pool to which a batch norm of its own is still to come."""
        return self.name in ("max_pool_3x3", "avg_pool_3x3") and not self.norms

    @property
    def is_by_batch(self) -> bool:
        """Tells whether its batch norms, which share a mode, normalise by the batch."""
        return any(map(is_by_batch, self.norms))

    @property
    def is_dense(self) -> bool:
        """Tells whether it is of NAS-Bench-201: a dense convolution, a pool without a norm."""
        return self.name not in OPERATIONS

    @property
    def halves(self) -> int:
        """Counts its pairs of a depthwise and a pointwise convolution."""
        kind = EDGE_OPERATIONS[self.name].kind(self.stride)
        return len(self.convs) // 2 if kind is not None and EDGE_KINDS[kind].halves else 0

    def half(self, index: int) -> Candidate:
        """Returns one half of a separable convolution."""
        convs, norms = self.convs[2 * index : 2 * index + 2], self.norms[index : index + 1]
        return Candidate(self.name, 1 if index else self.stride, convs, norms)

    def term(self, weight: int) -> EdgeTerm | None:
        """Returns its term with this column of the mixing weights; None where it adds nothing."""
        term = edge_term(self.name, weight, self.stride)
        # Half a separable convolution is a dilated one, without dilation.
        if term is None or len(self.convs) == term.params:
            return term
        return term._replace(op="dil_conv")

    def tensors(self) -> Tensors:
        """Looks up what its layers compute with now."""
        return Tensors.of(self.convs, self.norms)


class EdgeLayers(Layers):
    """Holds the table of some edges, and the layers of its terms."""

    def __init__(
        self, edges: Sequence[MixedOpParts], ends: Ends, inputs: int, nodes: int, outputs: int = 0
    ) -> None:
        rows: list[Edge] = []
        convs: list[nn.Conv2d] = []
        norms: list[nn.BatchNorm2d] = []
        for edge, (source, target) in zip(edges, ends):
            terms = []
            for k, candidate in enumerate(edge.candidates):
                term = None if candidate is None else edge_term(candidate.name, k, edge.stride)
                if candidate is None or term is None:
                    continue
                terms.append(term)
                # `mixed_edges` takes parameters and norms by position: the order of the terms is
                # theirs.
                convs += candidate.convs
                norms += candidate.norms
            # A foreign candidate has no term, but keeps its column k of the mixing weights.
            rows.append(Edge(source, target, edge.stride, tuple(terms)))
        self.table = _table(inputs, nodes, len(edges[0].candidates), tuple(rows), outputs)
        super().__init__(convs, norms)


@lru_cache(maxsize=256)  # cells of one type share theirs
def _table(
    inputs: int, nodes: int, candidates: int, edges: tuple[Edge, ...], outputs: int
) -> EdgeTable:
    return EdgeTable(inputs, nodes, candidates, edges, outputs)


@dataclass(frozen=True)
class MixedOpParts:
    """Holds the candidates of an edge.

    Args:
        candidates: None where one is foreign, which its own module runs.
        foreign: index of each foreign candidate to what makes it so.
        stride: of all candidates.
    """

    candidates: tuple[Candidate | None, ...]
    foreign: Mapping[int, str]
    stride: int
    layers: EdgeLayers = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # An edge is a cell with one edge, from one state to one node.
        object.__setattr__(self, "layers", EdgeLayers([self], [(0, 0)], inputs=1, nodes=1))

    @property
    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """Returns all batch norms of the recognised candidates."""
        return self.layers.norms

    @property
    def why_foreign(self) -> str | None:
        """Returns what makes the first foreign candidate so, or None."""
        return next(iter(self.foreign.values()), None)


class Preprocess(Layers):
    """Holds what a cell does to an input: ReLU, 1x1 convolution(s), batch norm."""

    def __init__(
        self, kind: PreprocessKind, convs: Sequence[nn.Conv2d], norm: nn.BatchNorm2d
    ) -> None:
        super().__init__(convs, (norm,))
        self.kind, self.norm = kind, norm


@dataclass(frozen=True)
class CellParts:
    """Holds a cell, of whose candidates at least one is recognised.

    Args:
        preprocess0, preprocess1: of the outputs of the two cells before; None in a cell that reads
            its inputs as they are.
        edges: node by node, into each from all states before it.
        ends: of each edge.
        nodes: those that are no inputs.
        inputs: states that the cell is given.
        outputs: how many nodes, the last ones, the output concatenates; 0: all.
    """

    preprocess0: Preprocess | None
    preprocess1: Preprocess | None
    edges: tuple[MixedOpParts, ...]
    ends: tuple[tuple[int, int], ...]
    nodes: int
    inputs: int = 2
    outputs: int = 0
    layers: EdgeLayers = field(init=False, repr=False, compare=False)
    node_layers: tuple[EdgeLayers, ...] = field(init=False, repr=False, compare=False)
    """Of each node alone, whose inputs are all states before it."""

    def __post_init__(self) -> None:
        layers = EdgeLayers(self.edges, self.ends, self.inputs, self.nodes, self.outputs)
        object.__setattr__(self, "layers", layers)
        alone = tuple(self._alone(node) for node in range(self.nodes))
        object.__setattr__(self, "node_layers", alone)

    def _alone(self, node: int) -> EdgeLayers:
        own = [(e, source) for e, (source, target) in enumerate(self.ends) if target == node]
        # Its inputs are the states before it, so sources keep their numbers; it is the only node.
        edges, ends = [self.edges[e] for e, _ in own], [(source, 0) for _, source in own]
        return EdgeLayers(edges, ends, inputs=self.inputs + node, nodes=1)

    @property
    def preprocesses(self) -> tuple[Preprocess, ...]:
        """Returns what is done to each input; nothing where the cell reads them as they are."""
        return tuple(p for p in (self.preprocess0, self.preprocess1) if p is not None)

    @property
    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """Returns all batch norms that are recognised."""
        return (*(p.norm for p in self.preprocesses), *self.layers.norms)

    @property
    def why_foreign(self) -> str | None:
        """Says which candidate is the first foreign one, and what makes it so, or None."""
        found = (
            f"edge {e}, candidate {k}: {reason}"
            for e, edge in enumerate(self.edges)
            for k, reason in edge.foreign.items()
        )
        return next(found, None)


def is_by_batch(norm: nn.BatchNorm2d) -> bool:
    """Tells whether it normalises by the batch, as one without statistics does in either mode."""
    return norm.training or norm._buffers.get("running_mean") is None


def why_not_norm(norm: nn.BatchNorm2d, tracked: bool = True) -> str | None:
    """Says why no fused op computes the batch norm, or None.

    Args:
        tracked: whether it has to keep running statistics.
    """
    if norm.weight is not None or norm.bias is not None:
        return "batch norm has a scale or a shift"
    buffers = norm._buffers
    kept = [buffers.get(name) is not None for name in ("running_mean", "running_var")]
    if norm.track_running_stats and not all(kept):
        return "batch norm has no running statistics"
    if not norm.track_running_stats and (tracked or any(kept)):
        return f"batch norm has track_running_stats {norm.track_running_stats}; True is needed"
    if "num_batches_tracked" not in buffers:
        return "batch norm has no buffer `num_batches_tracked`"
    return "batch norm has momentum None; a number is needed" if norm.momentum is None else None


def candidate_modules(module: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the modules of the ModuleList `_ops`; none where there is no such list."""
    ops = module._modules.get("_ops")
    return tuple(ops) if isinstance(ops, nn.ModuleList) else ()


def layers_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the layers of an nn.Sequential, or of a module with nothing but one named `op`."""
    own = module._parameters or module._buffers
    if not own and list(module._modules) == ["op"]:
        module = cast(nn.Module, module.op)
    return tuple(module) if type(module) is nn.Sequential else ()
