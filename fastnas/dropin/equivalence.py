"""Tells whether a new forward of a module gives what its own gives: runs and compares both."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fastnas.dropin.checked import Parts
from fastnas.nn.parts import CellParts, candidate_modules


def device_of(module: nn.Module) -> torch.device:
    """Returns where its first parameter is; the CPU if it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def dtype_of(module: nn.Module) -> torch.dtype:
    """Returns that of its first floating point parameter; torch's default if it has none."""
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def random_inputs(module: nn.Module, parts: Parts) -> tuple[Tensor, ...]:
    """Draws two images of 8 x 8, with the channels that the module's first layers ask for."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        # Numbers are drawn on the CPU in float64, so every device and dtype is tried on the same
        # ones.
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(device_of(module), dtype_of(module))

    def weights(*shape: int) -> Tensor:
        return normal(*shape).softmax(-1)

    ops = candidate_modules(module)
    if isinstance(parts, CellParts):
        before = parts.preprocesses
        # A halved input has to come out at the size of the other one.
        sizes = [16 if p.kind == "factorized_reduce" else 8 for p in before]
        states = [normal(2, p.convs[0].in_channels, s, s) for p, s in zip(before, sizes)]
        return (*states, weights(len(ops), len(parts.edges[0].candidates)))
    channels = (
        m.in_channels if isinstance(m, nn.Conv2d) else m.num_features
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d)
    )
    return normal(2, next(channels, 8), 8, 8), weights(len(ops))


def faint(w: Tensor, zeros: bool) -> Tensor:
    """Returns mixing weights like w, every second one of a row small: 1e-2 w, 1e-4 w, and so on.

    Args:
        zeros: whether half of those are 0.
    """
    small, K = w.clone(), w.shape[-1]
    for i, row in enumerate(small.view(-1, K)):
        # All columns of a cell have their turn; an edge alone begins with its last.
        chosen = row[(K - 1 + i) % 2 :: 2]
        # A forward may compare weights with a threshold, which weights of 0 alone would not show.
        factors = 10.0 ** (-2 * torch.arange(1, len(chosen) + 1, device=w.device).to(w))
        if zeros:
            factors[len(chosen) // 2 :] = 0
        chosen *= factors.flip(0) if i % 4 >= 2 else factors
    return small


def with_zeros(w: Tensor, first: int) -> Tensor:
    """Returns mixing weights like w, every second one 0, from the first on."""
    zeros = w.clone()
    zeros[..., first::2] = 0
    return zeros


@contextmanager
def seeded(cuda: Sequence[int | torch.device] = ()) -> Iterator[None]:
    """Seeds every generator that a forward may draw from, and puts it back.

    Args:
        cuda: CUDA devices with theirs.
    """
    # Trials may be run in the middle of a seeded program, whose draws they must not move.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(cuda):
            torch.default_generator.manual_seed(0)  # torch.manual_seed also seeds other devices
            for used in cuda:
                with torch.cuda.device(used):
                    torch.cuda.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs torch on one thread, which serves small tensors best, and a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _set_mode(module: nn.Module, training: bool) -> None:
    """Sets the mode of every part by its flag: `train()` may be overridden to freeze some."""
    for part in module.modules():
        part.training = training


def _observe(
    module: nn.Module,
    forward: Callable[..., Any],
    trials: Mapping[str, Sequence[Tensor]],
    dtype: torch.dtype | None,
) -> dict[str, Tensor | None]:
    """Returns output, gradients and buffers of a training step on each input, in turn.

    At the end the output in evaluation mode, on the first.

    Args:
        module: a copy that may be changed.
        trials: the inputs, by what is said of them where something differs.
        dtype: what module and inputs are cast to; None: they stay as they are.
    """
    module = module.to(dtype) if dtype else module
    # Frozen parameters are compared, too: they may be thawed after `accelerate`.
    params = {n: p.requires_grad_() for n, p in module.named_parameters() if p.is_floating_point()}
    cast = {
        what: [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]
        for what, inputs in trials.items()
    }
    first = next(iter(cast.values()))
    seen: dict[str, Tensor | None] = {}
    device = first[0].device
    with seeded([device] if device.type == "cuda" else []), torch.enable_grad():
        for what, inputs in cast.items():
            step = _step(module, forward, inputs, params)
            seen |= {name + what: value for name, value in step.items()}
        _set_mode(module, False)
        with torch.no_grad():
            seen["output in evaluation mode"] = forward(module, *first).detach()
    return seen


def _step(
    module: nn.Module,
    forward: Callable[..., Any],
    inputs: Sequence[Tensor],
    params: Mapping[str, Tensor],
) -> dict[str, Tensor | None]:
    _set_mode(module, True)
    # The forward is not given the leaves themselves, which torch lets nobody overwrite.
    y = forward(module, *(1 * t for t in inputs))
    if not isinstance(y, Tensor):
        raise TypeError(f"its forward returns a {type(y).__name__}, not a tensor")
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y)
    leaves = {**{f"input {i}": t for i, t in enumerate(inputs)}, **params}
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    return {
        "output": y.detach(),
        **{f"gradient of {name}": grad for name, grad in zip(leaves, grads)},
        # Buffers are copied, because the next trial moves them on.
        **{n: b.to(torch.float64, copy=True) for n, b in module.named_buffers()},
    }


def disagreement(
    module: nn.Module,
    forward: Callable[..., Tensor],
    trials: Mapping[str, Sequence[Tensor]],
    further: int = 0,
) -> str | None:
    """Says where the module's own forward and forward(module, *inputs) differ, or None.

    In float64 if both run in it, else in float32, else in the dtypes that the module has. Each runs
    on a copy: nothing that a forward keeps in the module, tensor or not, is moved by the trial.

    Args:
        trials: as `_observe` takes them.
        further: how many arguments, each None, the own forward is given after the inputs.
    """

    def own(m: nn.Module, *inputs: Tensor) -> Any:
        return type(m).forward(m, *inputs, *[None] * further)

    like = next(iter(trials.values()))[0]
    if like.is_meta or isinstance(like, FakeTensor):
        return "its tensors have no values that could be compared"
    for dtype in (torch.float64, torch.float32, None):
        # This is 1.5e-8 in float64 and 3.5e-4 in float32: sums in another order differ by less,
        # another formula by more.
        allowed = torch.finfo(dtype or like.dtype).eps ** 0.5
        try:
            # A forward may keep what it likes in its module: each of the two has one of its own.
            first, second = copy.deepcopy(module), copy.deepcopy(module)
        except Exception as error:
            return f"no copy can be made of it, to be tried out: {error}"
        what = "its own forward"
        try:
            expected = _observe(first, own, trials, dtype)
            what = "the fused forward"
            given = _observe(second, forward, trials, dtype)
        except Exception as error:
            # A forward that casts by itself may fail in float64, which is no difference yet.
            if dtype is None:
                return f"{what} fails on a random input: {error}"
            continue
        for name, value in expected.items():
            apart = _distance(given[name], value)
            # Written so, NaN counts as a difference.
            if not apart <= allowed:
                return f"it computes something else: {name} differs by {apart:.1e}"
        return None
    raise AssertionError("the module's own dtypes are the last that are tried")


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    """Returns the largest difference, relative to the largest value where that is above 1.

    A gradient of 0 and none at all are apart: an optimizer moves what has a gradient.
    """
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    if a.shape != b.shape:
        return float("inf")
    if b.numel() == 0:
        return 0.0
    # What is seen may still be part of a graph, of which float() would warn.
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / (1 + b.abs().max()))
