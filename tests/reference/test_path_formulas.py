"""The specification of sample_paths against its formulas written out with torch's own logarithm."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastnas.reference import TOPOLOGIES, logits_per_node, sample_paths, sample_paths_grads
from fastnas.reference.gumbel import gumbel, gumbel_draw, portable_log
from fastnas.reference.skip_noise import philox_words

NODES = (2, 3, 4, 5)


def noise(rng: Tensor, ordinal: int, shape: tuple[int, ...]) -> Tensor:
    key, offset = rng.tolist()
    count = torch.Size(shape).numel()
    words = philox_words(key, offset + ordinal, -(-count // 4)).flatten()[:count]
    u = ((words >> 9).double() + 0.5) / 2**23
    return -torch.log(-torch.log(u)).view(shape)


def hard(soft: Tensor, count: int = 1) -> Tensor:
    return torch.zeros_like(soft).scatter(-1, soft.topk(count).indices, 1)


def spelled_out(
    alpha: Tensor, beta: Tensor | None, topology: str, tau: float, paths: int, rng: Tensor
) -> tuple[Tensor, Tensor]:
    """B, A one-hot, and B_st A_st at the executed entries."""
    At = F.softmax((F.log_softmax(alpha, -1) + noise(rng, 0, (paths, *alpha.shape))) / tau, -1)
    A = hard(At)
    A_st = ((A + At - At.detach()) * A).sum(-1)
    if beta is None:
        return A, A_st
    B, B_st = [], []
    g = noise(rng, 1, (paths, *beta.shape))
    rows = logits_per_node(NODES, topology)
    for n, logits, draw in zip(NODES, beta.split(rows, -1), g.split(rows, -1)):
        soft = F.softmax((F.log_softmax(logits, -1) + draw) / tau, -1)
        if topology == "top2":
            kept = hard(soft, 2)
            B.append(kept)
            B_st.append(kept if n == 2 else kept + soft - soft.detach())
        else:
            pair = hard(soft)
            of_edges = torch.zeros(soft.shape[-1], n, dtype=soft.dtype)
            for p, (i, k) in enumerate(itertools.combinations(range(n), 2)):
                of_edges[p, i] = of_edges[p, k] = 1
            B.append(pair @ of_edges)
            of_pair = ((pair + soft - soft.detach()) * pair).sum(-1, keepdim=True)
            B_st.append(B[-1] * of_pair)
    kept = torch.cat(B, -1)
    return A * kept[..., None], kept * torch.cat(B_st, -1) * A_st


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("tau", [0.3, 1.0, 10.0])
def test_values_and_gradients(topology: str, tau: float) -> None:
    alpha = torch.randn(2, 14, 7, dtype=torch.float64, requires_grad=True)
    beta = torch.randn(2, sum(logits_per_node(NODES, topology)), dtype=torch.float64)
    beta = None if topology == "none" else beta.requires_grad_()
    leaves = [t for t in (alpha, beta) if t is not None]
    rng = torch.tensor([-5, 2**61])
    A, want = spelled_out(alpha, beta, topology, tau, 6, rng)
    op, weight = sample_paths(alpha, beta, NODES, topology, tau, rng, 6)
    assert torch.equal(op, torch.where(A.sum(-1) > 0, A.argmax(-1), -1))
    assert torch.equal(weight, (op >= 0).double())
    torch.testing.assert_close(weight, want, rtol=0, atol=1e-15)
    dweight = torch.randn_like(weight)
    right = torch.autograd.grad(want, leaves, dweight)
    closed = sample_paths_grads(alpha, beta, NODES, topology, tau, rng, op, dweight)
    for exact, *others in zip(right, torch.autograd.grad(weight, leaves, dweight), closed):
        assert exact.abs().max() > 1e-3
        for other in others:
            torch.testing.assert_close(other, exact, rtol=1e-10, atol=1e-10)


def test_portable_log_is_the_logarithm() -> None:
    near_one = 1 + torch.randn(10_000).double() * 1e-7
    ends = torch.tensor([5e-300, 1.0, 5e300], dtype=torch.float64)
    many = torch.rand(200_000).double(), torch.randn(100_000).double().mul(20).exp()
    x = torch.cat([*many, near_one, ends])
    torch.testing.assert_close(portable_log(x), x.log(), rtol=1e-15, atol=2e-16)
    assert portable_log(torch.ones(1, dtype=torch.float64)).item() == 0


def test_noise_is_finite_at_both_ends() -> None:
    ends = gumbel(torch.tensor([2.0**-24, 1 - 2.0**-24], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([-2.8115, 16.6355]).double(), rtol=0, atol=1e-4)


def test_noise_is_standard_gumbel() -> None:
    """Mean gamma, variance pi^2/6, and P(g <= 0) = 1/e, to six sigma."""
    g = gumbel_draw(torch.tensor([3, 4]), 0, (1_000_000,))
    assert abs(float(g.mean()) - 0.5772157) < 6 * 1.2825e-3
    assert abs(float(g.var()) - 1.6449341) < 6 * 3.5e-3
    assert abs(float((g <= 0).double().mean()) - 0.3678794) < 6 * 4.9e-4
