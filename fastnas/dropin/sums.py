"""Holds sums of candidates that wait, and what keeps them sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from fastnas.dropin.modes import Modes, changed, version
from fastnas.dropin.pending import (
    Call,
    Term,
    compute,
    compute_nodes,
    each_once,
    grouped,
)
from fastnas.dropin.weights import Scalar, scaled

Watched = tuple[tuple[Tensor, int], ...]
"""Tensors that wait in a sum, with the version of each."""


def watch(y: Tensor) -> Watched:
    """Returns what tells later whether y was changed."""
    return ((y, version(y)),)


class Slot(NamedTuple):
    """Tells where a node lies in what one call has returned, [N, nodes C, H, W]."""

    whole: Tensor
    place: int
    nodes: int


class Sum:
    """Stands for s = sum_i w_i o_i(x_i) + sum_j y_j, [N, C, H, W], until its values are needed.

    An x_i may be such a sum itself. The nodes of a cell that read each other are then computed by
    one call, when the last of them is needed.

    Args:
        terms: candidates with their weights.
        dense: what is added that is computed already.
        size: of the sum.
        modes: those under which it is made; its parts are computed under the same.
        watched: tensors that must not change before.
        like: sums that it is made of, which tell the dtype; by default the parts do.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        dense: Sequence[Tensor],
        size: torch.Size,
        modes: Modes,
        watched: Watched = (),
        like: Sequence[Sum] = (),
    ) -> None:
        self.terms, self.dense = tuple(terms), tuple(dense)
        self.size, self.modes, self.watched = size, modes, watched
        # A node of 40 candidates is made by 40 additions: none looks at all terms again.
        parts: list[Sum | Call | Tensor] = [*(like or (call for _, call in terms)), *dense]
        self.device: torch.device = parts[0].device
        self.dtype: torch.dtype = parts[0].dtype
        for part in parts[1:]:
            if part.dtype != self.dtype:
                self.dtype = torch.promote_types(self.dtype, part.dtype)
        below = [one.depth - 1 for one in like] if like else [call.depth for _, call in terms]
        self.depth: int = 1 + max(below, default=0)
        """How many sums, this one included, wait behind each other."""
        self.is_new = False
        """Whether its value is another tensor than those that it is the sum of."""
        self.returned_by: object = None
        """Which call of a cell has returned it: what reads it from then on is computed apart."""
        self.is_node = False
        """Whether candidates that wait read it, so that it is needed as a value."""
        self.was_read = False
        """Whether candidates were computed from it, which do not pass through what others see."""
        self.readers: int | None = None
        """How many candidates read it, if nobody else can; None where anybody may."""
        self.made: dict[object, tuple[Tensor, int]] = {}
        """What functions made of it that several modules apply to it, with the version of each."""
        self.slot: Slot | None = None
        """Where its values came from, if several nodes were computed by one call."""
        self._version = 0

    @classmethod
    def of(cls, y: Tensor, modes: Modes | None = None) -> Sum:
        """Returns the sum whose value this tensor is."""
        return cls((), (y,), y.shape, modes or Modes.now(), watch(y))

    @property
    def is_computed(self) -> bool:
        return not self.terms and len(self.dense) == 1 and not self.is_new

    # ---- what is known of it without its values, as of a tensor

    @property
    def shape(self) -> torch.Size:
        return self.size

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    def dim(self) -> int:
        return len(self.size)

    def single(self) -> Call | None:
        """Returns the call whose very output this is, if it is not computed yet."""
        if self.is_new or self.dense or len(self.terms) != 1 or self.terms[0][0] is not None:
            return None
        return self.terms[0][1]

    def sources(self) -> list[tuple[int, Sum]]:
        """Lists the sums that wait and that its candidates read, with the stride of each."""
        found = [(call.candidate.stride, call.source) for _, call in self.terms]
        return [(n, s) for n, s in found if not isinstance(s, Tensor) and not s.is_computed]

    # ---- its values

    def computed(self) -> Tensor:
        """Returns the values, in the layout in which the fused ops left them."""
        if not self.is_computed:
            nodes = _nodes(self)
            for node in nodes:
                node.check()
            with self.modes.restored():
                hidden = _hidden(nodes)
                if len(nodes) > 1:
                    y = compute_nodes([each_once(node.terms) for node in nodes], nodes, hidden)
                    values = y.split(self.size[1], dim=1)
                else:
                    fused = [compute(self.terms)] if self.terms else []
                    y = reduce(torch.add, [*fused, *self.dense])
                    # A sum of one is that one.
                    copies = self.is_new and any(y is one for one in self.dense)
                    values = (y.clone() if copies else y,)
            for i, (node, value) in enumerate(zip(nodes[hidden:], values)):
                node.hold(value)
                if len(nodes) > 1:
                    node.slot = Slot(y, i, len(values))
                    node.was_read |= node is not self
        return self.dense[0]

    def read(self) -> tuple[Tensor, int]:
        """Returns the values for a candidate, and the version of them that it is to find."""
        y, self.was_read = self.computed(), True
        return y, self._version

    def hold(self, y: Tensor) -> None:
        """Makes this tensor its value."""
        self.terms, self.dense, self.watched = (), (y,), ()
        self.slot, self.is_new = None, False
        self._version = version(y)

    def check(self) -> None:
        """Raises RuntimeError where a tensor that waits in it has changed."""
        for y, before in self.watched:
            if version(y) != before:
                raise RuntimeError(changed(f"a summand or factor, {list(y.shape)},"))

    # ---- what keeps it a sum

    def _parts(self) -> Watched:
        """Returns what is to be watched in a sum that it becomes part of."""
        return watch(self.dense[0]) if self.is_computed else self.watched

    def times(self, scale: Scalar) -> Sum:
        """Returns scale s; the check of what waits comes first, since products are new tensors."""
        self.check()
        weights = scaled([w for w, _ in self.terms], scale)
        terms = [(w, call) for w, (_, call) in zip(weights, self.terms)]
        # A factor of 1 becomes the scale itself.
        waits = any(w is None for w, _ in self.terms)
        watched = watch(scale) if waits and isinstance(scale, Tensor) else ()
        dense = [scale * y for y in self.dense]
        return Sum(terms, dense, self.size, self.modes, watched, like=(self,))

    def plus(self, other: Sum | None) -> Sum:
        """Returns s + other; None stands for 0."""
        if other is None:
            once = [(1.0 if w is None else w, call) for w, call in self.terms]
            made = Sum(once, self.dense, self.size, self.modes, self._parts())
            made.is_new = True
            return made
        watched = self._parts() + other._parts()
        terms, dense = self.terms + other.terms, self.dense + other.dense
        return Sum(terms, dense, self.size, self.modes, watched, like=(self, other))


def joined(sums: Sequence[Sum]) -> Tensor:
    """Returns the values of sums one after the other along the channels."""
    # The last one may read the others, and is then computed with them.
    parts = [one.computed() for one in reversed(sums)][::-1]
    slots = [one.slot for one in sums]
    last = slots[-1]
    if last is not None and last.nodes == last.place + 1 and last.nodes >= len(sums):
        first = last.nodes - len(sums)
        places = [(id(last.whole), first + i) for i in range(len(sums))]
        if [(id(slot.whole), slot.place) for slot in slots if slot is not None] == places:
            # They lie there already; a slice of all of them is no copy.
            return last.whole if first == 0 else last.whole[:, first * sums[0].size[1] :]
    return torch.cat(parts, dim=1)


def _common(node: Sum) -> object:
    """Returns what all terms of a sum that one `mixed_edges` computes have in common, or None."""
    groups = grouped(node.terms)
    if node.dense or len(groups.fused) != 1 or groups.plain or groups.done:
        return None
    (key,) = groups.fused
    calls = [call for _, call in node.terms]
    first = next((call for call in calls if call.is_normed), calls[0])
    # What reads a node inside of a call gives it no gradient that a term beside the kernels sees.
    if any(call.has_bias_gradients for call in calls):
        return None
    # Between nodes all has the dtype in which the op computes, which autocast chooses.
    autocast = first.manner.autocast
    narrow = autocast is not None and node.dtype != autocast
    ran = any(call.ran for call in calls)
    return None if ran or narrow else (*key, node.size, node.modes)


def _nodes(last: Sum) -> list[Sum]:
    """Lists what one `mixed_edges` computes: a sum, and before it those that its candidates read.

    A sum that the call cannot take is computed first, which may compute some of the others, too.
    """
    while True:
        nodes, others = _reach(last)
        if not others:
            return nodes
        for other in others:
            other.computed()


def _hidden(nodes: Sequence[Sum]) -> int:
    """Counts the first nodes of a call that nobody but others of its nodes can read.

    They get no values. Where one of their calls is needed again (two sums were made of the last
    node), it runs again.
    """
    read = Counter(id(call.source) for node in nodes for call in {call for _, call in node.terms})
    inside = (node.readers == read[id(node)] for node in nodes[:-1])
    return sum(1 for _ in takewhile(bool, inside))


def _reach(last: Sum) -> tuple[list[Sum], list[Sum]]:
    """Returns the sums that are to be nodes of one call, the last one last, and those that cannot.

    The latter are computed before the terms of the last one are grouped: candidates that run in
    them would move their statistics a second time.
    """
    common = _common(last)
    if common is None:
        return [last], [source for _, source in last.sources()]
    nodes: list[Sum] = []
    others: list[Sum] = []
    taken = {id(call) for _, call in last.terms}
    _visit(last, common, last.returned_by, nodes, others, taken)
    return nodes, others


def _visit(
    node: Sum,
    common: object,
    cell: object,
    nodes: list[Sum],
    others: list[Sum],
    taken: set[int],
) -> None:
    """Adds a sum to the nodes, after those of its sources that can be nodes; the rest to others.

    Args:
        common: what terms of nodes have in common.
        cell: the call of a cell that has returned the last node, which may have returned others.
        taken: ids of the calls that have a place.
    """
    # A function of the module: one inside of `_reach` that calls itself would keep the sums, and
    # their tensors, until the garbage collector comes.
    for stride, source in node.sources():
        if any(source is known for known in (*nodes, *others)):
            continue
        # Each call moves statistics once, and so it has one place.
        own = {id(c) for _, c in source.terms}
        fits = stride == 1 and (source.returned_by is None or source.returned_by is cell)
        if fits and not own & taken and _common(source) == common:
            taken.update(own)
            _visit(source, common, cell, nodes, others, taken)
        else:
            others.append(source)
    nodes.append(node)
