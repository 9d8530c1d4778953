"""Derivatives of every op beyond one backward pass are those of its reference.

Second and third derivatives, many gradients at once, `torch.func`, forward mode; and
`torch.compile` where no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import edge_cases
import norm_cases
import path_cases
import pytest
import torch
from cases import FORMS, make, noise_of
from targets import Target
from torch import Tensor
from torch.autograd import forward_ad

import fastnas
from fastnas import reference
from fastnas.ops import relu_conv_bn, sample_paths

pytestmark = pytest.mark.backends("eager", "cpu", "cuda-host", "cuda")
NAMES = ("max_pool", "skip", "sep_3", "dil_5")

Function = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, repr=False)
class Case:
    """An op and its reference as functions of the same leaves."""

    leaves: list[Tensor]
    op: Function
    reference: Function

    def tolerance(self) -> dict[str, float]:
        double = self.leaves[0].dtype == torch.float64
        return {"rtol": 1e-9, "atol": 1e-9} if double else {"rtol": 2e-3, "atol": 2e-3}


def mixed_sum(target: Target, form: str | None = None, layout: str = "contiguous") -> Case:
    noise = None if form is None else noise_of(form)
    given = make((2, 3, 2, 2), 3, target.widest("mixed_sum"), target.device,
                 noise=noise, noisy=[1] if form else [], layouts=[layout])  # fmt: skip
    # The same tensor in two places has two gradients.
    places = [0, 1, 1, 2]

    def op(leaves: Sequence[Tensor]) -> Tensor:
        w, *x = leaves
        return fastnas.mixed_sum([x[i] for i in places], w, noise=given.noise, noisy=given.noisy,
                                 level=given.level, rng=given.rng, backend=target.name)  # fmt: skip

    def by_reference(leaves: Sequence[Tensor]) -> Tensor:
        w, *x = leaves
        own = [x[i] for i in places]
        return reference.mixed_sum(own, w, given.noisy, given.form, given.level, given.rng)

    return Case([torch.cat([given.w, given.w[:1]]), *given.x], op, by_reference)


def mixed_norm_sum(target: Target, training: bool, form: str | None = None) -> Case:
    noise = None if form is None else noise_of(form)
    given = norm_cases.make((3, 2, 4), [True, False, True], target.widest("mixed_norm_sum"),
                            target.device, noise=noise, noisy=[1] if form else [],
                            training=training)  # fmt: skip

    def op(leaves: Sequence[Tensor]) -> Tensor:
        return norm_cases.call(given, leaves[1:], leaves[0], target.name)

    def by_reference(leaves: Sequence[Tensor]) -> Tensor:
        return reference.mixed_norm_sum(leaves[1:], leaves[0], given.normed, norm_cases.EPS,
                                        given.statistics, given.noisy, given.form, given.level,
                                        given.rng)  # fmt: skip

    return Case([given.w, *given.z], op, by_reference)


def mixed_edges(
    target: Target, stride: int, form: str | None = None, training: bool = True
) -> Case:
    noise = None if form is None else noise_of(form)
    given = edge_cases.make(edge_cases.cell(stride, 2, NAMES), (4, 5), C=2, noise=noise,
                            target=target)  # fmt: skip
    given = given if training else edge_cases.outside_of_training(given)
    running = None if training else given.initial_running()

    def op(leaves: Sequence[Tensor]) -> Tensor:
        return edge_cases.call(given.rebuilt(leaves), target.name, running=running)

    def by_reference(leaves: Sequence[Tensor]) -> Tensor:
        own = given.rebuilt(leaves)
        stats = torch.zeros(given.table.norms, 2, 2, dtype=leaves[0].dtype, device=target.device)
        stats = stats if given.statistics is None else given.statistics
        return reference.mixed_edges(own.x, own.w, own.params, own.table, stats, training=training,
                                     eps=edge_cases.EPS, form=form or "none", level=given.level,
                                     rng=given.rng)  # fmt: skip

    return Case(list(given.leaves.values()), op, by_reference)


def sampled_edges(target: Target) -> Case:
    """Two paths in one call; the weights of edges that a path lacks have no effect."""
    given = edge_cases.make(edge_cases.cell(1, 2, NAMES), (4, 5), C=2, N=4, target=target)
    choice = torch.tensor([[1, 2, -1, 3, 0], [3, -1, 2, 2, -1]], device=target.device)
    w, *rest = given.leaves.values()
    w = w[:2, :1].repeat(1, 5)

    def op(leaves: Sequence[Tensor]) -> Tensor:
        own = given.rebuilt(leaves)
        return fastnas.mixed_edges(own.x, own.w, own.params, own.table, choice=choice,
                                   backend=target.name)  # fmt: skip

    def by_reference(leaves: Sequence[Tensor]) -> Tensor:
        own = given.rebuilt(leaves)
        groups = []
        for i, row in enumerate(choice.tolist()):
            path = own.table.path(row)
            stats = torch.zeros(path.table.norms, 2, 2, dtype=w.dtype, device=target.device)
            groups.append(
                reference.mixed_edges(
                    [x.chunk(2)[i] for x in own.x],
                    own.w[i][list(path.edges), None],
                    [own.params[j] for j in path.params],
                    path.table,
                    stats,
                )
            )
        return torch.cat(groups)

    return Case([w, *rest], op, by_reference)


def preprocessing(target: Target, stride: int, training: bool = True) -> Case:
    dtype = target.widest("relu_conv_bn")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(target.device, dtype)

    params = [normal(4 // stride, 3, 1, 1) for _ in range(stride)]

    given = torch.linspace(0.2, 1.2, 8, dtype=dtype, device=target.device).view(2, 4)

    def op(leaves: Sequence[Tensor]) -> Tensor:
        running = None if training else (given[0], given[1])
        return relu_conv_bn(leaves[0], leaves[1:], running=running, training=training,
                            backend=target.name)  # fmt: skip

    def by_reference(leaves: Sequence[Tensor]) -> Tensor:
        return reference.relu_conv_bn(leaves[0], leaves[1:], given.clone(), training=training)

    return Case([normal(2, 3, 5, 4), *params], op, by_reference)


def paths(target: Target, topology: str) -> Case:
    dtype = target.widest("sample_paths")
    given = path_cases.make_paths(topology, (2, 3), 3, (2,), 2, dtype).to(target.device)

    def op(leaves: Sequence[Tensor]) -> Tensor:
        alpha, *beta = leaves
        own = replace(given, alpha=alpha, beta=beta[0] if beta else None)
        return path_cases.draw(own, target.name).weight

    def by_reference(leaves: Sequence[Tensor]) -> Tensor:
        alpha, *beta = leaves
        return reference.sample_paths(alpha, beta[0] if beta else None, given.nodes, topology,
                                      given.tau, given.rng, given.paths)[1]  # fmt: skip

    return Case([t.detach() for t in given.logits], op, by_reference)


CASES: dict[str, Callable[[Target], Case]] = {
    "mixed_sum": mixed_sum,
    **{f"mixed_sum {form}": lambda t, form=form: mixed_sum(t, form) for form in FORMS},
    "mixed_sum channels last": lambda t: mixed_sum(t, layout="channels_last"),
    "mixed_norm_sum": lambda t: mixed_norm_sum(t, True),
    "mixed_norm_sum evaluation": lambda t: mixed_norm_sum(t, False),
    "mixed_norm_sum noise": lambda t: mixed_norm_sum(t, True, "uniform_multiplicative"),
    "mixed_edges": lambda t: mixed_edges(t, 1),
    "mixed_edges stride 2": lambda t: mixed_edges(t, 2),
    "mixed_edges noise": lambda t: mixed_edges(t, 1, "gaussian_multiplicative"),
    "mixed_edges evaluation": lambda t: mixed_edges(t, 2, training=False),
    "mixed_edges sampled": sampled_edges,
    "relu_conv_bn": lambda t: preprocessing(t, 1),
    "relu_conv_bn stride 2": lambda t: preprocessing(t, 2),
    "relu_conv_bn evaluation": lambda t: preprocessing(t, 1, False),
    **{
        f"sample_paths {topology}": lambda t, topology=topology: paths(t, topology)
        for topology in ("none", "top2", "pairs")
    },
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


def second(f: Function, leaves: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Gradients of the leaves that need them, then the derivative of their product with v.

    By `torch.autograd.grad(inputs=...)` of the leaves and of the cotangent dy.
    """
    own = [t.detach().requires_grad_(need) for t, need in zip(leaves, needs)]
    y = f(own)
    generator = torch.Generator().manual_seed(1)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    dy = normal(y).requires_grad_()
    wanted = [t for t in own if t.requires_grad]
    grads = torch.autograd.grad(y, wanted, dy, create_graph=True, materialize_grads=True)
    product = torch.stack([(g * normal(g)).sum() for g in grads]).sum()
    again = torch.autograd.grad(product, [*wanted, dy], materialize_grads=True)
    return [t.detach() for t in (*grads, *again)]


def assert_alike(got: Sequence[Tensor], want: Sequence[Tensor], case: Case) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, **case.tolerance())


@EVERY_CASE
def test_second_derivatives(backend: Target, name: str) -> None:
    case = CASES[name](backend)
    every = [True] * len(case.leaves)
    got = second(case.op, case.leaves, every)
    assert any(t.abs().max() > 1e-3 for t in got[len(every) :])
    assert_alike(got, second(case.reference, case.leaves, every), case)


@pytest.mark.parametrize(
    "name", ["mixed_sum gaussian_additive", "mixed_norm_sum", "mixed_norm_sum evaluation",
             "mixed_edges", "mixed_edges evaluation", "relu_conv_bn stride 2", "sample_paths top2"]
)  # fmt: skip
def test_of_each_leaf_alone(backend: Target, name: str) -> None:
    """What is saved depends on which gradients are wanted."""
    case = CASES[name](backend)
    for i in range(min(len(case.leaves), 6)):
        needs = [i == j for j in range(len(case.leaves))]
        got = second(case.op, case.leaves, needs)
        assert_alike(got, second(case.reference, case.leaves, needs), case)


def loss_of(f: Function, leaves: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """A number that is not linear in the first leaf."""
    return lambda first: f([first, *leaves[1:]]).pow(3).sum()


HESSIANS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "autograd": torch.autograd.functional.hessian,
    "autograd vectorized": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "autograd forward over reverse": lambda f, x: torch.autograd.functional.hessian(
        f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "torch.func": lambda f, x: torch.func.hessian(f)(x),
    "torch.func reverse": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
}
VECTORIZED = ("autograd vectorized", "autograd forward over reverse")


@pytest.mark.backends("eager", "cpu")
@EVERY_CASE
def test_hessians(backend: Target, name: str) -> None:
    """By each of torch's ways that can do it for the reference.

    `vmap` lacks rules for backward passes of convolutions and pools: the op fails there as well.
    """
    case = CASES[name](backend)
    first = case.leaves[0].detach()
    want = torch.autograd.functional.hessian(loss_of(case.reference, case.leaves), first)
    scale = want.abs().max().clamp(min=1)
    assert scale > 1 or want.abs().max() > 1e-3
    for how, hessian in HESSIANS.items():
        if how in VECTORIZED and name.startswith("mixed_edges"):
            for f in (case.reference, case.op):
                with pytest.raises(RuntimeError, match=r"vmap|Batching rule"):
                    hessian(loss_of(f, case.leaves), first)
            continue
        got = hessian(loss_of(case.op, case.leaves), first)
        torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=1e-10, msg=how)


@pytest.mark.backends("eager", "cpu")
@EVERY_CASE
def test_forward_mode(backend: Target, name: str) -> None:
    case = CASES[name](backend)

    def tangent(f: Function) -> Tensor:
        with forward_ad.dual_level():
            first = forward_ad.make_dual(case.leaves[0].detach(), torch.ones_like(case.leaves[0]))
            return forward_ad.unpack_dual(f([first, *case.leaves[1:]])).tangent

    assert_alike([tangent(case.op)], [tangent(case.reference)], case)


@pytest.mark.backends("eager", "cpu")
@pytest.mark.parametrize("name", ["mixed_sum", "mixed_edges", "relu_conv_bn", "sample_paths top2"])
def test_third_derivatives(backend: Target, name: str) -> None:
    case = CASES[name](backend)

    def third(f: Function) -> Tensor:
        first = case.leaves[0].detach().requires_grad_()
        found = loss_of(f, case.leaves)(first)
        for _ in range(3):
            (g,) = torch.autograd.grad(found, first, create_graph=True)
            found = g.pow(2).sum()
        return g.detach()

    want = third(case.reference)
    scale = want.abs().max()
    assert scale > 0
    torch.testing.assert_close(third(case.op) / scale, want / scale, rtol=0, atol=1e-9)


@EVERY_CASE
def test_a_backward_pass_with_a_graph_accumulates(backend: Target, name: str) -> None:
    """`.backward(create_graph=True)`, then a backward pass through the gradients."""
    case = CASES[name](backend)

    def accumulated(f: Function) -> Tensor:
        first = case.leaves[0].detach().requires_grad_()
        (g,) = torch.autograd.grad(f([first, *case.leaves[1:]]).square().sum(), first,
                                   create_graph=True)  # fmt: skip
        g.square().sum().backward()
        assert first.grad is not None
        return first.grad

    got, want = accumulated(case.op), accumulated(case.reference)
    scale = want.abs().max().clamp(min=1)
    assert_alike([got / scale], [want / scale], case)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("mode", ["no_grad", "nothing needs a gradient"])
@EVERY_CASE
def test_compiles_where_no_gradient_is_wanted(backend: Target, name: str, mode: str) -> None:
    case = CASES[name](backend)
    if name == "mixed_edges sampled":
        pytest.skip("the choice is read on the host, which breaks the graph")
    torch._dynamo.reset()  # the limit of recompilations is one of the code, shared by all cases
    compiled = torch.compile(lambda *leaves: case.op(leaves), fullgraph=True, backend="aot_eager")
    leaves = [t.detach().requires_grad_(mode == "no_grad") for t in case.leaves]
    with torch.set_grad_enabled(mode != "no_grad"):
        y = compiled(*leaves)
        assert not y.requires_grad
        torch.testing.assert_close(y, case.op(leaves))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("terms", range(1, 9))
def test_any_number_of_terms_compiles_without_a_gradient(backend: Target, terms: int) -> None:
    torch._dynamo.reset()
    given = make((2, 3), terms, torch.float32)
    f = torch.compile(lambda x, w: fastnas.mixed_sum(x, w), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(given.x, given.w), fastnas.mixed_sum(given.x, given.w))


@pytest.mark.backends("cpu")
def test_sampled_operations_have_no_gradient_of_their_own(backend: Target) -> None:
    """`op` is an index: it stays an integer without history under every transform."""
    alpha = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    sample = sample_paths(alpha, nodes=(2, 3), tau=1.0, backend=backend.name)
    (g,) = torch.autograd.grad(sample.weight.square().sum(), alpha, create_graph=True)
    assert g.requires_grad
    assert not sample.op.requires_grad
