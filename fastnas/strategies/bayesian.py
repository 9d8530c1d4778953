"""Bayesian optimisation with a Gaussian process, of cells or of distributions over operations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastnas.strategies.black_box import ANASOD, BlackBox, Observation
from fastnas.strategies.domains import Domain, Point

LEAST_ERROR = 1e-4
"""Of a cell that makes no error: its logarithm is needed."""
POOL, TOPS = 1000, 5
"""Random points, and best observed ones whose neighbours join them, where not all are listed."""


class Bayesian(BlackBox):
    """Proposes the points of the largest expected improvement under a Gaussian process.

    Its target is -log(error), standardised; its kernel Matern-5/2 of distributions, of cells that
    of the Hamming distance, with a length scale for each feature; its noise is learned, and of
    distributions takes up what wiring changes. The incumbent is the largest posterior mean at an
    observed point, for a lucky cell is no proof of its distribution. Points of a batch, and those
    that are being evaluated, count as if their posterior mean had been observed.

    Options:
        initial: random points before the first fit.
    """

    name = "bo"
    source = "log expected improvement: Ament et al., NeurIPS 2023, arXiv 2310.20708"
    options = {"initial": 10}

    initial: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.initial < 2:
            raise ValueError(f"initial is {self.initial}; at least 2 is needed")
        _botorch()

    def propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int = 1
    ) -> list[Observation]:
        known = [(one.point, one.value) for one in past if one.value is not None]
        first = max(0, self.initial - len(past))
        found = [Observation(domain.random(rng)) for _ in range(min(count, first))]
        if len(found) == count:
            return found
        if len(known) < 2:  # the first points are all being evaluated
            return [*found, *(Observation(domain.random(rng)) for _ in range(count - len(found)))]
        pending = [one.point for one in past if one.value is None]
        pending += [one.point for one in found]
        values = [float(value) for _, value in known if value is not None]
        points = domain.features([point for point, _ in known])
        process = Process(points, values, categorical=domain.is_categorical)
        if pending:
            process.believe(domain.features(pending))
        candidates = self._candidates(domain, known, rng)
        taken = set() if domain.is_noisy else {one.point for one in past}
        while len(found) < count:
            left = [point for point in candidates if point not in taken] or candidates
            features = domain.features(left)
            best = left[_argmax(process.improvement(features), rng)]
            found.append(Observation(best))
            if not domain.is_noisy:
                taken.add(best)
            if len(found) < count:
                process.believe(domain.features([best]))
        return found

    def _candidates(
        self, domain: Domain, known: Sequence[tuple[Point, float | None]], rng: np.random.Generator
    ) -> list[Point]:
        listed = domain.everything()
        if listed is not None:
            return listed
        tops = sorted(known, key=lambda pair: -(pair[1] or 0.0))[:TOPS]
        near = [near for point, _ in tops for near in [point, *domain.neighbours(point)]]
        drawn = [domain.random(rng) for _ in range(POOL)]
        return list(dict.fromkeys([*near, *drawn]))


class Process:
    """A Gaussian process of -log(error) on observed features; float64, on the CPU.

    Args:
        features: [n, D].
        accuracies: n of them, 0 to 1.
        categorical: whether features are alike or not, and no more.
    """

    def __init__(
        self, features: NDArray[np.float64], accuracies: Sequence[float], categorical: bool
    ) -> None:
        botorch = _botorch()
        self._x = torch.as_tensor(features)
        error = (1 - torch.tensor(accuracies, dtype=torch.float64)).clamp_min(LEAST_ERROR)
        y = -error.log().unsqueeze(-1)
        D = self._x.shape[1]
        if categorical:
            kernel = botorch.CategoricalKernel(ard_num_dims=D)
        else:
            kernel = botorch.distances.get_covar_module_with_dim_scaled_prior(
                D, use_rbf_kernel=False
            )
        y = (y - y.mean()) / y.std().clamp_min(1e-9)
        self._model = botorch.SingleTaskGP(self._x, y, covar_module=kernel, outcome_transform=None)
        with warnings.catch_warnings():
            # A fit that stops early has hyperparameters better than those that it began with.
            warnings.simplefilter("ignore", botorch.OptimizationWarning)
            botorch.fit(botorch.MarginalLikelihood(self._model.likelihood, self._model))

    def believe(self, features: NDArray[np.float64]) -> None:
        """Takes the posterior means at these points for observations."""
        x = torch.as_tensor(features)
        self._model = self._model.condition_on_observations(x, self._mean(x))

    def improvement(self, features: NDArray[np.float64]) -> Tensor:
        """Log expected improvement over the largest posterior mean at an observed point, [n]."""
        best = self._mean(self._x).max()
        acquisition = _botorch().LogExpectedImprovement(self._model, best_f=best)
        with torch.no_grad():
            return acquisition(torch.as_tensor(features).unsqueeze(1))

    def _mean(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._model.posterior(x).mean


def _argmax(values: Tensor, rng: np.random.Generator) -> int:
    """Of equal ones a random one."""
    best = torch.nonzero(values == values.max()).flatten()
    return int(best[rng.integers(len(best))])


def _botorch() -> Any:
    """The parts of BoTorch that are used; ValueError where it is not installed."""
    global _parts
    if _parts is None:
        try:
            _parts = _Parts()
        except ImportError as error:
            raise ValueError(
                "Bayesian optimisation needs BoTorch: install fastnas[blackbox]"
            ) from error
    return _parts


class _Parts:
    def __init__(self) -> None:
        from botorch.acquisition import LogExpectedImprovement
        from botorch.exceptions import OptimizationWarning
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.models.kernels import CategoricalKernel
        from botorch.models.utils import gpytorch_modules
        from gpytorch.mlls import ExactMarginalLogLikelihood

        self.LogExpectedImprovement = LogExpectedImprovement
        self.OptimizationWarning = OptimizationWarning
        self.fit = fit_gpytorch_mll
        self.SingleTaskGP = SingleTaskGP
        self.CategoricalKernel = CategoricalKernel
        self.distances = gpytorch_modules
        self.MarginalLikelihood = ExactMarginalLogLikelihood


_parts: _Parts | None = None


class AnasodBayesian(Bayesian):
    """ANASOD-BO: Bayesian optimisation on the simplex."""

    name = "anasod-bo"
    source = ANASOD
    options: ClassVar = {**Bayesian.options, "concentration": 1.0}
    on_distributions = True
