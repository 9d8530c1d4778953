"""Draws standard Gumbel noise g = -ln(-ln u) in Triton, as csrc/formulas/gumbel.h spells it.

The bits are the same as long as a kernel is launched with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

from fastnas.kernels.noise import element_draws


@triton.jit
def _portable_log(x):
    """Computes ln x for fp64 x > 0, by x = 2^e m, m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh s.

    The device's own logarithm may differ in the last bit, and drawn logits are compared: this one
    is made of + - * / alone, which IEEE 754 rounds correctly, in the order of the C++ spelling.
    """
    bits = x.to(tl.int64, bitcast=True) - 0x3FE6A09E667F3BCD  # sqrt(1/2)
    e = (bits >> 52).to(tl.float64)
    m = ((bits & 0xFFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = z * (1.0 / 23.0) + 1.0 / 21.0
    for k in tl.static_range(1, 11):
        series = series * z + 1.0 / (21.0 - 2.0 * k)
    return e * 0.6931471805599453 + 2.0 * s * series


@triton.jit
def gumbel_draws(rng_ptr, ordinal, o):
    """Draws g in fp64 for the elements o of stream `ordinal`."""
    u = (element_draws(rng_ptr, ordinal, o, False).to(tl.float64) + 1.0) * 0.5
    return -_portable_log(-_portable_log(u))
