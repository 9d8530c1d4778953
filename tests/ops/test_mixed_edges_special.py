"""mixed_edges where rounding, ties, inf and NaN are at their worst."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from edge_cases import FEW, TERMS, agree, by_eager, check, make, one_edge, run
from targets import Target

OP = "mixed_edges"
pytestmark = pytest.mark.backends("eager", "cpu", "cuda-host", "cuda")

STRIDES = pytest.mark.parametrize("stride", [1, 2])


@pytest.mark.backends("cpu", "cuda-host", "cuda")
@STRIDES
@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_inputs_far_from_zero(
    backend: Target, dtype: torch.dtype, offset: float, stride: int
) -> None:
    """The mean is 100 standard deviations away."""
    for name in TERMS:
        inputs = make(one_edge(stride, name), (9, 8), N=4, dtype=dtype, offset=offset,
                      target=backend)  # fmt: skip
        check(inputs, backend.name)


@pytest.mark.parametrize("distance", [1.0, 0.1, 0.01])
def test_channels_that_nearly_cancel(backend: Target, dtype: torch.dtype, distance: float) -> None:
    """Two channels are alike and a row of the pointwise kernel subtracts them: var(W u) is small
    beside |W|^2 var(u)."""
    inputs = make(one_edge(1, "dil_3"), (8, 8), C=2, N=8, dtype=dtype, target=backend)
    x, (depthwise, pointwise) = inputs.x[0], inputs.params
    x = torch.stack([x[:, 0], x[:, 0] + distance * x[:, 1]], 1)
    depthwise = depthwise[:1].repeat(2, 1, 1, 1)
    pointwise = pointwise.new_tensor([[1.0, -1.0], [1.0, 1.0]]).view_as(pointwise)
    given = replace(inputs, x=[x], params=[depthwise, pointwise])
    condition = 4 / distance**2
    if dtype != torch.float32 or condition < 10:
        check(given, backend.name)
        return
    # The variance comes from cov(u), which loses what cancels: eps times the condition is left.
    exact = by_eager(given, torch.float64)["y"]
    found = run(given, backend.name)["y"].cpu().double()
    error = (found - exact).abs().max() / exact.abs().max()
    assert error < 8 * condition * torch.finfo(dtype).eps


def test_images_that_differ_more_than_their_pixels(backend: Target, dtype: torch.dtype) -> None:
    """As sums of squares about one common shift would lose it: each image has its own mean."""
    inputs = make(one_edge(1, *FEW), (4, 4), C=3, N=20, dtype=dtype, target=backend)
    steps = torch.arange(20, dtype=dtype, device=backend.device).view(-1, 1, 1, 1) % 7 * 512
    check(replace(inputs, x=[inputs.x[0] + steps]), backend.name)


@pytest.mark.backends("cpu")
def test_a_constant_channel(backend: Target, dtype: torch.dtype) -> None:
    """There is nothing to normalise; where eager rounds, it gives that times eps^-1/2."""
    inputs = make(one_edge(1, "avg_pool", "max_pool"), (6, 6), C=3, N=4, dtype=dtype)
    x = inputs.x[0].clone()
    x[:, 1] = 3.0
    got = run(replace(inputs, x=[x]), backend.name)
    assert not got["y"][:, 1].any()
    assert got["dx[0]"].isfinite().all()


@STRIDES
def test_gradients_at_ties_go_where_torch_sends_them(
    backend: Target, dtype: torch.dtype, stride: int
) -> None:
    """Integers in 0..2: nearly every window has ties. dy so that the sums are exact."""
    inputs = make(one_edge(stride, "max_pool"), (9, 8), C=5, N=4, dtype=dtype, target=backend,
                  seed=2)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(3, inputs.x[0].shape, generator=generator).to(inputs.x[0])
    tied = replace(inputs, x=[x], w=torch.ones_like(inputs.w))
    check(tied, backend.name)
    got = run(tied, backend.name)["dx[0]"].cpu()
    # In float64: of other seeds two gradients of a pixel cancel in float16 alone.
    leaf = x.cpu().double().requires_grad_()
    z = torch.nn.functional.max_pool2d(leaf, 3, stride, 1)
    torch.nn.functional.batch_norm(z, None, None, training=True).backward(inputs.dy.cpu().double())
    assert leaf.grad is not None
    assert torch.equal(got == 0, leaf.grad == 0)


SPECIAL = [torch.inf, -torch.inf, torch.nan]


@pytest.mark.backends("cpu", "cuda-host", "cuda")
@STRIDES
@pytest.mark.parametrize("where", ["x", "w", "params", "dy"])
@pytest.mark.parametrize("name", [*FEW, "sep_7"])
def test_inf_and_nan_spread_as_in_eager(
    backend: Target, name: str, where: str, stride: int
) -> None:
    """Finite, and the same, where eager is finite. A NaN gives NaN where it does in eager; of an
    inf, eager's order of summation makes inf or NaN."""
    inputs = make(one_edge(stride, name), (5, 6), C=4, N=4, target=backend)
    if where == "params" and not inputs.params:
        return
    for special in SPECIAL:
        x, w, dy = (t.clone() for t in (inputs.x[0], inputs.w, inputs.dy))
        params = [p.clone() for p in inputs.params]
        t = {"x": x, "w": w, "dy": dy}.get(where, params[-1] if params else x)
        t[(t.shape[0] - 1, 0, 0, 0)[: t.dim()]] = special
        spoiled = replace(inputs, x=[x], w=w, params=params, dy=dy)
        # Which products with the padding's zeros eager forms depends on the dtype: float64 says.
        eager, exact = by_eager(spoiled), by_eager(spoiled, torch.float64)
        got = {key: t.cpu() for key, t in run(spoiled, backend.name).items()}
        finite = {key: want.isfinite() for key, want in exact.items()}
        for key, found in got.items():
            what = f"{key}, {special}"
            assert torch.equal(found.isfinite(), finite[key]), what
            assert special == special or torch.equal(found.isnan(), exact[key].isnan()), what
        kept, sure, rounded = (
            {key: t[finite[key]] for key, t in results.items()} for results in (got, exact, eager)
        )
        agree(kept, sure, rounded, x.dtype)


@STRIDES
def test_nan_in_a_max_pool_takes_the_gradient(backend: Target, stride: int) -> None:
    """As torch: the last NaN of a window. The gradient itself is NaN by the batch norm."""
    inputs = make(one_edge(stride, "max_pool"), (5, 6), C=4, N=4, target=backend)
    x = inputs.x[0].clone()
    x[1, 2, 1, 1] = x[1, 2, 1, 2] = x[1, 2, 2, 1] = torch.nan
    inputs = replace(inputs, x=[x])
    got, want = run(inputs, backend.name), by_eager(inputs)
    for name in ("y", "dx[0]"):
        assert torch.equal(got[name].cpu().isnan(), want[name].isnan()), name
