// Loads tiles of an image into shared memory, and computes depthwise convolutions of them. Products:
// mixed_edges_products.h. A tile is [C][pitch] floats, pixels row by row; its pixels outside of the image are 0.
#pragma once

#include "mixed_edges_plan.h"

namespace fastnas::cuda {
namespace {

// A block has four warps: its tiles of up to 8192 floats leave room for several blocks on a multiprocessor,
// which hide each other's barriers.
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ int lane_index() { return int(threadIdx.x) % 32; }
__device__ int warp_index() { return int(threadIdx.x) / 32; }

// Adds up over a warp, in every lane, by a butterfly: its order is fixed, and all lanes get the same bits. All 32
// lanes must take part; callers branch by warp, never by lane, around it.
template <class A> __device__ A warp_total(A v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// As torch: NaN stays, and its gradient passes.
__device__ float relu(float v) { return v < 0 ? 0.0f : v; }
__device__ bool relu_passes(float v) { return !(v <= 0); }

// The dtype is data, so that a kernel is compiled once: floats where `wide`, else bfloat16. The flag is the same
// for the whole grid, so the branch never diverges.
__device__ float get(const void* from, bool wide, int64_t at) {
  return wide ? static_cast<const float*>(from)[at] : load(static_cast<const bf16_t*>(from)[at]);
}
__device__ void put(void* to, bool wide, int64_t at, float v) {
  if (wide) static_cast<float*>(to)[at] = v;
  else static_cast<bf16_t*>(to)[at] = store<bf16_t>(v);
}
__device__ float get(const Planes& z, int64_t at) { return get(z.data, z.wide, at); }

// Says where a tile lies: `rows` and `cols` lie inside of the image.
struct Tile {
  int64_t image;
  int row, col, rows, cols;
};
__device__ Tile tile_at(const Tiling& t, int64_t image, int index) {
  const int row = index / t.across * t.tile.rows, col = index % t.across * t.tile.cols;
  return {image, row, col, min(t.tile.rows, t.grid.rows - row), min(t.tile.cols, t.grid.cols - col)};
}
// Finds the block's tile: blockIdx.x counts tiles over all images.
__device__ Tile tile_of_block(const Tiling& t) {
  return tile_at(t, blockIdx.x / t.count(), int(blockIdx.x % t.count()));
}

// Finds the offset of a tile's pixel in a plane, -1 outside of the image.
__device__ int pixel_offset(const Tiling& t, const Tile& tile, int pixel) {
  const int row = pixel / t.tile.cols, col = pixel % t.tile.cols;
  return row < tile.rows && col < tile.cols ? (tile.row + row) * t.grid.cols + tile.col + col : -1;
}

// The pixels past the tile's last are read four (or on tensor cores eight) at a time and never written
// by fill_tile: they are set to 0 once a kernel, because shared memory is not cleared and a NaN there
// would spread through the products.
__device__ void clear_tails(const Tiling& t, int channels, float* tile) {
  const int pixels = t.tile.pixels();
  for (int c = int(threadIdx.x); c < channels; c += kThreads)
    for (int i = pixels; i < t.pitch; ++i) tile[c * t.pitch + i] = 0;
}

// Writes to[c][pixel] = f(c, offset in the plane), 0 outside of the image. Neighbouring threads take neighbouring
// pixels of a channel, in global memory and in shared. It does not wait: a barrier is the caller's.
template <class F> __device__ void fill_tile(const Tiling& t, const Tile& tile, int C, float* to, F f) {
  const int pixels = t.tile.pixels();
  for (int i = int(threadIdx.x); i < C * pixels; i += kThreads) {
    const int c = i / pixels, pixel = i % pixels, at = pixel_offset(t, tile, pixel);
    to[c * t.pitch + pixel] = at < 0 ? 0.0f : f(c, at);
  }
}

// --- depthwise convolution ---------------------------------------------------------------------------------

// A patch is part of some channels in shared memory, rows from `row` and columns from `col` of the plane, zeros
// beyond it. It holds the halo of a tile, so the convolution tests no border.
struct Patch {
  float* data;
  int row, col, rows, cols;
};

// Loads a patch, a warp per row, rectified where the convolution reads relu(x). Barriers are the caller's.
__device__ void stage(const Planes& from, int64_t image, int first, int channels, bool rectify, const Patch& patch) {
  const int64_t plane = from.grid.pixels();
  for (int line = warp_index(); line < channels * patch.rows; line += kWarps) {
    const int c = line / patch.rows, row = patch.row + line % patch.rows;
    const int64_t at = image * from.image + (first + c) * plane + int64_t(row) * from.grid.cols;
    for (int i = lane_index(); i < patch.cols; i += 32) {
      const int col = patch.col + i;
      const bool inside = row >= 0 && row < from.grid.rows && col >= 0 && col < from.grid.cols;
      const float v = inside ? get(from, at + col) : 0.0f;
      patch.data[line * patch.cols + i] = rectify ? relu(v) : v;
    }
  }
}

// Says what depthwise_strips computes: some channels of one tile, from a patch.
struct Strips {
  Patch patch;
  int channels, tile_rows, tile_cols;
  Tile tile;
  float* to;  // of the first channel and the tile's first pixel
  int64_t to_plane;   // floats from a channel to the next
  int to_row;
  bool add;           // to what is there
};

// Taps are the depthwise kernels of some channels: [channels][K K] from `first` on; turned by 180
// degrees where `flip`.
struct Taps {
  const void* data;
  bool wide, flip;
  int64_t first;
};

// A thread computes a strip, R rows of one column. All K K taps are in registers; going down the patch, each value
// is loaded once per column of taps and serves every output row it belongs to. Neighbouring threads take
// neighbouring columns, so a warp reads 32 words in a row: no bank conflicts at stride 1, two-way ones at stride 2.
// The patch holds whole strips: the last one of a tile reads rows for outputs that it does not write.
template <int K, int D, int S> __device__ void depthwise_strips(const Strips& s, const Taps& taps) {
  constexpr int R = strip_rows(S), kReach = (R - 1) * S + (K - 1) * D + 1;
  const int per_channel = (s.tile_rows + R - 1) / R * s.tile_cols;
  for (int item = int(threadIdx.x); item < s.channels * per_channel; item += kThreads) {
    const int c = item / per_channel, first = item % per_channel / s.tile_cols * R, col = item % s.tile_cols;
    float tap[K * K], sum[R] = {};
#pragma unroll
    for (int k = 0; k < K * K; ++k)
      tap[k] = get(taps.data, taps.wide, taps.first + c * K * K + (taps.flip ? K * K - 1 - k : k));
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

// Calls f.run<K, D, S>() for the kernel of a half. A block has one half, so all its threads take the same case.
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
// Of these the one that reaches farthest: (size - 1) dilation + 1 pixels, 9 of them; a 7x7 reaches 7.
constexpr int kFarthestSize = 5, kFarthestDilation = 2;

struct RunStrips {
  const Strips& strips;
  const Taps& taps;
  template <int K, int D, int S> __device__ void run() const { depthwise_strips<K, D, S>(strips, taps); }
};

__device__ Patch patch_of(const Half& h, const Tiling& t, const Tile& tile, float* data) {
  const Grid size = patch_size(h, t);
  return {data, tile.row * h.stride - h.pad(), tile.col * h.stride - h.pad(), size.rows, size.cols};
}

// A slab is the channels of which a block convolves one tile: as many as their patches fit in shared memory.
struct Slab {
  Tile tile;
  int first, channels;
};
__device__ Slab slab_of_block(const Plan& plan, const Tiling& t, int at_once) {
  const int chunks = (plan.C + at_once - 1) / at_once, first = int(blockIdx.x % chunks) * at_once;
  const int index = int(blockIdx.x / chunks);
  return {tile_at(t, index / t.count(), index % t.count()), first, min(at_once, plan.C - first)};
}

// Loads a tile of u + shift, all channels. Where forward kept u ("fast") it was stored centred, and the shift is in
// it already; gather_kernel, which asks for other shifts, runs in forward only, where `u` is there.
__device__ void load_u(const Plan& plan, const Half& h, const Tile& tile, const float* shift, float* to) {
  const int64_t plane = plan.out.pixels(), image = tile.image * plan.C * plane;
  if (h.kept && !h.u)
    fill_tile(plan.tiling, tile, plan.C, to,
              [&](int c, int at) { return get(h.kept, plan.wide, image + c * plane + at); });
  else
    fill_tile(plan.tiling, tile, plan.C, to,
              [&](int c, int at) { return h.u[image + c * plane + at] + (shift ? shift[c] : 0.0f); });
}

// Adds to sums[c] the sum of a tile's channel, a warp per channel. sums are global memory that this block alone
// writes, always by the same warp, so no barrier is needed between tiles.
__device__ void add_channel_sums(const Plan& plan, const float* tile, float* sums) {
  for (int c = warp_index(); c < plan.C; c += kWarps) {
    float sum = 0;
    for (int i = lane_index(); i < plan.tiling.tile.pixels(); i += 32) sum += tile[c * plan.tiling.pitch + i];
    sum = warp_total(sum);
    if (lane_index() == 0) sums[c] += sum;
  }
}

// Counts the floats of shared memory that a tile of all channels takes. Rows C to width are never written; what is
// read of them reaches sums that are not stored.
__device__ __host__ inline int tile_floats(const Plan& plan) { return plan.width * plan.tiling.pitch; }

}  // namespace
}  // namespace fastnas::cuda
