"""Fits the Gaussian process of `Bayesian` by BoTorch; imported when it is needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from botorch.exceptions import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.kernels import CategoricalKernel
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.mlls import ExactMarginalLogLikelihood
from numpy.typing import NDArray
from torch import Tensor

LEAST_ERROR = 1e-4
"""Of a cell that makes no error: its logarithm is needed."""
LEAST_VARIANCE = 1e-12
MOST_STEPS = 50
"""Of the fit: further ones move length scales of operations that do not matter."""


class Process:
    """Holds the posterior of -log(error) at candidates; float64, on the CPU.

    Args:
        features: of what was observed, [n, D].
        accuracies: n of them, 0 to 1.
        candidates: features of the points asked for, [m, D].
        categorical: whether features are alike or not, and no more.
    """

    def __init__(
        self,
        features: NDArray[np.float64],
        accuracies: Sequence[float],
        candidates: NDArray[np.float64],
        categorical: bool,
    ) -> None:
        x = torch.as_tensor(features)
        error = (1 - torch.tensor(accuracies, dtype=torch.float64)).clamp_min(LEAST_ERROR)
        y = -error.log().unsqueeze(-1)
        # The priors of BoTorch's length scales and noise are for targets of mean 0 and deviation 1.
        y = (y - y.mean()) / y.std().clamp_min(1e-9)
        if categorical:
            kernel = CategoricalKernel(ard_num_dims=x.shape[1])
        else:
            kernel = get_covar_module_with_dim_scaled_prior(x.shape[1], use_rbf_kernel=False)
        # The targets are standardised above, so BoTorch's own outcome transform is off.
        model = SingleTaskGP(x, y, covar_module=kernel, outcome_transform=None)
        with warnings.catch_warnings():
            # A fit that stops early has hyperparameters better than those that it began with.
            warnings.simplefilter("ignore", OptimizationWarning)
            fit_gpytorch_mll(
                ExactMarginalLogLikelihood(model.likelihood, model),
                optimizer_kwargs={"options": {"maxiter": MOST_STEPS}},
            )
        self._kernel, self._candidates = model.covar_module, torch.as_tensor(candidates)
        with torch.no_grad():
            self._condition(x, y.squeeze(-1), model.mean_module.constant, model.likelihood.noise)

    def _condition(self, x: Tensor, y: Tensor, prior: Tensor, noise: Tensor) -> None:
        """Computes the posterior at the candidates.

        With K = L L^T of the observed points and R = L^-1 k(x, candidates) the mean is
        prior + R^T L^-1 (y - prior), the covariance k - R^T R.
        """
        covariance = self._kernel(x).to_dense()
        factor = torch.linalg.cholesky(covariance + noise * torch.eye(len(x), dtype=x.dtype))
        residual = (y - prior).unsqueeze(-1)
        across = self._kernel(x, self._candidates).to_dense()
        self._noise = noise
        self._rows = torch.linalg.solve_triangular(factor, across, upper=False)
        weights = torch.cholesky_solve(residual, factor)
        self._mean = prior + (across.T @ weights).squeeze(-1)
        self._best = (prior + covariance @ weights).max()
        prior_variance = self._kernel(x[:1]).to_dense().squeeze()  # stationary: the same everywhere
        self._variance = prior_variance - (self._rows**2).sum(0)

    @torch.no_grad()
    def believe(self, candidate: int) -> None:
        """Takes the posterior mean at a candidate for an observation, which leaves all means as
        they are: a row more in R."""
        one = self._candidates[candidate : candidate + 1]
        column = self._kernel(one, self._candidates).to_dense().squeeze(0)
        # This is the posterior covariance of the candidate with all others, k - R^T R.
        column = column - self._rows[:, candidate] @ self._rows
        row = column / (column[candidate] + self._noise).sqrt()
        self._rows = torch.cat([self._rows, row.unsqueeze(0)])
        self._variance = self._variance - row**2

    def log_improvement(self) -> Tensor:
        """Returns log expected improvement over the largest posterior mean observed, [m].

        log(sigma h(z)), z = (mean - best) / sigma, h(z) = phi(z) + z Phi(z).
        """
        # Rounding can make the variance at an observed point negative, and its root NaN.
        sigma = self._variance.clamp_min(LEAST_VARIANCE).sqrt()
        z = (self._mean - self._best) / sigma
        log_phi = -(z**2) / 2 - math.log(2 * math.pi) / 2
        near = log_phi.exp() + z * torch.special.ndtr(z)
        # Far below the incumbent the two terms cancel: h = phi (1 + z Phi / phi).
        ratio = math.sqrt(math.pi / 2) * torch.special.erfcx(-z / math.sqrt(2))
        far = log_phi + (1 + z * ratio).clamp_min(1e-300).log()
        return sigma.log() + torch.where(z > -1, near.log(), far)
