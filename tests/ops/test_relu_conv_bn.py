"""relu_conv_bn: values, gradients, running statistics, autograd, bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import bits, laid_out
from conv_cases import by_eager, check, make, outside_of_training, run
from edge_cases import EPS, MOMENTUM, Pair, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from op_check import opcheck
from rule import agree
from targets import Target
from torch import Tensor

from fastnas import reference
from fastnas.backends import KERNELS
from fastnas.backends import relu_conv_bn as by_matmul
from fastnas.backends.calls import ConvCall
from fastnas.backends.layout import common_format, state_format
from fastnas.layers.primitives import FactorizedReduce, ReLUConvBN
from fastnas.ops import relu_conv_bn
from fastnas.ops.relu_conv_bn import RELU_CONV_BN

OP = "relu_conv_bn"
pytestmark = pytest.mark.backends("eager", "cpu", "cuda-host")
# Inputs are moved to the device by `run`.
FUSED = pytest.mark.backends("cpu", "cuda-host", "cuda")

STRIDES = pytest.mark.parametrize("stride", [1, 2])
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "misaligned")


@FUSED
@STRIDES
@pytest.mark.parametrize(
    "channels",
    [
        (1, 2),
        (2, 64),
        (3, 1),
        (3, 6),
        (4, 5),
        (5, 4),
        (16, 16),
        (17, 34),
        (20, 17),
        (33, 2),
        (64, 20),
    ],
    ids=str,
)
def test_every_number_of_channels(
    backend: Target, dtype: torch.dtype, channels: tuple[int, int], stride: int
) -> None:
    if channels[0] == 1 and dtype != torch.float64:
        return  # dW is orthogonal to a row of one number: nothing but rounding
    into, out = channels
    check(make(stride, (6, 5), (into, out + out % stride), N=8, dtype=dtype), backend.name)


@pytest.mark.backends("triton")
@STRIDES
def test_on_the_triton_sum(backend: Target, dtype: torch.dtype, stride: int) -> None:
    """A few cases: what is not the kernel of mixed_norm_sum is the code that CUDA runs."""
    check(make(stride, (7, 9), N=3, dtype=dtype), backend.name)


@FUSED
@STRIDES
@pytest.mark.parametrize("N", [1, 3, 15, 16, 17, 20, 33])
def test_every_number_of_images(backend: Target, dtype: torch.dtype, N: int, stride: int) -> None:
    check(make(stride, (8, 9), N=N, dtype=dtype), backend.name)


@FUSED
@STRIDES
@pytest.mark.parametrize(
    "size", [(7, 9), (5, 5), (1, 3), (3, 1), (2, 2), (1, 1), (2, 9), (8, 8), (70, 33)], ids=str
)
def test_every_size(
    backend: Target, dtype: torch.dtype, size: tuple[int, int], stride: int
) -> None:
    check(make(stride, size, N=20, dtype=dtype), backend.name)


@STRIDES
@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_inputs_far_from_zero(
    backend: Target, dtype: torch.dtype, offset: float, stride: int
) -> None:
    check(make(stride, (9, 8), N=8, dtype=dtype, offset=offset), backend.name)


@STRIDES
def test_the_layers_of_darts(backend: Target, stride: int) -> None:
    layer = ReLUConvBN(3, 6, 1, 1, 0, False) if stride == 1 else FactorizedReduce(3, 6, False)
    dtype = backend.widest(OP)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    layer = layer.to(dtype)
    (norm,) = [m for m in layer.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    norm.momentum = MOMENTUM
    running = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
    for training in (True, True, False):
        layer.train(training)
        x = make(stride, seed=int(training), dtype=dtype).x
        with torch.no_grad():
            y = relu_conv_bn(x, list(layer.parameters()), running=running, momentum=MOMENTUM,
                             training=training, backend=backend.name)  # fmt: skip
            torch.testing.assert_close(y, layer(x), rtol=tolerance, atol=tolerance)
        for got, want in zip(running, (norm.running_mean, norm.running_var)):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@STRIDES
@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(
    backend: Target, layout: str, dy_layout: str, stride: int
) -> None:
    dtype = backend.widest(OP)
    want = run(make(stride, dtype=dtype), backend.name)
    given = make(stride, dtype=dtype, layout=layout, dy_layout=dy_layout)
    given = replace(given, params=[laid_out(p, layout) for p in given.params])
    if backend.name != "eager":
        same_bits(run(given, backend.name), want)
    check(given, backend.name)


@FUSED
@STRIDES
def test_every_subset_of_gradients(backend: Target, dtype: torch.dtype, stride: int) -> None:
    inputs = make(stride, dtype=dtype)
    for wanted in itertools.product([False, True], repeat=1 + stride):
        check(inputs, backend.name, set(itertools.compress(inputs.leaves, wanted)))


def test_no_graph_where_no_gradient_is_wanted(backend: Target) -> None:
    inputs = make(1, dtype=torch.float32)
    assert relu_conv_bn(inputs.x, inputs.params, backend=backend.name).grad_fn is None
    inputs.x.requires_grad_()
    with torch.no_grad():
        assert relu_conv_bn(inputs.x, inputs.params, backend=backend.name).grad_fn is None


@STRIDES
def test_what_is_held(backend: Target, stride: int) -> None:
    """x, y, the kernels and the statistics."""
    inputs = make(stride, dtype=torch.float32)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x = inputs.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = relu_conv_bn(x, inputs.params, backend=backend.name)
    given = {t.data_ptr() for t in (x, y, *inputs.params)}
    assert given <= {t.data_ptr() for t in saved}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in given] == [(2, 6)]


@STRIDES
def test_backward_twice_and_after_a_change(backend: Target, stride: int) -> None:
    inputs = make(stride, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in inputs.leaves.values()]
    y = relu_conv_bn(leaves[0], leaves[1:], backend=backend.name)
    first = torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)):
        assert torch.equal(bits(a), bits(b))
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)


@pytest.mark.backends("eager", "cpu")  # there is no fp64 on a GPU
@STRIDES
def test_gradcheck(backend: Target, stride: int) -> None:
    inputs = make(stride, (3, 3), (2, 2), N=2)
    leaves = [t.requires_grad_() for t in inputs.leaves.values()]
    pair = outside_of_training(inputs).initial_running()[0]
    for running, training in ((None, True), (pair, False)):
        settings = {"running": running, "training": training, "backend": backend.name}
        assert torch.autograd.gradcheck(
            lambda x, *params: relu_conv_bn(x, params, **settings),  # noqa: B023
            leaves,
        )


@STRIDES
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(backend: Target, stride: int, layout: str) -> None:
    inputs = make(stride, dtype=torch.float32, layout=layout, dy_layout=layout)
    params = [laid_out(p, layout) for p in inputs.params]
    count = len(params)
    needs = [[True] * (1 + count), [True, *[False] * count], [False, *[True] * count]]
    for running in (None, torch.ones(2, 6)):
        call = ConvCall(inputs.x, params, running, EPS)
        opcheck(RELU_CONV_BN, call, inputs.dy, needs, backend.name)


@STRIDES
@pytest.mark.backends("cpu", "cuda-host")
def test_compiles_to_a_full_graph(backend: Target, stride: int) -> None:
    torch._dynamo.reset()
    inputs = make(stride, dtype=torch.float32)

    def f(x: Tensor, params: list[Tensor], running: Pair) -> Tensor:
        return relu_conv_bn(x.sin(), params, running=running, backend=backend.name).square()

    def results(f: Any) -> list[Tensor]:
        running = inputs.initial_running()[0]
        x, *params = leaves = [t.detach().clone().requires_grad_() for t in inputs.leaves.values()]
        y = f(x, params, running)
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dy), *running]

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled), results(f)):
        assert torch.equal(got, want)


@STRIDES
def test_watched_by_a_dispatch_mode(backend: Target, stride: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make(stride, dtype=backend.widest(OP))
    with FlopCounterMode(display=False):
        got = run(inputs, backend.name)
    same_bits(got, run(inputs, backend.name))


@pytest.mark.backends("cpu", "cuda-host")
@pytest.mark.parametrize("where", ["x", "params", "dy"])
@STRIDES
def test_inf_and_nan_spread_as_in_eager(backend: Target, where: str, stride: int) -> None:
    """Finite, and the same, where eager is finite, NaN of a NaN where eager is NaN."""
    for special in (torch.inf, -torch.inf, torch.nan):
        inputs = make(stride, (6, 5), dtype=backend.widest(OP))
        tolerance = 1e-9 if inputs.x.dtype == torch.float64 else 1e-4
        t = {"x": inputs.x, "params": inputs.params[-1], "dy": inputs.dy}[where]
        t[t.shape[0] - 1, 0, 0, 0] = special
        eager = by_eager(inputs)
        for key, found in run(inputs, backend.name).items():
            want, what = eager[key], f"{key}, {special}"
            finite = want.isfinite()
            assert torch.equal(found.isfinite(), finite), what
            torch.testing.assert_close(found[finite], want[finite], rtol=tolerance, atol=tolerance,
                                       msg=what)  # fmt: skip
            assert special == special or torch.equal(found.isnan(), want.isnan()), what


@STRIDES
@pytest.mark.backends("cpu")
def test_threads_do_not_change_a_bit(backend: Target, dtype: torch.dtype, stride: int) -> None:
    inputs = make(stride, (9, 7), (17, 34), N=20, dtype=dtype)
    outcomes = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        outcomes.append(run(inputs, "cpu"))
    for other in (*outcomes[1:], run(inputs, "cpu")):
        same_bits(other, outcomes[0])


@STRIDES
@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.backends("cuda-host")
def test_in_the_layout_of_x(
    backend: Target, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, layout: str,
    size: tuple[int, int], stride: int,
) -> None:  # fmt: skip
    """As on a GPU, where NCHW stays NCHW; its tensors are on the CPU here."""
    monkeypatch.setattr(by_matmul, "state_format", lambda x: common_format([x]))
    kernel = KERNELS["relu_conv_bn", backend.name]
    inputs = make(stride, size, N=9, dtype=dtype, layout=layout, dy_layout="contiguous")
    call = ConvCall(inputs.x, inputs.params, None, EPS)
    y, saved = kernel.forward(call)
    needs = [True] * (1 + len(inputs.params))
    dx, *dparams = kernel.backward(inputs.dy, call, [y, *saved], needs)
    for t in (y, dx):
        assert t.is_contiguous(memory_format=common_format([inputs.x]))
    got = {"y": y, **{f"d{name}": t for name, t in zip(inputs.leaves, (dx, *dparams))}}
    agree(got, by_eager(inputs, torch.float64), by_eager(inputs), dtype)


def test_states_are_channels_last_on_the_cpu_and_nchw_elsewhere() -> None:
    x = make(1).x
    for t in (x, x.contiguous(), x.transpose(2, 3)):
        assert state_format(t) == torch.channels_last
        assert state_format(t.to("meta")) == torch.contiguous_format


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_vector_width(isa: str) -> None:
    native = pytest.importorskip("fastnas._C")
    if isa not in native.supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    before = native.isa()
    native.use_isa(isa)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for into, stride in itertools.product((3, 10, 18), (1, 2)):
                check(make(stride, (7, 6), (into, into + into % 2), dtype=dtype), "cpu")
    finally:
        native.use_isa(before)


@pytest.mark.backends("eager", "cpu", "cuda-host", "cuda", "triton")
@STRIDES
def test_outside_of_training(backend: Target, dtype: torch.dtype, stride: int) -> None:
    """Each gradient by itself, too: statistics are constants."""
    for layout in ("channels_last", "contiguous"):
        inputs = make(stride, (7, 6), (5, 8), dtype=dtype, layout=layout, dy_layout=layout)
        inputs = outside_of_training(inputs)
        for needs in (None, *({name} for name in inputs.leaves), set()):
            check(inputs, backend.name, needs)


@STRIDES
def test_few_values_outside_of_training(backend: Target, dtype: torch.dtype, stride: int) -> None:
    """Given statistics serve a single value, and no image at all."""
    for N in (0, 1):
        inputs = make(stride, (1, 1), N=N, dtype=dtype)
        running = inputs.initial_running()[0]
        y = relu_conv_bn(inputs.x, inputs.params, running=running, training=False, eps=EPS,
                         backend=backend.name)  # fmt: skip
        want = reference.relu_conv_bn(inputs.x, inputs.params, torch.stack(running),
                                      training=False, eps=EPS)  # fmt: skip
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, want, rtol=4 * eps, atol=8 * eps)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    stride=st.integers(1, 2),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.tuples(st.integers(1, 19), st.integers(1, 9)),
    layout=st.sampled_from(LAYOUTS),
    dy_layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_drawn_shapes(
    stride: int, size: tuple[int, int], channels: tuple[int, int], layout: str, dy_layout: str,
    seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    # Few values of a channel have |v| = 1 whatever they are: dx is nothing but rounding.
    N = 3 + 32 // (size[0] * size[1])
    inputs = make(stride, size, (channels[0], 2 * channels[1]), N, layout=layout,
                  dy_layout=dy_layout, seed=seed)  # fmt: skip
    needs = data.draw(st.sets(st.sampled_from(sorted(inputs.leaves))))
    check(inputs, "cpu", needs)
    check(outside_of_training(inputs), "cpu", needs)


@pytest.mark.backends("eager", "cpu", "cuda-host", "cuda", "triton")
@pytest.mark.parametrize("stride", [1, 2])
def test_paths_are_calls_one_after_the_other(backend: Target, stride: int) -> None:
    dtype, device = backend.widest("relu_conv_bn"), backend.device
    x = torch.randn(6, 6, 4, 5, dtype=dtype, device=device)
    params = [torch.randn(4 // stride, 6, 1, 1, dtype=dtype, device=device) for _ in range(stride)]
    results = []
    for apart in (False, True):
        running = (torch.zeros(4, device=device), torch.ones(4, device=device))
        leaves = [t.clone().requires_grad_() for t in (x, *params)]
        settings = {"running": running, "momentum": 0.3, "backend": backend.name}
        if apart:
            groups = leaves[0].chunk(3)
            y = torch.cat([relu_conv_bn(g, leaves[1:], **settings) for g in groups])
        else:
            y = relu_conv_bn(leaves[0], leaves[1:], paths=3, **settings)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype, device=device).view(y.shape))
        results.append([y.detach(), *running, *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
