"""The checks checked: wrong implementations of mixed_edges must fail them, a right one pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import noise_of
from edge_cases import cell, check, make, outside_of_training
from targets import under_test
from torch import Tensor
from torch.nn import functional as F

from fastnas.backends.calls import EdgesCall, Noise
from fastnas.backends.eager import EagerEdges
from fastnas.reference.mixed_edges import batch_norm, strided_pair

pytestmark = pytest.mark.usefixtures("one_thread")

# The module, which the function of that name hides.
MODULE = import_module("fastnas.reference.mixed_edges")
SIZE = (6, 5)
KINDS = {
    "plain": make(cell(1, 2), SIZE, C=4, N=4, dtype=torch.float32),
    "double": make(cell(1, 2), SIZE, C=4, N=4),
    "strided": make(cell(2, 2), SIZE, C=4, N=4),
    "far": make(cell(1, 1), SIZE, C=4, N=4, dtype=torch.float32, offset=100.0),
    "noise": make(cell(2, 2), SIZE, C=4, N=4, noise=noise_of("gaussian_multiplicative")),
    "given": outside_of_training(make(cell(2, 2), SIZE, C=4, N=4)),
}
EXACT = ("double", "strided", "noise")
ALL = tuple(kind for kind in KINDS if kind != "given")


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation, the inputs on which it must be noticed, and in what first.

    fwd and bwd change arguments by name before the right implementation sees them, names replace
    what its module calls; out, dx, dw, dparams and stats change what it gives.
    """

    id: str
    inputs: tuple[str, ...]
    noticed: str
    fwd: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    bwd: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)
    out: Callable[[Tensor], Tensor] = lambda out: out
    stats: Callable[[Tensor], Tensor] = lambda stats: stats
    dx: Callable[[list[Tensor]], list[Tensor]] = lambda dx: dx
    dw: Callable[[Tensor], Tensor] = lambda dw: dw
    dparams: Callable[[list[Tensor]], list[Tensor]] = lambda dparams: dparams


class UnderTest(EagerEdges):
    """The right implementation, as `mutant` spoils it."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def forward(self, call: EdgesCall) -> tuple[Tensor, list[Tensor]]:
        m = self.mutant
        with replaced(m.names):
            out, (stats, *saved) = super().forward(changed(call, m.fwd))
        return m.out(out), [m.stats(stats), *saved]

    def backward(
        self, grad: Tensor, call: EdgesCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        m = self.mutant
        with replaced(m.names):
            grad = m.bwd["dout"](grad) if "dout" in m.bwd else grad
            found = super().backward(grad, changed(call, m.bwd), saved, needs)
        first = sum(needs[:1])
        last = sum(needs[: 1 + len(call.x)])
        dw = [m.dw(d) for d in found[:first]]
        return dw + m.dx(found[first:last]) + m.dparams(found[last:])


def changed(call: EdgesCall, by: Mapping[str, Callable[[Any], Any]]) -> EdgesCall:
    """The call with fields changed by name, those of its noise as well."""
    noise = {n: by[n](value) if n in by else value for n, value in call.noise._asdict().items()}
    own = {n: by[n](value) for n, value in call._asdict().items() if n in by}
    return call._replace(**own, noise=Noise(**noise))


@contextmanager
def replaced(names: Mapping[str, Any]) -> Iterator[None]:
    """Names of the reference's module, or functions of its F, mean something else inside."""
    own = {name: value for name, value in names.items() if hasattr(MODULE, name)}
    functions = {name: value for name, value in names.items() if name not in own}
    own["F"] = SimpleNamespace(**(vars(F) | functions))
    before = {name: getattr(MODULE, name) for name in own}
    vars(MODULE).update(own)
    try:
        yield
    finally:
        vars(MODULE).update(before)


def first(t: Tensor, value: float) -> Tensor:
    """t with another first element."""
    return t.clone().index_put_(tuple(torch.tensor(0) for _ in t.shape), t.new_tensor(value))


def without_column(k: int) -> Callable[[Tensor], Tensor]:
    return lambda w: w * (torch.arange(w.shape[1]) != k)


def undilated(x: Tensor, w: Tensor, bias: None = None, stride: int = 1, padding: int = 0,
              dilation: int = 1, groups: int = 1) -> Tensor:  # fmt: skip
    return F.conv2d(x, w, bias, stride, (w.shape[2] - 1) // 2, 1, groups)


def flipped(x: Tensor, w: Tensor, *others: Any, **settings: Any) -> Tensor:
    return F.conv2d(x, w.flip(2, 3), *others, **settings)


def unshifted(x: Tensor, params: list[Tensor]) -> Tensor:
    return torch.cat([F.conv2d(x, p, stride=2) for p in params], 1)


def cropped(x: Tensor, params: list[Tensor]) -> Tensor:
    """An odd column of the image is forgotten."""
    return strided_pair(torch.cat([x[..., :-1], 0 * x[..., -1:]], -1), params)


def last_max(x: Tensor, size: int, stride: int, pad: int) -> Tensor:
    """A window without its last row."""
    high = F.max_pool2d(F.pad(x, (0, 0, 1, 0), value=-torch.inf), (2, 3), stride, (0, 1))
    return high[:, :, : -(-x.shape[2] // stride)]


def unbiased(z: Tensor, stats: Tensor, training: bool, eps: float) -> Tensor:
    y = batch_norm(z, stats, training, eps)
    n = z.numel() // z.shape[1]
    return y * ((n - 1) / n) ** 0.5


def of_squares(z: Tensor, stats: Tensor, training: bool, eps: float) -> Tensor:
    """var = E[z^2] - E[z]^2, which cancels far from zero."""
    batch_norm(z, stats, training, eps)
    mean = z.mean((0, 2, 3), True)
    var = (z.square().mean((0, 2, 3), True) - mean.square()).clamp(min=0)
    return (z - mean) * (var + eps).rsqrt()


def frozen(z: Tensor, stats: Tensor, training: bool, eps: float) -> Tensor:
    """Backward takes the statistics for constants."""
    batch_norm(z, stats, training, eps)
    return batch_norm(z, stats.clone(), False, eps)


def of_the_batch(z: Tensor, stats: Tensor, training: bool, eps: float) -> Tensor:
    """The values of given statistics, and the gradient of the batch's."""
    right = batch_norm(z, stats, False, eps)
    by_batch = batch_norm(z, stats.clone(), True, eps)
    return right.detach() + by_batch - by_batch.detach()


def dropped(i: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """Gradient i left zero."""
    return lambda ts: [torch.zeros_like(t) if k == i else t for k, t in enumerate(ts)]


WRONG = [
    *(Mutant(f"term {k} dropped", ("plain", "strided"), "y", fwd={"w": without_column(k)})
      for k in range(8)),
    Mutant("a sign flipped", ALL, "y", fwd={"w": torch.neg}),
    Mutant("w of other edges", ALL, "y", fwd={"w": lambda w: w.roll(1, 0)}),
    Mutant("another eps", EXACT, "y", fwd={"eps": lambda eps: 1.1 * eps}),
    Mutant("one element not written", ALL, "y", out=lambda out: first(out, float("nan"))),
    Mutant("one element left zero", ALL, "y", out=lambda out: first(out, 0.0)),
    Mutant("no relu", EXACT, "y", names={"relu": lambda x: x}),
    Mutant("no dilation", EXACT, "y", names={"conv2d": undilated}),
    Mutant("taps flipped", EXACT, "y", names={"conv2d": flipped}),
    Mutant("zeros in the average", EXACT, "y", names={
        "avg_pool2d": lambda x, k, s, p, **_: F.avg_pool2d(x, k, s, p)}),
    Mutant("zeros in the maximum", EXACT, "y", names={
        "max_pool2d": lambda x, k, s, p: F.max_pool2d(F.pad(x, (1,) * 4), k, s)}),
    Mutant("a row of the window missed", EXACT, "y", names={"max_pool2d": last_max}),
    Mutant("no shift of the second half", ("strided", "noise"), "y",
           names={"strided_pair": unshifted}),
    Mutant("the odd column forgotten", ("strided", "noise"), "y", names={"strided_pair": cropped}),
    Mutant("unbiased variance", EXACT, "y", names={"batch_norm": unbiased}),
    Mutant("sums of squares", ("far",), "y", names={"batch_norm": of_squares}),
    Mutant("dx of constants", EXACT, "dw", names={"batch_norm": frozen}),
    Mutant("dx of the batch's statistics", ("given",), "dw", names={"batch_norm": of_the_batch}),
    Mutant("given statistics of other norms", ("given",), "y",
           fwd={"running": lambda running: running.roll(1, 0)}),
    Mutant("given means forgotten in backward", ("given",), "dw",
           bwd={"running": lambda running: running * torch.tensor([0.0, 1.0]).view(1, 2, 1)}),
    Mutant("given: one element of dx left zero", ("given",), "dx",
           dx=lambda dx: [first(dx[0], 0.0), *dx[1:]]),
    Mutant("given: dparams left zero", ("given",), "dparams[0]", dparams=dropped(0)),
    Mutant("dx of other inputs", ALL, "dx", dx=lambda dx: dx[::-1]),
    Mutant("dx: one input left zero", ALL, "dx", dx=dropped(1)),
    Mutant("dx: one element left zero", ALL, "dx", dx=lambda dx: [first(dx[0], 0.0), *dx[1:]]),
    Mutant("dx of half the nodes", ALL, "dw",
           bwd={"dout": lambda dout: torch.cat([dout[:, :-4], 0 * dout[:, -4:]], 1)}),
    Mutant("dw: one left zero", ALL, "dw", dw=lambda dw: first(dw, 0.0)),
    Mutant("dw scaled", ALL, "dw", dw=lambda dw: dw * 1.001),
    *(Mutant(f"dparams[{i}] left zero", EXACT, f"dparams[{i}]", dparams=dropped(i))
      for i in (0, 1, 2, 3, 5, 15)),
    Mutant("dparams: one element", EXACT, "dparams[0]",
           dparams=lambda ts: [first(ts[0], 0.0), *ts[1:]]),
    Mutant("the first norm's statistics lost", ALL, "running[",
           stats=lambda stats: torch.cat([0 * stats[:1], stats[1:]])),
    Mutant("statistics of other norms", ALL, "running[", stats=lambda stats: stats.roll(1, 0)),
    Mutant("unbiased statistics", EXACT, "running[",
           stats=lambda stats: stats * torch.tensor([1.0, 1.01]).view(1, 2, 1)),
    Mutant("fresh noise in backward", ("noise",), "dw", bwd={"rng": lambda rng: rng + 1}),
    Mutant("one draw for all skips", ("noise",), "y",
           fwd={"rng": lambda rng: rng[:1].expand_as(rng)}),
    Mutant("no noise", ("noise",), "y", fwd={"form": lambda form: "none"}),
    Mutant("additive for multiplicative", ("noise",), "y",
           fwd={"form": lambda form: "gaussian_additive"}),
]  # fmt: skip


@pytest.mark.parametrize("mutant", WRONG, ids=lambda mutant: mutant.id)
def test_a_wrong_implementation_is_noticed(mutant: Mutant) -> None:
    with under_test("mixed_edges", UnderTest(mutant)) as name:
        for kind in mutant.inputs:
            with pytest.raises(AssertionError) as failure:
                check(KINDS[kind], name)
            assert re.match(re.escape(mutant.noticed), str(failure.value)), kind


def test_a_right_implementation_passes() -> None:
    with under_test("mixed_edges", UnderTest(Mutant("nothing wrong", (), ""))) as name:
        for inputs in KINDS.values():
            check(inputs, name)
