"""What a search method is: three answers to the loop, and the options that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastnas.nn import ArchParameters
from fastnas.reference import SkipNoise
from fastnas.spaces import Genotype, Space
from fastnas.strategies.derivation import derive_top_edges
from fastnas.strategies.hypergradient import Problem, first_order, unrolled


class Strategy:
    """DARTS with the hooks that its descendants override.

    The loop asks: which mixing weights for this step (`mixing_weights`), what gradient for the
    logits (`arch_gradient`, with `regulariser` in its loss), which genotype (`derive`).

    A method is one file with a subclass, and one line in `fastnas.strategies.STRATEGIES`.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Paper and arXiv number."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options of the method and their defaults: fields of `SearchConfig` that others reject."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Where the method's published setting departs from the config's defaults."""
    drops_none: ClassVar[bool] = False
    """Whether the method searches the space without its `none` operation."""
    alpha_scale: ClassVar[float] = 1e-3
    alpha_betas: ClassVar[tuple[float, float]] = (0.5, 0.999)

    def __init__(self, **options: Any) -> None:
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            allowed = ", ".join(sorted(self.options)) or "none"
            raise ValueError(
                f"{', '.join(unknown)} given, which method {self.name} does not take; its options:"
                f" {allowed}"
            )
        for option, default in self.options.items():
            setattr(self, option, options.get(option, default))

    def space(self, space: Space) -> Space:
        """The space that the method searches in `space`."""
        offered = {name for edge in space.normal + space.reduce for name in edge}
        return space.without("none") if self.drops_none and "none" in offered else space

    def skip_noise(self) -> SkipNoise | None:
        """Noise on the skip connections of the search network."""
        return None

    def noise_amplitude(self, epoch: int, epochs: int) -> float:
        """r of the noise in an epoch."""
        return 1.0

    def skip_drop_probability(self) -> float:
        """Drop-path on the skip connections of the search network."""
        return 0.0

    def mixing_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        """Cell type to w [E, K], a differentiable function of the logits: softmax (DARTS eq. 2)."""
        return {cell: torch.softmax(alpha, dim=-1) for cell, alpha in arch.alphas().items()}

    def regulariser(self, arch: ArchParameters) -> Tensor | float:
        """Added to the loss of the architecture step."""
        return 0.0

    def arch_gradient(self, problem: Problem) -> tuple[list[Tensor], Tensor]:
        """Gradient for the logits, in the order of problem.alphas, and the validation loss."""
        return unrolled(problem) if getattr(self, "order", 1) == 2 else first_order(problem)

    def derive(self, arch: ArchParameters, space: Space) -> Genotype:
        """The architecture that the logits stand for."""
        with torch.no_grad():
            return derive_top_edges(self.mixing_weights(arch), space)


def check_order(order: int) -> None:
    if order not in (1, 2):
        raise ValueError(f"order is {order}; 1 (first order) and 2 (unrolled) are allowed")
