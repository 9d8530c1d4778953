"""Says what each op is called with: one NamedTuple an op, which is the only list of its arguments.

`fastnas.ops.call` makes the schema, the fake kernels and autograd of an op out of its tuple, and
every backend reads the tuple's fields by name. So a new argument is a line here, in the public
function, and in the kernels that read it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastnas.spaces import EdgeTable


class Noise(NamedTuple):
    """Holds the noise of one call. Kernels draw it by Philox in forward, and again in backward."""

    noisy: list[int]
    """Indices of the terms that carry noise; empty for `mixed_edges`, where every skip does."""
    form: str
    """`SkipNoise.form`, or "none"."""
    level: Tensor | None
    """float64 [2]: shift and scale of a draw, on the device of the terms."""
    rng: Tensor | None
    """int64 [2] (`mixed_edges`: [nodes, 2]): Philox key and offset, on the device of the terms."""


NO_NOISE = Noise([], "none", None, None)


# Fields stand in the order of the op's schema (`Op.flat`). The tensors of a call are the caller's
# own, so no kernel may write to them.
class SumCall(NamedTuple):
    """y = sum_k w_k x_k (`mixed_sum`)."""

    x: list[Tensor]
    w: Tensor
    noise: Noise


class NormSumCall(NamedTuple):
    """y = sum_k w_k BN(z_k) (`mixed_norm_sum`)."""

    z: list[Tensor]
    w: Tensor
    normed: list[bool]
    eps: float
    mean: Tensor | None
    """[normed terms, C] to normalise by; None in training, where they are the batch's."""
    var: Tensor | None
    noise: Noise


class EdgesCall(NamedTuple):
    """y_j = sum_{e into j} sum_k w_ek o_k(x_e), the nodes of a cell (`mixed_edges`)."""

    x: list[Tensor]
    w: Tensor
    params: list[Tensor]
    table: EdgeTable
    running: Tensor | None
    """[norms, 2, C] mean and variance to normalise by; None in training, as above."""
    eps: float
    noise: Noise
    choice: Tensor | None
    """int64 [edges], the candidate that each edge runs, where kernels read it on the device."""
    memory: str
    keep_gram: bool
    """Whether backward will want gradients of the parameters, which read cov(u)."""


class ConvCall(NamedTuple):
    """y = BN(W relu(x)) (`relu_conv_bn`)."""

    x: Tensor
    params: list[Tensor]
    running: Tensor | None
    """[2, C] mean and variance to normalise by; None in training, as above."""
    eps: float


class PathsCall(NamedTuple):
    """Holds what paths through a cell are drawn from, and again in backward (`sample_paths`)."""

    alpha: Tensor
    beta: Tensor | None
    nodes: list[int]
    topology: str
    tau: Tensor
    """float64 []."""
    rng: Tensor
    paths: int
