"""Holds InputChoice: which of several inputs a node reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

from fastnas.checks import check_int
from fastnas.nn.logits import Logits
from fastnas.nn.terms import Total
from fastnas.reference.sample_paths import logits_per_node, node_pairs

Input = Tensor | Callable[[], Tensor]
KEPT = 2
"""Inputs of a node, as in DARTS and ROME."""


class InputChoice(Logits):
    """Computes y = w_i x_i + w_j x_j of two sampled inputs among n, or y = sum_i w_i x_i of all.

    With logits beta of the module's own, g ~ Gumbel, and Bt a softmax of (log softmax(beta) + g)
    / tau::

        "top2"     beta [n]; i, j are the two largest of beta + g; w_i = 1 + Bt_i - sg(Bt_i)
        "pairs"    beta [n (n - 1) / 2], of the pairs (0, 1), (0, 2), ... in that order; {i, j} is
                   the pair with the largest beta + g, whose 1 + Bt - sg(Bt) both weigh
        "softmax"  beta [n]; w = softmax(beta), nothing is sampled

    In evaluation mode the most probable two are taken, of weight 1. Of two inputs both are, and
    their logits get the gradient 0.

    Source: ROME (Wang et al., ICCV 2023, arXiv 2011.11233): "pairs" eq. 4-6 (v1), "top2" eq. 7-8
    (v2); see `sample_paths`.

    Args:
        inputs: n, at least 2.
        mixing: as above.
        tau: temperature of "top2" and "pairs", 1 by default; may be set later.
        logits: as in `Choice`.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    mixings = ("top2", "pairs", "softmax")
    sampled = ("top2", "pairs")
    mixing: str

    def __init__(
        self,
        inputs: int,
        *,
        mixing: str = "top2",
        tau: float | Tensor | None = None,
        logits: nn.Parameter | None = None,
    ) -> None:
        check_int("InputChoice: inputs", inputs, KEPT)
        topology = mixing if mixing == "pairs" else "top2"
        (count,) = logits_per_node([inputs], topology)
        super().__init__("InputChoice", count, mixing, tau, logits)
        self.inputs = inputs

    def extra_repr(self) -> str:
        tau = f", tau={self.tau}" if self.mixing in self.sampled else ""
        return f"{self.inputs}, mixing={self.mixing!r}{tau}"

    def weights(self) -> dict[int, Tensor]:
        """Returns index to weight of the inputs that a call would read, in order; it draws."""
        beta = self.own_logits()
        if self.mixing == "softmax":
            return dict(enumerate(beta.softmax(-1).unbind()))
        if not self.training:
            return {i: beta.new_ones(()) for i in self.best()}
        n, beta = self.inputs, self.drawable()
        # Of one operation on each edge, its own weight is 1: what is left is that of the topology.
        sample = self.drawn(beta.new_zeros(n, 1), beta=beta, nodes=(n,), topology=self.mixing)
        kept = enumerate(sample.op[0].tolist())
        return {i: sample.weight[0, i] for i, op in kept if op >= 0}

    def best(self) -> tuple[int, ...]:
        """Returns the two inputs that are most probable, in order; of "softmax" likewise.

        Raises:
            ValueError: a logit is not finite.
        """
        if self.mixing == "pairs":
            pair = node_pairs(self.inputs)[:, self.largest_logits(1)[0]]
            return tuple(cast(list[int], pair.tolist()))
        return tuple(sorted(self.largest_logits(KEPT)))

    def forward(self, inputs: Sequence[Input]) -> Tensor:
        """Mixes the inputs.

        Args:
            inputs: n tensors of one shape and dtype, or functions without arguments that return
                them, such as ``functools.partial(edge, x)``: what is not read is not called.
        """
        if not isinstance(inputs, list | tuple) or len(inputs) != self.inputs:
            given = len(inputs) if isinstance(inputs, list | tuple) else type(inputs).__name__
            raise ValueError(
                f"InputChoice: inputs is {given}; a list or tuple of {self.inputs} is needed"
            )
        for i, x in enumerate(inputs):
            if not isinstance(x, Tensor) and not callable(x):
                raise TypeError(
                    f"InputChoice: inputs[{i}] is a {type(x).__name__}; a Tensor, or a function"
                    " that returns one, is needed"
                )
        total = Total("InputChoice: input")
        for i, weight in self.weights().items():
            x = inputs[i]
            value = x if isinstance(x, Tensor) else x()
            total.check(i, value)
            total.put(weight * value)
        return total.sum()
