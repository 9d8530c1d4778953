"""One fuzzed call of each op: how it is drawn, run on a backend, and compared with the reference.

Inputs, references and the rule are those of the tests of the ops; only how inputs are drawn, much
more oddly, is said here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import cases
import choice_cases
import conv_cases
import edge_cases
import norm_cases
import path_cases
import torch
from draws import FILLS, FINITE, Draws
from rule import NOTHING, Allowance, Results
from torch import Tensor

from fastnas.ops import OPS
from fastnas.reference import TOPOLOGIES, logits_per_node
from fastnas.spaces import Edge, EdgeTable


class Call(Protocol):
    """A call of an op with everything that it is given."""

    def run(self, backend: str) -> Any:
        """Output, gradients and running statistics, by the op."""

    def by_eager(self) -> object:
        """The same by the specification, in the dtype of the call."""

    def allowance(self) -> Allowance:
        """What the results may be off by beyond the rule."""

    def compare(self, got: Any, allowance: Allowance = NOTHING) -> None:
        """Raises `Miss`, or an AssertionError, where `got` is not what the rule allows."""


def leaves_range(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether squares of products of these numbers, or their inverses, may be beyond float32."""
    sizes = [float(t[t.isfinite()].abs().max()) for t in tensors if t.isfinite().any()]
    return dtype != torch.float64 and any(size > 1e9 or 0 < size < 1e-9 for size in sizes)


def dtype_of(d: Draws, op: str) -> torch.dtype:
    return d.pick("dtype", OPS[op].dtypes["cpu"])


@dataclass(frozen=True)
class MixedSum:
    inputs: cases.Inputs
    needs: list[bool]

    @staticmethod
    def draw(d: Draws) -> MixedSum:
        dtype = dtype_of(d, "mixed_sum")
        if d.chance("longer than a block", 0.05):
            shape = [d.pick("elements", [4095, 4097, 9001])]
        else:
            shape = [d.size(f"size {i}", 9) for i in range(d.pick("rank", range(6)))]
        terms = d.pick("terms", [*range(1, 7), 17])
        x = [d.tensor(f"x[{k}]", shape, dtype) for k in range(terms)]
        wide = d.pick("w dtype", [dtype, torch.float32, torch.float64])
        w, dy = d.tensor("w", [terms], wide), d.tensor("dy", shape, dtype)
        inputs = cases.Inputs(x, w, dy)
        noisy = d.subset("noisy", range(terms)) if d.chance("with noise", 0.4) else []
        if noisy:
            noise = d.noise()
            inputs = replace(inputs, noise=noise, noisy=tuple(noisy), level=d.level(noise),
                             rng=d.rng())  # fmt: skip
        wanted = d.subset("needs", range(1 + terms))
        return MixedSum(inputs, [i in wanted for i in range(1 + terms)])

    def run(self, backend: str) -> cases.Outcome:
        return cases.run(self.inputs, backend, self.needs)

    def by_eager(self) -> object:
        return cases.by_eager(self.inputs)

    def allowance(self) -> Allowance:
        return NOTHING

    def compare(self, got: cases.Outcome, allowance: Allowance = NOTHING) -> None:
        cases.examine(got, self.inputs)


@dataclass(frozen=True)
class MixedNormSum:
    inputs: norm_cases.Inputs
    needs: list[bool]

    @staticmethod
    def draw(d: Draws) -> MixedNormSum:
        dtype = dtype_of(d, "mixed_norm_sum")
        sizes = [d.size(f"size {i}", 9) for i in range(d.pick("rank", [2, 3, 4, 4, 4, 5]) - 2)]
        shape = [d.size("N", 9), d.size("C", 20), *sizes]
        terms = d.pick("terms", range(1, 7))
        chosen = d.subset("normed", range(terms))
        normed = [k in chosen for k in range(terms)]
        z = [d.tensor(f"z[{k}]", shape, dtype) for k in range(terms)]
        wide = d.pick("w dtype", [dtype, torch.float32, torch.float64])
        inputs = norm_cases.Inputs(z, d.tensor("w", [terms], wide), d.tensor("dy", shape, dtype),
                                   normed)  # fmt: skip
        if d.chance("evaluation", 0.25):
            mean, var = statistics(d, sum(normed), shape[1], dtype).unbind(1)
            inputs = replace(inputs, statistics=(mean, var))
        others = [k for k in range(terms) if not normed[k]]
        noisy = d.subset("noisy", others) if d.chance("with noise", 0.4) else []
        if noisy:
            noise = d.noise()
            inputs = replace(inputs, noise=noise, noisy=tuple(noisy), level=d.level(noise),
                             rng=d.rng())  # fmt: skip
        wanted = d.subset("needs", range(1 + terms))
        return MixedNormSum(inputs, [i in wanted for i in range(1 + terms)])

    def run(self, backend: str) -> norm_cases.Outcome:
        return norm_cases.run(self.inputs, backend, self.needs)

    def by_eager(self) -> object:
        return norm_cases.by_eager(self.inputs)

    def allowance(self) -> Allowance:
        return Allowance(
            overflow=leaves_range([*self.inputs.z, self.inputs.dy], self.inputs.dy.dtype)
        )

    def compare(self, got: norm_cases.Outcome, allowance: Allowance = NOTHING) -> None:
        norm_cases.examine(got, self.inputs, allowance)


@dataclass(frozen=True)
class MixedEdges:
    inputs: edge_cases.Inputs
    choice: Tensor | None
    needs: list[str]
    memory: str

    @staticmethod
    def draw(d: Draws) -> MixedEdges:
        dtype = dtype_of(d, "mixed_edges")
        C, stride = d.size("C", 20), d.pick("stride", [1, 2])
        table = table_of(d, stride, C)
        paths = d.pick("paths", [1, 1, 2, 3]) if d.chance("sampled", 0.3) else 0
        size = d.size("rows", 9), d.size("columns", 9)
        N = max(paths, 1) * images(d, size, stride)
        x = [d.tensor(f"x[{i}]", [N, C, *size], dtype) for i in range(table.inputs)]
        # An inf in a tap that no pixel reaches is nothing, or NaN where torch multiplies the
        # padding's zeros, as it does in some dtypes: no inf or NaN in depthwise kernels.
        params = [
            d.tensor(f"params[{i}]", shape, dtype, FINITE if shape[2] > 1 else FILLS)
            for i, shape in enumerate(table.param_shapes(C))
        ]
        choice, shape = None, [len(table.edges), table.candidates]
        if paths:
            choice = d.choices("choice", -1, table.candidates, (paths, len(table.edges)))
            choice = choice[0] if paths == 1 else choice
            shape = list(choice.shape)
        w = d.tensor("w", shape, d.pick("w dtype", [dtype, torch.float32, torch.float64]))
        out = [N, table.nodes * C, *(-(-s // stride) for s in size)]
        inputs = edge_cases.Inputs(table, x, w, params, d.tensor("dy", out, dtype))
        if d.chance("evaluation", 0.25):
            inputs = replace(inputs, statistics=statistics(d, table.norms, C, dtype))
        if d.chance("with noise", 0.4):
            noise, streams = d.noise(), [table.nodes] if paths < 2 else [paths, table.nodes]
            inputs = replace(inputs, noise=noise, level=d.level(noise), rng=d.rng(*streams))
        return MixedEdges(inputs, choice, needs(d, inputs.leaves, C),
                          d.pick("memory", edge_cases.MEMORY))  # fmt: skip

    def run(self, backend: str) -> Results:
        if self.choice is not None:
            return choice_cases.run(self.inputs, self.choice, backend, self.memory, self.needs)
        return edge_cases.run(self.inputs, backend, self.needs, self.memory)

    def by_eager(self) -> object:
        if self.choice is not None:
            return choice_cases.by_path(self.inputs, self.choice)
        return edge_cases.by_eager(self.inputs)

    def allowance(self) -> Allowance:
        given = [*self.inputs.leaves.values(), self.inputs.dy]
        moved = edge_cases.moved_by_rounding(self.inputs, self._exact)
        return Allowance(moved, leaves_range(given, self.inputs.dy.dtype))

    def _exact(self, inputs: edge_cases.Inputs) -> Results:
        if self.choice is not None:
            return choice_cases.by_path(inputs, self.choice, torch.float64)
        return edge_cases.by_eager(inputs, torch.float64)

    def compare(self, got: Results, allowance: Allowance = NOTHING) -> None:
        if self.choice is not None:
            by_path = choice_cases.by_path
            choice_cases.compare(got, self.inputs, self.choice, by_path, allowance)
        else:
            edge_cases.examine(got, self.inputs, allowance)


def images(d: Draws, size: Sequence[int], stride: int) -> int:
    """None, or so many that a channel has 24 values: fewer have |v| = 1 whatever they are, and a
    gradient of nothing but rounding. Sometimes one image, mostly of few values that is refused."""
    N, pixels = d.size("N", 18), math.prod(-(-s // stride) for s in size)
    alone = d.chance("one value", 0.03)
    return 1 if alone and pixels == 1 else max(N, -(-24 // pixels)) if N and pixels else N


def needs(d: Draws, leaves: Iterable[str], C: int) -> list[str]:
    """Not of parameters with one input channel: the gradient of a pointwise kernel, orthogonal to
    its rows, is nothing but rounding where a row is one number."""
    wanted = d.subset("needs", list(leaves))
    return [name for name in wanted if C > 1 or not name.startswith("params")]


def table_of(d: Draws, stride: int, C: int) -> EdgeTable:
    """One or two inputs, up to three nodes, up to three terms on an edge."""
    inputs, nodes = d.pick("inputs", [1, 2]), d.pick("nodes", [1, 1, 2, 3])
    names = [name for name in edge_cases.TERMS if stride == 1 or C % 2 == 0 or name != "skip"]
    edges: list[Edge] = []
    for node in range(nodes):
        for source in range(inputs + node):
            terms = d.several(f"{source} -> {node}", names, 3)
            if terms or source == 0:
                here = stride if source < inputs else 1
                own = names if here == stride else edge_cases.TERMS
                edges.append(edge_cases.edge(source, node, here, [t for t in terms if t in own]))
    return EdgeTable(inputs, nodes, 3, tuple(edges))


def statistics(d: Draws, norms: int, C: int, dtype: torch.dtype) -> Tensor:
    """[norms, 2, C] mean and variance, as running statistics hold them."""
    wide = torch.promote_types(dtype, torch.float32)
    mean, var = (d.tensor(f"running {name}", [norms, C], wide) for name in ("mean", "var"))
    return torch.stack([mean, var.abs()], 1)


@dataclass(frozen=True)
class ReluConvBn:
    inputs: conv_cases.Inputs
    needs: list[str]

    @staticmethod
    def draw(d: Draws) -> ReluConvBn:
        dtype = dtype_of(d, "relu_conv_bn")
        stride, paths = d.pick("stride", [1, 2]), d.pick("paths", [1, 1, 1, 2, 3])
        into, out = d.size("C in", 20), d.size("C", 20)
        out += out % stride
        size = [d.size("rows", 9), d.size("columns", 9)]
        N = paths * images(d, size, stride)
        dy = [N, out, *(-(-s // stride) for s in size)]
        inputs = conv_cases.Inputs(
            d.tensor("x", [N, into, *size], dtype),
            [d.tensor(f"params[{i}]", [out // stride, into, 1, 1], dtype) for i in range(stride)],
            d.tensor("dy", dy, dtype),
            paths,
        )
        if d.chance("evaluation", 0.25):
            inputs = replace(inputs, statistics=statistics(d, 1, out, dtype)[0])
        return ReluConvBn(inputs, needs(d, inputs.leaves, into))

    def run(self, backend: str) -> Results:
        return conv_cases.run(self.inputs, backend, self.needs)

    def by_eager(self) -> object:
        return conv_cases.by_eager(self.inputs)

    def allowance(self) -> Allowance:
        given = [*self.inputs.leaves.values(), self.inputs.dy]
        moved = conv_cases.moved_by_rounding(self.inputs)
        return Allowance(moved, leaves_range(given, self.inputs.dy.dtype))

    def compare(self, got: Results, allowance: Allowance = NOTHING) -> None:
        conv_cases.compare(got, self.inputs, allowance)


@dataclass(frozen=True)
class SamplePaths:
    inputs: path_cases.PathInputs

    @staticmethod
    def draw(d: Draws) -> SamplePaths:
        dtype = dtype_of(d, "sample_paths")
        topology = d.pick("topology", TOPOLOGIES)
        fewest = 1 if topology == "none" else 2
        nodes = [d.pick(f"node {i}", range(fewest, 7)) for i in range(d.pick("nodes", range(1, 5)))]
        lead = [d.size(f"lead {i}", 3) for i in range(d.pick("axes", range(3)))]
        O, paths = d.pick("operations", [1, 2, 5, 8, 33]), d.pick("paths", [1, 2, 9, 40])
        edges, logits = sum(nodes), sum(logits_per_node(nodes, topology))
        return SamplePaths(path_cases.PathInputs(
            d.tensor("alpha", [*lead, edges, O], dtype),
            None if topology == "none" else d.tensor("beta", [*lead, logits], dtype),
            nodes, topology, d.pick("tau", [1e-3, 0.1, 1.0, 30.0]), paths, d.rng(),
            d.tensor("dweight", [paths, *lead, edges], dtype),
        ))  # fmt: skip

    def run(self, backend: str) -> Results:
        return path_cases.run(self.inputs, backend)

    def by_eager(self) -> object:
        return path_cases.by_closed_form(self.inputs)

    def allowance(self) -> Allowance:
        return Allowance(path_cases.moved_by_rounding(self.inputs))

    def compare(self, got: Results, allowance: Allowance = NOTHING) -> None:
        path_cases.compare(got, self.inputs, path_cases.by_closed_form, allowance)


DRAW: dict[str, Callable[[Draws], Call]] = {
    "mixed_sum": MixedSum.draw,
    "mixed_norm_sum": MixedNormSum.draw,
    "mixed_edges": MixedEdges.draw,
    "relu_conv_bn": ReluConvBn.draw,
    "sample_paths": SamplePaths.draw,
}
assert DRAW.keys() == OPS.keys()
