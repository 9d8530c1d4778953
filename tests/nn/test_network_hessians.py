"""Second derivatives of whole networks are those of eager: Hessians, exact unrolled steps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from accelerated import network as public_network
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fastnas import nn as fused_nn
from fastnas import reference
from fastnas.dropin import accelerate
from fastnas.spaces import get_space

Loss = Callable[[nn.Module, dict[str, Tensor], list[Tensor], int], Tensor]
"""Of a network with such parameters and logits on the batch of that number."""


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (3,), generator=generator)


def of_a_space(name: str) -> tuple[nn.Module, nn.Module, list[Tensor], Loss]:
    """A network of the reference, the fused one with its values, logits and their loss."""
    space = get_space(name)
    cells = 1 if space.layout == "nb201" else 3
    eager = reference.SEARCH_NETWORKS[space.layout](space, 2, 10, cells).double()
    fused = fused_nn.SEARCH_NETWORKS[space.layout](space, 2, 10, cells).double()
    fused.load_state_dict(eager.state_dict())
    arch = fused_nn.ArchParameters(space, scale=1.0).double()
    kinds = list(arch.alphas())

    def loss(net: nn.Module, params: dict[str, Tensor], alphas: list[Tensor], seed: int) -> Tensor:
        images, labels = batch(seed)
        weights = {kind: alpha.softmax(-1) for kind, alpha in zip(kinds, alphas)}
        return cross_entropy(functional_call(net, params, (images, weights)), labels)

    return eager, fused, list(arch.parameters()), loss


def accelerated() -> tuple[nn.Module, nn.Module, list[Tensor], Loss]:
    """A network of the public code, and a copy of it that was accelerated."""
    eager = public_network()
    fused = copy.deepcopy(eager)
    assert accelerate(fused).replaced

    def loss(net: nn.Module, params: dict[str, Tensor], alphas: list[Tensor], seed: int) -> Tensor:
        images, labels = batch(seed)
        net.alphas_normal, net.alphas_reduce = alphas
        return cross_entropy(functional_call(net, params, (images,)), labels)

    return eager, fused, [t.detach() for t in eager.arch_parameters()], loss


NETWORKS = {
    "darts": lambda: of_a_space("S3"),
    "nb201": lambda: of_a_space("nb201"),
    "accelerated": accelerated,
}
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)


def params_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in net.named_parameters()}


def flat_hessian(net: nn.Module, logits: list[Tensor], loss: Loss) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the loss by all logits, row by row through `autograd.grad`.

    Of the Hessian every seventh row: each goes back through the whole network once more.
    """
    alphas = [t.detach().requires_grad_() for t in logits]
    first = torch.autograd.grad(loss(net, params_of(net), alphas, 0), alphas, create_graph=True)
    gradient = torch.cat([g.flatten() for g in first])
    rows = [torch.autograd.grad(g, alphas, retain_graph=True) for g in gradient[::7]]
    return gradient.detach(), torch.stack([torch.cat([h.flatten() for h in row]) for row in rows])


@EVERY_NETWORK
def test_the_hessian_of_the_architecture_is_that_of_eager(name: str) -> None:
    eager, fused, logits, loss = NETWORKS[name]()
    gradient, hessian = flat_hessian(fused, logits, loss)
    expected_gradient, expected = flat_hessian(eager, logits, loss)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)
    torch.testing.assert_close(hessian, expected, rtol=0, atol=1e-8)


def unrolled(net: nn.Module, logits: list[Tensor], loss: Loss) -> list[Tensor]:
    """d/dalpha L_valid(w - lr dL_train/dw, alpha), exactly (DARTS, eq. 7), and new weights."""
    alphas = [t.detach().requires_grad_() for t in logits]
    params = params_of(net)
    leaves = [*alphas, *params.values()]
    grads = torch.autograd.grad(
        loss(net, params, alphas, 0), list(params.values()), create_graph=True,
        materialize_grads=True,
    )  # fmt: skip
    moved = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads)}
    found = torch.autograd.grad(loss(net, moved, alphas, 1), leaves, materialize_grads=True)
    return list(found)


@EVERY_NETWORK
def test_the_unrolled_step_by_exact_products_is_that_of_eager(name: str) -> None:
    eager, fused, logits, loss = NETWORKS[name]()
    found, expected = unrolled(fused, logits, loss), unrolled(eager, logits, loss)
    assert max(float(t.abs().max()) for t in expected) > 1e-3
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
