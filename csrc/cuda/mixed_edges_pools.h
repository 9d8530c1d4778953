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

// Goes through a strip row by row. Each row of the patch is reduced once, by take(row, own), to what its windows of
// three columns give, and serves the three rows of windows that it belongs to: join(own, into) adds it to them in the
// order in which torch visits rows. put(r, result) gets a row of the pool. Rows are a loop, not unrolled: pools are
// few.
template <int S, class Reduced, class Take, class Join, class Put>
__device__ __forceinline__ void each_window(const float* from, int pitch, const Place& at, Take take, Join join,
                                            Put put) {
  using Window = Row<8, 1, 2 - S>;
  pitch = fresh(pitch);
  const int rows = at.from.rows - at.row;
  const auto reduced = [&](int y) {
    Reduced own;
    take(Window(from + y * pitch), own);
    return own;
  };
  Reduced before = reduced(at.row > 0 ? -1 : 0), here = S == 1 ? reduced(0) : before, after = before;
#pragma unroll 1
  for (int r = 0; r < kSide<S>; ++r) {
    const int y = r * S;
    if (S == 2) here = reduced(y);
    if (y + 1 < rows) after = reduced(y + 1);
    // What the row before gave is not needed again, so it becomes the result.
    if (at.row + y > 0) join(here, 0, before);
    else before.begin(here);
    if (y + 1 < rows) join(after, 1, before);
    put(r, before);
    if (S == 1) before = here, here = after;
    else before = after;
  }
}

// Holds sums of deviations from the strip's pivot, of windows of three columns or of whole ones.
template <int S> struct Deviations {
  float sum[kSide<S>];
  __device__ void begin(const Deviations& middle) { *this = middle; }
};

// Calls put(r, z) with the averages of each row of a strip.
//
// An average sums differences from a pixel of the strip: nine values far from zero would round at the size of their
// sum, and the batch norm after the pool divides that error by their small spread. An inf or NaN is no pivot; 0 is
// taken instead.
template <int S, class Put>
__device__ __forceinline__ void average(const float* from, int pitch, const Place& at, Put put) {
  const float corner = from[0], pivot = corner - corner == 0 ? corner : 0.0f;
  const int cols = at.from.cols - at.col;
  each_window<S, Deviations<S>>(
      from, pitch, at,
      [&](const auto& window, Deviations<S>& own) {
        float d[10];  // columns -1 to 8; those outside of the plane are in no window
#pragma unroll
        for (int x = -1; x < 10 - S; ++x) d[x + 1] = (x < 0 ? at.col > 0 : x < cols) ? window[x] - pivot : 0.0f;
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q) own.sum[q] = (d[q * S] + d[q * S + 1]) + d[q * S + 2];
      },
      [&](const Deviations<S>& own, int, Deviations<S>& into) {
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q) into.sum[q] += own.sum[q];
      },
      [&](int r, Deviations<S>& result) {
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q)
          result.sum[q] = pivot + result.sum[q] * pool_share(at.row + r * S, at.col + q * S, at.from);
        put(r, result.sum);
      });
}

// Holds maxima alone.
template <int S> struct Maxima {
  float best[kSide<S>];
  __device__ void begin(const Maxima& middle) { *this = middle; }
};

// Calls put(r, z) with the maxima of each row of a strip. NaN stays.
template <int S, class Put>
__device__ __forceinline__ void highest(const float* from, int pitch, const Place& at, Put put) {
  const int cols = at.from.cols - at.col;
  each_window<S, Maxima<S>>(
      from, pitch, at,
      [&](const auto& window, Maxima<S>& own) {
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q) {
          const float here = window[q * S], before = q > 0 || at.col > 0 ? window[q * S - 1] : here;
          own.best[q] = max_nan(max_nan(before, here), q * S + 1 < cols ? window[q * S + 1] : here);
        }
      },
      [&](const Maxima<S>& own, int, Maxima<S>& into) {
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q) into.best[q] = max_nan(into.best[q], own.best[q]);
      },
      [&](int r, Maxima<S>& result) { put(r, result.best); });
}

// Holds maxima, and which pixel each is: of a row of three 0 to 2, of a window 0 to 8.
template <int S> struct Winners {
  float best[kSide<S>], winner[kSide<S>];
  __device__ void begin(const Winners& middle) {
#pragma unroll
    for (int q = 0; q < kSide<S>; ++q) best[q] = middle.best[q], winner[q] = 3 + middle.winner[q];
  }
  // The first of equals stays, and the last NaN, as in torch.
  __device__ void meet(int q, float v, float which) {
    if (v > best[q] || v != v) best[q] = v, winner[q] = which;
  }
};

// Calls put(r, z, winner) with the maxima of each row of a strip, and which pixel of its window each is, row by row
// from 0 to 8: the first of several, or the last NaN, as torch. Rows of three first, then those of a window, give the
// same as all nine in their order.
template <int S, class Put>
__device__ __forceinline__ void maximum(const float* from, int pitch, const Place& at, Put put) {
  const int cols = at.from.cols - at.col;
  each_window<S, Winners<S>>(
      from, pitch, at,
      [&](const auto& window, Winners<S>& own) {
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q) {
          const bool first = q > 0 || at.col > 0;  // the first pixel that exists wins if all are -inf, none later
          own.best[q] = first ? window[q * S - 1] : window[q * S], own.winner[q] = first ? 0.0f : 1.0f;
          if (first) own.meet(q, window[q * S], 1);
          own.meet(q, q * S + 1 < cols ? window[q * S + 1] : -INFINITY, 2);
        }
      },
      [&](const Winners<S>& own, int dy, Winners<S>& into) {
        const float row = float(3 * (dy + 1));
#pragma unroll
        for (int q = 0; q < kSide<S>; ++q) into.meet(q, own.best[q], row + own.winner[q]);
      },
      [&](int r, Winners<S>& result) { put(r, result.best, result.winner); });
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
