"""The checks checked: wrong implementations of mixed_sum must fail them, and a right one pass."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import FORMS, Inputs, check, check_regenerates, check_repeats, make, noise_of
from targets import under_test
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastnas.backends import BACKENDS, KERNELS
from fastnas.backends.calls import Noise, SumCall
from fastnas.backends.eager import EagerSum
from fastnas.ops import OPS, draw_rng

# Inputs by name: no noise, more than one block, one term of weight 1, channels last, four forms.
KINDS = ("plain", "blocks", "alone", "channels_last", *FORMS)
MULTIPLICATIVE = tuple(form for form in FORMS if form.endswith("multiplicative"))
SUMS = tuple(kind for kind in KINDS if kind != "alone")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE, NARROW = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
AT = 101  # the element that some leave out


def given(kind: str, dtype: torch.dtype) -> Inputs:
    if kind == "blocks":
        return make((9000,), 2, dtype)
    if kind == "alone":
        return replace(make((2, 3, 5, 7), 1, dtype), w=torch.ones(1, dtype=dtype))
    if kind == "plain":
        return make((2, 3, 5, 7), 3, dtype)
    layout = kind if kind == "channels_last" else "contiguous"
    noise = noise_of("gaussian_multiplicative" if kind == "channels_last" else kind)
    return make((2, 3, 5, 7), 3, dtype, noise=noise, noisy=[0, 2], layouts=[layout],
                dy_layout=layout)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation, the inputs on which it must be noticed, and in what.

    fwd and bwd change arguments by name before the right implementation sees them; y, dx and dw
    change what it gives, knowing the arguments.
    """

    id: str
    inputs: tuple[str, ...]
    noticed: str
    fwd: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    bwd: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    y: Callable[[Tensor, SimpleNamespace], Tensor] = lambda y, a: y
    dx: Callable[[list[Tensor], SimpleNamespace], list[Tensor]] = lambda dx, a: dx
    dw: Callable[[Tensor, SimpleNamespace], Tensor] = lambda dw, a: dw
    dtypes: tuple[torch.dtype, ...] = DTYPES
    checker: Callable[[Inputs, str], Any] = check


class UnderTest(EagerSum):
    """The right implementation, as `mutant` spoils it."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def forward(self, call: SumCall) -> tuple[Tensor, list[Tensor]]:
        a = named(call)
        y, saved = super().forward(call_of(**changed(a, self.mutant.fwd)))
        return self.mutant.y(y, SimpleNamespace(**a)), saved

    def backward(
        self, grad: Tensor, call: SumCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        a = named(call)
        found = super().backward(grad, call_of(**changed(a, self.mutant.bwd)), saved, needs)
        names = SimpleNamespace(**a, dy=grad, saved=saved, needs=needs)
        dw = [self.mutant.dw(found[0], names)] if needs[0] else []
        return dw + self.mutant.dx(found[len(dw) :], names)


def named(call: SumCall) -> dict[str, Any]:
    return {"x": call.x, "w": call.w, **call.noise._asdict()}


def call_of(x: list[Tensor], w: Tensor, **noise: Any) -> SumCall:
    return SumCall(x, w, Noise(**noise))


def forward(**a: Any) -> Tensor:
    return EagerSum().forward(call_of(**a))[0]


def changed(a: dict[str, Any], by: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return {name: by[name](value) if name in by else value for name, value in a.items()}


def element(t: Tensor, i: int) -> Tensor:
    """A mask of one element, in logical order."""
    return torch.arange(t.numel()).view(t.shape) == i % t.numel()


def unwritten(t: Tensor, i: int = AT) -> Tensor:
    """What a kernel leaves that allocates its output and then skips an element."""
    out = torch.empty_like(t)
    out[~element(t, i)] = t[~element(t, i)]
    return out


def zeroed(t: Tensor, i: int = AT) -> Tensor:
    return t.clone().masked_fill_(element(t, i), 0)


def last_repeated(t: Tensor) -> Tensor:
    return t.clone().masked_fill_(element(t, -1), t.flatten()[-2])


def negated_first(t: Tensor) -> Tensor:
    return torch.cat([-t[:1], t[1:]])


def wide(a: SimpleNamespace) -> dict[str, Any]:
    """The call with every term and w in fp64."""
    own = {name: getattr(a, name) for name in Noise._fields}
    return own | {"x": [t.double() for t in a.x], "w": a.w.double()}


def ten_times_off(found: Tensor, exact: Tensor) -> Tensor:
    return (exact + 10 * (found.double() - exact)).to(found.dtype)


def y_ten_times_off(y: Tensor, a: SimpleNamespace) -> Tensor:
    return ten_times_off(y, forward(**wide(a)))


def dx_ten_times_off(dx: list[Tensor], a: SimpleNamespace) -> list[Tensor]:
    exact = EagerSum().backward(a.dy.double(), call_of(**wide(a)), a.saved, a.needs)
    return [ten_times_off(d, e) for d, e in zip(dx, exact[a.needs[0] :])]


def y_drawn_in_memory_order(y: Tensor, a: SimpleNamespace) -> Tensor:
    x = [t.permute(0, 2, 3, 1) for t in a.x]
    return forward(**vars(a) | {"x": x}).permute(0, 3, 1, 2)


def y_drawn_alike(y: Tensor, a: SimpleNamespace) -> Tensor:
    """Both noisy terms take the draws of the first."""
    parts = [([1, 1, 0], [0]), ([0, 0, 1], [2])]
    return sum(
        forward(**vars(a) | {"w": a.w * a.w.new_tensor(mask), "noisy": noisy})
        for mask, noisy in parts
    )


def dw_without_first_block(dw: Tensor, a: SimpleNamespace) -> Tensor:
    return torch.stack([(a.dy[4096:] * t[4096:]).sum() for t in a.x]).to(dw.dtype)


def dw_summed_narrow(dw: Tensor, a: SimpleNamespace) -> Tensor:
    total = torch.zeros_like(dw)
    for column in torch.stack([a.dy * t for t in a.x]).unbind(1):
        total = total + column
    return total


def every_other_time(y: Tensor, turn: Any = itertools.count()) -> Tensor:  # noqa: B008
    return y * (1 + 4 * torch.finfo(y.dtype).eps * (next(turn) % 2))


FRESH = {"rng": lambda rng: draw_rng()[0]}
NO_NOISE = {"noisy": lambda noisy: []}
RIGHT = Mutant("nothing wrong", KINDS, "")
WRONG = [
    Mutant("a term dropped", SUMS, "y", fwd={"w": lambda w: zeroed(w, 1)}),
    Mutant("a sign flipped", KINDS, "y", fwd={"w": negated_first}),
    Mutant("weights of other terms", SUMS, "y", fwd={"w": lambda w: w.flip(0)}),
    Mutant("y: an element not written", KINDS, "y: 1 of", y=lambda y, a: unwritten(y)),
    Mutant("y: an element left zero", KINDS, "y: 1 of", y=lambda y, a: zeroed(y)),
    Mutant("y: the last element repeated", KINDS, "y: 1 of", y=lambda y, a: last_repeated(y)),
    Mutant("y: 10 times off", ("plain", "blocks"), "y", y=y_ten_times_off, dtypes=NARROW),
    Mutant("y: is x", ("alone",), "an output shares memory", y=lambda y, a: a.x[0]),
    Mutant("y: of another layout", ("channels_last",), "y has strides",
           y=lambda y, a: y.contiguous()),
    Mutant("y: wider than x", KINDS, "y is torch", y=lambda y, a: y.double(), dtypes=NARROW),
    Mutant("forward draws fresh noise", FORMS, "y", fwd=FRESH),
    Mutant("forward without noise", FORMS, "y", fwd=NO_NOISE),
    Mutant("noise on another term", FORMS, "y", fwd={"noisy": lambda noisy: [1, 2]}),
    Mutant("noisy terms exchanged", FORMS, "y", fwd={"noisy": lambda noisy: noisy[::-1]}),
    Mutant("noisy terms drawn alike", FORMS, "y", y=y_drawn_alike),
    Mutant("drawn in memory order", ("channels_last",), "y", y=y_drawn_in_memory_order),
    Mutant("noise without its mean", MULTIPLICATIVE, "y", fwd={"level": lambda v: zeroed(v, 0)}),
    Mutant("std of n instead of n - 1", ("gaussian_additive",), "y", dtypes=WIDE,
           fwd={"level": lambda level: level * (209 / 210) ** 0.5}),
    Mutant("std 1 percent off", FORMS, "y", dtypes=WIDE,
           fwd={"level": lambda level: level * level.new_tensor([1, 1.01])}),
    Mutant("dx: scaled by another w", SUMS, "dx[0]", bwd={"w": lambda w: w.roll(1)}),
    Mutant("dx: of other terms", SUMS, "dx[0]", dx=lambda dx, a: dx[::-1]),
    Mutant("dx: a sign flipped", KINDS, "dx[0]", dx=lambda dx, a: [-dx[0], *dx[1:]]),
    Mutant("dx: an element not written", KINDS, "dx[0]: 1 of",
           dx=lambda dx, a: [unwritten(dx[0]), *dx[1:]]),
    Mutant("dx: an element left zero", SUMS, "dx[1]: 1 of",
           dx=lambda dx, a: [dx[0], zeroed(dx[1]), *dx[2:]]),
    Mutant("dx: 10 times off", ("plain", "blocks"), "dx", dx=dx_ten_times_off, dtypes=NARROW),
    Mutant("dx: without the draw", MULTIPLICATIVE, "dx[0]",
           dx=lambda dx, a: [w_k * a.dy for w_k in a.w]),
    Mutant("dw: a block left out", ("blocks",), "dw", dw=dw_without_first_block),
    Mutant("dw: one not written", KINDS, "dw: 1 of", dw=lambda dw, a: unwritten(dw, 1)),
    Mutant("dw: one left zero", KINDS, "dw: 1 of", dw=lambda dw, a: zeroed(dw, 1)),
    Mutant("dw: signs flipped", KINDS, "dw", dw=lambda dw, a: -dw),
    Mutant("dw: summed narrow", ("blocks",), "dw", dw=dw_summed_narrow, dtypes=NARROW),
    Mutant("backward draws fresh noise", FORMS, "dw", bwd=FRESH),
    Mutant("backward at the next offset", FORMS, "dw", bwd={"rng": lambda rng: rng + 1}),
    Mutant("backward without noise", FORMS, "dw", bwd=NO_NOISE),
    Mutant("fresh noise, by <dy, y>", FORMS, "dw[0]", bwd=FRESH, checker=check_regenerates),
    Mutant("no noise, by <dy, y>", FORMS, "dw[0]", bwd=NO_NOISE, checker=check_regenerates),
    Mutant("other bits every other time", KINDS, "y differs", checker=check_repeats,
           y=lambda y, a: every_other_time(y)),
]  # fmt: skip


@pytest.mark.parametrize("mutant", WRONG, ids=lambda mutant: mutant.id)
def test_a_wrong_implementation_is_noticed(mutant: Mutant) -> None:
    with under_test("mixed_sum", UnderTest(mutant)) as name:
        for kind in mutant.inputs:
            for dtype in mutant.dtypes:
                with pytest.raises(AssertionError) as failure:
                    mutant.checker(given(kind, dtype), name)
                assert re.match(re.escape(mutant.noticed), str(failure.value)), (kind, dtype)


def test_a_right_implementation_passes() -> None:
    with under_test("mixed_sum", UnderTest(RIGHT)) as name:
        for kind in RIGHT.inputs:
            for dtype in DTYPES:
                inputs = given(kind, dtype)
                check(inputs, name)
                check_repeats(inputs, name)
                if inputs.noise is not None:
                    check_regenerates(inputs, name)


def test_registered_leaves_no_trace() -> None:
    with under_test("mixed_sum", UnderTest(RIGHT)) as name:
        assert name in BACKENDS
        assert ("mixed_sum", name) in KERNELS
    assert name not in BACKENDS
    assert all(backend != name for _, backend in KERNELS)
    assert all(name not in op.dtypes for op in OPS.values())


def test_fresh_memory_is_poison() -> None:
    like = torch.zeros(3)
    for fresh in (torch.empty(3), torch.empty(3, dtype=torch.half), torch.empty_like(like),
                  like.new_empty(3), torch.empty_strided((3,), (2,))):  # fmt: skip
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) != 0).all()
    assert torch.empty(3, device="meta").device.type == "meta"
    with FakeTensorMode():
        assert isinstance(torch.empty(3), FakeTensor)
    compiled = torch.compile(lambda x: torch.empty(3).copy_(x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(like), like)
