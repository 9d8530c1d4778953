// Runs work over the images of a batch.
//
// Images whose channels share vectors (vector.h) are worked on together, as a pack. The packs are cut into at most 16
// groups, by their number alone. A thread takes whole groups and adds up the packs of each in order; then the groups
// are added in order. So every sum over images has the same bits for any number of threads, without atomics and
// without a partial sum for every image.
#pragma once

#include <algorithm>

#include "../formulas/mixed_sum.h"
#include "../params.h"
#include "vector.h"

namespace fastnas::FASTNAS_ISA {

constexpr int kGroups = 16;  // also the most threads that have work

// A batch is cut into packs of `slots` images. What is left over is a last pack, of fewer images, and a group by
// itself: the lanes of its empty slots hold numbers that mean nothing, and its partial sums are told from the others'.
struct Batch {
  int64_t images;
  int channels, slots = 1;

  int whole() const { return int(std::min<int64_t>(kGroups, std::max<int64_t>(1, images / slots))); }
  int groups() const { return whole() + (images % slots != 0); }
  int64_t first(int group) const { return group <= whole() ? images / slots * group / whole() * slots : images; }
  int slots_of(int group) const { return group < whole() ? slots : int(images % slots); }
  // Counts the packs of a group, which is how many images each of its slots has seen.
  int64_t packs(int group) const { return (first(group + 1) - first(group)) / slots_of(group); }

  // Calls f(group, first lane of the slot) over all slots in use, in an order that no number of threads changes.
  template <class F> void for_each_slot(F f) const {
    for (int group = 0; group < groups(); ++group)
      for (int slot = 0; slot < slots_of(group); ++slot) f(group, slot * channels);
  }

  // Calls f(thread, group, first image) over all packs; those of a group come in order, on one thread.
  template <class F> void for_each_pack(int threads, F f) const {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int group = 0; group < groups(); ++group)
      for (int64_t n = first(group); n < first(group + 1); n += slots) f(thread_number(), group, n);
  }

  // Adds entry `at` of the groups' partial sums, `stride` elements apart, in fp64, slot by slot in their order.
  template <class A> double sum(const A* partial, int64_t stride, int64_t at) const {
    double sum = 0;
    for_each_slot([&](int group, int lane) { sum += double(partial[group * stride + at + lane]); });
    return sum;
  }
};

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
