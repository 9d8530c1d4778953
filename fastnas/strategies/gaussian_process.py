"""The Gaussian process of `Bayesian`, by BoTorch; imported when it is needed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.exceptions import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.gpytorch import BatchedMultiOutputGPyTorchModel
from botorch.models.kernels import CategoricalKernel
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.mlls import ExactMarginalLogLikelihood
from numpy.typing import NDArray
from torch import Tensor

LEAST_ERROR = 1e-4
"""Of a cell that makes no error: its logarithm is needed."""


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
        self._x = torch.as_tensor(features)
        error = (1 - torch.tensor(accuracies, dtype=torch.float64)).clamp_min(LEAST_ERROR)
        y = -error.log().unsqueeze(-1)
        D = self._x.shape[1]
        if categorical:
            kernel = CategoricalKernel(ard_num_dims=D)
        else:
            kernel = get_covar_module_with_dim_scaled_prior(D, use_rbf_kernel=False)
        y = (y - y.mean()) / y.std().clamp_min(1e-9)
        self._model: BatchedMultiOutputGPyTorchModel
        self._model = SingleTaskGP(self._x, y, covar_module=kernel, outcome_transform=None)
        with warnings.catch_warnings():
            # A fit that stops early has hyperparameters better than those that it began with.
            warnings.simplefilter("ignore", OptimizationWarning)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(self._model.likelihood, self._model))

    def believe(self, features: NDArray[np.float64]) -> None:
        """Takes the posterior means at these points for observations."""
        x = torch.as_tensor(features)
        self._model = self._model.condition_on_observations(x, self._mean(x))

    def improvement(self, features: NDArray[np.float64]) -> Tensor:
        """Log expected improvement over the largest posterior mean at an observed point, [n]."""
        best = self._mean(self._x).max()
        acquisition = LogExpectedImprovement(self._model, best_f=best)
        with torch.no_grad():
            return acquisition(torch.as_tensor(features).unsqueeze(1))

    def _mean(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._model.posterior(x).mean
