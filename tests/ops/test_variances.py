"""Variances at the ends of what they can be: beyond float32, and of a channel that is constant."""

from __future__ import annotations

from dataclasses import replace

import conv_cases
import edge_cases
import norm_cases
import pytest
import torch
from targets import Target
from torch import Tensor

from fastnas.ops import mixed_edges, mixed_norm_sum, relu_conv_bn

BEYOND = 1e20  # its square is no float32


def of_mixed_norm_sum(scale: float, backend: Target) -> Tensor:
    z = norm_cases.make((4, 3, 5, 5), [True], torch.float32, backend.device).z[0]
    return mixed_norm_sum([scale * z], z.new_ones(1), normed=[True], backend=backend.name)


def of_mixed_edges(scale: float, backend: Target, *names: str) -> Tensor:
    table = edge_cases.one_edge(2, *names)
    given = edge_cases.make(table, dtype=torch.float32, target=backend)
    x = [scale * given.x[0]]
    return mixed_edges(x, torch.ones_like(given.w), given.params, table, backend=backend.name)


def of_relu_conv_bn(scale: float, backend: Target) -> Tensor:
    given = conv_cases.make(1, dtype=torch.float32)
    return relu_conv_bn(scale * given.x, given.params, backend=backend.name)


@pytest.mark.filterwarnings("ignore:.*encountered in")  # NumPy's, in interpreted Triton
@pytest.mark.backends("cpu", "cuda-host", "triton")
def test_of_a_mixed_norm_sum_beyond_float32_is_nan_not_a_term_that_vanishes(
    backend: Target,
) -> None:
    assert of_mixed_norm_sum(1e15, backend).isfinite().all()
    assert of_mixed_norm_sum(BEYOND, backend).isnan().all()


@pytest.mark.backends("cpu", "cuda-host", "cuda")
@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "skip", "dil_3", "sep_3"])
def test_of_an_edge_beyond_float32_is_nan(backend: Target, name: str) -> None:
    assert of_mixed_edges(1e15, backend, name).isfinite().all()
    assert of_mixed_edges(BEYOND, backend, name).isnan().all()


@pytest.mark.backends("cpu", "cuda-host")
def test_of_a_relu_conv_bn_beyond_float32_is_nan(backend: Target) -> None:
    assert of_relu_conv_bn(1e15, backend).isfinite().all()
    assert of_relu_conv_bn(BEYOND, backend).isnan().all()


@pytest.mark.backends("eager", "cpu", "cuda-host")
@pytest.mark.parametrize("stride", [1, 2])
def test_of_a_constant_in_bfloat16_is_that_of_what_is_stored(backend: Target, stride: int) -> None:
    """y is 0 as in eager, not what rounding took from z times eps^-1/2."""
    given = conv_cases.make(stride, (6, 4), dtype=torch.bfloat16)
    constant = replace(given, x=torch.ones_like(given.x))
    got = conv_cases.check(constant, backend.name)
    assert not got["y"].any()
