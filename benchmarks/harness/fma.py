"""Measures the fp32 rate of the CUDA cores by a Triton kernel that only multiplies and adds."""

import triton
import triton.language as tl

BLOCK = 1024
WARPS = 4
A = 0.9998779296875
"""1 - 2^-13: after 8192 steps x is e^-1 of the way from 2, so a step too few shows."""
UNROLLED = 16
"""Multiply-adds of an element in one turn of the loop."""


@triton.jit
def fma_kernel(x_ptr, y_ptr, turns, BLOCK: tl.constexpr, UNROLLED: tl.constexpr):
    """Computes y = x after turns * UNROLLED times x <- A x + B; 8 independent chains a thread."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    # Triton reads globals as constexpr only, so A stands here once more.
    a = tl.full([BLOCK], 0.9998779296875, tl.float32)
    b = tl.full([BLOCK], 0.000244140625, tl.float32)
    for _ in range(turns):
        for _ in tl.static_range(UNROLLED):
            x = tl.fma(x, a, b)
    tl.store(y_ptr + o, x)


def run(x, y, turns):
    """Computes y = 2 + A^(turns UNROLLED) (x - 2) of float32 [programs BLOCK]."""
    fma_kernel[(x.numel() // BLOCK,)](x, y, turns, BLOCK=BLOCK, UNROLLED=UNROLLED, num_warps=WARPS)
