"""Builds the DARTS operations as eager modules.

Module structure, and with it every state-dict name, is that of the public code: quark0/darts
``cnn/operations.py``, and automl/RobustDARTS ``src/operations.py`` for :class:`Noise`.

All take x [N, C, H, W] to y [N, C, ceil(H / s), ceil(W / s)] at stride s = 1 or 2.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastnas.spaces.operations import OPERATIONS, Operation


class ReLUConvBN(nn.Module):
    """y = BN(conv(relu(x))): a dense convolution, [N, C_in, H, W] -> [N, C_out, H', W'].

    Args:
        C_in: input channels.
        C_out: output channels.
        kernel_size, stride, padding: of the convolution, as in ``nn.Conv2d``.
        affine: whether the batch norm has a scale and a shift.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def _depthwise_separable(
    C_in: int,
    C_out: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    affine: bool,
) -> tuple[nn.Module, ...]:
    # u [N, C_in, H', W'] of the depthwise convolution is what `mixed_edges` folds batch norm
    # through.
    depthwise = nn.Conv2d(
        C_in, C_in, kernel_size, stride, padding, dilation, groups=C_in, bias=False
    )
    pointwise = nn.Conv2d(C_in, C_out, 1, bias=False)
    return nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(C_out, affine=affine)


class DilConv(nn.Module):
    """y = BN(pointwise(depthwise(relu(x)))), the depthwise convolution dilated.

    Args:
        C_in, C_out, kernel_size, stride, padding, dilation: of the convolutions; the
            pointwise one changes the channels.
        affine: whether the batch norm has a scale and a shift.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        dilation: int,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            *_depthwise_separable(C_in, C_out, kernel_size, stride, padding, dilation, affine)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class SepConv(nn.Module):
    """y = f_2(f_1(x)) with f_i(x) = BN(pointwise(depthwise(relu(x)))).

    The first depthwise convolution has the stride, the second pointwise one changes the
    channels.

    Args:
        C_in, C_out, kernel_size, stride, padding, dilation: of the convolutions.
        affine: whether the batch norms have a scale and a shift.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        affine: bool = True,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            *_depthwise_separable(C_in, C_in, kernel_size, stride, padding, dilation, affine),
            *_depthwise_separable(C_in, C_out, kernel_size, 1, padding, dilation, affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Identity(nn.Module):
    """y = x, the very same tensor. Drop path leaves outputs of this class alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    """y = 0 * x[..., ::s, ::s]: zeros where x is finite, NaN where it is not.

    Args:
        stride: s.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # It is a product and no new zeros, as in the public code: NaN stays, and x gets a gradient
        # of 0.
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class Noise(nn.Module):
    """y ~ N(0, 1), drawn anew at every call, in training and evaluation alike.

    Only the shape, dtype and device of y come from x; no gradient goes back to it. The draw
    is from torch's generator. Source: RobustDARTS, space S4.

    Args:
        stride: s; y has the shape of x[..., ::s, ::s].
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # The draw does not go through Philox: the noise of S4 is a candidate, not what a skip
        # carries.
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride])


class FactorizedReduce(nn.Module):
    """y = BN(concat[conv_1(u), conv_2(u shifted by one pixel in h and w)]), u = relu(x).

    Both convolutions are 1x1 with stride 2 and give half the channels:
    y[:, :C/2, h, w] reads u[..., 2h, 2w] and y[:, C/2:, h, w] reads u[..., 2h + 1, 2w + 1],
    [N, C_in, H, W] -> [N, C_out, ceil(H / 2), ceil(W / 2)].

    Where H or W is odd the shifted positions end one short. The public code fails there; here
    u counts as zero one row below and one column right of the image. Even sizes never read
    that padding.

    Args:
        C_in: input channels.
        C_out: output channels, an even number.
        affine: whether the batch norm has a scale and a shift.

    Raises:
        ValueError: ``C_out`` is odd.
    """

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        if C_out % 2:
            raise ValueError(
                f"FactorizedReduce needs an even number of channels, got C_out={C_out}"
            )
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        odd_h, odd_w = x.shape[2] % 2, x.shape[3] % 2
        # [:, :, 1:, 1:] of an odd size is one row and column short, and the halves of y would
        # differ.
        padded = F.pad(x, (0, odd_w, 0, odd_h)) if odd_h or odd_w else x
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(padded[:, :, 1:, 1:])], dim=1))


def _sep_conv(op: Operation, C: int, stride: int, affine: bool) -> nn.Module:
    padding = op.dilation * (op.size // 2)
    return SepConv(C, C, op.size, stride, padding, affine, op.dilation)


def _dil_conv(op: Operation, C: int, stride: int, affine: bool) -> nn.Module:
    padding = op.dilation * (op.size // 2)
    return DilConv(C, C, op.size, stride, padding, op.dilation, affine)


def _max_pool(op: Operation, C: int, stride: int, affine: bool) -> nn.Module:
    return nn.MaxPool2d(3, stride, padding=1)


def _avg_pool(op: Operation, C: int, stride: int, affine: bool) -> nn.Module:
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


def _conv_7x1_1x7(op: Operation, C: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        # Each convolution strides along its own axis, as in the public code.
        nn.Conv2d(C, C, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    )


_BUILDERS: dict[str, Callable[[Operation, int, int, bool], nn.Module]] = {
    "none": lambda op, C, stride, affine: Zero(stride),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "skip": lambda op, C, stride, affine: Identity(),
    "reduce_skip": lambda op, C, stride, affine: FactorizedReduce(C, C, affine),
    "sep_conv": _sep_conv,
    "dil_conv": _dil_conv,
    "conv_7x1_1x7": _conv_7x1_1x7,
    "noise": lambda op, C, stride, affine: Noise(stride),
}
"""By the kind of an operation at its stride, or by its name where it is of no kind."""


def primitive(name: str, C: int, stride: int, affine: bool) -> nn.Module:
    """Builds an operation, [N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)].

    Args:
        name: one of :data:`fastnas.spaces.OPS`.
        C: channels in and out.
        stride: 1 or 2.
        affine: whether its batch norms have a scale and a shift.

    Raises:
        ValueError: no such operation, fewer than one channel, another stride, or
            ``skip_connect`` at stride 2 with an odd number of channels.
    """
    if not isinstance(name, str) or name not in OPERATIONS:
        raise ValueError(f"no operation {name!r}; there are {', '.join(OPERATIONS)}")
    if C < 1:
        raise ValueError(f"{name}: C must be at least 1, got {C}")
    if stride not in (1, 2):
        raise ValueError(f"{name}: stride must be 1 or 2, got {stride}")
    op = OPERATIONS[name]
    # A kind is the same in both strides, but for a skip: the identity at 1, two convolutions at 2.
    return _BUILDERS[op.kind(stride) or name](op, C, stride, affine)


def preprocessing(C_in: int, C: int, halved: bool) -> nn.Module:
    """Builds what a cell of the search network does to an input, to C channels, its batch norm
    non-affine; `halved`: to half the height and width as well.
    """
    if halved:
        return FactorizedReduce(C_in, C, affine=False)
    return ReLUConvBN(C_in, C, 1, 1, 0, affine=False)


def search_candidate(name: str, C: int, stride: int) -> nn.Module:
    """Builds an operation as the DARTS search network has it: every batch norm non-affine, and
    one more after each pool, ``nn.Sequential(pool, BatchNorm2d(C, affine=False))``.

    Args and errors as in :func:`primitive`. Source: quark0/darts ``cnn/model_search.py``.
    """
    op = primitive(name, C, stride, affine=False)
    # Pools get the norm that all other candidates but the identity end in.
    if isinstance(op, nn.MaxPool2d | nn.AvgPool2d):
        return nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
    return op


def drop_path(x: Tensor, p: float) -> Tensor:
    """y_n = x_n b_n / (1 - p) with b_n ~ Bernoulli(1 - p): whole samples dropped.

    The processes of torch's default process group draw for the samples of all, and each takes its
    own part: all have the same random state, and would drop the same ones.

    Args:
        x: [N, C, H, W].
        p: probability of dropping a sample, 0 <= p < 1.
    """
    keep = 1.0 - p
    count, rank, size = x.shape[0], 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    # mask is [N, 1, 1, 1]: a sample is dropped as a whole.
    mask = torch.full((size * count, 1, 1, 1), keep, dtype=x.dtype, device=x.device).bernoulli()
    return x * (mask[rank * count : (rank + 1) * count] / keep)
