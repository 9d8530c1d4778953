"""Draws standard Gumbel noise from Philox words, the same bits on every backend.

g = -ln(-ln u) with u = ((word >> 9) + 1/2) 2^-23, which is never 0 or 1: g is between -2.82 and
16.64, and no draw has to be repeated for an inf or a NaN, as public GDAS code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.reference.skip_noise import philox_draw

_ROOT_HALF = 0x3FE6A09E667F3BCD  # bits of sqrt(1/2)
_MANTISSA = (1 << 52) - 1
_ATANH_TERMS = 11


def portable_log(x: Tensor) -> Tensor:
    """Returns ln x of float64 x > 0, to 4e-16 of max(|ln x|, 1).

    x = 2^e m with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh s = 2 s (1 + s^2/3 + s^4/5 + ...),
    s = (m - 1)/(m + 1). Made of + - * / alone, which IEEE 754 rounds correctly, in one order and
    none of them contracted to an FMA: two machines that do so get the same bits, which no two
    libraries' logarithms promise.
    """
    bits = x.view(torch.int64) - _ROOT_HALF
    e = (bits >> 52).to(torch.float64)
    m = ((bits & _MANTISSA) + _ROOT_HALF).view(torch.float64)
    s = (m - 1) / (m + 1)
    z = s * s
    # Horner begins at the smallest term: another order would round to other bits.
    series = torch.full_like(z, 1 / (2 * _ATANH_TERMS + 1))
    for k in reversed(range(_ATANH_TERMS)):
        series = series * z + 1 / (2 * k + 1)
    return e * math.log(2) + 2 * s * series


def gumbel(u: Tensor) -> Tensor:
    """Returns -ln(-ln u) of float64 u in (0, 1)."""
    return -portable_log(-portable_log(u))


def gumbel_draw(rng: Tensor, ordinal: int, shape: Sequence[int]) -> Tensor:
    """Draws g float64 of that shape: element i of stream `ordinal`, as `philox_draw` counts."""
    like = torch.empty(shape, dtype=torch.float64, device=rng.device)
    # `philox_draw` gives 2 u - 1, exactly in float64: (1 + it) / 2 is u again, to the bit.
    return gumbel((1 + philox_draw("uniform_additive", rng, ordinal, like)) / 2)
