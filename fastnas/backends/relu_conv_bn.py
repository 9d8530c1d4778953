"""Computes relu_conv_bn by torch's matmul and a backend's kernels of mixed_norm_sum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnas.backends.address import laid_out
from fastnas.backends.calls import NO_NOISE, ConvCall, NormSumCall
from fastnas.backends.layout import state_format
from fastnas.backends.op_table import Kernel


class MatmulConv:
    """z = W relu(x) by matmul, which `torch.backends.cuda.matmul` governs; then y = BN(z)."""

    def __init__(self, norm_sum: Kernel[NormSumCall]) -> None:
        self.norm_sum = norm_sum

    def forward(self, call: ConvCall) -> tuple[Tensor, list[Tensor]]:
        layout = state_format(call.x)
        x, params = laid_out(call.x, layout), [laid_out(p) for p in call.params]
        halves = [
            _pointwise(p.flatten(1), _relu_read(x, i, len(params), layout), layout)
            for i, p in enumerate(params)
        ]
        z = halves[0] if len(halves) == 1 else torch.cat(halves, dim=1)
        z = z.contiguous(memory_format=layout)
        # running is [2, C]; the sum takes mean and variance as [normed terms, C], of which there is
        # one.
        given = call.running
        mean, var = (None, None) if given is None else (given[:1], given[1:])
        one = z.new_ones(1, dtype=torch.float32)
        norm = NormSumCall([z], one, [True], call.eps, mean, var, NO_NOISE)
        y, (_, *statistics) = self.norm_sum.forward(norm)
        # An op must not return one of its inputs: torch refuses an alias that the schema does not
        # declare.
        return y, [torch.cat(statistics) if given is None else given.clone()]

    def backward(
        self, grad: Tensor, call: ConvCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        layout = state_format(call.x)
        x, dy, y = (laid_out(t, layout) for t in (call.x, grad, saved[0]))
        params, stats = [laid_out(p) for p in call.params], laid_out(saved[1])
        dz = self._through_norm(dy, y, stats, call)
        needs_dx, *needs_dp = needs
        # Kernel i made channels [i C / 2, (i + 1) C / 2) of z [N, C, H', W'].
        halves = dz.chunk(len(params), dim=1)
        found = []
        if needs_dx:
            du = [_pointwise(p.flatten(1).t(), half, layout) for p, half in zip(params, halves)]
            found.append(_relu_scatter(du, x, layout))
        for i, (p, half, need) in enumerate(zip(params, halves, needs_dp)):
            if need:
                dW = _outer(half, _relu_read(x, i, len(params), layout), layout)
                found.append(dW.to(p.dtype).view(p.shape))
        return found

    def _through_norm(self, dy: Tensor, y: Tensor, stats: Tensor, call: ConvCall) -> Tensor:
        """Returns dz of y = BN(z)."""
        one, deviations = stats.new_ones(1), stats.new_empty(0, dtype=torch.float64)  # of no noise
        if call.running is not None:
            # dz = r dy, for which the kernel reads neither z nor y.
            norm = NormSumCall([y], one, [True], call.eps, stats[:1], stats[1:], NO_NOISE)
            return self.norm_sum.backward(dy, norm, [deviations], [False, True])[0]
        # The kernel is given z - mean z, which is y / r. Given y itself, with r as its weight, it
        # would round dy - mean(dy): in bf16 that is dy again where the mean is below its last bit,
        # and dW is off by four roundings.
        std = (stats[1] + call.eps).sqrt().to(y.dtype).view(1, -1, 1, 1)
        norm = NormSumCall([y * std], one, [True], call.eps, None, None, NO_NOISE)
        # The sum's forward saves [deviations, mean, var]. The mean is 0, since y std has none.
        given = [deviations, torch.zeros_like(stats[:1]), stats[1:]]
        return self.norm_sum.backward(dy, norm, given, [False, True])[0]


def _relu_read(x: Tensor, i: int, stride: int, layout: torch.memory_format) -> Tensor:
    """Returns relu(x) where kernel i reads it: at stride 2 pixels (2h + i, 2w + i), 0 beyond x."""
    if stride == 1:
        return x.relu()
    u = x[:, :, i::2, i::2].relu()
    rows, cols = (-(-size // 2) for size in x.shape[2:])
    beyond = (0, cols - u.shape[3], 0, rows - u.shape[2])
    return (F.pad(u, beyond) if any(beyond) else u).contiguous(memory_format=layout)


def _relu_scatter(du: list[Tensor], x: Tensor, layout: torch.memory_format) -> Tensor:
    """Transposes `_relu_read` over all kernels: makes dx of what each one's input gets."""
    if len(du) == 1:
        dx: Tensor = torch.ops.aten.threshold_backward(du[0], x, 0)
        return dx.contiguous(memory_format=layout)
    # At stride 2 the kernels read the pixels (even, even) and (odd, odd); the other half gets
    # zeros.
    dx = torch.zeros_like(x, memory_format=layout)
    for i, half in enumerate(du):
        read, into = (t[:, :, i::2, i::2] for t in (x, dx))
        # Where a size is odd the second kernel read a row or column of zeros beyond x, whose
        # gradient goes nowhere.
        half = half[:, :, : read.shape[2], : read.shape[3]]
        into.copy_(torch.ops.aten.threshold_backward(half, read, 0))
    return dx


def _pointwise(W: Tensor, u: Tensor, layout: torch.memory_format) -> Tensor:
    """Returns W [O, I] times u [N, I, H, W], in the layout of u."""
    if layout == torch.channels_last:
        # Both permutes are views, so this is one matrix product over all pixels.
        return F.linear(u.permute(0, 2, 3, 1), W).permute(0, 3, 1, 2)
    return torch.matmul(W, u.flatten(2)).unflatten(2, u.shape[2:])


def _outer(dz: Tensor, u: Tensor, layout: torch.memory_format) -> Tensor:
    """Sums dz u^T over images and pixels, to [O, I]; over images in float32."""
    if layout == torch.channels_last:
        rows = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (dz, u))
        return torch.mm(next(rows).t(), next(rows))
    products = torch.matmul(dz.flatten(2), u.flatten(2).transpose(1, 2))
    return products.sum(0, dtype=torch.float32)
