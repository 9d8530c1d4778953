"""MixedOp: all candidates of an edge, summed by one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas import reference
from fastnas.ops import draw_rng, mixed_sum
from fastnas.reference.eval_network import drop_path
from fastnas.reference.primitives import Zero


@dataclass(frozen=True)
class NoiseDraw:
    """What one forward pass draws with: the level on the device, and a Philox stream per node."""

    level: Tensor
    rng: Tensor


@dataclass(frozen=True)
class Terms:
    """Outputs to be summed: which mixing weight each takes, and which carry noise."""

    outputs: list[Tensor]
    weight_index: list[int]
    noisy: list[int]


class MixedOp(reference.MixedOp):
    """`reference.MixedOp` with the weighted sum, its noise and its gradients in `mixed_sum`.

    The `none` candidate costs nothing: it has no term, and its weight the gradient 0 that it has
    in eager. (Eager's 0 x also turns an inf in x into NaN there; here only other candidates do.)
    Arguments, state-dict names and results are those of `reference.MixedOp`.
    """

    def terms(self, x: Tensor) -> Terms:
        """The outputs of the candidates on x, without `none`."""
        live = [k for k, op in enumerate(self._ops) if not isinstance(op, Zero)]
        if not live:
            live = [0]
        noisy_candidates = self.skips if self.training and self.noise is not None else ()
        outputs = [self._ops[k](x) for k in live]
        noisy = [t for t, k in enumerate(live) if k in noisy_candidates]
        if self.training and self.skip_drop_path:
            # The mask comes after the noise, so the noise cannot wait for the sum.
            for t, k in enumerate(live):
                if k in self.skips:
                    outputs[t] = drop_path(
                        self._noised(outputs[t], t in noisy), self.skip_drop_path
                    )
            noisy = []
        return Terms(outputs, live, noisy)

    def reduce(
        self, outputs: Sequence[Tensor], w: Tensor, noisy: Sequence[int], draw: NoiseDraw | None
    ) -> Tensor:
        """sum_k w_k outputs_k: the one place to override how candidates are combined."""
        if not noisy or self.noise is None:
            return mixed_sum(outputs, w)
        if draw is None:
            draw = self.draw(w.device)
        return mixed_sum(outputs, w, noise=self.noise, noisy=noisy, level=draw.level, rng=draw.rng)

    def draw(self, device: torch.device) -> NoiseDraw:
        """A fresh stream for one call."""
        assert self.noise is not None
        return NoiseDraw(self.noise.level(self.noise_amplitude, device), draw_rng(device=device)[0])

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, C, H, W], w [K] -> [N, C, H / stride, W / stride]."""
        if w.shape != (len(self._ops),):
            raise ValueError(
                f"MixedOp: w has shape {list(w.shape)}; [{len(self._ops)}] is needed, one weight"
                " per candidate"
            )
        terms = self.terms(x)
        return self.reduce(terms.outputs, select(w, terms.weight_index), terms.noisy, None)

    def _noised(self, x: Tensor, noisy: bool) -> Tensor:
        if not noisy:
            return x
        return self.reduce([x], torch.ones(1, device=x.device), [0], None)


def select(w: Tensor, index: list[int]) -> Tensor:
    """w[index], or w itself where that is all of it in order: no gather, no scatter in backward."""
    if index == list(range(w.shape[0])):
        return w
    if index == list(range(index[0], index[0] + len(index))):
        return w[index[0] : index[0] + len(index)]
    return w[torch.tensor(index, device=w.device)]
