"""Holds what needs the values of a sum that waits: changes in place, aliases and gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from fastnas.dropin.modes import version
from fastnas.dropin.sums import Sum
from fastnas.dropin.waiting import Waiting, real

Self = TypeVar("Self", bound="Changing")  # typing has it from Python 3.11 on


def _refuse_watching(name: str, *_: Any) -> NoReturn:
    raise RuntimeError(
        f"fastnas: {name} of an output that is part of a sum already, whose gradient does"
        " not pass through it; call it before the output is used"
    )


class Changing(Waiting):
    """Stands for a tensor that is changed, or whose gradient is looked at."""

    def _operators(self) -> Mapping[str, Callable[[Any, Any], Any]]:
        """Returns what can wait, by the names of torch's functions."""
        raise NotImplementedError

    def _change(self: Self, name: str, *args: Any, **kwargs: Any) -> Self:
        """Does what the method of this name does to a tensor in place."""
        operator = self._operators().get(name.removesuffix("_"))
        alone = self._part_of is None and not self._is_shared and self._stays()
        if alone and operator is not None and len(args) == 1 and not kwargs:
            value = operator(self, *args)
            # Anything else does not fit in, and is torch's to refuse or to round.
            if value.shape == self._size and value.dtype == self._dtype:
                return self._becomes(value)
        y = self._to_change()
        getattr(y, name)(*real(args), **real(kwargs))
        if self._part_of is None:
            self._size, self._dtype = y.shape, y.dtype
        return self

    def _becomes(self: Self, value: Any) -> Self:
        if not isinstance(value, Changing):
            return self._holds(value)
        self._blocks, self._moves, self._like = value._blocks, value._moves, value._like
        self._seen, self._in_sum = None, False
        return self

    def _to_change(self) -> Tensor:
        """Returns the tensor to change in place: a copy, unless somebody would miss the change.

        What waits, or backward of `mixed_edges`, may read the values that there are.
        """
        if self._part_of is not None:  # it is the base that changes
            self._whole()._to_change()
        elif not self._is_shared:
            with self._modes.restored():
                self._holds(self.tensor().clone())
        return self.tensor()

    def _holds(self: Self, value: Tensor) -> Self:
        """Makes this very tensor its values, which others see."""
        self._blocks, self._moves = (Sum.of(value),), ()
        self._seen, self._seen_version = value, version(value)
        self._in_sum = False
        return self

    def _watch_gradient(self, name: str) -> None:
        """Lets whoever uses the sum from here on use the tensor that is looked at."""
        if self._part_of is not None and self._part_of[1] is None:
            self._whole()._watch_gradient(name)
            return
        seen = self.tensor()
        block = self._blocks[0]
        if name in ("retain_grad", "register_hook") and self._is_passed_by(seen):
            _refuse_watching(name)
        if self._part_of is None:  # candidates of it that wait read what is watched
            block.hold(seen)
        self._part_of = None
        self._show(seen)

    def _set_data(self, data: Tensor) -> None:
        """Gives it other memory, past autograd; a part of something is then one no more."""
        if self._is_base:  # parts of it would keep the memory that it had
            raise RuntimeError(
                "fastnas: `.data` of an output was set after parts of it, or its output of an"
                " identity, were taken; set it before"
            )
        y = self._to_change()
        self._part_of = None
        y.data = data
        self._show(y)
        self._size, self._dtype = y.shape, y.dtype

    def note_alias(self, y: Any) -> bool:
        """Tells, and remembers, whether y, made of what others see, lies in the same memory."""
        one = y[0] if isinstance(y, tuple | list) and y else y
        if not isinstance(one, Tensor) or isinstance(one, Changing) or not self._has_values():
            return False
        found = one.untyped_storage()._cdata == self.tensor().untyped_storage()._cdata
        if found:
            self._share()
        return found

    def _share(self) -> None:
        self._is_shared = True
        if self._part_of is not None:
            self._whole()._share()

    def _is_passed_by(self, seen: Tensor) -> bool:
        """Tells whether gradients of it do not all pass through the tensor that others see."""
        self._follow()
        block = self._blocks[0]
        was_read = block.was_read and not (block.is_computed and block.dense[0] is seen)
        return not self._is_identity and (self._in_sum or was_read)

    def _become_tensor(self) -> Tensor:
        """Turns this very object into the tensor of its values, and returns it.

        Who asks whether it requires a gradient may be about to give it to an `autograd.Function`
        (as torch does with the inputs of a module that has backward hooks), which takes nothing
        but tensors.
        """
        value = self.tensor()
        if weakref.getweakrefcount(self):  # then torch does not swap it
            return value
        passed = self._is_base or self._is_identity or self._is_passed_by(value)
        with self._modes.restored(), torch._C.DisableTorchFunctionSubclass():
            waits = value.view_as(value)
            torch.utils.swap_tensors(self, waits)
        vars(self)["_waits"] = waits  # parts of it ask what it was
        cast(Changing, waits)._is_shared = True
        if passed:
            for name in ("retain_grad", "register_hook"):
                vars(self)[name] = partial(_refuse_watching, name)
        return self
