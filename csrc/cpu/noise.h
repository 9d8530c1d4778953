// Draws noise for a range of elements that follow each other in NCHW order.
//
// The counter of an element is its index in NCHW order, whatever the layout of the tensor, so a call draws the same
// numbers on every backend. A Philox block serves four neighbours in that order, hence the quads below.
#pragma once

#include "../formulas/mixed_sum.h"

namespace fastnas::FASTNAS_ISA {

constexpr int64_t kDrawTile = 1024;  // elements a call of draw_quads may fill

// Fills d with the draws of `quads` blocks from block `first` on. Integers come first, floating point
// second, with the words in arrays of their own between them: g++ 12 vectorises these two loops and
// gives up on one that does both.
template <bool gaussian, bool bernoulli, class A>
void draw_quads(const Draw<A>& draw, int64_t first, int64_t quads, A* d) {
  alignas(64) uint32_t words[4][kDrawTile / 4];
  const uint64_t key = draw.key, offset = draw.offset;
  const Draw<A> local = draw;
#pragma omp simd
  for (int64_t q = 0; q < quads; ++q) {
    const Words block = philox(key, uint64_t(first + q), offset);
    words[0][q] = block.v[0], words[1][q] = block.v[1], words[2][q] = block.v[2], words[3][q] = block.v[3];
  }
#pragma omp simd
  for (int64_t q = 0; q < quads; ++q) {
    const Draws<A> eps = draws<A>(gaussian, {{words[0][q], words[1][q], words[2][q], words[3][q]}});
    d[4 * q] = local.of(bernoulli, eps.v[0]), d[4 * q + 1] = local.of(bernoulli, eps.v[1]);
    d[4 * q + 2] = local.of(bernoulli, eps.v[2]), d[4 * q + 3] = local.of(bernoulli, eps.v[3]);
  }
}

// Chooses the loop for a kind of noise: one that asks for it at each element is not vectorised.
template <class A> auto quads_of(const Draw<A>& draw) {
  return draw.gaussian    ? draw_quads<true, false, A>
         : draw.bernoulli ? draw_quads<false, true, A>
                          : draw_quads<false, false, A>;
}

// Makes the draws of the elements [begin, begin + count). A range may begin inside of a Philox block: then the tile
// begins with that block's first element, and the `lead` draws before the range are thrown away.
template <class A> void draw_range(const Draw<A>& draw, int64_t begin, int64_t count, A* d) {
  const auto quads = quads_of(draw);
  alignas(64) A tile[kDrawTile];
  for (int64_t done = 0; done < count;) {
    const int64_t lead = (begin + done) % 4;
    const int64_t now = count - done < kDrawTile - lead ? count - done : kDrawTile - lead;
    quads(draw, (begin + done) / 4, (lead + now + 3) / 4, tile);
    memcpy(d + done, tile + lead, size_t(now) * sizeof(A));
    done += now;
  }
}

}  // namespace fastnas::FASTNAS_ISA
