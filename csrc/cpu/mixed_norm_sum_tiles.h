// Cuts a tensor with channels, in either layout, into tiles, and carries values from channels to
// their columns and back.
//
// NCHW and channels last are both read as a matrix whose columns each belong to one channel, so one set
// of loops serves both: statistics and sums are made by column, with unit stride and no test, and
// folded to channels once per tile.
#pragma once

#include <algorithm>

#include "tile.h"

namespace fastnas::FASTNAS_ISA {
namespace {

constexpr int64_t kColumns = 1024;         // of a tile at most, where pixels follow each other
constexpr int64_t kRepeatedColumns = 512;  // about, where channels are neighbours: shorter rows have fewer sums to fold
constexpr int64_t kElements = 16384;       // of a tile: 64 KiB of fp32, read twice out of L2
static_assert(kColumns <= kTile);

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile is some rows and columns of the matrix. Column j is of channel `channel + j / span % channels`.
struct Tile {
  int64_t row, rows, column, width;
  int64_t channel, channels, span;
  int64_t part;  // which partial sum of its channels
};

// Reads either layout as a matrix: NCHW has a row per image, channels last as many pixels to a row as make
// it long, so that the last row may be short. All of it is fixed by the shape: which sums are added
// together never depends on the threads.
struct Tiling {
  int64_t n, channels, pixels, columns, rows;
  int64_t span;    // neighbouring columns of one channel
  int64_t pieces;  // tiles side by side that a channel is cut into
  int64_t width, height, slices, parts;
  int threads;

  // A size of zero counts as one: nothing runs on it, but its parts can be asked for.
  explicit Tiling(const MixedNormSumParams& p)
      : n(p.sum.n), channels(std::max<int64_t>(1, p.channels)), pixels(std::max<int64_t>(1, p.pixels)),
        threads(p.sum.threads) {
    if (p.channels_last || pixels == 1) {
      columns = channels * std::max<int64_t>(1, kRepeatedColumns / channels);
      span = pieces = 1;
      width = std::min(columns, kColumns);
    } else {
      columns = channels * pixels;
      pieces = divide_up(pixels, kColumns);
      span = pixels;
      width = pieces > 1 ? kColumns : kColumns / pixels * pixels;
    }
    rows = divide_up(n, columns);
    height = std::max<int64_t>(1, kElements / width);
    slices = pieces > 1 ? channels * pieces : divide_up(columns, width);
    parts = divide_up(rows, height) * pieces;
  }

  int64_t per_channel() const { return n / channels; }

  Tile tile(int64_t index) const {
    const int64_t down = index / slices, across = index % slices;
    Tile t{down * height, 0, 0, 0, 0, 1, span, 0};
    t.rows = std::min(height, rows - t.row);
    if (pieces > 1) {
      const int64_t begin = across % pieces * width;
      t.channel = across / pieces;
      t.column = t.channel * pixels + begin;
      t.width = t.span = std::min(width, pixels - begin);
      t.part = down * pieces + across % pieces;
    } else {
      t.column = across * width;
      t.width = std::min(width, columns - t.column);
      t.channel = t.column / span;
      t.channels = std::min(channels, t.width / span);
      t.part = down;
    }
    return t;
  }

  // f(row of the tile, its first element in memory, its elements)
  template <class F>
  void for_each_row(const Tile& t, F f) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t begin = (t.row + r) * columns + t.column;
      f(r, begin, std::min(t.width, n - begin));
    }
  }

  // Calls f on all tiles, each thread having a run of its own. The second sweep of a pass goes backwards, because
  // it then begins with what the first one left in the caches.
  template <class F>
  void for_each_tile(bool backwards, F f) const {
    const int64_t tiles = divide_up(rows, height) * slices;
    const int team = int(std::min<int64_t>(tiles, threads));
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int member = 0; member < team; ++member) {
      const int64_t begin = tiles * member / team, end = tiles * (member + 1) / team;
      for (int64_t i = begin; i < end; ++i) f(tile(backwards ? begin + end - 1 - i : i));
    }
  }
};

// Sums by column to sums by channel: neighbours where pixels follow each other, every
// channels-th where channels do.
template <class A>
void fold(const Tile& t, const A* column, A* channel) {
  if (t.span == 1) {
    std::copy_n(column, t.channels, channel);
    for (int64_t j = t.channels; j < t.width; j += t.channels)
      for (int64_t c = 0; c < t.channels; ++c) channel[c] += column[j + c];
    return;
  }
  for (int64_t c = 0; c < t.channels; ++c, column += t.span) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < t.span; ++j) sum += column[j];
    channel[c] = sum;
  }
}

// Writes f(channel of the tile) into every column of that channel.
template <class A, class F>
void spread(const Tile& t, A* column, F f) {
  if (t.span == 1) {
    for (int64_t c = 0; c < t.channels; ++c) column[c] = f(c);
    for (int64_t j = t.channels; j < t.width; j += t.channels) std::copy_n(column, t.channels, column + j);
    return;
  }
  for (int64_t c = 0; c < t.channels; ++c) std::fill_n(column + c * t.span, t.span, f(c));
}

}  // namespace
}  // namespace fastnas::FASTNAS_ISA
