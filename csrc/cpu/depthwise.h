// Computes depthwise convolutions of one image, channels in the lanes: u = D * x, its transpose, and dD = <du, x>.
//
// Planes are padded (vector.h), so taps beyond the image read zeros and no column is tested against a
// border. Kernel size, dilation and stride are template arguments: with constant offsets the loops over
// taps unroll completely and the sums stay in registers. Measured on one core that does 76 GFMA/s: 45
// (3x3), 64 (5x5), 63 (dilated 5x5).
#pragma once

#include "vector.h"

namespace fastnas::FASTNAS_ISA {

// So many columns of a row of output are computed side by side. Their sums, one register each, live through all
// taps, so a tap is loaded once for all of them and the dependent additions of one sum are kColumns instructions
// apart. With 16 registers four sums, the tap and the loaded inputs are what fits without spilling.
constexpr int kColumns = kVectorRegisters == 32 ? 8 : 4;

struct Kernel {
  int size, dilation, stride;
  int pad() const { return dilation * (size - 1) / 2; }
  int taps() const { return size * size; }
};

// Computes a strip of `columns` outputs of one row. It reads rows [first_row, last_row) of the taps only;
// the others lie outside of the image. `flip` reads the taps backwards, `add` starts from what `out`
// holds instead of from the bias.
template <class A, int size, int dilation, int stride, bool flip, bool add, int columns>
inline void depthwise_tile(const A* in, int pitch, const A* taps, int first_row, int last_row, Vec<A> bias, A* out) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[columns];
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) acc[c] = add ? get(out + c * L) : bias;
  for (int i = first_row; i < last_row; ++i) {
    const A* row = in + int64_t(i) * dilation * pitch * L;
#pragma GCC unroll 8
    for (int j = 0; j < size; ++j) {
      const Vec<A> tap = get(taps + (flip ? size * size - 1 - (i * size + j) : i * size + j) * L);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) acc[c] += tap * get(row + (c * stride + j * dilation) * L);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) put(out + c * L, acc[c]);
}

// Computes out[h][w] = bias + sum_ij D[i][j] in[h stride + i dilation - pad][w stride + j dilation
// - pad] for a channel block.
//
// With `flip` the taps are turned by 180 degrees, which at stride 1 makes the transposed convolution, since every
// kernel is odd and centred: the same code computes dx from du. `in` is a padded plane, `out` has a pitch of its
// own. The bias is minus mean(u) when the caller wants u centred: that costs nothing here and saves a pass over u.
template <class A, int size, int dilation, int stride, bool flip, bool add>
void depthwise_plane(const A* in, const Grid& from, const A* taps, Vec<A> bias, Rows rows, int cols, A* out,
                     int out_pitch) {
  constexpr int L = kLanes<A>, pad = dilation * (size - 1) / 2;
  const int pitch = from.pitch();
  for (int h = rows.first; h < rows.last; ++h) {
    const int top = h * stride - pad;
    // Rows of taps that lie outside read nothing but zeros and are left out: on 8x8 planes
    // 12 of 40 rows of a dilated 5x5.
    int first = 0, last = size;
    while (first < last && top + first * dilation < 0) ++first;
    while (last > first && top + (last - 1) * dilation >= from.rows) --last;
    const A* row = in + (int64_t(top + kHalo) * pitch + kHalo - pad) * L;
    A* to_row = out + int64_t(h - rows.first) * out_pitch * L;
    int w = 0;
    const auto run = [&](auto columns) {
      constexpr int n = decltype(columns)::value;
      for (; w + n <= cols; w += n)
        depthwise_tile<A, size, dilation, stride, flip, add, n>(row + int64_t(w) * stride * L, pitch, taps, first, last,
                                                                bias, to_row + w * L);
    };
    run(std::integral_constant<int, kColumns>());
    run(std::integral_constant<int, kColumns / 2>());
    run(std::integral_constant<int, 1>());
  }
}

// Adds D[i][j] du[h][w] to in[h stride + i dilation - pad][...], the transpose of a strided
// convolution, into padded planes.
//
// At stride 2 most taps of a gathering transpose would meet no output, so du is scattered instead, a row of du and
// one tap at a time. The sums of dx lie in memory, hence the caller clears the planes; columns beyond the image
// land in the halo, rows beyond it are skipped, and the order of taps and rows fixes the order of the additions.
template <class A>
void depthwise_scatter(const A* du, const Grid& to, const A* taps, const Kernel& kernel, const Grid& from, A* dx) {
  constexpr int L = kLanes<A>;
  for (int h = 0; h < to.rows; ++h)
    for (int i = 0; i < kernel.size; ++i) {
      const int row = h * kernel.stride + i * kernel.dilation - kernel.pad();
      if (row < 0 || row >= from.rows) continue;
      for (int j = 0; j < kernel.size; ++j) {
        const Vec<A> tap = get(taps + (i * kernel.size + j) * L);
        A* at = dx + (int64_t(row + kHalo) * from.pitch() + kHalo - kernel.pad() + j * kernel.dilation) * L;
        const A* d = du + int64_t(h) * to.cols * L;
        for (int w = 0; w < to.cols; ++w)
          put(at + int64_t(w) * kernel.stride * L, get(at + int64_t(w) * kernel.stride * L) + tap * get(d + w * L));
      }
    }
}

// Sums `rows` rows of taps over a whole plane: every tap has a register, a pixel of du is loaded once
// for all of them. The sums begin with what dtaps holds, the images of the group so far. Reading `in`
// beyond the image meets the halo.
template <class A, int size, int dilation, int stride, int first, int rows>
inline void correlate_rows(const A* in, int pitch, const A* du, const Grid& to, int du_pitch, A* dtaps) {
  constexpr int L = kLanes<A>, pad = dilation * (size - 1) / 2;
  Vec<A> acc[rows * size];
#pragma GCC unroll 32
  for (int t = 0; t < rows * size; ++t) acc[t] = get(dtaps + (first * size + t) * L);
  for (int h = 0; h < to.rows; ++h) {
    const A* row = in + (int64_t(h * stride - pad + first * dilation + kHalo) * pitch + kHalo - pad) * L;
    const A* d_row = du + int64_t(h) * du_pitch * L;
#pragma GCC unroll 2
    for (int w = 0; w < to.cols; ++w) {
      const Vec<A> d = get(d_row + w * L);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < size; ++j)
          acc[i * size + j] += d * get(row + (int64_t(i) * dilation * pitch + w * stride + j * dilation) * L);
    }
  }
#pragma GCC unroll 32
  for (int t = 0; t < rows * size; ++t) put(dtaps + (first * size + t) * L, acc[t]);
}

// Adds to dD[i][j] sum_hw du[h][w] in[h stride + i dilation - pad][...], as many rows of taps at once as
// registers hold: all 25 taps of a 5x5 with 32 registers, two rows of it with 16. Four registers stay free for du
// and the loads; g++'s predictive commoning takes them to carry loads over and spills sums, so CMakeLists.txt
// turns it off (5x5: 38 to 62 GFMA/s).
template <class A, int size, int dilation, int stride, int first = 0>
void correlate_plane(const A* in, const Grid& from, const A* du, const Grid& to, int du_pitch, A* dtaps) {
  constexpr int fit = (kVectorRegisters - 4) / size, rows = size - first < fit ? size - first : fit;
  correlate_rows<A, size, dilation, stride, first, rows>(in, from.pitch(), du, to, du_pitch, dtaps);
  if constexpr (first + rows < size)
    correlate_plane<A, size, dilation, stride, first + rows>(in, from, du, to, du_pitch, dtaps);
}

// Calls f(integral constants size, dilation, stride): 3x3 and 5x5, dilated or not, and 7x7, at
// strides 1 and 2. These are the kernels of the candidates there are; each is code of its own, so
// another size is another instance here.
template <class F> void with_kernel(const Kernel& k, F f) {
  using std::integral_constant;
  const auto strided = [&](auto size, auto dilation) {
    if (k.stride == 1) f(size, dilation, integral_constant<int, 1>());
    else f(size, dilation, integral_constant<int, 2>());
  };
  const auto dilated = [&](auto size) {
    if (k.dilation == 1) strided(size, integral_constant<int, 1>());
    else strided(size, integral_constant<int, 2>());
  };
  if (k.size == 3) dilated(integral_constant<int, 3>());
  else if (k.size == 5) dilated(integral_constant<int, 5>());
  else strided(integral_constant<int, 7>(), integral_constant<int, 1>());
}

// Computes u of some rows of the output over all channel blocks, unpadded: [blocks][rows][cols][lanes]. taps are
// [blocks][size^2][lanes], zero in the lanes past the last channel, and bias is [blocks][lanes].
template <class A>
void depthwise(const A* in, const Grid& from, const A* taps, const Kernel& kernel, const A* bias, Rows rows, int cols,
               int blocks, A* out) {
  with_kernel(kernel, [&](auto size, auto dilation, auto stride) {
    for (int b = 0; b < blocks; ++b)
      depthwise_plane<A, size, dilation, stride, false, false>(
          in + int64_t(b) * from.padded() * kLanes<A>, from, taps + int64_t(b) * kernel.taps() * kLanes<A>,
          get(bias + b * kLanes<A>), rows, cols, out + int64_t(b) * rows.count() * cols * kLanes<A>, cols);
  });
}

// Adds D^T du to dx, padded planes of `from`, or writes it where `fresh` (at stride 1 only). At stride 1 this
// gathers from a padded du and leaves dx's halo alone; `fresh` saves clearing dx, which the first convolution of an
// edge writes whole. At stride 2 it scatters from an unpadded du.
template <class A>
void depthwise_transposed(const A* du, const Grid& to, const A* taps, const Kernel& kernel, const Grid& from,
                          int blocks, bool fresh, A* dx) {
  for (int b = 0; b < blocks; ++b) {
    const A* block_taps = taps + int64_t(b) * kernel.taps() * kLanes<A>;
    A* plane = dx + int64_t(b) * from.padded() * kLanes<A>;
    if (kernel.stride == 1) {
      with_kernel(kernel, [&](auto size, auto dilation, auto) {
        const auto run = fresh ? depthwise_plane<A, size, dilation, 1, true, false>
                               : depthwise_plane<A, size, dilation, 1, true, true>;
        run(du + int64_t(b) * to.padded() * kLanes<A>, to, block_taps, Vec<A>{}, {0, from.rows}, from.cols,
            plane + from.inside() * kLanes<A>, from.pitch());
      });
    } else {
      depthwise_scatter(du + int64_t(b) * to.pixels() * kLanes<A>, to, block_taps, kernel, from, plane);
    }
  }
}

// Writes dx = D^T du at stride 1 into an unpadded dx, for the second half of a sep_conv, whose dv
// no other convolution adds to.
template <class A>
void depthwise_transposed_plain(const A* du, const Grid& grid, const A* taps, const Kernel& kernel, int blocks, A* dx) {
  with_kernel({kernel.size, kernel.dilation, 1}, [&](auto size, auto dilation, auto) {
    for (int b = 0; b < blocks; ++b)
      depthwise_plane<A, size, dilation, 1, true, false>(
          du + int64_t(b) * grid.padded() * kLanes<A>, grid, taps + int64_t(b) * kernel.taps() * kLanes<A>, Vec<A>{},
          {0, grid.rows}, grid.cols, dx + int64_t(b) * grid.pixels() * kLanes<A>, grid.cols);
  });
}

// Adds <du, shifted in> to dtaps [blocks][size^2][lanes]. du is padded or not as in depthwise_transposed.
template <class A>
void depthwise_correlate(const A* in, const Grid& from, const A* du, const Grid& to, const Kernel& kernel, int blocks,
                         A* dtaps) {
  const bool padded = kernel.stride == 1;
  const int64_t plane = padded ? to.padded() : to.pixels();
  const A* first = padded ? du + int64_t(to.inside()) * kLanes<A> : du;
  with_kernel(kernel, [&](auto size, auto dilation, auto stride) {
    for (int b = 0; b < blocks; ++b)
      correlate_plane<A, size, dilation, stride>(in + int64_t(b) * from.padded() * kLanes<A>, from,
                                                 first + b * plane * kLanes<A>, to,
                                                 padded ? to.pitch() : to.cols,
                                                 dtaps + int64_t(b) * kernel.taps() * kLanes<A>);
  });
}

}  // namespace fastnas::FASTNAS_ISA
