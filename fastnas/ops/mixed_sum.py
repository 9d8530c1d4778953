"""mixed_sum: schema, fake, autograd, public function, checks. The kernels are two steps down:

backends/cpu.py, cuda.py -> csrc/cpu/mixed_sum.cpp, csrc/cuda/mixed_sum.cu (csrc/formulas/*.h)
backends/triton.py       -> kernels/mixed_sum.py
backends/eager.py        -> reference/mixed_sum.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastnas.backends import BACKENDS, Request, choose
from fastnas.backends.layout import common_format
from fastnas.ops.table import OPS
from fastnas.reference import SkipNoise

torch.library.define(
    "fastnas::mixed_sum_fwd",
    "(Tensor[] x, Tensor w, int[] noisy, str form, Tensor? level, Tensor? rng, str? backend)"
    " -> (Tensor y, Tensor std)",
)
torch.library.define(
    "fastnas::mixed_sum_bwd",
    "(Tensor dy, Tensor[] x, Tensor w, int[] noisy, str form, Tensor? level, Tensor? rng,"
    " Tensor std, bool[] needs_dx, bool needs_dw, str? backend) -> (Tensor[] dx, Tensor dw)",
)


def _choose(like: Tensor, terms: int, backend: str | None) -> str:
    return choose(Request(OPS["mixed_sum"], like.device.type, like.dtype, terms), backend)


def _fwd(
    x: list[Tensor],
    w: Tensor,
    noisy: list[int],
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    name = _choose(x[0], len(x), backend)
    return BACKENDS[name].mixed_sum_fwd(x, w, noisy, form, level, rng)


def _bwd(
    dy: Tensor,
    x: list[Tensor],
    w: Tensor,
    noisy: list[int],
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    std: Tensor,
    needs_dx: list[bool],
    needs_dw: bool,
    backend: str | None,
) -> tuple[list[Tensor], Tensor]:
    name = _choose(dy, w.numel(), backend)
    return BACKENDS[name].mixed_sum_bwd(dy, x, w, noisy, form, level, rng, std, needs_dx, needs_dw)


torch.library.impl("fastnas::mixed_sum_fwd", "default", _fwd)
torch.library.impl("fastnas::mixed_sum_bwd", "default", _bwd)


@torch.library.register_fake("fastnas::mixed_sum_fwd")
def _fwd_fake(
    x: list[Tensor], w: Tensor, noisy: list[int], form: str, *_: Any
) -> tuple[Tensor, Tensor]:
    size = len(noisy) if form == "gaussian_additive" else 0
    y = torch.empty_like(x[0], memory_format=common_format(x))
    return y, torch.empty(size, dtype=torch.float64, device=w.device)


@torch.library.register_fake("fastnas::mixed_sum_bwd")
def _bwd_fake(
    dy: Tensor,
    x: list[Tensor],
    w: Tensor,
    noisy: list[int],
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    std: Tensor,
    needs_dx: list[bool],
    needs_dw: bool,
    backend: str | None,
) -> tuple[list[Tensor], Tensor]:
    layout = common_format([dy])
    dx = [torch.empty_like(dy, memory_format=layout) for need in needs_dx if need]
    return dx, w.new_empty(w.numel() if needs_dw else 0)


def _is_plain_call() -> bool:
    """Whether nothing watches the dispatcher, so that the op's body can be called without it.

    That is half of the call's overhead: 0.1 of 0.2 ms forward, as much backward.
    """
    return not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode())


class _MixedSum(torch.autograd.Function):
    """Saves x only where dw is wanted; of the noise, the Philox key and the standard deviations."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        backend: str | None,
        *x: Tensor,
    ) -> Tensor:
        fwd = _fwd if _is_plain_call() else torch.ops.fastnas.mixed_sum_fwd
        y, std = fwd(list(x), w, noisy, form, level, rng, backend)
        ctx.settings = noisy, form, backend
        ctx.save_for_backward(w, level, rng, std, *(x if ctx.needs_input_grad[0] else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        noisy, form, backend = ctx.settings
        w, level, rng, std, *x = ctx.saved_tensors
        needs_dw, needs_dx = ctx.needs_input_grad[0], list(ctx.needs_input_grad[6:])
        bwd = _bwd if _is_plain_call() else torch.ops.fastnas.mixed_sum_bwd
        dx, dw = bwd(
            dy,
            x if needs_dw else [],
            w,
            noisy,
            form,
            level,
            rng,
            std,
            needs_dx,
            needs_dw,
            backend,
        )
        wanted = iter(dx)
        all_dx = (next(wanted) if need else None for need in needs_dx)
        return dw if needs_dw else None, None, None, None, None, None, *all_dx


def draw_rng(count: int = 1, device: torch.device | None = None) -> Tensor:
    """`count` fresh Philox streams, int64 [count, 2] of (key, offset).

    Always from torch's CPU generator, so `torch.manual_seed` governs and a run on CUDA sees the
    noise that a run on the CPU sees. Draw all edges of a network at once: it is one copy.
    """
    return torch.randint(2**62, (count, 2), dtype=torch.int64).to(device)


def mixed_sum(
    x: Sequence[Tensor],
    w: Tensor,
    *,
    noise: SkipNoise | None = None,
    noisy: Sequence[int] = (),
    level: Tensor | None = None,
    rng: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = sum_k w_k x_k, with skip noise drawn in place on the terms named by `noisy`.

    The noise (`SkipNoise`) is generated by Philox inside the kernel and again in backward, where
    it is a constant; it is never stored. One pass forward (two over a term with relative noise:
    its standard deviation first), one pass backward for dw and every dx_k.

    Args:
        x: K >= 1 tensors of one shape (any rank), dtype and device: float32, bfloat16, float16,
            on the CPU also float64. Layouts may differ; all-channels-last stays so, other mixes
            are copied to contiguous.
        w: [K] floating point on the same device; may be wider than x. Sums are accumulated in
            float32 (float64 for float64), in an order that does not depend on threads.
        noise: what to draw; required where `noisy` is not empty.
        noisy: indices into x of the terms that carry noise.
        level: float64 [2] (shift, scale) on the device, `noise.level(amplitude)`; by default
            amplitude 1. A tensor, so that a captured graph can be given a new level.
        rng: int64 [2] Philox key and offset on the device; term noisy[j] uses offset + j.
            By default drawn from torch's generator.
        backend: "eager", "cpu", "cuda", "triton" or "auto"; None asks `use_backend`, then the
            environment variable FASTNAS_BACKEND, then auto.

    Returns:
        Tensor shaped and typed as the terms.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        BackendError: the explicit backend cannot run this.
    """
    x = list(x)
    _check(x, w, noise, noisy, level, rng)
    form = "none"
    if noise is not None and len(noisy):
        form = noise.form
        level = noise.level(device=w.device) if level is None else level
        rng = draw_rng(device=w.device)[0] if rng is None else rng
    else:
        level = rng = None
    if not torch.compiler.is_compiling():
        backend = _choose(x[0], len(x), backend)
    return _MixedSum.apply(w, list(noisy), form, level, rng, backend, *x)


def _check(
    x: list[Tensor],
    w: Tensor,
    noise: SkipNoise | None,
    noisy: Sequence[int],
    level: Tensor | None,
    rng: Tensor | None,
) -> None:
    if not x:
        raise ValueError("mixed_sum: x is empty; at least one term is needed")
    first = x[0]
    for k, term in enumerate(x):
        if not isinstance(term, Tensor):
            raise TypeError(f"mixed_sum: x[{k}] is a {type(term).__name__}; a Tensor is needed")
        if term.shape != first.shape:
            raise ValueError(
                f"mixed_sum: x[{k}] has shape {list(term.shape)}, x[0] has {list(first.shape)};"
                " all terms need one shape"
            )
        if term.dtype != first.dtype:
            raise TypeError(
                f"mixed_sum: x[{k}] is {term.dtype}, x[0] is {first.dtype}; one dtype is needed"
            )
        if term.device != first.device:
            raise ValueError(f"mixed_sum: x[{k}] is on {term.device}, x[0] on {first.device}")
    if first.dtype not in OPS["mixed_sum"].dtypes["eager"]:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in OPS["mixed_sum"].dtypes["eager"])
        raise TypeError(f"mixed_sum: x[0] is {first.dtype}; allowed: {allowed}")
    if not isinstance(w, Tensor):
        raise TypeError(f"mixed_sum: w is a {type(w).__name__}; a Tensor is needed")
    if w.dim() != 1 or w.shape[0] != len(x):
        raise ValueError(
            f"mixed_sum: w has shape {list(w.shape)} for {len(x)} terms; [{len(x)}] is needed"
        )
    if not w.is_floating_point():
        raise TypeError(f"mixed_sum: w is {w.dtype}; a floating point dtype is needed")
    if w.device != first.device:
        raise ValueError(f"mixed_sum: w is on {w.device}, the terms on {first.device}")
    _check_noise(len(x), w.device, noise, noisy, level, rng)


def _check_noise(
    terms: int,
    device: torch.device,
    noise: SkipNoise | None,
    noisy: Sequence[int],
    level: Tensor | None,
    rng: Tensor | None,
) -> None:
    if len(noisy) and noise is None:
        raise ValueError(f"mixed_sum: noisy is {list(noisy)}, but noise is None")
    if any(not 0 <= k < terms for k in noisy) or len(set(noisy)) != len(noisy):
        raise ValueError(
            f"mixed_sum: noisy is {list(noisy)}; distinct indices in 0..{terms - 1} are allowed"
        )
    check_noise_tensors("mixed_sum", device, level, rng, (2,))


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
