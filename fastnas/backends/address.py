"""Turns tensors into addresses, which nothing else does, and vouches for what kernels read there.

A kernel sees a number where Python saw a tensor: strides, a pending sign or a foreign layout would
be read as if they were not there. So whoever fills a kernel's arguments lays its inputs out first
(`laid_out`), keeps them alive until the call has ended, and asks `address` for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, cast

import torch
from torch import Tensor

# They are looked up once, since a call asks for dozens of addresses.
STRIDED, ROWS = torch.strided, torch.contiguous_format
_layout = attrgetter("layout")


def laid_out(t: Tensor, layout: torch.memory_format = ROWS) -> Tensor:
    """Returns the tensor as a kernel can read it: copied where it is not that already.

    A view whose values are negative only by a flag (`torch._neg_view`, `z.conj().imag`) counts as
    contiguous to torch, so `contiguous` alone would keep the flag.
    """
    return (t.resolve_neg() if t.is_neg() else t).contiguous(memory_format=layout)


def address(t: Tensor, on: torch.device, layout: torch.memory_format = ROWS) -> int:
    """Returns where the values of `t` lie, in the order of `layout`; 0 if it has none.

    Raises:
        AssertionError: it is not strided and laid out so, is not on the device `on`, or carries a
            negative or conjugate flag. The caller has not laid it out.
    """
    if (
        t.layout is STRIDED
        and (t.is_contiguous() if layout is ROWS else t.is_contiguous(memory_format=layout))
        and t.device == on
        and not t.is_neg()
        and not t.is_conj()
    ):
        # A fake or wrapped tensor has elements and yet no storage: 0 would be read as "not wanted"
        # by a kernel, which leaves what it should fill as it was.
        at = t.data_ptr()
        if at or not t.numel():
            return at
    raise AssertionError(
        f"a kernel on {on} would read {_described(t)}; plain values in {layout} are needed"
    )


def addresses(
    tensors: Iterable[Tensor | None],
    on: torch.device,
    layout: torch.memory_format = ROWS,
) -> list[int]:
    """Returns the `address` of each, 0 for None."""
    # A cell has 170 parameters, and a call of Python for each costs more than the looks: what is
    # asked of all of them is asked in loops that enter none. Only a list that fails goes the long
    # way, to the tensor that is to blame.
    given: list[Any] = list(tensors)
    if layout is ROWS and not any(map(is_, given, repeat(None))) and _are_rows(given, on):
        found = list(map(Tensor.data_ptr, given))
        if 0 not in found:
            return found
    return [0 if t is None else address(t, on, layout) for t in given]


def _are_rows(tensors: list[Tensor], on: torch.device) -> bool:
    """Tells whether each is plain, contiguous and on the device.

    `get_device` is a sixth of the price of `device`. It is -1 also of a few devices beside the
    CPU, where tensors have no addresses: then the caller looks again.
    """
    where = -1 if on.type == "cpu" else on.index
    return (
        # Layouts are asked first: torch raises an error of its own where a sparse tensor is asked
        # whether it is contiguous.
        {STRIDED}.issuperset(map(_layout, tensors))
        and all(map(Tensor.is_contiguous, tensors))
        and {where}.issuperset(map(Tensor.get_device, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and not any(map(Tensor.is_conj, tensors))
    )


def places(
    on: torch.device,
    layout: torch.memory_format = ROWS,
    /,
    **tensors: Tensor | Sequence[Tensor | None] | None,
) -> dict[str, int | list[int]]:
    """Returns the addresses of tensors, or of lists of them, by the names of a kernel's fields."""
    return {
        name: addresses(given, on, layout)
        if isinstance(given, list)
        else 0
        if given is None
        else address(cast(Tensor, given), on, layout)
        for name, given in tensors.items()
    }


def _described(t: Tensor) -> str:
    if t.layout is not torch.strided:
        return f"a {type(t).__name__} of layout {t.layout}"
    flags = [
        name for name, is_set in (("negative", t.is_neg()), ("conjugate", t.is_conj())) if is_set
    ]
    flagged = f", flagged {' and '.join(flags)}" if flags else ""
    return f"a {type(t).__name__} {list(t.shape)} of strides {t.stride()} on {t.device}{flagged}"
