"""Holds sums that wait in a stack, as mixed ops make one to weigh all candidates at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from fastnas.dropin.waiting import Standing, Waiting, real

_WEIGHED = re.compile(r"(\w),\1(\w{4}|\.\.\.)->\2")
"""A vector and a stack for `einsum`, the letters of the stack in any alphabet."""


class Stacked(Standing):
    """Stands for K sums [N, C, H, W] in a stack [K, N, C, H, W], each of which waits.

    Times weights [K, 1, 1, 1, 1] it stays a stack; its sum over the first dimension, and an
    `einsum` with weights [K], is one sum that waits. Anything else computes all of it.
    """

    _sums: tuple[Waiting, ...]
    _seen: Tensor | None

    @staticmethod
    def __new__(cls: type[Stacked], sums: Sequence[Waiting]) -> Stacked:
        size = torch.Size((len(sums), *sums[0].shape))
        dtype = sums[0].dtype
        self = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=sums[0].device)
        self._size, self._dtype = size, dtype
        self._sums, self._seen = tuple(sums), None
        return self

    @classmethod
    def of(cls, tensors: Any, dim: Any = 0) -> Stacked | None:
        """Returns the stack of tensors, or None where that cannot wait."""
        if dim != 0 or not isinstance(tensors, tuple | list) or len(tensors) < 2:
            return None
        sums = [y for y in tensors if isinstance(y, Waiting) and y.can_be_summed()]
        alike = {(y.shape, y.dtype, y.device, y.format) for y in sums}
        return cls(sums) if len(sums) == len(tensors) and len(alike) == 1 else None

    def tensor(self) -> Tensor:
        """Returns the values, which are those of the stack from here on."""
        if self._seen is None:
            self._seen = torch.stack([y.tensor() for y in self._sums])
        return self._seen

    def _waits(self) -> bool:
        return self._seen is None and all(y.can_be_summed() for y in self._sums)

    def _times(self, weights: Any) -> Stacked | None:
        """Returns the stack times weights [K, 1, 1, 1, 1], or None for anything else."""
        K = len(self._sums)
        if not isinstance(weights, Tensor) or tuple(weights.shape) != (K, 1, 1, 1, 1):
            return None
        return self._weighed(weights.reshape(K))

    def _weighed(self, weights: Tensor) -> Stacked | None:
        if weights.dtype != self._sums[0].dtype:
            return None
        return Stacked([w * y for w, y in zip(weights, self._sums)])

    def _einsum(self, equation: Any, *operands: Any) -> Waiting | None:
        """Returns sum_k w_k y_k for a vector w and this stack, or None for anything else."""
        plain = isinstance(equation, str) and _WEIGHED.fullmatch(equation.replace(" ", ""))
        if not plain or len(operands) != 2 or operands[1] is not self:
            return None
        w = operands[0]
        weighed = None
        if isinstance(w, Tensor) and tuple(w.shape) == (len(self._sums),):
            weighed = self._weighed(w)
        return None if weighed is None else weighed.summed()

    def summed(self) -> Waiting:
        """Returns the sum over the first dimension."""
        return reduce(add, self._sums)

    # ---- what is known of it without its values

    device = property(lambda self: self._sums[0].device)

    def __len__(self) -> int:
        return len(self._sums)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._sums if self._waits() else self.tensor())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        first = args[0] if args else None
        y: Any = None
        if name in ("mul", "multiply", "__mul__", "__rmul__") and len(args) == 2 and not kwargs:
            stack, other = args if isinstance(first, cls) else args[::-1]
            y = stack._times(other) if stack._waits() else None
        elif name == "einsum" and isinstance(args[-1], cls) and args[-1]._waits():
            y = args[-1]._einsum(*args)
        elif name == "__getitem__" and isinstance(first, cls) and first._waits():
            y = first._sums[args[1]] if type(args[1]) is int else None
        elif name == "sum" and isinstance(first, cls) and first._waits():
            y = first.summed() if (args[1:], kwargs) in _FIRST else None
        return func(*real(args), **real(kwargs)) if y is None else y


_FIRST: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((0,), {}), ((), {"dim": 0}), ((), {"axis": 0}), (([0],), {}), (((0,),), {}), ((-5,), {}),
]  # fmt: skip
"""Arguments of `sum` over the first dimension."""
