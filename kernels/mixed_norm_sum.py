"""y = sum_k w_k v_k,  v_k = (z_k - mu_k) r_k,  mu, var of z_k per channel, r = (var + eps)^-1/2;  not normed: as mixed_sum
dz_k = w_k r_k (dy - mean(dy) - v_k mean(dy v_k)),  dw_k = <dy, v_k>.  Given statistics: dz_k = w_k r_k dy

Forward: moments of parts of the channels, statistics out of them, the mix. Backward: sums over the
same parts, their totals and dw, every dz. A part of a channel is what it has in one tile (tile.py);
`noise` is (level, rng, std). No atomics: partial sums are stored and added in an order of their own.
Which terms are normed, noisy or summed is known when compiling, so nothing branches on it.
"""  # noqa: E501

import triton
import triton.language as tl

from fastnas.kernels.mixed_sum import centred_squares, noise_arguments, standard_deviations
from fastnas.kernels.tile import WARPS, channel_mean, tile_constants, tile_draw, tile_of_program


@triton.jit
def _reciprocal_std(var, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _norm(mean_ptr, var_ptr, row, channels, c, eps):
    """Returns mu and r of a term, [BLOCK_C]."""
    o = row * channels + c
    mean = tl.load(mean_ptr + o, mask=c < channels, other=0.0)
    var = tl.load(var_ptr + o, mask=c < channels, other=1.0)
    return mean, _reciprocal_std(var, eps)


@triton.jit
def mixed_norm_sum_moments_kernel(
    z_ptrs,
    moments_ptr,
    shape,
    parts,
    ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Stores mean and squared deviations about it, of each channel in a part of one term.

    Two passes over a tile that stays in registers: z is read once. The deviations sum to 0 but for
    rounding, and correct both by what they leave.
    """
    row = tl.program_id(1)
    # A tuple of pointers cannot be indexed by a value that is known only when running.
    z_ptr = z_ptrs[0]
    for other in tl.static_range(1, ROWS):
        z_ptr = tl.where(row == other, z_ptrs[other], z_ptr)
    channels, _, values = shape
    i_part, c, first, o, m = tile_of_program(shape, CHANNELS_LAST, INDEX, BLOCK_C, BLOCK_V)
    b_z = tl.load(z_ptr + o, mask=m, other=0.0).to(tl.float32)
    count = tl.minimum(values - first, BLOCK_V).to(tl.float32)
    mean = tl.sum(b_z, 1) / count
    delta = tl.where(m, b_z - mean[:, None], 0.0)
    deviations = tl.sum(delta, 1)
    correction = (deviations / count).to(tl.float64)
    # It is NaN where the mean is inf, which the mean is to stay.
    correction = tl.where(tl.abs(correction) < float("inf"), correction, 0.0)
    squares = centred_squares(tl.sum(delta * delta, 1), deviations, correction)
    p_part = moments_ptr + (row * parts + i_part) * 2 * channels + c
    tl.store(p_part, mean.to(tl.float64) + correction, mask=c < channels)
    tl.store(p_part + channels, squares, mask=c < channels)


@triton.jit
def mixed_norm_sum_statistics_kernel(
    moments_ptr,
    mean_ptr,
    var_ptr,
    shape,
    parts,
    PART_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Merges the parts' moments into mean and biased variance (Chan, Golub, LeVeque), in fp64."""
    channels, _, values = shape
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([CHUNK, BLOCK_C], tl.float64)
    for start in range(0, parts, CHUNK):
        part = start + tl.arange(0, CHUNK)
        m = (part < parts)[:, None] & (c < channels)[None, :]
        count = tl.minimum(values - part.to(tl.int64) * PART_V, PART_V)[:, None]
        o = (row * parts + part)[:, None] * 2 * channels + c[None, :]
        total += count.to(tl.float64) * tl.load(moments_ptr + o, mask=m, other=0.0)
    mean = tl.sum(total, 0) / values
    squares = tl.zeros([CHUNK, BLOCK_C], tl.float64)
    for start in range(0, parts, CHUNK):
        part = start + tl.arange(0, CHUNK)
        m = (part < parts)[:, None] & (c < channels)[None, :]
        count = tl.minimum(values - part.to(tl.int64) * PART_V, PART_V)[:, None]
        o = (row * parts + part)[:, None] * 2 * channels + c[None, :]
        delta = tl.load(moments_ptr + o, mask=m, other=0.0) - mean[None, :]
        squares += tl.load(moments_ptr + o + channels, mask=m, other=0.0)
        squares += tl.where(m, count.to(tl.float64) * delta * delta, 0.0)
    var = (tl.sum(squares, 0) / values).to(tl.float32)
    var += var - var  # NaN of an inf: its reciprocal std of 0 would take the term out of the sum
    tl.store(mean_ptr + row * channels + c, mean.to(tl.float32), mask=c < channels)
    tl.store(var_ptr + row * channels + c, var, mask=c < channels)


@triton.jit
def mixed_norm_sum_fwd_kernel(
    z_ptrs,
    w_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    noise,
    shape,
    eps,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    ORDINALS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BERNOULLI: tl.constexpr,
    QUADS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Writes y of one tile, each normed term as w r (z - mu): exact where z and mu are large."""
    _, c, first, o, m = tile_of_program(shape, CHANNELS_LAST, INDEX, BLOCK_C, BLOCK_V)
    b_y = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    for k in tl.static_range(TERMS):
        w = tl.load(w_ptr + k)
        b_z = tl.load(z_ptrs[k] + o, mask=m, other=0.0).to(tl.float32)
        if ROWS[k] >= 0:
            mean, r = _norm(mean_ptr, var_ptr, ROWS[k], shape[0], c, eps)
            b_y += (w * r)[:, None] * (b_z - mean[:, None])
        elif ORDINALS[k] >= 0:
            b_d = tile_draw(
                noise,
                ORDINALS[k],
                shape,
                c,
                first,
                GAUSSIAN,
                RELATIVE,
                BERNOULLI,
                QUADS,
                INDEX,
                BLOCK_V,
            )
            if MULTIPLICATIVE:
                b_y += w * (b_z * b_d)
            else:
                b_y += w * (b_z + b_d)
        else:
            b_y += w * b_z
    tl.store(y_ptr + o, b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def mixed_norm_sum_sums_kernel(
    dy_ptr,
    z_ptrs,
    partial_ptr,
    mean_ptr,
    noise,
    shape,
    parts,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
    ORDINALS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BERNOULLI: tl.constexpr,
    QUADS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Stores sums of each channel in a part: of dy, and of dy (z_k - mu_k) for every k in SUMS.

    SUMS[k] is the row of `partial` that term k has, -1: none; SUMS[TERMS] is that of dy. mu comes
    off before the product, because <dy, z> minus mu times the sum of dy would cancel.
    """
    channels, _, _ = shape
    i_part, c, first, o, m = tile_of_program(shape, CHANNELS_LAST, INDEX, BLOCK_C, BLOCK_V)
    b_dy = tl.load(dy_ptr + o, mask=m, other=0.0).to(tl.float32)
    if SUMS[TERMS] >= 0:
        p_sum = partial_ptr + (SUMS[TERMS] * parts + i_part) * channels + c
        tl.store(p_sum, tl.sum(b_dy, 1).to(tl.float64), mask=c < channels)
    for k in tl.static_range(TERMS):
        if SUMS[k] >= 0:
            b_v = tl.load(z_ptrs[k] + o, mask=m, other=0.0).to(tl.float32)
            if ROWS[k] >= 0:
                mean = tl.load(mean_ptr + ROWS[k] * channels + c, mask=c < channels, other=0.0)
                b_v = b_v - mean[:, None]
            elif ORDINALS[k] >= 0:
                b_d = tile_draw(
                    noise,
                    ORDINALS[k],
                    shape,
                    c,
                    first,
                    GAUSSIAN,
                    RELATIVE,
                    BERNOULLI,
                    QUADS,
                    INDEX,
                    BLOCK_V,
                )
                if MULTIPLICATIVE:
                    b_v = b_v * b_d
                else:
                    b_v = b_v + b_d
            p_sum = partial_ptr + (SUMS[k] * parts + i_part) * channels + c
            tl.store(p_sum, tl.sum(b_dy * b_v, 1).to(tl.float64), mask=c < channels)


@triton.jit
def mixed_norm_sum_totals_kernel(
    partial_ptr,
    totals_ptr,
    var_ptr,
    dw_ptr,
    channels,
    parts,
    eps,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds up the parts in fp64, in an order fixed by their number; dw_k = sum_c r total.

    One program for each sum; where dw is wanted, sum k is that of term k, and the last that of dy.
    """
    i_sum = tl.program_id(0)
    row = i_sum * 0 - 1  # of term i_sum in var; -1, as a tensor: not normed
    if NEEDS_DW:
        for k in tl.static_range(TERMS):
            row = tl.where(i_sum == k, ROWS[k], row)
    dw = tl.zeros([BLOCK_C], tl.float64)
    for begin in range(0, channels, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        b_sum = tl.zeros([CHUNK, BLOCK_C], tl.float64)
        for start in range(0, parts, CHUNK):
            part = start + tl.arange(0, CHUNK)
            m = (part < parts)[:, None] & (c < channels)[None, :]
            o = (i_sum.to(tl.int64) * parts + part)[:, None] * channels + c[None, :]
            b_sum += tl.load(partial_ptr + o, mask=m, other=0.0)
        total = tl.sum(b_sum, 0)
        tl.store(totals_ptr + i_sum * channels + c, total, mask=c < channels)
        if NEEDS_DW:
            if row >= 0:
                var = tl.load(var_ptr + row * channels + c, mask=c < channels, other=1.0)
                total = _reciprocal_std(var, eps).to(tl.float64) * total
            dw += total
    if NEEDS_DW:  # noqa: SIM102 - known when compiling, the other when running
        if i_sum < TERMS:
            tl.store(dw_ptr + i_sum, tl.sum(dw).to(tl.float32))


@triton.jit
def _slope(totals_ptr, row, shape, c, w, r):
    """Returns w r^3 mean(dy (z - mu)), [BLOCK_C]; w - w is NaN where w is inf, as eager's dz is."""
    return w * r * (r * r * channel_mean(totals_ptr, row, shape, c)) + (w - w)


@triton.jit
def mixed_norm_sum_dz_kernel(
    dy_ptr,
    z_ptrs,
    w_ptr,
    dz_ptrs,
    mean_ptr,
    var_ptr,
    totals_ptr,
    noise,
    shape,
    eps,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
    NEEDS_DZ: tl.constexpr,
    TRAINING: tl.constexpr,
    ORDINALS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    MULTIPLICATIVE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BERNOULLI: tl.constexpr,
    QUADS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Writes dz_k of one tile for every k that wants it.

    Through a batch norm of the batch's own statistics dz is affine in dy and z:
    w r (dy - mean(dy)) - slope (z - mu), slope = w r^3 mean(dy (z - mu)). Through given statistics,
    or without a norm, it is w r dy or w dy.
    """
    _, c, first, o, m = tile_of_program(shape, CHANNELS_LAST, INDEX, BLOCK_C, BLOCK_V)
    b_dy = tl.load(dy_ptr + o, mask=m, other=0.0).to(tl.float32)
    if SUMS[TERMS] >= 0:
        mean_dy = channel_mean(totals_ptr, SUMS[TERMS], shape, c)
    for k in tl.static_range(TERMS):
        if NEEDS_DZ[k]:
            w = tl.load(w_ptr + k)
            if ROWS[k] >= 0:
                mean, r = _norm(mean_ptr, var_ptr, ROWS[k], shape[0], c, eps)
                if TRAINING:
                    slope = _slope(totals_ptr, SUMS[k], shape, c, w, r)
                    b_z = tl.load(z_ptrs[k] + o, mask=m, other=0.0).to(tl.float32)
                    b_dz = (w * r)[:, None] * (b_dy - mean_dy[:, None])
                    b_dz -= slope[:, None] * (b_z - mean[:, None])
                else:
                    b_dz = (w * r)[:, None] * b_dy
            elif MULTIPLICATIVE and ORDINALS[k] >= 0:
                b_d = tile_draw(
                    noise,
                    ORDINALS[k],
                    shape,
                    c,
                    first,
                    GAUSSIAN,
                    RELATIVE,
                    BERNOULLI,
                    QUADS,
                    INDEX,
                    BLOCK_V,
                )
                b_dz = w * (b_dy * b_d)
            else:
                b_dz = w * b_dy
            tl.store(dz_ptrs[k] + o, b_dz.to(dy_ptr.dtype.element_ty), mask=m)


def part_count(place, values):
    """Returns how many parts a channel of so many values is summed in."""
    return triton.cdiv(values, tile_constants(place, values)["BLOCK_V"])


class _Launch:
    """Holds what the kernels of one call share."""

    def __init__(self, call, place, like, std):
        self.channels = place.channels
        values = like.numel() // place.channels
        self.tile = tile_constants(place, values)
        self.parts = part_count(place, values)
        self.programs = self.parts * triton.cdiv(place.channels, self.tile["BLOCK_C"])
        self.shape = place.channels, place.pixels, values
        w = call.w
        # Where there is none to read, any pointer will do.
        self.mean, self.var = (call.mean, call.var) if any(call.normed) else (w, w)
        self.noise, self.terms = noise_arguments(len(call.normed), call.noise, std, w)
        # Only normed terms have statistics: ROWS[k] is the row of term k, -1: it has none.
        rows = iter(range(sum(call.normed)))
        self.terms["ROWS"] = tuple(next(rows) if normed else -1 for normed in call.normed)
        self.terms["QUADS"] = place.pixels % 4 == 0


def forward(call, training, place, y, std, moments, partial):
    """Fills y, in training call.mean and call.var, and std where it has room.

    Args:
        call, place: see `fastnas.backends.outputs.NormSumKernel`.
        moments: float64, at least [normed terms, parts, 2, C].
        partial: float64 for `standard_deviations`.
    """
    if y.numel() == 0:
        return
    z, w, normed = call.z, call.w, call.normed
    standard_deviations(z, call.noise, std, partial)
    launch = _Launch(call, place, y, std)
    own = tuple(z_k for z_k, is_normed in zip(z, normed) if is_normed)
    if training and own:
        mixed_norm_sum_moments_kernel[(launch.programs, len(own))](
            own, moments, launch.shape, launch.parts, ROWS=len(own), **launch.tile, num_warps=WARPS
        )
        mixed_norm_sum_statistics_kernel[(triton.cdiv(launch.channels, 16), len(own))](
            moments, launch.mean, launch.var, launch.shape, launch.parts,
            PART_V=launch.tile["BLOCK_V"], BLOCK_C=16, CHUNK=64,
        )  # fmt: skip
    mixed_norm_sum_fwd_kernel[(launch.programs,)](
        tuple(z), w, y, launch.mean, launch.var, launch.noise, launch.shape, call.eps,
        **launch.terms, **launch.tile, num_warps=WARPS,
    )  # fmt: skip


def backward(dy, call, training, place, std, dz, dw, partial):
    """Fills dz[k] where it is not None, and dw unless it is empty; z[k] is None where not read.

    Args:
        partial: float64, at least [sums, parts, C].
    """
    if dy.numel() == 0:
        dw.zero_()
        return
    launch = _Launch(call, place, dy, std)
    w, eps = call.w, call.eps
    terms, needs_dw = w.numel(), dw.numel() > 0
    z_or_dy = tuple(dy if z_k is None else z_k for z_k in call.z)
    needs_dz = tuple(d is not None for d in dz)
    needs_sums = [training and n and d for n, d in zip(call.normed, needs_dz)]
    summed = [k for k in range(terms) if needs_dw or needs_sums[k]]
    if any(needs_sums):
        summed.append(terms)  # that of dy itself
    sums = tuple(summed.index(k) if k in summed else -1 for k in range(terms + 1))
    totals = partial.new_empty(len(summed) * launch.channels)
    if summed:
        mixed_norm_sum_sums_kernel[(launch.programs,)](
            dy, z_or_dy, partial, launch.mean, launch.noise, launch.shape, launch.parts,
            SUMS=sums, **launch.terms, **launch.tile, num_warps=WARPS,
        )  # fmt: skip
        mixed_norm_sum_totals_kernel[(len(summed),)](
            partial, totals, launch.var, dw if needs_dw else w, launch.channels, launch.parts, eps,
            TERMS=terms, ROWS=launch.terms["ROWS"], NEEDS_DW=needs_dw, BLOCK_C=16, CHUNK=64,
        )  # fmt: skip
    if any(needs_dz):
        mixed_norm_sum_dz_kernel[(launch.programs,)](
            dy, z_or_dy, w, tuple(dy if d is None else d for d in dz), launch.mean, launch.var,
            totals if summed else w, launch.noise, launch.shape, eps,
            SUMS=sums, NEEDS_DZ=needs_dz, TRAINING=training,
            **launch.terms, **launch.tile, num_warps=WARPS,
        )  # fmt: skip
