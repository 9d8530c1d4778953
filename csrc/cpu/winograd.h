// Computes dense 3x3 convolutions of one image at stride 1 by Winograd's F(2x2, 3x3), channels in the lanes.
//
// Direct convolution multiplies 9 times for every pixel and pair of channels, this 4 times: a tile of 4x4 pixels d gives
// 2x2 of the output, y = A^T [(G g G^T) * (B^T d B)] A, * element by element (Lavin and Gray, CVPR 2016, section 4.1):
//
//   B^T = 1  0 -1  0    G =  1    0    0     A^T = 1  1  1  0
//         0  1  1  0        1/2  1/2  1/2          0  1 -1 -1
//         0 -1  1  0        1/2 -1/2  1/2
//         0  1  0 -1         0    0    1
//
// The sum over input channels is a product for each of the 16 elements, between weights that are transformed once a call
// and tiles. A strip of tiles is transformed, multiplied and transformed back while it is in L1: at 16 channels its two
// buffers are 16 KiB each. Coefficients are 1 and 1/2, so the error is that of direct sums. But a value that is not
// finite reaches all four pixels of a tile; in training it reaches every pixel in any case, through the batch norm.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dense.h"

namespace fastnas::FASTNAS_ISA {

constexpr int kElements = 16;  // of a transformed tile, [4][4]

// Counts the tiles of a strip: their sums fill the registers, over two output blocks or a single one.
template <class A> int strip_tiles(int blocks) {
  constexpr int R = kVectorRegisters == 32 ? 8 : 4;
  return blocks == 1 ? 2 * R : R;
}
inline int64_t winograd_weights(int channels, int width) { return int64_t(kElements) * channels * width; }
// Counts what a strip needs: its tiles [elements][blocks][tiles], and their products, two output blocks at a time.
template <class A> int64_t winograd_scratch(int blocks) {
  return int64_t(kElements) * (blocks + 2) * strip_tiles<A>(blocks) * kLanes<A>;
}

// Transforms four values along one axis; S is a scalar or a vector.
template <class S> void tile_axis(const S (&d)[4], S (&t)[4]) {
  t[0] = d[0] - d[2];
  t[1] = d[1] + d[2];
  t[2] = d[2] - d[1];
  t[3] = d[1] - d[3];
}

// Packs V [C][C][3][3] as `winograd` reads it, [output blocks, in twos][elements][input channels][lanes of the blocks];
// transposed: turned by 180 degrees with the channels exchanged, as by pack_dense.
template <class A, class T> void pack_winograd(const T* weights, int channels, bool transposed, A* to) {
  constexpr int L = kLanes<A>;
  const int blocks = blocks_of<A>(channels);
  for (int block = 0; block < blocks; ++block) {
    const int pair = block / 2 * 2, lanes = (pair + 2 <= blocks ? 2 : 1) * L;
    A* pack = to + (int64_t(pair) * kElements * channels + (block - pair)) * L;
    for (int in = 0; in < channels; ++in) {
      alignas(kVectorBytes) A g[9][L] = {};
      for (int lane = 0; lane < L && block * L + lane < channels; ++lane) {
        const int out = block * L + lane;
        const T* own = weights + (transposed ? int64_t(in) * channels + out : int64_t(out) * channels + in) * 9;
        for (int tap = 0; tap < 9; ++tap) g[tap][lane] = A(load(own[transposed ? 8 - tap : tap]));
      }
      const auto halves = [](Vec<A> a, Vec<A> b, Vec<A> c, Vec<A>(&made)[4]) {
        made[0] = a;
        made[1] = (a + c + b) / 2;
        made[2] = (a + c - b) / 2;
        made[3] = c;
      };
      Vec<A> columns[3][4], rows[4];  // G g, by columns; one row of it, transformed
      for (int j = 0; j < 3; ++j) halves(get(g[j]), get(g[3 + j]), get(g[6 + j]), columns[j]);
      for (int i = 0; i < 4; ++i) {
        halves(columns[0][i], columns[1][i], columns[2][i], rows);
        for (int j = 0; j < 4; ++j) put(pack + (int64_t(4 * i + j) * channels + in) * lanes, rows[j]);
      }
    }
  }
}

// Makes B^T d B of the 4x4 pixels from `in`, whose elements lie `step` apart in `to`.
template <class A> inline void transform_tile(const A* in, int pitch, A* to, int64_t step) {
  constexpr int L = kLanes<A>;
  Vec<A> rows[4][4];  // [column][row]
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    Vec<A> d[4];
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) d[y] = get(in + (int64_t(y) * pitch + x) * L);
    tile_axis(d, rows[x]);
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    const Vec<A> d[4] = {rows[0][y], rows[1][y], rows[2][y], rows[3][y]};
    Vec<A> t[4];
    tile_axis(d, t);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) put(to + (4 * y + x) * step, t[x]);
  }
}

// Makes A^T m A of a tile of products: 2x2 vectors.
template <class A> inline void transform_back(const A* m, int64_t step, Vec<A> (&y)[2][2]) {
  Vec<A> rows[2][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const Vec<A> m0 = get(m + x * step), m1 = get(m + (4 + x) * step), m2 = get(m + (8 + x) * step);
    rows[0][x] = m0 + m1 + m2;
    rows[1][x] = m1 - m2 - get(m + (12 + x) * step);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    y[i][0] = rows[i][0] + rows[i][1] + rows[i][2];
    y[i][1] = rows[i][1] - rows[i][2] - rows[i][3];
  }
}

template <class A, int tiles>
void winograd_strips(const A* in, const Grid& grid, int channels, const A* weights, bool add, A* out, int out_pitch,
                     int64_t out_plane, A* scratch) {
  constexpr int L = kLanes<A>;
  const int blocks = blocks_of<A>(channels), columns = (grid.cols + 1) / 2, count = (grid.rows + 1) / 2 * columns;
  const int pitch = grid.pitch();
  A *u = scratch, *m = scratch + int64_t(kElements) * blocks * tiles * L;
  in += int64_t(grid.inside() - pitch - 1) * L;  // a tile begins one pixel before its outputs
  for (int first = 0; first < count; first += tiles) {
    const int used = std::min(tiles, count - first);
    for (int t = 0; t < tiles; ++t) {
      // Beyond the last tile it is taken again, and its products are not written.
      const int tile = first + std::min(t, used - 1), row = 2 * (tile / columns), col = 2 * (tile % columns);
      for (int b = 0; b < blocks; ++b)
        transform_tile(in + (b * int64_t(grid.padded()) + int64_t(row) * pitch + col) * L, pitch,
                       u + (b * tiles + t) * L, int64_t(blocks) * tiles * L);
    }
    const auto step = [&](auto wide, int block) {
      constexpr int B = decltype(wide)::value;
      const A* own = weights + int64_t(block) * L * kElements * channels;
      for (int e = 0; e < kElements; ++e)
        // The tiles of one element lie as the pixels of a row that a 1x1 convolution reads.
        dense_tile<A, 1, tiles, B>(u + int64_t(e) * blocks * tiles * L, tiles, tiles, channels,
                                   own + int64_t(e) * channels * B * L, 0, 1, false, m + e * B * tiles * L, tiles);
      for (int t = 0; t < used; ++t) {
        const int row = 2 * ((first + t) / columns), col = 2 * ((first + t) % columns);
        for (int b = 0; b < B; ++b) {
          Vec<A> y[2][2];
          transform_back(m + (b * tiles + t) * L, B * tiles * L, y);
          A* to = out + ((block + b) * out_plane + int64_t(row) * out_pitch + col) * L;
          // An image of odd size ends in the middle of a tile.
          for (int i = 0; i < 2 && row + i < grid.rows; ++i)
            for (int j = 0; j < 2 && col + j < grid.cols; ++j) {
              A* at = to + (int64_t(i) * out_pitch + j) * L;
              put(at, add ? get(at) + y[i][j] : y[i][j]);
            }
        }
      }
    };
    int block = 0;
    for (; block + 2 <= blocks; block += 2) step(std::integral_constant<int, 2>(), block);
    if (block < blocks) step(std::integral_constant<int, 1>(), block);
  }
}

// Writes or, with `add`, adds V * in to out; `in` and `out` are as `dense` takes them.
template <class A>
void winograd(const A* in, const Grid& grid, int channels, const A* weights, bool add, A* out, int out_pitch,
              int64_t out_plane, A* scratch) {
  constexpr int R = kVectorRegisters == 32 ? 8 : 4;
  const auto strips = blocks_of<A>(channels) == 1 ? winograd_strips<A, 2 * R> : winograd_strips<A, R>;
  strips(in, grid, channels, weights, add, out, out_pitch, out_plane, scratch);
}

}  // namespace fastnas::FASTNAS_ISA
