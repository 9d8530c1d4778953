"""Builds what the networks of NAS-Bench-201 are made of: operations, residual blocks, stages.

Source: Dong & Yang, ICLR 2020, arXiv 2001.00326, section 2.1 and figure 1; D-X-Y/AutoDL-Projects
``xautodl/models/cell_infers``, whose state-dict names it keeps (``cells.0.layers.3.op.1.weight``,
``cells.5.conv_a.op.2.bias``, ``cells.5.downsample.1.weight``, ``lastact.0.weight``).
"""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from fastnas.layers.primitives import Identity, ReLUConvBN, Zero

STAGES = 3

_OPERATIONS: dict[str, Callable[[int, bool], nn.Module]] = {
    # No operation has a stride here: cells keep the size, residual blocks halve it.
    "none": lambda C, affine: Zero(1),
    "skip_connect": lambda C, affine: Identity(),
    "nor_conv_1x1": lambda C, affine: ReLUConvBN(C, C, 1, 1, 0, affine),
    "nor_conv_3x3": lambda C, affine: ReLUConvBN(C, C, 3, 1, 1, affine),
    "avg_pool_3x3": lambda C, affine: nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
}


_NAMES = {"avg_pool_3x3": "plain_avg_pool_3x3"}
"""Published name to that of `fastnas.spaces.operations.EDGE_OPERATIONS`, where the two differ."""
_PUBLISHED = {own: published for published, own in _NAMES.items()}


def nb201_name(published: str) -> str:
    """Returns the name by which fused ops know an operation of NAS-Bench-201."""
    return _NAMES.get(published, published)


def nb201_search_candidate(name: str, C: int) -> nn.Module:
    """Builds an operation of the search network, by the name that `nb201_name` gives it."""
    return nb201_operation(_PUBLISHED.get(name, name), C, affine=False)


def nb201_operation(name: str, C: int, affine: bool) -> nn.Module:
    """Builds an operation of NAS-Bench-201, [N, C, H, W] -> [N, C, H, W].

    None changes the size or the channels. ``avg_pool_3x3`` counts no padding, and unlike a DARTS
    pool has no batch norm in the search network either.

    Args:
        name: one of :data:`fastnas.spaces.NB201_OPS`.
        C: channels in and out.
        affine: whether the batch norm of a ``nor_conv`` has a scale and a shift.

    Raises:
        ValueError: no such operation.
    """
    if name not in _OPERATIONS:
        raise ValueError(
            f"no operation {name!r} in NAS-Bench-201; there are {', '.join(_OPERATIONS)}"
        )
    return _OPERATIONS[name](C, affine)


class ResidualBlock(nn.Module):
    """y = conv_b(conv_a(x)) + conv_1x1(pool(x)), halved in size: it stands between two stages.

    conv_a and conv_b are ReLU, 3x3 convolution, batch norm; conv_a has stride 2. The shortcut
    takes means of 2x2. [N, C_in, H, W] -> [N, C_out, ceil(H / 2), ceil(W / 2)]; at the border of
    an odd size, where the public code fails, the mean is over the pixels that are there.
    """

    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, 2, 1)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, 1, 1)
        # `ceil_mode` keeps the last row of an odd size, as the 3x3 convolution at stride 2 does.
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, stride=2, ceil_mode=True), nn.Conv2d(C_in, C_out, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


def nb201_stages(
    C: int, layers: int, cell: Callable[[int], nn.Module]
) -> Iterator[tuple[nn.Module, int]]:
    """Yields each cell or residual block with its channels: `layers` cells of C, 2 C and 4 C."""
    for stage in range(STAGES):
        # A residual block stands before every stage but the first, with the doubled channels.
        if stage:
            yield ResidualBlock(C, 2 * C), 2 * C
            C *= 2
        for _ in range(layers):
            yield cell(C), C


def nb201_last(C: int) -> nn.Sequential:
    """Builds batch norm and ReLU before the global pooling."""
    return nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
