"""mixed_edges on tensor cores: only where it is asked for, and then by the rule with an eager that
rounds the operands of its pointwise convolutions to TF32, on the way back too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from edge_cases import FEW, Inputs, agree, by_eager, cell, make, run, same_bits
from targets import Target
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

OP = "mixed_edges"
pytestmark = pytest.mark.backends("cuda-host", "cuda")

exact_conv2d = F.conv2d


@contextmanager
def tf32_allowed() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def tf32(x: Tensor) -> Tensor:
    """To 10 bits of fraction, ties away from zero."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.stride = stride
        return exact_conv2d(tf32(x), tf32(W), stride=stride)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, W = ctx.saved_tensors
        dy = tf32(dy)
        dx = conv2d_input(list(x.shape), tf32(W), dy, stride=ctx.stride)
        dW = conv2d_weight(tf32(x), list(W.shape), dy, stride=ctx.stride)
        return dx, dW, None


def conv2d(
    x: Tensor, W: Tensor, bias: None = None, stride: int = 1, *rest: Any, **more: Any
) -> Tensor:
    if W.shape[2:] != (1, 1):
        return exact_conv2d(x, W, bias, stride, *rest, **more)
    y: Tensor = Tf32Conv.apply(x, W, stride)
    return y


def inputs_of(
    target: Target, stride: int, C: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Inputs:
    return make(cell(stride, 2, FEW), (7, 9), C, 2, dtype, target=target, seed=seed)


# Seeds of which no relu's argument comes so close to 0 that the rounding turns its sign.
@pytest.mark.parametrize(("stride", "C", "seed"), [(1, 6, 0), (2, 6, 0), (1, 20, 0), (2, 36, 8)])
def test_rounded_to_tf32(
    backend: Target, monkeypatch: pytest.MonkeyPatch, stride: int, C: int, seed: int
) -> None:
    inputs = inputs_of(backend, stride, C, seed=seed)
    with tf32_allowed():
        got = run(inputs, backend.name)
    exact = by_eager(inputs, torch.float64)
    monkeypatch.setattr(F, "conv2d", conv2d)
    agree(got, exact, by_eager.__wrapped__(inputs), torch.float32)


def test_the_switch_says_which_units(backend: Target) -> None:
    few = inputs_of(backend, 1, 6)
    plain = run(few, backend.name)
    with tf32_allowed():
        rounded = run(few, backend.name)
    off = (rounded["y"] - plain["y"]).norm() / plain["y"].norm()
    assert 1e-5 < off < 1e-3  # 2^-11 is 5e-4
    many = make(cell(1, 1, ("sep_3",)), (3, 3), 260, 1, torch.float32, target=backend)
    plain = run(many, backend.name)
    with tf32_allowed():
        same_bits(run(many, backend.name), plain)


def test_bfloat16_needs_no_switch(backend: Target) -> None:
    inputs = inputs_of(backend, 1, 6, torch.bfloat16)
    plain = run(inputs, backend.name)
    with tf32_allowed():
        same_bits(run(inputs, backend.name), plain)
