// 3x3 pools of one image, channels in the lanes, borders as torch has them: outside pixels do not count.
#pragma once

#include <limits>

#include "vector.h"

namespace fastnas::FASTNAS_ISA {

struct Window {
  int top, bottom, left, right;
  Window(int h, int w, int stride, const Grid& from)
      : top(h * stride - 1 < 0 ? 0 : h * stride - 1),
        bottom(h * stride + 2 > from.rows ? from.rows : h * stride + 2),
        left(w * stride - 1 < 0 ? 0 : w * stride - 1),
        right(w * stride + 2 > from.cols ? from.cols : w * stride + 2) {}
  int count() const { return (bottom - top) * (right - left); }
};

// f(window, index of the output pixel) over all outputs.
template <class F> void for_each_window(const Grid& from, const Grid& to, int stride, F f) {
  for (int h = 0; h < to.rows; ++h)
    for (int w = 0; w < to.cols; ++w) f(Window(h, w, stride, from), h * to.cols + w);
}

// One channel block; x [pixels][lanes]. NaN wins, as in torch.
template <class A> void max_pool(const A* x, const Grid& from, int stride, const Grid& to, A* y) {
  constexpr int L = kLanes<A>;
  for_each_window(from, to, stride, [&](const Window& at, int out) {
    Vec<A> best = splat<A>(-std::numeric_limits<A>::infinity());
    for (int h = at.top; h < at.bottom; ++h)
      for (int w = at.left; w < at.right; ++w) {
        const Vec<A> v = get(x + (h * from.cols + w) * L);
        best = (v > best) | (v != v) ? v : best;
      }
    put(y + out * L, best);
  });
}

template <class A> void avg_pool(const A* x, const Grid& from, int stride, const Grid& to, A* y) {
  constexpr int L = kLanes<A>;
  for_each_window(from, to, stride, [&](const Window& at, int out) {
    Vec<A> sum{};
    for (int h = at.top; h < at.bottom; ++h)
      for (int w = at.left; w < at.right; ++w) sum += get(x + (h * from.cols + w) * L);
    put(y + out * L, sum / A(at.count()));
  });
}

// dx += the transpose: dy goes to the first largest element in row-major order, to the last NaN if there is one.
template <class A> void max_pool_transposed(const A* x, const A* dy, const Grid& from, int stride, const Grid& to, A* dx) {
  constexpr int L = kLanes<A>;
  for_each_window(from, to, stride, [&](const Window& at, int out) {
    Vec<A> best = splat<A>(-std::numeric_limits<A>::infinity());
    Vec<A> place = splat<A>(A(at.top * from.cols + at.left));
    for (int h = at.top; h < at.bottom; ++h)
      for (int w = at.left; w < at.right; ++w) {
        const Vec<A> v = get(x + (h * from.cols + w) * L);
        const auto wins = (v > best) | (v != v);
        best = wins ? v : best;
        place = wins ? splat<A>(A(h * from.cols + w)) : place;
      }
    const Vec<A> d = get(dy + out * L);
    for (int h = at.top; h < at.bottom; ++h)
      for (int w = at.left; w < at.right; ++w) {
        A* to_x = dx + (h * from.cols + w) * L;
        put(to_x, get(to_x) + (place == splat<A>(A(h * from.cols + w)) ? d : Vec<A>{}));
      }
  });
}

template <class A> void avg_pool_transposed(const A* dy, const Grid& from, int stride, const Grid& to, A* dx) {
  constexpr int L = kLanes<A>;
  for_each_window(from, to, stride, [&](const Window& at, int out) {
    const Vec<A> d = get(dy + out * L) / A(at.count());
    for (int h = at.top; h < at.bottom; ++h)
      for (int w = at.left; w < at.right; ++w) {
        A* to_x = dx + (h * from.cols + w) * L;
        put(to_x, get(to_x) + d);
      }
  });
}

}  // namespace fastnas::FASTNAS_ISA
