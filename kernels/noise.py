"""Draws skip noise in Triton, the third spelling of csrc/formulas/philox.h: the same words, and the
same polynomials instead of the device's approximate logarithm, which is off by percents near 1."""

import triton
import triton.language as tl


@triton.jit
def _unit(word):
    """Maps a word to (0, 1): 23 bits and a half, exact in fp32, never 0 or 1."""
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _log_unit(u):
    """Computes ln u for u in (0, 1), by u = 2^e m, m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh s."""
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (bits >> 23).to(tl.float32)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = 1.0 + z * (
        0.3333333333333333 + z * (0.2 + z * (0.14285714285714285 + z * 0.1111111111111111))
    )
    return e * 0.693147180559945 + 2.0 * s * series


@triton.jit
def _turn(u):
    """Computes cos and sin of 2 pi u. The reduction to |angle| <= pi/4 is exact because 4u is."""
    quadrant = (4.0 * u + 0.5).to(tl.int32)
    a = (4.0 * u - quadrant.to(tl.float32)) * 1.57079632679490
    z = a * a
    sine = a * (
        1.0
        + z
        * (
            -0.16666666666666666
            + z * (0.008333333333333333 + z * (-0.0001984126984126984 + z * 2.7557319223985893e-06))
        )
    )
    cosine = 1.0 + z * (
        -0.5
        + z
        * (
            0.041666666666666664
            + z * (-0.001388888888888889 + z * (2.48015873015873e-05 - z * 2.755731922398589e-07))
        )
    )
    swap = (quadrant & 1) != 0
    c = tl.where(swap, sine, cosine)
    s = tl.where(swap, cosine, sine)
    return tl.where(((quadrant + 1) & 2) != 0, -c, c), tl.where((quadrant & 2) != 0, -s, s)


@triton.jit
def _quad(key, offset, quad, GAUSSIAN: tl.constexpr):
    """Makes the four standard draws of the Philox block (quad, offset)."""
    low = quad.to(tl.uint32)
    high = (quad >> 32).to(tl.uint32)
    # tl.philox wants counters of one shape and type: 64-bit ones in two halves, scalars spread out.
    zero = low * 0
    offset_low = zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    offset_high = zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, offset_low, offset_high)
    if GAUSSIAN:
        r0 = tl.sqrt_rn(-2.0 * _log_unit(_unit(w0)))
        r1 = tl.sqrt_rn(-2.0 * _log_unit(_unit(w2)))
        c0, s0 = _turn(_unit(w1))
        c1, s1 = _turn(_unit(w3))
        e0, e1, e2, e3 = r0 * c0, r0 * s0, r1 * c1, r1 * s1
    else:
        e0 = 2.0 * _unit(w0) - 1.0
        e1 = 2.0 * _unit(w1) - 1.0
        e2 = 2.0 * _unit(w2) - 1.0
        e3 = 2.0 * _unit(w3) - 1.0
    return e0, e1, e2, e3


@triton.jit
def quad_draws(rng_ptr, ordinal, o_quad, GAUSSIAN: tl.constexpr):
    """Draws eps of the NCHW elements 4 o_quad .. 4 o_quad + 3, along the last axis."""
    offset = tl.load(rng_ptr + 1) + ordinal
    e0, e1, e2, e3 = _quad(tl.load(rng_ptr), offset, o_quad, GAUSSIAN)
    # (e0, e2) and (e1, e3) interleaved once more are e0, e1, e2, e3 in turn.
    return tl.interleave(tl.interleave(e0, e2), tl.interleave(e1, e3))


@triton.jit
def element_draws(rng_ptr, ordinal, o_nchw, GAUSSIAN: tl.constexpr):
    """Draws eps of single NCHW elements: four times the work of `quad_draws`."""
    offset = tl.load(rng_ptr + 1) + ordinal
    e0, e1, e2, e3 = _quad(tl.load(rng_ptr), offset, o_nchw >> 2, GAUSSIAN)
    odd = (o_nchw & 1) != 0
    return tl.where((o_nchw & 2) != 0, tl.where(odd, e3, e2), tl.where(odd, e1, e0))


@triton.jit
def at_level(eps, level_ptr, std_ptr, ordinal, RELATIVE: tl.constexpr, BERNOULLI: tl.constexpr):
    """Returns d = shift + scale eps, scale times the std of the term if relative.

    Of a Bernoulli variable it is scale where u < shift, else 0; see csrc/formulas/mixed_sum.h.
    """
    scale = tl.load(level_ptr + 1)
    if BERNOULLI:
        kept = eps < (2.0 * tl.load(level_ptr) - 1.0).to(tl.float32)
        return tl.where(kept, scale.to(tl.float32), 0.0)
    if RELATIVE:
        scale = scale * tl.load(std_ptr + ordinal)
    return tl.load(level_ptr).to(tl.float32) + scale.to(tl.float32) * eps
