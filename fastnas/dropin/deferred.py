"""Defers the sums of a mixed op: no candidate is computed before somebody looks at its output.

A recognised candidate returns a `DeferredSum`. Times a scalar, or plus another one, it stays a sum;
a candidate of it waits as well, and so does a concatenation of sums with its channels in another
order. Anything else computes it, by one `mixed_edges` for all terms that have met by then. So no
name, container or signature of a mixed op matters, nor what a network does between candidates and
nodes.

What eager does when a candidate is called must not wait. The training mode, the grad mode and the
tensors of the module are those at the time of the call (`pending.Call`); running statistics move
once for each call, in the order of the calls, also where nobody looks at the output. An input that
was changed before the sum was computed is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas.dropin.changing import Changing, Self
from fastnas.dropin.stacked import Stacked
from fastnas.dropin.sums import Sum
from fastnas.dropin.waiting import Channels, Moved, format_of, layout_of, real
from fastnas.dropin.weights import Scalar


def _as_scalar(value: Any, dtype: torch.dtype) -> Scalar | None:
    """Returns what scales a term like a number: a number, or a tensor of one value; or None."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dim() > 4 or value.is_complex():
        return None
    # A tensor without dimensions changes no dtype in a product; another one may.
    if value.dim() and torch.promote_types(value.dtype, dtype) != dtype:
        return None
    return value.reshape(()) if value.dim() else value


class DeferredSum(Changing):
    """Stands for a tensor and does what that would, also as an argument of torch's functions.

    What can wait does: products with scalars, sums, concatenations and parts along the channels.
    """

    # ---- what keeps it a sum

    def _new(self, blocks: Sequence[Sum]) -> DeferredSum:
        self._mark_used(True)
        return DeferredSum(blocks, self._format, self._moves, self._like)

    def _settle(self) -> None:
        """Makes it ready to become part of another sum.

        What candidates read is needed as a value anyway: its terms are not computed twice.
        """
        self._follow()
        if any(block.is_node for block in self._blocks):
            self.computed()

    def _times(self, scale: Scalar) -> DeferredSum:
        self._settle()
        return self._new([block.times(scale) for block in self._blocks])

    def _plus(self, other: Any) -> DeferredSum | None:
        self._settle()
        if isinstance(other, int | float) and other == 0:
            return self._new([block.plus(None) for block in self._blocks])
        if not isinstance(other, Tensor) or other.shape != self._size:
            return None
        if other.device != self.device or not other.dtype.is_floating_point:
            return None
        if not isinstance(other, DeferredSum):
            if self._is_joined() or format_of(other) != self._format:
                return None
            return self._new([self._blocks[0].plus(Sum.of(other))])
        other._settle()
        sizes = [block.size for block in other._blocks]
        if not other._stays() or other._moves != self._moves or other._format != self._format:
            return None
        if sizes != [block.size for block in self._blocks]:
            return None
        other._mark_used(True)
        return self._new([a.plus(b) for a, b in zip(self._blocks, other._blocks)])

    def __mul__(self, other: Any) -> Any:
        scale = _as_scalar(other, self._dtype) if self._stays() else None
        return self.tensor() * real(other) if scale is None else self._times(scale)

    def __truediv__(self, other: Any) -> Any:
        scale = _as_scalar(other, self._dtype) if self._stays() else None
        # Python refuses 1 / 0, where torch gives inf.
        if scale is None or (isinstance(scale, float) and scale == 0):
            return self.tensor() / real(other)
        return self._times(1 / scale)

    def __neg__(self) -> Any:
        return self * -1.0

    def __add__(self, other: Any) -> Any:
        found = self._plus(other) if self._stays() else None
        return self.tensor() + real(other) if found is None else found

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.tensor()

    # The first operand has its say in how a result lies in memory.
    def __rmul__(self, other: Any) -> Any:
        scale = _as_scalar(other, self._dtype) if self._stays() else None
        return real(other) * self.tensor() if scale is None else self._times(scale)

    def __radd__(self, other: Any) -> Any:
        found = self._plus(other) if self._stays() else None
        return real(other) + self.tensor() if found is None else found

    # ---- parts of it, and what it is part of

    def _item(self, index: Any) -> DeferredSum | None:
        """Returns self[:, a:b], as what candidates may read; None for any other index."""
        if not isinstance(index, tuple) or len(self._size) != 4 or not 2 <= len(index) <= 4:
            return None
        every, some, *rest = index
        if not all(isinstance(part, slice) for part in index) or some.step not in (None, 1):
            return None
        if any(part != slice(None) for part in (every, *rest)) or not self._stays():
            return None
        if not all(b is None or type(b) is int for b in (some.start, some.stop)):
            return None
        channels = Channels(*some.indices(self._size[1])[:2])
        if channels.stop <= channels.start:
            return None
        return self.part(channels)

    def part(self, channels: Channels) -> DeferredSum:
        """Returns some of its channels, as what candidates may read."""
        layout = self._format if self._like is None else format_of(channels.of(self._like))
        return type(self)([self._sliced(channels)], layout, base=(self, channels))

    @staticmethod
    def concatenated(tensors: Any) -> DeferredSum | None:
        """Returns tensors one after the other along the channels, or None where that cannot wait.

        One of them is a sum that waits.
        """
        if not isinstance(tensors, tuple | list):
            return None
        if not all(isinstance(y, Tensor) and y.dim() == 4 for y in tensors):
            return None
        sums = [y for y in tensors if isinstance(y, DeferredSum)]
        first = sums[0]
        alike = {(y.shape[0], y.shape[2:], y.dtype, y.device, layout_of(y)) for y in tensors}
        if len(alike) > 1 or not all(y._stays() and not y._moves for y in sums):
            return None
        blocks: list[Sum] = []
        for y in tensors:
            if isinstance(y, DeferredSum):
                y._follow()
                y._mark_used(True)
            blocks += y._blocks if isinstance(y, DeferredSum) else [Sum.of(y)]
        if len(blocks) == 1:  # it is a copy
            blocks = [blocks[0].plus(None)]
        return DeferredSum(blocks, first._format)

    def _moved(self, name: str, args: tuple[Any, ...], kwargs: Any) -> DeferredSum | None:
        """Returns a concatenation in another shape or order, or None where that cannot wait."""
        if not self._is_joined() or not self._stays():
            return None
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            return None
        move = Moved(name, args, tuple(kwargs.items()))
        like = self._like
        if like is None:
            like = torch.empty(self._size, dtype=self._dtype, device="meta")
            like = like.contiguous(memory_format=self._format)
        like = move(like)
        if like.dtype != self._dtype:
            return None
        self._mark_used(True)
        return DeferredSum(self._blocks, self._format, (*self._moves, move), like)

    def _operators(self) -> Mapping[str, Callable[[Any, Any], Any]]:
        return _OPERATORS

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        first = args[0] if args else None
        operator = _OPERATORS.get(name)
        if operator is not None and len(args) == 2 and not kwargs:
            return operator(*args) if isinstance(first, cls) else _REFLECTED[operator](*args[::-1])
        if isinstance(first, cls):
            if name == "__setitem__" or (name.endswith("_") and not name.startswith("_")):
                return first._change(name, *args[1:], **kwargs)
            if name in _OF_GRADIENTS:
                first._watch_gradient(name)
            if func == _DATA:
                return _Data.of_sum(first)
            waits = None
            if name == "__getitem__":
                waits = first._item(args[1])
            elif name in _MOVES:
                waits = first._moved(name, args[1:], kwargs)
            if waits is not None:
                return waits
            if kwargs.get("inplace"):
                first._to_change()
            if func == _SET_DATA:
                return first._set_data(real(args[1]))
            if func == _REQUIRES_GRAD:
                return first._become_tensor().requires_grad
        if name in ("cat", "concat", "concatenate") and (args[1:] or kwargs) in _CHANNELS:
            joined = cls.concatenated(first)
            if joined is not None:
                return joined
        if name == "stack" and not args[2:]:
            stack = Stacked.of(first, *args[1:], **kwargs) if kwargs.keys() <= {"dim"} else None
            if stack is not None:
                return stack
        y = func(*real(args), **real(kwargs))
        if isinstance(first, cls):
            first.note_alias(y)
        return y

    def _of_python(name: str) -> Any:  # type: ignore[misc]
        def method(self: DeferredSum, other: Any) -> DeferredSum:
            return self._change(name, other)

        return method

    __imul__, __iadd__ = _of_python("mul_"), _of_python("add_")
    __isub__, __itruediv__ = _of_python("sub_"), _of_python("div_")


class _Data(DeferredSum):
    """Stands for `.data` of a sum that waits: its shape is often all that is asked for."""

    _of: DeferredSum

    @classmethod
    def of_sum(cls, of: DeferredSum) -> _Data:
        made = cls(of._blocks, of._format, of._moves, of._like)
        made._of = of
        return made

    def tensor(self) -> Tensor:
        self._of._watch_gradient("data")
        return self._of.tensor().data

    def computed(self) -> Tensor:
        return self.tensor()

    def _stays(self) -> bool:
        return False

    def single(self) -> None:
        return None

    def _change(self: Self, name: str, *args: Any, **kwargs: Any) -> Self:
        getattr(self.tensor(), name)(*real(args), **real(kwargs))
        return self


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("mul", "multiply"), DeferredSum.__mul__),
    **dict.fromkeys(("add",), DeferredSum.__add__),
    **dict.fromkeys(("sub", "subtract"), DeferredSum.__sub__),
    **dict.fromkeys(("div", "divide", "true_divide"), DeferredSum.__truediv__),
}
"""Name of a function of torch to what it does with a deferred sum as its first argument."""

_REFLECTED: dict[Callable[[Any, Any], Any], Callable[[Any, Any], Any]] = {
    DeferredSum.__mul__: DeferredSum.__rmul__,
    DeferredSum.__add__: DeferredSum.__radd__,
    DeferredSum.__sub__: DeferredSum.__rsub__,
    DeferredSum.__truediv__: DeferredSum.__rtruediv__,
}
"""The same for one that is the second argument."""

_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_MOVES = frozenset(
    ("view", "reshape", "transpose", "swapaxes", "permute", "contiguous", "flatten", "unflatten")
)
"""Names of functions that a concatenation waits through."""
_CHANNELS = [(1,), (-3,), {"dim": 1}, {"dim": -3}, {"axis": 1}]
"""The arguments after the tensors of `cat` along the channels."""
_OF_GRADIENTS = frozenset(("retain_grad", "register_hook", "requires_grad_"))
