// Computes 3x3 pools of one channel block, channels in the lanes; pixels outside of the image do
// not count, as in torch.
//
// Both pools are separable: a pass along the rows makes one value of up to three columns, a pass down the columns
// one of up to three rows: at stride 1 that is 4 operations an output instead of 8. `columns` is the buffer between
// the passes, [from.rows][to.cols][lanes]. Nothing of a pool is kept for backward: the winners of a maximum are
// found again from x, where eager keeps an int64 index for each output, twice the size of the output in fp32.
#pragma once

#include "vector.h"

namespace fastnas::FASTNAS_ISA {

// Takes the maximum with torch's rule for NaN: a NaN replaces whatever came before it, so the last
// NaN of a window wins.
template <class V> V larger(V best, V v) { return ((v > best) | (v != v)) ? v : best; }

// Writes to[r][w], `combine` of the up to three columns around w stride, over all rows. The arguments of `combine`
// keep the order of the columns: `larger` prefers the first of equal values.
template <class A, class F> void pool_columns(const A* x, const Grid& from, int stride, int cols, A* to, F combine) {
  constexpr int L = kLanes<A>;
  for (int h = 0; h < from.rows; ++h) {
    const A* row = x + int64_t(h) * from.cols * L;
    for (int w = 0; w < cols; ++w) {
      const int c = w * stride;
      Vec<A> v = get(row + c * L);
      if (c > 0) v = combine(get(row + (c - 1) * L), v);
      if (c + 1 < from.cols) v = combine(v, get(row + (c + 1) * L));
      put(to + (int64_t(h) * cols + w) * L, v);
    }
  }
}

// Calls f(row, column, combine of the up to three rows around row stride).
template <class A, class F, class G>
void pool_rows(const A* x, const Grid& from, int stride, const Grid& to, F combine, G f) {
  constexpr int L = kLanes<A>;
  const int64_t pitch = int64_t(to.cols) * L;
  for (int h = 0; h < to.rows; ++h) {
    const A* row = x + h * stride * pitch;
    const bool above = h * stride > 0, below = h * stride + 1 < from.rows;
    for (int w = 0; w < to.cols; ++w) {
      Vec<A> v = get(row + w * L);
      if (above) v = combine(get(row - pitch + w * L), v);
      if (below) v = combine(v, get(row + pitch + w * L));
      f(h, w, v);
    }
  }
}

// Counts the pixels that a window covers in one dimension; avg_pool divides by the product of both
// (count_include_pad=False).
inline int covered(int at, int stride, int size) {
  return 1 + (at * stride > 0) + (at * stride + 1 < size);
}

// Pools x, [pixels][lanes] of `from`, to y of `to`.
template <class A> void max_pool(const A* x, const Grid& from, int stride, const Grid& to, A* columns, A* y) {
  const auto combine = [](Vec<A> a, Vec<A> b) { return larger(a, b); };
  pool_columns(x, from, stride, to.cols, columns, combine);
  pool_rows(columns, from, stride, to, combine,
            [&](int h, int w, Vec<A> v) { put(y + (int64_t(h) * to.cols + w) * kLanes<A>, v); });
}

// The nine values are added unscaled and divided once, by the number of them that lie inside of the image.
template <class A> void avg_pool(const A* x, const Grid& from, int stride, const Grid& to, A* columns, A* y) {
  const auto combine = [](Vec<A> a, Vec<A> b) { return a + b; };
  pool_columns(x, from, stride, to.cols, columns, combine);
  pool_rows(columns, from, stride, to, combine, [&](int h, int w, Vec<A> v) {
    const int count = covered(h, stride, from.rows) * covered(w, stride, from.cols);
    put(y + (int64_t(h) * to.cols + w) * kLanes<A>, v / A(count));
  });
}

// Adds the transpose of max_pool to dx: a window's dy goes to its first largest pixel in row-major
// order, or to its last NaN.
//
// First the row is chosen, from the maxima of the rows (`best`), then the column inside of that row: this is
// row-major order, and it needs 3 + 3 comparisons where searching the window needs 9. Each lane has its own winner,
// so a winner is a vector of row or column numbers, and the gradient is blended into every candidate rather than
// scattered. Windows overlap; they add into a pixel in the order in which they are visited, with no atomics and no
// dependence on threads. `best` and `d` hold from.rows x to.cols.
template <class A>
void max_pool_transposed(const A* x, const A* dy, const Grid& from, int stride, const Grid& to, A* best, A* d, A* dx) {
  constexpr int L = kLanes<A>;
  const int64_t pitch = int64_t(to.cols) * L;
  pool_columns(x, from, stride, to.cols, best, [](Vec<A> a, Vec<A> b) { return larger(a, b); });
  // d[r][w] collects what the windows of column w give to row r.
  memset(d, 0, sizeof(A) * from.rows * pitch);
  for (int h = 0; h < to.rows; ++h) {
    const int c = h * stride, first = c > 0 ? c - 1 : c, last = c + 1 < from.rows ? c + 1 : c;
    for (int w = 0; w < to.cols; ++w) {
      Vec<A> value = get(best + first * pitch + w * L), winner = splat<A>(A(first));
      for (int r = first + 1; r <= last; ++r) {
        const Vec<A> v = get(best + r * pitch + w * L);
        winner = ((v > value) | (v != v)) ? splat<A>(A(r)) : winner;
        value = larger(value, v);
      }
      const Vec<A> g = get(dy + h * pitch + w * L);
      for (int r = first; r <= last; ++r) {
        A* at = d + r * pitch + w * L;
        put(at, get(at) + (winner == splat<A>(A(r)) ? g : Vec<A>{}));
      }
    }
  }
  // Now d is handed on to the column of the row that won.
  for (int r = 0; r < from.rows; ++r) {
    const A* row = x + int64_t(r) * from.cols * L;
    A* to_row = dx + int64_t(r) * from.cols * L;
    for (int w = 0; w < to.cols; ++w) {
      const int c = w * stride, first = c > 0 ? c - 1 : c, last = c + 1 < from.cols ? c + 1 : c;
      Vec<A> value = get(row + first * L), winner = splat<A>(A(first));
      for (int k = first + 1; k <= last; ++k) {
        const Vec<A> v = get(row + k * L);
        winner = ((v > value) | (v != v)) ? splat<A>(A(k)) : winner;
        value = larger(value, v);
      }
      const Vec<A> g = get(d + r * pitch + w * L);
      for (int k = first; k <= last; ++k)
        put(to_row + k * L, get(to_row + k * L) + (winner == splat<A>(A(k)) ? g : Vec<A>{}));
    }
  }
}

// Adds the transpose of avg_pool to dx: dy over the window's count, spread over rows, then over columns. The
// division comes first, because windows of different counts meet in one pixel. `d` holds from.rows x to.cols.
template <class A>
void avg_pool_transposed(const A* dy, const Grid& from, int stride, const Grid& to, A* d, A* dx) {
  constexpr int L = kLanes<A>;
  const int64_t pitch = int64_t(to.cols) * L;
  memset(d, 0, sizeof(A) * from.rows * pitch);
  for (int h = 0; h < to.rows; ++h) {
    const int c = h * stride, first = c > 0 ? c - 1 : c, last = c + 1 < from.rows ? c + 1 : c;
    for (int w = 0; w < to.cols; ++w) {
      const int count = covered(h, stride, from.rows) * covered(w, stride, from.cols);
      const Vec<A> g = get(dy + h * pitch + w * L) / A(count);
      for (int r = first; r <= last; ++r) put(d + r * pitch + w * L, get(d + r * pitch + w * L) + g);
    }
  }
  for (int r = 0; r < from.rows; ++r) {
    A* to_row = dx + int64_t(r) * from.cols * L;
    for (int w = 0; w < to.cols; ++w) {
      const int c = w * stride, first = c > 0 ? c - 1 : c, last = c + 1 < from.cols ? c + 1 : c;
      const Vec<A> g = get(d + r * pitch + w * L);
      for (int k = first; k <= last; ++k) put(to_row + k * L, get(to_row + k * L) + g);
    }
  }
}

}  // namespace fastnas::FASTNAS_ISA
