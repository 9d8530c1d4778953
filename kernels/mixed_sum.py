"""y = sum_k w_k v_k,  v_k = x_k | x_k + d_k | x_k d_k,  d = shift + scale eps (std(x) eps if gaussian additive)
dx_k = w_k dy | w_k dy | w_k d_k dy,  dw_k = <dy, v_k>.  d is constant in backward: drawn again, never stored.
"""  # noqa: E501

import triton
import triton.language as tl

from fastnas.kernels.noise import at_level, element_draws, quad_draws

# Elements of one program and of one partial sum: fixed, so results do not depend on the device.
# The same as kBlock in csrc/params.h.
BLOCK = 4096
WARPS = 8


def block_count(n):
    return triton.cdiv(n, BLOCK)


@triton.jit
def _draw(
    level_ptr,
    rng_ptr,
    std_ptr,
    ordinal,
    i_block,
    channels,
    pixels,
    GAUSSIAN: tl.constexpr,
    RELATIVE: tl.constexpr,
    BERNOULLI: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draws d of one block, in memory order.

    Noise is indexed by the NCHW position. Channels last, neighbours in memory are far apart in it,
    so each element computes a whole Philox block to use one word of four.
    """
    if CHANNELS_LAST:
        o_memory = i_block * BLOCK + tl.arange(0, BLOCK)
        image = o_memory // (channels * pixels)
        within = o_memory % (channels * pixels)
        # Memory is [image, pixel, channel], and the logical index [image, channel, pixel].
        o_nchw = (image * channels + within % channels) * pixels + within // channels
        eps = element_draws(rng_ptr, ordinal, o_nchw, GAUSSIAN)
    else:
        o_quad = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        eps = quad_draws(rng_ptr, ordinal, o_quad, GAUSSIAN)
    return at_level(eps, level_ptr, std_ptr, ordinal, RELATIVE, BERNOULLI)


@triton.jit
def centred_squares(squares, deviations, correction):
    """Corrects squared deviations from about the mean by what the deviations left over.

    Rounding can leave a constant term below 0, which becomes 0. NaN stays.
    """
    centred = squares.to(tl.float64) - deviations.to(tl.float64) * correction
    return tl.where(centred < 0, 0.0, centred)


@triton.jit
def _two_passes(b_x, m, count):
    """Returns mean and centred squares in fp64, with sums in the type of b_x.

    One pass, E[x^2] - E[x]^2, would lose the variance of values far from zero. Elements past the
    end must not count as deviations of size `mean`, hence the mask.
    """
    mean = tl.sum(b_x) / count
    delta = tl.where(m, b_x - mean, 0.0)
    deviations = tl.sum(delta)
    correction = (deviations / count).to(tl.float64)
    squares = centred_squares(tl.sum(delta * delta), deviations, correction)
    return mean.to(tl.float64) + correction, squares


@triton.jit
def mixed_sum_moments_kernel(x_ptr, partial_ptr, n, BLOCK: tl.constexpr):
    """Stores count, mean and squared deviations of a block, about its own mean.

    Squares vanish in fp32 below 1e-38 and overflow above 3e38: there they are summed in fp64.
    """
    # int64 is needed, because i_block BLOCK leaves int32 at 2^31 elements.
    i_block = tl.program_id(0).to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(x_ptr + o, mask=m, other=0.0).to(tl.float32)
    count = tl.minimum(n - i_block * BLOCK, BLOCK).to(tl.float32)
    mean, squares = _two_passes(b_x, m, count)
    if not ((squares > 1e-30 * count) & (squares < 3e38)):
        mean, squares = _two_passes(b_x.to(tl.float64), m, count.to(tl.float64))
    p_part = partial_ptr + 3 * i_block
    tl.store(p_part, count.to(tl.float64))
    tl.store(p_part + 1, mean)
    tl.store(p_part + 2, squares)


@triton.jit
def mixed_sum_std_kernel(partial_ptr, std_ptr, blocks, CHUNK: tl.constexpr):
    """Merges the moments of all blocks into the unbiased std (Chan, Golub, LeVeque), in fp64.

    One program: first the mean over all blocks, then each block's squares about that mean. Partial
    sums go by position in a chunk, so their order is fixed by the number of blocks.
    """
    o = tl.arange(0, CHUNK)
    count = tl.zeros([CHUNK], tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, blocks, CHUNK):
        m = start + o < blocks
        b_count = tl.load(partial_ptr + 3 * (start + o), mask=m, other=0.0)
        count += b_count
        total += b_count * tl.load(partial_ptr + 3 * (start + o) + 1, mask=m, other=0.0)
    n = tl.sum(count)
    mean = tl.sum(total) / n
    squares = tl.zeros([CHUNK], tl.float64)
    for start in range(0, blocks, CHUNK):
        m = start + o < blocks
        b_count = tl.load(partial_ptr + 3 * (start + o), mask=m, other=0.0)
        delta = tl.load(partial_ptr + 3 * (start + o) + 1, mask=m, other=0.0) - mean
        squares += tl.load(partial_ptr + 3 * (start + o) + 2, mask=m, other=0.0)
        squares += tl.where(m, b_count * delta * delta, 0.0)
    tl.store(std_ptr, tl.sqrt(tl.sum(squares) / (n - 1.0)))


@triton.jit
def mixed_sum_fwd_kernel(
    x_ptrs,
    w_ptr,
    y_ptr,
    level_ptr,
    rng_ptr,
    std_ptr,
    n,
    channels,
    pixels,
    TERMS: tl.constexpr,
    ORDINALS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BERNOULLI: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes y of one block: reads each term once, sums in fp32 in the order of the terms."""
    i_block = tl.program_id(0).to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_y = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TERMS):
        b_v = tl.load(x_ptrs[k] + o, mask=m, other=0.0).to(tl.float32)
        if ORDINALS[k] >= 0:
            b_d = _draw(
                level_ptr, rng_ptr, std_ptr, ORDINALS[k], i_block, channels, pixels,
                GAUSSIAN, RELATIVE, BERNOULLI, CHANNELS_LAST, BLOCK,
            )  # fmt: skip
            if MULTIPLICATIVE:
                b_v = b_v * b_d
            else:
                b_v = b_v + b_d
        b_y += tl.load(w_ptr + k) * b_v
    tl.store(y_ptr + o, b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def mixed_sum_bwd_kernel(
    dy_ptr,
    x_ptrs,
    w_ptr,
    dx_ptrs,
    partial_ptr,
    level_ptr,
    rng_ptr,
    std_ptr,
    n,
    channels,
    pixels,
    TERMS: tl.constexpr,
    ORDINALS: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BERNOULLI: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes dx_k of one block and its partial sum of dw_k, from one read of dy and of each x_k.

    Noise is drawn again. Multiplicative noise scales dx, additive noise counts in dw alone.
    """
    i_block = tl.program_id(0).to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_dy = tl.load(dy_ptr + o, mask=m, other=0.0).to(tl.float32)
    for k in tl.static_range(TERMS):
        b_scaled = b_dy
        if ORDINALS[k] >= 0:
            b_d = _draw(
                level_ptr, rng_ptr, std_ptr, ORDINALS[k], i_block, channels, pixels,
                GAUSSIAN, RELATIVE, BERNOULLI, CHANNELS_LAST, BLOCK,
            )  # fmt: skip
            if MULTIPLICATIVE:
                b_scaled = b_dy * b_d
        if NEEDS_DX[k]:
            b_dx = tl.load(w_ptr + k) * b_scaled
            tl.store(dx_ptrs[k] + o, b_dx.to(dy_ptr.dtype.element_ty), mask=m)
        if NEEDS_DW:
            b_v = tl.load(x_ptrs[k] + o, mask=m, other=0.0).to(tl.float32)
            if ORDINALS[k] >= 0:
                if MULTIPLICATIVE:
                    b_v = b_v * b_d
                else:
                    b_v = b_v + b_d
            # A block's sum of 4,096 products is fp32, and is stored as fp64, in which the blocks
            # are added.
            dot = tl.sum(b_dy * b_v)
            tl.store(partial_ptr + i_block * TERMS + k, dot.to(tl.float64))


@triton.jit
def mixed_sum_dw_kernel(partial_ptr, dw_ptr, blocks, terms, CHUNK: tl.constexpr):
    """Adds up dw_k from the partials of all blocks, in fp64, in an order fixed by their number."""
    k = tl.program_id(0)
    o = tl.arange(0, CHUNK)
    b_sum = tl.zeros([CHUNK], tl.float64)
    for start in range(0, blocks, CHUNK):
        m = start + o < blocks
        b_sum += tl.load(partial_ptr + (start + o).to(tl.int64) * terms + k, mask=m, other=0.0)
    tl.store(dw_ptr + k, tl.sum(b_sum).to(tl.float32))


def noise_arguments(terms, noise, std, dummy):
    """Returns pointers that kernels may read (`dummy` where there is nothing to), and constants."""
    ordinals = [-1] * terms
    for ordinal, k in enumerate(noise.noisy):
        # The j-th noisy term draws at Philox offset + j, wherever it stands among the terms.
        ordinals[k] = ordinal
    pointers = (
        dummy if noise.level is None else noise.level,
        dummy if noise.rng is None else noise.rng,
        std if std.numel() else dummy,
    )
    constants = {
        "TERMS": terms,
        "ORDINALS": tuple(ordinals),
        "GAUSSIAN": noise.form.startswith("gaussian"),
        "MULTIPLICATIVE": noise.form.endswith("multiplicative"),
        "RELATIVE": noise.form == "gaussian_additive",
        "BERNOULLI": noise.form.startswith("bernoulli"),
    }
    return pointers, constants


def standard_deviations(x, noise, std, partial):
    """Fills std, where it has room, from the noisy terms."""
    n = x[0].numel()
    blocks = block_count(n)
    for ordinal, k in enumerate(noise.noisy[: std.numel()]):
        part = partial[3 * blocks * ordinal :]
        mixed_sum_moments_kernel[(blocks,)](x[k], part, n, BLOCK=BLOCK, num_warps=WARPS)
        mixed_sum_std_kernel[(1,)](part, std[ordinal:], blocks, CHUNK=1024)


def _memory_order(place):
    """Returns (channels, pixels), by which channels-last finds the NCHW index, or (0, 0)."""
    return (place.channels, place.pixels) if place.channels_last else (0, 0)


def _block_constants(place):
    return {"CHANNELS_LAST": place.channels_last, "BLOCK": BLOCK, "num_warps": WARPS}


def forward(call, place, y, std, partial):
    """Fills y, and std where it has room (`fastnas.backends.outputs.SumKernel`)."""
    x, w, noise = call
    n = y.numel()
    if n == 0:
        return
    standard_deviations(x, noise, std, partial)
    pointers, constants = noise_arguments(len(x), noise, std, w)
    mixed_sum_fwd_kernel[(block_count(n),)](
        tuple(x), w, y, *pointers, n, *_memory_order(place),
        **constants, **_block_constants(place),
    )  # fmt: skip


def backward(dy, call, place, std, dx, dw, partial):
    """Fills dx[k] where it is not None, and dw unless it is empty (then call.x is, too)."""
    x, w, noise = call
    n, terms, needs_dw = dy.numel(), w.numel(), dw.numel() > 0
    blocks = block_count(n)
    pointers, constants = noise_arguments(terms, noise, std, w)
    if n > 0:
        mixed_sum_bwd_kernel[(blocks,)](
            dy,
            # Pointers that no compiled branch reads still need an address: dy and w stand in for
            # them.
            tuple(x) if needs_dw else (dy,) * terms,
            w,
            tuple(dy if d is None else d for d in dx),
            partial if needs_dw else w,
            *pointers,
            n,
            *_memory_order(place),
            NEEDS_DX=tuple(d is not None for d in dx),
            NEEDS_DW=needs_dw,
            **constants,
            **_block_constants(place),
        )
    if needs_dw:
        mixed_sum_dw_kernel[(terms,)](partial, dw, blocks, terms, CHUNK=1024)
