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

}  // namespace fastnas::FASTNAS_ISA
