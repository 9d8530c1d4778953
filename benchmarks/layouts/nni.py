"""Lays out NNI's DARTS strategy: children by name, alphas inside, inputs that are mixed again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts.operations import PRIMITIVES, operation
from fastnas.benchmarks.layouts.skeleton import (
    CellInputs,
    Layout,
    SearchNetwork,
    edges_of,
)


def weighted_sum(items: list[Tensor], weights: Tensor) -> Tensor:
    """Adds items of one type and one shape; anything else is refused."""
    first = items[0]
    if not isinstance(first, Tensor):
        raise TypeError(f"weighted sum of {type(first)}")
    res = first * weights[0]
    for item, weight in zip(items[1:], weights[1:]):
        if type(item) is not type(first):
            raise TypeError(f"expected {type(first)}, found {type(item)}")
        if item.shape != first.shape:
            raise ValueError(f"expected {first.shape}, found {item.shape}")
        res = res + item * weight
    return res


class DifferentiableMixedLayer(nn.Module):
    def __init__(self, paths: list[tuple[str, nn.Module]], alpha: nn.Parameter) -> None:
        super().__init__()
        self.op_names = [name for name, _ in paths]
        for name, module in paths:
            self.add_module(name, module)
        self._arch_alpha = alpha
        self._softmax = nn.Softmax(-1)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        results = [getattr(self, op)(*args, **kwargs) for op in self.op_names]
        return weighted_sum(results, self._softmax(self._arch_alpha))


class DifferentiableMixedInput(nn.Module):
    def __init__(self, alpha: nn.Parameter) -> None:
        super().__init__()
        self._arch_alpha = alpha
        self._softmax = nn.Softmax(-1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return weighted_sum(inputs, self._softmax(self._arch_alpha))


class Cell(CellInputs):
    """Computes every layer choice of a node, then mixes their outputs by an input choice.

    Args:
        layers, inputs: alphas that all cells of a kind share, by edge and by node.
    """

    def __init__(
        self,
        nodes: int,
        layers: dict[bool, list[nn.Parameter]],
        inputs: dict[bool, list[nn.Parameter]],
        *sizes: int,
    ) -> None:
        super().__init__(*sizes)
        C, reduction = sizes[2:4]
        self.ops, self.inputs = nn.ModuleList(), nn.ModuleList()
        alphas = iter(layers[reduction])
        for i in range(nodes):
            edges = nn.ModuleList()
            for j in range(2 + i):
                stride = 2 if reduction and j < 2 else 1
                paths = [(name, operation(name, C, stride)) for name in PRIMITIVES]
                edges.append(DifferentiableMixedLayer(paths, next(alphas)))
            self.ops.append(edges)
            self.inputs.append(DifferentiableMixedInput(inputs[reduction][i]))

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for edges, choice in zip(self.ops, self.inputs):
            states.append(choice([edge(x) for edge, x in zip(edges, states)]))
        return torch.cat(states[2:], dim=1)


class Network(SearchNetwork):
    def __init__(self, C: int, layers: int, nodes: int) -> None:
        def drawn(sizes: list[int]) -> dict[bool, list[nn.Parameter]]:
            return {
                reduction: [nn.Parameter(1e-3 * torch.randn(size)) for size in sizes]
                for reduction in (False, True)
            }

        choices = drawn([len(PRIMITIVES)] * edges_of(nodes))
        inputs = drawn([2 + i for i in range(nodes)])
        super().__init__(partial(Cell, nodes, choices, inputs), C, layers, nodes)

    def alphas(self) -> list[Tensor]:
        return [p for name, p in self.named_parameters() if name.endswith("_arch_alpha")]

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.classify(s1)


def _candidates(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, DifferentiableMixedLayer):
            yield from (module.get_submodule(name) for name in module.op_names)


LAYOUTS = (Layout("nni", Network, Network.alphas, _candidates),)
