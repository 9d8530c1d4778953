"""Holds relu_conv_bn: its description, its checks and its public function. Its kernels:

backends/native_cells.py -> csrc/cpu/relu_conv_bn.cpp
backends/relu_conv_bn.py -> torch's matmul and the kernels of mixed_norm_sum: cuda, triton
backends/eager.py        -> reference/relu_conv_bn.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.backends import accumulation_dtype
from fastnas.backends.calls import ConvCall
from fastnas.backends.eager import reference_conv
from fastnas.backends.layout import state_format
from fastnas.checks import short
from fastnas.ops.autocast import follow_autocast, without_autocast
from fastnas.ops.batch_norm import Running, stack_running, update_running
from fastnas.ops.call import FIRST, Op
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


def _new_stats(call: ConvCall) -> Tensor:
    x, C = call.x, sum(p.shape[0] for p in call.params)
    return torch.empty(2, C, dtype=accumulation_dtype(x.dtype), device=x.device)


def _fake(call: ConvCall) -> tuple[Tensor, list[Tensor]]:
    x, stride, stats = call.x, len(call.params), _new_stats(call)
    rows, cols = (-(-size // stride) for size in x.shape[2:])
    y = torch.empty(x.shape[0], stats.shape[1], rows, cols, dtype=x.dtype, device=x.device)
    return y.contiguous(memory_format=state_format(x)), [stats]


RELU_CONV_BN = Op(
    "relu_conv_bn",
    ConvCall,
    leaves=("x", "params"),
    fake=_fake,
    reference=lambda call: reference_conv(call, _new_stats(call)),
    format=lambda call, grad: state_format(call.x),
    shows=FIRST,
    # y = r (z - mean z), so backward has the normalised z without a copy of it.
    saves_output=True,
)


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
    beyond the range of float32 (z beyond about 1e19) is NaN, as are the results. Under
    `torch.autocast` x and params are cast as for a convolution, unless float64.

    Args:
        x: [N, C_in, H, W], none of C_in, H and W 0, float32, bfloat16, float16 (fused on CUDA
            only) or float64 (not on CUDA). TF32 is off on CUDA, unless
            torch.backends.cuda.matmul.fp32_precision is "tf32".
        params: one [C, C_in, 1, 1]; or two [C / 2, C_in, 1, 1] with stride 2, the second reading
            the image shifted by a pixel in both directions (`FactorizedReduce`).
        running: (mean, variance), each [C]: updated in training, used outside of it.
        momentum: of the running statistics, 0 to 1.
        training: whether the statistics are the batch's. Outside of it they are constants, also
            for the gradients.
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
    (x,), params = follow_autocast([x], params)
    check_norm_settings("relu_conv_bn", training, momentum, eps)
    values = _values_per_channel(x, params, paths)
    if running is not None:
        channels = sum(p.shape[0] for p in params)
        check_running("relu_conv_bn", "running", running, channels, x.device, training)
    check_statistics("relu_conv_bn", training, running is not None, values, x)
    given = None
    if not training and running is not None:
        given = stack_running([running], accumulation_dtype(x.dtype))[0]
    groups = []
    # Each path is a call, in order: it normalises by its own statistics, and the running ones move
    # as in separate calls.
    for group in x.chunk(paths) if paths > 1 else (x,):
        with without_autocast(x):
            y, stats = RELU_CONV_BN(ConvCall(group, params, given, eps), backend)
        if training and running is not None:
            update_running([running], stats[None], y.numel() // y.shape[1], momentum)
        groups.append(y)
    return groups[0] if len(groups) == 1 else torch.cat(groups)


def _values_per_channel(x: Tensor, params: list[Tensor], paths: int) -> int:
    """Counts the values of a path that a statistic is of; checks what that follows from."""
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
    return x.shape[0] // paths * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
