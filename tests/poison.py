"""Fresh memory filled with NaN, so that an element which no kernel writes is noticed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def _poison(fresh: Any) -> Any:
    """Fills a plain strided tensor with NaN, integers with garbage; leaves all others alone."""
    if type(fresh) is not torch.Tensor or fresh.layout != torch.strided:
        return fresh
    if fresh.device.type == "meta" or fresh.dtype == torch.bool:
        return fresh
    floating = fresh.is_floating_point() or fresh.is_complex()
    with torch.no_grad():
        fresh.fill_(float("nan") if floating else torch.iinfo(fresh.dtype).max // 3)
    return fresh


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Any:
        fresh = allocate(*args, **kwargs)
        return fresh if torch.compiler.is_compiling() else _poison(fresh)

    return allocate_poisoned


def poison_fresh_memory(replace: Callable[[Any, str, Any], None]) -> None:
    """Replaces torch's functions for fresh memory, by setattr or by what undoes it later."""
    for name in ("empty", "empty_like", "empty_strided"):
        replace(torch, name, _poisoned(getattr(torch, name)))
    replace(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
