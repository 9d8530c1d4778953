// Computes 3x3 pools of patches and takes them back, a strip a lane as mixed_edges_strips.h does. A value outside of
// the plane belongs to no window.
#pragma once

#include "mixed_edges_strips.h"

namespace fastnas::cuda::strips {
namespace {

// Says where a strip of a pool lies: the first pixel under it, and the plane.
struct Place {
  int row, col;
  Grid from;
};

// Gives each pixel's share of an average, 1 by the pixels of the window around (row, col) of the plane.
FASTNAS_HD float pool_share(int at, int size) { return at > 0 && at + 1 < size ? 1.0f / 3 : size > 1 ? 0.5f : 1.0f; }
FASTNAS_HD float pool_share(int row, int col, Grid from) {
  return pool_share(row, from.rows) * pool_share(col, from.cols);
}

// Goes through a strip row by row: calls open(r, centres), add(dy, dx, q, value) for each value of the windows, in
// the order in which torch visits them, and close(r). Rows are a loop, not unrolled: pools are few, their code would
// be as long as that of a 5x5.
template <int S, class Open, class Add, class Close>
__device__ __forceinline__ void each_window(const float* from, int pitch, const Place& at, Open open, Add add,
                                            Close close) {
  using Window = Row<8, 1, 2 - S>;
  pitch = fresh(pitch);
  const int rows = at.from.rows - at.row, cols = at.from.cols - at.col;
#pragma unroll 1
  for (int r = 0; r < kSide<S>; ++r) {
    open(r, Window(from + r * S * pitch));
#pragma unroll
    for (int dy = -1; dy <= 1; ++dy) {
      const int y = r * S + dy;
      if (at.row + y < 0 || y >= rows) continue;
      const Window window(from + y * pitch);
#pragma unroll
      for (int q = 0; q < kSide<S>; ++q)
#pragma unroll
        for (int dx = -1; dx <= 1; ++dx) {
          const int x = q * S + dx;
          if (x < 0 ? at.col > 0 : x < cols) add(dy, dx, q, window[x]);
        }
    }
    close(r);
  }
}

// Calls put(r, z) with the averages of each row of a strip.
//
// An average sums differences from the centre pixel: nine values far from zero would round at the size of their sum,
// and the batch norm after the pool divides that error by their small spread. An inf or NaN is no pivot; 0 is taken
// instead.
template <int S, class Put>
__device__ __forceinline__ void average(const float* from, int pitch, const Place& at, Put put) {
  float pivot[kSide<S>], sum[kSide<S>];
  each_window<S>(
      from, pitch, at,
      [&](int, const auto& centres) {
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q) {
          const float here = centres[q * S];
          pivot[q] = here - here == 0 ? here : 0.0f, sum[q] = 0;
        }
      },
      [&](int, int, int q, float v) { sum[q] += v - pivot[q]; },
      [&](int r) {
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q)
          sum[q] = pivot[q] + sum[q] * pool_share(at.row + r * S, at.col + q * S, at.from);
        put(r, sum);
      });
}

// Calls put(r, z, winner) with the maxima of each row of a strip, and which pixel of its window each is, row by row
// from 0 to 8: the first of several, or the last NaN, as torch.
template <int S, class Put>
__device__ __forceinline__ void maximum(const float* from, int pitch, const Place& at, Put put) {
  float best[kSide<S>], winner[kSide<S>];
  each_window<S>(
      from, pitch, at,
      [&](int r, const auto&) {
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q) {  // the first pixel that exists wins if all are -inf
          best[q] = -INFINITY;
          winner[q] = (at.row + r == 0 ? 3.0f : 0.0f) + (at.col + q == 0 ? 1.0f : 0.0f);
        }
      },
      [&](int dy, int dx, int q, float v) {
        if (v > best[q] || v != v) best[q] = v, winner[q] = float(dy * 3 + dx + 4);
      },
      [&](int r) { put(r, best, winner); });
}

// Adds to acc what the windows over each pixel of a strip of the input's grid give it. Of an average, dz was multiplied
// by pool_share() of its window before.
template <int S>
__device__ __forceinline__ void average_back(const float* dz, int pitch, Edges edges, float (&acc)[8][8]) {
  pitch = fresh(pitch);
  each_gradient_row<3, 1, S>(edges, [&](int y) {
    const Gradients<3, 1, S> window(dz + y * pitch);
    scatter<3, 1, S>(y, [&](int r, int q, int, int x) { acc[r][q] += window[x]; });
  });
}
// Of a maximum, a pixel gets what it won: it is pixel k of the window whose tap k would meet it.
template <int S>
__device__ __forceinline__ void maximum_back(const float* dz, const float* winner, int pitch, Edges edges,
                                             float (&acc)[8][8]) {
  pitch = fresh(pitch);
  each_gradient_row<3, 1, S>(edges, [&](int y) {
    const Gradients<3, 1, S> window(dz + y * pitch), won(winner + y * pitch);
    scatter<3, 1, S>(y, [&](int r, int q, int k, int x) {
      if (won[x] == float(k)) acc[r][q] += window[x];
    });
  });
}

}  // namespace
}  // namespace fastnas::cuda::strips
