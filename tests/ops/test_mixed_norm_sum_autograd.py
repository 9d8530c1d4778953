"""mixed_norm_sum and autograd: which gradients, what is saved, opcheck, gradcheck, compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import FORMS, noise_of
from norm_cases import BACKENDS_OF_CASES, EPS, Inputs, call, check, make, run
from op_check import opcheck
from targets import Target

import fastnas
from fastnas.backends.calls import Noise, NormSumCall
from fastnas.ops.mixed_norm_sum import MIXED_NORM_SUM

OP = "mixed_norm_sum"
pytestmark = BACKENDS_OF_CASES

MIXED = [True, False, True]


def small(backend: Target, form: str | None = None, **settings: object) -> Inputs:
    noise = None if form is None else noise_of(form)
    return make((2, 3, 4, 5), MIXED, torch.float32, backend.device, noise=noise,
                noisy=[1] if form else [], **settings)  # type: ignore[arg-type]  # fmt: skip


@BACKENDS_OF_CASES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", [None, "gaussian_multiplicative"])
def test_every_subset_of_gradients(backend: Target, form: str | None, training: bool) -> None:
    inputs = small(backend, form, training=training)
    for needs in itertools.product([False, True], repeat=4):
        got = check(inputs, backend.name, needs)
        assert [t is not None for t in (got.dw, *got.dx)] == list(needs)


def live(inputs: Inputs, backend: str, needs: tuple[bool, ...]) -> torch.Tensor:
    """A call on the tensors themselves, not on detached ones."""
    for t, need in zip((inputs.w, *inputs.z), needs):
        t.requires_grad_(need)
    return call(inputs, inputs.z, inputs.w, backend)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("needs", "kept_in_training", "kept_in_eval"),
    [
        ((True, True, True, True), {0, 1, 2}, {0, 1, 2}),
        ((True, False, False, False), {0, 1, 2}, {0, 1, 2}),
        ((False, True, True, True), {0, 2}, set()),
        ((False, True, True, False), {0}, set()),
    ],
)
def test_only_terms_that_are_read_are_saved(
    backend: Target,
    needs: tuple[bool, ...],
    kept_in_training: set[int],
    kept_in_eval: set[int],
    training: bool,
) -> None:
    """And w, per channel mean and variance, and of the noise 16 bytes each of level, rng, std."""
    inputs = small(backend, "gaussian_additive", training=training)
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        live(inputs, backend.name, needs)
    at = {t.data_ptr(): k for k, t in enumerate(inputs.z)}
    kept = [at[t.data_ptr()] for t in saved if t.data_ptr() in at]
    assert sorted(kept) == sorted(kept_in_training if training else kept_in_eval)
    others = sum(t.nbytes for t in saved if t.data_ptr() not in at)
    assert others <= inputs.w.nbytes + 2 * 2 * 3 * 4 + 16 + 16 + 8


def test_no_graph_where_no_gradient_is_wanted(backend: Target) -> None:
    assert live(small(backend), backend.name, (False,) * 4).grad_fn is None
    with torch.no_grad():
        assert live(small(backend), backend.name, (True,) * 4).grad_fn is None


def test_a_term_changed_in_place_is_noticed(backend: Target) -> None:
    inputs = small(backend)
    inputs = replace(inputs, z=[inputs.z[0] + 0, *inputs.z[1:]])
    y = live(inputs, backend.name, (True,) * 4)
    with torch.no_grad():
        inputs.z[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)


def test_backward_knows_nothing_of_a_later_update(backend: Target) -> None:
    """The running statistics of an eval step may be updated before its backward."""
    inputs = small(backend, training=False)
    want = run(inputs, backend.name).named()
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.w, *inputs.z)]
    y = call(inputs, leaves[1:], leaves[0], backend.name)
    assert inputs.statistics is not None
    for t in inputs.statistics:
        t.add_(1)
    for name, got in zip(("dw", "dx[0]"), torch.autograd.grad(y, leaves[:2], inputs.dy)):
        assert torch.equal(got, want[name])  # type: ignore[arg-type]


@pytest.mark.backends("eager", "cpu")  # there is no fp64 on a GPU
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_gradcheck(backend: Target, form: str | None, training: bool, layout: str) -> None:
    """Finite differences in fp64; not of a term whose std is in the noise, a constant there."""
    noise = None if form is None else noise_of(form)
    inputs = make((3, 2, 2, 1), MIXED, torch.float64, noise=noise, noisy=[1] if form else [],
                  training=training, layouts=[layout])  # fmt: skip
    w = inputs.w.requires_grad_()
    z = [t.requires_grad_(MIXED[k] or form != "gaussian_additive") for k, t in enumerate(inputs.z)]
    assert torch.autograd.gradcheck(lambda w, *z: call(inputs, z, w, backend.name), (w, *z))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("form", "layout"), [(None, "contiguous"),
                                              ("gaussian_additive", "channels_last"),
                                              ("uniform_multiplicative", "sliced")])  # fmt: skip
def test_opcheck(backend: Target, form: str | None, layout: str, training: bool) -> None:
    inputs = small(backend, form, layouts=[layout], dy_layout=layout, training=training)
    given = (None, None) if inputs.statistics is None else inputs.statistics
    drawn = Noise(list(inputs.noisy), inputs.form, inputs.level, inputs.rng)
    call = NormSumCall(inputs.z, inputs.w, MIXED, EPS, *given, drawn)
    needs = [[True] * 4, [False, True, False, True]]
    opcheck(MIXED_NORM_SUM, call, inputs.dy, needs, backend.name)


def step(training: bool, backend: str) -> Callable[..., torch.Tensor]:
    def f(
        z: list[torch.Tensor], alpha: torch.Tensor, running: list[tuple[torch.Tensor, ...] | None]
    ) -> torch.Tensor:
        w = torch.softmax(alpha, 0)
        states = [t.relu() for t in z]
        return fastnas.mixed_norm_sum(
            states, w, normed=MIXED, running=running, training=training, backend=backend
        ).square()

    return f


@pytest.mark.backends("cpu", "cuda")  # tracing is the same for every backend, and slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_to_a_full_graph(backend: Target, layout: str, training: bool) -> None:
    """The update of the running statistics included."""
    torch._dynamo.reset()
    inputs = small(backend, layouts=[layout], dy_layout=layout)

    def results(f: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        running = [(inputs.w.new_zeros(3), inputs.w.new_ones(3)) if normed else None
                   for normed in MIXED]  # fmt: skip
        leaves = [t.detach().clone().requires_grad_() for t in (inputs.w, *inputs.z)]
        y = f(leaves[1:], leaves[0], running)
        gradients = torch.autograd.grad(y, leaves, inputs.dy)
        return [y.detach(), *gradients, *(t for pair in running if pair for t in pair)]

    f = step(training, backend.name)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled), results(f)):
        assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.backends("cpu")
def test_compiles_with_inductor(backend: Target) -> None:
    torch._dynamo.reset()
    inputs = small(backend)
    f = step(True, backend.name)
    running = [(torch.zeros(3), torch.ones(3)) if normed else None for normed in MIXED]
    got = torch.compile(f, fullgraph=True)(inputs.z, inputs.w, running)
    torch.testing.assert_close(got, f(inputs.z, inputs.w, running))


def test_gradients_accumulate(backend: Target) -> None:
    inputs = small(backend)
    once = run(inputs, backend.name)
    for _ in range(2):
        live(inputs, backend.name, (True,) * 4).backward(inputs.dy)
    for leaf, one in zip((inputs.w, *inputs.z), (once.dw, *once.dx)):
        assert one is not None
        torch.testing.assert_close(leaf.grad, 2 * one)
