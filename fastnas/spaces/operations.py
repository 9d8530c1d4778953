"""Describes every operation of a cell once: its layers, its kernel, and who knows it.

What builds an operation, reads one back from a module, plans, counts or computes it asks these
tables; the C++ sources are given their numbers with each edge table. A candidate with another
kernel size or dilation is a row of `OPERATIONS`, with its kernel in the row of its kind, and in
the three headers that compile kernels of fixed size (csrc/cpu/depthwise.h, csrc/cpu/vector.h,
csrc/cuda/mixed_edges_tile.h).
"""

from collections import ChainMap
from collections.abc import Mapping
from typing import NamedTuple

Kernel = tuple[int, int]
"""(size, dilation) of a depthwise convolution."""

_PLAIN: tuple[Kernel, ...] = ((3, 1), (5, 1), (7, 1))


class EdgeKind(NamedTuple):
    """Describes a kind of term of `mixed_edges`, by the layers that it is made of.

    Its parameters come in this order: of each half a depthwise [C, 1, k, k] and a pointwise
    [C, C, 1, 1] convolution, then of each strided convolution [C / 2, C, 1, 1], then of each dense
    convolution [C, C, k, k].
    """

    name: str
    halves: int = 0
    """ReLU, depthwise convolution, pointwise convolution, batch norm: this often."""
    strided_convs: int = 0
    """1x1 convolutions of stride 2, each of half the channels, after one ReLU."""
    dense_convs: int = 0
    """ReLU, convolution of all channels, batch norm: this often."""
    norms: int = 0
    """Batch norms, that of each half included."""
    noisy: bool = False
    """Whether it is a skip connection, on which noise may be drawn."""
    strides: tuple[int, ...] = (1, 2)
    kernels: tuple[Kernel, ...] = ()
    """Those of its depthwise or dense convolutions for which there is compiled code."""

    @property
    def params(self) -> int:
        """Counts its convolutions, each of which has one parameter."""
        return 2 * self.halves + self.strided_convs + self.dense_convs


EDGE_KINDS: dict[str, EdgeKind] = {
    kind.name: kind
    for kind in (
        EdgeKind("max_pool", norms=1),
        EdgeKind("avg_pool", norms=1),
        EdgeKind("skip", noisy=True, strides=(1,)),
        EdgeKind("reduce_skip", strided_convs=2, norms=1, noisy=True, strides=(2,)),
        EdgeKind("sep_conv", halves=2, norms=2, kernels=_PLAIN),
        EdgeKind("dil_conv", halves=1, norms=1, kernels=(*_PLAIN, (3, 2), (5, 2))),
        EdgeKind("dense_conv", dense_convs=1, norms=1, strides=(1,), kernels=((1, 1), (3, 1))),
        EdgeKind("plain_avg_pool", strides=(1,)),
    )
}
"""By name, in the order of `EdgeOp` of the C++ sources."""

EDGE_OPS: tuple[str, ...] = tuple(EDGE_KINDS)


class Operation(NamedTuple):
    """Describes an operation that an edge may offer.

    A name that is no row of `OPERATIONS` is a candidate of the user's own.
    """

    name: str
    kinds: tuple[str, ...] = ()
    """What `mixed_edges` computes for it, at stride 1 and at stride 2 if it has that; none where it
    is foreign to that op. `none` adds nothing, so it has no kind, either."""
    size: int = 0
    dilation: int = 1
    """Of its depthwise or dense convolutions, where it has any."""
    parameter_free: bool = False
    """Whether it has no parameters at stride 1."""

    def kind(self, stride: int) -> str | None:
        """Returns the kind of its term at a stride, or None."""
        # A skip is the identity at stride 1 and `FactorizedReduce` at stride 2; others keep their
        # kind.
        return self.kinds[stride - 1] if stride <= len(self.kinds) else None


def _convolution(kind: str, size: int, dilation: int = 1) -> Operation:
    # Published names tell the size and not the dilation, which is 2 in every dil_conv.
    return Operation(f"{kind}_{size}x{size}", (kind, kind), size, dilation)


OPERATIONS: dict[str, Operation] = {
    op.name: op
    for op in (
        Operation("none", parameter_free=True),
        Operation("max_pool_3x3", ("max_pool", "max_pool"), parameter_free=True),
        Operation("avg_pool_3x3", ("avg_pool", "avg_pool"), parameter_free=True),
        Operation("skip_connect", ("skip", "reduce_skip"), parameter_free=True),
        _convolution("sep_conv", 3),
        _convolution("sep_conv", 5),
        _convolution("dil_conv", 3, dilation=2),
        _convolution("dil_conv", 5, dilation=2),
        _convolution("sep_conv", 7),
        Operation("conv_7x1_1x7"),
        Operation("noise", parameter_free=True),
    )
}
"""The operations of DARTS cells that fastnas can build by name."""

OPS: tuple[str, ...] = tuple(OPERATIONS)
"""Their names."""

DARTS_PRIMITIVES: tuple[str, ...] = OPS[:8]
"""The candidates of DARTS, in the order in which its ``alpha`` indexes them."""

PARAMETER_FREE: frozenset[str] = frozenset(
    name for name, op in OPERATIONS.items() if op.parameter_free
)
"""Operations without parameters at stride 1 (at stride 2 ``skip_connect`` has two convolutions)."""


_OF_NB201 = {
    op.name: op
    for op in (
        Operation("nor_conv_1x1", ("dense_conv",), 1),
        Operation("nor_conv_3x3", ("dense_conv",), 3),
        Operation("plain_avg_pool_3x3", ("plain_avg_pool",), parameter_free=True),
    )
}
EDGE_OPERATIONS: Mapping[str, Operation] = ChainMap(OPERATIONS, _OF_NB201)
"""All that `mixed_edges` computes, by the name that a term is made from: NAS-Bench-201's as well,
whose average pool shares its published name with that of DARTS, but has no batch norm."""


def operations_of(kind: str) -> tuple[Operation, ...]:
    """Lists the operations that are of this kind at some stride."""
    return tuple(op for op in EDGE_OPERATIONS.values() if kind in op.kinds)
