"""Whether a new forward of a module gives what its own gives: both are run, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastnas.nn.recognise import CellParts, MixedOpParts, candidate_modules


def device_of(module: nn.Module) -> torch.device:
    """Where its first parameter is; the CPU if it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of its first floating point parameter; torch's default if it has none."""
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def random_inputs(module: nn.Module, parts: CellParts | MixedOpParts | None) -> tuple[Tensor, ...]:
    """Two images of 8 x 8, with the channels that the module's first layers ask for."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(device_of(module), dtype_of(module))

    def weights(*shape: int) -> Tensor:
        return normal(*shape).softmax(-1)

    ops = candidate_modules(module)
    if isinstance(parts, CellParts):
        before = (parts.preprocess0, parts.preprocess1)
        sizes = [16 if p.kind == "factorized_reduce" else 8 for p in before]
        states = [normal(2, p.convs[0].in_channels, s, s) for p, s in zip(before, sizes)]
        return (*states, weights(len(ops), len(parts.edges[0].candidates)))
    channels = (
        m.in_channels if isinstance(m, nn.Conv2d) else m.num_features
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d)
    )
    return normal(2, next(channels, 8), 8, 8), weights(len(ops))


class _Call(nn.Module):
    """A forward applied to a module: without its hooks, and whatever its instance's forward is."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.function = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.module, *inputs)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Sets the mode of every part by its flag: `train()` may be overridden to freeze some."""
    before = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in before:
            part.training = training
        yield
    finally:
        for part, flag in before:
            part.training = flag


def _observe(
    module: nn.Module,
    forward: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step, then the output in evaluation mode.

    Runs on copies of parameters and buffers, cast to `dtype` (None: as they are); seeded, with
    torch's generator restored.
    """

    def copied(t: Tensor) -> Tensor:
        wanted = dtype if dtype and t.is_floating_point() else t.dtype
        return t.detach().to(wanted, copy=True)

    inputs = [copied(t).requires_grad_() for t in inputs]
    params = {f"module.{n}": copied(p).requires_grad_() for n, p in module.named_parameters()}
    buffers = {f"module.{n}": copied(b) for n, b in module.named_buffers()}
    call, state = _Call(module, forward), {**params, **buffers}
    leaves = {**{f"input {i}": t for i, t in enumerate(inputs)}, **params}
    device = inputs[0].device
    on_cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on_cuda), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed also seeds what is not restored
        for used in on_cuda:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(0)
        with _mode(module, True):
            y = functional_call(call, state, tuple(1 * t for t in inputs))
        if not isinstance(y, Tensor):
            raise TypeError(f"its forward returns a {type(y).__name__}, not a tensor")
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
        with _mode(module, False), torch.no_grad():
            in_evaluation = functional_call(call, state, tuple(inputs))
    seen = {"output": y.detach(), "output in evaluation mode": in_evaluation}
    for (name, leaf), grad in zip(leaves.items(), grads):
        seen[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {**seen, **{name: buffer.double() for name, buffer in buffers.items()}}


def disagreement(
    module: nn.Module, forward: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> str | None:
    """Where the module's own forward and forward(module, *inputs) differ, or None.

    In float64 if both run in it, else in float32, else in the dtypes that the module has.
    """
    for dtype in (torch.float64, torch.float32, None):
        allowed = torch.finfo(dtype or inputs[0].dtype).eps ** 0.5
        what = "its own forward"
        try:
            expected = _observe(module, type(module).forward, inputs, dtype)
            what = "the fused forward"
            given = _observe(module, forward, inputs, dtype)
        except Exception as error:
            if dtype is None:
                return f"{what} fails on a random input: {error}"
            continue
        for name, value in expected.items():
            apart = _distance(given[name], value)
            if not apart <= allowed:
                return f"it computes something else: {name} differs by {apart:.1e}"
        return None
    raise AssertionError("the module's own dtypes are the last that are tried")


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    if a.shape != b.shape:
        return float("inf")
    if b.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / (1 + b.abs().max()))
