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

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastnas.dropin.pending import Call, Scalar, Term, compute, is_function_forward


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
    """

    _terms: tuple[Term, ...]
    _dense: tuple[Tensor, ...]
    _size: torch.Size
    _format: torch.memory_format
    _dtype: torch.dtype
    _grad_mode: bool
    """Whether gradients were on when it was made; its parts are computed in this mode."""
    _seen: Tensor | None
    """The values as others see them."""

    @staticmethod
    def __new__(
        cls: type[DeferredSum],
        terms: Sequence[Term],
        dense: Sequence[Tensor],
        size: torch.Size,
        layout: torch.memory_format,
    ) -> DeferredSum:
        like = dense[0] if dense else terms[0][1].x
        dtypes = [*(call.dtype for _, call in terms), *(y.dtype for y in dense)]
        dtype = reduce(torch.promote_types, dtypes)
        # A tensor without values: whatever is done with it comes to `__torch_function__` first.
        self = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=like.device)
        self._terms, self._dense = tuple(terms), tuple(dense)
        self._size, self._format, self._seen, self._dtype = size, layout, None, dtype
        self._grad_mode = torch.is_grad_enabled()
        return self

    # ---- its values

    def computed(self) -> Tensor:
        """Returns the values, in the layout in which the fused ops left them."""
        if self._terms or len(self._dense) != 1:
            with torch.set_grad_enabled(self._grad_mode):
                parts = [*([compute(self._terms)] if self._terms else []), *self._dense]
                self._terms, self._dense = (), (reduce(torch.add, parts),)
        return self._dense[0]

    def tensor(self) -> Tensor:
        """Returns the values, in the layout of the module's own forward.

        Raises:
            RuntimeError: it was given to an `autograd.Function`, which finds no gradient to it.
        """
        if self._grad_mode and is_function_forward():
            raise RuntimeError(
                "fastnas: the output of a candidate was given to an autograd.Function, which finds"
                f" no gradient to it; {_CLONE}"
            )
        if self._seen is None:
            is_input = self._identity() is not None
            y = self.computed()
            with torch.set_grad_enabled(self._grad_mode):
                self._seen = y if is_input else y.contiguous(memory_format=self._format)
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

    def _new(self, terms: Sequence[Term], dense: Sequence[Tensor]) -> DeferredSum:
        return DeferredSum(terms, dense, self._size, self._format)

    def _stays(self) -> bool:
        """Tells whether an operation may wait: it then happens in the grad mode of the calls."""
        return self._grad_mode == torch.is_grad_enabled()

    def _times(self, scale: Scalar) -> DeferredSum:
        terms = [(scale if w is None else w * scale, call) for w, call in self._terms]
        return self._new(terms, [scale * y for y in self._dense])

    def _plus(self, other: Any) -> DeferredSum | None:
        if isinstance(other, int | float) and other == 0:
            return self._new(self._terms, self._dense)
        if not isinstance(other, Tensor) or other.shape != self._size:
            return None
        if other.device != self.device or not other.dtype.is_floating_point:
            return None
        if not isinstance(other, DeferredSum):
            return self._new(self._terms, (*self._dense, other))
        if not other._stays():
            return None
        return self._new(self._terms + other._terms, self._dense + other._dense)

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
            self._terms, self._dense, self._seen = (), (identity,), identity
            return self
        operator = _OPERATORS.get(name.removesuffix("_"))
        if operator is not None and len(args) == 1 and not kwargs:
            value = operator(self, *args)
        else:
            # Backward of `mixed_edges` reads its output, so that a copy is changed.
            value = self.tensor().clone()
            getattr(value, name)(*real(args), **real(kwargs))
        deferred = isinstance(value, DeferredSum)
        self._terms = value._terms if deferred else ()
        self._dense = value._dense if deferred else (value,)
        self._size, self._dtype, self._seen = value.shape, value.dtype, None
        self._grad_mode = torch.is_grad_enabled()
        return self

    def _become_tensor(self) -> Tensor:
        """Turns this very object into the tensor of its values, and returns it.

        Who asks whether it requires a gradient may be about to give it to an `autograd.Function`
        (as torch does with the inputs of a module that has backward hooks), which takes nothing
        but tensors.
        """
        value = self.tensor()
        with torch.set_grad_enabled(self._grad_mode), torch._C.DisableTorchFunctionSubclass():
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
            if name in _OF_GRADIENTS:
                # Whoever uses the sum from here on has to use the tensor that is watched.
                first._dense = (first.tensor(),)
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
_OF_GRADIENTS = frozenset(("retain_grad", "register_hook", "requires_grad_"))
