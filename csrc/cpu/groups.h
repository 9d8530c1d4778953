// Runs work over the images of a batch.
//
// The images are cut into at most 16 groups, by their number alone. A thread takes whole groups and adds up the
// images of each in order; then the groups are added in order. So every sum over images has the same bits for any
// number of threads, without atomics and without a partial sum for every image.
#pragma once

#include <algorithm>

#include "../formulas/mixed_sum.h"
#include "../params.h"
#include "vector.h"

namespace fastnas::FASTNAS_ISA {

constexpr int kGroups = 16;  // also the most threads that have work
inline int group_count(int64_t images) { return int(std::min<int64_t>(kGroups, std::max<int64_t>(1, images))); }

// Calls f(thread, group, image) over all images; those of a group come in order, on one thread.
template <class F> void for_each_image(int64_t images, int groups, int threads, F f) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int group = 0; group < groups; ++group)
    for (int64_t n = images * group / groups; n < images * (group + 1) / groups; ++n) f(thread_number(), group, n);
}

// Adds entry `at` of the groups' partial sums, `stride` elements apart, in fp64 and in the order of the groups.
template <class A> double sum_over_groups(const A* partial, int groups, int64_t stride, int64_t at) {
  double sum = 0;
  for (int g = 0; g < groups; ++g) sum += double(partial[g * stride + at]);
  return sum;
}

// Calls f(a value of the stored dtype). Fused cells are stored in fp32, bf16 or fp64.
template <class F> auto with_dtype(DType dtype, F f) {
  if (dtype == DType::bf16) return f(bf16_t{});
  if (dtype == DType::f64) return f(double{});
  return f(float{});
}

// Hands out pieces of the workspace, aligned for the widest vectors. From a null base it only measures, so the same
// lines of code that lay out a call also say how much memory it needs, and the two cannot disagree.
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
