"""Builds the inverted residual of mobile networks, and the layers around a column of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastnas.checks import check_choice, check_flag, check_int

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    # In place as in the public code: backward of a batch norm reads its input alone.
    "relu6": lambda: nn.ReLU6(inplace=True),
    "swish": nn.SiLU,
}
SQUEEZED = 0.25
"""The channels of a squeeze, as a share of the input channels of its block."""


class SqueezeExcite(nn.Module):
    """y = u sigmoid(W_2 a(W_1 mean(u) + b_1) + b_2), the mean over the image of each channel.

    Source: Hu et al., CVPR 2018; with the channels between as in MnasNet and EfficientNet.

    Args:
        channels: of u [N, channels, H, W].
        between: of what W_1 returns.
        activation: a, "relu6" or "swish".
    """

    def __init__(self, channels: int, between: int, activation: str = "relu6") -> None:
        super().__init__()
        check_int("channels", channels, 1)
        check_int("between", between, 1)
        check_choice("activation", activation, ACTIVATIONS)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, between, 1),
            ACTIVATIONS[activation](),
            nn.Conv2d(between, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, u: Tensor) -> Tensor:
        return u * self.gate(u)


class InvertedResidual(nn.Module):
    """y = BN(W_2 g(a(BN(D a(BN(W_1 x)))))), plus x where stride is 1 and C_in = C_out.

    W_1 is a 1x1 convolution to expansion * C_in channels, D a depthwise one of that kernel and
    stride, W_2 a 1x1 convolution to C_out channels, g squeeze and excitation or nothing. An
    expansion of 1 has no W_1. [N, C_in, H, W] -> [N, C_out, ceil(H / stride), ceil(W / stride)].

    Sources: Sandler et al., CVPR 2018 (MobileNetV2); Chu et al., arXiv 1907.01845 (FairNAS), whose
    batch norms have scale and shift in the search, too.

    Args:
        C_in, C_out: channels.
        kernel: of the depthwise convolution, odd.
        expansion: channels within, in those of x.
        stride: 1 or 2.
        squeeze: whether there is g, its channels between a quarter of C_in.
        activation: a, "relu6" or "swish".

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel: int,
        expansion: int,
        stride: int = 1,
        *,
        squeeze: bool = False,
        activation: str = "relu6",
    ) -> None:
        super().__init__()
        sizes = {"C_in": C_in, "C_out": C_out, "kernel": kernel, "expansion": expansion}
        for name, size in sizes.items():
            check_int(name, size, 1)
        check_int("stride", stride, 1, 2)
        check_flag("squeeze", squeeze)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; an odd number is needed")
        wide = C_in * expansion
        expanding = expansion > 1
        self.expand = (
            conv_bn(C_in, wide, 1, activation=activation) if expanding else nn.Sequential()
        )
        self.depthwise = conv_bn(wide, wide, kernel, stride, wide, activation=activation)
        between = max(1, int(C_in * SQUEEZED))
        self.squeeze = SqueezeExcite(wide, between, activation) if squeeze else nn.Identity()
        self.project = conv_bn(wide, C_out, 1)
        self.is_residual = stride == 1 and C_in == C_out

    def parts(self) -> tuple[nn.Sequential, nn.Sequential, nn.Module]:
        """Returns the layers but for the addition in three parts, cut after D and after W_2.

        Run in order they are the block, and what is between them is all that is kept for a
        backward pass that runs the first two a second time.
        """
        depthwise, *after = self.depthwise
        project, norm = self.project
        first = nn.Sequential(*self.expand, depthwise)
        return first, nn.Sequential(*after, self.squeeze, project), norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.is_residual else y


def conv_bn(
    C_in: int,
    C_out: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> nn.Sequential:
    """Builds a convolution without a bias, its batch norm and, where it is named, an activation."""
    conv = nn.Conv2d(C_in, C_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    if activation is None:
        return nn.Sequential(conv, nn.BatchNorm2d(C_out))
    check_choice("activation", activation, ACTIVATIONS)
    return nn.Sequential(conv, nn.BatchNorm2d(C_out), ACTIVATIONS[activation]())


def mobile_stem(
    in_channels: int, stem: int, first: int, stride: int, activation: str
) -> nn.Sequential:
    """Builds a 3x3 convolution and a depthwise-separable one, as one flat sequence."""
    return nn.Sequential(
        *conv_bn(in_channels, stem, 3, stride, activation=activation),
        *conv_bn(stem, stem, 3, 1, stem, activation=activation),
        *conv_bn(stem, first, 1),
    )


def mobile_head(C: int, head: int, activation: str) -> nn.Sequential:
    """Builds what leads from the column to the classifier, [N, C, H, W] -> [N, head]."""
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*conv_bn(C, head, 1, activation=activation), *pool)
