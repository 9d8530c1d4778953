"""Lets correctness gate the clock: every provider is held against fp64 before any is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SEED = 20210503
YES = "yes"
EAGER = "eager"
# It bounds how far eager itself may be off, in units of the stated rounding: eager is the yardstick
# of the rest.
EAGER_ROUNDINGS = 64

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Exact:
    """Holds a result in fp64, and the rounding that any order of summation may add to it.

    Attributes:
        value: the result.
        rounding: absolute, a number or one per element of value.
        by_norm: compare the L2 norm of the difference instead of its largest element.
    """

    value: Tensor
    rounding: Tensor | float
    by_norm: bool = False

    def error(self, got: Tensor) -> Tensor:
        difference = got.to(torch.float64) - self.value
        return torch.linalg.vector_norm(difference) if self.by_norm else difference.abs()


class WrongError(Exception):
    """Tells how a result is wrong that no rounding explains."""


class Inputs(NamedTuple):
    """Holds the inputs whose gradients are wanted, by the gradient's name, and the output's."""

    leaves: Mapping[str, Tensor]
    dy: Tensor


@dataclass(frozen=True)
class Problem:
    """Holds one case on its device: what each provider runs, and what is right.

    Attributes:
        leaves: the inputs whose gradients are wanted, by the name of the gradient.
        dy: gradient of the output.
        forwards: provider to forward; "eager" is the yardstick and has to be there.
        exact: provider and its y to the fp64 results, "y" and one per leaf. May raise WrongError.
    """

    leaves: Mapping[str, Tensor]
    dy: Tensor
    forwards: Mapping[str, Callable[[], Tensor]]
    exact: Callable[[str, Tensor], Mapping[str, Exact]]
    alternatives: Mapping[str, str] = field(default_factory=dict)
    """Provider to the name under which only the fastest of its group is reported."""
    own: Mapping[str, Inputs] = field(default_factory=dict)
    """The leaves and dy of providers that take them in another layout."""

    def inputs(self, provider: str) -> Inputs:
        return self.own.get(provider, Inputs(self.leaves, self.dy))

    def gradients(self, provider: str, y: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        leaves, dy = self.inputs(provider)
        return torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=retain_graph)

    def outputs(self, provider: str) -> Outputs:
        """Returns y and the gradients, from a fixed seed."""
        # Providers that draw from torch draw the same numbers in every call, so that their exact
        # results can repeat them.
        torch.manual_seed(SEED)
        y = self.forwards[provider]()
        dx = self.gradients(provider, y)
        return {"y": y.detach(), **dict(zip(self.leaves, dx))}


class Case(Protocol):
    """Describes a line of an op's case table."""

    @property
    def op(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def K(self) -> int | None: ...
    @property
    def layout(self) -> str: ...

    def problem(self, device: str, full: bool) -> Problem:
        """Makes inputs on the device and the providers; `full` adds those slow to prepare."""

    def bytes_moved(self, pass_: str) -> int | None:
        """Returns the least that must be read and written; None where that is not the limit."""

    def fma(self, pass_: str) -> int | None:
        """Returns the multiply-adds that define the op; None where they are not the limit."""


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def errors(got: Outputs, exact: Mapping[str, Exact]) -> dict[str, float]:
    """Returns the largest error of each result."""
    return {name: _largest(right.error(got[name])) for name, right in exact.items()}


def disagreement(
    got: Outputs, exact: Mapping[str, Exact], eager: Mapping[str, float]
) -> str | None:
    """Says how `got` is wrong, or None: error <= 2 (eager's error in the same dtype) + rounding.

    Args:
        got: results by name, in the dtype of the case.
        exact: the same in fp64; every one is compared.
        eager: error of the eager code, from `errors`.
    """
    for name, right in exact.items():
        if got[name].shape != right.value.shape:
            return f"{name} has shape {list(got[name].shape)}, not {list(right.value.shape)}"
        error = right.error(got[name])
        # This is the rule of the tests: nobody may be more than twice as far off as eager in the
        # same dtype.
        allowed = 2 * eager[name] + torch.as_tensor(right.rounding, device=error.device)
        # NaN compares as false, so it is a disagreement here.
        if not bool((error <= allowed).all()):
            return (
                f"{name} is off by {_largest(error):.2g} from the fp64 reference,"
                f" {_largest(allowed):.2g} is allowed"
            )
    return None


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def verify(problem: Problem) -> dict[str, str]:
    """Maps provider to "yes", "no: how it is wrong" or "not run: why"; nothing else may be timed.

    What torch.compile cannot compile here has not run; anything else that raises is wrong.
    """
    got = problem.outputs(EAGER)
    exact = problem.exact(EAGER, got["y"])
    eager = errors(got, exact)
    verdicts = {}
    for provider in problem.forwards:
        if provider == EAGER:
            share = dict.fromkeys(exact, 0.0)
            wide = {n: replace(e, rounding=EAGER_ROUNDINGS * e.rounding) for n, e in exact.items()}
            reason = disagreement(got, wide, share)
            verdicts[provider] = YES if reason is None else f"no: {reason}"
        else:
            verdicts[provider] = _verdict(problem, provider, eager)
    return verdicts


def _verdict(problem: Problem, provider: str, eager: Mapping[str, float]) -> str:
    try:
        got = problem.outputs(provider)
    except Exception as error:
        # What torch.compile cannot compile is no fault of the result, and red rows end a run with
        # an error.
        return not_run(error) if provider.startswith("compile") else f"no: {first_line(error)}"
    try:
        reason = disagreement(got, problem.exact(provider, got["y"]), eager)
    except WrongError as error:
        reason = str(error)
    return YES if reason is None else f"no: {reason}"


def not_run(error: Exception) -> str:
    return f"not run: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Returns type and first line of the message, short enough for a cell of a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
