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

from fastnas import reference
from fastnas.backends import BACKENDS
from fastnas.backends.layout import common_format
from fastnas.checks import check_int
from fastnas.ops.checks import as_list, check_noise, check_terms
from fastnas.ops.dispatch import (
    choose_backend,
    is_plain_call,
    needs_graph,
    own_output,
    reference_grads,
    wants_graph_of_backward,
)
from fastnas.ops.table import OPS
from fastnas.reference import SkipNoise
from fastnas.transfer import to_device

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


def _fwd(
    x: list[Tensor],
    w: Tensor,
    noisy: list[int],
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    name = choose_backend("mixed_sum", x[0], backend, len(x))
    y, std = BACKENDS[name].mixed_sum_fwd(x, w, noisy, form, level, rng)
    return y, own_output(std)


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
    name = choose_backend("mixed_sum", dy, backend, w.numel())
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


def _forward(
    x: list[Tensor],
    w: Tensor,
    noisy: list[int],
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if backend is not None and is_plain_call():
        return BACKENDS[backend].mixed_sum_fwd(x, w, noisy, form, level, rng)
    y, std = torch.ops.fastnas.mixed_sum_fwd(x, w, noisy, form, level, rng, backend)
    return y, std


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
        y, std = _forward(list(x), w, noisy, form, level, rng, backend)
        ctx.settings = noisy, form, backend
        ctx.save_for_backward(w, level, rng, std, *(x if ctx.needs_input_grad[0] else ()))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        noisy, form, backend = ctx.settings
        w, level, rng, std, *x = ctx.saved_tensors
        needs_dw, needs_dx = ctx.needs_input_grad[0], list(ctx.needs_input_grad[6:])
        if wants_graph_of_backward(dy):
            own_dw, *own_dx = reference_grads(
                lambda leaves: reference.mixed_sum(leaves[1:], leaves[0], noisy, form, level, rng),
                [w, *(x or [None] * len(needs_dx))],
                [needs_dw, *needs_dx],
                dy,
            )
            return own_dw, None, None, None, None, None, *own_dx
        taken = dy, x, w, noisy, form, level, rng, std, needs_dx, needs_dw
        if backend is not None and is_plain_call():
            dx, dw = BACKENDS[backend].mixed_sum_bwd(*taken)
        else:
            dx, dw = torch.ops.fastnas.mixed_sum_bwd(*taken, backend)
        wanted = iter(dx)
        all_dx = (next(wanted) if need else None for need in needs_dx)
        return dw if needs_dw else None, None, None, None, None, None, *all_dx


def draw_rng(count: int = 1, device: torch.device | None = None) -> Tensor:
    """`count` fresh Philox streams, int64 [count, 2] of (key, offset).

    Always from torch's CPU generator, so `torch.manual_seed` governs and a run on CUDA sees the
    noise that a run on the CPU sees. Draw all edges of a network at once: it is one copy.
    """
    check_int("draw_rng: count", count, 0)
    return to_device(torch.randint(2**62, (count, 2), dtype=torch.int64, device="cpu"), device)


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
            environment variable FASTNAS_BACKEND (read once), then auto.

    Returns:
        Tensor shaped and typed as the terms.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        BackendError: the explicit backend cannot run this.
    """
    x, noisy = as_list("mixed_sum", "x", x), as_list("mixed_sum", "noisy", noisy, "indices")
    check_terms(OPS["mixed_sum"], "x", x, w)
    check_noise("mixed_sum", len(x), w.device, noise, noisy, level, rng)
    form = "none"
    if noise is not None and noisy:
        form = noise.form
        level = noise.level(device=w.device) if level is None else level
        rng = draw_rng(device=w.device)[0] if rng is None else rng
    else:
        level = rng = None
    if not torch.compiler.is_compiling():
        backend = choose_backend("mixed_sum", x[0], backend, len(x))
    if not needs_graph((w, *x)):
        return _forward(x, w, noisy, form, level, rng, backend)[0]
    return _MixedSum.apply(w, noisy, form, level, rng, backend, *x)
