"""sample_paths and autograd: which gradients, what is saved, opcheck, torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_check import opcheck
from path_cases import DARTS, PathInputs, draw, make_paths, run
from targets import Target
from torch import Tensor

from fastnas.backends.calls import PathsCall
from fastnas.ops import PathSample, draw_rng, sample_paths
from fastnas.ops.sample_paths import SAMPLE_PATHS
from fastnas.reference import TOPOLOGIES

OP = "sample_paths"
EVERY_TOPOLOGY = pytest.mark.parametrize("topology", TOPOLOGIES)
# Interpreted kernels are slow, and tracing is the same for every backend.
pytestmark = pytest.mark.backends("eager", "cpu", "cuda-host", "cuda")


def small(backend: Target, topology: str) -> PathInputs:
    return make_paths(topology, (2, 3), 3, (2,), 2, torch.float32).to(backend.device)


@pytest.mark.parametrize("alpha_needs", [True, False])
@pytest.mark.parametrize("beta_needs", [True, False])
def test_every_subset_of_gradients(backend: Target, alpha_needs: bool, beta_needs: bool) -> None:
    inputs = small(backend, "top2")
    assert inputs.beta is not None
    every = run(inputs, backend.name)
    inputs.alpha.requires_grad_(alpha_needs)
    inputs.beta.requires_grad_(beta_needs)
    sample = draw(inputs, backend.name)
    assert not sample.op.requires_grad
    assert sample.weight.requires_grad == (alpha_needs or beta_needs)
    if not sample.weight.requires_grad:
        assert sample.weight.grad_fn is None
        return
    sample.weight.backward(inputs.dweight)
    for name, leaf, needed in (("dalpha", inputs.alpha, alpha_needs),
                               ("dbeta", inputs.beta, beta_needs)):  # fmt: skip
        assert (leaf.grad is not None) == needed
        if leaf.grad is not None:
            assert torch.equal(leaf.grad.cpu(), every[name])


@EVERY_TOPOLOGY
def test_what_is_saved_is_tiny(backend: Target, topology: str) -> None:
    """The logits themselves, op, and of temperature and noise 24 bytes."""
    inputs = small(backend, topology)
    for leaf in inputs.logits:
        leaf.requires_grad_()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sample = draw(inputs, backend.name)
    kept_at = {t.data_ptr() for t in (*inputs.logits, sample.op)}
    others = [t for t in saved if t.data_ptr() not in kept_at]
    assert sum(t.nbytes for t in others) == 24


def test_gradients_accumulate(backend: Target) -> None:
    inputs = small(backend, "pairs")
    once = run(inputs, backend.name)
    inputs.alpha.requires_grad_()
    for _ in range(2):
        draw(inputs, backend.name).weight.backward(inputs.dweight)
    assert inputs.alpha.grad is not None
    torch.testing.assert_close(inputs.alpha.grad.cpu(), 2 * once["dalpha"])


@EVERY_TOPOLOGY
def test_opcheck(backend: Target, topology: str) -> None:
    inputs = small(backend, topology)
    tau = torch.full((), 0.7, dtype=torch.float64, device=backend.device)
    call = PathsCall(inputs.alpha, inputs.beta, list(inputs.nodes), topology, tau, inputs.rng,
                     inputs.paths)  # fmt: skip
    needs = [[True, inputs.beta is not None], [False, inputs.beta is not None]]
    opcheck(SAMPLE_PATHS, call, inputs.dweight, needs, backend.name)


def step(
    topology: str, backend: str | None
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor | None], PathSample]:
    def f(alpha: Tensor, beta: Tensor | None, tau: Tensor, rng: Tensor | None) -> PathSample:
        sample = sample_paths(alpha * 2, beta, nodes=DARTS, tau=tau, topology=topology, paths=2,
                              rng=rng, backend=backend)  # fmt: skip
        return PathSample(sample.op + 1, sample.weight.square())

    return f


def results(
    f: Callable[..., PathSample], inputs: PathInputs, rng: Tensor | None
) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs.logits]
    tau = torch.full((), 0.7, device=inputs.alpha.device)
    op, weight = f(leaves[0], leaves[1] if len(leaves) > 1 else None, tau, rng)
    return op, weight.detach(), *torch.autograd.grad(weight, leaves, inputs.dweight)


@EVERY_TOPOLOGY
def test_compiles_to_a_full_graph(backend: Target, topology: str) -> None:
    torch._dynamo.reset()
    inputs = make_paths(topology, dtype=torch.float32).to(backend.device)
    f = step(topology, backend.name)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got, want = results(compiled, inputs, inputs.rng), results(f, inputs, inputs.rng)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.backends("cpu", "cuda")
def test_compiled_paths_without_a_stream_are_fresh_every_time(backend: Target) -> None:
    torch._dynamo.reset()
    inputs = make_paths("top2", dtype=torch.float32).to(backend.device)
    compiled = torch.compile(step("top2", backend.name), fullgraph=True, backend="aot_eager")

    def seeded(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [results(compiled, inputs, None)[0] for _ in range(2)]

    first, second = seeded(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, seeded(1)[0])


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_compiles_with_inductor(backend: Target) -> None:
    torch._dynamo.reset()
    inputs = make_paths("pairs", dtype=torch.float32).to(backend.device)
    rng = draw_rng(device=torch.device(backend.device))[0]
    f = step("pairs", backend.name)
    got = results(torch.compile(f, fullgraph=True), inputs, rng)
    for a, b in zip(got, results(f, inputs, rng)):
        torch.testing.assert_close(a, b)


@pytest.mark.backends("eager", "cpu", "cuda-host", "triton")
@pytest.mark.parametrize("topology", ["none", "top2", "pairs"])
@pytest.mark.parametrize("index", [-1, -(2**40), 3, 2**40], ids=["none", "below", "O", "above"])
def test_an_op_overwritten_from_outside_is_not_followed(
    backend: Target, topology: str, index: int
) -> None:
    """Through `.data`, which autograd does not see: what is no operation gets no gradient."""
    alpha = torch.randn(5, 3, requires_grad=True)
    beta = {"none": None, "top2": torch.randn(5), "pairs": torch.randn(4)}[topology]
    leaves = [alpha] if beta is None else [alpha, beta.requires_grad_()]
    sample = sample_paths(
        alpha, beta, nodes=(2, 3), tau=1.0, topology=topology, backend=backend.name
    )
    sample.op.data.fill_(index)
    grads = torch.autograd.grad(sample.weight.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    if index < 0:
        assert not any(g.any() for g in grads)
