// Computes dense convolutions of one image at stride 1, channels in the lanes: z = V * u, du = V^T * dz, dV = <dz, u>.
//
// As in product.h a tile of sums stays in registers while one operand streams past it: for every tap and input
// channel one vector of weights meets one scalar of each pixel, which the FMA broadcasts. Planes are padded
// (vector.h), so taps beyond the image read zeros. Kernels are 1x1 or 3x3, which the padding of size / 2 centres.
#pragma once

#include <type_traits>

#include "vector.h"

namespace fastnas::FASTNAS_ISA {

// Weights lie as the tiles read them: [output blocks, in twos][taps][input channels][two blocks, or the last one], so
// that a tile streams through consecutive lines. At 64 channels of fp32 a pair is 72 KiB and comes from L2.
inline int64_t dense_weights(int channels, int width, int size) { return int64_t(size) * size * channels * width; }

// Packs V [C][C][size][size] for `dense`: as it is, or turned by 180 degrees with the channels exchanged, which makes
// the transposed convolution of a stride of 1.
template <class A, class T> void pack_dense(const T* weights, int channels, int size, bool transposed, A* to) {
  constexpr int L = kLanes<A>;
  const int blocks = blocks_of<A>(channels), taps = size * size;
  for (int block = 0; block < blocks; block += 2) {
    const int lanes = (block + 2 <= blocks ? 2 : 1) * L;
    // All taps of an input in turn: they lie next to each other in V, and its lines are still in L1.
    for (int in = 0; in < channels; ++in)
      for (int tap = 0; tap < taps; ++tap)
        for (int lane = 0; lane < lanes; ++lane) {
          const int out = block * L + lane;
          const int64_t at = transposed ? (int64_t(in) * channels + out) * taps + taps - 1 - tap
                                        : (int64_t(out) * channels + in) * taps + tap;
          to[(int64_t(tap) * channels + in) * lanes + lane] = out < channels ? A(load(weights[at])) : A(0);
        }
    to += int64_t(taps) * channels * lanes;
  }
}

// Computes a strip of `pixels` of one row over `blocks` output blocks, from the rows of taps [first_row, last_row):
// the others lie outside of the image. `in` is the pixel that the first tap reads.
template <class A, int size, int pixels, int blocks>
inline void dense_tile(const A* in, int pitch, int64_t plane, int channels, const A* weights, int first_row,
                       int last_row, bool add, A* out, int64_t out_plane) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[pixels][blocks];
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) acc[p][b] = add ? get(out + b * out_plane * L + p * L) : Vec<A>{};
  for (int i = first_row; i < last_row; ++i)
    for (int j = 0; j < size; ++j) {
      const A* row = weights + int64_t(i * size + j) * channels * blocks * L;
      for (int first = 0; first < channels; first += L) {
        const A* u = in + (first / L * plane + int64_t(i) * pitch + j) * L;
        const int lanes = channels - first < L ? channels - first : L;
        for (int lane = 0; lane < lanes; ++lane, row += blocks * L) {
          Vec<A> m[blocks];
          for (int b = 0; b < blocks; ++b) m[b] = get(row + b * L);
#pragma GCC unroll 16
          for (int p = 0; p < pixels; ++p) {
            const A s = u[p * L + lane];
#pragma GCC unroll 2
            for (int b = 0; b < blocks; ++b) acc[p][b] += m[b] * s;
          }
        }
      }
    }
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) put(out + b * out_plane * L + p * L, acc[p][b]);
}

// Writes or, with `add`, adds V * in to out. `in` holds padded planes; `out` has a pitch and a plane size of its own,
// in pixels. Two output blocks share each broadcast scalar, as in product().
template <class A, int size>
void dense_planes(const A* in, const Grid& grid, int channels, const A* weights, bool add, A* out, int out_pitch,
                  int64_t out_plane) {
  constexpr int L = kLanes<A>, R = kVectorRegisters == 32 ? 8 : 4, pad = size / 2;
  const int blocks = blocks_of<A>(channels), pitch = grid.pitch();
  const auto block_step = [&](auto wide, int block) {
    constexpr int B = decltype(wide)::value;
    const A* own = weights + int64_t(block) * L * size * size * channels;
    for (int h = 0; h < grid.rows; ++h) {
      const int first = h < pad ? pad - h : 0, last = h + pad >= grid.rows ? size - pad + grid.rows - 1 - h : size;
      const A* row = in + (int64_t(h + kHalo - pad) * pitch + kHalo - pad) * L;
      A* to = out + (block * out_plane + int64_t(h) * out_pitch) * L;
      int w = 0;
      const auto run = [&](auto pixels) {
        constexpr int n = decltype(pixels)::value;
        for (; w + n <= grid.cols; w += n)
          dense_tile<A, size, n, B>(row + w * L, pitch, grid.padded(), channels, own, first, last, add, to + w * L,
                                    out_plane);
      };
      if constexpr (B == 1) run(std::integral_constant<int, 2 * R>());
      run(std::integral_constant<int, R>());
      run(std::integral_constant<int, R / 2>());
      run(std::integral_constant<int, 1>());
    }
  };
  int block = 0;
  for (; block + 2 <= blocks; block += 2) block_step(std::integral_constant<int, 2>(), block);
  if (block < blocks) block_step(std::integral_constant<int, 1>(), block);
}

template <class A>
void dense(const A* in, const Grid& grid, int channels, const A* weights, int size, bool add, A* out, int out_pitch,
           int64_t out_plane) {
  const auto planes = size == 1 ? dense_planes<A, 1> : dense_planes<A, 3>;
  planes(in, grid, channels, weights, add, out, out_pitch, out_plane);
}

// Sums one tap over an image for `rows` input channels and `blocks` output blocks: every sum lives in a register
// while the pixels go past, row by row. `u` is the first pixel that the tap reads, `dz` the image's first.
template <class A, int rows, int blocks>
inline void dense_outer_tile(const A* u, const A* dz, const Grid& grid, bool fresh, A* sum, int width) {
  constexpr int L = kLanes<A>;
  const int64_t plane = grid.padded();
  const int pitch = grid.pitch();
  Vec<A> acc[rows][blocks];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) acc[i][b] = fresh ? Vec<A>{} : get(sum + i * width + b * L);
  for (int h = 0; h < grid.rows; ++h, u += int64_t(pitch) * L, dz += int64_t(pitch) * L)
    for (int w = 0; w < grid.cols; ++w) {
      Vec<A> d[blocks];
      for (int b = 0; b < blocks; ++b) d[b] = get(dz + (b * plane + w) * L);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const A s = u[w * L + i];
#pragma GCC unroll 2
        for (int b = 0; b < blocks; ++b) acc[i][b] += d[b] * s;
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) put(sum + i * width + b * L, acc[i][b]);
}

// Adds sum_p u[p + tap] dz[p]^T to sum [taps][width of the input channels][width]; `fresh` writes it. Both are padded
// planes. Rows past the last channel are written up to the next full tile.
template <class A>
void dense_outer(const A* u, const A* dz, const Grid& grid, int channels, int size, bool fresh, A* sum) {
  constexpr int L = kLanes<A>;
  const int blocks = blocks_of<A>(channels), width = blocks * L, pitch = grid.pitch(), pad = size / 2;
  const int64_t plane = grid.padded();
  dz += int64_t(grid.inside()) * L;
  for (int tap = 0; tap < size * size; ++tap, sum += int64_t(width) * width) {
    const A* own = u + (int64_t(tap / size + kHalo - pad) * pitch + tap % size + kHalo - pad) * L;
    for (int block = 0; block < blocks; ++block) {
      int j = 0;
      const auto columns = [&](auto wide) {
        constexpr int B = decltype(wide)::value;
        constexpr int budget = (kVectorRegisters == 32 ? 16 : 8) / B, rows = budget < L ? budget : L;
        for (int i = 0; i < L && block * L + i < channels; i += rows)
          dense_outer_tile<A, rows, B>(own + block * plane * L + i, dz + j * plane * L, grid, fresh,
                                       sum + int64_t(block * L + i) * width + j * L, width);
        j += B;
      };
      while (j + 2 <= blocks) columns(std::integral_constant<int, 2>());
      if (j < blocks) columns(std::integral_constant<int, 1>());
    }
  }
}

}  // namespace fastnas::FASTNAS_ISA
