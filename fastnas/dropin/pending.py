"""Holds calls of candidates that are not computed yet, and computes them together."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from fastnas.backends import accumulation_dtype
from fastnas.dropin.biases import Biases, move, tied
from fastnas.dropin.modes import Modes, autocast_now, changed, version, versions
from fastnas.dropin.tally import Site
from fastnas.dropin.weights import Weight, scalar, stacked
from fastnas.nn.parts import Candidate, Tensors
from fastnas.nn.run import count
from fastnas.ops import mixed_edges
from fastnas.ops.autocast import autocast_dtype
from fastnas.ops.batch_norm import Running
from fastnas.spaces import Edge, EdgeTable, EdgeTerm

if TYPE_CHECKING:
    from fastnas.dropin.sums import Sum

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


class Call:
    """Holds one call of a candidate, as long as somebody may ask for its output.

    Args:
        candidate: what the module was read as.
        tensors: those of its layers now; `functional_call` exchanges them for its duration only.
        source: the input, [N, C, H, W], which may be a sum that waits itself.
        site: what the call is counted as.
        modes: those of the call.
    """

    def __init__(
        self,
        candidate: Candidate,
        tensors: Tensors,
        source: Tensor | Sum,
        manner: Manner,
        site: Site,
        modes: Modes,
    ) -> None:
        self.candidate, self.tensors, self.manner, self.site = candidate, tensors, manner, site
        self.source = source
        self.device: torch.device = source.device
        self.version = version(source) if isinstance(source, Tensor) else 0
        # This many sums that wait have to be computed before.
        self.depth: int = 0 if isinstance(source, Tensor) else source.depth
        self.biases = Biases(candidate, tensors.params)
        self.weights = self._versions()
        x = cast(Tensor, source)  # of a sum that waits as much is known as is asked for
        self.has_gradient = isinstance(source, Tensor) and source.requires_grad
        self.dtype: torch.dtype = autocast_dtype(x) if candidate.convs else x.dtype
        """Of the output: autocast casts for convolutions."""
        self.modes = modes
        self.ran = False
        """Whether it was computed, so that its running statistics have moved."""
        self.value: Tensor | None = None
        """The output, where it was computed by itself."""

    @property
    def is_skip(self) -> bool:
        return self.candidate.name == "skip_connect" and self.candidate.stride == 1

    @property
    def is_normed(self) -> bool:
        return bool(self.candidate.norms or self.tensors.running)

    @property
    def must_run(self) -> bool:
        """Tells whether running statistics are still to be moved."""
        return self.manner.training and bool(self.tensors.running) and not self.ran

    def input(self) -> Tensor:
        """Returns the input.

        Raises:
            RuntimeError: it, or a parameter, is no longer what it was at the call.
        """
        if isinstance(self.source, Tensor):
            x, before = self.source, self.version
        else:
            x, before = self.source.read()
        name = self.candidate.name
        cut = isinstance(self.source, Tensor) and x.requires_grad != self.has_gradient
        if version(x) != before or cut:
            raise RuntimeError(changed(f"the input of {name}, {list(x.shape)},"))
        self.check()
        return x

    def check(self) -> None:
        """Raises RuntimeError where a parameter is no longer what it was at the call."""
        if self._versions() != self.weights:
            raise RuntimeError(changed(f"a parameter of {self.candidate.name}"))

    def _versions(self) -> int:
        """Adds up versions of what it reads besides its input, which a change raises."""
        found = versions(self.tensors.params) + versions(self.biases.held)
        if not self.manner.training:  # in training the order of the calls is that of the moves
            found += sum(map(versions, self.tensors.running))
        return found

    @property
    def has_bias_gradients(self) -> bool:
        """Tells whether biases have gradients by a term beside the kernels."""
        return not self.manner.training and self.modes.grad and any(self.biases.need_gradients())

    def statistics(self) -> list[Running]:
        """Returns running statistics: in training to move, else to normalise by."""
        pairs = self.tensors.running
        return pairs if self.manner.training else self.biases.taken_off(pairs)

    def by_halves(self) -> Call:
        """Returns the second half of a separable convolution, whose input is computed here.

        So it has to be where gradients reach a bias in the first half, which nothing beside the
        kernels could compute; otherwise this is the call itself.
        """
        if not self.has_bias_gradients or self.biases.need_gradients()[:-1] != [True]:
            return self
        first = self._half(0, self.input())
        return self._half(1, compute([(None, first)]))

    def _half(self, index: int, x: Tensor) -> Call:
        params, running, _ = self.tensors
        half = copy.copy(self)
        half.source, half.version, half.has_gradient = x, version(x), x.requires_grad
        own = slice(2 * index, 2 * index + 2)
        half.tensors = Tensors(params[own], running[index : index + 1], [])
        half.candidate = self.candidate.half(index)
        half.biases = Biases(half.candidate, half.tensors.params)
        half.weights = half._versions()
        return half

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
        wide = accumulation_dtype(self.source.dtype)
        mean = torch.zeros(self.source.shape[1], dtype=wide, device=self.device)
        self.tensors = Tensors([], [(mean, mean + (1 - self.manner.eps))], [])

    def settle(self, training: bool) -> None:
        """Computes the output before its module's next call, where one waits for statistics."""
        reads = training and not self.manner.training and bool(self.tensors.running)
        if self.must_run or (reads and self.value is None):
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


Term = tuple[Weight, Call]
"""A weight, and what it weighs."""


class Groups(NamedTuple):
    """Holds the terms of a sum by how they are computed."""

    fused: dict[tuple[object, ...], list[Term]]
    """Those of one `mixed_edges` each, by what they have in common."""
    plain: list[Term]
    """Those that are worth no kernel, or have none."""
    done: list[Term]
    """Those that are computed already."""


def grouped(terms: Sequence[Term]) -> Groups:
    """Sorts terms by how they are computed; from now on each candidate is what it is by now."""
    fused: dict[tuple[object, ...], list[Term]] = {}
    plain: list[Term] = []
    done: list[Term] = []
    dense = any(call.candidate.is_dense for _, call in terms)
    for weight, call in each_once(terms):
        call.close(dense)
        if call.value is not None:
            done.append((weight, call))
        elif call.is_normed:
            # On a GPU dense convolutions are torch's, and depthwise ones beside them would run by
            # the reference.
            key = (call.candidate.is_dense, call.manner, call.ran, bool(call.tensors.running))
            fused.setdefault(key, []).append((weight, call))
        else:
            plain.append((weight, call))
    return Groups(fused, _join(plain, fused), done)


def compute(terms: Sequence[Term]) -> Tensor:
    """Computes sum_i w_i o_i(x_i), by few `mixed_edges`; all of the terms have the same modes."""
    with terms[0][1].modes.restored():
        groups = grouped(terms)
        parts = [_weighted(weight, cast(Tensor, call.value)) for weight, call in groups.done]
        for group in groups.fused.values():
            parts.append(compute_nodes([[(w, call.by_halves()) for w, call in group]]))
        parts += [_weighted(weight, _plain(call)) for weight, call in groups.plain]
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


def each_once(terms: Iterable[Term]) -> list[Term]:
    """Lists each call once, with the sum of its weights."""
    weights: dict[Call, Weight] = {}
    for weight, call in terms:
        if call in weights:
            weight, before = scalar(weight), scalar(weights[call])
            weight = (1.0 if weight is None else weight) + (1.0 if before is None else before)
        weights[call] = weight
    return [(weight, call) for call, weight in weights.items()]


def _plain(call: Call) -> Tensor:
    """Computes what needs no kernel: the identity, or zeros."""
    x, stride = call.input(), call.candidate.stride
    return x if call.is_skip else x[:, :, ::stride, ::stride] * 0


def _weighted(weight: Weight, value: Tensor) -> Tensor:
    factor = scalar(weight)
    return value if factor is None else factor * value


def compute_nodes(
    nodes: Sequence[Sequence[Term]], sums: Sequence[Sum] = (), hidden: int = 0
) -> Tensor:
    """Computes nodes, of terms of one manner, by one `mixed_edges`; moves statistics of new calls.

    Args:
        nodes: the terms of each; a later one may read those before it.
        sums: what stands for each of them where a term reads it, if there are several.
        hidden: how many of the nodes, the first ones, nobody needs but the others.

    Returns:
        [N, (nodes - hidden) C, H, W], one node after the other.
    """
    # Of each edge the state that it leaves, by its id, the node that it enters, and its terms.
    edges: dict[tuple[int, int, int], list[Term]] = {}
    for target, terms in enumerate(nodes):
        for weight, call in terms:
            key = (id(call.source), target, call.candidate.stride)
            edges.setdefault(key, []).append((weight, call))
    rows = list(edges.values())
    calls = [call for row in rows for _, call in row]
    inside = {id(node) for node in sums}
    x: dict[int, Tensor] = {}
    for call in calls:
        if id(call.source) in inside:
            call.check()
        else:
            x[id(call.source)] = call.input()
    places = {state: i for i, state in enumerate([*x, *map(id, sums)])}
    links = tuple(
        (places[source], target, stride, _edge_terms(row))
        for (source, target, stride), row in edges.items()
    )
    # What has no batch norm runs in any manner.
    first = next((call for call in calls if call.is_normed), calls[0])
    manner, again = first.manner, first.ran
    # A second sum over the same call takes the batch's statistics, which have moved already.
    moves = manner.training and not again
    running = None
    if moves or not manner.training:
        # Batch norms that keep no statistics are in a group of their own.
        running = [pair for call in calls for pair in call.statistics()] or None
    like = next(iter(x.values()))
    biases = [call.biases for call in calls if manner.training and call.biases.held]
    with _autocast(manner, like.device), _again_if_stopped(moves, nodes, sums):
        y = mixed_edges(
            list(x.values()),
            tied(stacked([[weight for weight, _ in row] for row in rows], like), biases),
            [p for call in calls for p in call.tensors.params],
            _table(links, len(x), len(nodes), len(nodes) - hidden),
            running=running,
            momentum=manner.momentum,
            training=manner.training,
            eps=manner.eps,
            memory=manner.memory,
            backend=manner.backend,
        )
    if moves:
        count([c for call in calls for c in call.tensors.counters])
        move([(call.biases, call.tensors.running) for call in calls], manner.momentum)
        for call in calls:
            call.ran = True
    # Under autocast all is computed as the convolutions are, and the sum is as wide as its terms.
    y = y.to(reduce(torch.promote_types, (call.dtype for call in calls)))
    return _with_bias_gradients(y, [term for row in rows for term in row], manner.eps)


@contextmanager
def _again_if_stopped(
    moves: bool, nodes: Sequence[Sequence[Term]], sums: Sequence[Sum]
) -> Iterator[None]:
    """Moves statistics where a checkpoint that runs again stops a call as soon as it has saved."""
    try:
        yield
    except Exception:
        if moves and torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
            with torch.no_grad():
                compute_nodes(nodes, sums)
        raise


def _edge_terms(row: Sequence[Term]) -> tuple[EdgeTerm | None, ...]:
    return tuple(call.candidate.term(k) for k, (_, call) in enumerate(row))


def _with_bias_gradients(y: Tensor, terms: Sequence[Term], eps: float) -> Tensor:
    """Adds to a node the terms of value 0 from which biases have their gradients."""
    missing = [
        call.biases.gradient(scalar(weight), call.tensors.running[-1], eps)
        for weight, call in terms
        if call.has_bias_gradients
    ]
    return y + reduce(torch.add, missing).to(y.dtype)[:, None, None] if missing else y


def _autocast(manner: Manner, device: torch.device) -> AbstractContextManager[Any]:
    """Returns what calls are computed in, so that autocast is as it was."""
    if manner.autocast == autocast_now(device):
        return nullcontext()
    return torch.autocast(device.type, manner.autocast, enabled=manner.autocast is not None)


@lru_cache(maxsize=256)
def _table(
    links: tuple[tuple[int, int, int, tuple[EdgeTerm | None, ...]], ...],
    inputs: int,
    nodes: int,
    outputs: int,
) -> EdgeTable:
    """Returns the table of edges, each a state, a node, a stride and terms (None: zeros)."""
    rows = []
    for source, target, stride, terms in links:
        kept = tuple(term for term in terms if term is not None)
        rows.append(Edge(source, target, stride, kept))
    candidates = max(len(terms) for *_, terms in links)
    return EdgeTable(inputs, nodes, candidates, tuple(rows), outputs)
