"""relu_conv_bn for the backends that have kernels of mixed_norm_sum: torch's matmul around them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnas.backends.address import laid_out
from fastnas.backends.fused import FusedBackend
from fastnas.backends.layout import state_format


class MatmulReluConvBn(FusedBackend):
    """z = W relu(x) by matmul, which `torch.backends.cuda.matmul` governs; then y = BN(z)."""

    def relu_conv_bn_fwd(
        self, x: Tensor, params: list[Tensor], running: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        layout = state_format(x)
        x, params = laid_out(x, layout), [laid_out(p) for p in params]
        halves = [
            _pointwise(p.flatten(1), _relu_read(x, i, len(params), layout), layout)
            for i, p in enumerate(params)
        ]
        z = halves[0] if len(halves) == 1 else torch.cat(halves, dim=1)
        z = z.contiguous(memory_format=layout)
        mean, var = (None, None) if running is None else (running[:1], running[1:])
        one = z.new_ones(1, dtype=torch.float32)
        y, mean, var, _ = self.mixed_norm_sum_fwd(
            [z], one, [True], mean, var, eps, [], "none", None, None
        )
        return y, torch.cat([mean, var])

    def relu_conv_bn_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor,
        params: list[Tensor],
        stats: Tensor,
        eps: float,
        needs_dx: bool,
        needs_dparams: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        layout = state_format(x)
        x, dy, y = (laid_out(t, layout) for t in (x, dy, y))
        params, stats = [laid_out(p) for p in params], laid_out(stats)
        # z - mean z = y / r. With y for z and r for W the kernel would round dy - mean(dy): in bf16
        # that is dy again where the mean is below its last bit, and dW is off by four roundings.
        std = (stats[1] + eps).sqrt().to(y.dtype).view(1, -1, 1, 1)
        (dz,), _ = self.mixed_norm_sum_bwd(
            dy, [y * std], stats.new_ones(1), [True], torch.zeros_like(stats[:1]), stats[1:], eps,
            True, [], "none", None, None, stats.new_empty(0, dtype=torch.float64), [True], False,
        )  # fmt: skip
        halves = dz.chunk(len(params), dim=1)
        dparams, dx = [], []
        if needs_dparams:
            for i, (p, half) in enumerate(zip(params, halves)):
                dW = _outer(half, _relu_read(x, i, len(params), layout), layout)
                dparams.append(dW.to(p.dtype).view(p.shape))
        if needs_dx:
            du = [_pointwise(p.flatten(1).t(), half, layout) for p, half in zip(params, halves)]
            dx.append(_relu_scatter(du, x, layout))
        return dx, dparams


def _relu_read(x: Tensor, i: int, stride: int, layout: torch.memory_format) -> Tensor:
    """relu(x) where kernel i of `stride` reads it: pixels (2h + i, 2w + i) at 2, 0 beyond x."""
    if stride == 1:
        return x.relu()
    u = x[:, :, i::2, i::2].relu()
    rows, cols = (-(-size // 2) for size in x.shape[2:])
    beyond = (0, cols - u.shape[3], 0, rows - u.shape[2])
    return (F.pad(u, beyond) if any(beyond) else u).contiguous(memory_format=layout)


def _relu_scatter(du: list[Tensor], x: Tensor, layout: torch.memory_format) -> Tensor:
    """The transpose of `_relu_read` over all kernels: dx from what each one's input gets."""
    if len(du) == 1:
        dx: Tensor = torch.ops.aten.threshold_backward(du[0], x, 0)
        return dx.contiguous(memory_format=layout)
    dx = torch.zeros_like(x, memory_format=layout)
    for i, half in enumerate(du):
        read, into = (t[:, :, i::2, i::2] for t in (x, dx))
        half = half[:, :, : read.shape[2], : read.shape[3]]
        into.copy_(torch.ops.aten.threshold_backward(half, read, 0))
    return dx


def _pointwise(W: Tensor, u: Tensor, layout: torch.memory_format) -> Tensor:
    """W [O, I] times u [N, I, H, W], in the layout of u."""
    if layout == torch.channels_last:
        return F.linear(u.permute(0, 2, 3, 1), W).permute(0, 3, 1, 2)
    return torch.matmul(W, u.flatten(2)).unflatten(2, u.shape[2:])


def _outer(dz: Tensor, u: Tensor, layout: torch.memory_format) -> Tensor:
    """sum over images and pixels of dz u^T, [O, I]; of images in float32."""
    if layout == torch.channels_last:
        rows = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (dz, u))
        return torch.mm(next(rows).t(), next(rows))
    products = torch.matmul(dz.flatten(2), u.flatten(2).transpose(1, 2))
    return products.sum(0, dtype=torch.float32)
