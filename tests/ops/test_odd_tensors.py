"""Tensors whose values are not where a kernel would look: read right, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_calls import FUNCTIONS, call, differentiable, exchanged, results, tensors
from targets import Target
from torch import Tensor

OPS = tuple(FUNCTIONS)


def every_second(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, dim=-1)[..., ::2] if t.dim() else t.repeat(2)[1]


def negative_view(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def imaginary_part(t: Tensor) -> Tensor:
    """Of a conjugate: strides of 2 and a negative flag."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": every_second,
    "negative view": negative_view,
    "imaginary part": imaginary_part,
}


def served(name: str, backend: Target) -> bool:
    return not (backend.table == "triton" and name.startswith("mixed_edges"))


def assert_same(got: list[Tensor], expected: list[Tensor], backend: Target, what: str) -> None:
    """To the bit; torch's own kernels round differently where strides differ."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if backend.name == "eager":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=f"{what}, result {i}")
        else:
            assert torch.equal(a, b), f"{what}, result {i}"


@pytest.mark.backends("eager", "cpu", "cuda-host", "triton")
@pytest.mark.parametrize("name", OPS)
def test_every_tensor_in_odd_memory(backend: Target, name: str) -> None:
    """One argument after the other; values, gradients and running statistics to the bit."""
    if not served(name, backend):
        pytest.skip("mixed_edges has no Triton kernel")
    expected = results(name, call(name), backend.name)
    for place, plain in tensors(call(name)):
        odd = {k: f for k, f in ODD.items() if plain.is_floating_point() or k != "imaginary part"}
        if plain.dtype == torch.float64 and backend.table == "triton":
            odd.pop("imaginary part")
        if place[0] == "running":  # torch does not write to the others
            odd = {"every second": every_second}
        for kind, distort in odd.items():
            given = exchanged(call(name), place, distort(plain))
            assert_same(results(name, given, backend.name), expected, backend, f"{place}: {kind}")


@pytest.mark.backends("eager", "cpu", "cuda-host", "triton")
@pytest.mark.parametrize("name", OPS)
def test_gradients_in_odd_memory(backend: Target, name: str) -> None:
    if not served(name, backend):
        pytest.skip("mixed_edges has no Triton kernel")
    y = results(name, call(name), backend.name)[0]
    dy = torch.randn(y.shape)
    expected = results(name, call(name), backend.name, dy)
    for kind, distort in ODD.items():
        assert_same(results(name, call(name), backend.name, distort(dy)), expected, backend, kind)
    for shape in ((), y.shape[-1:]):  # as of a sum, and of a row that all have in common
        row = torch.randn(shape)
        got = results(name, call(name), backend.name, row.expand(y.shape))
        expected = results(name, call(name), backend.name, row.expand(y.shape).clone())
        assert_same(got, expected, backend, f"expanded from {list(shape)}")


@pytest.mark.backends("cpu", "cuda-host")
@pytest.mark.parametrize("name", OPS)
def test_what_was_saved_comes_back_in_odd_memory(backend: Target, name: str) -> None:
    """As hooks on saved tensors may give it back, such as those that move them to the host."""
    expected = results(name, call(name), backend.name)
    for distort in (every_second, negative_view):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, distort):
            got = results(name, call(name), backend.name)
        assert_same(got, expected, backend, distort.__name__)


FOREIGN: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "jagged": lambda t: torch.nested.nested_tensor([t], layout=torch.jagged),
    "complex": lambda t: t.cfloat(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 1j,
    "None in a list": lambda t: [None],
}
CAN_BE = {
    "mkldnn": lambda t: t.dtype == torch.float32 and t.dim(),
    "nested": lambda t: t.dim(),
    "jagged": lambda t: t.dim(),
    "quantized": lambda t: t.is_floating_point(),
    "sparse": lambda t: t.dim(),
}


@pytest.mark.filterwarnings("ignore")  # torch warns of half of these layouts
@pytest.mark.parametrize("name", OPS)
def test_foreign_tensors_are_refused_by_name(name: str) -> None:
    op, refused = name.split()[0], 0
    for place, plain in tensors(call(name)):
        for kind, make in FOREIGN.items():
            if not CAN_BE.get(kind, lambda t: True)(plain) or (place[0], kind) == ("rng", "sparse"):
                continue
            if place == ("tau",) and kind == "a list":  # of a 0-d tensor it is a number
                continue
            before = [t.clone() for p, t in tensors(call(name)) if p[0] == "running"]
            given = exchanged(call(name), place, make(plain))
            argument = re.escape(str(place[0]))
            with pytest.raises((TypeError, ValueError), match=rf"^{op}: {argument}\b"):
                FUNCTIONS[name](**given)
            after = [t for p, t in tensors(given) if p[0] == "running" and p != place]
            known = [t for (p, _), t in zip(_running(name), before) if p != place]
            assert all(torch.equal(a, b) for a, b in zip(after, known)), f"{place}: {kind}"
            refused += 1
    assert refused > 20


def _running(name: str) -> list[tuple[tuple[Any, ...], Tensor]]:
    return [(p, t) for p, t in tensors(call(name)) if p[0] == "running"]


@pytest.mark.parametrize("name", OPS)
def test_wrapped_tensors_are_refused_outside_of_their_mode(name: str) -> None:
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for place, plain in tensors(call(name)):
        given = exchanged(call(name), place, mode.from_tensor(plain))
        with pytest.raises(TypeError, match=f"^{name.split()[0]}: {place[0]}.*FakeTensor|pair"):
            FUNCTIONS[name](**given)


UNWRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda t: t[:1].expand(t.shape),
    "a negative view": negative_view,
}


@pytest.mark.parametrize("kind", UNWRITTEN)
@pytest.mark.parametrize("name", ["mixed_norm_sum", "mixed_edges", "relu_conv_bn"])
def test_running_statistics_that_torch_cannot_update(name: str, kind: str) -> None:
    """Torch would refuse them once the op has computed; here nothing is computed."""
    for place, plain in _running(name):
        given = exchanged(call(name), place, UNWRITTEN[kind](plain.abs()))
        with pytest.raises(ValueError, match=rf"running.*\({kind}.*floating point"):
            FUNCTIONS[name](**given)
        given["training"] = False
        assert FUNCTIONS[name](**given).isfinite().all()  # reading them is allowed


def test_leaves_are_all_that_is_differentiable() -> None:
    for name in OPS:
        assert len(differentiable(name, call(name))) >= 2
