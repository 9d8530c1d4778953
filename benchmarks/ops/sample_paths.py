"""Benchmarks sample_paths: cases, inputs, providers, and the fp64 results they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastnas import reference, sample_paths
from fastnas.benchmarks.harness.verify import EAGER, SEED, Exact, Problem, eps_of
from fastnas.benchmarks.ops.mixed_sum import fused_backends
from fastnas.ops import draw_rng
from fastnas.reference import logits_per_node
from fastnas.reference.sample_edges import edge_by_edge, gdas_tables

OP = "sample_paths"
NODES = (2, 3, 4, 5)  # a DARTS cell
TYPES = 2  # normal and reduction
OPERATIONS = 7  # S0 without `none`
TAU = 1.0
ROME_PATHS = 7  # K of the paper


@dataclass(frozen=True)
class SamplePathsCase:
    """Describes all edges of both cell types; "top2" is ROME v2, "pairs" ROME v1, "none" GDAS."""

    topology: str = "none"
    paths: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def op(self) -> str:
        return OP if self.topology == "none" else f"{OP}+{self.topology}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.paths, TYPES, sum(NODES), OPERATIONS)

    @property
    def K(self) -> int:
        return OPERATIONS

    def bytes_moved(self, pass_: str) -> None:
        """Returns None: of a few kilobytes, what takes time is how many calls there are."""

    def fma(self, pass_: str) -> None:
        """Returns None likewise."""

    def inputs(self, device: str) -> tuple[dict[str, Tensor], Tensor]:
        """Makes alpha, and beta where there is a topology, as leaves; and dweight."""
        generator = torch.Generator().manual_seed(SEED)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        leaves = {"dalpha": draw(*self.shape[1:]).requires_grad_()}
        if self.topology != "none":
            logits = sum(logits_per_node(NODES, self.topology))
            leaves["dbeta"] = draw(TYPES, logits).requires_grad_()
        return leaves, draw(*self.shape[:-1])

    def problem(self, device: str, full: bool) -> Problem:
        leaves, dweight = self.inputs(device)
        logits = list(leaves.values())
        forwards: dict[str, Callable[[], Tensor]] = {
            name: partial(forward, logits) for name, forward in self._eager().items()
        }
        for backend in fused_backends(device, self.dtype, OPERATIONS, OP):
            forwards[f"fastnas-{backend}"] = partial(self._fused, logits, backend)
        exact = partial(self._exact, logits, dweight)
        return Problem(leaves=leaves, dy=dweight, forwards=forwards, exact=exact)

    def _eager(self) -> dict[str, Callable[[Sequence[Tensor]], Tensor]]:
        """Runs GDAS as its public code, or an edge at a time, all there is for the topologies."""
        loop = {"eager-edges": self._edge_by_edge}
        if self.topology == "none":
            return {EAGER: self._tables} | loop
        return {EAGER: self._edge_by_edge}

    def _tables(self, logits: Sequence[Tensor]) -> Tensor:
        # GDAS' code draws one sample a pass, and waits for the device at every edge of it.
        return torch.stack([gdas_tables(logits[0], TAU)[1] for _ in range(self.paths)])

    def _edge_by_edge(self, logits: Sequence[Tensor]) -> Tensor:
        alpha, beta = logits[0], logits[1] if len(logits) > 1 else None
        drawn = [edge_by_edge(alpha, beta, NODES, self.topology, TAU) for _ in range(self.paths)]
        return torch.stack([weight for _, weight in drawn])

    def _fused(self, logits: Sequence[Tensor], backend: str) -> Tensor:
        sample = sample_paths(
            *logits, nodes=NODES, tau=TAU, topology=self.topology, paths=self.paths, backend=backend
        )
        return sample.weight

    def _exact(
        self, logits: Sequence[Tensor], dweight: Tensor, provider: str, y: Tensor
    ) -> dict[str, Exact]:
        """Repeats the provider's draw from the seed that it had, computed in fp64."""
        # `Problem.outputs` has set this seed before the provider drew.
        torch.manual_seed(SEED)
        wide = [t.detach().double().requires_grad_() for t in logits]
        if provider.startswith("fastnas"):
            rng = draw_rng(device=dweight.device)[0]
            beta = wide[1] if len(wide) > 1 else None
            cell = NODES, self.topology, TAU
            _, weight = reference.sample_paths(wide[0], beta, *cell, rng, self.paths)
        else:
            weight = self._eager()[provider](wide)
        found = torch.autograd.grad(weight, wide, dweight.double())
        eps = eps_of(self.dtype)
        results = {"y": weight.detach(), **dict(zip(("dalpha", "dbeta"), found))}
        return {name: Exact(t, eps * float(t.abs().max())) for name, t in results.items()}


def cases(device: str, quick: bool = False, full: bool = False) -> list[SamplePathsCase]:
    """Lists every topology with one path and as many as ROME takes; `quick` one of each."""
    if quick:
        return [SamplePathsCase(), SamplePathsCase("top2", ROME_PATHS)]
    paths = (1, ROME_PATHS, 32) if full else (1, ROME_PATHS)
    return [SamplePathsCase(topology, k) for topology in reference.TOPOLOGIES for k in paths]
