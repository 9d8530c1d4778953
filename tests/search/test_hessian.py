"""The dominant eigenvalue: known spectra, and full Hessians of real networks by the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastnas import nn as fused_nn
from fastnas import reference
from fastnas.search.hessian import PRODUCTS, dominant_eigenvalue, hessian_products
from fastnas.spaces import Space, get_space

SIZES = (14 * 7 * 2, 14 * 8 * 2)
"""Logits of two cells of 14 edges, without and with `none`: the matrices of RobustDARTS."""


def spectra(size: int) -> dict[str, torch.Tensor]:
    """Eigenvalues, of which the largest is known; few of a real Hessian are not near 0."""
    i = torch.arange(size, dtype=torch.float64)
    tail = 0.02 * torch.cos(i)
    several = tail.clone()
    several[:4] = torch.tensor([0.7, 0.69, 0.685, 0.3], dtype=torch.float64)
    negative = 0.3 * 0.6**i
    negative[-3:] = torch.tensor([-0.5, -0.8, -1.2], dtype=torch.float64)
    return {
        "falling": 0.5 * 0.7**i,
        "slowly falling": 0.5 / (1 + i),
        "three close together": several,
        "larger negative ones": negative,
        "all negative": torch.where(i == 0, -0.1, -0.5 - i / size),
        "one": torch.cat([torch.tensor([2.0], dtype=torch.float64), torch.zeros(size - 1)]),
    }


def with_spectrum(values: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(square)
    return q @ torch.diag(values) @ q.T


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", spectra(20))
def test_within_a_hundredth_in_twenty_products(name: str, size: int) -> None:
    values = spectra(size)[name]
    for seed in range(3):
        matrix, calls = with_spectrum(values, seed), []

        def product(v: torch.Tensor) -> torch.Tensor:
            calls.append(v)  # noqa: B023
            return matrix @ v  # noqa: B023 - it is called within the loop

        found = dominant_eigenvalue(product, size, seed=seed)
        true = float(values.max())
        assert abs(found.value - true) <= 0.01 * abs(true)
        assert found.products == len(calls) <= PRODUCTS
        # A Ritz value is never above, and an eigenvalue lies within the error.
        assert found.value <= true + 1e-12
        assert float((values - found.value).abs().min()) <= found.error + 1e-12


def test_it_ends_as_soon_as_the_residual_is_small() -> None:
    matrix = with_spectrum(spectra(196)["falling"], 0)
    loose, tight = (dominant_eigenvalue(lambda v: matrix @ v, 196, t) for t in (0.1, 1e-9))
    assert loose.products < tight.products < PRODUCTS
    assert tight.value == pytest.approx(0.5, rel=1e-9)
    assert loose.error <= 0.1 * loose.value


def test_it_says_so_where_twenty_products_do_not_suffice() -> None:
    values = torch.linspace(0, 1, 224, dtype=torch.float64)
    matrix = with_spectrum(values, 0)
    found = dominant_eigenvalue(lambda v: matrix @ v, 224, 1e-6)
    assert found.products == PRODUCTS
    assert found.error > 1e-6 and float((values - found.value).abs().min()) <= found.error


@pytest.mark.parametrize(("matrix", "value"), [
    ([[0.0, 0.0], [0.0, 0.0]], 0.0),
    ([[-3.0]], -3.0),
    ([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]], 2.0),
    ([[0.0, 1.0], [1.0, 0.0]], 1.0),
])  # fmt: skip
def test_small_matrices_are_exact(matrix: list[list[float]], value: float) -> None:
    A = torch.tensor(matrix, dtype=torch.float64)
    found = dominant_eigenvalue(lambda v: A @ v, len(A), 1e-12)
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.error <= 1e-9 and found.products <= len(A)


def test_a_product_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="product 1 with the matrix is not finite"):
        dominant_eigenvalue(lambda v: v * float("nan"), 3)


def two_nodes() -> Space:
    """S0 with cells of 5 edges: 80 logits, whose full Hessian is quick to form."""
    edges = 5
    whole = get_space("S0")
    return replace(
        whole, name="two nodes", normal=whole.normal[:edges], reduce=whole.reduce[:edges]
    )


@pytest.mark.parametrize(("space", "cells"), [(two_nodes(), 3), (get_space("nb201"), 1)])
def test_the_hessian_of_a_network_is_that_of_eager(space: Space, cells: int) -> None:
    sizes = (space, 2, 10, cells)
    eager = reference.SEARCH_NETWORKS[space.layout](*sizes).double()
    fused = fused_nn.SEARCH_NETWORKS[space.layout](*sizes).double()
    fused.load_state_dict(eager.state_dict())
    arch = fused_nn.ArchParameters(space, scale=1.0).double()
    logits = list(arch.parameters())
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    for network in (eager, fused):
        for p in network.parameters():
            p.requires_grad_(False)

    def loss(network: torch.nn.Module) -> torch.Tensor:
        weights = {cell: alpha.softmax(-1) for cell, alpha in arch.alphas().items()}
        return cross_entropy(network(images, weights), labels)

    gradient = torch.autograd.grad(loss(eager), logits, create_graph=True, materialize_grads=True)
    rows = [
        torch.autograd.grad(g, logits, retain_graph=True, materialize_grads=True)
        if g.requires_grad else [torch.zeros_like(t) for t in logits]
        for part in gradient for g in part.flatten()
    ]  # fmt: skip
    full = torch.stack([torch.cat([h.flatten() for h in row]) for row in rows])
    true = float(torch.linalg.eigvalsh((full + full.T) / 2)[-1])
    product = hessian_products(loss(fused), logits)
    v = torch.randn(len(full), dtype=torch.float64)
    torch.testing.assert_close(product(v), full @ v, rtol=1e-7, atol=1e-10)
    found = dominant_eigenvalue(product, len(full))
    assert true > 1e-3
    assert found.value == pytest.approx(true, rel=0.01) and found.products <= PRODUCTS
