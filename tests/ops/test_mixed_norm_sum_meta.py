"""The checks checked: wrong implementations of mixed_norm_sum must fail them, a right one pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import noise_of
from norm_cases import check, make
from targets import under_test
from torch import Tensor

from fastnas import reference
from fastnas.backends.calls import Noise, NormSumCall
from fastnas.backends.eager import EagerNormSum

MIXED = [True, False, True]
KINDS = {
    "plain": make((4, 3, 5, 7), MIXED, torch.float32),
    "double": make((4, 3, 5, 7), MIXED, torch.float64, layouts=["channels_last"]),
    "far": make((4, 3, 5, 7), MIXED, torch.float32, offset=100.0),
    "eval": make((4, 3, 5, 7), MIXED, torch.float32, training=False),
    "noise": make((4, 3, 5, 7), MIXED, torch.float32, noisy=[1],
                  noise=noise_of("gaussian_multiplicative")),
}  # fmt: skip
TRAINING = tuple(kind for kind in KINDS if kind != "eval")


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation, the inputs on which it must be noticed, and in what.

    fwd and bwd change arguments by name before the right implementation sees them; y, dz and dw
    change what it gives, knowing the arguments.
    """

    id: str
    inputs: tuple[str, ...]
    noticed: str
    fwd: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    bwd: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    y: Callable[[Tensor, SimpleNamespace], Tensor] = lambda y, a: y
    dz: Callable[[list[Tensor], SimpleNamespace], list[Tensor]] = lambda dz, a: dz
    dw: Callable[[Tensor, SimpleNamespace], Tensor] = lambda dw, a: dw


class UnderTest(EagerNormSum):
    """The right implementation, as `mutant` spoils it."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def forward(self, call: NormSumCall) -> tuple[Tensor, list[Tensor]]:
        y, saved = super().forward(changed(call, self.mutant.fwd))
        return self.mutant.y(y, named(call)), saved

    def backward(
        self, grad: Tensor, call: NormSumCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        found = super().backward(grad, changed(call, self.mutant.bwd), saved, needs)
        names = named(call, dy=grad, saved=saved, needs=needs, whole=call)
        dw = [self.mutant.dw(found[0], names)] if needs[0] else []
        return dw + self.mutant.dz(found[len(dw) :], names)


def named(call: NormSumCall, **others: Any) -> SimpleNamespace:
    return SimpleNamespace(**call._asdict(), **call.noise._asdict(), **others)


def changed(call: NormSumCall, by: Mapping[str, Callable[[Any], Any]]) -> NormSumCall:
    """The call with fields changed by name, those of its noise as well."""
    noise = {n: by[n](value) if n in by else value for n, value in call.noise._asdict().items()}
    own = {n: by[n](value) for n, value in call._asdict().items() if n in by}
    return call._replace(**own, noise=Noise(**noise))


def first(t: Tensor, value: float) -> Tensor:
    """t with another first element."""
    return t.clone().index_put_(tuple(torch.tensor(0) for _ in t.shape), t.new_tensor(value))


def y_by_sums_of_squares(y: Tensor, a: SimpleNamespace) -> Tensor:
    """var = E[z^2] - E[z]^2 in float32, which cancels far from zero."""
    dims = (0, 2, 3)
    mean = torch.stack([a.z[k].float().mean(dims) for k in (0, 2)])
    square = torch.stack([a.z[k].float().square().mean(dims) for k in (0, 2)])
    statistics = mean, (square - mean.square()).clamp(min=0)
    return reference.mixed_norm_sum(a.z, a.w, a.normed, a.eps, statistics)


def y_with_unbiased_variance(y: Tensor, a: SimpleNamespace) -> Tensor:
    if a.form != "none":
        return -y
    _, (mean, var) = reference.batch_norms(a.z, a.normed)
    return reference.mixed_norm_sum(a.z, a.w, a.normed, a.eps, (mean, var * 140 / 139))


def dz_of_given_statistics(dz: list[Tensor], a: SimpleNamespace) -> list[Tensor]:
    """w r dy: the terms of the batch's statistics forgotten."""
    call = a.whole._replace(mean=a.saved[1], var=a.saved[2])
    return EagerNormSum().backward(a.dy, call, a.saved[:1], a.needs)[a.needs[0] :]


def dz_without(dy_mean: bool) -> Callable[[list[Tensor], SimpleNamespace], list[Tensor]]:
    """One of the two terms of the statistics forgotten in dz_0."""

    def dz(dz: list[Tensor], a: SimpleNamespace) -> list[Tensor]:
        shape = 1, -1, 1, 1
        _, mean, var = a.saved
        r = (var[0] + a.eps).rsqrt().view(shape)
        v = (a.z[0] - mean[0].view(shape)) * r
        mean = a.dy if dy_mean else a.dy * v
        lost = mean.mean((0, 2, 3), True) * (1 if dy_mean else v)
        return [(dz[0] + a.w[0] * r * lost).to(dz[0].dtype), *dz[1:]]

    return dz


WRONG = [
    Mutant("a term dropped", tuple(KINDS), "y", fwd={"w": lambda w: first(w, 0.0)}),
    Mutant("a sign flipped", tuple(KINDS), "y", fwd={"w": lambda w: -w}),
    Mutant("the skip normed", ("plain", "double", "far"), "y",
           y=lambda y, a: reference.mixed_norm_sum(a.z, a.w, [True] * 3, a.eps)),
    Mutant("another eps", ("plain", "double", "eval"), "y", fwd={"eps": lambda eps: 2e-3}),
    Mutant("one element not written", tuple(KINDS), "y: 1 of",
           y=lambda y, a: first(y, float("nan"))),
    Mutant("sums of squares", ("far",), "y", y=y_by_sums_of_squares),
    Mutant("unbiased variance", TRAINING, "y", y=y_with_unbiased_variance),
    Mutant("the wrong statistics", ("eval",), "y",
           fwd={"mean": lambda mean: mean.flip(0), "var": lambda var: var.flip(0)}),
    Mutant("dz: statistics forgotten", TRAINING, "dx[0]", dz=dz_of_given_statistics),
    Mutant("dz: mean(dy) forgotten", TRAINING, "dx[0]", dz=dz_without(True)),
    Mutant("dz: mean(dy v) forgotten", TRAINING, "dx[0]", dz=dz_without(False)),
    Mutant("dz: statistics of the batch in eval", ("eval",), "dx[0]",
           dz=lambda dz, a: [dz[0] - dz[0].mean((0, 2, 3), True), *dz[1:]]),
    Mutant("dz: of other terms", tuple(KINDS), "dx[0]", dz=lambda dz, a: dz[::-1]),
    Mutant("dz: one element left zero", tuple(KINDS), "dx[1]: 1 of",
           dz=lambda dz, a: [dz[0], first(dz[1], 0.0), dz[2]]),
    Mutant("dw: not centred", ("plain", "double", "far"), "dw",
           dw=lambda dw, a: torch.stack([(a.dy * z).sum() for z in a.z]).to(dw.dtype)),
    Mutant("dw: one left zero", tuple(KINDS), "dw: 1 of", dw=lambda dw, a: first(dw, 0.0)),
    Mutant("backward draws fresh noise", ("noise",), "dw", bwd={"rng": lambda rng: rng + 1}),
]  # fmt: skip


@pytest.mark.parametrize("mutant", WRONG, ids=lambda mutant: mutant.id)
def test_a_wrong_implementation_is_noticed(mutant: Mutant) -> None:
    with under_test("mixed_norm_sum", UnderTest(mutant)) as name:
        for kind in mutant.inputs:
            with pytest.raises(AssertionError) as failure:
                check(KINDS[kind], name)
            assert re.match(re.escape(mutant.noticed), str(failure.value)), kind


def test_a_right_implementation_passes() -> None:
    with under_test("mixed_norm_sum", UnderTest(Mutant("nothing wrong", (), ""))) as name:
        for inputs in KINDS.values():
            check(inputs, name)
