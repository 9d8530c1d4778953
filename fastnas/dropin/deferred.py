"""Defers the sums of a mixed op: no candidate is computed before somebody looks at its output.

A recognised candidate returns a `DeferredSum`. Times a scalar, or plus another one, it stays a sum;
anything else computes it, by one `mixed_edges` for all terms that have met by then. So no name,
container or signature of a mixed op matters, nor what a network does between candidates and nodes.

What eager does when a candidate is called must not wait. The training mode, the grad mode and the
tensors of the module are those at the time of the call (`pending.Call`); running statistics move
once for each call, in the order of the calls, also where nobody looks at the output. An input that
was changed before the sum was computed is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastnas.dropin.pending import (
    Call,
    Modes,
    Scalar,
    Term,
    changed,
    compute,
    is_function_forward,
    version,
)


def _as_scalar(value: Any, like: Tensor) -> Scalar | None:
    """Returns what scales a term like a number: a number, or a tensor of one value; or None."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dim() > 4 or value.is_complex():
        return None
    # A tensor without dimensions changes no dtype in a product; another one may.
    if value.dim() and torch.promote_types(value.dtype, like.dtype) != like.dtype:
        return None
    return value.reshape(()) if value.dim() else value


_CLONE = "give it `output.clone()`"
_Watched = tuple[tuple[Tensor, int], ...]


def _watch(y: Tensor) -> _Watched:
    return ((y, version(y)),)


class DeferredSum(Tensor):
    """Stands for sum_i w_i o_i(x_i) + sum_j y_j, computed when something needs its values.

    It behaves as the tensor would, also as an argument of torch's functions. The values are
    computed once. They lie in memory as those of the module's own forward do: random numbers that
    are drawn like them fall on the same elements.

    Args:
        terms: candidates with their weights.
        dense: what is added that is computed already.
        shape: of the sum.
        layout: the memory format in which others see it.
        modes: those under which it is made, where they are known.
    """

    _terms: tuple[Term, ...]
    _dense: tuple[Tensor, ...]
    _size: torch.Size
    _format: torch.memory_format
    _dtype: torch.dtype
    _modes: Modes
    """Under what it was made; its parts are computed under the same."""
    _seen: Tensor | None
    """The values as others see them."""
    _seen_version: int
    _watched: _Watched
    """Tensors that wait in it, with the version of each."""
    _in_sum: bool
    """Whether it has become part of another sum, which does not pass through its tensor."""

    @staticmethod
    def __new__(
        cls: type[DeferredSum],
        terms: Sequence[Term],
        dense: Sequence[Tensor],
        size: torch.Size,
        layout: torch.memory_format,
        modes: Modes | None = None,
    ) -> DeferredSum:
        like = dense[0] if dense else terms[0][1].x
        dtypes = [*(call.dtype for _, call in terms), *(y.dtype for y in dense)]
        dtype = reduce(torch.promote_types, dtypes)
        # A tensor without values: whatever is done with it comes to `__torch_function__` first.
        self = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=like.device)
        self._terms, self._dense = tuple(terms), tuple(dense)
        self._size, self._format, self._seen, self._dtype = size, layout, None, dtype
        self._modes, self._watched, self._in_sum = modes or Modes.now(), (), False
        return self

    # ---- its values

    def computed(self) -> Tensor:
        """Returns the values, in the layout in which the fused ops left them."""
        self._follow()
        if self._terms or len(self._dense) != 1:
            self._check()
            with self._modes.restored():
                parts = [*([compute(self._terms)] if self._terms else []), *self._dense]
                self._terms, self._dense = (), (reduce(torch.add, parts),)
            self._watched = ()
        return self._dense[0]

    def _check(self) -> None:
        for y, before in self._watched:
            if version(y) != before:
                raise RuntimeError(changed(f"a summand or factor, {list(y.shape)},"))

    def _follow(self) -> None:
        """Takes over what others have done, in place, to the values that they see."""
        if self._seen is not None and version(self._seen) != self._seen_version:
            self._dense, self._seen_version = (self._seen,), version(self._seen)

    def tensor(self) -> Tensor:
        """Returns the values, in the layout of the module's own forward.

        Raises:
            RuntimeError: it was given to an `autograd.Function`, which finds no gradient to it.
        """
        if self._modes.grad and is_function_forward():
            raise RuntimeError(
                "fastnas: the output of a candidate was given to an autograd.Function, which finds"
                f" no gradient to it; {_CLONE}"
            )
        if self._seen is None:
            is_input = self._identity() is not None
            y = self.computed()
            with self._modes.restored():
                self._seen = y if is_input else y.contiguous(memory_format=self._format)
            self._seen_version = version(self._seen)
        return self._seen

    def single(self) -> Call | None:
        """Returns the call whose very output this is, if it is not computed yet."""
        if self._dense or len(self._terms) != 1 or self._terms[0][0] is not None:
            return None
        return self._terms[0][1]

    def _identity(self) -> Tensor | None:
        """Returns the tensor that it is, as the output of an identity, or None."""
        call = self.single()
        return call.x if call is not None and call.is_skip else None

    @property
    def format(self) -> torch.memory_format:
        """Returns the memory format in which others see it."""
        return self._format

    def _like(self) -> Tensor:
        return self._dense[0] if self._dense else self._terms[0][1].x

    # ---- what keeps it a sum

    def _parts(self) -> _Watched:
        """Returns what is to be watched in a sum that it becomes part of."""
        self._follow()
        computed = not self._terms and len(self._dense) == 1
        return _watch(self._dense[0]) if computed else self._watched

    def _new(
        self,
        terms: Sequence[Term],
        dense: Sequence[Tensor],
        watched: _Watched,
    ) -> DeferredSum:
        made = DeferredSum(terms, dense, self._size, self._format, self._modes)
        made._watched, self._in_sum = watched, True
        return made

    def _stays(self) -> bool:
        """Tells whether an operation may wait: it then happens under what the calls did."""
        return self._modes == Modes.now()

    def _times(self, scale: Scalar) -> DeferredSum:
        self._check()
        self._follow()
        terms = [(scale if w is None else w * scale, call) for w, call in self._terms]
        # Products are new tensors; a factor of 1 becomes the scale itself.
        waits = any(w is None for w, _ in self._terms)
        watched = _watch(scale) if waits and isinstance(scale, Tensor) else ()
        return self._new(terms, [scale * y for y in self._dense], watched)

    def _plus(self, other: Any) -> DeferredSum | None:
        if isinstance(other, int | float) and other == 0:
            watched = self._parts()
            return self._new(self._terms, self._dense, watched)
        if not isinstance(other, Tensor) or other.shape != self._size:
            return None
        if other.device != self.device or not other.dtype.is_floating_point:
            return None
        if not isinstance(other, DeferredSum):
            watched = self._parts() + _watch(other)
            return self._new(self._terms, (*self._dense, other), watched)
        if not other._stays():
            return None
        watched = self._parts() + other._parts()
        other._in_sum = True
        return self._new(self._terms + other._terms, self._dense + other._dense, watched)

    def __mul__(self, other: Any) -> Any:
        scale = _as_scalar(other, self._like()) if self._stays() else None
        return self.tensor() * real(other) if scale is None else self._times(scale)

    def __truediv__(self, other: Any) -> Any:
        scale = _as_scalar(other, self._like()) if self._stays() else None
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

    __rmul__, __radd__ = __mul__, __add__

    # ---- what is known of it without its values

    shape = property(lambda self: self._size)
    ndim = property(lambda self: len(self._size))
    dtype = property(lambda self: self._dtype)
    device = property(lambda self: self._like().device)

    def size(self, dim: int | None = None) -> Any:
        return self._size if dim is None else self._size[dim]

    def dim(self) -> int:
        return len(self._size)

    # ---- what needs its values

    def _change(self, name: str, *args: Any, **kwargs: Any) -> DeferredSum:
        """Does what the method of this name does to a tensor in place."""
        identity = self._identity()
        if identity is not None:  # it is its input that changes
            getattr(identity, name)(*real(args), **real(kwargs))
            return self._holds(identity)
        operator = _OPERATORS.get(name.removesuffix("_"))
        if operator is not None and len(args) == 1 and not kwargs:
            value = operator(self, *args)
        else:
            value = self._copied()
            getattr(value, name)(*real(args), **real(kwargs))
        if not isinstance(value, DeferredSum):
            return self._holds(value)
        self._terms, self._dense, self._watched = value._terms, value._dense, value._watched
        self._size, self._dtype, self._seen = value.shape, value.dtype, None
        self._modes, self._in_sum = Modes.now(), False
        return self

    def _copied(self) -> Tensor:
        """Returns values to change: backward of `mixed_edges` reads those that it returned."""
        with self._modes.restored():
            return self.tensor().clone()

    def _holds(self, value: Tensor) -> DeferredSum:
        """Makes this very tensor its values, which others see."""
        self._terms, self._dense, self._watched = (), (value,), ()
        self._seen, self._seen_version = value, version(value)
        self._size, self._dtype = value.shape, value.dtype
        self._modes, self._in_sum = Modes.now(), False
        return self

    def _watch_gradient(self, name: str) -> None:
        """Lets whoever uses the sum from here on use the tensor that is looked at."""
        if self._in_sum and name in ("retain_grad", "register_hook"):
            raise RuntimeError(
                f"fastnas: {name} of an output that is part of a sum already, whose gradient does"
                " not pass through it; call it before the output is used"
            )
        self._dense = (self.tensor(),)

    def _become_tensor(self) -> Tensor:
        """Turns this very object into the tensor of its values, and returns it.

        Who asks whether it requires a gradient may be about to give it to an `autograd.Function`
        (as torch does with the inputs of a module that has backward hooks), which takes nothing
        but tensors.
        """
        value = self.tensor()
        if weakref.getweakrefcount(self):  # then torch does not swap it
            return value
        with self._modes.restored(), torch._C.DisableTorchFunctionSubclass():
            torch.utils.swap_tensors(self, value.view_as(value))
        return self

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
            if name in _OF_GRADIENTS or func == _DATA:
                first._watch_gradient(name)
            if kwargs.get("inplace") and first._identity() is None:
                first._holds(first._copied())
            if func == _REQUIRES_GRAD:
                return first._become_tensor().requires_grad
        return func(*real(args), **real(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Autograd has been passed by now, so that a result would have lost its gradient.
        raise RuntimeError(f"fastnas: {func} was called past the output of a candidate; {_CLONE}")

    def _of_python(name: str) -> Any:  # type: ignore[misc]
        def method(self: DeferredSum, other: Any) -> DeferredSum:
            return self._change(name, other)

        return method

    __imul__, __iadd__ = _of_python("mul_"), _of_python("add_")
    __isub__, __itruediv__ = _of_python("sub_"), _of_python("div_")


def real(value: Any) -> Any:
    """Returns the value with tensors in place of deferred sums, in containers as well."""
    return tree_map(lambda v: v.tensor() if isinstance(v, DeferredSum) else v, value)


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
_OF_GRADIENTS = frozenset(("retain_grad", "register_hook", "requires_grad_"))
