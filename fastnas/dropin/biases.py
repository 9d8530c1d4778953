"""Computes what biases before batch norms do, beside the kernels, which do not add them.

A bias shifts what its batch norm is given by s [C]. By the batch's statistics the shift is taken
away again, and the running mean alone knows of it. By given ones BN(z + s) = r (z - (mean - s)),
r = 1 / sqrt(var + eps): the kernels are given the mean less s, as a constant, and a term of value 0
with the gradient r of s is added to what they return.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastnas.dropin.weights import Scalar
from fastnas.nn.parts import Candidate
from fastnas.ops.batch_norm import Running


class Biases:
    """Holds the biases of a candidate as they are now: `functional_call` exchanges them.

    Args:
        candidate: what has the convolutions.
        params: the weights of these.
    """

    def __init__(self, candidate: Candidate, params: list[Tensor]) -> None:
        self.candidate, self.params = candidate, params
        self.own: list[Tensor | None] = [c._parameters.get("bias") for c in candidate.convs]
        self.held = [b for b in self.own if b is not None]
        """Those that there are."""

    @property
    def halves(self) -> int:
        return self.candidate.halves

    def shifts(self) -> list[Tensor]:
        """Returns the shift [C] of what each batch norm is given, with its gradients; or none."""
        if not self.held:
            return []
        own = [p.new_zeros(len(p)) if b is None else b for p, b in zip(self.params, self.own)]
        if not self.halves:
            # Those of a strided skip belong to one batch norm, each to half of the channels.
            return own if len(own) == 1 else [torch.cat(own)]
        # The pointwise convolution [C, C, 1, 1] of each half adds up what the depthwise one shifts.
        return [
            own[2 * half + 1] if self.own[2 * half] is None
            else (self.params[2 * half + 1].flatten(1) * own[2 * half]).sum(1) + own[2 * half + 1]
            for half in range(self.halves)
        ]  # fmt: skip

    def taken_off(self, running: list[Running]) -> list[Running]:
        """Returns given statistics as those of what the kernels see."""
        if not self.held:
            return running
        return [(mean - s.detach(), var) for (mean, var), s in zip(running, self.shifts())]

    def need_gradients(self) -> list[bool]:
        """Tells whether gradients reach the shift of each batch norm; lists none without biases.

        They do by way of a depthwise bias that is frozen, too: the pointwise weight scales it.
        """
        if not self.held:
            return []
        wanted = [b is not None and b.requires_grad for b in self.own]
        if not self.halves:
            return [any(wanted)]
        return [
            wanted[i] or wanted[i + 1]
            or (self.own[i] is not None and self.params[i + 1].requires_grad)
            for i in range(0, 2 * self.halves, 2)
        ]  # fmt: skip

    def gradient(self, weight: Scalar | None, running: Running, eps: float) -> Tensor:
        """Returns the term [C] of value 0 of the last batch norm, which has these statistics."""
        (_, var), shift = running, self.shifts()[-1]
        term = (var + eps).rsqrt() * (shift - shift.detach())
        return term if weight is None else weight * term


def move(calls: Iterable[tuple[Biases, list[Running]]], momentum: float) -> None:
    """Adds to running means, which moved by what the kernels saw, what these did not see.

    Args:
        calls: the biases of each, and its running statistics.
    """
    held = [(biases, running) for biases, running in calls if biases.held and running]
    if held:
        with torch.no_grad():
            means = [mean for _, running in held for mean, _ in running]
            shifts = [shift for biases, _ in held for shift in biases.shifts()]
            torch._foreach_add_(means, shifts, alpha=momentum)


def tied(weights: Tensor, calls: Iterable[Biases]) -> Tensor:
    """Returns mixing weights, tied to biases whose gradient is 0, and not None, in training."""
    wanted = [b for biases in calls for b in biases.held if b.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return weights
    return weights + 0 * torch.cat(wanted).sum().to(weights)
