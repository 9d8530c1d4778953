"""Says what mixed_edges saves for backward, under each setting of `memory`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastnas.spaces import EdgeTable

MEMORY = ("fast", "lean", "minimal")
"""From what holds most to what computes most again."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class SavedTensors(NamedTuple):
    """Holds what forward leaves to backward; a tensor that is not wanted is empty.

    Halves are the depthwise -> pointwise -> batch norm parts of the convolutions.
    """

    stats: Tensor
    """[norms, 2, C] mean and biased variance, accumulation dtype."""
    shift: Tensor
    """[halves, C] minus the mean of the depthwise output; given statistics have no use for it."""
    gram: Tensor
    """[halves, C, C] its covariance: only where parameters need a gradient."""
    v: Tensor
    """[separable convolutions, N, H', W', C] inputs of the second halves."""
    u: Tensor
    """[5x5 and larger kernels, N, H', W', C] last depthwise outputs, centred."""
    z: Tensor
    """[dense 3x3 convolutions, N, H', W', C] their outputs."""
    inner: Tensor
    """[nodes that are no output, N, H', W', C], which are states of later edges."""
    std: Tensor
    """[skips] standard deviations that relative noise is scaled by, float64."""

    @staticmethod
    def empty(
        like: Tensor,
        table: EdgeTable,
        size: tuple[int, int, int, int],
        form: str,
        memory: str,
        keep_gram: bool,
        training: bool,
        sampled: bool = False,
    ) -> SavedTensors:
        """Allocates them unfilled, for nodes of `size` (N, C, rows, cols).

        Where `sampled`, each edge runs one candidate that only the device knows: there is room for
        any of them, and the statistics of those that do not run are zeros.
        """
        N, C, rows, cols = size
        wide = accumulation_dtype(like.dtype)
        edges = len(table.edges)
        # A sampled edge runs one candidate, a sep_conv at most, so two halves an edge are room for
        # any choice. What depends on the choice must not decide a shape, or a captured graph could
        # serve one sample only.
        halves = 2 * edges if sampled else table.halves
        # "lean" keeps the inputs v and dense outputs z, "fast" the outputs u too. Outside of
        # training backward is one sweep, which makes them again as it passes.
        inputs = (edges if sampled else table.separable) if training and memory != "minimal" else 0
        outputs = (edges if sampled else table.kept) if training and memory == "fast" else 0
        dense = table.kept_dense if training and memory != "minimal" else 0
        skips = (edges if sampled else table.skips) if form == "gaussian_additive" else 0

        def new(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=like.device)

        return SavedTensors(
            new(table.norms, 2, C, dtype=wide).zero_()
            if sampled
            else new(table.norms, 2, C, dtype=wide),
            new(halves if training else 0, C, dtype=wide),
            new(halves if keep_gram else 0, C, C, dtype=wide),
            new(inputs, N, rows, cols, C),
            new(outputs, N, rows, cols, C),
            new(dense, N, rows, cols, C),
            new(table.nodes - table.outputs, N, rows, cols, C),
            new(skips, dtype=torch.float64),
        )
