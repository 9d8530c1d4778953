"""Implements DrNAS (Chen et al., ICLR 2021, arXiv 2006.10355): mixing weights of a distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.distributions.dirichlet import _Dirichlet_backward

from fastnas.bounds import Bounds
from fastnas.checks import check_type
from fastnas.nn import ArchParameters
from fastnas.ops import draw_rng
from fastnas.options import option
from fastnas.strategies.mixture import Mixture


class DrNAS(Mixture):
    """Draws the mixing weights of every edge from a Dirichlet distribution that the logits set.

    w ~ Dir(c),  c = elu(alpha) + 1,  and the genotype is that of the mean, c / sum c

    Each half of a step draws once, for all cells of a type; the logits get the pathwise derivative
    of the draw (`torch.distributions.Dirichlet.rsample`). The supernet is validated on the mean,
    where the released code draws. That code ranks edges by softmax(alpha); within an edge it and
    the mean rank alike.

    The anchor is Dir(1). As in that code it is kept near by the weight decay of the logits
    (`arch_weight_decay`), or by kl_weight times the sum over edges of KL(Dir(c) || Dir(1)), beside
    which that code has no weight decay.

    Its progressive learning (partial channels that widen, candidates that are dropped halfway) is
    not here: this is the search that it calls K = 1. In the DARTS space its rates are those with
    partial channels.
    """

    name = "drnas"
    source = "Chen et al., ICLR 2021, arXiv 2006.10355"
    drops_none = True
    layout_defaults = {
        "darts": {"lr": 0.1, "lr_min": 0.0, "arch_lr": 6e-4},
        "nb201": {"epochs": 100},
    }

    kl_weight: float = option(
        0.0, "weight of the divergence from the anchor (0: weight decay alone)", Bounds(0, 1e6)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._drawn: Tensor | None = None

    def mixing_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        """Returns the means of the distributions."""
        check_type("arch", arch, ArchParameters)
        found = {cell: concentration(alpha) for cell, alpha in arch.alphas().items()}
        return {cell: c / c.sum(-1, keepdim=True) for cell, c in found.items()}

    def draw(self) -> Tensor:
        """Returns the seed of a draw, int64 [1]."""
        return draw_rng()[0, :1]

    def begin(self, drawn: Tensor | None) -> None:
        self._drawn = drawn

    def forward_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        """Returns the draw of a half of a step, the same at every call until the next begins."""
        seed = int(self.draw() if self._drawn is None else self._drawn)
        generator = torch.Generator().manual_seed(seed)
        return {
            cell: dirichlet(concentration(alpha), generator)
            for cell, alpha in arch.alphas().items()
        }

    def regulariser(self, arch: ArchParameters) -> Tensor | float:
        if self.kl_weight == 0:
            return 0.0
        found = [concentration(alpha) for alpha in arch.alphas().values()]
        apart = [
            kl_divergence(
                Dirichlet(c, validate_args=False),
                Dirichlet(torch.ones_like(c), validate_args=False),
            ).sum()
            for c in found
        ]
        return self.kl_weight * torch.stack(apart).sum()

    def not_capturable(self) -> str | None:
        return super().not_capturable() or "drnas draws its mixing weights on the host"


def concentration(alpha: Tensor) -> Tensor:
    """Returns elu(alpha) + 1, as exp(alpha) below 0: the sum would be 0 from -17 on in float32."""
    return torch.where(alpha > 0, alpha + 1, alpha.clamp(max=0).exp())


def dirichlet(c: Tensor, generator: torch.Generator) -> Tensor:
    """Draws w [E, K] of Dir(c), edge by edge, with its pathwise derivative by c.

    On the host, whatever the device: one seed gives one search, and processes that have the same
    logits have the same draw.
    """
    w = torch._sample_dirichlet(c.detach().cpu(), generator=generator)
    found: Tensor = _Pathwise.apply(c, w.to(c.device))
    return found


class _Pathwise(torch.autograd.Function):
    """Gives w of Dir(c) the derivative by c that torch's own `rsample` has."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(c, w)
        return w.clone()

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, None]:
        c, w = ctx.saved_tensors
        return _Dirichlet_backward(w, c, dw), None
