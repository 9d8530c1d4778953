// Tiles of an image in shared memory, and what is done with them: depthwise convolution, products of channels.
// A tile is [C][pitch] floats, pixels row by row; its pixels outside of the image are 0.
#pragma once

#include "mixed_edges_plan.h"

namespace fastnas::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ int lane_index() { return int(threadIdx.x) % 32; }
__device__ int warp_index() { return int(threadIdx.x) / 32; }

template <class A> __device__ A warp_total(A v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// As torch: NaN stays, and its gradient passes.
__device__ float relu(float v) { return v < 0 ? 0.0f : v; }
__device__ bool relu_passes(float v) { return !(v <= 0); }

template <class T> __device__ float load_value(const Planes& z, int64_t at) {
  return z.wide ? static_cast<const float*>(z.data)[at] : load(static_cast<const T*>(z.data)[at]);
}

// The place of a tile: `rows` and `cols` lie inside of the image.
struct Tile {
  int64_t image;
  int row, col, rows, cols;
};
__device__ Tile tile_at(const Tiling& t, int64_t image, int index) {
  const int row = index / t.across * t.tile.rows, col = index % t.across * t.tile.cols;
  return {image, row, col, min(t.tile.rows, t.grid.rows - row), min(t.tile.cols, t.grid.cols - col)};
}
// Over all images: blockIdx.x counts tiles.
__device__ Tile tile_of_block(const Tiling& t) {
  return tile_at(t, blockIdx.x / t.count(), int(blockIdx.x % t.count()));
}

// Offset of a tile's pixel in a plane, -1 outside of the image.
__device__ int pixel_offset(const Tiling& t, const Tile& tile, int pixel) {
  const int row = pixel / t.tile.cols, col = pixel % t.tile.cols;
  return row < tile.rows && col < tile.cols ? (tile.row + row) * t.grid.cols + tile.col + col : -1;
}

// The pixels past the tile's last are read four at a time, and never written.
__device__ void clear_tails(const Tiling& t, int channels, float* tile) {
  const int pixels = t.tile.pixels();
  for (int c = int(threadIdx.x); c < channels; c += kThreads)
    for (int i = pixels; i < t.pitch; ++i) tile[c * t.pitch + i] = 0;
}

// to[c][pixel] = f(c, offset in the plane), 0 outside of the image.
template <class F> __device__ void fill_tile(const Tiling& t, const Tile& tile, int C, float* to, F f) {
  const int pixels = t.tile.pixels();
  for (int i = int(threadIdx.x); i < C * pixels; i += kThreads) {
    const int c = i / pixels, pixel = i % pixels, at = pixel_offset(t, tile, pixel);
    to[c * t.pitch + pixel] = at < 0 ? 0.0f : f(c, at);
  }
}

// --- depthwise convolution ---------------------------------------------------------------------------------

// Part of some channels in shared memory, rows from `row` and columns from `col` of the plane, zeros beyond it.
struct Patch {
  float* data;
  int row, col, rows, cols;
};

template <class T>
__device__ void stage(const Planes& from, int64_t image, int first, int channels, bool rectify, const Patch& patch) {
  const int64_t plane = from.grid.pixels();
  for (int line = warp_index(); line < channels * patch.rows; line += kWarps) {
    const int c = line / patch.rows, row = patch.row + line % patch.rows;
    const int64_t at = image * from.image + (first + c) * plane + int64_t(row) * from.grid.cols;
    for (int i = lane_index(); i < patch.cols; i += 32) {
      const int col = patch.col + i;
      const bool inside = row >= 0 && row < from.grid.rows && col >= 0 && col < from.grid.cols;
      const float v = inside ? load_value<T>(from, at + col) : 0.0f;
      patch.data[line * patch.cols + i] = rectify ? relu(v) : v;
    }
  }
}

struct Strips {
  Patch patch;
  int channels, tile_rows, tile_cols;
  Tile tile;
  float* to;          // of the first channel and the tile's first pixel
  int64_t to_plane;   // floats from a channel to the next
  int to_row;
  bool add;           // to what is there
};

template <class T, int K, int D, int S>
__device__ void depthwise_strips(const Strips& s, const T* taps, bool flip) {
  constexpr int R = strip_rows(S), kReach = (R - 1) * S + (K - 1) * D + 1;
  const int per_channel = (s.tile_rows + R - 1) / R * s.tile_cols;
  for (int item = int(threadIdx.x); item < s.channels * per_channel; item += kThreads) {
    const int c = item / per_channel, first = item % per_channel / s.tile_cols * R, col = item % s.tile_cols;
    float tap[K * K], sum[R] = {};
#pragma unroll
    for (int k = 0; k < K * K; ++k) tap[k] = load(taps[c * K * K + (flip ? K * K - 1 - k : k)]);
    const float* from = s.patch.data + (c * s.patch.rows + first * S) * s.patch.cols + col * S;
#pragma unroll
    for (int y = 0; y < kReach; ++y) {
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
        const float v = from[y * s.patch.cols + kx * D];
#pragma unroll
        for (int ky = 0; ky < K; ++ky) {
          const int r = y - ky * D;
          if (r >= 0 && r % S == 0 && r / S < R) sum[r / S] += tap[ky * K + kx] * v;
        }
      }
    }
    float* to = s.to + c * s.to_plane + int64_t(first) * s.to_row + col;
    if (col >= s.tile.cols) continue;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (first + r >= s.tile.rows) break;
      to[r * s.to_row] = s.add ? to[r * s.to_row] + sum[r] : sum[r];
    }
  }
}

// Calls f.template operator()<K, D, S>() for the kernel of a half.
template <class F> __device__ void with_kernel(int size, int dilation, int stride, F f) {
  switch (size * 100 + dilation * 10 + stride) {
    case 311: return f.template run<3, 1, 1>();
    case 312: return f.template run<3, 1, 2>();
    case 321: return f.template run<3, 2, 1>();
    case 322: return f.template run<3, 2, 2>();
    case 511: return f.template run<5, 1, 1>();
    case 512: return f.template run<5, 1, 2>();
    case 521: return f.template run<5, 2, 1>();
    case 522: return f.template run<5, 2, 2>();
    case 711: return f.template run<7, 1, 1>();
    case 712: return f.template run<7, 1, 2>();
  }
}

template <class T> struct RunStrips {
  const Strips& strips;
  const T* taps;
  bool flip;
  template <int K, int D, int S> __device__ void run() const { depthwise_strips<T, K, D, S>(strips, taps, flip); }
};

__device__ Patch patch_of(const Half& h, const Tiling& t, const Tile& tile, float* data) {
  const Grid size = patch_size(h, t);
  return {data, tile.row * h.stride - h.pad(), tile.col * h.stride - h.pad(), size.rows, size.cols};
}

// Channels of which a block convolves one tile.
struct Slab {
  Tile tile;
  int first, channels;
};
__device__ Slab slab_of_block(const Plan& plan, const Tiling& t, int at_once) {
  const int chunks = (plan.C + at_once - 1) / at_once, first = int(blockIdx.x % chunks) * at_once;
  const int index = int(blockIdx.x / chunks);
  return {tile_at(t, index / t.count(), index % t.count()), first, min(at_once, plan.C - first)};
}

// A tile of u + shift, all channels; from where it was kept, which is centred already, if it was.
template <class T>
__device__ void load_u(const Plan& plan, const Half& h, const Tile& tile, const float* shift, float* to) {
  const int64_t plane = plan.out.pixels(), image = tile.image * plan.C * plane;
  if (h.kept && !h.u)
    fill_tile(plan.tiling, tile, plan.C, to,
              [&](int c, int at) { return load(static_cast<const T*>(h.kept)[image + c * plane + at]); });
  else
    fill_tile(plan.tiling, tile, plan.C, to,
              [&](int c, int at) { return h.u[image + c * plane + at] + (shift ? shift[c] : 0.0f); });
}

// --- products over channels --------------------------------------------------------------------------------

__device__ float4 quad_at(const float* p) { return *reinterpret_cast<const float4*>(p); }

// A thread's pieces of a tile's product: M times 4 channels x 4 pixels.
struct Piece {
  int channel, pixel;  // the first ones; channel < 0: there is none
};
__device__ Piece piece_of(const Plan& plan, int m) {
  const int quads = (plan.tiling.pitch - 4) / 4, index = int(threadIdx.x) + m * kThreads;
  return {index / quads * 4 < plan.width ? index / quads * 4 : -1, index % quads * 4};
}

// sum[co][pixel] += matrix^T tile, matrix [channels][width].
template <int M>
__device__ void add_product(const Plan& plan, const float* matrix, const float* tile, int channels,
                            float (&sum)[M][4][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Piece piece = piece_of(plan, m);
    if (piece.channel < 0) continue;
    const float *f = matrix + piece.channel, *v = tile + piece.pixel;
#pragma unroll 4
    for (int c = 0; c < channels; ++c) {
      const float4 a = quad_at(f + c * plan.width), b = quad_at(v + c * plan.tiling.pitch);
      const float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[m][i][j] += x[i] * y[j];
    }
  }
}

template <int M> __device__ void add_tile(const Plan& plan, const float* tile, float (&sum)[M][4][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Piece piece = piece_of(plan, m);
    if (piece.channel < 0) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 v = quad_at(tile + (piece.channel + i) * plan.tiling.pitch + piece.pixel);
      sum[m][i][0] += v.x, sum[m][i][1] += v.y, sum[m][i][2] += v.z, sum[m][i][3] += v.w;
    }
  }
}

// f(value, channel, offset in a plane) over the elements of a thread's pieces that lie inside of the image.
template <int M, class F>
__device__ void for_pieces(const Plan& plan, const Tile& tile, float (&sum)[M][4][4], F f) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Piece piece = piece_of(plan, m);
    if (piece.channel < 0) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int pixel = piece.pixel + j;
      const int at = pixel < plan.tiling.tile.pixels() ? pixel_offset(plan.tiling, tile, pixel) : -1;
      if (at < 0) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (piece.channel + i < plan.C) f(sum[m][i][j], piece.channel + i, at);
    }
  }
}

// a b^T over the pixels of many tiles, [C][C]. A thread has M pieces of 4 rows and 4 columns, G = width / 4 apart, so
// that neighbouring threads read neighbouring rows; small matrices are split over pixels too.
template <int M> struct Cross {
  float sum[M][4][4];
  int G, splits, base;  // base: first piece of this pass, for matrices of more pieces than the block has threads

  __device__ Cross(const Plan& plan, int base) : sum{}, G(plan.width / 4), splits(1), base(base) {
    while (G * G * splits * 2 <= kThreads) splits *= 2;
  }
  __device__ int per_split() const { return kThreads / splits; }
  __device__ int split() const { return int(threadIdx.x) / per_split(); }
  __device__ int piece(int m) const { return base + int(threadIdx.x) % per_split() + m * per_split(); }

  __device__ void add(const Plan& plan, const float* a, const float* b) {
    const int pitch = plan.tiling.pitch;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int index = piece(m);
      if (index >= G * G) continue;
      const float *rows = a + index / G * pitch, *cols = b + index % G * pitch;
      for (int pixel = 4 * split(); pixel < pitch - 4; pixel += 4 * splits) {
        float4 x[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = quad_at(rows + i * G * pitch + pixel);
          y[i] = quad_at(cols + i * G * pitch + pixel);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sum[m][i][j] += x[i].x * y[j].x + x[i].y * y[j].y + x[i].z * y[j].z + x[i].w * y[j].w;
      }
    }
  }

  // to [C][C]; `space` holds kThreads floats.
  __device__ void store(const Plan& plan, float* space, float* to) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int index = piece(m), i0 = index / G, j0 = index % G;
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float total = sum[m][i][j];
          if (splits > 1) {
            __syncthreads();
            space[threadIdx.x] = total;
            __syncthreads();
            total = 0;
            for (int s = 0; s < splits; ++s) total += space[s * per_split() + int(threadIdx.x) % per_split()];
          }
          const int row = i0 + i * G, col = j0 + j * G;
          if (split() == 0 && index < G * G && row < plan.C && col < plan.C) to[row * plan.C + col] = total;
        }
    }
  }
};

// to [C][C] = a b^T over all tiles of a group of images: load(tile, whether it is the first) fills a and b, which may
// be one; each() sees every tile once. All threads of the block call it.
template <int M, class Load, class Each>
__device__ void cross_group(const Plan& plan, int group, const float* a, const float* b, float* to, Load load,
                            Each each) {
  SHARED(float, space, kThreads);
  const int pieces = plan.width / 4 * (plan.width / 4);
  for (int base = 0; base < pieces; base += M * kThreads) {
    Cross<M> cross(plan, base);
    bool opens = base == 0;
    for (int64_t image = plan.first_image(group); image < plan.first_image(group + 1); ++image)
      for (int index = 0; index < plan.tiling.count(); ++index) {
        __syncthreads();
        load(tile_at(plan.tiling, image, index), opens);
        opens = false;
        __syncthreads();
        cross.add(plan, a, b);
        if (base == 0) each();
      }
    __syncthreads();
    cross.store(plan, space, to);
  }
}

// sums[c] += the sum of a tile's channel, a warp per channel.
__device__ void add_channel_sums(const Plan& plan, const float* tile, float* sums) {
  for (int c = warp_index(); c < plan.C; c += kWarps) {
    float sum = 0;
    for (int i = lane_index(); i < plan.tiling.tile.pixels(); i += 32) sum += tile[c * plan.tiling.pitch + i];
    sum = warp_total(sum);
    if (lane_index() == 0) sums[c] += sum;
  }
}

// Rows of shared memory that a tile of all channels takes; the last ones are read and mean nothing.
__device__ __host__ inline int tile_floats(const Plan& plan) { return plan.width * plan.tiling.pitch; }

}  // namespace
}  // namespace fastnas::cuda
