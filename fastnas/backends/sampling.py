"""sample_paths on the backends with kernels: contiguous inputs, one allocation per output."""

from __future__ import annotations

import torch
from torch import Tensor


class FusedSampling:
    """Allocates; subclasses launch."""

    def launch_sample_paths_fwd(
        self,
        alpha: Tensor,
        beta: Tensor | None,
        tau: Tensor,
        rng: Tensor,
        nodes: list[int],
        topology: str,
        op: Tensor,
        weight: Tensor,
    ) -> None:
        """Fills op and weight."""
        raise NotImplementedError

    def launch_sample_paths_bwd(
        self,
        dweight: Tensor,
        op: Tensor,
        alpha: Tensor,
        beta: Tensor | None,
        tau: Tensor,
        rng: Tensor,
        nodes: list[int],
        topology: str,
        dalpha: Tensor,
        dbeta: Tensor,
    ) -> None:
        """Fills dalpha, and dbeta unless beta is None."""
        raise NotImplementedError

    def sample_paths_fwd(
        self,
        alpha: Tensor,
        beta: Tensor | None,
        tau: Tensor,
        rng: Tensor,
        nodes: list[int],
        topology: str,
        paths: int,
    ) -> tuple[Tensor, Tensor]:
        shape = (paths, *alpha.shape[:-1])
        op = torch.empty(shape, dtype=torch.int64, device=alpha.device)
        weight = torch.empty(shape, dtype=alpha.dtype, device=alpha.device)
        alpha, rng = alpha.contiguous(), rng.contiguous()
        beta = None if beta is None else beta.contiguous()
        self.launch_sample_paths_fwd(alpha, beta, tau, rng, nodes, topology, op, weight)
        return op, weight

    def sample_paths_bwd(
        self,
        dweight: Tensor,
        op: Tensor,
        alpha: Tensor,
        beta: Tensor | None,
        tau: Tensor,
        rng: Tensor,
        nodes: list[int],
        topology: str,
    ) -> tuple[Tensor, Tensor]:
        alpha, rng, dweight = alpha.contiguous(), rng.contiguous(), dweight.contiguous()
        beta = None if beta is None else beta.contiguous()
        dalpha = torch.empty_like(alpha)
        dbeta = alpha.new_empty(0) if beta is None else torch.empty_like(beta)
        self.launch_sample_paths_bwd(
            dweight, op, alpha, beta, tau, rng, nodes, topology, dalpha, dbeta
        )
        return dalpha, dbeta
