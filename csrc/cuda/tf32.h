// Multiplies on the tensor cores, a warp together, from operands rounded to TF32 (10 bits of
// fraction); sm_80 and later.
//
// TF32 is used for fp32 tensors only where the caller allows it (torch's allow_tf32), as its error is
// 2^-11 of an operand. Rounding is explicit: the instruction itself ignores the low 13 bits, which
// doubles the error and biases it.
#pragma once

#include "launch.h"

namespace fastnas::cuda {
namespace {

#if defined(__CUDACC__)

// Rounds to nearest, ties away from zero. A NaN whose payload lies in the low 13 bits alone may come out as inf.
__device__ unsigned tf32_bits(float v) {
  unsigned bits;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// Adds A B to sum, 16 x 8 times 8 x 8. Lane 4 r + k holds A[r + 8 (i % 2)][k + 4 (i / 2)] in a[i], B[k + 4 i][r] in
// b[i] and the sums [r + 8 (i / 2)][2 k + i % 2]. The whole warp must come here together: volatile, or the compiler
// may move the instruction into a branch that only some lanes take.
__device__ void add_tf32_product(const float (&a)[4], const float (&b)[2], float (&sum)[4]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(tf32_bits(a[0])), "r"(tf32_bits(a[1])), "r"(tf32_bits(a[2])), "r"(tf32_bits(a[3])),
        "r"(tf32_bits(b[0])), "r"(tf32_bits(b[1])));
}

#else  // the same on the host, by way of memory

// Does the same on the host, by way of memory. Bits are rounded to nearest, ties away from zero, as cvt.rna does.
inline float tf32(float v) {
  if (!isfinite(v)) return v;
  unsigned bits;
  memcpy(&bits, &v, sizeof v);
  bits = (bits + 0x1000u) & ~0x1FFFu;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// Every lane lays down its operands; after the barrier it collects the row of A and the column of B of each of its
// sums. The second barrier keeps a fast lane from overwriting what a slow one still reads. Sums are added one by
// one in fp32, an order that the hardware does not promise: tests compare with a tolerance.
inline void add_tf32_product(const float (&a)[4], const float (&b)[2], float (&sum)[4]) {
  SHARED(float, operands, 128 * 6);  // for blocks of up to 128 threads
  const int lane = int(threadIdx.x) % 32;
  float* const of_warp = operands + (int(threadIdx.x) - lane) * 6;
  for (int i = 0; i < 4; ++i) of_warp[lane * 6 + i] = tf32(a[i]);
  for (int i = 0; i < 2; ++i) of_warp[lane * 6 + 4 + i] = tf32(b[i]);
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k)
      sum[i] += of_warp[(lane / 4 * 4 + k % 4) * 6 + i / 2 + k / 4 * 2] *
                of_warp[((lane % 4 * 2 + i % 2) * 4 + k % 4) * 6 + 4 + k / 4];
  __syncwarp();
}

#endif

}  // namespace
}  // namespace fastnas::cuda
