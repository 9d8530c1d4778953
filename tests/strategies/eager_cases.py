"""A small problem in float64, and the eager network that a method's equations are written on."""

import torch
from torch.nn import functional as F

from fastnas import nn, reference
from fastnas.search.bilevel import Bilevel
from fastnas.spaces import get_space
from fastnas.strategies import get_strategy

LAYERS = {"darts": 3, "nb201": 1}


def problem(method, space="S3", **options):
    """A `Bilevel` in float64 whose weight gradient is not clipped, and an eager twin's network."""
    torch.manual_seed(1)
    strategy = get_strategy(method, **options)
    searched = strategy.space(get_space(space))
    layout = searched.layout
    built = strategy.network_space(searched)
    network = nn.SEARCH_NETWORKS[layout](built, 2, 4, LAYERS[layout]).double()
    arch = nn.ArchParameters(searched, 1.0).double()
    params = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=3e-4)
    alphas = torch.optim.Adam(arch.parameters(), 0.01, betas=(0.5, 0.999))
    step = Bilevel(network, arch, strategy, params, alphas, grad_clip=1e9)
    eager = reference.SEARCH_NETWORKS[layout](built, 2, 4, LAYERS[layout]).double()
    eager.load_state_dict(network.state_dict())
    return step, eager


def batches():
    """A validation and a training batch."""
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(4, (3,), generator=generator),
        )
        for _ in "ab"
    ]


def eager_loss(eager, weights, batch):
    return F.cross_entropy(eager(batch[0], weights), batch[1])


def softmax(arch):
    return {cell: torch.softmax(alpha, -1) for cell, alpha in arch.alphas().items()}


def assert_gradients(tensors, expected):
    """Their `grad` is what is expected, to 1e-10 of the largest."""
    largest = max(float(e.abs().max()) for e in expected if e is not None)
    assert largest > 0
    for tensor, e in zip(tensors, expected, strict=True):
        given = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        e = torch.zeros_like(tensor) if e is None else e
        torch.testing.assert_close(given, e, rtol=1e-10, atol=1e-10 * largest)
