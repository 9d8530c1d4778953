// Holds what mixed_sum and mixed_norm_sum share: tiles that stay in L1, their skip noise and its
// standard deviations.
//
// Work is cut into blocks of kBlock elements, fixed by the size alone, and blocks into tiles. Each block has its
// own partial sum and belongs to one thread; partial sums are added in block order. Results therefore do not
// depend on the number of threads.
#pragma once

#include <cstdlib>
#include <new>

#include "../formulas/mixed_sum.h"
#include "moments.h"
#include "noise.h"

namespace fastnas::FASTNAS_ISA {
namespace {

// A tile is 4 KiB of fp32. A tile of the sum, one of a noisy term and one of its draws, with the lines asked for
// ahead, fit an L1 of 32 KiB. Tiles of 128, 256 and 512 elements were no faster (benchmarks/NOTES.md).
constexpr int64_t kTile = 1024;
static_assert(kBlock % kTile == 0 && kTile % 4 == 0 && kTile <= kDrawTile);

// Reads a tile in the accumulation dtype: in place if it is stored so already, else converted into `scratch`.
template <class T, class A>
const A* load_tile(const void* base, int64_t begin, int64_t count, A* scratch) {
  const T* src = static_cast<const T*>(base) + begin;
  if constexpr (std::is_same_v<T, A>) {
    return src;
  } else {
    for (int64_t i = 0; i < count; ++i) scratch[i] = load(src[i]);
    return scratch;
  }
}

// Makes the draws of the elements [begin, begin + count) in memory order. Where memory is in NCHW order
// four come out of each Philox block. Channels last, neighbours in memory are far apart in NCHW, so every
// element computes its whole block.
template <class A>
void draw_tile(const MixedSumParams& p, int ordinal, int64_t begin, int64_t count, A* d) {
  const Draw<A> draw(p, ordinal);
  if (p.channels == 0) {
    quads_of(draw)(draw, begin / 4, (count + 3) / 4, d);
    return;
  }
  for (int64_t i = 0; i < count; ++i) d[i] = draw.element(uint64_t(logical_index(p, begin + i)));
}

template <class A>
void apply_draw(bool multiplicative, const A* x, const A* d, int64_t count, A* v) {
  for (int64_t i = 0; i < count; ++i) v[i] = mixed_value(multiplicative, x[i], d[i]);
}

template <class T, class A>
Moments tile_moments(const void* x, int64_t begin, int64_t count) {
  alignas(64) A scratch[kTile];
  return moments_of(load_tile<T, A>(x, begin, count, scratch), count);
}

// Calls f(tile begin, tile size, block index) over all tiles. The tiles of a block stay on one thread and in order,
// so f may add to the block's partial sum without a lock.
template <class F>
void for_each_tile(const MixedSumParams& p, F f) {
  const int64_t blocks = block_count(p.n);
  const int threads = int(blocks < p.threads ? blocks : p.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = (block + 1) * kBlock < p.n ? (block + 1) * kBlock : p.n;
    for (int64_t begin = block * kBlock; begin < end; begin += kTile)
      f(begin, end - begin < kTile ? end - begin : kTile, block);
  }
}

// Holds partial sums of the blocks, zero at first. It is no std::vector: functions of that are weak symbols, shared
// by the object files of all instruction sets, and the linker might keep the AVX-512 copy for all of them.
class Partials {
 public:
  explicit Partials(int64_t count) : sums_(static_cast<double*>(calloc(size_t(count), sizeof(double)))) {
    if (!sums_ && count) throw std::bad_alloc();
  }
  ~Partials() { free(sums_); }
  Partials(const Partials&) = delete;
  Partials& operator=(const Partials&) = delete;
  double* at(int64_t i) { return sums_ + i; }

 private:
  double* sums_;
};

// Fills p.std with the standard deviation of every noisy term over the whole tensor, for noise relative to it. The
// moments of a block are merged tile by tile, those of the blocks in order.
template <class T, class A>
void standard_deviations(const MixedSumParams& p) {
  Partials partials(3 * block_count(p.n));
  double* partial = partials.at(0);
  for (int k = 0; k < p.terms; ++k) {
    if (p.ordinal[k] < 0) continue;
    for_each_tile(p, [&](int64_t begin, int64_t count, int64_t block) {
      double* part = partial + 3 * block;
      const Moments so_far = begin == block * kBlock ? Moments{} : Moments{part[0], part[1], part[2]};
      const Moments m = merge(so_far, tile_moments<T, A>(p.x[k], begin, count));
      part[0] = m.count, part[1] = m.mean, part[2] = m.squares;
    });
    Moments total;
    for (int64_t b = 0; b < block_count(p.n); ++b)
      total = merge(total, {partial[3 * b], partial[3 * b + 1], partial[3 * b + 2]});
    p.std[p.ordinal[k]] = unbiased_std(total);
  }
}

}  // namespace
}  // namespace fastnas::FASTNAS_ISA
