"""Holds sample_paths: its description, its checks and its public function. Its kernels:

backends/native_sums.py -> csrc/cpu/sample_paths.cpp, csrc/cuda/sample_paths.cu (csrc/formulas/*.h)
backends/triton.py      -> kernels/sample_paths.py
backends/eager.py       -> reference/sample_paths.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastnas import reference
from fastnas.backends.calls import PathsCall
from fastnas.checks import check_choice, short
from fastnas.ops.call import FIRST, Op
from fastnas.ops.checks import (
    as_list,
    check_dtype,
    check_noise_tensors,
    check_tensor,
    is_index,
)
from fastnas.ops.mixed_sum import draw_rng
from fastnas.reference import TOPOLOGIES, logits_per_node

MAX_PATHS = 2**31 - 1
MAX_NODES = 64  # of a cell: their first edges travel in the kernel argument block


class PathSample(NamedTuple):
    """Holds what `sample_paths` drew."""

    op: Tensor
    """int64 [paths, ..., E]: the sampled operation of each edge; -1: not in the path."""
    weight: Tensor
    """[paths, ..., E]: 1 on sampled edges, 0 elsewhere; differentiable in alpha and beta."""


def _fake(call: PathsCall) -> tuple[Tensor, list[Tensor]]:
    shape = (call.paths, *call.alpha.shape[:-1])
    return call.alpha.new_empty(shape), [call.alpha.new_empty(shape, dtype=torch.int64)]


def _reference(call: PathsCall) -> Tensor:
    # A cell without a topology has no beta, for which `reference_grads` has a stand-in.
    beta = None if call.topology == "none" else call.beta
    return reference.sample_paths(*call._replace(beta=beta))[1]


def _longest_row(call: PathsCall) -> int:
    # A kernel keeps one row of logits in a buffer of fixed size: the operations of an edge, or the
    # edges (or pairs) of a node.
    return max(call.alpha.shape[-1], *logits_per_node(call.nodes, call.topology))


SAMPLE_PATHS = Op(
    "sample_paths",
    PathsCall,
    leaves=("alpha", "beta"),
    fake=_fake,
    reference=_reference,
    terms=_longest_row,
    shows=FIRST,
)


def sample_paths(
    alpha: Tensor,
    beta: Tensor | None = None,
    *,
    nodes: Sequence[int],
    tau: float | Tensor,
    topology: str = "none",
    paths: int = 1,
    rng: Tensor | None = None,
    backend: str | None = None,
) -> PathSample:
    """Draws independent paths through a cell, or through cells of several types, in one call.

    The operation of every edge by Gumbel-softmax (ROME, ICCV 2023, eq. 2-3; GDAS), the two edges of
    every node by Gumbel-Top2 (ROME v2, eq. 7-8) or by Gumbel-max over pairs (ROME v1, eq. 4-6), or
    all edges (GDAS). Nothing waits for the device: indices stay on it.

    The paper prints no straight-through form; ours is B_st A_st with A_st = A + At - sg(At), and
    gradients flow through what is executed only: At and Bt of each edge kept, in v1 It of the
    sampled pair for both its edges. Where a node has two predecessors both are kept and beta has no
    gradient (in v1 by the formula, in v2 because it would be noise).

    Which operation and which edges are drawn is decided in float64 by arithmetic that gives the
    same bits everywhere: a seed gives the same `op` on every backend. Of equal perturbed logits the
    lower index wins, NaN wins over numbers; where a logit that takes part is NaN or infinite such
    that softmax is NaN, op is a valid index, and the weight and its gradient are NaN.

    Args:
        alpha: [..., E, O] operation logits, float32 or on the CPU also float64, with any leading
            axes, such as one of cell types. Edges are numbered node by node.
        beta: of alpha's dtype and leading axes; [..., E] for "top2", [..., P] for "pairs", where
            each node has n(n - 1)/2 logits, of its pairs (0, 1), (0, 2), ... in that order.
        nodes: predecessors of each node, (2, 3, 4, 5) in a DARTS cell; at least 2 unless topology
            is "none". They sum to E.
        tau: temperature > 0, or a 0-d floating tensor on alpha's device, which a captured graph
            reads at replay; its value is not checked. It has no gradient.
        topology: "none", "top2" or "pairs".
        paths: independent samples, >= 1.
        rng: int64 [2] Philox key and offset on the device; beta draws at offset + 1. By default
            drawn from torch's generator.
        backend: as in `mixed_sum`.

    Returns:
        `PathSample` of op and weight.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        BackendError: the explicit backend cannot run this.
    """
    nodes = as_list("sample_paths", "nodes", nodes, "integers")
    _check_cell(alpha, nodes, topology)
    _check_has_beta(beta is not None, topology)
    if beta is not None:
        logits = sum(logits_per_node(nodes, topology))
        _check_beta(alpha, beta, logits, f"nodes {tuple(nodes)} and topology {topology!r}")
    if not is_index(paths) or not 1 <= paths <= MAX_PATHS:
        raise ValueError(
            f"sample_paths: paths is {short(paths)}; an integer from 1 to {MAX_PATHS} is allowed"
        )
    tau = _checked_tau(tau, alpha)
    if rng is None:
        rng = draw_rng(device=alpha.device)[0]
    else:
        check_noise_tensors("sample_paths", alpha.device, None, rng, (2,))
    call = PathsCall(alpha, beta, nodes, topology, tau, rng, paths)
    weight, op = SAMPLE_PATHS(call, backend)
    return PathSample(op, weight)


def _check_cell(alpha: Tensor, nodes: list[int], topology: str) -> None:
    check_tensor("sample_paths", "alpha", alpha)
    check_dtype("sample_paths", "alpha", alpha)
    check_choice("sample_paths: topology", topology, TOPOLOGIES)
    fewest = 1 if topology == "none" else 2
    if not 1 <= len(nodes) <= MAX_NODES or not all(is_index(n) and n >= fewest for n in nodes):
        raise ValueError(
            f"sample_paths: nodes is {short(tuple(nodes))}; 1 to {MAX_NODES} integers >= {fewest}"
            f" are allowed where topology is {topology!r}"
        )
    if alpha.dim() < 2 or alpha.shape[-2] != sum(nodes) or alpha.shape[-1] < 1:
        raise ValueError(
            f"sample_paths: alpha has shape {list(alpha.shape)}; [..., {short(sum(nodes))}, O] with"
            f" O >= 1 is needed for nodes {short(tuple(nodes))}"
        )


def _check_has_beta(has_beta: bool, topology: str) -> None:
    if has_beta == (topology == "none"):
        given, needed = ("a", "none is") if has_beta else ("no", "one is")
        raise ValueError(
            f"sample_paths: {given} beta is given, but topology is {topology!r}; {needed} needed"
        )


def _check_beta(alpha: Tensor, beta: Tensor, logits: int, cell: str) -> None:
    """Checks that beta is like alpha, with so many logits as an error says that `cell` has."""
    check_tensor("sample_paths", "beta", beta)
    if beta.dtype != alpha.dtype:
        raise TypeError(
            f"sample_paths: beta is {beta.dtype}, alpha is {alpha.dtype}; one dtype is needed"
        )
    if beta.device != alpha.device:
        raise ValueError(f"sample_paths: beta is on {beta.device}, alpha on {alpha.device}")
    shape = [*alpha.shape[:-2], logits]
    if list(beta.shape) != shape:
        raise ValueError(
            f"sample_paths: beta has shape {list(beta.shape)}; {shape} is needed for alpha"
            f" {list(alpha.shape)}, {cell}"
        )


def _checked_tau(tau: float | Tensor, alpha: Tensor) -> Tensor:
    """Returns tau as float64 [] on alpha's device; a number is filled in: no copy is waited for."""
    if not isinstance(tau, Tensor):
        # A bool is an int to Python, and a tau of True would be a temperature of 1.
        is_number = isinstance(tau, Real) and not isinstance(tau, bool)
        if not is_number or not 0 < tau <= sys.float_info.max:
            raise ValueError(
                f"sample_paths: tau is {short(tau)}; a finite number > 0 or a 0-d tensor is allowed"
            )
        return torch.full((), float(tau), dtype=torch.float64, device=alpha.device)
    check_tensor("sample_paths", "tau", tau)
    if tau.dim() != 0 or not tau.is_floating_point():
        raise ValueError(
            f"sample_paths: tau is {tau.dtype} {list(tau.shape)}; a floating point tensor [] is"
            " needed"
        )
    if tau.device != alpha.device:
        raise ValueError(f"sample_paths: tau is on {tau.device}, alpha on {alpha.device}")
    if tau.requires_grad:
        raise ValueError("sample_paths: tau requires a gradient; it has none here, detach it")
    return tau.to(torch.float64)
