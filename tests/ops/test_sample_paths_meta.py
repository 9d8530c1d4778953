"""The check of sample_paths checked: wrong implementations must fail it, and a right one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from path_cases import DARTS, check_paths, make_paths
from targets import registered
from torch import Tensor

from fastnas import reference
from fastnas.backends.eager import EagerBackend
from fastnas.backends.sampling import PathDraw
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


class UnderTest(EagerBackend):
    """The right implementation, as `mutant` spoils it."""

    name = "under-test"

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def sample_paths_fwd(self, draw: PathDraw, paths: int) -> Outputs:
        a = SimpleNamespace(**draw._asdict())
        changed = draw._replace(**self.mutant.given(a))
        return self.mutant.fwd(super().sample_paths_fwd(changed, paths), a)

    def sample_paths_bwd(self, draw: PathDraw, op: Tensor, dweight: Tensor) -> Outputs:
        a = SimpleNamespace(**draw._asdict(), op=op, dweight=dweight)
        changed = {**vars(a), **self.mutant.given_bwd(a)}
        given = changed.pop("op"), changed.pop("dweight")
        return self.mutant.bwd(super().sample_paths_bwd(PathDraw(**changed), *given), a)


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
    with registered(UnderTest(mutant), table="eager") as name:
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
