"""The networks of NAS-Bench-201: a cell of 6 edges, stacked in three stages.

Source: Dong & Yang, ICLR 2020, arXiv 2001.00326, section 2.1 and figure 1; D-X-Y/AutoDL-Projects
``xautodl/models/cell_infers``, whose state-dict names it keeps (``cells.0.layers.3.op.1.weight``,
``cells.5.conv_a.op.2.bias``, ``cells.5.downsample.1.weight``, ``lastact.0.weight``).
"""

from collections.abc import Callable, Iterator
from typing import cast

from torch import Tensor, nn

from fastnas.checks import typed
from fastnas.reference.arguments import check_images
from fastnas.reference.primitives import Identity, ReLUConvBN, Zero
from fastnas.spaces import NB201Genotype

STAGES = 3

_OPERATIONS: dict[str, Callable[[int, bool], nn.Module]] = {
    "none": lambda C, affine: Zero(1),
    "skip_connect": lambda C, affine: Identity(),
    "nor_conv_1x1": lambda C, affine: ReLUConvBN(C, C, 1, 1, 0, affine),
    "nor_conv_3x3": lambda C, affine: ReLUConvBN(C, C, 3, 1, 1, affine),
    "avg_pool_3x3": lambda C, affine: nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
}


def nb201_operation(name: str, C: int, affine: bool) -> nn.Module:
    """An operation of NAS-Bench-201, [N, C, H, W] -> [N, C, H, W].

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
    """What stands between two stages: y = conv_b(conv_a(x)) + conv_1x1(pool(x)), halved in size.

    conv_a and conv_b are ReLU, 3x3 convolution, batch norm; conv_a has stride 2. The shortcut
    takes means of 2x2. [N, C_in, H, W] -> [N, C_out, ceil(H / 2), ceil(W / 2)]; at the border of
    an odd size, where the public code fails, the mean is over the pixels that are there.
    """

    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, 2, 1)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, 1, 1)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, stride=2, ceil_mode=True), nn.Conv2d(C_in, C_out, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


class NB201EvalCell(nn.Module):
    """x_j = sum_{i<j} op_ij(x_i) for j = 1, 2, 3; y = x_3. [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, genotype: NB201Genotype, C: int) -> None:
        super().__init__()
        self._sources = tuple(tuple(source for _, source in node) for node in genotype.nodes)
        self.layers = nn.ModuleList(
            nb201_operation(op, C, affine=True) for node in genotype.nodes for op, _ in node
        )

    def forward(self, x: Tensor) -> Tensor:
        states, layers = [x], iter(self.layers)
        for sources in self._sources:
            first, *rest = [next(layers)(states[i]) for i in sources]
            states.append(sum(rest, first))
        return states[-1]


def nb201_stages(
    C: int, layers: int, cell: Callable[[int], nn.Module]
) -> Iterator[tuple[nn.Module, int]]:
    """Each cell or residual block with its channels: `layers` cells of C, 2 C and 4 C channels."""
    for stage in range(STAGES):
        if stage:
            yield ResidualBlock(C, 2 * C), 2 * C
            C *= 2
        for _ in range(layers):
            yield cell(C), C


def nb201_last(C: int) -> nn.Sequential:
    """Batch norm and ReLU before the global pooling."""
    return nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())


class NB201EvalNetwork(nn.Module):
    """The evaluation network of a NAS-Bench-201 cell, for images of any size.

    A stem (3x3 convolution to C channels, batch norm), three stages of ``layers`` cells with C,
    2 C and 4 C channels, a :class:`ResidualBlock` between stages, batch norm, ReLU, global mean
    pooling, a linear classifier. Batch norms are affine.

    Args:
        genotype: the cell.
        C: channels of the first stage; 16 in the benchmark.
        num_classes: outputs.
        layers: cells per stage; 5 in the benchmark.
        in_channels: of the images.

    Raises:
        TypeError: ``genotype`` is not a :class:`NB201Genotype`.
        ValueError: a size below 1.
    """

    @typed
    def __init__(
        self,
        genotype: NB201Genotype,
        C: int,
        num_classes: int,
        layers: int,
        *,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        sizes = {"C": C, "num_classes": num_classes, "layers": layers, "in_channels": in_channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        )
        cells = list(nb201_stages(C, layers, lambda channels: NB201EvalCell(genotype, channels)))
        self.cells = nn.ModuleList(module for module, _ in cells)
        last = cells[-1][1]
        self.lastact = nb201_last(last)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> logits [N, num_classes]."""
        check_images("x", x, cast(nn.Conv2d, self.stem[0]).in_channels)
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return self.classifier(self.global_pooling(self.lastact(x)).flatten(1))
