// Computes y = sum_k w_k v_k and its gradients on CUDA. A block of threads takes kBlock elements, a thread four
// quads of them, 256 quads apart, so that a warp reads 512 contiguous bytes of fp32. Sums: registers, warp, block,
// then one partial per block, added in block order. No atomics.
//
// The op moves bytes and little else: forward reads every term once and writes y, backward reads dy and every term
// once and writes every dx. Four loads of 16 bytes a term are in flight in each thread before the first is used.
#include "mixed_sum.h"

#include "launch.h"

#include "../formulas/mixed_sum.h"

namespace fastnas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kQuads = int(kBlock) / 4 / kThreads;
static_assert(kQuads * 4 * kThreads == kBlock);

template <class T> struct alignas(4 * sizeof(T)) Packed { T v[4]; };

// Loads or stores elements 4 quad .. 4 quad + 3; past the end it reads 0 and writes nothing.
template <class T>
__device__ void load_quad(const void* base, int64_t quad, int64_t n, bool aligned, float* v) {
  const T* src = static_cast<const T*>(base) + 4 * quad;
  if (aligned && 4 * quad + 4 <= n) {
    const Packed<T> packed = *reinterpret_cast<const Packed<T>*>(src);
    for (int i = 0; i < 4; ++i) v[i] = load(packed.v[i]);
  } else {
    for (int i = 0; i < 4; ++i) v[i] = 4 * quad + i < n ? load(src[i]) : 0.0f;
  }
}

template <class T>
__device__ void store_quad(void* base, int64_t quad, int64_t n, bool aligned, const float* v) {
  T* dst = static_cast<T*>(base) + 4 * quad;
  if (aligned && 4 * quad + 4 <= n) {
    Packed<T> packed;
    for (int i = 0; i < 4; ++i) packed.v[i] = store<T>(v[i]);
    *reinterpret_cast<Packed<T>*>(dst) = packed;
  } else {
    for (int i = 0; i < 4; ++i)
      if (4 * quad + i < n) dst[i] = store<T>(v[i]);
  }
}

// Makes the draws of four neighbours in memory: one Philox block in NCHW order, four of them channels last.
__device__ void draw_quad(const MixedSumParams& p, const Draw<float>& draw, int64_t quad, float* d) {
  if (p.channels == 0) {
    const Draws<float> four = draw.quad(uint64_t(quad));
    for (int i = 0; i < 4; ++i) d[i] = four.v[i];
  } else {
    for (int i = 0; i < 4; ++i) d[i] = draw.element(uint64_t(logical_index(p, 4 * quad + i)));
  }
}

// Finds the quad that is this thread's i-th: neighbouring threads take neighbouring quads.
__device__ int64_t quad_of(int i) { return int64_t(blockIdx.x) * (kBlock / 4) + i * kThreads + threadIdx.x; }

// Adds up over a warp, in every lane; the butterfly's order is fixed.
template <class S> __device__ S warp_sum(S v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// Adds up over the block, in every thread.
template <class S> __device__ S block_sum(S v, S* per_warp) {
  v = warp_sum(v);
  __syncthreads();  // per_warp may still be read from the call before
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = v;
  __syncthreads();
  S sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += per_warp[warp];
  return sum;
}

// Gathers moments of the block's values, with sums of type S: two passes in registers, the same
// result in every thread.
template <class S>
__device__ Moments block_moments(const float (&v)[kQuads][4], int64_t n, double count, S* per_warp) {
  S sum = 0, squares = 0, deviations = 0;
  for (int i = 0; i < kQuads; ++i)
    for (int j = 0; j < 4; ++j) sum += S(v[i][j]);
  const S mean = block_sum(sum, per_warp) / S(count);
  for (int i = 0; i < kQuads; ++i)
    for (int j = 0; j < 4; ++j) {
      const S delta = 4 * quad_of(i) + j < n ? S(v[i][j]) - mean : S(0);
      squares += delta * delta;
      deviations += delta;
    }
  squares = block_sum(squares, per_warp);
  deviations = block_sum(deviations, per_warp);
  return moments_of_sums(count, double(mean), double(squares), double(deviations));
}

// grid (blocks, noisy terms): gathers count, mean, squares of a block of a noisy term.
template <class T>
__global__ void __launch_bounds__(kThreads) mixed_sum_moments_kernel(MixedSumParams p, bool aligned) {
  SHARED(float, per_warp, kWarps);
  SHARED(double, wide_per_warp, kWarps);
  int term = 0;
  while (p.ordinal[term] != int(blockIdx.y)) ++term;
  const int64_t begin = int64_t(blockIdx.x) * kBlock;
  const double count = double(p.n - begin < kBlock ? p.n - begin : kBlock);

  float v[kQuads][4];
  // Values past the end read 0: they add nothing to the sum, and block_moments keeps them out of the deviations.
  for (int i = 0; i < kQuads; ++i) load_quad<T>(p.x[term], quad_of(i), p.n, aligned, v[i]);
  Moments m = block_moments(v, p.n, count, per_warp);
  if (!squares_fit_fp32(m)) m = block_moments(v, p.n, count, wide_per_warp);  // all threads or none
  if (threadIdx.x == 0) {
    double* part = p.partial + 3 * (int64_t(blockIdx.y) * gridDim.x + blockIdx.x);
    part[0] = m.count, part[1] = m.mean, part[2] = m.squares;
  }
}

// grid (noisy terms): merges blocks in an order that only their number fixes.
__global__ void __launch_bounds__(kThreads) mixed_sum_std_kernel(MixedSumParams p, int64_t blocks) {
  SHARED(double, shared, 3 * kThreads);
  const double* partial = p.partial + 3 * int64_t(blockIdx.x) * blocks;
  Moments m;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads)
    m = merge(m, {partial[3 * b], partial[3 * b + 1], partial[3 * b + 2]});
  double* own = shared + 3 * threadIdx.x;
  own[0] = m.count, own[1] = m.mean, own[2] = m.squares;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      const double* other = own + 3 * half;
      m = merge(m, {other[0], other[1], other[2]});
      own[0] = m.count, own[1] = m.mean, own[2] = m.squares;
    }
  }
  if (threadIdx.x == 0) p.std[blockIdx.x] = unbiased_std(m);
}

// grid (blocks): writes y of a block. A thread keeps its 16 sums in registers and reads each term once, in their
// order; noise is drawn where the term is read.
template <class T>
__global__ void __launch_bounds__(kThreads) mixed_sum_fwd_kernel(MixedSumParams p, bool aligned) {
  const float* w = static_cast<const float*>(p.w);
  const bool multiplicative = is_multiplicative(p.form);
  float sum[kQuads][4] = {};
  for (int k = 0; k < p.terms; ++k) {
    float v[kQuads][4];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) load_quad<T>(p.x[k], quad_of(i), p.n, aligned, v[i]);
    if (p.ordinal[k] >= 0) {
      const Draw<float> draw(p, p.ordinal[k]);
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        float d[4];
        draw_quad(p, draw, quad_of(i), d);
        for (int j = 0; j < 4; ++j) v[i][j] = mixed_value(multiplicative, v[i][j], d[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      for (int j = 0; j < 4; ++j) sum[i][j] += w[k] * v[i][j];
  }
#pragma unroll
  for (int i = 0; i < kQuads; ++i) store_quad<T>(p.y, quad_of(i), p.n, aligned, sum[i]);
}

// grid (blocks): writes every dx_k of a block and its partial sum of every dw_k, from one read of dy and
// of each x_k. A term's dot product goes registers, warp, then one barrier for all terms; warps are
// added in their order, in fp64.
template <class T>
__global__ void __launch_bounds__(kThreads) mixed_sum_bwd_kernel(MixedSumParams p, bool aligned) {
  SHARED(float, per_warp, kMaxTerms * kWarps);
  const float* w = static_cast<const float*>(p.w);
  const bool multiplicative = is_multiplicative(p.form);
  float dy[kQuads][4];
#pragma unroll
  for (int i = 0; i < kQuads; ++i) load_quad<T>(p.dy, quad_of(i), p.n, aligned, dy[i]);

  for (int k = 0; k < p.terms; ++k) {
    const bool noisy = p.ordinal[k] >= 0;
    float dot = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      float v[4], d[4], dx[4];
      if (p.dw) load_quad<T>(p.x[k], quad_of(i), p.n, aligned, v);
      if (noisy) draw_quad(p, Draw<float>(p, p.ordinal[k]), quad_of(i), d);
      for (int j = 0; j < 4; ++j) {
        if (p.dw) dot += dy[i][j] * (noisy ? mixed_value(multiplicative, v[j], d[j]) : v[j]);
        dx[j] = mixed_dx(w[k], noisy && multiplicative ? d[j] * dy[i][j] : dy[i][j]);
      }
      if (p.dx[k]) store_quad<T>(p.dx[k], quad_of(i), p.n, aligned, dx);
    }
    if (!p.dw) continue;
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) per_warp[k * kWarps + threadIdx.x / 32] = dot;
  }
  if (!p.dw) return;
  __syncthreads();
  for (int k = threadIdx.x; k < p.terms; k += kThreads) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += double(per_warp[k * kWarps + warp]);
    p.partial[int64_t(blockIdx.x) * p.terms + k] = sum;
  }
}

// grid (terms): adds up dw_k from the partials of all blocks.
__global__ void __launch_bounds__(kThreads) mixed_sum_dw_kernel(MixedSumParams p, int64_t blocks) {
  SHARED(double, shared, kThreads);
  const int k = int(blockIdx.x), t = int(threadIdx.x);
  double sum = 0;
  for (int64_t b = t; b < blocks; b += kThreads) sum += p.partial[b * p.terms + k];
  shared[t] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) shared[t] += shared[t + half];
  }
  if (t == 0) static_cast<float*>(p.dw)[k] = float(shared[0]);
}

// Says whether every pointer that is used can be read and written four elements at a time. A view into a larger
// tensor may begin anywhere; a misaligned vector load is a fault on a GPU, not a slow load.
bool is_aligned(const MixedSumParams& p, size_t element) {
  const uintptr_t mask = 4 * element - 1;
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.y) | reinterpret_cast<uintptr_t>(p.dy);
  for (int k = 0; k < p.terms; ++k)
    bits |= reinterpret_cast<uintptr_t>(p.x[k]) | reinterpret_cast<uintptr_t>(p.dx[k]);
  return (bits & mask) == 0;
}

template <class T>
int standard_deviations(const MixedSumParams& p) {
  const int64_t blocks = block_count(p.n);
  if (blocks == 0 || !is_relative(p.form) || p.noisy_terms == 0) return 0;
  const dim3 grid(unsigned(blocks), unsigned(p.noisy_terms));
  if (int error = launch(mixed_sum_moments_kernel<T>, grid, kThreads, 0, p.stream, p, is_aligned(p, sizeof(T))))
    return error;
  return launch(mixed_sum_std_kernel, unsigned(p.noisy_terms), kThreads, 0, p.stream, p, blocks);
}

template <class T>
int fwd(const MixedSumParams& p) {
  const int64_t blocks = block_count(p.n);
  if (blocks == 0) return 0;
  if (int error = standard_deviations<T>(p)) return error;
  return launch(mixed_sum_fwd_kernel<T>, unsigned(blocks), kThreads, 0, p.stream, p, is_aligned(p, sizeof(T)));
}

template <class T>
int bwd(const MixedSumParams& p) {
  const int64_t blocks = block_count(p.n);
  if (blocks)
    if (int error = launch(mixed_sum_bwd_kernel<T>, unsigned(blocks), kThreads, 0, p.stream, p,
                           is_aligned(p, sizeof(T))))
      return error;
  return p.dw ? launch(mixed_sum_dw_kernel, unsigned(p.terms), kThreads, 0, p.stream, p, blocks) : 0;
}

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

}  // namespace

int mixed_sum_std(const MixedSumParams& p) {
  switch (p.dtype) {
    case DType::f32: return standard_deviations<float>(p);
    case DType::bf16: return standard_deviations<bf16_t>(p);
    case DType::f16: return standard_deviations<f16_t>(p);
    default: return kInvalidValue;
  }
}

int mixed_sum_fwd(const MixedSumParams& p) {
  switch (p.dtype) {
    case DType::f32: return fwd<float>(p);
    case DType::bf16: return fwd<bf16_t>(p);
    case DType::f16: return fwd<f16_t>(p);
    default: return kInvalidValue;
  }
}

int mixed_sum_bwd(const MixedSumParams& p) {
  switch (p.dtype) {
    case DType::f32: return bwd<float>(p);
    case DType::bf16: return bwd<bf16_t>(p);
    case DType::f16: return bwd<f16_t>(p);
    default: return kInvalidValue;
  }
}

}  // namespace fastnas::cuda
