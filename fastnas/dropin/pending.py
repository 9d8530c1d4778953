"""Holds calls of candidates that are not computed yet, and computes them together."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastnas.backends import accumulation_dtype
from fastnas.dropin.tally import Site
from fastnas.nn.parts import Candidate, Tensors
from fastnas.nn.run import count
from fastnas.ops import mixed_edges
from fastnas.ops.autocast import autocast_dtype
from fastnas.spaces import Edge, EdgeTable
from fastnas.spaces.edge_table import edge_term

logger = logging.getLogger("fastnas")


class Manner(NamedTuple):
    """Says how a candidate is to be computed: terms of one manner share a `mixed_edges`."""

    training: bool
    autocast: torch.dtype | None
    """The dtype of autocast; None where it is off."""
    eps: float
    momentum: float
    memory: str
    backend: str | None


class Modes(NamedTuple):
    """Holds the modes of torch under which an operation is called, to compute it later."""

    grad: bool
    inference: bool
    hooks: object
    """Those of saved tensors. Each checkpoint has its own, and counts what is saved in it."""

    @classmethod
    def now(cls) -> Modes:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Sets these modes for a while, and takes away hooks that were set since."""
        changes = self.inference != torch.is_inference_mode_enabled()
        mode = torch.inference_mode(self.inference) if changes else nullcontext()
        left, autograd = [], torch._C._autograd
        while (top := autograd._top_saved_tensors_default_hooks(True)) not in (None, self.hooks):
            left.append(top)
            autograd._pop_saved_tensors_default_hooks()
        try:
            with mode, torch.set_grad_enabled(self.grad):
                yield
        finally:
            for hooks in reversed(left):
                autograd._push_saved_tensors_default_hooks(*hooks)


def version(x: Tensor) -> int:
    """Returns a number that grows when x is changed in place; inference tensors have none."""
    return 0 if x.is_inference() else x._version


def changed(what: str) -> str:
    """Returns the message for a tensor that was changed while a sum waited for it."""
    return (
        f"fastnas: {what} was changed before the sum that reads it was computed, at its first use;"
        " eager computes at once. Clone it before it is changed, or `decelerate` this network"
    )


class Call:
    """Holds one call of a candidate, as long as somebody may ask for its output.

    Args:
        candidate: what the module was read as.
        tensors: those of its layers now; `functional_call` exchanges them for its duration only.
        x: the input, [N, C, H, W].
        site: what the call is counted as.
    """

    def __init__(
        self,
        candidate: Candidate,
        tensors: Tensors,
        x: Tensor,
        manner: Manner,
        site: Site,
    ) -> None:
        self.candidate, self.tensors, self.manner, self.site = candidate, tensors, manner, site
        self.x, self.version = x, version(x)
        self.weights = sum(map(version, tensors.params))
        biases = [conv._parameters.get("bias") for conv in candidate.convs]
        self.biases = biases if any(b is not None for b in biases) else []
        """Of its convolutions, which the kernels do not add: a batch norm takes them away."""
        self.dtype = autocast_dtype(x) if candidate.convs else x.dtype
        """Of the output: autocast casts for convolutions."""
        self.modes = Modes.now()
        self.ran = False
        """Whether it was computed, so that its running statistics have moved."""
        self.value: Tensor | None = None
        """The output, where it was computed by itself."""

    @property
    def is_skip(self) -> bool:
        return self.candidate.name == "skip_connect" and self.candidate.stride == 1

    @property
    def must_run(self) -> bool:
        """Tells whether running statistics are still to be moved."""
        return self.manner.training and bool(self.tensors.running) and not self.ran

    def input(self) -> Tensor:
        """Returns the input.

        Raises:
            RuntimeError: it, or a parameter, is no longer what it was at the call.
        """
        name = self.candidate.name
        if version(self.x) != self.version:
            raise RuntimeError(changed(f"the input of {name}, {list(self.x.shape)},"))
        if sum(map(version, self.tensors.params)) != self.weights:
            raise RuntimeError(changed(f"a parameter of {name}"))
        return self.x

    def close(self, beside_dense: bool) -> None:
        """Takes a pool as one without a batch norm, since none has come by now.

        Args:
            beside_dense: whether dense convolutions are computed with it.
        """
        candidate = self.candidate
        if not candidate.is_open or self.tensors.running:
            return
        self.site.ran_fused()
        if beside_dense and (candidate.name, candidate.stride) == ("avg_pool_3x3", 1):
            self.candidate = replace(candidate, name="plain_avg_pool_3x3")
            return
        # A batch norm of mean 0 and variance 1 - eps changes nothing. Autocast leaves pools alone.
        self.manner = self.manner._replace(training=False, autocast=None)
        mean = self.x.detach().new_zeros(self.x.shape[1], dtype=accumulation_dtype(self.x.dtype))
        self.tensors = Tensors([], [(mean, mean + (1 - self.manner.eps))], [])

    def settle(self) -> None:
        """Computes the output if statistics wait for it: its module is about to be called again."""
        if self.must_run:
            self.value = compute([(None, self)])

    def __del__(self) -> None:
        # Nobody used the output, but eager's running statistics have moved.
        if self.must_run and not sys.is_finalizing():
            self.modes = self.modes._replace(grad=False)
            try:
                compute([(None, self)])
            except Exception as error:  # raised from here it would reach nobody
                logger.warning(
                    "fastnas: running statistics of an unused output did not move: %s", error
                )


Scalar = Tensor | float
Term = tuple[Scalar | None, Call]
"""A weight, None for 1, and what it weighs."""


def compute(terms: Sequence[Term]) -> Tensor:
    """Computes sum_i w_i o_i(x_i), by few `mixed_edges`; all of the terms have the same modes."""
    with terms[0][1].modes.restored():
        parts: list[Tensor] = []
        groups: dict[tuple[object, ...], list[Term]] = {}
        plain: list[Term] = []
        dense = any(call.candidate.is_dense for _, call in terms)
        for weight, call in _each_once(terms):
            call.close(dense)
            if call.value is not None:
                parts.append(_weighted(weight, call.value))
            elif call.tensors.running:
                # On a GPU dense convolutions are torch's, and depthwise ones beside them would run
                # by the reference.
                key = (call.candidate.is_dense, call.manner, call.ran)
                groups.setdefault(key, []).append((weight, call))
            else:
                plain.append((weight, call))
        rest = _join(plain, groups)
        parts += [_fused(group) for group in groups.values()]
        parts += [_weighted(weight, _plain(call)) for weight, call in rest]
        return reduce(torch.add, parts)


def _join(plain: list[Term], groups: dict[tuple[object, ...], list[Term]]) -> list[Term]:
    """Adds what has no batch norm to groups that compute it anyway; returns what is left."""
    for term in plain:
        if term[1].candidate.is_dense:
            home = next((key for key in groups if key[0]), (True,))
            groups.setdefault(home, []).append(term)
    # An identity or zeros alone are not worth a kernel.
    rest = [term for term in plain if not term[1].candidate.is_dense]
    if not groups:
        return rest
    next(iter(groups.values())).extend(rest)
    return []


def _each_once(terms: Iterable[Term]) -> list[Term]:
    """Lists each call once, with the sum of its weights."""
    weights: dict[Call, Scalar | None] = {}
    for weight, call in terms:
        if call in weights:
            before = weights[call]
            weight = (1.0 if weight is None else weight) + (1.0 if before is None else before)
        weights[call] = weight
    return [(weight, call) for call, weight in weights.items()]


def _plain(call: Call) -> Tensor:
    """Computes what needs no kernel: the identity, or zeros."""
    x, stride = call.input(), call.candidate.stride
    return x if call.is_skip else x[:, :, ::stride, ::stride] * 0


def _weighted(weight: Scalar | None, value: Tensor) -> Tensor:
    return value if weight is None else weight * value


def _fused(terms: list[Term]) -> Tensor:
    """Computes terms of one manner by `mixed_edges`; moves the statistics of new calls."""
    manner, again = terms[0][1].manner, terms[0][1].ran
    edges: dict[tuple[int, int], list[Term]] = {}
    for weight, call in terms:
        edges.setdefault((id(call.x), call.candidate.stride), []).append((weight, call))
    rows = list(edges.values())
    calls = [call for row in rows for _, call in row]
    names = tuple(
        (row[0][1].candidate.stride, tuple(call.candidate.name for _, call in row)) for row in rows
    )
    # A second sum over the same call takes the batch's statistics, which have moved already.
    moves = manner.training and not again
    running = None
    if moves or not manner.training:
        running = [pair for call in calls for pair in _running(call)]
    with _autocast_of(calls[0]):
        y = mixed_edges(
            [row[0][1].input() for row in rows],
            _weights([[_tied(weight, call) for weight, call in row] for row in rows], calls[0].x),
            [p for call in calls for p in call.tensors.params],
            _table(names),
            running=running,
            momentum=manner.momentum,
            training=manner.training,
            eps=manner.eps,
            memory=manner.memory,
            backend=manner.backend,
        )
    if moves:
        count([c for call in calls for c in call.tensors.counters])
        for call in calls:
            for (mean, _), shift in zip(call.tensors.running, _shifts(call)):
                mean.add_(shift, alpha=manner.momentum)
            call.ran = True
    # Under autocast all is computed as the convolutions are, and the sum is as wide as its terms.
    return y.to(reduce(torch.promote_types, (call.dtype for call in calls)))


@torch.no_grad()
def _shifts(call: Call) -> list[Tensor]:
    """Returns by how much biases shift what each batch norm is given; none without biases.

    A batch norm takes the shift away again. Only its running mean knows of it.
    """
    if not call.biases:
        return []
    shifts = [0 if b is None else b.detach() for b in call.biases]
    if len(call.tensors.running) == len(shifts):
        return [torch.as_tensor(shift) for shift in shifts]
    if call.candidate.name == "skip_connect":
        return [torch.cat([cast(Tensor, b) for b in shifts])]
    # The pointwise convolution [C, C, 1, 1] of each half adds up what the depthwise one shifts.
    found = []
    for half, before in enumerate(shifts[::2]):
        W = call.tensors.params[2 * half + 1].flatten(1)
        found.append(W @ (W.new_zeros(len(W)) + before) + shifts[2 * half + 1])
    return found


def _running(call: Call) -> list[tuple[Tensor, Tensor]]:
    """Returns the running statistics to move; outside of training, those without biases."""
    pairs = call.tensors.running
    if call.manner.training or not call.biases:
        return pairs
    return [(mean - shift, var) for (mean, var), shift in zip(pairs, _shifts(call))]


def _tied(weight: Scalar | None, call: Call) -> Scalar | None:
    """Returns the weight, tied to biases before a batch norm, whose gradient is 0 and not None."""
    wanted = [b for b in call.biases if b is not None and b.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return weight
    return (1.0 if weight is None else weight) + sum(0 * b.sum() for b in wanted)


def _autocast_of(call: Call) -> AbstractContextManager[Any]:
    """Returns what the call is computed in, so that autocast is as it was."""
    kind, dtype = call.x.device.type, call.manner.autocast
    if dtype == autocast_now(call.x):
        return nullcontext()
    return torch.autocast(kind, dtype, enabled=dtype is not None)


def autocast_now(x: Tensor) -> torch.dtype | None:
    """Returns the dtype of autocast on the device of x, or None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@lru_cache(maxsize=256)
def _table(edges: tuple[tuple[int, tuple[str, ...]], ...]) -> EdgeTable:
    """Returns the table of one node, into which each edge has a stride and candidates by name."""
    rows = []
    for source, (stride, names) in enumerate(edges):
        terms = [edge_term(name, k, stride) for k, name in enumerate(names)]
        rows.append(Edge(source, 0, stride, tuple(term for term in terms if term is not None)))
    return EdgeTable(len(edges), 1, max(len(names) for _, names in edges), tuple(rows))


def _weights(rows: list[list[Scalar | None]], like: Tensor) -> Tensor:
    """Stacks scalars to mixing weights [edges, candidates], filled up with zeros."""
    dtypes = (w.dtype for row in rows for w in row if isinstance(w, Tensor))
    dtype = reduce(torch.promote_types, dtypes, like.dtype)
    one = like.new_ones((), dtype=dtype if dtype.is_floating_point else like.dtype)

    def tensor(w: Scalar | None) -> Tensor:
        return w.to(one) if isinstance(w, Tensor) else one if w is None else w * one

    K, zero = max(map(len, rows)), 0 * one
    flat = [t for row in rows for t in [*map(tensor, row), *[zero] * (K - len(row))]]
    return torch.stack(flat).view(len(rows), K)


def is_function_forward() -> bool:
    """Tells whether the forward of an `autograd.Function` is running.

    torch switches off both kinds of derivatives there; `no_grad` leaves those of forward mode on.
    """
    on = torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled()
    return not (on or torch.is_inference_mode_enabled())


def must_not_wait(x: Tensor) -> bool:
    """Tells whether a candidate of x is to return a tensor at once."""
    # The forward of a Function has to. So has the second forward of a re-entrant checkpoint, in the
    # middle of a backward pass; the other kind of checkpoint goes by hooks of saved tensors.
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    in_backward = torch._C._current_graph_task_id() != -1 and not hooked
    # An inference tensor has no version, by which a change could be seen.
    return in_backward or x.is_inference() or is_function_forward()
