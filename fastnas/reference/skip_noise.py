"""Draws NoisyDARTS' noise on the skip connection from a counter-based generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.checks import check_fields, check_int, check_number, check_type, typed

KINDS = ("gaussian", "uniform", "bernoulli")
MIXTURES = ("additive", "multiplicative")


@dataclass(frozen=True)
class SkipNoise:
    """Says what is drawn on a skip connection, after NoisyDARTS (arXiv 2005.03566, and its code).

    With eps ~ N(0, 1) or U(-1, 1) per element, r the amplitude (1 unless the noise decays)::

        d = r (mean + s eps)
        additive:        o(x) + d      s = factor std(o(x))  gaussian
        multiplicative:  o(x) d        s = factor            gaussian
        either                         s = sqrt(3 factor)    uniform, so its variance is `factor`

    "bernoulli" is dropout, p = r factor, element by element; it is multiplicative and has no mean
    of its own::

        d = 1 / (1 - p) with probability 1 - p, else 0

    It is what P-DARTS puts on its identities, and is not drawn on strided skips (Chen et al., ICCV
    2019, section 3.3 and its code).

    std is the unbiased standard deviation of the whole tensor, detached: d is a constant in
    backward. The uniform spread is absolute, as in the code; the Gaussian additive one relative.

    Args:
        kind: "gaussian", "uniform" or "bernoulli".
        mixture: "additive" or "multiplicative".
        mean: None is the unbiased choice: 0 for additive, 1 for multiplicative.
        factor: lambda of the paper, >= 0; of "bernoulli" p, below 1.
    """

    kind: str = "gaussian"
    mixture: str = "additive"
    mean: float | None = None
    factor: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self)
        for field, allowed in (("kind", KINDS), ("mixture", MIXTURES)):
            if getattr(self, field) not in allowed:
                given = getattr(self, field)
                raise ValueError(f"noise {field} is {given!r}; allowed: {', '.join(allowed)}")
        if not (math.isfinite(self.factor) and self.factor >= 0):
            raise ValueError(f"noise factor is {self.factor}; a finite number >= 0 is allowed")
        if self.kind == "bernoulli":
            if self.mixture != "multiplicative" or self.mean is not None:
                raise ValueError(
                    f"noise mixture is {self.mixture!r} and mean {self.mean}; of bernoulli it is"
                    " 'multiplicative', and mean is None"
                )
            if self.factor >= 1:
                raise ValueError(f"noise factor is {self.factor}; below 1 is allowed of bernoulli")
        if self.mean is not None and not math.isfinite(self.mean):
            raise ValueError(f"noise mean is {self.mean}; a finite number or None is allowed")

    @property
    def form(self) -> str:
        return f"{self.kind}_{self.mixture}"

    @property
    def is_relative(self) -> bool:
        """Returns whether the spread is a multiple of std(o(x))."""
        return self.form == "gaussian_additive"

    @property
    def on_reductions(self) -> bool:
        """Tells whether strided skips carry it too."""
        return self.kind != "bernoulli"

    @property
    def centre(self) -> float:
        default = 0.0 if self.mixture == "additive" else 1.0
        return default if self.mean is None else self.mean

    @property
    def spread(self) -> float:
        """Returns s, without the std(o(x)) of the relative form."""
        # U(-s, s) has the variance s^2 / 3, which is `factor` for s = sqrt(3 factor).
        return self.factor if self.kind == "gaussian" else math.sqrt(3 * self.factor)

    def level(self, amplitude: float = 1.0, device: torch.device | None = None) -> Tensor:
        """Returns (r mean, r s) as float64 [2], the form in which the kernels read it.

        Of "bernoulli" it is (1 - p, 1 / (1 - p)).
        """
        check_number("amplitude", amplitude)
        values = [amplitude * self.centre, amplitude * self.spread]
        if self.kind == "bernoulli":
            kept = 1 - amplitude * self.factor
            if not 0 < kept <= 1:
                raise ValueError(
                    f"amplitude is {amplitude}; times the factor {self.factor} it has to be from 0"
                    " to below 1"
                )
            values = [kept, 1 / kept]
        return torch.tensor(values, dtype=torch.float64, device=device or "cpu")


@typed
def cosine_decay(epoch: int, epochs: int) -> float:
    """Returns (1 + cos(pi e / epochs)) / 2, 0 from `epochs` on (NoisyDARTS' code: with 50)."""
    check_int("epoch", epoch, 0)
    check_int("epochs", epochs, 1)
    return (1 + math.cos(math.pi * min(epoch, epochs) / epochs)) / 2


def noise_draw(
    form: str, eps: Tensor, level: Tensor, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Returns d = level[0] + level[1] (std) eps, in `dtype`; std is None unless relative.

    Of "bernoulli" d = level[1] where u = (1 + eps) / 2 < level[0], else 0.
    """
    if form.startswith("bernoulli"):
        # The bound is rounded to fp32, as every kernel rounds it, or one would drop an element that
        # another keeps.
        is_kept = eps < (2 * level[0] - 1).float().to(eps.dtype)
        return is_kept * level[1].to(dtype)
    eps = eps.to(dtype)
    spread = level[1] if std is None else level[1] * std.to(level.dtype)
    # The product of scale and std is float64 and rounded once, as the kernels round it.
    return level[0].to(eps.dtype) + spread.to(eps.dtype) * eps


def apply_draw(x: Tensor, d: Tensor, form: str) -> Tensor:
    """Returns x + d or x d."""
    return x * d if form.endswith("multiplicative") else x + d


def skip_noise(x: Tensor, noise: SkipNoise, amplitude: float = 1.0) -> Tensor:
    """Draws the noise as eager code does, from torch's own generator (for eager baselines)."""
    check_type("x", x, Tensor)
    check_type("noise", noise, SkipNoise)
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; a floating point dtype is needed")
    eps = torch.randn_like(x) if noise.kind == "gaussian" else torch.empty_like(x).uniform_(-1, 1)
    std = x.detach().std() if noise.is_relative else None
    d = noise_draw(noise.form, eps.detach(), noise.level(amplitude, x.device), std, x.dtype)
    return apply_draw(x, d, noise.form)


def philox_words(
    key: int | Tensor, offset: int | Tensor, quads: int, device: torch.device | None = None
) -> Tensor:
    """Returns Philox4x32-10 words (Salmon et al., SC'11) of counters (q, offset), q < quads.

    key and offset may be 0-d int64 tensors on the device: then nothing waits for it.

    Returns:
        int64 [quads, 4], each word in 0 .. 2^32 - 1. Element i of a term takes word i % 4 of
        quad i // 4, so one block serves four neighbours.
    """
    low = 0xFFFFFFFF

    def high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        # 32 x 16 bit products stay below 2^48; the full product would overflow int64.
        high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
        return high & low, (a * b) & low

    c0 = torch.arange(quads, dtype=torch.int64, device=device)
    c1 = (c0 >> 32) & low
    c0 = c0 & low
    zero = torch.zeros_like(c0)
    c2 = zero + (offset & low)
    c3 = zero + ((offset >> 32) & low)
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        h0, l0 = high_low(0xD2511F53, c0)
        h1, l1 = high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        # The key takes its Weyl steps after each of the ten rounds.
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], dim=1)


def philox_draw(form: str, rng: Tensor, ordinal: int, x: Tensor) -> Tensor:
    """Draws eps of noisy term `ordinal`, shaped like x: N(0, 1) by Box-Muller, or U(-1, 1).

    A word becomes u = ((word >> 9) + 1/2) 2^-23, exact in fp32 and never 0 or 1. Words (0, 1) and
    (2, 3) of a quad give the pairs sqrt(-2 ln u) (cos, sin)(2 pi u'). rng int64 [2].
    """
    count = x.numel()
    words = philox_words(rng[0], rng[1] + ordinal, (count + 3) // 4, x.device)
    u = ((words >> 9).double() + 0.5) * 2.0**-23
    if form.startswith("gaussian"):
        radius = torch.sqrt(-2 * torch.log(u[:, 0::2]))
        # Box-Muller turns the pairs of words (0, 1) and (2, 3) into [quads, 2] radii and angles.
        angle = 2 * math.pi * u[:, 1::2]
        eps = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=2)
    else:
        eps = 2 * u - 1
    return eps.reshape(-1)[:count].reshape(x.shape)
