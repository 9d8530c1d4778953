"""Keeps what a forward makes of its mixing weights, to make it again of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnas.dropin.waiting import Standing


class NoPlan(Exception):
    """Says why what a forward did cannot be done without it."""


class Argument(NamedTuple):
    """Names an argument of the forward that holds weights."""

    place: int


class Own(NamedTuple):
    """Names a tensor that a module holds: its parameters or buffers, and the name among them."""

    tensors: dict[str, Any]
    name: str


class View(NamedTuple):
    """Names part of a vector of weights, as `as_strided` takes it, or all of it."""

    vector: int
    is_whole: bool
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Step(NamedTuple):
    """Makes a vector of others: a function of torch, and its arguments, with views of vectors."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Vector = Argument | Own | Step


class Entry(NamedTuple):
    """Names an element of a vector of weights, counted row by row."""

    vector: int
    place: int


class Weights(Tensor):
    """Holds mixing weights without values, of which is only known which are 0."""

    tape: Tape

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if any(issubclass(kind, Standing) for kind in types):  # they scale a sum, which knows how
            return NotImplemented
        if name == "__iter__":  # each part is of the tape again
            return iter(args[0].unbind(0))
        if name == "__get__":
            name = func.__self__.__name__
        tape = next(t.tape for t in _flat((args, kwargs)) if isinstance(t, Weights))
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("ne", "eq", "__ne__", "__eq__") and len(args) == 2 and not kwargs:
                zeros = tape.zeros_of(*args)
                if zeros is not None:
                    return zeros if "eq" in name else ~zeros
            if name in _ASKED:
                return func(*args, **kwargs)
            if name.strip("_") in _FUNCTIONS and (name[0] == "_" or name[-1] != "_"):
                return tape.kept(func, args, kwargs)
        # It may change what the weights are, or read their values.
        raise NoPlan(f"{name} of weights")


class Tape:
    """Keeps vectors of weights: those that a forward has, and those that it makes of them."""

    def __init__(self) -> None:
        self.vectors: list[Vector] = []
        self.looked_at_zeros = False
        # By their storages, as views share them: the number of each, and itself without values.
        self._known: dict[int, tuple[int, Tensor]] = {}
        self._zeros: dict[int, Tensor] = {}

    def add(self, vector: Vector, like: Tensor) -> Weights:
        """Returns a vector without values in place of one that there is."""
        w = torch.empty(like.shape, dtype=like.dtype, device="meta").requires_grad_()
        found = self._put(vector, w)
        if isinstance(vector, Argument):
            self._zeros[_key(w)] = (like.detach() == 0).contiguous()
        return found

    def _put(self, vector: Vector, y: Tensor) -> Weights:
        # Its storage is kept, so that no other tensor gets the same key.
        self._known[_key(y)] = len(self.vectors), y
        self.vectors.append(vector)
        found = y.as_subclass(Weights)
        found.tape = self
        return found

    def zeros_of(self, w: Any, other: Any) -> Tensor | None:
        """Returns which of some weights are 0, if that is what they are compared with."""
        if not isinstance(w, Weights) or isinstance(other, Tensor) or other != 0:
            return None
        zeros = self._zeros.get(_key(w))
        if zeros is None:
            return None
        self.looked_at_zeros = True
        return zeros.as_strided(w.size(), w.stride(), w.storage_offset())

    def kept(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function of weights; keeps it as a step if it makes a new tensor."""
        y = func(*args, **kwargs)
        parts = y if isinstance(y, tuple | list) else [y]
        if any(_key(part) in self._known for part in parts) or not isinstance(y, Tensor):
            return _marked(y, self)  # views of what is known
        try:
            step = Step(
                func, tuple(map(self._named, args)), {k: self._named(v) for k, v in kwargs.items()}
            )
        except NoPlan:
            return y  # as a weight it is refused
        if not y.is_contiguous():
            return y
        return self._put(step, y)

    def _named(self, value: Any) -> Any:
        """Returns an argument of a step, with views in place of weights.

        Raises:
            NoPlan: it is another tensor.
        """
        if isinstance(value, tuple | list):
            return type(value)(map(self._named, value))
        return self.view(value) if isinstance(value, Tensor) else value

    def view(self, w: Tensor) -> View:
        """Returns which part of which vector this is.

        Raises:
            NoPlan: it is something else, or has no gradient to the vector any more.
        """
        number, whole = self._known.get(_key(w), (0, None))
        # What was cut off, changed in place or read as another dtype is not the vector's.
        if whole is None or not w.requires_grad or w.dtype != whole.dtype or w._version:
            raise NoPlan("a weight is no element of a known tensor")
        size, stride, offset = w.size(), w.stride(), int(w.storage_offset())
        # A square that is transposed has the size of the whole, too.
        is_whole = size == whole.size() and stride == whole.stride() and not offset
        return View(number, is_whole, tuple(size), stride, offset)

    def entry(self, w: Tensor) -> Entry:
        """Returns which element of which vector this is; raises like `view`."""
        with torch._C.DisableTorchFunctionSubclass():
            view = self.view(w)
            return Entry(view.vector, view.offset)

    def check(self) -> None:
        """Raises `NoPlan` where a vector was changed in place."""
        if any(w._version for _, w in self._known.values()):
            raise NoPlan("it changes weights in place")


def played(vectors: Sequence[Vector], values: Sequence[Any]) -> list[Tensor]:
    """Returns the vectors of a call with these arguments."""
    found: list[Tensor] = []
    for vector in vectors:
        if isinstance(vector, Argument):
            found.append(values[vector.place])
        elif isinstance(vector, Own):
            found.append(vector.tensors[vector.name])
        else:
            args, kwargs = _viewed(vector.args, found), _viewed(vector.kwargs, found)
            found.append(vector.function(*args, **kwargs))
    return found


def _viewed(given: Any, vectors: Sequence[Tensor]) -> Any:
    """Returns arguments of a step, with tensors in place of views."""
    if isinstance(given, View):
        w = vectors[given.vector]
        if given.is_whole:
            return w
        return w.contiguous().as_strided(given.size, given.stride, given.offset)
    if isinstance(given, dict):
        return {name: _viewed(value, vectors) for name, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)([_viewed(value, vectors) for value in given])
    return given


def _key(w: Tensor) -> int:
    return w.untyped_storage()._cdata if isinstance(w, Tensor) else 0


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [part for item in value for part in _flat(item)]
    return [value]


def _marked(y: Any, tape: Tape) -> Any:
    """Returns tensors as weights of a tape."""
    if isinstance(y, tuple | list):
        return type(y)(_marked(part, tape) for part in y)
    if not isinstance(y, Tensor):
        return y
    y = y.as_subclass(Weights)
    y.tape = tape
    return y


_ASKED = frozenset(
    ("shape", "ndim", "dtype", "size", "dim", "numel", "__len__", "ndimension", "is_complex",
     "is_floating_point", "is_inference", "_version", "device")
)  # fmt: skip
"""Names of what is known of weights without values; the last ones sums ask for (`purity`)."""
_FUNCTIONS = frozenset(
    name
    for names in (
        "softmax log_softmax sigmoid tanh exp relu mul rmul multiply div divide truediv rtruediv",
        "rdiv true_divide add radd sub subtract rsub neg pow sum mean prod sqrt square",
        "getitem select narrow unbind split chunk view reshape flatten squeeze unsqueeze",
        "transpose permute t expand stack cat detach float double to contiguous clone index_select",
    )
    for name in names.split()
)
"""Names of functions that make the same of the same weights, and change nothing."""
