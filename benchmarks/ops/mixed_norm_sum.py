"""Benchmarks mixed_norm_sum: cases, inputs, providers, and the fp64 results they are held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastnas import mixed_norm_sum, reference
from fastnas.benchmarks.harness.verify import EAGER, SEED, Exact, Problem, eps_of
from fastnas.benchmarks.ops.mixed_sum import BATCHES, DTYPES, LAYOUTS, STAGES, fused_backends

OP = "mixed_norm_sum"
EPS = 1e-5
SKIP = 3
"""The term that is not normed: skip_connect's place in the DARTS space."""


@dataclass(frozen=True)
class MixedNormSumCase:
    """Describes K tensors of one shape, all normed but the skip."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    K: int = 7
    layout: str = "contiguous"

    op = OP

    @property
    def normed(self) -> list[bool]:
        return [k != SKIP for k in range(self.K)]

    def bytes_moved(self, pass_: str) -> int:
        """Counts normed terms twice each way, as no cache holds them; skip and y once."""
        normed = sum(self.normed)
        forward = normed + self.K + 1
        # A first sweep reads dy and every term for dw and the sums, a second dy and the normed
        # ones, and every gradient is written.
        backward = (1 + self.K) + (1 + normed) + self.K
        tensors = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_]
        return tensors * math.prod(self.shape) * self.dtype.itemsize

    def fma(self, pass_: str) -> None:
        """Returns None: traffic is the limit, not arithmetic."""

    def problem(self, device: str, full: bool) -> Problem:
        generator = torch.Generator().manual_seed(SEED)

        def draw(layout: str = self.layout) -> Tensor:
            t = torch.randn(self.shape, generator=generator).to(device, self.dtype)
            return t.to(memory_format=LAYOUTS[layout])

        # The means are 0 to 6, where statistics by a difference of large sums would lose digits.
        z = [(k + draw()).detach().requires_grad_() for k in range(self.K)]
        alpha = torch.randn(self.K, generator=generator) / 2
        w, dy = torch.softmax(alpha, 0).to(device).requires_grad_(), draw()
        return Problem(
            leaves={"dw": w, **{f"dz[{k}]": z_k for k, z_k in enumerate(z)}},
            dy=dy,
            forwards=self._forwards(z, w, device, full),
            exact=lambda provider, y: self._exact(z, w, dy),
            alternatives={},
        )

    def _forwards(
        self, z: list[Tensor], w: Tensor, device: str, full: bool
    ) -> dict[str, Callable[[], Tensor]]:
        eager = partial(reference.mixed_norm_sum, normed=self.normed, eps=EPS)
        forwards: dict[str, Callable[..., Tensor]] = {
            EAGER: eager,
            "compile": torch.compile(eager, fullgraph=True, dynamic=False),
        }
        if full:
            forwards["compile-max"] = torch.compile(
                eager, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs"
            )
        for backend in fused_backends(device, self.dtype, self.K, OP):
            forwards[f"fastnas-{backend}"] = partial(
                mixed_norm_sum, normed=self.normed, eps=EPS, backend=backend
            )
        return {name: partial(forward, z, w) for name, forward in forwards.items()}

    def _exact(self, z: list[Tensor], w: Tensor, dy: Tensor) -> dict[str, Exact]:
        """Bounds sums in fp32 in any order; a result is rounded to the case's dtype."""
        z = [z_k.detach().double() for z_k in z]
        wide_w, wide_dy, eps = w.detach().double(), dy.double(), eps_of(self.dtype)
        needs = [True] * self.K
        v, statistics = reference.batch_norms(z, self.normed, EPS)
        dz, dw = reference.mixed_norm_sum_grads(
            wide_dy, z, wide_w, self.normed, statistics, EPS, True, needs, True
        )
        y = reference.weighted_sum(v, wide_w)
        assert dw is not None
        products = torch.stack([(wide_dy * v_k).abs().sum() for v_k in v])
        rounding = 8 * eps_of(torch.float32)
        return {
            "y": Exact(y, (eps + rounding) * float(y.abs().max())),
            "dw": Exact(dw, rounding * products + eps * float(dw.abs().max())),
            **{
                f"dz[{k}]": Exact(t, (eps + rounding) * float(t.abs().max()))
                for k, t in enumerate(dz)
            },
        }


def cases(device: str, quick: bool = False, full: bool = False) -> list[MixedNormSumCase]:
    """Lists every stage, dtype and layout; with `quick` the smallest stage alone."""
    batches = BATCHES[device][:1] if quick else BATCHES[device]
    table = []
    for batch in batches:
        for stage in STAGES[-1:] if quick else STAGES:
            shape = (batch, *stage)
            table += [MixedNormSumCase(shape, dtype) for dtype in DTYPES[device]]
            table.append(MixedNormSumCase(shape, layout="channels_last"))
            if full:
                table += [MixedNormSumCase(shape, K=K) for K in (2, 16)]
    return table
