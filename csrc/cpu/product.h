// Computes products over the channels of one image, channels in the lanes: pointwise convolutions
// and Gram matrices.
//
// A pointwise convolution multiplies every pixel's vector of channels with one C x C matrix; a Gram or
// cross matrix sums the outer products of two such vectors over the pixels. Both keep a tile of sums in
// registers and stream one operand past it. Measured on one core that does 76 GFMA/s: products 44, 57, 62
// at C = 16, 32, 64; Gram 45, 65, 67.
#pragma once

#include <type_traits>

#include "vector.h"

namespace fastnas::FASTNAS_ISA {

// Reads one channel of a pixel: a scalar, which the multiplication broadcasts, or of a pack a vector, in which each
// slot has its own.
template <class A, bool packed> struct Channel {
  int lane;
  Channel(const LaneNumbers<A>*, int channel) : lane(channel) {}
  A of(const A* pixel) const { return pixel[lane]; }
};
template <class A> struct Channel<A, true> {
  LaneNumbers<A> lanes;
  Channel(const LaneNumbers<A>* slots, int channel) : lanes(*slots + Whole<A>(channel)) {}
  Vec<A> of(const A* pixel) const { return pick<A>(get(pixel), lanes); }
};

// A factor is one addend of a product: u [blocks][plane][lanes] times matrix [channels of u][width]. The
// matrix is stored with the input channel outermost (W transposed), so that the weights of one input
// channel are whole aligned vectors.
template <class A> struct Factor {
  const A* u;
  const A* matrix;
  int channels;
  const LaneNumbers<A>* slots = nullptr;  // of a pack (slot_starts); null: the lanes are of one image
  int64_t plane = 0;  // pixels from block to block of u; 0: those of the product
  int first = 0;      // the first channel that counts; rows of the matrix before it are not read
};

// Computes `pixels` x `blocks` vectors of outputs. For every input channel the loop loads `blocks`
// vectors of the matrix and one scalar of each pixel, which the FMA broadcasts: pixels * blocks FMAs for
// blocks + pixels loads. The factors follow each other into the same sums: dL/du = from_dy dy + from_u u
// is written once and never read back.
//
// A factor that begins at a channel `first` skips the rows of the matrix before it instead of finding zeros there:
// the skipped channels of u belong to the other convolution of a strided pair, and 0 times their inf would be NaN.
//
// With `packed` a channel is broadcast within each slot; matrix and bias are repeated for each.
template <class A, int pixels, int blocks, bool packed>
inline void product_tile(const Factor<A>* factors, int count, int64_t plane, int64_t pixel, int width, int block,
                         const A* bias, bool add, A* out, int64_t out_plane) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[pixels][blocks];
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) {
      acc[p][b] = bias ? get(bias + (block + b) * L) : Vec<A>{};
      if (add) acc[p][b] += get(out + (block + b) * out_plane * L + p * L);
    }
  for (int f = 0; f < count; ++f) {
    const A* column = factors[f].matrix + int64_t(factors[f].first) * width + block * L;
    const int64_t u_plane = factors[f].plane ? factors[f].plane : plane;
    const int begin = factors[f].first;
    for (int first = begin / L * L; first < factors[f].channels; first += L) {
      const A* u = factors[f].u + (first / L * u_plane + pixel) * L;
      const int lanes = factors[f].channels - first < L ? factors[f].channels - first : L;
      for (int i = first < begin ? begin - first : 0; i < lanes; ++i, column += width) {
        Vec<A> m[blocks];
        for (int b = 0; b < blocks; ++b) m[b] = get(column + b * L);
        const Channel<A, packed> channel(factors[f].slots, i);
#pragma GCC unroll 16
        for (int p = 0; p < pixels; ++p) {
          const auto s = channel.of(u + p * L);
#pragma GCC unroll 2
          for (int b = 0; b < blocks; ++b) acc[p][b] += m[b] * s;
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) put(out + (block + b) * out_plane * L + p * L, acc[p][b]);
}

// Computes out[p] (+)= bias + sum_f matrix_f^T u_f[p]. All images are unpadded except out, which has a pitch
// and a plane size (in pixels) of its own: du goes straight into a padded plane for the transposed
// convolution. bias may be null.
//
// Two blocks of output channels share each broadcast scalar, with R pixels: 2 R = 16 sums of 32
// registers (8 of 16), the rest hold the matrix and the operands. A single block takes 2 R pixels
// instead, for as many independent sums.
template <class A>
void product(const Factor<A>* factors, int count, const Grid& grid, int blocks, const A* bias, bool add, A* out,
             int out_pitch, int64_t out_plane) {
  constexpr int L = kLanes<A>, R = kVectorRegisters == 32 ? 8 : 4;
  const int width = blocks * L;
  // Rows that follow each other without a gap are one row, which leaves fewer tails where planes are narrow.
  const bool flat = out_pitch == grid.cols;
  const int rows = flat ? 1 : grid.rows, cols = flat ? grid.pixels() : grid.cols;
  const auto block_step = [&](auto wide, auto packed, int block) {
    constexpr int B = decltype(wide)::value;
    for (int h = 0; h < rows; ++h) {
      int w = 0;
      const auto run = [&](auto pixels) {
        constexpr int n = decltype(pixels)::value;
        for (; w + n <= cols; w += n)
          product_tile<A, n, B, packed>(factors, count, grid.pixels(), int64_t(h) * cols + w, width, block, bias, add,
                                        out + (int64_t(h) * out_pitch + w) * L, out_plane);
      };
      if constexpr (B == 1) run(std::integral_constant<int, 2 * R>());
      run(std::integral_constant<int, R>());
      run(std::integral_constant<int, R / 2>());
      run(std::integral_constant<int, 1>());
    }
  };
  using one = std::integral_constant<int, 1>;
  if (factors->slots) return block_step(one(), std::true_type(), 0);
  int block = 0;
  for (; block + 2 <= blocks; block += 2) block_step(std::integral_constant<int, 2>(), std::false_type(), block);
  if (block < blocks) block_step(one(), std::false_type(), block);
}

template <class A>
void product(const Factor<A>* factors, int count, const Grid& grid, int blocks, const A* bias, bool add, A* out) {
  product(factors, count, grid, blocks, bias, add, out, grid.cols, grid.pixels());
}

// Adds a tile of `rows` x `blocks` vectors of a cross matrix: every sum is loaded once, lives in a register while
// all pixels go past, and is stored once. Pixels come in order, so a matrix depends on the order of its calls and
// on nothing else; the callers add the images of a group in order on one thread.
template <class A, int rows, int blocks, bool packed>
inline void outer_tile(const A* a, int row, const LaneNumbers<A>* slots, const A* b, int64_t b_plane, int64_t pixels,
                       A* sum, int width) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[rows][blocks];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < blocks; ++j) acc[i][j] = get(sum + i * width + j * L);
  for (int64_t p = 0; p < pixels; ++p) {
    Vec<A> v[blocks];
    for (int j = 0; j < blocks; ++j) v[j] = get(b + (j * b_plane + p) * L);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const auto s = Channel<A, packed>(slots, row + i).of(a + p * L);
#pragma GCC unroll 2
      for (int j = 0; j < blocks; ++j) acc[i][j] += v[j] * s;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < blocks; ++j) put(sum + i * width + j * L, acc[i][j]);
}

// Adds sum_p a[p] b[p]^T over `pixels` to sum [channels of a][width]; the planes of a and b may be
// larger than that.
//
// With `upper` a and b are the same and only the lane blocks on and above the diagonal are computed, which at
// C = 64 and 16 lanes saves 6 of 16 blocks; who reads the matrix mirrors it. Rows up to the next full tile are
// written, so `sum` has `width` rows even where C is smaller.
//
// Of a pack, the matrices of its images lie side by side: row i, lane s C + j is a_i b_j of the image in slot s.
template <class A>
void outer(const A* a, int a_channels, int64_t a_plane, const A* b, int b_blocks, int64_t b_plane, int64_t pixels,
           const LaneNumbers<A>* slots, bool upper, A* sum) {
  constexpr int L = kLanes<A>;
  const int width = b_blocks * L;
  const auto tiles = [&](auto rows, auto wide, auto packed, int block, int j) {
    for (int i = 0; i < L && block * L + i < a_channels; i += rows)
      outer_tile<A, rows, wide, packed>(a + block * a_plane * L, i, slots, b + j * b_plane * L, b_plane, pixels,
                                        sum + int64_t(block * L + i) * width + j * L, width);
  };
  using std::integral_constant;
  constexpr int budget = kVectorRegisters == 32 ? 16 : 8, one = budget < L ? budget : L;
  if (slots) {
    // A pack has few channels, so most rows of the largest tile would be of none.
    constexpr int few = one < 4 ? 1 : one / 4;
    if (a_channels <= few) tiles(integral_constant<int, few>(), integral_constant<int, 1>(), std::true_type(), 0, 0);
    else tiles(integral_constant<int, one / 2>(), integral_constant<int, 1>(), std::true_type(), 0, 0);
    return;
  }
  for (int block = 0; block * L < a_channels; ++block) {
    int j = upper ? block : 0;
    constexpr int two = budget / 2 < L ? budget / 2 : L;
    for (; j + 2 <= b_blocks; j += 2)
      tiles(integral_constant<int, two>(), integral_constant<int, 2>(), std::false_type(), block, j);
    if (j < b_blocks) tiles(integral_constant<int, one>(), integral_constant<int, 1>(), std::false_type(), block, j);
  }
}

// Adds sum_p u[p] to sums [blocks][lanes]. Four sums run side by side, because one chain of additions would wait
// four cycles for each; they are joined pairwise, always the same way.
template <class A> void add_channel_sums(const A* u, int64_t pixels, int blocks, A* sums) {
  constexpr int L = kLanes<A>;
  for (int b = 0; b < blocks; ++b) {
    Vec<A> acc[4] = {};
    const A* plane = u + b * pixels * L;
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4)
      for (int i = 0; i < 4; ++i) acc[i] += get(plane + (p + i) * L);
    for (; p < pixels; ++p) acc[0] += get(plane + p * L);
    put(sums + b * L, get(sums + b * L) + ((acc[0] + acc[1]) + (acc[2] + acc[3])));
  }
}

// Adds sum_p a[p] b[p] to sums [blocks][lanes], in four chains as above.
template <class A> void add_channel_dots(const A* a, const A* b, int64_t pixels, int blocks, A* sums) {
  constexpr int L = kLanes<A>;
  for (int k = 0; k < blocks; ++k) {
    Vec<A> acc[4] = {};
    const A *x = a + k * pixels * L, *y = b + k * pixels * L;
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4)
      for (int i = 0; i < 4; ++i) acc[i] += get(x + (p + i) * L) * get(y + (p + i) * L);
    for (; p < pixels; ++p) acc[0] += get(x + p * L) * get(y + p * L);
    put(sums + k * L, get(sums + k * L) + ((acc[0] + acc[1]) + (acc[2] + acc[3])));
  }
}

}  // namespace fastnas::FASTNAS_ISA
