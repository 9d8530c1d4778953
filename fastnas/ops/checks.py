"""Checks that ops share: each error names the op, the argument, what was given and is allowed.

Tensors can change in place (`p.data = ...`, `module.half()`), so what kernels rely on is looked at
in every call; what follows from tables and shapes alone is settled once for each. Of the hundreds
of parameters and statistics of a cell each fact is looked at for all of them at once (`all_fit`,
`all_running`), in loops that enter no Python code; a message is composed only where that fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain
from numbers import Real
from operator import attrgetter
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastnas.backends import OPS, OpInfo
from fastnas.checks import check_flag, short
from fastnas.reference import SkipNoise


def is_plain(t: Any) -> TypeGuard[Tensor]:
    """Tells whether t is a Tensor whose values lie in memory, strided.

    Sparse, nested and mkldnn tensors do not, nor do subclasses with a dispatch of their own
    (FakeTensor, DTensor, wrappers), which a kernel called directly would pass by. Where a mode
    watches the dispatcher, calls go through it and such subclasses are served.
    """
    kind = type(t)
    if kind is not Tensor and kind is not Parameter:
        if not isinstance(t, Tensor):
            return False
        # A subclass that only adds methods is read like any tensor.
        own_dispatch = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
        if own_dispatch and not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode()):
            return False
    return t.layout is torch.strided and not t.is_nested


F = TypeVar("F", bound=Callable[..., Any])

# These ask what a tensor is, as functions that `map` calls without entering Python code.
_shape, _dtype, _device = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")
_layout, _is_nested = attrgetter("layout"), attrgetter("is_nested")
_EXACTLY = {Tensor, Parameter}
_STRIDED = {torch.strided}


def _all_plain(tensors: Sequence[Any]) -> bool:
    """Tells whether all are plain. False also where that takes a longer look: of subclasses."""
    return (
        not torch.compiler.is_compiling()  # which cannot follow the functions above
        and _EXACTLY.issuperset(map(type, tensors))
        and not any(map(_is_nested, tensors))
        and _STRIDED.issuperset(map(_layout, tensors))
    )


def all_fit(tensors: Sequence[Any], shapes: Sequence[Sequence[int]], like: Tensor) -> bool:
    """Tells whether all fit shapes and `like`. False also where `fits` has to look at each."""
    return (
        _all_plain(tensors)
        and list(map(_shape, tensors)) == shapes
        and {like.dtype}.issuperset(map(_dtype, tensors))
        and {like.device}.issuperset(map(_device, tensors))
    )


def fits(t: object, shape: Sequence[int], like: Tensor) -> bool:
    """Tells whether t is a plain tensor of this shape, of the dtype and on the device of `like`."""
    return is_plain(t) and t.shape == shape and t.dtype == like.dtype and t.device == like.device


def settled(function: F) -> F:
    """Returns the function with a memory for 256 arguments, which have to decide all it finds.

    While torch.compile traces it is the function itself: dynamo warns of caches, and passes by.
    """
    return function if torch.compiler.is_compiling() else cast(F, _remembering(function))


@cache
def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    # There is one memory for each function, for as long as the process lives. 256 tables and shapes
    # are more than any network has, and a bound keeps a loop over shapes from filling the memory.
    return lru_cache(maxsize=256)(function)


def check_tensor(op: str, name: str, t: object) -> None:
    if is_plain(t):
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}; a Tensor is needed")
    kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
    raise TypeError(
        f"{op}: {name} is a {type(t).__name__} ({kind}); a plain strided Tensor is needed"
    )


def as_list(op: str, name: str, given: Any, of: str = "Tensors") -> list[Any]:
    """Lists the elements of a sequence; a Tensor is none, though Python takes it apart by rows."""
    if isinstance(given, list | tuple):
        return list(given)
    if isinstance(given, Tensor | str | bytes | Mapping) or not isinstance(given, Iterable):
        raise TypeError(f"{op}: {name} is a {type(given).__name__}; a sequence of {of} is needed")
    return list(given)


def check_number(name: str, value: object, most: float = sys.float_info.max) -> None:
    """Refuses what is no number from 0 to `most`, by default any finite one. NaN is in no range."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {short(value)}; a number is needed")
    if not 0 <= value <= most:  # type: ignore[operator]
        allowed = "a finite number >= 0" if most == sys.float_info.max else f"0 to {most:g}"
        raise ValueError(f"{name} is {short(value)}; {allowed} is allowed")


def is_index(value: object) -> bool:
    """Tells whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_dtype(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in OPS[op].dtypes["eager"]:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in OPS[op].dtypes["eager"])
        raise TypeError(f"{op}: {name} is {t.dtype}; allowed: {allowed}")


def check_terms(op: OpInfo, name: str, terms: Sequence[Tensor], w: Tensor) -> None:
    """Refuses `terms` that differ or have a dtype that is not allowed, and a w that fits none."""
    if not terms:
        raise ValueError(f"{op.stem}: {name} is empty; at least one term is needed")
    first = terms[0]
    check_tensor(op.stem, f"{name}[0]", first)
    shape = first.shape
    for k, term in enumerate(terms):
        if not fits(term, shape, first):
            _refuse_term(op.stem, name, k, term, first)
    check_dtype(op.stem, f"{name}[0]", first)
    check_tensor(op.stem, "w", w)
    if w.shape != (len(terms),):
        raise ValueError(
            f"{op.stem}: w has shape {list(w.shape)} for {len(terms)} terms;"
            f" [{len(terms)}] is needed"
        )
    check_weight(op.stem, w, first.device, "the terms")


def _refuse_term(op: str, name: str, k: int, term: Tensor, first: Tensor) -> None:
    check_tensor(op, f"{name}[{k}]", term)
    if term.shape != first.shape:
        raise ValueError(
            f"{op}: {name}[{k}] has shape {list(term.shape)}, {name}[0] has"
            f" {list(first.shape)}; all terms need one shape"
        )
    if term.dtype != first.dtype:
        raise TypeError(
            f"{op}: {name}[{k}] is {term.dtype}, {name}[0] is {first.dtype}; one dtype is needed"
        )
    raise ValueError(f"{op}: {name}[{k}] is on {term.device}, {name}[0] on {first.device}")


def check_weight(op: str, w: Tensor, device: torch.device, whose: str) -> None:
    """Refuses mixing weights that are not floating point, or not where what they weigh is."""
    if not w.is_floating_point():
        raise TypeError(f"{op}: w is {w.dtype}; a floating point dtype is needed")
    if w.device != device:
        raise ValueError(f"{op}: w is on {w.device}, {whose} on {device}")


def check_noise(
    op: str,
    terms: int,
    device: torch.device,
    noise: SkipNoise | None,
    noisy: Sequence[int],
    level: Tensor | None,
    rng: Tensor | None,
) -> None:
    if noise is None and level is None and rng is None and not noisy:
        return
    check_noise_kind(op, noise)
    if noisy and noise is None:
        raise ValueError(f"{op}: noisy is {short(noisy)}, but noise is None")
    if not all(is_index(k) and 0 <= k < terms for k in noisy) or len(set(noisy)) != len(noisy):
        raise ValueError(
            f"{op}: noisy is {short(noisy)}; distinct indices in 0..{terms - 1} are allowed"
        )
    check_noise_tensors(op, device, level, rng, (2,))


def check_noise_kind(op: str, noise: object) -> None:
    if noise is not None and not isinstance(noise, SkipNoise):
        raise TypeError(f"{op}: noise is {short(noise)}; a SkipNoise or None is needed")


def check_noise_tensors(
    op: str,
    device: torch.device,
    level: Tensor | None,
    rng: Tensor | None,
    rng_shape: tuple[int, ...],
) -> None:
    """Refuses a level that is not float64 [2], and an rng that is not int64 `rng_shape`."""
    for name, tensor, dtype, shape in (
        ("level", level, torch.float64, (2,)),
        ("rng", rng, torch.int64, rng_shape),
    ):
        if tensor is None:
            continue
        check_tensor(op, name, tensor)
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} {list(tensor.shape)}; {dtype} {list(shape)} is"
                " needed"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the terms on {device}")


def check_image(op: str, name: str, x: Tensor) -> None:
    """Refuses what is not [N, C, H, W] of a dtype that the op has; N alone may be 0."""
    check_tensor(op, name, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}; [N, C, H, W] is needed")
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)}; C, H and W of at least 1 are needed"
        )
    check_dtype(op, name, x)


def check_same(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Refuses another dtype or device than that of x."""
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} is {t.dtype}, x is {x.dtype}; one dtype is needed")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, x on {x.device}")


def check_running(
    op: str, name: str, pair: Any, channels: int, device: torch.device, training: bool
) -> None:
    """Refuses what is no (mean, variance) [C] of a norm; in training None is allowed, too."""
    if pair is None and training:
        return
    is_pair = isinstance(pair, list | tuple) and len(pair) == 2
    if (
        is_pair
        and _keeps_statistics(pair[0], channels, device, training)
        and _keeps_statistics(pair[1], channels, device, training)
    ):
        return
    _refuse_running(f"{op}: {name}", pair, is_pair, channels, device)


def check_all_running(
    op: str, pairs: Sequence[Any], channels: int, device: torch.device, training: bool
) -> None:
    """Does `check_running` for each pair, which errors call running[i]."""
    if not _all_running(pairs, channels, device, training):
        for i, pair in enumerate(pairs):
            check_running(op, f"running[{i}]", pair, channels, device, training)


def _all_running(pairs: Sequence[Any], channels: int, device: torch.device, training: bool) -> bool:
    """Tells whether all pairs are right. False also where that takes a longer look."""
    if not {tuple, list}.issuperset(map(type, pairs)) or not {2}.issuperset(map(len, pairs)):
        return False
    tensors = list(chain.from_iterable(pairs))
    return (
        _all_plain(tensors)
        and {(channels,)}.issuperset(map(_shape, tensors))
        and all(map(Tensor.is_floating_point, tensors))
        and {device}.issuperset(map(_device, tensors))
        and not (training and (any(map(Tensor.is_neg, tensors)) or not _all_contiguous(tensors)))
    )


def _all_contiguous(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _keeps_statistics(t: Any, channels: int, device: torch.device, training: bool) -> bool:
    return (
        is_plain(t)
        and t.is_floating_point()
        and t.shape == (channels,)
        and t.device == device
        and not (training and _why_not_written(t))
    )


def _why_not_written(t: Tensor) -> str:
    """Says what keeps torch from updating a statistic in place; empty where nothing does.

    torch.compile updates a copy, and cannot ask for the flag.
    """
    if torch.compiler.is_compiling() or (t.is_contiguous() and not t.is_neg()):
        return ""
    # Torch itself refuses to write to it, long after the forward pass has run.
    if t.dim() == 1 and t.shape[0] > 1 and t.stride(0) == 0:
        return " (expanded: all channels are one place in memory)"
    return " (a negative view)" if t.is_neg() else ""


def _refuse_running(
    where: str, pair: Any, is_pair: bool, channels: int, device: torch.device
) -> None:
    if pair is None:
        raise ValueError(
            f"{where} is None, but training is False; a (running_mean, running_var) is needed"
        )
    if not is_pair or not all(is_plain(t) for t in pair):
        raise TypeError(f"{where} is no pair of Tensors (running_mean, running_var)")
    given = " and ".join(
        f"{t.dtype} {list(t.shape)} on {t.device}{_why_not_written(t)}" for t in pair
    )
    raise ValueError(
        f"{where} is {given}; floating point [{channels}] on {device} is needed for both"
    )


def check_norm_settings(op: str, training: object, momentum: object, eps: object) -> None:
    check_flag(f"{op}: training", training)
    check_number(f"{op}: momentum", momentum, most=1)
    check_number(f"{op}: eps", eps)


def check_statistics(op: str, training: bool, has_running: bool, values: int, x: Tensor) -> None:
    """Refuses a batch norm without running statistics, or of one value a channel in training."""
    # The unbiased variance divides by values - 1.
    if training and values <= 1:
        raise ValueError(
            f"{op}: {values} value(s) per channel, x has shape {list(x.shape)}; more than 1 is"
            " needed in training"
        )
    if not training and not has_running:
        raise ValueError(f"{op}: training is False and running is None; statistics are needed")
