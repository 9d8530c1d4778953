"""Holds MixedOp: all candidates of an edge by `mixed_edges`, or computed and then summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastnas import reference
from fastnas.layers.primitives import Zero, drop_path
from fastnas.nn.built import HasReading
from fastnas.nn.facts import is_plain
from fastnas.nn.final_norms import (
    Norms,
    final_norm,
    foldable,
    norm_sum,
    pass_norms,
    run_shared,
    run_to_norm,
    runs_in_order,
)
from fastnas.nn.parts import MixedOpParts
from fastnas.nn.paths import CellWeights, Paths, add_siblings, check_paths
from fastnas.nn.run import How, NoiseDraw, can_run, run_edge
from fastnas.ops import draw_noise, mixed_sum
from fastnas.ops.dispatch import has_kernel
from fastnas.reference.arguments import check_images, check_mixing


@dataclass(frozen=True)
class Terms:
    """Holds outputs to be summed: each one's mixing weight, which are noisy, and norms to pass."""

    outputs: list[Tensor]
    weight_index: list[int]
    noisy: list[int]
    norms: Norms = field(default_factory=dict)


class MixedOp(HasReading, reference.MixedOp):
    """Runs `reference.MixedOp` on fused ops: DARTS candidates on `mixed_edges`, others summed by
    `mixed_norm_sum`, with the batch norms that they end in, or by `mixed_sum`.

    Which one is decided call by call (`why_not_fused`); `memory` is `mixed_edges`'. The `none`
    candidate costs nothing: it has no term, and its weight the gradient 0 that it has in eager.
    (Eager's 0 x also turns an inf in x into NaN there; here only other candidates do.)
    Arguments, state-dict names and results are those of `reference.MixedOp`.
    """

    memory = "lean"

    def parts(self) -> MixedOpParts | str:
        """Returns the candidates as the fused op knows them, or why it runs none of them."""
        return cast(MixedOpParts | str, self._reading.read(self))

    def fused_parts(self, x: Tensor) -> MixedOpParts | str:
        """Returns `parts`, or why a call on x computes candidate by candidate."""
        parts = self.parts()
        return parts if isinstance(parts, str) else can_run(parts, x, self.training) or parts

    def why_not_fused(self, x: Tensor) -> str | None:
        """Says why a call on x runs the modules of some candidates or of all, or None."""
        parts = self.fused_parts(x)
        return parts if isinstance(parts, str) else parts.why_foreign

    def refusal(self, parts: MixedOpParts) -> str | None:
        """Says what settings or methods of this op ask that the fused op does not do, or None."""
        own = self.overridden("terms", "mix", "reduce")
        if own:
            return f"it has a method `{own[0]}` of its own"
        if self.training and self.skip_drop_path:
            return "skip_drop_path drops samples after the noise"
        if self.noise is None:
            return None
        skips = [k for k, c in enumerate(parts.candidates) if c and c.name == "skip_connect"]
        if list(self.skips) != skips:
            return f"noise is on the candidates {list(self.skips)}, not on the skips {skips}"
        return None

    def why_not_in_a_cell(self) -> str | None:
        """Says why the candidates are not all of what a call of this op runs, or None."""
        if self.overridden("forward"):
            return f"{type(self).__name__} has a forward of its own"
        return None if is_plain(self) else f"{type(self).__name__} has hooks"

    def overridden(self, *methods: str) -> list[str]:
        """Returns those of the methods that a subclass, or this very object, replaces."""
        own, kind = vars(self), type(self)
        return [m for m in methods if m in own or getattr(kind, m) is not getattr(MixedOp, m)]

    def terms(
        self,
        x: Tensor,
        pools: dict[Any, Tensor] | None = None,
        only: Sequence[int] | None = None,
    ) -> Terms:
        """Computes the outputs of the candidates on x, without `none`: `mix` sums them.

        A candidate that ends in a batch norm is computed up to that.

        Args:
            pools: what `run_to_norm` shares between the mixed ops on the same x.
            only: the candidates that are run, be it `none`.
        """
        # `none` is 0 x: it has no term. Hooks or a forward of its own make it run all the same.
        live = [k for k, op in enumerate(self._ops) if not (isinstance(op, Zero) and is_plain(op))]
        # A sum needs a term: of `none` alone the first candidate runs, and gives the zeros their
        # shape.
        if only is not None or not live:
            live = [0] if only is None else list(only)
        noisy_candidates = self.noisy_skips() if self.training else ()
        dropped = self.skips if self.training and self.skip_drop_path else ()
        outputs: list[Tensor] = []
        norms: dict[int, nn.BatchNorm2d] = {}
        for t, k in enumerate(live):
            op, norm = self._ops[k], None
            if k not in noisy_candidates and k not in dropped and runs_in_order(op):
                # Noise and masks act on what comes after the norm, so such a candidate runs to its
                # end.
                norm = final_norm(op)
            outputs.append(run_shared(op, x, pools) if norm is None else run_to_norm(op, x, pools))
            if norm is not None:
                norms[t] = norm
        noisy = [t for t, k in enumerate(live) if k in noisy_candidates]
        if dropped:
            # The mask comes after the noise, so the noise cannot wait for the sum.
            for t, k in enumerate(live):
                if k in dropped:
                    outputs[t] = drop_path(
                        self._noised(outputs[t], t in noisy), self.skip_drop_path
                    )
            noisy = []
        return Terms(outputs, live, noisy, norms)

    def mix(self, terms: Terms, w: Tensor, draw: NoiseDraw | None) -> Tensor:
        """Does `reduce` after the batch norms of the terms, in one `mixed_norm_sum` if it can."""
        z = terms.outputs
        folded = foldable(z, terms.norms, self.training) if self._sums_by_kernel(z) else {}
        if not folded:
            return self.reduce(pass_norms(z, terms.norms), w, terms.noisy, draw)
        # Noise is on skips, which end in no norm that is folded: `noisy` and `normed` do not meet.
        options = self._noise_options(terms.noisy, draw, w.device)
        return norm_sum(z, w, terms.norms, folded, self.training, **options)

    def reduce(
        self, outputs: Sequence[Tensor], w: Tensor, noisy: Sequence[int], draw: NoiseDraw | None
    ) -> Tensor:
        """y = sum_k w_k outputs_k: the one place to override how candidates are combined."""
        return mixed_sum(outputs, w, **self._noise_options(noisy, draw, w.device))

    def _sums_by_kernel(self, z: Sequence[Tensor]) -> bool:
        """Tells whether `reduce` is the one above, and a kernel does the norms as well."""
        return not self.overridden("reduce") and has_kernel("mixed_norm_sum", z[0], len(z))

    def _noise_options(
        self, noisy: Sequence[int], draw: NoiseDraw | None, device: torch.device
    ) -> dict[str, Any]:
        if not noisy or self.noise is None:
            return {}
        if draw is None:
            draw = self.draw(device)
        return {"noise": self.noise, "noisy": noisy, "level": draw.level, "rng": draw.rng}

    def draw(self, device: torch.device) -> NoiseDraw:
        """Draws a fresh stream for one call."""
        assert self.noise is not None
        return NoiseDraw(
            self.noise.level(self.noise_amplitude, device), draw_noise(device=device)[0]
        )

    def forward(self, x: Tensor, w: CellWeights) -> Tensor:
        """Maps x [N, C, H, W] and w [K] to [N, C, H / stride, W / stride].

        Of several paths, w is the `Paths` of one edge, and x is [paths N, C, H, W].
        """
        check_images("x", x)
        if isinstance(w, Paths):
            check_paths("w", w.as_edge(), 1)
        else:
            check_mixing("w", w, [len(self._ops)], x)
        rows = w.as_edge().rows() if isinstance(w, Paths) else []
        if any(not 0 <= k < len(self._ops) for (k,), _ in rows):
            raise ValueError(
                f"w.choice is {[k for (k,), _ in rows]}; 0 to {len(self._ops) - 1} is allowed"
            )
        # Each path's images are a batch of their own.
        groups = x.chunk(len(rows)) if rows else (x,)
        parts = self.fused_parts(groups[0])
        foreign = None if isinstance(parts, str) else list(parts.foreign)
        if isinstance(w, Paths) and (isinstance(parts, str) or foreign):
            return torch.cat([self._one(g, *row, w.siblings) for g, row in zip(groups, rows)])
        y = None
        if not isinstance(parts, str):
            draw = None if self.noise is None else self._draw_for(w)
            y = run_edge(parts, x, w, How(self.training, self.noise, self.memory), draw)
            if not foreign:
                return y
        assert isinstance(w, Tensor)
        return self.add(y, self.terms(x, only=foreign), w, None)

    def add(self, y: Tensor | None, terms: Terms, w: Tensor, draw: NoiseDraw | None) -> Tensor:
        """Does `mix` on the terms, each with its own of the weights w, and on y, if any."""
        weight = select(w, terms.weight_index)
        if y is not None:
            # y is a sum already, whose terms carry their weights: its own is 1, a constant.
            terms = replace(terms, outputs=[*terms.outputs, y])
            weight = torch.cat([weight, weight.new_ones(1)])
        return self.mix(terms, weight, draw)

    def _one(self, x: Tensor, row: list[int], weight: Tensor, siblings: bool) -> Tensor:
        """Runs the candidate of one path, by its module."""
        y = self.mix(self.terms(x, only=row), weight, None)
        return add_siblings(y, weight, row) if siblings else y

    def _draw_for(self, w: CellWeights) -> NoiseDraw:
        """Draws a stream, or one per path."""
        if not isinstance(w, Paths) or w.choice.dim() == 0:
            return self.draw(w.weight.device if isinstance(w, Paths) else w.device)
        assert self.noise is not None
        device = w.weight.device
        level = self.noise.level(self.noise_amplitude, device)
        return NoiseDraw(level, draw_noise(w.choice.shape[0], device))

    def _noised(self, x: Tensor, noisy: bool) -> Tensor:
        if not noisy:
            return x
        return self.reduce([x], torch.ones(1, device=x.device), [0], None)


def select(w: Tensor, index: list[int]) -> Tensor:
    """Returns w[index] from runs of neighbours: no gather, no scatter in backward, no index.

    An index tensor would be copied to the device at every call, which a CUDA graph cannot hold.
    """
    runs = [[index[0], index[0]]]
    for k in index:
        if k != runs[-1][1]:
            runs.append([k, k])
        runs[-1][1] += 1
    # They are all weights in order: this is w itself, not a copy.
    if runs == [[0, w.shape[0]]]:
        return w
    parts = [w[start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
