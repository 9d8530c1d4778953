"""mixed_sum and autograd: which gradients, what is saved, opcheck, gradcheck, torch.compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import FORMS, Inputs, check, make, noise_of, run
from op_check import opcheck
from targets import Target

import fastnas
from fastnas.backends.calls import Noise, SumCall
from fastnas.ops import draw_rng
from fastnas.ops.mixed_sum import MIXED_SUM
from fastnas.reference import SkipNoise

OP = "mixed_sum"
NOISE = [None, *FORMS]


def small(backend: Target, form: str | None) -> Inputs:
    noise = None if form is None else noise_of(form)
    return make(
        (2, 3, 4, 5), 3, torch.float32, backend.device, noise=noise, noisy=[1] if form else []
    )


@pytest.mark.parametrize("form", [None, "gaussian_multiplicative"])
def test_every_subset_of_gradients(backend: Target, form: str | None) -> None:
    inputs = small(backend, form)
    for needs in itertools.product([False, True], repeat=4):
        got = check(inputs, backend.name, needs)
        found = [t is not None for t in (got.dw, *got.dx)]
        assert found == list(needs)


def call(inputs: Inputs, backend: str, w_needs: bool, x_needs: bool) -> torch.Tensor:
    """mixed_sum on the tensors themselves, not on detached ones."""
    for t, need in ((inputs.w, w_needs), *((t, x_needs) for t in inputs.x)):
        t.requires_grad_(need)
    return fastnas.mixed_sum(inputs.x, inputs.w, noise=inputs.noise, noisy=inputs.noisy,
                             level=inputs.level, rng=inputs.rng, backend=backend)  # fmt: skip


@pytest.mark.parametrize("form", NOISE)
@pytest.mark.parametrize(("w_needs", "x_needs"), [(True, True), (True, False), (False, True)])
def test_nothing_but_inputs_is_saved(
    backend: Target, form: str | None, w_needs: bool, x_needs: bool
) -> None:
    """w, the terms if dw is wanted, and of the noise 16 bytes each of level, rng, std."""
    inputs = small(backend, form)
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(inputs, backend.name, w_needs, x_needs)
    kept = [inputs.w, *(inputs.x if w_needs else [])]
    kept_at = {t.data_ptr() for t in kept}
    found = [t for t in saved if t.numel() and t.data_ptr() in kept_at]
    others = [t for t in saved if t.numel() and t.data_ptr() not in kept_at]
    assert {t.data_ptr() for t in found} == kept_at
    assert len(found) == len(kept)
    if form is None:
        assert not others
    assert sum(t.nbytes for t in others) <= 16 + 16 + 8
    assert all(t.dtype in (torch.float64, torch.int64) for t in others)


def test_no_graph_where_no_gradient_is_wanted(backend: Target) -> None:
    inputs = small(backend, None)
    assert call(inputs, backend.name, False, False).grad_fn is None
    with torch.no_grad():
        assert call(inputs, backend.name, True, True).grad_fn is None


@pytest.mark.parametrize("w_needs", [True, False])
def test_a_term_changed_in_place_is_noticed_if_it_is_needed(backend: Target, w_needs: bool) -> None:
    inputs = small(backend, None)
    inputs = replace(inputs, x=[inputs.x[0] + 0, *inputs.x[1:]])
    y = call(inputs, backend.name, w_needs, True)
    inputs.x[0].data.add_(0)  # .data is not tracked: fine
    with torch.no_grad():
        inputs.x[0].add_(1)
    if not w_needs:
        y.backward(inputs.dy)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)


@pytest.mark.backends("eager", "cpu")
@pytest.mark.parametrize("form", NOISE)
def test_gradcheck(backend: Target, form: str | None) -> None:
    """Finite differences in fp64; only dw where std(x) is in the noise, a constant in backward."""
    noise = None if form is None else noise_of(form)
    inputs = make((5,), 3, torch.float64, noise=noise, noisy=[1] if form else [])
    w = inputs.w.requires_grad_()
    x = [t.requires_grad_(form != "gaussian_additive") for t in inputs.x]

    def f(w: torch.Tensor, *x: torch.Tensor) -> torch.Tensor:
        return fastnas.mixed_sum(x, w, noise=inputs.noise, noisy=inputs.noisy, level=inputs.level,
                                 rng=inputs.rng, backend=backend.name)  # fmt: skip

    assert torch.autograd.gradcheck(f, (w, *x))


@pytest.mark.parametrize(("form", "layout"), [(None, "contiguous"),
                                              ("gaussian_additive", "channels_last"),
                                              ("uniform_multiplicative", "sliced")])  # fmt: skip
def test_opcheck(backend: Target, form: str | None, layout: str) -> None:
    noise = None if form is None else noise_of(form)
    inputs = make((2, 3, 4, 5), 3, torch.float32, backend.device, layouts=[layout],
                  dy_layout=layout, noise=noise, noisy=[1, 2] if form else [])  # fmt: skip
    drawn = Noise(list(inputs.noisy), inputs.form, inputs.level, inputs.rng)
    needs = [[True] * 4, [False, True, False, True]]
    opcheck(MIXED_SUM, SumCall(inputs.x, inputs.w, drawn), inputs.dy, needs, backend.name)


def step(
    noise: SkipNoise | None, noisy: list[int], backend: str | None
) -> Callable[..., torch.Tensor]:
    def f(x: list[torch.Tensor], alpha: torch.Tensor, rng: torch.Tensor | None) -> torch.Tensor:
        w = torch.softmax(alpha, 0)
        states = [t.relu() for t in x]
        return fastnas.mixed_sum(
            states, w, noise=noise, noisy=noisy, rng=rng, backend=backend
        ).square()

    return f


def gradients(
    f: Callable[..., torch.Tensor], inputs: Inputs, rng: torch.Tensor | None
) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.w, *inputs.x)]
    y = f(leaves[1:], leaves[0], rng)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dy)]


@pytest.mark.backends("cpu", "cuda")  # tracing is the same for every backend, and slow
@pytest.mark.parametrize(("form", "layout"), [(None, "contiguous"),
                                              ("gaussian_additive", "channels_last")])  # fmt: skip
def test_compiles_to_a_full_graph(backend: Target, form: str | None, layout: str) -> None:
    torch._dynamo.reset()
    noise = None if form is None else noise_of(form)
    inputs = make(
        (2, 3, 4, 5), 3, torch.float32, backend.device, layouts=[layout], dy_layout=layout
    )
    rng = draw_rng(device=torch.device(backend.device))[0] if form else None
    f = step(noise, [1] if form else [], backend.name)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, inputs, rng), gradients(f, inputs, rng)):
        assert torch.equal(got, want)


@pytest.mark.backends("eager", "cpu", "cuda")
def test_compiled_noise_without_a_stream_is_fresh_every_time(backend: Target) -> None:
    torch._dynamo.reset()
    inputs = make((40,), 2, torch.float32, backend.device)
    f = step(SkipNoise(), [0], backend.name)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")

    def seeded(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [gradients(compiled, inputs, None)[0] for _ in range(2)]

    first, second = seeded(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, seeded(1)[0])


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_compiles_with_inductor(backend: Target) -> None:
    torch._dynamo.reset()
    inputs = make((2, 3, 4, 5), 3, torch.float32, backend.device)
    rng = draw_rng(device=torch.device(backend.device))[0]
    f = step(SkipNoise(), [1], backend.name)
    compiled = torch.compile(f, fullgraph=True)
    for got, want in zip(gradients(compiled, inputs, rng), gradients(f, inputs, rng)):
        torch.testing.assert_close(got, want)


def test_w_from_a_row_of_a_table(backend: Target) -> None:
    """As in a network: w is a row of softmax(alpha), and its gradient goes into that row."""
    inputs = small(backend, None)
    alpha = torch.randn(5, 3, device=backend.device, requires_grad=True)
    y = fastnas.mixed_sum(inputs.x, torch.softmax(alpha, 1)[2], backend=backend.name)
    y.backward(inputs.dy)
    assert alpha.grad is not None
    assert alpha.grad[2].abs().sum() > 0
    assert alpha.grad[[0, 1, 3, 4]].abs().sum() == 0


def test_gradients_accumulate(backend: Target) -> None:
    inputs = small(backend, None)
    once = run(inputs, backend.name)
    call(inputs, backend.name, True, True).backward(inputs.dy)
    call(inputs, backend.name, True, True).backward(inputs.dy)
    for leaf, one in zip((inputs.w, *inputs.x), (once.dw, *once.dx)):
        assert one is not None
        torch.testing.assert_close(leaf.grad, 2 * one)


@pytest.mark.backends("cpu")
def test_an_empty_output_of_the_op_belongs_to_its_caller(backend: Target) -> None:
    """It gets a history where w has one; one tensor for all calls would keep that alive."""
    x, w = [torch.ones(3)], torch.ones(1, requires_grad=True)
    fwd = torch.ops.fastnas.mixed_sum_fwd
    given = x, w, [], "none", None, None, backend.name
    (_, (first,)), (_, (second,)) = (fwd(*given) for _ in range(2))
    assert first.numel() == second.numel() == 0
    assert first is not second
