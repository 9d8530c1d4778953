"""Benchmarks mixed_sum: cases, inputs, providers, and the fp64 results they are held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastnas import mixed_sum, reference
from fastnas.backends import AUTO, BACKENDS, KERNELS, Request, choose
from fastnas.backends.calls import NO_NOISE, SumCall
from fastnas.backends.outputs import Place
from fastnas.benchmarks.harness.verify import EAGER, SEED, Exact, Problem, WrongError, eps_of
from fastnas.ops import OPS, draw_rng
from fastnas.reference import SkipNoise

OP = "mixed_sum"
NOISE = SkipNoise()
SKIP = 3
"""The term that carries the noise: skip_connect's place in the DARTS space."""
SIGMAS = 6

# These are the activations of the three stages of a DARTS search on 32 x 32 images.
STAGES = ((16, 32, 32), (32, 16, 16), (64, 8, 8))
BATCHES = {"cpu": (64,), "cuda": (64, 256)}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class MixedSumCase:
    """Describes K tensors of one shape; `noise` on one of them makes it `mixed_sum+noise`."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    K: int = 8
    noise: SkipNoise | None = None
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        if self.noise is not None and not self.noise.is_relative:
            raise ValueError(f"noise is {self.noise.form}; only gaussian_additive is verified here")

    @property
    def op(self) -> str:
        return OP if self.noise is None else f"{OP}+noise"

    @property
    def noisy(self) -> list[int]:
        return [] if self.noise is None else [SKIP]

    def bytes_moved(self, pass_: str) -> int:
        """Counts (K + 1) N forward, a term more where its std is needed, (2 K + 1) N backward."""
        forward = self.K + 1
        # The spread of relative noise is that of the term, which is read once before the sum.
        if self.noise is not None and self.noise.is_relative:
            forward += len(self.noisy)
        backward = 2 * self.K + 1
        tensors = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_]
        return tensors * math.prod(self.shape) * self.dtype.itemsize

    def fma(self, pass_: str) -> None:
        """Returns None: traffic is the limit, not arithmetic."""

    def inputs(self, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
        """Makes x and w as leaves, and dy: the same numbers on every device."""
        generator = torch.Generator().manual_seed(SEED)

        def draw() -> Tensor:
            t = torch.randn(self.shape, generator=generator).to(device, self.dtype)
            return t.to(memory_format=LAYOUTS[self.layout])

        x = [draw().requires_grad_() for _ in range(self.K)]
        # Logits of half a standard deviation give no weight so small that its term drowns in
        # rounding.
        alpha = torch.randn(self.K, generator=generator) / 2
        return x, torch.softmax(alpha, 0).to(device).requires_grad_(), draw()

    def problem(self, device: str, full: bool) -> Problem:
        x, w, dy = self.inputs(device)
        return Problem(
            leaves={"dw": w, **{f"dx[{k}]": x_k for k, x_k in enumerate(x)}},
            dy=dy,
            forwards=self._forwards(x, w, device, full),
            exact=_Exact(self, x, w, dy),
            alternatives={"eager-stack": "eager-best", "eager-addcmul": "eager-best"},
        )

    def _forwards(
        self, x: list[Tensor], w: Tensor, device: str, full: bool
    ) -> dict[str, Callable[[], Tensor]]:
        eager = partial(_eager, noise=self.noise)
        forwards: dict[str, Callable[..., Tensor]] = {
            EAGER: eager,
            "eager-stack": partial(_stack, noise=self.noise),
            "eager-addcmul": partial(_addcmul, noise=self.noise),
            "compile": torch.compile(eager, fullgraph=True, dynamic=False),
        }
        if full:
            forwards["compile-max"] = _compiled_max(eager)
        for backend in fused_backends(device, self.dtype, self.K):
            forwards[f"fastnas-{backend}"] = partial(
                mixed_sum, noise=self.noise, noisy=self.noisy, backend=backend
            )
        # It takes terms that are contiguous and fp32, and has no noise.
        if "fastnas-cpu" in forwards and self == MixedSumCase(self.shape, K=self.K):
            forwards["kernels-cpu"] = _kernels_alone
        return {name: partial(forward, x, w) for name, forward in forwards.items()}


def fused_backends(device: str, dtype: torch.dtype, terms: int, op: str = OP) -> list[str]:
    """Lists the backends with kernels that run here, auto's pick first, none interpreted."""
    request = Request(OPS[op], device, dtype, terms)
    able = [
        name
        for name, backend in BACKENDS.items()
        if name != EAGER
        and backend.unavailable() is None
        and backend.can_run(request) is None
        and not getattr(backend, "interpreted", False)
    ]
    # auto's pick comes first, as some cases time that one alone.
    first = choose(OPS[op], torch.device(device), dtype, terms, AUTO)
    return sorted(able, key=lambda name: name != first)


def cases(device: str, quick: bool = False, full: bool = False) -> list[MixedSumCase]:
    """Lists every stage and dtype at K = 8, with `quick` the smallest stage alone.

    K, noise and layout vary on the first stage, with `full` on every one.
    """
    if quick:
        small = (BATCHES[device][0], *STAGES[-1])
        return [
            MixedSumCase(small),
            MixedSumCase(small, torch.bfloat16),
            MixedSumCase(small, noise=NOISE),
        ]
    table = []
    for batch in BATCHES[device]:
        for stage in STAGES:
            shape = (batch, *stage)
            varied = full or shape == (BATCHES[device][0], *STAGES[0])
            for dtype in DTYPES[device]:
                table.append(MixedSumCase(shape, dtype))
                if varied:
                    table.append(MixedSumCase(shape, dtype, noise=NOISE))
            if varied:
                table += [MixedSumCase(shape, K=K) for K in (2, 16)]
                table.append(MixedSumCase(shape, layout="channels_last"))
    return table


def _noised(x: list[Tensor], noise: SkipNoise | None) -> list[Tensor]:
    if noise is None:
        return x
    return [reference.skip_noise(x_k, noise) if k == SKIP else x_k for k, x_k in enumerate(x)]


def _eager(x: list[Tensor], w: Tensor, noise: SkipNoise | None) -> Tensor:
    return reference.weighted_sum(_noised(x, noise), w)


def _stack(x: list[Tensor], w: Tensor, noise: SkipNoise | None) -> Tensor:
    return torch.einsum("k,k...->...", w.to(x[0].dtype), torch.stack(_noised(x, noise)))


def _addcmul(x: list[Tensor], w: Tensor, noise: SkipNoise | None) -> Tensor:
    first, *rest = _noised(x, noise)
    w_first, *w_rest = w.unbind()
    y = w_first * first
    for x_k, w_k in zip(rest, w_rest):
        y = torch.addcmul(y, x_k, w_k)
    return y


def _kernels_alone(x: list[Tensor], w: Tensor) -> Tensor:
    return _KernelsAlone.apply(w, *x)


class _KernelsAlone(torch.autograd.Function):
    """Runs our CPU kernels and nothing else of ours: around them is PyTorch's autograd.

    What `fastnas-cpu` takes more than this is the price of our checks, choices and layouts.
    """

    kernel: Any = KERNELS["mixed_sum", "cpu"]
    rows = Place(torch.contiguous_format, False, 0, 0)
    nothing = torch.empty(0)

    @staticmethod
    def forward(ctx: Any, w: Tensor, *x: Tensor) -> Tensor:
        own, y = _KernelsAlone, torch.empty_like(x[0])
        call = SumCall(list(x), w, NO_NOISE)
        own.kernel.fill(call, own.rows, y, own.nothing, own.nothing)
        ctx.save_for_backward(w, *x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        own, (w, *x) = _KernelsAlone, ctx.saved_tensors
        dx, dw = [torch.empty_like(t) for t in x], torch.empty_like(w)
        call = SumCall(x, w, NO_NOISE)
        own.kernel.fill_grads(dy, call, own.rows, own.nothing, dx, dw, own.nothing)
        return dw, *dx


def _compiled_max(eager: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, mode="max-autotune")

    def forward(x: list[Tensor], w: Tensor) -> Tensor:
        # max-autotune replays CUDA graphs, whose outputs the next replay overwrites.
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x, w)

    return forward


class _Exact:
    """Holds fp64 results; where a provider draws its noise from torch, with the draw it made.

    fastnas draws from Philox, which the reference repeats. The other providers' draw is what their
    y has more than the clean sum: its mean and spread are checked, the rest computed with it.
    """

    def __init__(self, case: MixedSumCase, x: list[Tensor], w: Tensor, dy: Tensor) -> None:
        self.case = case
        self.leaves = x, w, dy

    def __call__(self, provider: str, y: Tensor) -> dict[str, Exact]:
        x, w, dy = (
            [t.detach().double() for t in self.leaves[0]],
            self.leaves[1].detach().double(),
            self.leaves[2].double(),
        )
        eps = eps_of(self.case.dtype)
        slack = torch.zeros_like(w)
        v = list(x)
        if self.case.noise is not None and provider.startswith("fastnas"):
            v[SKIP] = x[SKIP] + self._philox(x)
        elif self.case.noise is not None:
            # What y has more than the clean sum is the noise that this provider has drawn.
            d = (y.detach().double() - reference.weighted_sum(x, w)) / w[SKIP]
            blur = eps * float(y.double().std()) * math.sqrt(self.case.K) / float(w[SKIP])
            _check_draw(d, self.case.noise.spread * float(x[SKIP].std()), blur)
            v[SKIP] = x[SKIP] + d
            # The draw is known to the rounding of y only, which enters dw by its product with dy.
            slack[SKIP] = SIGMAS * float(torch.linalg.vector_norm(dy)) * blur
        right = reference.weighted_sum(v, w)
        dx, _ = reference.mixed_sum_grads(dy, x, w)
        products = [dy * v_k for v_k in v]
        dw = torch.stack([p.sum() for p in products])
        # Sums run in fp32, in any order; the result is rounded to the dtype of the case.
        dw_rounding = eps_of(torch.float32) * torch.stack([p.abs().sum() for p in products])
        return {
            "y": Exact(right, eps * float(right.abs().max())),
            "dw": Exact(dw, dw_rounding + eps * float(dw.abs().max()) + slack),
            **{f"dx[{k}]": Exact(t, eps * float(t.abs().max())) for k, t in enumerate(dx)},
        }

    def _philox(self, x: list[Tensor]) -> Tensor:
        assert self.case.noise is not None
        torch.manual_seed(SEED)
        noise, noisy, device = self.case.noise, self.case.noisy, x[0].device
        settings = noise.form, noise.level(device=device), draw_rng(device=device)[0]
        one = torch.zeros(self.case.K, dtype=torch.float64, device=device)
        one[SKIP] = 1
        return reference.mixed_sum(x, one, noisy, *settings) - x[SKIP]


def _check_draw(d: Tensor, std: float, blur: float) -> None:
    """Raises WrongError unless the draw has mean 0 and the given std, as far as one can tell."""
    count = d.numel()
    found_mean, found_std = float(d.mean()), float(d.std())
    if not abs(found_mean) <= SIGMAS * std / math.sqrt(count) + blur:
        raise WrongError(f"the noise has mean {found_mean:.3g}, not 0")
    if not abs(found_std - std) <= SIGMAS * std / math.sqrt(2 * count) + blur:
        raise WrongError(f"the noise has standard deviation {found_std:.3g}, not {std:.3g}")
