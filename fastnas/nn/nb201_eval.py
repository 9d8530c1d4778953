"""Builds the evaluation network of NAS-Bench-201: a cell of 6 edges, stacked in three stages.

Source: Dong & Yang, ICLR 2020, arXiv 2001.00326, section 2.1 and figure 1; D-X-Y/AutoDL-Projects
``xautodl/models/cell_infers``, whose state-dict names it keeps (``cells.0.layers.3.op.1.weight``,
``cells.5.conv_a.op.2.bias``, ``cells.5.downsample.1.weight``, ``lastact.0.weight``).
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, cast

from torch import Tensor, nn

from fastnas.checks import typed
from fastnas.layers.nb201 import nb201_last, nb201_operation, nb201_stages
from fastnas.reference.arguments import check_images
from fastnas.spaces import CellType, NB201Genotype


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
            # Layers stand edge by edge in the order of the nodes, which is that of the public
            # names.
            first, *rest = [next(layers)(states[i]) for i in sources]
            states.append(sum(rest, first))
        return states[-1]


class NB201EvalNetwork(nn.Module):
    """Builds the evaluation network of a NAS-Bench-201 cell, for images of any size.

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

    layout: ClassVar[str] = "nb201"
    """Of the genotypes that it takes."""

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

    def edges(self) -> Iterator[tuple[CellType, Iterable[nn.Module]]]:
        """Yields each cell's type, and its operations in the order of the genotype."""
        return (("normal", c.layers) for c in self.cells if isinstance(c, NB201EvalCell))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to logits [N, num_classes]."""
        check_images("x", x, cast(nn.Conv2d, self.stem[0]).in_channels)
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return self.classifier(self.global_pooling(self.lastact(x)).flatten(1))
