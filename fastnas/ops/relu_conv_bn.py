"""relu_conv_bn: schema, fake, autograd, public function, checks. The kernels are two steps down:

backends/cpu.py          -> csrc/cpu/relu_conv_bn.cpp
backends/relu_conv_bn.py -> torch's matmul and the kernels of mixed_norm_sum: cuda
backends/eager.py        -> reference/relu_conv_bn.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastnas import reference
from fastnas.backends import BACKENDS, accumulation_dtype
from fastnas.backends.layout import state_format
from fastnas.checks import short
from fastnas.ops.checks import (
    as_list,
    check_image,
    check_norm_settings,
    check_running,
    check_same,
    check_statistics,
    check_tensor,
    is_index,
)
from fastnas.ops.dispatch import (
    choose_backend,
    is_plain_call,
    needs_graph,
    reference_grads,
    wants_graph_of_backward,
)
from fastnas.ops.flops import count_as_eager
from fastnas.ops.running import Running, stack_running, update_running

torch.library.define(
    "fastnas::relu_conv_bn_fwd",
    "(Tensor x, Tensor[] params, Tensor? running, float eps, str? backend)"
    " -> (Tensor y, Tensor stats)",
)
torch.library.define(
    "fastnas::relu_conv_bn_bwd",
    "(Tensor dy, Tensor x, Tensor y, Tensor[] params, Tensor stats, float eps, bool needs_dx,"
    " bool needs_dparams, str? backend) -> (Tensor[] dx, Tensor[] dparams)",
)


def _backend(x: Tensor, backend: str | None) -> Any:  # not every backend has the op
    return BACKENDS[choose_backend("relu_conv_bn", x, backend)]


def _fwd(
    x: Tensor, params: list[Tensor], running: Tensor | None, eps: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    return _backend(x, backend).relu_conv_bn_fwd(x, params, running, eps)


def _bwd(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    params: list[Tensor],
    stats: Tensor,
    eps: float,
    needs_dx: bool,
    needs_dparams: bool,
    backend: str | None,
) -> tuple[list[Tensor], list[Tensor]]:
    return _backend(x, backend).relu_conv_bn_bwd(
        dy, x, y, params, stats, eps, needs_dx, needs_dparams
    )


torch.library.impl("fastnas::relu_conv_bn_fwd", "default", _fwd)
torch.library.impl("fastnas::relu_conv_bn_bwd", "default", _bwd)
count_as_eager("relu_conv_bn", _fwd, _bwd)


@torch.library.register_fake("fastnas::relu_conv_bn_fwd")
def _fwd_fake(x: Tensor, params: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    stride, C = len(params), sum(p.shape[0] for p in params)
    rows, cols = (-(-size // stride) for size in x.shape[2:])
    y = torch.empty(x.shape[0], C, rows, cols, dtype=x.dtype, device=x.device).contiguous(
        memory_format=state_format(x)
    )
    return y, torch.empty(2, C, dtype=accumulation_dtype(x.dtype), device=x.device)


@torch.library.register_fake("fastnas::relu_conv_bn_bwd")
def _bwd_fake(
    dy: Tensor, x: Tensor, y: Tensor, params: list[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    *_, needs_dx, needs_dparams, _ = rest
    dx = [torch.empty_like(x, memory_format=state_format(x))] if needs_dx else []
    return dx, [p.new_empty(p.shape) for p in params] if needs_dparams else []


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`_fwd`, by torch's dispatcher where somebody watches it."""
    y, stats = (_fwd if is_plain_call() else torch.ops.fastnas.relu_conv_bn_fwd)(*arguments)
    return y, stats


class _ReluConvBn(torch.autograd.Function):
    """Saves x and y, which are states of the network in any case."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running: Tensor | None,
        eps: float,
        backend: str | None,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, stats = _forward(x, list(params), running, eps, backend)
        ctx.settings = eps, backend
        ctx.save_for_backward(x, y, stats, *params)
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, y, stats, *params = ctx.saved_tensors
        eps, backend = ctx.settings
        if wants_graph_of_backward(dy):
            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
            own_dx, *own_dparams = reference_grads(
                lambda leaves: reference.relu_conv_bn(
                    leaves[0], leaves[1:], torch.empty_like(stats), eps=eps
                ),
                [x, *params],
                needs,
                dy,
            )
            return own_dx, None, None, None, *own_dparams
        needs_dx, needs_dparams = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        bwd = _bwd if is_plain_call() else torch.ops.fastnas.relu_conv_bn_bwd
        dx, dparams = bwd(dy, x, y, params, stats, eps, needs_dx, needs_dparams, backend)
        return dx[0] if needs_dx else None, None, None, None, *(dparams or [None] * len(params))


def relu_conv_bn(
    x: Tensor,
    params: Sequence[Tensor],
    *,
    running: Running | None = None,
    momentum: float = 0.1,
    training: bool = True,
    eps: float = 1e-5,
    paths: int = 1,
    backend: str | None = None,
) -> Tensor:
    """y = BN(W relu(x)) with 1x1 kernels and no scale or shift: the preprocessing of a DARTS cell.

    The pointwise output is written where y will be and normalised in place; backward needs x, y
    and the statistics, so nothing is held that is not a state of the network already. A variance
    beyond the range of float32 (z beyond about 1e19) is NaN, as are the results.

    Args:
        x: [N, C_in, H, W], none of C_in, H and W 0, float32, bfloat16 or float64 (not on CUDA).
            There TF32 is off unless torch.backends.cuda.matmul.fp32_precision is "tf32".
        params: one [C, C_in, 1, 1]; or two [C / 2, C_in, 1, 1] with stride 2, the second reading
            the image shifted by a pixel in both directions (`FactorizedReduce`).
        running: (mean, variance), each [C]: updated in training, used outside of it.
        momentum: of the running statistics, 0 to 1.
        training: whether the statistics are the batch's. Outside of it there is no gradient.
        eps: added to the variance.
        paths: groups of images, one after the other in x, with statistics of their own; the
            running ones move group by group, as in a call for each.
        backend: see `mixed_sum`.

    Returns:
        [N, C, H', W'], channels last in memory on the CPU, NCHW on a GPU.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        BackendError: the explicit backend cannot run this.
    """
    params = as_list("relu_conv_bn", "params", params)
    check_norm_settings("relu_conv_bn", training, momentum, eps)
    _check(x, params, running, training, paths)
    if paths > 1:
        alone = partial(
            relu_conv_bn, params=params, running=running, momentum=momentum, training=training,
            eps=eps, backend=backend,
        )  # fmt: skip
        return torch.cat([alone(group) for group in x.chunk(paths)])
    if not torch.compiler.is_compiling():
        backend = choose_backend("relu_conv_bn", x, backend)
    given = None
    if not training and running is not None:
        given = stack_running([running], accumulation_dtype(x.dtype))[0]
    if needs_graph((x, *params)):
        y, stats = _ReluConvBn.apply(x, given, eps, backend, *params)
    else:
        y, stats = _forward(x, params, given, eps, backend)
    if training and running is not None:
        update_running([running], stats[None], y.numel() // y.shape[1], momentum)
    return y


def _check(
    x: Tensor,
    params: list[Tensor],
    running: Running | None,
    training: bool,
    paths: int,
) -> None:
    op = "relu_conv_bn"
    check_image(op, "x", x)
    if not is_index(paths) or paths < 1 or x.shape[0] % paths:
        raise ValueError(
            f"{op}: paths is {short(paths)}; a divisor of the {x.shape[0]} images of x is needed"
        )
    if len(params) not in (1, 2):
        raise ValueError(f"{op}: params has {len(params)} tensors; 1, or 2 at stride 2, are needed")
    for i, p in enumerate(params):
        check_tensor(op, f"params[{i}]", p)
        fits = p.dim() == 4 and p.shape[0] and p.shape[1:] == (x.shape[1], 1, 1)
        if not fits or p.shape != params[0].shape:
            raise ValueError(
                f"{op}: params[{i}] has shape {list(p.shape)}; [C, {x.shape[1]}, 1, 1] is needed,"
                " C at least 1, the same for both"
            )
        check_same(op, f"params[{i}]", p, x)
    stride = len(params)
    values = x.shape[0] // paths * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    if running is not None:
        channels = sum(p.shape[0] for p in params)
        check_running(op, "running", running, channels, x.device, training)
    check_statistics(op, training, running is not None, values, x, params)
