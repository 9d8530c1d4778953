"""Makes an op out of one description: its call, its leaves, its fake kernel and its reference.

An op of fastnas is a forward, (call) -> (out, saved), and a backward, (grad, call, saved, needs) ->
gradients, that backends compute. All else is the same for every op and stands here, once: the
schemas and implementations for torch's dispatcher, fake kernels, flop formulas, the one
`autograd.Function`, the calls that need no graph, and derivatives beyond the first.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastnas.backends import KERNELS
from fastnas.backends.calls import Noise
from fastnas.ops.dispatch import (
    choose_backend,
    is_plain_call,
    needs_graph,
    own_output,
    reference_grads,
    wanted,
    wants_graph_of_backward,
)
from fastnas.ops.flops import count_as_eager
from fastnas.spaces import EdgeTable

Call = TypeVar("Call", bound=tuple[Any, ...])
Needs = list[bool]
"""Of each leaf, whether its gradient is wanted."""

# This says how a schema writes a field of a call: for forward, and for backward, which is given
# None in place of what it does not read.
_SCHEMA: dict[Any, tuple[str, str]] = {
    # Only leaves in lists can be missing one by one. A leaf that is a Tensor by itself is always
    # saved.
    Tensor: ("Tensor", "Tensor"),
    Tensor | None: ("Tensor?", "Tensor?"),
    list[Tensor]: ("Tensor[]", "Tensor?[]"),
    list[int]: ("int[]", "int[]"),
    list[bool]: ("bool[]", "bool[]"),
    EdgeTable: ("int[]", "int[]"),
    int: ("int", "int"),
    float: ("float", "float"),
    bool: ("bool", "bool"),
    str: ("str", "str"),
}


NONE, FIRST = (0, 0), (0, 1)
"""Places among the tensors that a kernel saves: first, and one past the last."""


def _all_wanted(call: Any, needs: Needs) -> None:
    """Says that backward reads every leaf."""


def _unchanged(call: Any, needs: Needs) -> Any:
    return call


def _contiguous(call: Any, grad: Tensor) -> torch.memory_format:
    return torch.contiguous_format


@dataclass(frozen=True, eq=False)
class Op(Generic[Call]):
    """Describes an op. Calling it computes its output, with a gradient for its leaves.

    Args:
        name: its stem; the dispatcher knows it as `fastnas::<name>_fwd` and `_bwd`.
        call: the NamedTuple of its arguments, the first of which it computes on.
        leaves: fields that have gradients, in the order of `needs`.
        fake: forward on shapes, which allocates what the kernels would.
        reference: the output in torch's own operations, as a function of the leaves.
        terms: how many tensors a call is on, which bounds the backends that can run it.
        format: the layout of gradients of the first field; those of others are contiguous.
        reads: flags for the leaves whose values backward reads where such gradients are needed, or
            None for all. Only those are saved.
        prepare: a call with settings filled in that follow from what is needed.
        shows: which of the saved tensors the caller is given: statistics, or what was sampled.
        saves_output: whether backward reads the output; it then comes first in `saved`.
        reads_output: whether backward of this very call reads the values of the output. Where it
            does not, they are not saved, and the gradient stands in for them, which is as large.
    """

    name: str
    call: type[Call]
    leaves: tuple[str, ...]
    fake: Callable[[Call], tuple[Tensor, list[Tensor]]]
    reference: Callable[[Call], Tensor]
    terms: Callable[[Call], int] = lambda call: 1
    format: Callable[[Call, Tensor], torch.memory_format] = _contiguous
    reads: Callable[[Call, Needs], Sequence[bool] | None] = _all_wanted
    prepare: Callable[[Call, Needs], Call] = _unchanged
    shows: tuple[int, int] = NONE
    saves_output: bool = False
    reads_output: Callable[[Call], bool] = lambda call: True
    kinds: dict[str, Any] = field(init=False)
    """Field of the call to its type."""
    places: tuple[int, ...] = field(init=False)
    """Places of the leaves among the fields."""
    singles: tuple[int, ...] = field(init=False)
    """Places of the fields that are a tensor and no leaf."""
    noise: int | None = field(init=False)
    """The place of the call's noise, if it has one."""

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(self.call)
        names = list(kinds)
        self._set("kinds", kinds)
        self._set("noise", names.index("noise") if "noise" in kinds else None)
        self._set("places", tuple(names.index(name) for name in self.leaves))
        self._set("singles", tuple(
            i for i, (name, kind) in enumerate(kinds.items())
            if kind in (Tensor, Tensor | None) and name not in self.leaves
        ))  # fmt: skip
        self._define()
        count_as_eager(self.name, self._forward_body, self._backward_body)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _define(self) -> None:
        """Tells torch's dispatcher of the op."""
        kinds: dict[str, Any] = {}
        for name, kind in self.kinds.items():
            kinds |= typing.get_type_hints(Noise) if kind is Noise else {name: kind}
        given = ", ".join(f"{_SCHEMA[kind][0]} {name}" for name, kind in kinds.items())
        again = ", ".join(f"{_SCHEMA[kind][1]} {name}" for name, kind in kinds.items())
        forward, backward = f"fastnas::{self.name}_fwd", f"fastnas::{self.name}_bwd"
        torch.library.define(forward, f"({given}, str? backend) -> (Tensor out, Tensor[] saved)")
        torch.library.define(
            backward,
            f"(Tensor grad, {again}, Tensor[] saved, bool[] needs, str? backend) -> Tensor[]",
        )
        # "default" stands below autograd for every device: gradients come from `_Apply` alone.
        torch.library.impl(forward, "default", self._forward_body)
        torch.library.impl(backward, "default", self._backward_body)
        torch.library.register_fake(forward, self._forward_fake)
        torch.library.register_fake(backward, self._backward_fake)

    def flat(self, call: Call) -> list[Any]:
        """Returns the values of a call as the schemas list them."""
        values: list[Any] = []
        for value in call:
            if isinstance(value, Noise):
                values += value
            else:
                values.append(value.code if isinstance(value, EdgeTable) else value)
        return values

    def unflat(self, values: Sequence[Any]) -> Call:
        """Returns the call of such values."""
        left = iter(values)
        fields: list[Any] = []
        for kind in self.kinds.values():
            if kind is Noise:
                fields.append(Noise(*islice(left, len(Noise._fields))))
            else:
                value = next(left)
                fields.append(EdgeTable.decode(value) if kind is EdgeTable else value)
        return self.call(*fields)

    def split(self, call: Call) -> tuple[list[Any], list[Tensor | None]]:
        """Returns the call without its tensors, and these: leaves first, lists of them spread out.

        Autograd has to see each tensor by itself, and keeps what backward reads.
        """
        rest, tensors = list(call), []
        for i in self.places:
            value = rest[i]
            if isinstance(value, list):
                tensors += value
                rest[i] = len(value)
            else:
                tensors.append(value)
                rest[i] = None
        for i in self.singles:
            tensors.append(rest[i])
            rest[i] = None
        if self.noise is not None:
            # level and rng are tensors: saved like the others, they are refused if someone
            # overwrites them before backward, which draws the same noise again.
            noisy, form, *drawn_by = rest[self.noise]
            tensors += drawn_by
            rest[self.noise] = noisy, form
        return rest, tensors

    def join(self, rest: Sequence[Any], tensors: Sequence[Tensor | None]) -> Call:
        """Puts together the call that `split` took apart."""
        values, at = list(rest), 0
        for i in self.places:
            count = rest[i]
            values[i] = tensors[at] if count is None else list(tensors[at : at + count])
            at += 1 if count is None else count
        for i in self.singles:
            values[i] = tensors[at]
            at += 1
        if self.noise is not None:
            values[self.noise] = Noise(*rest[self.noise], *tensors[at : at + 2])
        return self.call(*values)

    def count_leaves(self, tensors: Sequence[Tensor | None]) -> int:
        """Counts the leaves among the tensors of `split`."""
        return len(tensors) - len(self.singles) - (0 if self.noise is None else 2)

    def forward(self, call: Call, backend: str | None) -> tuple[Tensor, list[Tensor]]:
        """Computes the output and what to save, by torch's dispatcher where that is watched."""
        # The backend is None while torch.compile traces: the choice is made when the compiled code
        # runs.
        if backend is not None and is_plain_call():
            return KERNELS[self.name, backend].forward(call)
        out, saved = getattr(torch.ops.fastnas, f"{self.name}_fwd")(*self.flat(call), backend)
        return out, saved

    def backward(
        self, grad: Tensor, call: Call, saved: list[Tensor], needs: Needs, backend: str | None
    ) -> list[Tensor]:
        """Computes the gradients that are needed, by the same way as `forward`."""
        if backend is not None and is_plain_call():
            return KERNELS[self.name, backend].backward(grad, call, saved, needs)
        found: list[Tensor] = getattr(torch.ops.fastnas, f"{self.name}_bwd")(
            grad, *self.flat(call), saved, needs, backend
        )
        return found

    def __call__(self, call: Call, backend: str | None) -> tuple[Tensor, ...]:
        """Computes the output, and what else the op shows.

        Raises:
            BackendError: an explicit choice of backend cannot run it.
        """
        # dynamo cannot follow the choice, which reads caches, threads and the environment.
        compiling = torch.compiler.is_compiling()
        if not compiling:
            backend = self.choose(call, backend)
        rest, tensors = self.split(call)
        if needs_graph(tensors[: self.count_leaves(tensors)]):
            # The whole call spares putting it together again; dynamo sees no tensors inside of it.
            whole = None if compiling else call
            outputs: tuple[Tensor, ...] = _Apply.apply(self, backend, rest, whole, *tensors)
            return outputs
        out, saved = self.forward(call, backend)
        return out, *saved[slice(*self.shows)]

    def choose(self, call: Call, backend: str | None, like: Tensor | None = None) -> str:
        """Chooses the backend of a call, or of its backward, of which `like` is the gradient."""
        if like is None:
            like = call[0][0] if isinstance(call[0], list) else call[0]
        return choose_backend(self.name, like, backend, self.terms(call))

    def _forward_body(self, *given: Any) -> tuple[Tensor, list[Tensor]]:
        call = self.unflat(given[:-1])
        out, saved = KERNELS[self.name, self.choose(call, given[-1])].forward(call)
        # What leaves by the dispatcher gets a history where gradients are on; see `own_output`.
        return out, [own_output(t) for t in saved]

    def _backward_body(self, grad: Tensor, *given: Any) -> list[Tensor]:
        # The dispatcher gives the fields of the call flat, then saved, needs and the backend.
        *values, saved, needs, backend = given
        call = self.unflat(values)
        kernel = KERNELS[self.name, self.choose(call, backend, like=grad)]
        return kernel.backward(grad, call, saved, needs)

    def _forward_fake(self, *given: Any) -> tuple[Tensor, list[Tensor]]:
        return self.fake(self.unflat(given[:-1]))

    def _backward_fake(self, grad: Tensor, *given: Any) -> list[Tensor]:
        *values, _, needs, _ = given
        call = self.unflat(values)
        found, left = [], iter(needs)
        for i in self.places:
            leaves = call[i] if isinstance(call[i], list) else [call[i]]
            # The layout has to be that of the kernels, or code that was compiled for these strides
            # does not fit what they return.
            layout = self.format(call, grad) if i == 0 else torch.contiguous_format
            # Leaves that backward does not read are shaped and typed as the output.
            wanted = [grad if t is None else t for t in leaves if next(left)]
            found += [torch.empty_like(t, memory_format=layout) for t in wanted]
        return found


_BEFORE = 4
"""Inputs of `_Apply` that stand before the tensors."""


class _Apply(torch.autograd.Function):
    """Shows every op to autograd. Saves what backward reads, and what the kernels want saved."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Op[Any],
        backend: str | None,
        rest: list[Any],
        whole: Any,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        call, leaves = whole or op.join(rest, tensors), op.count_leaves(tensors)
        # The first inputs are op, backend, rest and whole; the leaves come first of the tensors.
        needs = list(ctx.needs_input_grad[_BEFORE : _BEFORE + leaves])
        out, saved = op.forward(op.prepare(call, needs), backend)
        reads = op.reads(call, needs)
        kept = list(tensors)
        # What backward does not read is not kept alive: of a sum whose weights need no gradient all
        # K terms can be freed.
        if reads is not None:
            kept[:leaves] = [t if is_read else None for t, is_read in zip(kept, reads)]
        ctx.op, ctx.backend, ctx.rest, ctx.leaves, ctx.count = op, backend, rest, leaves, len(kept)
        # Tensors go nowhere but here. As attributes of ctx they would make a cycle through the
        # output that only the garbage collector ends, and changes in place would go unnoticed.
        ctx.keeps_output = op.saves_output and op.reads_output(call)
        ctx.save_for_backward(*kept, *([out] if ctx.keeps_output else []), *saved)
        shown = saved[slice(*op.shows)]
        ctx.mark_non_differentiable(*shown)
        ctx.set_materialize_grads(False)  # no zeros for what is only shown
        return out, *shown

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (_BEFORE + ctx.count)
        op, leaves, saved = ctx.op, ctx.leaves, list(ctx.saved_tensors)
        tensors, saved = saved[: ctx.count], saved[ctx.count :]
        if op.saves_output and not ctx.keeps_output:
            saved.insert(0, grad)
        needs = list(ctx.needs_input_grad[_BEFORE : _BEFORE + leaves])
        found: list[Tensor | None]
        if wants_graph_of_backward(grad):
            # The leaves alone are differentiated. tau, the level and the stream of the noise are
            # constants.
            others = tensors[leaves:]
            found = reference_grads(
                lambda own: op.reference(op.join(ctx.rest, [*own, *others])),
                tensors[:leaves],
                needs,
                grad,
            )
        else:
            call = op.join(ctx.rest, tensors)
            needs = wanted(needs, tensors[:leaves])
            grads = iter(op.backward(grad, call, saved, needs, ctx.backend))
            found = [next(grads) if need else None for need in needs]
        return *[None] * _BEFORE, *found, *[None] * (ctx.count - leaves)
