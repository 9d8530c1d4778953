"""Counts the bytes that a search network will hold for backward, before a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fastnas.backends import MEMORY, SavedTensors, accumulation_dtype
from fastnas.nn.parts import Preprocess

if TYPE_CHECKING:
    from fastnas.nn.cell import Cell, SearchNetwork


@dataclass(frozen=True)
class MemoryReport:
    """Holds the bytes kept between forward and backward pass of a training batch, by `memory`.

    Counted is what autograd saves and what the fused ops keep, but not parameters, their
    gradients, running statistics and images, which are there in any case, nor what a pass needs
    for itself and frees.
    """

    saved: dict[str, int]
    batch: int
    size: tuple[int, int]

    def __str__(self) -> str:
        rows, cols = self.size
        lines = [f"held for backward, batch {self.batch}, images {rows}x{cols}:"]
        lines += [f"  {name:<8} {count / 2**20:>9.1f} MiB" for name, count in self.saved.items()]
        return "\n".join(lines)


def memory_report(network: SearchNetwork, batch: int, size: tuple[int, int]) -> MemoryReport:
    """Follows the shapes of a batch through the network; see `SearchNetwork.memory_report`."""
    dtype = network.classifier.weight.dtype
    rows, cols = size
    stem = cast(nn.Conv2d, network.stem[0]).out_channels
    image = torch.empty(batch, stem, rows, cols, dtype=dtype, device="meta")
    # The stem's convolution keeps the images, its batch norm its input, mean and deviation.
    shared = 2 * _bytes(image) + 2 * stem * accumulation_dtype(dtype).itemsize
    saved: dict[str, int] = dict.fromkeys(MEMORY, shared)
    s0 = s1 = image
    for i, module in enumerate(network.cells):
        cell = cast("Cell", module)
        states, out = _states(cell, i, s0, s1)
        for memory in MEMORY:
            # The states are inputs of `mixed_edges` and the outputs of `relu_conv_bn`, held once.
            saved[memory] += sum(map(_bytes, (*states, out)))
            saved[memory] += _held(cell, states[1], out, memory)
        s0, s1 = s1, out
    pooled = s1.new_empty(batch, s1.shape[1])  # the classifier's input
    return MemoryReport({m: count + _bytes(pooled) for m, count in saved.items()}, batch, size)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _states(cell: Cell, i: int, s0: Tensor, s1: Tensor) -> tuple[list[Tensor], Tensor]:
    """Returns the preprocessed inputs of a cell and its output."""
    parts = cell.parts()
    reason = parts if isinstance(parts, str) else parts.why_foreign
    if isinstance(parts, str) or reason is not None:
        raise ValueError(
            f"memory_report: cell {i} does not run on the fused ops ({reason}); what it holds is"
            " not known before a run"
        )
    states = [_preprocessed(pre, s) for pre, s in zip(parts.preprocesses, (s0, s1))]
    N, C, *size = parts.layers.table.node_size([s.shape for s in states])
    return states, states[1].new_empty(N, parts.nodes * C, *size)


def _preprocessed(pre: Preprocess, x: Tensor) -> Tensor:
    stride = len(pre.convs)
    size = (-(-s // stride) for s in x.shape[2:])
    return x.new_empty(x.shape[0], pre.norm.num_features, *size)


def _held(cell: Cell, state: Tensor, out: Tensor, memory: str) -> int:
    parts = cell.parts()
    assert not isinstance(parts, str)
    N, C = state.shape[:2]
    form = cell.noise_form()
    layers = parts.layers
    trained = any(conv.weight.requires_grad for conv in layers.convs)
    size = (N, C, out.shape[2], out.shape[3])
    held = SavedTensors.empty(state, layers.table, size, form, memory, trained, training=True)
    # This counts mean and variance [2, C] of each of the two preprocessings.
    preprocessing = 2 * 2 * C * held.stats.itemsize
    return sum(map(_bytes, held)) + preprocessing
