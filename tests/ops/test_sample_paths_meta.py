"""The check of sample_paths checked: wrong implementations must fail it, and a right one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from path_cases import DARTS, check_paths, make_paths
from targets import under_test
from torch import Tensor

from fastnas import reference
from fastnas.backends.calls import PathsCall
from fastnas.backends.eager import EagerPaths
from fastnas.reference import TOPOLOGIES

BOTH = ("top2", "pairs")
Outputs = tuple[Tensor, Tensor]


def as_given(outputs: Outputs, a: SimpleNamespace) -> Outputs:
    return outputs


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation, the topologies where it must be noticed, and in what.

    fwd and bwd change what the right one gives, knowing its arguments; `given` changes those.
    """

    id: str
    topologies: tuple[str, ...]
    noticed: str
    fwd: Callable[[Outputs, SimpleNamespace], Outputs] = as_given
    bwd: Callable[[Outputs, SimpleNamespace], Outputs] = as_given
    given: Callable[[SimpleNamespace], dict[str, Any]] = lambda a: {}
    given_bwd: Callable[[SimpleNamespace], dict[str, Any]] = lambda a: {}


class UnderTest(EagerPaths):
    """The right implementation, as `mutant` spoils it."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def forward(self, call: PathsCall) -> tuple[Tensor, list[Tensor]]:
        a = SimpleNamespace(**call._asdict())
        weight, (op,) = super().forward(call._replace(**self.mutant.given(a)))
        op, weight = self.mutant.fwd((op, weight), a)
        return weight, [op]

    def backward(
        self, grad: Tensor, call: PathsCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        a = SimpleNamespace(**call._asdict(), op=saved[0], dweight=grad)
        changed = {**vars(a), **self.mutant.given_bwd(a)}
        op, dweight = changed.pop("op"), changed.pop("dweight")
        found = super().backward(dweight, PathsCall(**changed), [op], needs)
        without = call.beta is None
        outputs = (found[0], a.alpha.new_empty(0)) if without else (found[0], found[1])
        return list(self.mutant.bwd(outputs, a)[: 1 if without else 2])


def shifted(rng: Tensor) -> Tensor:
    return rng + torch.tensor([0, 1])


def unwritten(t: Tensor) -> Tensor:
    out = torch.empty_like(t)
    out.view(-1)[:-1] = t.view(-1)[:-1]
    return out


def without_last_path(a: SimpleNamespace) -> dict[str, Any]:
    return {"dweight": torch.cat([a.dweight[:-1], torch.zeros_like(a.dweight[:1])])}


def with_soft_value(outputs: Outputs, a: SimpleNamespace) -> Outputs:
    """1 + At - At in the order that rounds."""
    op, weight = outputs
    soft = torch.rand_like(weight)
    return op, torch.where(op >= 0, weight + soft - soft, weight)


def with_noise_of_beta_for_two(outputs: Outputs, a: SimpleNamespace) -> Outputs:
    """Nodes of two predecessors have the gradient that the formula gives for a longer node."""
    dalpha, dbeta = outputs
    padded = torch.cat([a.beta[..., :2], torch.full_like(a.beta[..., :1], -1e3)], -1)
    op = a.op[..., :3].clone()
    op[..., 2] = -1
    draw = a.alpha[..., :3, :], padded, (3,), a.topology, a.tau, a.rng
    _, noise = reference.sample_paths_grads(*draw, op, a.dweight[..., :3])
    return dalpha, torch.cat([noise[..., :2], dbeta[..., 2:]], -1)


def without_the_jacobian(outputs: Outputs, a: SimpleNamespace) -> Outputs:
    """c alone, at the sampled operations."""
    _, dbeta = outputs
    c = torch.zeros(*a.op.shape, a.alpha.shape[-1], dtype=a.alpha.dtype)
    sampled = torch.where(a.op >= 0, a.dweight, 0)[..., None]
    return c.scatter(-1, a.op.clamp(min=0)[..., None], sampled).sum(0), dbeta


def dropped_edges_too(a: SimpleNamespace) -> dict[str, Any]:
    return {"op": a.op.clamp(min=0)}


def first(change: Callable[[Tensor, SimpleNamespace], Tensor]) -> Callable[..., Outputs]:
    """op, or dalpha, is changed."""
    return lambda o, a: (change(o[0], a), o[1])


def second(change: Callable[[Tensor, SimpleNamespace], Tensor]) -> Callable[..., Outputs]:
    """weight, or dbeta, is changed."""
    return lambda o, a: (o[0], change(o[1], a))


def repeated(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 0, 1).expand_as(t).clone()


def last_off_by_one(op: Tensor) -> Tensor:
    op = op.clone()
    op.view(-1)[-1] = (op.view(-1)[-1] + 2) % 8 - 1
    return op


RIGHT = Mutant("nothing wrong", TOPOLOGIES, "")
WRONG = [
    Mutant("the next stream", TOPOLOGIES, "op", given=lambda a: {"rng": shifted(a.rng)}),
    Mutant("operations of the neighbour", TOPOLOGIES, "op", first(lambda op, a: op.roll(1, -1))),
    Mutant("dropped edges have an operation", BOTH, "op", first(lambda op, a: op.clamp(min=0))),
    Mutant("the largest logits, without noise", TOPOLOGIES, "op",
           first(lambda op, a: torch.where(op >= 0, a.alpha.argmax(-1), -1))),
    Mutant("every path the first", TOPOLOGIES, "op", first(lambda op, a: repeated(op, 0))),
    Mutant("both types alike", TOPOLOGIES, "op", first(lambda op, a: repeated(op, 1))),
    Mutant("the smallest edges", ("top2",), "op", given=lambda a: {"beta": -a.beta}),
    Mutant("pairs in another order", ("pairs",), "op", given=lambda a: {"beta": a.beta.flip(-1)}),
    Mutant("op: one off", TOPOLOGIES, "op: 1 of", first(lambda op, a: last_off_by_one(op))),
    Mutant("op is int32", TOPOLOGIES, "op is torch.int32", first(lambda op, a: op.int())),
    Mutant("weight: one not written", TOPOLOGIES, "weight: 1 of",
           second(lambda weight, a: unwritten(weight))),
    Mutant("weight rounds", TOPOLOGIES, "weight", with_soft_value),
    Mutant("weight of dropped edges", BOTH, "weight",
           second(lambda weight, a: torch.ones_like(weight))),
    Mutant("fresh noise", TOPOLOGIES, "dalpha", given_bwd=lambda a: {"rng": shifted(a.rng)}),
    Mutant("without 1/tau", TOPOLOGIES, "dalpha", bwd=first(lambda d, a: d * a.tau)),
    Mutant("dbeta: without 1/tau", BOTH, "dbeta", bwd=second(lambda d, a: d * a.tau)),
    Mutant("tau doubled", TOPOLOGIES, "dalpha", given_bwd=lambda a: {"tau": 2 * a.tau}),
    Mutant("a sign flipped", TOPOLOGIES, "dalpha", bwd=first(lambda d, a: -d)),
    Mutant("dbeta: a sign flipped", BOTH, "dbeta", bwd=second(lambda d, a: -d)),
    Mutant("a path left out", TOPOLOGIES, "dalpha", given_bwd=without_last_path),
    Mutant("average of the paths", TOPOLOGIES, "dalpha", bwd=first(lambda d, a: d / len(a.op))),
    Mutant("no Jacobian", TOPOLOGIES, "dalpha", bwd=without_the_jacobian),
    Mutant("dropped edges have a gradient", BOTH, "dalpha", given_bwd=dropped_edges_too),
    Mutant("noise for nodes of two", ("top2",), "dbeta", bwd=with_noise_of_beta_for_two),
    Mutant("dalpha: one not written", TOPOLOGIES, "dalpha: 1 of",
           bwd=first(lambda d, a: unwritten(d))),
    Mutant("dbeta: one not written", BOTH, "dbeta: 1 of", bwd=second(lambda d, a: unwritten(d))),
]  # fmt: skip


def check(mutant: Mutant, topology: str, dtype: torch.dtype) -> None:
    inputs = replace(make_paths(topology, DARTS, paths=3, dtype=dtype), tau=0.9)
    with under_test("sample_paths", UnderTest(mutant)) as name:
        check_paths(inputs, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_right_one_passes(topology: str, dtype: torch.dtype) -> None:
    check(RIGHT, topology, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mutant", WRONG, ids=lambda mutant: mutant.id)
def test_a_wrong_one_fails(mutant: Mutant, dtype: torch.dtype) -> None:
    for topology in mutant.topologies:
        with pytest.raises(AssertionError, match=mutant.noticed):
            check(mutant, topology, dtype)
