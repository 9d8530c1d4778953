"""Adds the terms of a choice: one after the other, or at once by a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastnas.nn.final_norms import foldable, norm_sum, pass_norms
from fastnas.ops.checks import is_plain
from fastnas.ops.dispatch import has_kernel


class Total:
    """Adds terms in the order in which they come, and refuses one that is not like the first.

    Args:
        who: what an error calls a term, before its name.
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self.y: Tensor | None = None
        self.first: tuple[object, torch.Size, torch.dtype] | None = None

    def check(self, name: object, o: object) -> None:
        """Refuses an output that is no Tensor, or has another shape or dtype than the first."""
        if not isinstance(o, Tensor):
            raise TypeError(
                f"{self.who} {name!r} returns a {type(o).__name__}; one Tensor is needed"
            )
        if self.first is None:
            self.first = name, o.shape, o.dtype
        other, shape, dtype = self.first
        if o.shape != shape or (o.dtype != dtype and not _may_differ(o)):
            raise ValueError(
                f"{self.who} {name!r} returns {o.dtype} {list(o.shape)}, {other!r} {dtype}"
                f" {list(shape)}; one shape and dtype is needed"
            )

    def put(self, term: Tensor) -> None:
        """Adds a term."""
        self.y = term if self.y is None else self.y + term

    def sum(self) -> Tensor:
        """Returns the sum of what was put, at least one term."""
        assert self.y is not None
        return self.y


def _may_differ(o: Tensor) -> bool:
    """Tells whether a term may have another dtype than the others."""
    # Under autocast a convolution returns another dtype than an identity; the sum is the wider.
    # It is asked where dtypes differ alone, as the device "meta" has no autocast to ask about.
    return o.dtype.is_floating_point and torch.is_autocast_enabled(o.device.type)


@dataclass
class AtOnce:
    """Holds what final batch norms are given, to be normalised and summed by one call."""

    index: list[int] = field(default_factory=list)
    """Of each which of the weights is its own."""
    z: list[Tensor] = field(default_factory=list)
    norms: dict[int, nn.BatchNorm2d] = field(default_factory=dict)

    def add(self, index: int, z: Tensor, norm: nn.BatchNorm2d) -> None:
        """Adds what the final norm of a candidate is given."""
        self.norms[len(self.z)] = norm
        self.index.append(index)
        self.z.append(z)

    def sum(self, w: Tensor, training: bool) -> Tensor:
        """Returns y = sum_i w_i BN_i(z_i); w has one weight for each.

        Args:
            training: the mode of the norms that are part of the sum; others run before it.
        """
        z = self.z
        if all(map(is_plain, z)) and has_kernel("mixed_norm_sum", z[0], len(z)):
            folded = foldable(z, self.norms, training)
            if folded:
                return norm_sum(z, w, self.norms, folded, training)
        total = Total("")
        for w_k, v_k in zip(w.unbind(), pass_norms(z, self.norms)):
            total.put(w_k * v_k)
        return total.sum()
