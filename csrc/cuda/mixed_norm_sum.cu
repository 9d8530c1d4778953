// Runs mixed_norm_sum on CUDA. Forward: moments of every part of a channel, statistics of a channel out of its
// parts, the mix. Backward: one sweep for all sums, totals of a channel out of its parts, dw, one sweep for every
// dz. A part has kBlock values or fewer; sums go registers, warp, block, parts in their order. No atomics.
#include "mixed_norm_sum.h"

#include "../formulas/mixed_norm_sum.h"
#include "channels.h"
#include "mixed_sum.h"

namespace fastnas::cuda {
namespace {

constexpr int kGroup = 8;                     // sums that one barrier serves
constexpr int kSlices = kThreads / kTile;     // threads that share the parts of a channel

// Holds scale and mean of a term in a channel: scale = w r; they are w and 0 where it is not normed.
struct Coefficient { float scale, mean; };

// Holds what dz needs besides.
struct Gradient { float scale, mean, slope, mean_dy; };

__device__ float rstd(const MixedNormSumParams& p, int k, int64_t channel) {
  if (p.norm[k] < 0) return 1;
  return reciprocal_std(static_cast<const float*>(p.var)[p.norm[k] * p.channels + channel], float(p.eps));
}

__device__ Coefficient coefficient(const MixedNormSumParams& p, int k, int64_t channel) {
  const float w = static_cast<const float*>(p.sum.w)[k];
  if (p.norm[k] < 0) return {w, 0};
  return {w * rstd(p, k, channel), static_cast<const float*>(p.mean)[p.norm[k] * p.channels + channel]};
}

// Fills table [terms][tile] with f(term, channel), for the whole block. The table lies in shared memory: a
// channel's scale and mean take a division and a root, and every thread of the block needs those of all terms.
template <class E, class F>
__device__ void fill_table(const MixedNormSumParams& p, const Tiling& g, int64_t first_channel, E* table, F f) {
  for (int i = int(threadIdx.x); i < p.sum.terms * g.tile; i += kThreads) {
    const int64_t channel = first_channel + i % g.tile;
    table[i] = channel < g.channels ? f(i / g.tile, channel) : E{};
  }
  __syncthreads();
}

// Says whether dz_k needs the sums of its channel first.
FASTNAS_HD bool needs_sums(const MixedNormSumParams& p, int k) {
  return p.training && p.norm[k] >= 0 && p.sum.dx[k] != nullptr;
}
// Says whether sum dy (z_k - mu_k) is wanted or, at k = terms, sum dy.
FASTNAS_HD bool is_summed(const MixedNormSumParams& p, int k, bool sum_dy) {
  return k == p.sum.terms ? sum_dy : p.sum.dw || needs_sums(p, k);
}

// Draws one element. It is a call, not inlined: nvcc takes minutes over sixteen copies of it in each kernel.
__attribute__((noinline)) __device__ float draw_element(Draw<float> draw, int64_t channels, int64_t pixels,
                                                        int64_t index) {
  return draw.element(uint64_t(logical_index(channels, pixels, index)));
}

// Makes the draws of a thread's values: four from a Philox block where its loads are whole quads in NCHW order,
// else each by its own logical index.
template <class View>
__device__ void draw_held(const MixedNormSumParams& p, int k, const View& view, float (&d)[kHeld]) {
  const Draw<float> draw(p.sum, p.sum.ordinal[k]);
  if (View::wide && p.sum.channels == 0) {
#pragma unroll
    for (int i = 0; i < kHeld / 4; ++i) {
      const int load = 4 * i / View::kVector, within = 4 * i % View::kVector;
      const Draws<float> four = draw.quad(uint64_t(view.at[load] + within) >> 2);
#pragma unroll
      for (int j = 0; j < 4; ++j) d[4 * i + j] = four.v[j];
    }
  } else {
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) d[slot] = 0;
    view.for_each([&](int slot, int64_t index) {
      d[slot] = draw_element(draw, p.sum.channels, p.sum.pixels, index);
    });
  }
}

// grid (parts x tiles, norms): gathers count, mean, squares of a part of a channel, two passes over registers: z is
// read once. Deviations sum to 0 but for rounding, and correct the mean and the squares by what they leave. Values
// past the end read 0 and are kept out of the second pass.
template <class View>
__global__ void __launch_bounds__(kThreads) mixed_norm_sum_moments_kernel(MixedNormSumParams p, Tiling g) {
  SHARED(float, per_warp, kWarps * kTile);
  const View view(g);
  int k = 0;
  while (p.norm[k] != int(blockIdx.y)) ++k;

  float v[kHeld], mean[View::kSums] = {}, squares[View::kSums] = {}, deviations[View::kSums] = {};
  view.read(p.sum.x[k], v);
#pragma unroll
  for (int slot = 0; slot < kHeld; ++slot) mean[View::sum_of(slot)] += v[slot];
  view.block_sums(mean, per_warp);
#pragma unroll
  for (int s = 0; s < View::kSums; ++s) mean[s] /= float(view.count);
#pragma unroll
  for (int slot = 0; slot < kHeld; ++slot) {
    const float delta = view.has(slot) ? v[slot] - mean[View::sum_of(slot)] : 0.0f;
    squares[View::sum_of(slot)] += delta * delta;
    deviations[View::sum_of(slot)] += delta;
  }
  view.block_sums(squares, per_warp);
  view.block_sums(deviations, per_warp);
  if (int(threadIdx.x) >= view.lanes) return;
#pragma unroll
  for (int s = 0; s < View::kSums; ++s) {
    const int64_t channel = view.first_channel + view.column + s;
    if (channel >= g.channels) return;
    const double correction = double(deviations[s]) / double(view.count);  // NaN where the mean is inf
    double* part = p.partial + 3 * ((int64_t(blockIdx.y) * g.parts + view.part) * g.channels + channel);
    part[0] = double(view.count);
    part[1] = double(mean[s]) + (isfinite(correction) ? correction : 0);
    part[2] = clamp_variance(double(squares[s]) - double(deviations[s]) * correction);
  }
}

// Adds up f(part) over the parts of a channel, in kSlices interleaved sums added in their order; in every thread of
// it. The order is fixed by the number of parts.
template <class F> __device__ double sum_over_parts(int64_t parts, double* slices, F f) {
  double sum = 0;
  for (int64_t b = threadIdx.x / kTile; b < parts; b += kSlices) sum += f(b);
  __syncthreads();  // slices may still be read from the call before
  slices[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int slice = 0; slice < kSlices; ++slice) sum += slices[slice * kTile + int(threadIdx.x) % kTile];
  return sum;
}

// grid (channels / kTile, norms): makes mean and biased variance of a channel.
__global__ void __launch_bounds__(kThreads) mixed_norm_sum_statistics_kernel(MixedNormSumParams p, Tiling g) {
  SHARED(double, slices, kThreads);
  const int64_t channel = int64_t(blockIdx.x) * kTile + threadIdx.x % kTile;
  const bool is_there = channel < g.channels;
  const double* first = p.partial + 3 * (int64_t(blockIdx.y) * g.parts * g.channels + channel);
  const int64_t stride = 3 * g.channels, parts = is_there ? g.parts : 0;
  const double count = double(g.values);
  const double mean =
      sum_over_parts(parts, slices, [&](int64_t b) { return first[b * stride] * first[b * stride + 1]; }) / count;
  const double squares = sum_over_parts(parts, slices, [&](int64_t b) {
    const double* part = first + b * stride;
    return part[2] + part[0] * (part[1] - mean) * (part[1] - mean);
  });
  if (!is_there || threadIdx.x >= kTile) return;
  const int64_t at = int64_t(blockIdx.y) * g.channels + channel;
  static_cast<float*>(p.mean)[at] = float(mean);
  static_cast<float*>(p.var)[at] = stored_variance<float>(squares / count);
}

// grid (parts x tiles): writes the weighted sum. Without noise a thread needs half the registers:
// hence `any_noise`, here and below.
template <class View, bool any_noise>
__global__ void __launch_bounds__(kThreads) mixed_norm_sum_mix_kernel(MixedNormSumParams p, Tiling g) {
  DYNAMIC_SHARED(Coefficient, table);
  const View view(g);
  fill_table(p, g, view.first_channel, table, [&](int k, int64_t channel) { return coefficient(p, k, channel); });
  const bool multiplicative = is_multiplicative(p.sum.form);
  float sum[kHeld] = {};
  for (int k = 0; k < p.sum.terms; ++k) {
    float v[kHeld];
    view.read(p.sum.x[k], v);
    if (any_noise && p.sum.ordinal[k] >= 0) {
      float d[kHeld];
      draw_held(p, k, view, d);
#pragma unroll
      for (int slot = 0; slot < kHeld; ++slot) v[slot] = mixed_value(multiplicative, v[slot], d[slot]);
    }
    const Coefficient* of = table + k * g.tile + view.column;
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      const Coefficient c = of[View::sum_of(slot)];
      sum[slot] += scaled_norm(c.scale, v[slot], c.mean);
    }
  }
  view.write(p.sum.y, sum);
}

// Sums dy (v_k - mu_k) of a thread, and writes dz_k where it needs no sums: of a term without norm, or with given
// statistics. z is read only if its sum is wanted; noise is drawn only if the sum or a scaled dz needs it.
template <class View, bool any_noise>
__device__ void reduce_term(const MixedNormSumParams& p, int k, const View& view, const Coefficient* of,
                            const float (&dy)[kHeld], float (&sums)[View::kSums]) {
  const bool summed = is_summed(p, k, false), noisy = any_noise && p.sum.ordinal[k] >= 0;
  const bool multiplicative = noisy && is_multiplicative(p.sum.form);
  void* const dz = needs_sums(p, k) ? nullptr : p.sum.dx[k];
  float d[kHeld];
  if (noisy && (summed || (dz && multiplicative))) draw_held(p, k, view, d);
  if (summed) {
    float v[kHeld];
    view.read(p.sum.x[k], v);
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      const float value = noisy ? mixed_value(multiplicative, v[slot], d[slot]) : v[slot];
      // Not 0 times a mean that may be inf.
      if (view.has(slot)) sums[View::sum_of(slot)] += dy[slot] * (value - of[View::sum_of(slot)].mean);
    }
  }
  if (!dz) return;
  float out[kHeld];
#pragma unroll
  for (int slot = 0; slot < kHeld; ++slot)
    out[slot] = mixed_dx(of[View::sum_of(slot)].scale, multiplicative ? d[slot] * dy[slot] : dy[slot]);
  view.write(dz, out);
}

// grid (parts x tiles): gathers sum dy (z_k - mu_k) of a part and, last, sum dy; writes the dz that need no sums.
//
// dy stays in registers for all terms. Sums of kGroup terms are laid down before one barrier serves them all; the
// second barrier keeps them from being overwritten by the next group while they are read.
template <class View, bool any_noise>
__global__ void __launch_bounds__(kThreads) mixed_norm_sum_reduce_kernel(MixedNormSumParams p, Tiling g, bool sum_dy) {
  DYNAMIC_SHARED(Coefficient, table);
  SHARED(float, per_warp, kGroup * kWarps * kTile);
  const View view(g);
  fill_table(p, g, view.first_channel, table, [&](int k, int64_t channel) { return coefficient(p, k, channel); });
  float dy[kHeld];
  view.read(p.sum.dy, dy);
  for (int first = 0; first <= p.sum.terms; first += kGroup) {
    const int size = min(kGroup, p.sum.terms + 1 - first);
    for (int j = 0; j < size; ++j) {
      const int k = first + j;
      float sums[View::kSums] = {};
      if (k < p.sum.terms) {
        reduce_term<View, any_noise>(p, k, view, table + k * g.tile + view.column, dy, sums);
      } else {
#pragma unroll
        for (int slot = 0; slot < kHeld; ++slot) sums[View::sum_of(slot)] += dy[slot];
      }
      if (is_summed(p, k, sum_dy)) view.warp_sums(sums, per_warp + j * kWarps * kTile);
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < size * g.tile; i += kThreads) {
      const int k = first + i / g.tile, column = i % g.tile;
      const int64_t channel = view.first_channel + column;
      if (channel >= g.channels || !is_summed(p, k, sum_dy)) continue;
      const float* of = per_warp + i / g.tile * kWarps * kTile + column;
      double sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += double(of[warp * kTile]);
      p.partial[(k * g.parts + view.part) * g.channels + channel] = sum;
    }
    __syncthreads();
  }
}

// Finds the totals of a sum by channel, which mixed_norm_sum_totals_kernel leaves in the place of its first part.
__device__ double* totals(const MixedNormSumParams& p, const Tiling& g, int k) {
  return p.partial + k * g.parts * g.channels;
}

// grid (channels / kTile, terms + 1): adds up the parts of a sum into part 0.
__global__ void __launch_bounds__(kThreads) mixed_norm_sum_totals_kernel(MixedNormSumParams p, Tiling g, bool sum_dy) {
  SHARED(double, slices, kThreads);
  if (!is_summed(p, int(blockIdx.y), sum_dy)) return;
  const int64_t channel = int64_t(blockIdx.x) * kTile + threadIdx.x % kTile;
  double* first = totals(p, g, int(blockIdx.y)) + channel;
  const int64_t parts = channel < g.channels ? g.parts : 0;
  const double sum = sum_over_parts(parts, slices, [&](int64_t b) { return first[b * g.channels]; });
  if (parts && threadIdx.x < kTile) first[0] = sum;
}

// grid (terms): makes dw_k from the totals of all channels.
__global__ void __launch_bounds__(kThreads) mixed_norm_sum_dw_kernel(MixedNormSumParams p, Tiling g) {
  SHARED(double, shared, kThreads);
  const int k = int(blockIdx.x), t = int(threadIdx.x);
  double sum = 0;
  for (int64_t c = t; c < g.channels; c += kThreads) sum += double(rstd(p, k, c)) * totals(p, g, k)[c];
  shared[t] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) shared[t] += shared[t + half];
  }
  if (t == 0) static_cast<float*>(p.sum.dw)[k] = float(shared[0]);
}

// grid (terms): clears the dw of an empty batch.
__global__ void mixed_norm_sum_zero_dw_kernel(MixedNormSumParams p) { static_cast<float*>(p.sum.dw)[blockIdx.x] = 0; }

// grid (parts x tiles): writes the dz that need the totals; reads dy once and each z_k once more.
template <class View>
__global__ void __launch_bounds__(kThreads) mixed_norm_sum_dz_kernel(MixedNormSumParams p, Tiling g) {
  DYNAMIC_SHARED(Gradient, table);
  const View view(g);
  const double count = double(g.values);
  fill_table(p, g, view.first_channel, table, [&](int k, int64_t channel) -> Gradient {
    if (!needs_sums(p, k)) return {};
    const Coefficient c = coefficient(p, k, channel);
    const float w = static_cast<const float*>(p.sum.w)[k], mean_product = float(totals(p, g, k)[channel] / count);
    return {c.scale, c.mean, norm_slope(w, rstd(p, k, channel), mean_product),
            float(totals(p, g, p.sum.terms)[channel] / count)};
  });
  float dy[kHeld];
  view.read(p.sum.dy, dy);
  for (int k = 0; k < p.sum.terms; ++k) {
    if (!needs_sums(p, k)) continue;
    float v[kHeld];
    view.read(p.sum.x[k], v);
    const Gradient* of = table + k * g.tile + view.column;
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      const Gradient c = of[View::sum_of(slot)];
      v[slot] = norm_dz(c.scale, dy[slot], c.mean_dy, c.slope, v[slot], c.mean);
    }
    view.write(p.sum.dx[k], v);
  }
}

template <class E> size_t table_bytes(const MixedNormSumParams& p, const Tiling& g) {
  return sizeof(E) * size_t(p.sum.terms) * size_t(g.tile);
}
unsigned channel_blocks(const Tiling& g) { return unsigned((g.channels + kTile - 1) / kTile); }

template <class T> int fwd(const MixedNormSumParams& p) {
  if (p.sum.n == 0) return 0;
  if (const int error = mixed_sum_std(p.sum)) return error;
  const Tiling g(p);
  return with_view<T>(p, g, [&](auto tag) {
    using View = typename decltype(tag)::View;
    void* const stream = p.sum.stream;
    if (p.training && p.norms > 0) {
      if (const int error = launch(mixed_norm_sum_moments_kernel<View>, g.grid(p.norms), kThreads, 0, stream, p, g))
        return error;
      const dim3 grid(channel_blocks(g), unsigned(p.norms));
      if (const int error = launch(mixed_norm_sum_statistics_kernel, grid, kThreads, 0, stream, p, g)) return error;
    }
    const auto mix = p.sum.noisy_terms ? mixed_norm_sum_mix_kernel<View, true> : mixed_norm_sum_mix_kernel<View, false>;
    return launch(mix, g.grid(), kThreads, table_bytes<Coefficient>(p, g), stream, p, g);
  });
}

template <class T> int bwd(const MixedNormSumParams& p) {
  void* const stream = p.sum.stream;
  const unsigned terms = unsigned(p.sum.terms);
  if (p.sum.n == 0) return p.sum.dw ? launch(mixed_norm_sum_zero_dw_kernel, terms, 1, 0, stream, p) : 0;
  const Tiling g(p);
  bool second_sweep = false;
  for (int k = 0; k < p.sum.terms; ++k) second_sweep |= needs_sums(p, k);
  return with_view<T>(p, g, [&](auto tag) {
    using View = typename decltype(tag)::View;
    const size_t bytes = table_bytes<Coefficient>(p, g);
    const auto reduce =
        p.sum.noisy_terms ? mixed_norm_sum_reduce_kernel<View, true> : mixed_norm_sum_reduce_kernel<View, false>;
    if (const int error = launch(reduce, g.grid(), kThreads, bytes, stream, p, g, second_sweep)) return error;
    if (second_sweep || p.sum.dw) {
      const dim3 grid(channel_blocks(g), terms + 1);
      if (const int error = launch(mixed_norm_sum_totals_kernel, grid, kThreads, 0, stream, p, g, second_sweep))
        return error;
    }
    if (p.sum.dw)
      if (const int error = launch(mixed_norm_sum_dw_kernel, terms, kThreads, 0, stream, p, g)) return error;
    if (!second_sweep) return 0;
    return launch(mixed_norm_sum_dz_kernel<View>, g.grid(), kThreads, table_bytes<Gradient>(p, g), stream, p, g);
  });
}

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

}  // namespace

int64_t mixed_norm_sum_parts(const MixedNormSumParams& p) { return Tiling(p).parts; }

int mixed_norm_sum_fwd(const MixedNormSumParams& p) {
  switch (p.sum.dtype) {
    case DType::f32: return fwd<float>(p);
    case DType::bf16: return fwd<bf16_t>(p);
    case DType::f16: return fwd<f16_t>(p);
    default: return kInvalidValue;
  }
}

int mixed_norm_sum_bwd(const MixedNormSumParams& p) {
  switch (p.sum.dtype) {
    case DType::f32: return bwd<float>(p);
    case DType::bf16: return bwd<bf16_t>(p);
    case DType::f16: return bwd<f16_t>(p);
    default: return kInvalidValue;
  }
}

}  // namespace fastnas::cuda
