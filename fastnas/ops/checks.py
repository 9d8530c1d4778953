"""Checks that ops share: each error names the op, the argument, what was given and is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.backends import OpInfo
from fastnas.ops.table import OPS
from fastnas.reference import SkipNoise


def check_terms(op: OpInfo, name: str, terms: Sequence[Tensor], w: Tensor) -> None:
    """`terms`, the argument called `name`, are alike and of an allowed dtype, and w fits them."""
    if not terms:
        raise ValueError(f"{op.stem}: {name} is empty; at least one term is needed")
    for k, term in enumerate(terms):
        if not isinstance(term, Tensor):
            raise TypeError(
                f"{op.stem}: {name}[{k}] is a {type(term).__name__}; a Tensor is needed"
            )
    shape, dtype, device = terms[0].shape, terms[0].dtype, terms[0].device
    for k, term in enumerate(terms):
        if term.shape != shape:
            raise ValueError(
                f"{op.stem}: {name}[{k}] has shape {list(term.shape)}, {name}[0] has"
                f" {list(shape)}; all terms need one shape"
            )
        if term.dtype != dtype:
            raise TypeError(
                f"{op.stem}: {name}[{k}] is {term.dtype}, {name}[0] is {dtype}; one dtype is needed"
            )
        if term.device != device:
            raise ValueError(f"{op.stem}: {name}[{k}] is on {term.device}, {name}[0] on {device}")
    if dtype not in op.dtypes["eager"]:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in op.dtypes["eager"])
        raise TypeError(f"{op.stem}: {name}[0] is {dtype}; allowed: {allowed}")
    if not isinstance(w, Tensor):
        raise TypeError(f"{op.stem}: w is a {type(w).__name__}; a Tensor is needed")
    if w.shape != (len(terms),):
        raise ValueError(
            f"{op.stem}: w has shape {list(w.shape)} for {len(terms)} terms;"
            f" [{len(terms)}] is needed"
        )
    if w.dtype != dtype and not w.is_floating_point():
        raise TypeError(f"{op.stem}: w is {w.dtype}; a floating point dtype is needed")
    if w.device != device:
        raise ValueError(f"{op.stem}: w is on {w.device}, the terms on {device}")


def check_noise(
    op: OpInfo,
    terms: int,
    device: torch.device,
    noise: SkipNoise | None,
    noisy: Sequence[int],
    level: Tensor | None,
    rng: Tensor | None,
) -> None:
    if noise is None and level is None and rng is None and not len(noisy):
        return
    if len(noisy) and noise is None:
        raise ValueError(f"{op.stem}: noisy is {list(noisy)}, but noise is None")
    if any(not 0 <= k < terms for k in noisy) or len(set(noisy)) != len(noisy):
        raise ValueError(
            f"{op.stem}: noisy is {list(noisy)}; distinct indices in 0..{terms - 1} are allowed"
        )
    check_noise_tensors(op.stem, device, level, rng, (2,))


def check_noise_tensors(
    op: str,
    device: torch.device,
    level: Tensor | None,
    rng: Tensor | None,
    rng_shape: tuple[int, ...],
) -> None:
    """level float64 [2] and rng int64 `rng_shape`, where given, on the device of the terms."""
    for name, tensor, dtype, shape in (
        ("level", level, torch.float64, (2,)),
        ("rng", rng, torch.int64, rng_shape),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} {list(tensor.shape)}; {dtype} {list(shape)} is"
                " needed"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the terms on {device}")


def check_image(op: str, name: str, x: Tensor) -> None:
    """[N, C, H, W] of a dtype that the op has."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; a Tensor is needed")
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}; [N, C, H, W] is needed")
    if x.dtype not in OPS[op].dtypes["eager"]:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in OPS[op].dtypes["eager"])
        raise TypeError(f"{op}: {name} is {x.dtype}; allowed: {allowed}")


def check_same(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """The dtype and device of x."""
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} is {t.dtype}, x is {x.dtype}; one dtype is needed")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, x on {x.device}")


def check_tensor(op: str, name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}; a Tensor is needed")


def check_running(op: str, running: Sequence[object], channels: int, training: bool) -> None:
    """A (mean, variance) [C] for each norm, or, in training, None."""
    for i, pair in enumerate(running):
        where = f"{op}: running[{i}]"
        if pair is None:
            if not training:
                raise ValueError(
                    f"{where} is None, but training is False; a (running_mean, running_var) is"
                    " needed"
                )
            continue
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(t, Tensor) for t in pair):  # type: ignore[attr-defined]
            raise TypeError(f"{where} is no pair of Tensors (running_mean, running_var)")
        shapes = [list(t.shape) for t in pair]  # type: ignore[attr-defined]
        if shapes != [[channels]] * 2:
            raise ValueError(f"{where} has shapes {shapes}; [{channels}] is needed for both")


def check_statistics(
    op: str,
    training: bool,
    has_running: bool,
    values: int,
    eps: float,
    x: Tensor,
    params: Sequence[Tensor],
) -> None:
    """What batch norm needs: eps, more than one value a channel, or running statistics."""
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps is {eps}; a finite number >= 0 is allowed")
    if training and values <= 1:
        raise ValueError(
            f"{op}: {values} value(s) per channel, x has shape {list(x.shape)}; more than 1 is"
            " needed in training"
        )
    if training:
        return
    if not has_running:
        raise ValueError(f"{op}: training is False and running is None; statistics are needed")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *params)):
        raise ValueError(
            f"{op}: training is False and a gradient is wanted; it has one in training only"
        )
