"""Hyper-gradients against a bilevel problem whose answer is known in closed form."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch

from fastnas.strategies.hypergradient import first_order, unrolled
from fastnas.strategies.precision import HalfStep, LossScale, Precision

N, M = 5, 3


@dataclass
class Toy:
    """What the hypergradients ask of an `ArchStep`."""

    params: list
    alphas: list
    train_loss: Callable
    valid_loss: Callable
    buffers: Callable
    optimizer: torch.optim.SGD
    precision: HalfStep = field(default_factory=HalfStep)


def sgd(w, buffer, lr=0.05, momentum=0.9, weight_decay=0.01):
    optimizer = torch.optim.SGD([w], lr, momentum=momentum, weight_decay=weight_decay)
    optimizer.state[w]["momentum_buffer"] = buffer
    return optimizer


@pytest.fixture
def toy():
    """L_train = 1/2 ||A w - B alpha||^2, L_val = 1/2 ||C w - t||^2 + 1/2 ||alpha||^2, in fp64.

    grad_w L_train = A^T (A w - B alpha), so d(grad_w L_train)/d(alpha) = -A^T B.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B, C, t = normal(N, N), normal(N, M), normal(N, N), normal(N)
    w, alpha = normal(N).requires_grad_(), normal(M).requires_grad_()
    buffer, stat = normal(N), normal(2)

    def train_loss(exact=False):
        stat.add_(1)
        return 0.5 * (A @ w - B @ alpha).square().sum()

    def valid_loss():
        return 0.5 * (C @ w - t).square().sum() + 0.5 * alpha.square().sum()

    problem = Toy([w], [alpha], train_loss, valid_loss, lambda: [stat], sgd(w, buffer))
    return problem, A, B, C, t, buffer


def test_first_order(toy):
    problem, *_ = toy
    (gradient,), loss = first_order(problem)
    torch.testing.assert_close(gradient, problem.alphas[0].detach())
    assert not loss.requires_grad
    assert problem.params[0].requires_grad


def closed_form(problem, A, B, C, t, buffer):
    w, alpha = problem.params[0].detach(), problem.alphas[0].detach()
    settings = problem.optimizer.param_groups[0]
    xi, momentum, decay = (settings[name] for name in ("lr", "momentum", "weight_decay"))
    ahead = w - xi * (momentum * buffer + A.T @ (A @ w - B @ alpha) + decay * w)
    v = C.T @ (C @ ahead - t)
    return alpha - xi * (-(A.T @ B).T @ v)


def test_unrolled_equals_the_closed_form(toy):
    problem, *rest = toy
    (gradient,), loss = unrolled(problem)
    torch.testing.assert_close(gradient, closed_form(problem, *rest), rtol=1e-9, atol=1e-9)
    assert not loss.requires_grad


def test_unrolled_is_not_first_order(toy):
    problem, *_ = toy
    (a,), _ = first_order(problem)
    (b,), _ = unrolled(problem)
    assert (a - b).abs().max() > 1e-2


def test_unrolled_puts_params_and_buffers_back_bit_for_bit(toy):
    problem, *_ = toy
    before = [t.detach().clone() for t in (*problem.params, *problem.buffers())]
    unrolled(problem)
    assert all(torch.equal(a, b) for a, b in zip(before, (*problem.params, *problem.buffers())))
    assert problem.params[0].grad is None and problem.alphas[0].grad is None


def test_unrolled_puts_them_back_when_a_loss_raises(toy):
    problem, *_ = toy
    calls = []

    def failing(exact=False):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return problem.train_loss()

    broken = replace(problem, train_loss=failing)
    before = problem.params[0].detach().clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        unrolled(broken)
    assert torch.equal(before, problem.params[0])
    assert problem.params[0].requires_grad and problem.alphas[0].requires_grad


def test_momentum_and_weight_decay_matter(toy):
    problem, *_, buffer = toy
    full = unrolled(problem)[0][0]
    for change in ({"momentum": 0.0}, {"weight_decay": 0.0}, {"lr": 0.01}):
        optimizer = sgd(*problem.params, buffer, **change)
        other = unrolled(replace(problem, optimizer=optimizer))[0][0]
        assert (full - other).abs().max() > 1e-6


def test_logits_without_effect_get_zero(toy):
    problem, *_ = toy
    idle = torch.ones(2, dtype=torch.float64, requires_grad=True)
    wider = replace(problem, alphas=[*problem.alphas, idle])
    for gradient in (first_order, unrolled):
        assert torch.equal(gradient(wider)[0][1], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("gradient", [first_order, unrolled])
def test_a_scaled_loss_has_the_gradient_of_the_loss(toy, gradient):
    """To the bit, as the scale is a power of two; w' and eps of the unrolled step included."""
    problem, *_ = toy
    plain, _ = gradient(problem)
    problem.precision.scaling = LossScale()
    scaled, loss = gradient(problem)
    assert all(map(torch.equal, plain, scaled))
    assert torch.equal(loss, gradient(problem)[1])


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_the_second_order_term_outlasts_a_narrow_dtype(name):
    """Its finite difference runs in float32: in bf16 it would be off by 0.57, in fp16 by 0.32."""
    found = {}
    for precision in ("fp32", name):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(*sizes) for sizes in ((8, 256), (256, 256), (256, 4))]
        alpha = torch.tensor([0.3, -0.2], requires_grad=True)
        x, y = torch.randn(2, 16, 8), torch.randint(4, (2, 16))
        half = Precision(precision).logits

        def loss(i, exact=False, half=half, layers=layers, alpha=alpha, x=x, y=y):
            with nullcontext() if exact else half.autocast():
                h, w = layers[0](x[i]), alpha.softmax(0)
                for layer in layers[1:]:
                    h = layer(w[0] * h.relu() + w[1] * h.tanh())
                return torch.nn.functional.cross_entropy(h, y[i])

        params = [p for layer in layers for p in layer.parameters()]
        toy = Toy(
            params, [alpha], partial(loss, 0), partial(loss, 1), list,
            torch.optim.SGD(params, 0.5), half,
        )  # fmt: skip
        found[precision] = unrolled(toy)[0][0] - first_order(toy)[0][0]
    wanted = found["fp32"]
    assert (found[name] - wanted).norm() < 0.02 * wanted.norm()
