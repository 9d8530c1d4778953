// Computes y = sum_k w_k v_k and its gradients on CUDA. A block of threads takes kBlock elements, a thread 16 of them
// in packs of 16 bytes, kThreads packs apart, so that a warp reads and writes 512 contiguous bytes at once. Sums:
// registers, warp, block, then one partial per block, added in block order. No atomics.
//
// The op moves bytes and little else: forward reads every term once and writes y, backward reads dy and every term
// once and writes every dx. A thread has all its loads of a term in flight before the first is used.
#include "mixed_sum.h"

#include "packed.h"

#include "../formulas/mixed_sum.h"

namespace fastnas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kHeld = int(kBlock) / kThreads;  // elements of a thread

// Holds where the elements of a thread lie: packs of 16 bytes. `aligned`: every tensor begins at 16 bytes.
template <class T> struct Packs {
  static constexpr int kSize = kPacked<T>, kCount = kHeld / kSize;

  int64_t begin;  // the block's first element
  int there;      // how many of its elements there are
  bool packed;    // all of them, and aligned: one branch for the block, where one a pack would spill predicates

  __device__ Packs(int64_t n, bool aligned)
      : begin(int64_t(blockIdx.x) * kBlock), there(int(n - begin < kBlock ? n - begin : kBlock)),
        packed(aligned && there == kBlock) {}

  // Finds the i-th pack of this thread in the block: neighbouring threads take neighbouring packs.
  static __device__ int first(int i) { return (i * kThreads + int(threadIdx.x)) * kSize; }

  // Reads or writes a pack; element by element where the block is not packed, 0 past the end.
  __device__ void read(const void* base, int i, float* v) const {
    const T* from = static_cast<const T*>(base) + begin + first(i);
    if (packed) return load_packed(from, v);
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = first(i) + j < there ? load(from[j]) : 0.0f;
  }
  __device__ void write(void* base, int i, const float* v) const {
    T* to = static_cast<T*>(base) + begin + first(i);
    if (packed) return store_packed(to, v);
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (first(i) + j < there) to[j] = store<T>(v[j]);
  }

  // Makes the draws of a pack: four neighbours in NCHW order from one Philox block, else each from its own.
  __device__ void draw(const MixedSumParams& p, const Draw<float>& draw, int i, float* d) const {
#pragma unroll
    for (int j = 0; j < kSize; j += 4) {
      const int64_t at = begin + first(i) + j;
      if (p.channels == 0) {
        const Draws<float> four = draw.quad(uint64_t(at / 4));
        for (int l = 0; l < 4; ++l) d[j + l] = four.v[l];
      } else {
        for (int l = 0; l < 4; ++l) d[j + l] = draw.element(uint64_t(logical_index(p, at + l)));
      }
    }
  }
};

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
template <class P, class S>
__device__ Moments block_moments(const P& own, const float (&v)[P::kCount][P::kSize], S* per_warp) {
  const double count = own.there;
  S sum = 0, squares = 0, deviations = 0;
  for (int i = 0; i < P::kCount; ++i)
    for (int j = 0; j < P::kSize; ++j) sum += S(v[i][j]);
  const S mean = block_sum(sum, per_warp) / S(count);
  for (int i = 0; i < P::kCount; ++i)
    for (int j = 0; j < P::kSize; ++j) {
      const S delta = P::first(i) + j < own.there ? S(v[i][j]) - mean : S(0);
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
  using Own = Packs<T>;
  const Own own(p.n, aligned);
  float v[Own::kCount][Own::kSize];
  // Values past the end read 0: they add nothing to the sum, and block_moments keeps them out of the deviations.
  for (int i = 0; i < Own::kCount; ++i) own.read(p.x[term], i, v[i]);
  Moments m = block_moments(own, v, per_warp);
  if (!squares_fit_fp32(m)) m = block_moments(own, v, wide_per_warp);  // all threads or none
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
// order; noise is drawn where the term is read. Without any a thread needs less than half the registers: hence
// `any_noise`, here and below, and the blocks of a multiprocessor, with which nothing spills.
template <class T, bool any_noise>
__global__ void __launch_bounds__(kThreads, any_noise ? 2 : 4) mixed_sum_fwd_kernel(MixedSumParams p, bool aligned) {
  const float* w = static_cast<const float*>(p.w);
  const bool multiplicative = is_multiplicative(p.form);
  using Own = Packs<T>;
  const Own own(p.n, aligned);
  float sum[Own::kCount][Own::kSize] = {};
  for (int k = 0; k < p.terms; ++k) {
    float v[Own::kCount][Own::kSize];
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i) own.read(p.x[k], i, v[i]);
    if (any_noise && p.ordinal[k] >= 0) {
      const Draw<float> draw(p, p.ordinal[k]);
#pragma unroll
      for (int i = 0; i < Own::kCount; ++i) {
        float d[Own::kSize];
        own.draw(p, draw, i, d);
        for (int j = 0; j < Own::kSize; ++j) v[i][j] = mixed_value(multiplicative, v[i][j], d[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i)
      for (int j = 0; j < Own::kSize; ++j) sum[i][j] += w[k] * v[i][j];
  }
#pragma unroll
  for (int i = 0; i < Own::kCount; ++i) own.write(p.y, i, sum[i]);
}

// grid (blocks): writes every dx_k of a block and its partial sum of every dw_k, from one read of dy and
// of each x_k. A term's dot product goes registers, warp, then one barrier for all terms; warps are
// added in their order, in fp64.
template <class T, bool any_noise>
__global__ void __launch_bounds__(kThreads, any_noise ? 2 : 4) mixed_sum_bwd_kernel(MixedSumParams p, bool aligned) {
  SHARED(float, per_warp, kMaxTerms * kWarps);
  const float* w = static_cast<const float*>(p.w);
  const bool multiplicative = is_multiplicative(p.form);
  using Own = Packs<T>;
  const Own own(p.n, aligned);
  float dy[Own::kCount][Own::kSize];
#pragma unroll
  for (int i = 0; i < Own::kCount; ++i) own.read(p.dy, i, dy[i]);

  for (int k = 0; k < p.terms; ++k) {
    const bool noisy = any_noise && p.ordinal[k] >= 0;
    float dot = 0, v[Own::kCount][Own::kSize];
    // All loads before the first store, which they could not pass: the compiler does not know that they are apart.
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i)
      if (p.dw) own.read(p.x[k], i, v[i]);
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i) {
      float d[Own::kSize], dx[Own::kSize];
      if (noisy) own.draw(p, Draw<float>(p, p.ordinal[k]), i, d);
      for (int j = 0; j < Own::kSize; ++j) {
        if (p.dw) dot += dy[i][j] * (noisy ? mixed_value(multiplicative, v[i][j], d[j]) : v[i][j]);
        dx[j] = mixed_dx(w[k], noisy && multiplicative ? d[j] * dy[i][j] : dy[i][j]);
      }
      if (p.dx[k]) own.write(p.dx[k], i, dx);
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

// Says whether every pointer that is used is one of 16 bytes. A view into a larger tensor may begin anywhere; a
// misaligned vector load is a fault on a GPU, not a slow load.
bool is_aligned(const MixedSumParams& p) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.y) | reinterpret_cast<uintptr_t>(p.dy);
  for (int k = 0; k < p.terms; ++k)
    bits |= reinterpret_cast<uintptr_t>(p.x[k]) | reinterpret_cast<uintptr_t>(p.dx[k]);
  return bits % 16 == 0;
}

template <class T>
int standard_deviations(const MixedSumParams& p) {
  const int64_t blocks = block_count(p.n);
  if (blocks == 0 || !is_relative(p.form) || p.noisy_terms == 0) return 0;
  const dim3 grid(unsigned(blocks), unsigned(p.noisy_terms));
  if (int error = launch(mixed_sum_moments_kernel<T>, grid, kThreads, 0, p.stream, p, is_aligned(p)))
    return error;
  return launch(mixed_sum_std_kernel, unsigned(p.noisy_terms), kThreads, 0, p.stream, p, blocks);
}

template <class T>
int fwd(const MixedSumParams& p) {
  const int64_t blocks = block_count(p.n);
  if (blocks == 0) return 0;
  if (int error = standard_deviations<T>(p)) return error;
  const auto kernel = p.noisy_terms ? mixed_sum_fwd_kernel<T, true> : mixed_sum_fwd_kernel<T, false>;
  return launch(kernel, unsigned(blocks), kThreads, 0, p.stream, p, is_aligned(p));
}

template <class T>
int bwd(const MixedSumParams& p) {
  const int64_t blocks = block_count(p.n);
  const auto kernel = p.noisy_terms ? mixed_sum_bwd_kernel<T, true> : mixed_sum_bwd_kernel<T, false>;
  if (blocks)
    if (int error = launch(kernel, unsigned(blocks), kThreads, 0, p.stream, p, is_aligned(p))) return error;
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
