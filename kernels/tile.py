"""Cuts an image tensor in either layout into tiles: [BLOCK_C channels, BLOCK_V values of each].

The values of a channel are numbered by image, then pixel. `shape` is (channels, pixels, values),
one image having `pixels` of the `values` of a channel. Sums over a channel are one partial sum for
each tile, so the tile is fixed by the shape alone, and results do not depend on the device.
"""

import triton
import triton.language as tl

from fastnas.kernels.noise import at_level, element_draws, quad_draws

# Elements of a tile at most: 16 a thread of four warps, which stay in registers while two passes
# over them make the moments.
TILE = 2048
WARPS = 4


@triton.jit
def nchw_offsets(shape, c, first, v, INDEX: tl.constexpr):
    """Returns the NCHW offsets of the values first + v of the channels c, [len(c), len(v)]."""
    channels, pixels, _ = shape
    pixel = (first % pixels).to(INDEX) + v  # one wide division, then narrow ones
    image = first // pixels + pixel // pixels
    return (image[None, :] * channels + c[:, None]) * pixels + (pixel % pixels)[None, :]


@triton.jit
def tile_of_program(
    shape,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Returns this program's part, channels [BLOCK_C], first value, offsets and mask of the tile.

    Neighbouring programs take neighbouring channels of one part: channels last they share lines.
    """
    channels, _, values = shape
    slices = tl.cdiv(channels, BLOCK_C)
    i_part = (tl.program_id(0) // slices).to(tl.int64)
    c = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    first = i_part * BLOCK_V
    v = tl.arange(0, BLOCK_V)
    if CHANNELS_LAST:
        o = (first + v)[None, :] * channels + c[:, None]
    else:
        o = nchw_offsets(shape, c, first, v, INDEX)
    m = (first + v < values)[None, :] & (c < channels)[:, None]
    return i_part, c, first, o, m


@triton.jit
def tile_draw(
    noise,
    ordinal,
    shape,
    c,
    first,
    GAUSSIAN: tl.constexpr,
    RELATIVE: tl.constexpr,
    BERNOULLI: tl.constexpr,
    QUADS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Draws d of a tile, a Philox block for four pixels where rows of pixels are whole quads."""
    level_ptr, rng_ptr, std_ptr = noise
    if QUADS:
        o_nchw = nchw_offsets(shape, c, first, 4 * tl.arange(0, BLOCK_V // 4), INDEX)
        eps = quad_draws(rng_ptr, ordinal, o_nchw >> 2, GAUSSIAN)
    else:
        o_nchw = nchw_offsets(shape, c, first, tl.arange(0, BLOCK_V), INDEX)
        eps = element_draws(rng_ptr, ordinal, o_nchw, GAUSSIAN)
    return at_level(eps, level_ptr, std_ptr, ordinal, RELATIVE, BERNOULLI)


def tile_constants(place, values):
    """Chooses the tile for so many values of a channel, from the shape alone.

    place: `fastnas.backends.outputs.Place`.
    """
    # One value per channel and image lies alike in both layouts.
    channels_last = place.channels_last or place.pixels == 1
    block_c = min(triton.next_power_of_2(place.channels), 32) if channels_last else 1
    block_v = min(triton.next_power_of_2(values), TILE // block_c)
    # A channel of few values leaves room for more channels.
    block_c = min(triton.next_power_of_2(place.channels), max(block_c, TILE // block_v))
    return {
        "CHANNELS_LAST": channels_last,
        "INDEX": tl.int32 if place.pixels < 2**31 - TILE else tl.int64,
        "BLOCK_C": block_c,
        "BLOCK_V": block_v,
    }


@triton.jit
def channel_mean(totals_ptr, row, shape, c):
    """Returns a total of each channel, [BLOCK_C], over the channel's values."""
    channels, _, values = shape
    total = tl.load(totals_ptr + row * channels + c, mask=c < channels, other=0.0)
    return (total / values).to(tl.float32)
