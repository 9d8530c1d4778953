"""Inputs of sample_paths, and the check of a backend against the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from rule import NOTHING, Allowance, Miss, raise_first, roundings
from torch import Tensor

from fastnas import reference
from fastnas.backends import BACKENDS
from fastnas.ops import PathSample, sample_paths
from fastnas.reference import TOPOLOGIES, logits_per_node

DARTS = (2, 3, 4, 5)


@dataclass(frozen=True, repr=False)
class PathInputs:
    alpha: Tensor
    beta: Tensor | None
    nodes: Sequence[int]
    topology: str
    tau: float
    paths: int
    rng: Tensor
    dweight: Tensor

    @property
    def logits(self) -> list[Tensor]:
        return [self.alpha] if self.beta is None else [self.alpha, self.beta]

    def to(self, device: str) -> PathInputs:
        moved = {name: getattr(self, name).to(device) for name in ("alpha", "rng", "dweight")}
        return replace(self, **moved, beta=None if self.beta is None else self.beta.to(device))


def make_paths(
    topology: str,
    nodes: Sequence[int] = DARTS,
    O: int = 7,
    lead: Sequence[int] = (2,),
    paths: int = 2,
    dtype: torch.dtype = torch.float64,
    tau: float = 0.7,
    seed: int = 0,
) -> PathInputs:
    assert topology in TOPOLOGIES
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    E = sum(nodes)
    beta = normal(*lead, sum(logits_per_node(nodes, topology)))
    return PathInputs(
        normal(*lead, E, O), None if topology == "none" else beta, nodes, topology, tau, paths,
        torch.randint(2**62, (2,), generator=generator), normal(paths, *lead, E),
    )  # fmt: skip


def draw(inputs: PathInputs, backend: str) -> PathSample:
    return sample_paths(inputs.alpha, inputs.beta, nodes=inputs.nodes, tau=inputs.tau,
                        topology=inputs.topology, paths=inputs.paths, rng=inputs.rng,
                        backend=backend)  # fmt: skip


def run(inputs: PathInputs, backend: str) -> dict[str, Tensor]:
    """op, weight and the gradients, on the CPU; computed on the device of the backend."""
    given = inputs.to(getattr(BACKENDS[backend], "device", "cpu"))
    leaves = [t.detach().requires_grad_() for t in given.logits]
    given = replace(given, alpha=leaves[0], beta=leaves[1] if len(leaves) > 1 else None)
    sample = draw(given, backend)
    found = torch.autograd.grad(sample.weight, leaves, given.dweight)
    results = {"op": sample.op, "weight": sample.weight.detach()}
    results |= dict(zip(("dalpha", "dbeta"), found))
    return {name: t.cpu() for name, t in results.items()}


def by_straight_through(inputs: PathInputs) -> dict[str, Tensor]:
    """The same by autograd through the reference, in fp64."""
    leaves = [t.double().requires_grad_() for t in inputs.logits]
    beta = leaves[1] if len(leaves) > 1 else None
    op, weight = reference.sample_paths(
        leaves[0], beta, inputs.nodes, inputs.topology, inputs.tau, inputs.rng, inputs.paths
    )
    found = torch.autograd.grad(weight, leaves, inputs.dweight.double(), materialize_grads=True)
    return {"op": op, "weight": weight.detach(), **dict(zip(("dalpha", "dbeta"), found))}


def by_closed_form(inputs: PathInputs) -> dict[str, Tensor]:
    """The same with the closed form of the gradients."""
    leaves = [t.double() for t in inputs.logits]
    beta = leaves[1] if len(leaves) > 1 else None
    given = leaves[0], beta, inputs.nodes, inputs.topology, inputs.tau, inputs.rng
    op, weight = reference.sample_paths(*given, inputs.paths)
    found = reference.sample_paths_grads(*given, op, inputs.dweight)
    results = {"op": op, "weight": weight, "dalpha": found[0]}
    return results if found[1] is None else results | {"dbeta": found[1]}


def moved_by_rounding(inputs: PathInputs) -> dict[str, Tensor]:
    """At most how much `roundings` of dweight move a gradient: a softmax and its like are <= 1."""
    numbers = inputs.dweight[inputs.dweight.isfinite()].double()
    most = roundings(torch.float64) * numbers.abs().sum() / inputs.tau
    return {"dalpha": most, "dbeta": most}


def check_paths(
    inputs: PathInputs,
    backend: str,
    expected: Callable[[PathInputs], dict[str, Tensor]] = by_straight_through,
) -> dict[str, Tensor]:
    """A call, compared."""
    got = run(inputs, backend)
    compare(got, inputs, expected)
    return got


def compare(
    got: dict[str, Tensor],
    inputs: PathInputs,
    expected: Callable[[PathInputs], dict[str, Tensor]],
    allowance: Allowance = NOTHING,
) -> None:
    """The integers and the weight to the bit; gradients to 1e-10 or what rounding to fp32 takes."""
    want, misses = expected(inputs), []
    assert got.keys() == want.keys()
    for name, right in want.items():
        dtype = torch.int64 if name == "op" else inputs.alpha.dtype
        assert got[name].dtype == dtype, f"{name} is {got[name].dtype}"
        assert got[name].shape == right.shape, f"{name} has shape {list(got[name].shape)}"
        off = (got[name].double() - right.double()).abs()
        allowed, same = 0.0, got[name].isnan() & right.isnan()
        if name not in ("op", "weight"):
            allowed = 1e-10 if dtype == torch.float64 else torch.finfo(dtype).eps
            same = ~(got[name].isfinite() | right.isfinite())  # inf - inf, in one order or another
        bound = allowed * (1 + right.double().abs())
        if allowance.sensitivity is not None and name in allowance.sensitivity:
            bound = bound + allowance.sensitivity[name]
        wrong = ~(same | (off <= bound))
        if wrong.any():
            ratio = float(torch.nan_to_num(off / bound, nan=torch.inf)[wrong].max())
            misses.append(Miss(f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong", ratio))
    raise_first(misses)
