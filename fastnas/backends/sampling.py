"""sample_paths on the backends with kernels: contiguous inputs, one allocation per output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnas.backends.address import addresses, laid_out
from fastnas.backends.native_edges import DTYPE_TAGS
from fastnas.reference import TOPOLOGIES


class PathDraw(NamedTuple):
    """What paths are drawn from, and again in backward; tau is float64 []."""

    alpha: Tensor
    beta: Tensor | None
    nodes: list[int]
    topology: str
    tau: Tensor
    rng: Tensor

    def laid_out(self) -> PathDraw:
        """As kernels can read it."""
        beta = None if self.beta is None else laid_out(self.beta)
        return self._replace(
            alpha=laid_out(self.alpha), beta=beta, tau=laid_out(self.tau), rng=laid_out(self.rng)
        )

    def addresses(self, paths: int) -> tuple[Any, ...]:
        """As the compiled kernels take it."""
        edges, ops = self.alpha.shape[-2:]
        return (
            DTYPE_TAGS[self.alpha.dtype],
            paths,
            self.alpha.numel() // (edges * ops),
            self.nodes,
            ops,
            TOPOLOGIES.index(self.topology),
            *addresses((self.alpha, self.beta, self.tau, self.rng), self.alpha.device),
        )


class FusedSampling:
    """Allocates; subclasses launch."""

    def launch_sample_paths_fwd(self, draw: PathDraw, op: Tensor, weight: Tensor) -> None:
        """Fills op and weight."""
        raise NotImplementedError

    def launch_sample_paths_bwd(
        self, draw: PathDraw, op: Tensor, dweight: Tensor, dalpha: Tensor, dbeta: Tensor
    ) -> None:
        """Fills dalpha, and dbeta where there is a beta."""
        raise NotImplementedError

    def sample_paths_fwd(self, draw: PathDraw, paths: int) -> tuple[Tensor, Tensor]:
        alpha = draw.alpha
        shape = (paths, *alpha.shape[:-1])
        op = torch.empty(shape, dtype=torch.int64, device=alpha.device)
        weight = torch.empty(shape, dtype=alpha.dtype, device=alpha.device)
        self.launch_sample_paths_fwd(draw.laid_out(), op, weight)
        return op, weight

    def sample_paths_bwd(
        self, draw: PathDraw, op: Tensor, dweight: Tensor
    ) -> tuple[Tensor, Tensor]:
        draw = draw.laid_out()
        dalpha = torch.empty_like(draw.alpha)
        dbeta = dalpha.new_empty(0) if draw.beta is None else torch.empty_like(draw.beta)
        self.launch_sample_paths_bwd(draw, laid_out(op), laid_out(dweight), dalpha, dbeta)
        return dalpha, dbeta
