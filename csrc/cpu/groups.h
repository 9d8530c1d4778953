// Work over the images of a batch. Sums over images are partial sums per group of images, added in the order of
// the groups, so results do not depend on threads.
#pragma once

#include <algorithm>

#include "../formulas/mixed_sum.h"
#include "../params.h"
#include "vector.h"

namespace fastnas::FASTNAS_ISA {

constexpr int kGroups = 16;  // and so the most threads that have work
inline int group_count(int64_t images) { return int(std::min<int64_t>(kGroups, std::max<int64_t>(1, images))); }

// f(thread, group, image) over all images; the images of a group in order, on one thread.
template <class F> void for_each_image(int64_t images, int groups, int threads, F f) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int group = 0; group < groups; ++group)
    for (int64_t n = images * group / groups; n < images * (group + 1) / groups; ++n) f(thread_number(), group, n);
}

template <class A> double sum_over_groups(const A* partial, int groups, int64_t stride, int64_t at) {
  double sum = 0;
  for (int g = 0; g < groups; ++g) sum += double(partial[g * stride + at]);
  return sum;
}

// f(value of the stored dtype) for the dtypes of the fused cells.
template <class F> auto with_dtype(DType dtype, F f) {
  if (dtype == DType::bf16) return f(bf16_t{});
  if (dtype == DType::f64) return f(double{});
  return f(float{});
}

// Hands out 64-aligned pieces of a workspace; from a null base it only measures.
struct Arena {
  char* base;
  size_t used = 0;
  template <class A> A* take(int64_t count) {
    A* piece = base ? reinterpret_cast<A*>(base + used) : nullptr;
    used += (size_t(count) * sizeof(A) + 63) / 64 * 64;
    return piece;
  }
};

// Mean and centred squares of channels, gathered image by image (Chan, Golub, LeVeque 1979).
template <class A> struct ChannelMoments {
  A *mean, *squares;  // [groups][blocks lanes]

  void add_image(const A* z, int64_t pixels, int blocks, int group, int64_t before) {
    constexpr int L = kLanes<A>;
    const A share = A(double(pixels) / double(before + pixels));
    for (int b = 0; b < blocks; ++b) {
      const A* plane = z + b * pixels * L;
      Vec<A> sum{};
      for (int64_t p = 0; p < pixels; ++p) sum += get(plane + p * L);
      const Vec<A> mean_here = sum / A(pixels);
      Vec<A> squares_here{}, rest{};
      for (int64_t p = 0; p < pixels; ++p) {
        const Vec<A> d = get(plane + p * L) - mean_here;
        squares_here += d * d;
        rest += d;
      }
      A *m = mean + (group * blocks + b) * L, *s = squares + (group * blocks + b) * L;
      if (before == 0) {
        put(m, mean_here + rest / A(pixels));
        put(s, squares_here);
        continue;
      }
      const Vec<A> delta = mean_here + rest / A(pixels) - get(m);
      put(s, get(s) + squares_here + delta * delta * (A(before) * share));
      put(m, get(m) + delta * share);
    }
  }

  Moments total(int channel, int width, int groups, int64_t images, int64_t pixels) const {
    Moments sum;
    for (int g = 0; g < groups; ++g) {
      const int64_t here = images * (g + 1) / groups - images * g / groups;
      sum = merge(sum, {double(here * pixels), double(mean[g * width + channel]), double(squares[g * width + channel])});
    }
    return sum;
  }
};

}  // namespace fastnas::FASTNAS_ISA
