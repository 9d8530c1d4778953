"""mixed_edges with skip noise: values and gradients, the draws of mixed_sum, the generator."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import FORMS, noise_of
from edge_cases import (
    EPS,
    MEMORY,
    Inputs,
    agree,
    call,
    cell,
    check,
    compare,
    edge,
    make,
    one_edge,
)
from targets import Target

import fastnas
from fastnas.ops import OPS, draw_rng, relu_conv_bn
from fastnas.spaces import EdgeTable

OP = "mixed_edges"
pytestmark = pytest.mark.backends("eager", "cpu", "cuda-host", "cuda")

NAMES = ("skip", "sep_3", "avg_pool")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(backend: Target, dtype: torch.dtype, form: str, stride: int) -> None:
    table = cell(stride, 2, NAMES)
    inputs = make(table, (7, 6), C=4, N=5, dtype=dtype, noise=noise_of(form, 0.3, 0.5),
                  target=backend)  # fmt: skip
    check(inputs, backend.name)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_skips_alone(backend: Target, form: str, stride: int) -> None:
    """Also with two of them on an edge, and where C H W is no multiple of a Philox block."""
    for shape in ((4, 1, 3, 1), (3, 5, 3, 3), (17, 18, 5, 7)):
        N, C, *size = shape
        table = one_edge(stride, "skip", "skip")
        inputs = make(table, (size[0] * stride, size[1] * stride), C + C % stride, N,
                      noise=noise_of(form), target=backend)  # fmt: skip
        for memory in MEMORY:
            check(inputs, backend.name, memory=memory)


@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_std_of_inputs_far_from_zero(backend: Target, dtype: torch.dtype, offset: float) -> None:
    inputs = make(one_edge(1, "skip"), (9, 8), N=20, dtype=dtype, offset=offset,
                  noise=noise_of("gaussian_additive", factor=1e4), target=backend)  # fmt: skip
    check(inputs, backend.name)


@pytest.mark.parametrize("memory", MEMORY)
def test_dropout_leaves_strided_skips_alone(backend: Target, memory: str) -> None:
    noise = noise_of("bernoulli_multiplicative", factor=0.7)
    inputs = make(
        one_edge(2, "skip", "sep_3", "skip"), (8, 6), C=4, N=3, noise=noise, target=backend
    )
    check(inputs, backend.name, memory=memory)
    quiet = call(replace(inputs, noise=None, level=None, rng=None), backend.name)
    assert call(inputs, backend.name).equal(quiet)


@pytest.mark.parametrize(
    ("form", "stride"), [*product(FORMS[:4], (1, 2)), ("bernoulli_multiplicative", 1)]
)
def test_the_draws_are_those_of_mixed_sum(backend: Target, form: str, stride: int) -> None:
    """Node by node on the same rows of rng: the j-th skip into a node is the j-th noisy term."""
    edges = [edge(s, n, stride if s < 2 else 1, ("skip",)) for n in range(3) for s in range(2 + n)]
    table = EdgeTable(2, 3, 1, tuple(edges))
    inputs = make(table, (6, 8), C=4, noise=noise_of(form), target=backend)
    exact, eager = (
        {"y": node_by_node(inputs.cpu(), dtype, "eager")}
        for dtype in (torch.float64, inputs.w.dtype)
    )
    y = call(inputs, backend.name)
    agree({"y": y}, exact, eager, y.dtype)
    agree({"y": node_by_node(inputs, y.dtype, backend.name)}, exact, eager, y.dtype)


def node_by_node(inputs: Inputs, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """A cell of skips as calls of mixed_sum, their inputs reduced where the edges have stride 2."""
    assert inputs.rng is not None
    params = [p.to(dtype) for p in inputs.params]
    reduces = backend if backend in OPS["relu_conv_bn"].dtypes else "eager"
    row, states, x = 0, [], [t.to(dtype) for t in inputs.x]
    for node in range(inputs.table.nodes):
        first = x
        if params:
            pairs = [params[i : i + 2] for i in range(4 * node, 4 * node + 4, 2)]
            first = [relu_conv_bn(t, p, eps=EPS, backend=reduces) for t, p in zip(x, pairs)]
        terms = first + states
        y = fastnas.mixed_sum(
            terms, inputs.w[row : row + len(terms), 0], noise=inputs.noise,
            noisy=range(len(terms)), level=inputs.level, rng=inputs.rng[node], backend=backend,
        )  # fmt: skip
        row += len(terms)
        states.append(y)
    return torch.cat(states, 1)


@pytest.mark.parametrize("form", FORMS)
def test_level(backend: Target, form: str) -> None:
    """By default that of amplitude 1; of amplitude 0, additive noise is none."""
    inputs = make(cell(1, 2, NAMES), C=4, noise=noise_of(form), target=backend)
    assert inputs.noise is not None
    device = inputs.w.device
    full = call(replace(inputs, level=inputs.noise.level(device=device)), backend.name)
    assert torch.equal(call(replace(inputs, level=None), backend.name), full)
    assert not torch.equal(call(inputs, backend.name), full)
    if form.endswith("additive"):
        silent = call(replace(inputs, level=inputs.noise.level(0.0, device)), backend.name)
        compare({"y": silent}, replace(inputs, noise=None, level=None, rng=None))


def test_level_and_rng_of_any_stride(backend: Target) -> None:
    inputs = make(cell(1, 2, NAMES), C=4, noise=noise_of("gaussian_additive"), target=backend)
    assert inputs.level is not None and inputs.rng is not None
    spread = replace(inputs, level=inputs.level.repeat_interleave(3)[::3])
    assert torch.equal(call(spread, backend.name), call(inputs, backend.name))
    turned = replace(inputs, rng=inputs.rng.t().contiguous().t())
    assert torch.equal(call(turned, backend.name), call(inputs, backend.name))


def test_noise_from_the_generator(backend: Target) -> None:
    inputs = make(cell(1, 2, NAMES), C=4, noise=noise_of("gaussian_additive"), target=backend)
    drawn = replace(inputs, rng=None)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return call(drawn, backend.name)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    given = replace(inputs, rng=draw_rng(2, inputs.w.device))
    assert torch.equal(call(given, backend.name), draw(1))


@pytest.mark.parametrize("names", [("sep_3",), ("skip",)])
def test_nothing_is_drawn_where_nothing_is_noisy(backend: Target, names: tuple[str, ...]) -> None:
    noise = noise_of("uniform_additive") if names == ("sep_3",) else None
    inputs = make(cell(1, 2, names), noise=noise, target=backend)
    inputs = replace(inputs, level=None, rng=None)
    before = torch.get_rng_state()
    call(inputs, backend.name)
    assert torch.equal(torch.get_rng_state(), before)
