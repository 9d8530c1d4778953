// Computes depthwise convolutions, their two gradients and pools of patches in shared memory (mixed_edges_patch.h): a
// lane has one strip of one channel, all of it in registers and unrolled, so that nearly every instruction is an FFMA.
//
// What the instructions are: a 3x3 strip at stride 1 takes 576 FFMA, and beside them 40 loads of the window's 10 rows,
// 100 maxima for the relu, 3 loads of taps and 16 stores. Each row of the window is read once, as quads, and meets
// every tap of every output row that it belongs to. Registers at stride 1: 64 sums, 9 to 25 taps, 10 to 16 values of
// the row, about 110. With what a kernel keeps besides, 168 registers hold it without a spill: three blocks of four
// warps on a multiprocessor, as many as patches and tiles leave room for. A 7x7 would not fit so; what it does instead
// is told where it is done.
#pragma once

#include "mixed_edges_patch.h"

namespace fastnas::cuda::strips {
namespace {

template <int S> constexpr int kSide = S == 1 ? 8 : 4;  // of a strip of the output's grid
constexpr int kSourceSide = 8;                          // and of the input's

// Says whether the rows above and below a strip's footprint are in the patch. If not they lie outside of the plane:
// they count as zeros, but neither memory nor instructions are spent on them.
struct Edges {
  bool top, bottom;
};
// `row` is the strip's first row in the grid of the patch.
__device__ Edges edges_of(const Reach& reach, const Patch& patch, int row) {
  return {row > 0, row + reach.footprint() < patch.from.rows};
}

// Calls f(y) for the rows First .. Last of a window, where Rows of them are the footprint.
template <int First, int Rows, int Last, class F> __device__ __forceinline__ void each_row(Edges edges, F f) {
  if (edges.top) {
#pragma unroll
    for (int y = First; y < 0; ++y) f(y);
  }
#pragma unroll
  for (int y = 0; y < Rows; ++y) f(y);
  if (edges.bottom) {
#pragma unroll
    for (int y = Rows; y <= Last; ++y) f(y);
  }
}

// Holds a row of a window, columns -kMargin .. Foot + kMargin - 1 of which those from -Left to Foot - 1 + Right are
// loaded: the footprint as quads, beside it what is wanted.
template <int Foot, int Left, int Right> struct Row {
  float value[Foot + 2 * kMargin];
  __device__ __forceinline__ float operator[](int x) const { return value[x + kMargin]; }

  template <int N> __device__ __forceinline__ void take(const float* from, int x) {
    if constexpr (N == 1) value[x + kMargin] = from[x];
    if constexpr (N == 2) {
      const float2 v = *reinterpret_cast<const float2*>(from + x);
      value[x + kMargin] = v.x, value[x + kMargin + 1] = v.y;
    }
    if constexpr (N > 2) {
      const float4 v = *reinterpret_cast<const float4*>(from + x);
      value[x + kMargin] = v.x, value[x + kMargin + 1] = v.y;
      value[x + kMargin + 2] = v.z, value[x + kMargin + 3] = v.w;
    }
  }
  __device__ __forceinline__ explicit Row(const float* from) {
    take<Left>(from, Left > 2 ? -4 : -Left);
#pragma unroll
    for (int x = 0; x < Foot; x += 4) take<4>(from, x);
    take<Right>(from, Foot);
  }
  __device__ __forceinline__ void rectify() {
#pragma unroll
    for (int x = -Left; x < Foot + Right; ++x) value[x + kMargin] = relu_nan(value[x + kMargin]);
  }
};

// Loads N floats of shared memory as quads; memory goes on to the next multiple of 4 (tap_pitch).
template <int N> __device__ __forceinline__ void load_taps(const float* from, float (&tap)[N]) {
#pragma unroll
  for (int k = 0; k < N; k += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + k);
    tap[k] = v.x;
    if (k + 1 < N) tap[k + 1] = v.y;
    if (k + 2 < N) tap[k + 2] = v.z;
    if (k + 3 < N) tap[k + 3] = v.w;
  }
}

// Stores a strip to a tile in shared memory, rows `pitch` floats apart, 16 bytes at a time. `rows` and `cols` are what
// is left of the tile from the strip's first pixel on; cols is a multiple of 4.
template <int N>
__device__ __forceinline__ void put_strip(const float (&from)[N][N], float* to, int pitch, int rows, int cols) {
#pragma unroll
  for (int r = 0; r < N; ++r, to += pitch) {
    if (r >= rows) return;
#pragma unroll
    for (int q = 0; q < N; q += 4)
      if (q < cols) put_quad(to + q, make_float4(from[r][q], from[r][q + 1], from[r][q + 2], from[r][q + 3]));
  }
}
// Loads rows of a strip from a patch, which holds whole strips: what is not of the plane is 0 there.
template <int M, int N> __device__ __forceinline__ void get_strip(float (&to)[M][N], const float* from, int pitch) {
  pitch = fresh(pitch);
#pragma unroll
  for (int r = 0; r < M; ++r)
#pragma unroll
    for (int q = 0; q < N; q += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + r * pitch + q);
      to[r][q] = v.x, to[r][q + 1] = v.y, to[r][q + 2] = v.z, to[r][q + 3] = v.w;
    }
}

// --- the convolution -----------------------------------------------------------------------------------------

// Output row r reads input rows r S - pad + ky D. gather() calls f(r, q, k, x) for everything that row y of the input
// gives, x being the column that output column q reads for tap k; all numbers are known when compiling. Columns
// beyond the strip belong to it: q runs over the strip, x over the window.
template <int K, int D, int S, int Rows, class F> __device__ __forceinline__ void gather(int y, F f) {
  constexpr int kPad = K / 2 * D;
#pragma unroll
  for (int ky = 0; ky < K; ++ky) {
    const int r = y + kPad - ky * D;
    if (r < 0 || r % S != 0 || r / S >= Rows) continue;
#pragma unroll
    for (int q = 0; q < kSide<S>; ++q)
#pragma unroll
      for (int kx = 0; kx < K; ++kx) f(r / S, q, ky * K + kx, q * S - kPad + kx * D);
  }
}
template <int K, int D, int S> constexpr int kRight = K / 2 * D - (S - 1);  // columns right of a footprint
template <int K, int D, int S> using Window = Row<8, K / 2 * D, kRight<K, D, S>>;

// A 7x7 at stride 1, where 49 taps and 64 sums would not fit the registers: takes the rows of taps one by one, in a
// loop that is not unrolled, and reads the window again for each of them, at 14 FFMA a load of 16 bytes. With `flip`
// it is the transposed convolution.
template <int K, bool flip>
__device__ __forceinline__ void by_tap_rows(const float* from, int pitch, Edges edges, const float* taps,
                                            float (&acc)[8][8]) {
  constexpr int kPad = K / 2;
  pitch = fresh(pitch);
  const int first = edges.top ? -kPad : 0, last = edges.bottom ? 8 + kPad : 8;
#pragma unroll 1
  for (int ky = 0; ky < K; ++ky) {
    float tap[K];
#pragma unroll
    for (int kx = 0; kx < K; ++kx) tap[kx] = taps[flip ? K * K - 1 - (ky * K + kx) : ky * K + kx];
    const float* row = from + (ky - kPad) * pitch;
#pragma unroll
    for (int r = 0; r < 8; ++r, row += pitch) {
      if (r + ky - kPad < first || r + ky - kPad >= last) continue;
      Row<8, kPad, kPad> window(row);
      if (!flip) window.rectify();
#pragma unroll
      for (int q = 0; q < 8; ++q)
#pragma unroll
        for (int kx = 0; kx < K; ++kx) acc[r][q] += tap[kx] * window[q + kx - kPad];
    }
  }
}

// Adds a strip of D * relu(x) to acc. `from` is the strip's pixel (0, 0) in the patch, `taps` are its channel's.
template <int K, int D, int S>
__device__ __forceinline__ void convolve(const float* from, int pitch, Edges edges, const float* taps,
                                         float (&acc)[kSide<S>][kSide<S>]) {
  if constexpr (K > 5 && S == 1) {
    by_tap_rows<K, false>(from, pitch, edges, taps, acc);
  } else {
    constexpr int kPad = K / 2 * D;
    pitch = fresh(pitch);
    float tap[K * K];
    load_taps(taps, tap);
    each_row<-kPad, 8, 7 + kRight<K, D, S>>(edges, [&](int y) {
      Window<K, D, S> window(from + y * pitch);
      window.rectify();
      gather<K, D, S, kSide<S>>(y, [&](int r, int q, int k, int x) { acc[r][q] += tap[k] * window[x]; });
    });
  }
}

// --- the convolution, transposed -----------------------------------------------------------------------------

// Row y of du gives rows y S - pad + ky D of the input. scatter() calls f(r, q, k, x) for all that du's row gives a
// strip of the input's grid; of the window, x runs over what meets the strip.
template <int K, int D, int S> constexpr int kBefore = (K / 2 * D) / S;            // rows of du above the footprint
template <int K, int D, int S> constexpr int kAfter = (7 + K / 2 * D) / S - 8 / S + 1;  // and below it
template <int K, int D, int S> using Gradients = Row<8 / S, kBefore<K, D, S>, kAfter<K, D, S>>;

template <int K, int D, int S, class F> __device__ __forceinline__ void scatter(int y, F f) {
  constexpr int kPad = K / 2 * D;
#pragma unroll
  for (int ky = 0; ky < K; ++ky) {
    const int r = y * S - kPad + ky * D;
    if (r < 0 || r >= 8) continue;
#pragma unroll
    for (int x = -kBefore<K, D, S>; x < 8 / S + kAfter<K, D, S>; ++x)
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
        const int q = x * S - kPad + kx * D;
        if (q >= 0 && q < 8) f(r, q, ky * K + kx, x);
      }
  }
}
template <int K, int D, int S, class F> __device__ __forceinline__ void each_gradient_row(Edges edges, F f) {
  each_row<-kBefore<K, D, S>, 8 / S, 8 / S - 1 + kAfter<K, D, S>>(edges, f);
}

// Adds a strip of D^T du to acc.
template <int K, int D, int S>
__device__ __forceinline__ void transpose(const float* du, int pitch, Edges edges, const float* taps,
                                          float (&acc)[8][8]) {
  if constexpr (K > 5 && S == 1) {
    by_tap_rows<K, true>(du, pitch, edges, taps, acc);
  } else {
    pitch = fresh(pitch);
    float tap[K * K];
    load_taps(taps, tap);
    each_gradient_row<K, D, S>(edges, [&](int y) {
      const Gradients<K, D, S> window(du + y * pitch);
      scatter<K, D, S>(y, [&](int r, int q, int k, int x) { acc[r][q] += tap[k] * window[x]; });
    });
  }
}

// --- the gradient of the taps --------------------------------------------------------------------------------

// Rows of du that a lane holds at once: the strip's, but of a 7x7 at stride 1 half, beside its 49 sums.
template <int K, int S> constexpr int kGradientRows = K > 5 && S == 1 ? 4 : kSide<S>;

// Adds to dtap[k] the sum of du times relu(x) shifted by tap k, over a strip. load(row, g) fills g with rows of du from
// the strip's `row` on, 0 outside of the tile.
template <int K, int D, int S, class Load>
__device__ __forceinline__ void correlate(const float* from, int pitch, Edges edges, Load load, float (&dtap)[K * K]) {
  constexpr int kPad = K / 2 * D, kRows = kGradientRows<K, S>;
  pitch = fresh(pitch);
#pragma unroll 1
  for (int part = 0; part < kSide<S>; part += kRows) {
    float g[kRows][kSide<S>];
    load(part, g);
    const Edges own{part > 0 || edges.top, part + kRows < kSide<S> || edges.bottom};
    each_row<-kPad, kRows * S, kRows * S - 1 + kRight<K, D, S>>(own, [&](int y) {
      Window<K, D, S> window(from + (part * S + y) * pitch);
      window.rectify();
      gather<K, D, S, kRows>(y, [&](int r, int q, int k, int x) { dtap[k] += g[r][q] * window[x]; });
    });
  }
}

// Calls f.run<K, D, S>() for the kernel of a half. A block has one half, so all its threads take the same case.
template <class F> __device__ void with_kernel(int size, int dilation, int stride, F f) {
  switch (size * 100 + dilation * 10 + stride) {
    case 311: return f.template run<3, 1, 1>();
    case 312: return f.template run<3, 1, 2>();
    case 321: return f.template run<3, 2, 1>();
    case 322: return f.template run<3, 2, 2>();
    case 511: return f.template run<5, 1, 1>();
    case 512: return f.template run<5, 1, 2>();
    case 521: return f.template run<5, 2, 1>();
    case 522: return f.template run<5, 2, 2>();
    case 711: return f.template run<7, 1, 1>();
    case 712: return f.template run<7, 1, 2>();
  }
}

}  // namespace
}  // namespace fastnas::cuda::strips
