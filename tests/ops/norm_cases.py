"""What the tests of mixed_norm_sum share; the rule is that of rule.py, element by element.

S of the rounding term: the mean is a sum accumulated in float32, so that v_k = (z_k - mu) r is off
by eps mean(|z_k|) r even where it is small. A normed v_k counts |v_k| + mean(|z_k|) r, a mean
mean(|z_k|), and a variance itself and eps times its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cases
import pytest
import torch
from cases import laid_out, own_memory
from edge_cases import EPS, MOMENTUM, Pair, named, updated
from rule import NOTHING, Allowance, Results, elementwise
from torch import Tensor

import fastnas
from fastnas import reference
from fastnas.backends.layout import common_format
from fastnas.reference import SkipNoise
from fastnas.reference.mixed_norm_sum import Statistics
from fastnas.reference.mixed_sum import draws

BACKENDS_OF_CASES = pytest.mark.backends("eager", "cpu", "cuda-host", "cuda", "triton")


@dataclass(frozen=True)
class Inputs:
    """A call of mixed_norm_sum and the gradient that comes back; given statistics mean eval."""

    z: list[Tensor]
    w: Tensor
    dy: Tensor
    normed: list[bool]
    statistics: Statistics | None = None
    noise: SkipNoise | None = None
    noisy: tuple[int, ...] = ()
    level: Tensor | None = None
    rng: Tensor | None = None

    @property
    def form(self) -> str:
        return self.noise.form if self.noise is not None and self.noisy else "none"

    @property
    def training(self) -> bool:
        return self.statistics is None

    def initial_running(self) -> list[Pair]:
        """Of each normed term; where they are given, those."""
        if self.statistics is not None:
            return list(zip(*self.statistics))
        wide = torch.promote_types(self.z[0].dtype, torch.float32)
        start = self.z[0].new_empty(self.z[0].shape[1], dtype=wide)
        return [(torch.full_like(start, 0.5), torch.full_like(start, 2.0))
                for _ in range(sum(self.normed))]  # fmt: skip

    def cpu(self) -> Inputs:
        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.cpu()

        statistics = self.statistics and (self.statistics[0].cpu(), self.statistics[1].cpu())
        return replace(
            self, z=[t.cpu() for t in self.z], w=self.w.cpu(), dy=self.dy.cpu(),
            statistics=statistics, level=moved(self.level), rng=moved(self.rng),
        )  # fmt: skip

    def wide(self) -> tuple[list[Tensor], Statistics]:
        """The terms and what they are normalised by, in fp64."""
        z = [t.double() for t in self.z]
        if self.statistics is None:
            return z, reference.batch_norms(z, self.normed)[1]
        mean, var = self.statistics
        return z, (mean.double(), var.double())


@dataclass(frozen=True)
class Outcome(cases.Outcome):
    """y, the gradients, and in training the running statistics of the normed terms."""

    running: Results = field(default_factory=dict)

    def named(self) -> dict[str, Tensor | None]:
        return super().named() | self.running


def make(
    shape: Sequence[int],
    normed: Sequence[bool],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    noise: SkipNoise | None = None,
    noisy: Sequence[int] = (),
    offset: float = 0.0,
    training: bool = True,
    w_dtype: torch.dtype | None = None,
    layouts: Sequence[str] = ("contiguous",),
    dy_layout: str = "contiguous",
    seed: int = 0,
) -> Inputs:
    """z_k about `offset` of standard deviation 1 + k, w of both signs, normal dy."""
    generator = torch.Generator().manual_seed(seed)

    def normal(layout: str, scale: float = 1.0, about: float = 0.0) -> Tensor:
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        return laid_out((about + scale * values).to(device, dtype), layout)

    terms = len(normed)
    z = [normal(layouts[k % len(layouts)], 1.0 + k % 3, offset * (1 + k % 3)) for k in range(terms)]
    w = 2 * torch.rand(terms, generator=generator, dtype=torch.float64) - 1
    level = rng = None
    if noise is not None and noisy:
        level = noise.level(device=torch.device(device))
        rng = torch.randint(2**62, (2,), generator=generator).to(device)
    statistics = None
    if not training:
        wide = torch.promote_types(dtype, torch.float32)
        rows = torch.rand(2, sum(normed), shape[1], generator=generator, dtype=torch.float64)
        statistics = (rows[0] - 0.5).to(device, wide), (rows[1] + 0.1).to(device, wide)
    return Inputs(z, w.to(device, w_dtype or dtype), normal(dy_layout), list(normed), statistics,
                  noise, tuple(noisy), level, rng)  # fmt: skip


def call(
    inputs: Inputs,
    z: Sequence[Tensor],
    w: Tensor,
    backend: str | None,
    running: Sequence[Pair] | None = None,
) -> Tensor:
    """`running` of each normed term; by default the given statistics, and in training none."""
    if running is None and not inputs.training:
        running = inputs.initial_running()
    pairs = None
    if running is not None:
        rows = iter(running)
        pairs = [next(rows) if normed else None for normed in inputs.normed]
    return fastnas.mixed_norm_sum(
        z, w, normed=inputs.normed, eps=EPS, running=pairs, momentum=MOMENTUM,
        training=inputs.training, noise=inputs.noise, noisy=inputs.noisy, level=inputs.level,
        rng=inputs.rng, backend=backend,
    )  # fmt: skip


def run(inputs: Inputs, backend: str | None, needs: Sequence[bool] | None = None) -> Outcome:
    """mixed_norm_sum and its backward; `needs` says which of (w, *z) want gradients.

    On the device of the backend; the outcome is on the CPU.
    """
    needs = [True] * (1 + len(inputs.z)) if needs is None else list(needs)
    leaves = [t.detach().requires_grad_(n) for t, n in zip((inputs.w, *inputs.z), needs)]
    running = inputs.initial_running()
    y = call(inputs, leaves[1:], leaves[0], backend, running)
    wanted = [t for t in leaves if t.requires_grad]
    assert y.requires_grad == bool(wanted)
    found = iter(torch.autograd.grad(y, wanted, inputs.dy) if wanted else ())
    dw, *dz = [next(found).cpu() if need else None for need in needs]
    moved = {name: t.cpu() for name, t in named(running).items()} if inputs.training else {}
    return Outcome(y.detach().cpu(), dw, dz, moved)


def by_eager(inputs: Inputs, dtype: torch.dtype | None = None) -> Outcome:
    """The specification with torch's own autograd, in the dtype of the inputs or in a wider one."""
    inputs = inputs.cpu()
    leaves = [t.detach() for t in (inputs.w, *inputs.z)]
    if dtype is not None:
        # Contiguous: in evaluation torch's backward is wrong for z [1, C, 1, W] of strides
        # (1, 1, 1, C).
        leaves = [t.to(dtype).contiguous() for t in leaves]
    w, *z = leaves = [t.requires_grad_() for t in leaves]
    statistics = inputs.statistics
    if statistics is not None and dtype is not None:
        statistics = statistics[0].to(dtype), statistics[1].to(dtype)
    y = reference.mixed_norm_sum(z, w, inputs.normed, EPS, statistics, inputs.noisy, inputs.form,
                                 inputs.level, inputs.rng)  # fmt: skip
    dw, *dz = torch.autograd.grad(y, leaves, inputs.dy.to(y.dtype))
    return Outcome(y.detach(), dw, list(dz), moved_running(inputs, [t.detach() for t in z]))


def moved_running(inputs: Inputs, z: Sequence[Tensor]) -> Results:
    """The running statistics after a call on these terms; only training moves them."""
    running = inputs.initial_running()
    if not inputs.training or not running:
        return {}
    if not z[0].numel():
        return named(running)
    stats = torch.stack(reference.batch_norms(z, inputs.normed, EPS)[1], 1)
    return updated(running, stats, z[0].numel() // z[0].shape[1])


def magnitudes(inputs: Inputs) -> Outcome:
    """S of the rounding term, for y and every gradient."""
    inputs = inputs.cpu()
    z, statistics = inputs.wide()
    w, dy = inputs.w.double().abs(), inputs.dy.double().abs()
    dims = [d for d in range(dy.dim()) if d != 1]
    v = [t.abs() for t in reference.batch_norms(z, inputs.normed, EPS, statistics)[0]]
    size, dz = list(v), [w_k * dy for w_k in w]
    rows = iter(zip(*statistics))
    running = []
    for k, normed in enumerate(inputs.normed):
        if not normed:
            continue
        shape = 1, -1, *[1] * (dy.dim() - 2)
        mean, var = (t.view(shape) for t in next(rows))
        r = (var + EPS).rsqrt()
        about = z[k].abs().mean(dims, True) if inputs.training else mean.abs()
        size[k] = v[k] + about * r
        if inputs.training:
            size_of_mean = about.flatten()
            eps = torch.finfo(torch.promote_types(inputs.z[0].dtype, torch.float32)).eps
            running.append((size_of_mean, var.flatten() + eps * size_of_mean.square()))
            sums = size[k] * (dy * v[k]).mean(dims, True) + v[k] * (dy * size[k]).mean(dims, True)
            dz[k] = r * w[k] * (dy + dy.mean(dims, True) + sums)
        else:
            dz[k] = r * dz[k]
    if inputs.form != "none":
        assert inputs.level is not None and inputs.rng is not None
        std = reference.standard_deviations(z, inputs.noisy, inputs.form)
        drawn = draws(z[0], inputs.noisy, inputs.form, inputs.level, inputs.rng, std)
        shift, scale = inputs.level.tolist()
        for j, (k, d) in enumerate(drawn.items()):
            spread = abs(shift) + abs(scale) * (float(std[j]) if len(std) else 1.0)
            noise = spread + (d - shift).abs()
            if inputs.form.endswith("multiplicative"):
                size[k], dz[k] = size[k] * noise, dz[k] * noise
            else:
                size[k] = size[k] + noise
    y = sum((w_k * s for w_k, s in zip(w, size)), torch.zeros_like(dy))
    return Outcome(y, torch.stack([(dy * s).sum() for s in size]), list(dz), named(running))


def compare(got: Outcome, inputs: Inputs, allowance: Allowance = NOTHING) -> None:
    """Fails unless every part of `got` obeys the rule."""
    exact, eager = by_eager(inputs, torch.float64), by_eager(inputs)
    elementwise(got.named(), exact.named(), eager.named(), magnitudes(inputs).named(),
                inputs.z[0].dtype, allowance)  # fmt: skip


def examine(got: Outcome, inputs: Inputs, allowance: Allowance = NOTHING) -> None:
    """The rule, the layout of the results, and that no output shares memory with an input."""
    compare(got, inputs, allowance)
    like = torch.empty_like(inputs.z[0], memory_format=common_format(inputs.z))
    assert got.y.stride() == like.stride(), f"y has strides {got.y.stride()}"
    found = [t for t in got.named().values() if t is not None]
    own_memory(found, (inputs.w, inputs.dy, *inputs.z))


def check(inputs: Inputs, backend: str, needs: Sequence[bool] | None = None) -> Outcome:
    """A call, examined."""
    got = run(inputs, backend, needs)
    examine(got, inputs)
    return got
