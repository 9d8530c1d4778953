"""sample_paths on the backends with kernels: contiguous inputs, one allocation per output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

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

    def contiguous(self) -> PathDraw:
        if all(t is None or t.is_contiguous() for t in (self.alpha, self.beta, self.rng)):
            return self
        beta = None if self.beta is None else self.beta.contiguous()
        return self._replace(alpha=self.alpha.contiguous(), beta=beta, rng=self.rng.contiguous())

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
            self.alpha.data_ptr(),
            0 if self.beta is None else self.beta.data_ptr(),
            self.tau.data_ptr(),
            self.rng.data_ptr(),
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
        self.launch_sample_paths_fwd(draw.contiguous(), op, weight)
        return op, weight

    def sample_paths_bwd(
        self, draw: PathDraw, op: Tensor, dweight: Tensor
    ) -> tuple[Tensor, Tensor]:
        draw = draw.contiguous()
        dalpha = torch.empty_like(draw.alpha)
        dbeta = dalpha.new_empty(0) if draw.beta is None else torch.empty_like(draw.beta)
        self.launch_sample_paths_bwd(draw, op.contiguous(), dweight.contiguous(), dalpha, dbeta)
        return dalpha, dbeta
