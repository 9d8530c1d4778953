"""What the tests of mixed_sum share: inputs, and the checks that a backend must pass.

The rule is that of rule.py, element by element. In S a draw counts |shift| + spread (1 + |eps|),
since eps carries an absolute error where it is small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from rule import elementwise
from torch import Tensor

import fastnas
from fastnas import reference
from fastnas.backends.layout import common_format
from fastnas.reference import SkipNoise
from fastnas.reference.mixed_sum import draws

FORMS = (
    "gaussian_additive",
    "gaussian_multiplicative",
    "uniform_additive",
    "uniform_multiplicative",
    "bernoulli_multiplicative",
)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded", "misaligned")


def noise_of(form: str, mean: float | None = None, factor: float = 0.2) -> SkipNoise:
    kind, mixture = form.split("_")
    return SkipNoise(kind, mixture, None if kind == "bernoulli" else mean, factor)


@dataclass(frozen=True)
class Inputs:
    """A call of mixed_sum and the gradient that comes back."""

    x: list[Tensor]
    w: Tensor
    dy: Tensor
    noise: SkipNoise | None = None
    noisy: tuple[int, ...] = ()
    level: Tensor | None = None
    rng: Tensor | None = None

    @property
    def form(self) -> str:
        return self.noise.form if self.noise is not None and self.noisy else "none"

    def cpu(self) -> Inputs:
        level = None if self.level is None else self.level.cpu()
        rng = None if self.rng is None else self.rng.cpu()
        x = [t.cpu() for t in self.x]
        return replace(self, x=x, w=self.w.cpu(), dy=self.dy.cpu(), level=level, rng=rng)


@dataclass(frozen=True)
class Outcome:
    """y and the gradients; None where none was asked for."""

    y: Tensor
    dw: Tensor | None
    dx: list[Tensor | None]

    def named(self) -> dict[str, Tensor | None]:
        return {"y": self.y, "dw": self.dw, **{f"dx[{k}]": d for k, d in enumerate(self.dx)}}


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t in another memory layout; "expanded" keeps only its first column."""
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and t.dim() > 0:
        return t.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "expanded" and t.dim() > 0:
        return t[..., :1].expand(t.shape)
    if layout == "misaligned":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return t.contiguous()


def make(
    shape: Sequence[int],
    terms: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    noise: SkipNoise | None = None,
    noisy: Sequence[int] = (),
    amplitude: float = 1.0,
    offset: float = 0.0,
    w_dtype: torch.dtype | None = None,
    layouts: Sequence[str] = ("contiguous",),
    dy_layout: str = "contiguous",
    seed: int = 0,
) -> Inputs:
    """Normal x (about `offset`) and dy, w of both signs; term k lies as layouts[k mod len]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(about: float, layout: str) -> Tensor:
        values = about + torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        return laid_out(values.to(device, dtype), layout)

    x = [normal(offset, layouts[k % len(layouts)]) for k in range(terms)]
    w = 2 * torch.rand(terms, generator=generator, dtype=torch.float64) - 1
    level = rng = None
    if noise is not None and noisy:
        level = noise.level(amplitude, torch.device(device))
        rng = torch.randint(2**62, (2,), generator=generator).to(device)
    dy = normal(0.0, dy_layout)
    return Inputs(x, w.to(device, w_dtype or dtype), dy, noise, tuple(noisy), level, rng)


def run(inputs: Inputs, backend: str | None, needs: Sequence[bool] | None = None) -> Outcome:
    """mixed_sum and its backward; `needs` says which of (w, *x) want gradients, by default all."""
    needs = [True] * (1 + len(inputs.x)) if needs is None else list(needs)
    leaves = [t.detach() for t in (inputs.w, *inputs.x)]
    leaves = [t.requires_grad_(need) for t, need in zip(leaves, needs)]
    y = fastnas.mixed_sum(
        leaves[1:],
        leaves[0],
        noise=inputs.noise,
        noisy=inputs.noisy,
        level=inputs.level,
        rng=inputs.rng,
        backend=backend,
    )
    wanted = [t for t in leaves if t.requires_grad]
    assert y.requires_grad == bool(wanted)
    found = iter(torch.autograd.grad(y, wanted, inputs.dy) if wanted else ())
    dw, *dx = [next(found) if need else None for need in needs]
    return Outcome(y.detach(), dw, dx)


def by_eager(inputs: Inputs, dtype: torch.dtype | None = None) -> Outcome:
    """The specification with torch's own autograd, in the dtype of the inputs or in a wider one."""
    inputs = inputs.cpu()
    leaves = [t.detach() if dtype is None else t.detach().to(dtype) for t in (inputs.w, *inputs.x)]
    w, *x = leaves = [t.requires_grad_() for t in leaves]
    y = reference.mixed_sum(x, w, inputs.noisy, inputs.form, inputs.level, inputs.rng)
    dw, *dx = torch.autograd.grad(y, leaves, inputs.dy.to(y.dtype))
    return Outcome(y.detach(), dw, list(dx))


def magnitudes(inputs: Inputs) -> Outcome:
    """S of the rounding term, for y and every gradient."""
    inputs = inputs.cpu()
    x = [t.double() for t in inputs.x]
    w, dy = inputs.w.double().abs(), inputs.dy.double().abs()
    v = [t.abs() for t in x]
    dx = [w_k * dy for w_k in w]
    if inputs.form != "none":
        assert inputs.level is not None
        assert inputs.rng is not None
        std = reference.standard_deviations(x, inputs.noisy, inputs.form)
        drawn = draws(x[0], inputs.noisy, inputs.form, inputs.level, inputs.rng, std)
        shift, scale = inputs.level.tolist()
        for j, (k, d) in enumerate(drawn.items()):
            spread = abs(scale) * (float(std[j]) if len(std) else 1.0)
            size = abs(shift) + spread + (d - shift).abs()
            if inputs.form.endswith("multiplicative"):
                v[k], dx[k] = v[k] * size, dx[k] * size
            else:
                v[k] = v[k] + size
    y = sum((w_k * v_k for w_k, v_k in zip(w, v)), torch.zeros_like(dy))
    return Outcome(y, torch.stack([(dy * v_k).sum() for v_k in v]), list(dx))


def compare(got: Outcome, inputs: Inputs) -> None:
    """Fails unless every part of `got` obeys the rule."""
    exact, eager = by_eager(inputs, torch.float64), by_eager(inputs)
    elementwise(got.named(), exact.named(), eager.named(), magnitudes(inputs).named(),
                inputs.x[0].dtype)  # fmt: skip


def examine(got: Outcome, inputs: Inputs) -> None:
    """The rule, the layout of the result, and that no output shares memory with an input."""
    compare(got, inputs)
    like = torch.empty_like(inputs.x[0], memory_format=common_format(inputs.x))
    assert got.y.stride() == like.stride(), f"y has strides {got.y.stride()}"
    found = [t for t in got.named().values() if t is not None]
    own_memory(found, (inputs.w, inputs.dy, *inputs.x))


def own_memory(results: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
    """Fails where an output shares memory with an input or another output."""
    inside = {t.untyped_storage().data_ptr() for t in inputs}
    out = [t.untyped_storage().data_ptr() for t in results if t.untyped_storage().nbytes()]
    assert inside.isdisjoint(out), "an output shares memory with an input"
    assert len(set(out)) == len(out), "two outputs share memory"


def check(inputs: Inputs, backend: str, needs: Sequence[bool] | None = None) -> Outcome:
    """A call, examined."""
    got = run(inputs, backend, needs)
    examine(got, inputs)
    return got


def check_repeats(inputs: Inputs, backend: str) -> None:
    """Twice the same inputs, twice the same bits."""
    first, second = run(inputs, backend).named(), run(inputs, backend).named()
    for name, found in first.items():
        assert torch.equal(bits(found), bits(second[name])), f"{name} differs between two calls"


def check_regenerates(inputs: Inputs, backend: str) -> None:
    """dw_0 = <dy, y> where y is x_0 with strong noise: backward sees the draw of forward."""
    # Of dropout the first is the probability to be kept.
    level = torch.tensor([0.5, 5.0], dtype=torch.float64, device=inputs.w.device)
    inputs = replace(
        inputs, x=inputs.x[:1], w=torch.ones_like(inputs.w[:1]), noisy=(0,), level=level
    )
    got = run(inputs, backend)
    assert got.dw is not None
    products = inputs.dy.double() * got.y.double()
    # y is stored, the same numbers in backward are not: each product is off by one rounding.
    slack = 2 * torch.finfo(got.y.dtype).eps * products.norm() + 1e-5 * products.abs().sum()
    error = (got.dw[0].double() - products.sum()).abs()
    assert error <= slack, f"dw[0] is {error:.3g} from <dy, y>, where {slack:.3g} is allowed"


def bits(t: Tensor | None) -> Tensor:
    assert t is not None
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(whole)


def uniform_mantissas(
    count: int, rng: Tensor, backend: str, layout: str = "contiguous", shape: Sequence[int] = ()
) -> Tensor:
    """word >> 9 of every element, recovered from uniform noise on x = 0, which is exact in fp32."""
    x = laid_out(torch.zeros(tuple(shape) or (count,), device=rng.device), layout)
    level = torch.tensor([0.0, 1.0], dtype=torch.float64, device=rng.device)
    y = fastnas.mixed_sum(
        [x],
        torch.ones(1, device=rng.device),
        noise=SkipNoise("uniform"),
        noisy=[0],
        level=level,
        rng=rng,
        backend=backend,
    )
    m = ((y.double() + 1) * 2.0**23 - 1) / 2
    assert torch.equal(m, m.round())
    return m.to(torch.int64).reshape(-1).cpu()
