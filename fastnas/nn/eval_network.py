"""Builds the DARTS evaluation network: a genotype's cells stacked, trained from scratch.

Source: quark0/darts ``cnn/model.py`` (``NetworkCIFAR``), whose state-dict names it keeps; nodes
with other than two edges after xiaomi-automl/FairDARTS ``fairdarts/model.py`` (``DCOCell``).
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnas.checks import check_number, typed
from fastnas.layers.primitives import (
    FactorizedReduce,
    Identity,
    ReLUConvBN,
    drop_path,
    primitive,
)
from fastnas.reference.arguments import check_images
from fastnas.spaces import CellType, Genotype


class EvalCell(nn.Module):
    """s_j = sum over the edges (op, i) into node j of op(s_i); y = concat_j s_j: one cell.

    s_0 and s_1 are the outputs of the two cells before, brought to C channels and one size
    by ReLU-conv-BN or :class:`FactorizedReduce`. In a reduction cell the edges that leave them
    have stride 2. In training drop path acts on every edge but identities, as in DARTS;
    FairDARTS drops whole nodes.

    Nodes without a state (:meth:`Genotype.live_nodes`) are left out of the concatenation, and
    edges that leave one are not built.

    Args:
        genotype: the architecture.
        C_prev_prev, C_prev: channels of the two inputs.
        C: channels of each node.
        reduction: whether this is a reduction cell.
        reduction_prev: whether the cell before was, so that the first input is twice as large.

    Attributes:
        multiplier: the number of concatenated nodes; y has ``multiplier * C`` channels.

    Raises:
        ValueError: no concatenated node has a state, or an operation is not known.
    """

    def __init__(
        self,
        genotype: Genotype,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
    ) -> None:
        super().__init__()
        cell: CellType = "reduce" if reduction else "normal"
        self.cell_type = cell
        live = genotype.live_nodes(cell)
        self._concat = tuple(node for node in genotype.concat(cell) if node in live)
        self.multiplier = len(self._concat)
        if not self._concat:
            raise ValueError(
                f"the {cell} cell has no output: no edge reaches any of the nodes "
                f"{list(genotype.concat(cell))} that it concatenates"
            )
        self.preprocess0: nn.Module = (
            FactorizedReduce(C_prev_prev, C)
            if reduction_prev
            else ReLUConvBN(C_prev_prev, C, 1, 1, 0)
        )
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)
        # An edge out of a node without a state has nothing to read.
        edges = [edge for edge in genotype.edges(cell) if edge[2] in (0, 1, *live)]
        self._ends = tuple((node, source) for _, node, source in edges)
        self._ops = nn.ModuleList(
            primitive(op, C, 2 if reduction and source < 2 else 1, affine=True)
            for op, _, source in edges
        )

    def forward(self, s0: Tensor, s1: Tensor, drop_prob: float) -> Tensor:
        """Maps [N, C_prev_prev, H', W'], [N, C_prev, H, W] to [N, multiplier C, H or H/2, ...]."""
        states = {0: self.preprocess0(s0), 1: self.preprocess1(s1)}
        for op, (node, source) in zip(self._ops, self._ends):
            h = op(states[source])
            if self.training and drop_prob > 0.0 and not isinstance(op, Identity):
                h = drop_path(h, drop_prob)
            # This must not be in place: h may be the identity's output, which is a state that
            # others read.
            states[node] = states[node] + h if node in states else h
        return torch.cat([states[node] for node in self._concat], dim=1)


class _AuxiliaryPool(nn.Module):
    """Reduces x to 2x2 by the 5x5 mean of DARTS at stride 3, or else by adaptive mean pooling.

    The former gives 2x2 for 8 to 10 pixels a side: a 32x32 image has 8 here.
    """

    def forward(self, x: Tensor) -> Tensor:
        # (size - 5) // 3 + 1 is 2 for 8, 9 and 10.
        if all(8 <= size <= 10 for size in x.shape[2:]):
            return F.avg_pool2d(x, 5, stride=3)
        return F.adaptive_avg_pool2d(x, 2)


class AuxiliaryHead(nn.Module):
    """Maps [N, C, H, W] to [N, num_classes]: the auxiliary classifier.

    relu, pool to 2x2, 1x1 convolution to 128, BN, relu, 2x2 convolution to 768, BN, relu, linear.
    On 8x8 maps, which DARTS assumes, it equals the public head; other sizes are pooled to 2x2
    adaptively instead of failing. No relu is in place: the public head rectifies the features
    it reads, which shows in networks of up to 3 cells, where the classifier reads them next.
    """

    def __init__(self, C: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            _AuxiliaryPool(),
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class EvalNetwork(nn.Module):
    """Builds the evaluation network of a genotype, for images of any size.

    A stem (3x3 convolution to 3C channels, BN), ``layers`` cells with affine batch norm,
    global mean pooling and a linear classifier. Cells ``layers // 3`` and ``2 * layers // 3``
    are reductions, which halve the size and double the channels.

    Args:
        genotype: the architecture.
        C: channels of a node in the first cell; 36 in DARTS on CIFAR-10.
        num_classes: outputs.
        layers: number of cells; 20 in DARTS on CIFAR-10.
        in_channels: of the images.
        auxiliary: whether to add the auxiliary classifier after the second reduction. Its
            loss is weighted by the caller (0.4 in DARTS).
        drop_path: the drop-path probability, see :attr:`drop_path`.

    Raises:
        TypeError: ``genotype`` is not a :class:`Genotype`.
        ValueError: a size below 1, a drop-path probability outside [0, 1), or
            a genotype with an unknown operation or no output.
    """

    layout: ClassVar[str] = "darts"
    """Of the genotypes that it takes."""

    @typed
    def __init__(
        self,
        genotype: Genotype,
        C: int,
        num_classes: int,
        layers: int,
        *,
        in_channels: int = 3,
        auxiliary: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"C": C, "num_classes": num_classes, "layers": layers, "in_channels": in_channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.drop_path = drop_path
        self._auxiliary_at = 2 * layers // 3
        reductions = (layers // 3, self._auxiliary_at)
        C_stem = 3 * C
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, C_stem, 3, padding=1, bias=False), nn.BatchNorm2d(C_stem)
        )
        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, reduction_prev = C_stem, C_stem, False
        for i in range(layers):
            reduction = i in reductions
            C *= 2 if reduction else 1
            cell = EvalCell(genotype, C_prev_prev, C_prev, C, reduction, reduction_prev)
            self.cells.append(cell)
            C_prev_prev, C_prev, reduction_prev = C_prev, cell.multiplier * C, reduction
            if auxiliary and i == self._auxiliary_at:
                # `C_prev` is the channels of this cell's output here, after the second reduction.
                C_auxiliary = C_prev
        self.auxiliary_head = AuxiliaryHead(C_auxiliary, num_classes) if auxiliary else None
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)

    @property
    def drop_path(self) -> float:
        """Returns the probability with which a sample loses an edge in training; set as it grows.

        DARTS raises it linearly, to 0.2 at the last epoch.
        """
        return self._drop_path

    @drop_path.setter
    def drop_path(self, p: float) -> None:
        check_number("drop_path", p)
        if not 0.0 <= p < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {p}")
        self._drop_path = float(p)

    def edges(self) -> Iterator[tuple[CellType, Iterable[nn.Module]]]:
        """Yields each cell's type, and its operations in the order of the genotype."""
        return ((cast(EvalCell, c).cell_type, cast(EvalCell, c)._ops) for c in self.cells)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps [N, in_channels, H, W] to logits [N, num_classes], and those of the auxiliary
        classifier in training where there is one, else None."""
        check_images("x", x, cast(nn.Conv2d, self.stem[0]).in_channels)
        auxiliary = None
        s0 = s1 = self.stem(x)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path)
            if self.auxiliary_head is not None and self.training and i == self._auxiliary_at:
                auxiliary = self.auxiliary_head(s1)
        return self.classifier(self.global_pooling(s1).flatten(1)), auxiliary


@typed
def count_parameters(module: nn.Module, exclude_auxiliary: bool = True) -> int:
    """Counts the parameters of a module.

    Args:
        module: any module.
        exclude_auxiliary: leave out those with "auxiliary" in their name, as DARTS papers do.
    """
    named: Iterable[tuple[str, nn.Parameter]] = module.named_parameters()
    return sum(p.numel() for name, p in named if not (exclude_auxiliary and "auxiliary" in name))
