"""Benchmarks mixed_edges: one mixed op of DARTS, and one cell with its preprocessing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fastnas import nn as fused
from fastnas import reference
from fastnas.backends import MEMORY
from fastnas.benchmarks.harness.verify import SEED, Problem
from fastnas.benchmarks.ops.mixed_sum import BATCHES, STAGES, fused_backends
from fastnas.benchmarks.ops.modules import module_problem, sharing
from fastnas.spaces import CellType, get_space

OP = "mixed_edges"
SPACE = get_space("S0")
EXPANSION = 4
"""A cell reads the outputs of the two before it, of as many channels as its nodes have together."""
DEPTHWISE = 2 * (9 + 25) + 9 + 25
"""Taps of the six depthwise convolutions of an edge; each has a pointwise one behind it."""


@dataclass(frozen=True)
class MixedOpCase:
    """Describes the 8 candidates of an edge; `shape` is that of its input."""

    shape: tuple[int, ...]
    stride: int = 1
    dtype: torch.dtype = torch.float32

    K = SPACE.num_candidates("normal")
    layout = "contiguous"

    @property
    def op(self) -> str:
        return OP if self.stride == 1 else f"{OP} stride {self.stride}"

    def bytes_moved(self, pass_: str) -> None:
        """Returns None: arithmetic is the limit, not traffic."""

    def fma(self, pass_: str) -> int:
        """Counts those of the convolutions as eager runs them; backward both gradients."""
        return _PASSES[pass_] * edge_fma(self.shape, self.stride)

    def problem(self, device: str, full: bool) -> Problem:
        arguments = SPACE.normal[0], self.shape[1], self.stride
        torch.manual_seed(SEED)
        eager = reference.MixedOp(*arguments).to(device, self.dtype)
        own = _fused(device, self.dtype, eager, partial(fused.MixedOp, *arguments))
        return module_problem(eager, own, [self.shape], (self.K,), full)


@dataclass(frozen=True)
class CellCase:
    """Describes 4 nodes and 14 edges; `shape` is that of the states after preprocessing."""

    shape: tuple[int, ...]
    cell_type: CellType = "normal"
    dtype: torch.dtype = torch.float32

    K = SPACE.num_candidates("normal")
    layout = "contiguous"

    @property
    def op(self) -> str:
        return f"{OP} {self.cell_type} cell"

    def bytes_moved(self, pass_: str) -> None:
        """Returns None: arithmetic is the limit, not traffic."""

    def fma(self, pass_: str) -> int:
        """Counts those of the edges and of the preprocessing, both 1x1 kernels."""
        strides = [SPACE.stride(self.cell_type, edge) for edge in SPACE.edges]
        N, C, rows, cols = self.shape
        before = 2 * EXPANSION * C * math.prod(self.shape)
        # In a reduction cell the first edges have stride 2, and the nodes half the rows and
        # columns.
        pixels = rows // max(strides), cols // max(strides)
        inside = (N, C, *pixels)
        edges = sum(
            edge_fma(self.shape, 2) if stride == 2 else edge_fma(inside, 1) for stride in strides
        )
        return _PASSES[pass_] * (before + edges)

    def problem(self, device: str, full: bool) -> Problem:
        N, C, *pixels = self.shape
        before = EXPANSION * C
        arguments = SPACE, self.cell_type, before, before, C, False
        torch.manual_seed(SEED)
        eager = reference.Cell(*arguments).to(device, self.dtype)
        own = _fused(device, self.dtype, eager, partial(fused.Cell, *arguments))
        w = len(SPACE.edges), self.K
        return module_problem(eager, own, 2 * [(N, before, *pixels)], w, full)


Case = MixedOpCase | CellCase
_PASSES = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}


def edge_fma(shape: tuple[int, ...], stride: int) -> int:
    """Counts the forward multiply-adds of one edge's convolutions, for an input of this shape."""
    # There are six pointwise convolutions: two of each separable one, one of each dilated one.
    C, pointwise = shape[1], 6 if stride == 1 else 7  # the skip of stride 2 is 1x1 convolutions
    return math.prod(shape) // stride**2 * (DEPTHWISE + pointwise * C)


def _fused(
    device: str, dtype: torch.dtype, eager: nn.Module, build: partial[nn.Module]
) -> dict[str, nn.Module]:
    """Names `fastnas-<backend>` with memory lean, `fastnas-<backend>-<memory>` with the others."""
    modules = {}
    # Only the backend that auto picks, as each has three memory settings to verify and time.
    for backend in fused_backends(device, dtype, 1, OP)[:1]:
        for memory in sorted(MEMORY, key=lambda name: name != "lean"):
            # All providers run on the same parameters, so that their gradients can be compared.
            module = sharing(build().to(device, dtype), eager)
            module.memory = memory
            suffix = "" if memory == "lean" else f"-{memory}"
            modules[f"fastnas-{backend}{suffix}"] = module
    return modules


def cases(device: str, quick: bool = False, full: bool = False) -> list[Case]:
    """Lists mixed ops of every stage and stride, bf16 in the first; and cells of the first."""
    if not fused_backends(device, torch.float32, 1, OP):
        return []
    shapes = [(BATCHES[device][0], *stage) for stage in STAGES]
    if quick:
        return [MixedOpCase(shapes[-1])]
    table: list[Case] = [MixedOpCase(shape, stride) for shape in shapes for stride in (1, 2)]
    table += [MixedOpCase(shapes[0], stride, torch.bfloat16) for stride in (1, 2)]
    return [*table, CellCase(shapes[0]), CellCase(shapes[0], "reduce")]
