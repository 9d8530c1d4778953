// Computes products over the channels of tiles, and over their pixels, on CUDA cores or on tensor cores. What is
// the same for both is below them: a piece is 16 sums of each thread of a team, and a worker of the block, which
// is a team, has up to M pieces.
//
// Each product reads its tile from shared memory and keeps its sums in registers, 16 M a thread. M is a template
// argument (1, 2 or 4): with a variable count the sums would be an indexed array, which lies in local memory. The
// matrices A, A^T and B are read from global memory, where all blocks of a launch share them in L2 and L1.
#pragma once

#include "mixed_edges_tile.h"
#include "tf32.h"

namespace fastnas::cuda {
namespace {

// Names an element of a tile; past the last channel or pixel there may be none.
struct Element { int channel, pixel; };
// Names an entry of a [C][C] matrix, likewise.
struct Entry { int row, col; };

__device__ float4 quad_at(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Multiplies in fp32. A piece is 4 channels by 4 pixels of a tile, or of a matrix 4 rows by 4 columns, G = width /
// 4 apart, so that neighbouring threads read neighbouring rows.
struct CudaCores {
  static constexpr int kTeam = 1;
  using Sums = float[4][4];

  static __device__ __host__ int quads(const Plan& plan) { return (plan.tiling.pitch - 4) / 4; }
  static __device__ __host__ int product_pieces(const Plan& plan) { return plan.width / 4 * quads(plan); }
  static __device__ __host__ int cross_pieces(const Plan& plan) { return plan.width / 4 * (plan.width / 4); }

  static __device__ Element element(const Plan& plan, int piece, int i, int j) {
    return {piece / quads(plan) * 4 + i, piece % quads(plan) * 4 + j};
  }

  // Each channel takes two loads of 16 bytes for 16 FMA: four entries of the matrix, which neighbouring threads
  // share, and four pixels of the tile, where neighbours read neighbouring quads and meet no bank conflict.
  static __device__ void add_product(const Plan& plan, int piece, const float* matrix, const float* tile, int channels,
                                     Sums& sum) {
    const Element first = element(plan, piece, 0, 0);
    const float *f = matrix + first.channel, *v = tile + first.pixel;
#pragma unroll 4
    for (int c = 0; c < channels; ++c) {
      const float4 a = quad_at(f + c * plan.width), b = quad_at(v + c * plan.tiling.pitch);
      const float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * y[j];
    }
  }

  static __device__ Entry entry(const Plan& plan, int piece, int i, int j) {
    const int G = plan.width / 4;
    return {piece / G + i * G, piece % G + j * G};
  }

  // Four pixels at a time take 8 loads of 16 bytes for 64 multiply-adds. Neighbouring threads read
  // columns one channel apart, whose quads lie pitch = 4 (mod 32) banks apart for tiles of whole 32s:
  // eight of them fill the 32 banks once.
  static __device__ void add_cross(const Plan& plan, int piece, const float* a, const float* b, int split, int splits,
                                   Sums& sum) {
    const int pitch = plan.tiling.pitch, G = plan.width / 4;
    const float *rows = a + piece / G * pitch, *cols = b + piece % G * pitch;
    for (int pixel = 4 * split; pixel < pitch - 4; pixel += 4 * splits) {
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
          sum[i][j] += x[i].x * y[j].x + x[i].y * y[j].y + x[i].z * y[j].z + x[i].w * y[j].w;
    }
  }
};

// Multiplies operands rounded to TF32 and sums in fp32. A piece is 32 pixels by 16 channels of a tile, or 32 rows
// by 16 columns of a matrix: two by two 16 x 8 products of a warp, of which a thread has four sums each. All 32
// lanes of a warp have the same piece and the same loop bounds, as mma.sync demands.
//
// For 8 channels and 32 x 16 sums a warp issues 12 loads of 4 bytes a lane and 4 instructions, where CUDA cores
// take 16 loads of 16 bytes and 128 FMA. bfloat16 uses the same instruction: its own is twice as fast, but would
// round A and u, which are fp32 here, to 8 bits.
struct TensorCores {
  static constexpr int kTeam = 32;
  using Sums = float[4][4];

  static __device__ __host__ int wide_parts(int size) { return (size + 31) / 32; }
  static __device__ __host__ int narrow_parts(const Plan& plan) { return (plan.width + 15) / 16; }
  static __device__ __host__ int pixel_parts(const Plan& plan) { return wide_parts(plan.tiling.pitch - 4); }
  static __device__ __host__ int product_pieces(const Plan& plan) { return pixel_parts(plan) * narrow_parts(plan); }
  static __device__ __host__ int cross_pieces(const Plan& plan) { return wide_parts(plan.width) * narrow_parts(plan); }

  // These are row and column of a sum in a piece's 32 x 16.
  static __device__ int row_of(int i, int j) { return 16 * (i / 2) + 8 * (j / 2) + lane_index() / 4; }
  static __device__ int col_of(int i, int j) { return 8 * (i % 2) + lane_index() % 4 * 2 + j % 2; }

  // Adds x y^T to sum, x(row, k) of 32 rows and y(col, k) of 16 columns, k < depth; zero beyond it. Which lane
  // holds which element of a fragment is the instruction's layout (tf32.h).
  template <class X, class Y> static __device__ void add(int first, int depth, int step, X x, Y y, Sums& sum) {
    const int row = lane_index() / 4, deep = lane_index() % 4;
    for (int k = first; k < depth; k += step) {
      float a[2][4], b[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int part = 0; part < 4; ++part) a[part / 2][part % 2 + 2 * half] = x(row + 8 * part, k + deep + 4 * half);
#pragma unroll
        for (int part = 0; part < 2; ++part) b[part][half] = y(row + 8 * part, k + deep + 4 * half);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) add_tf32_product(a[i / 2], b[i % 2], sum[i]);
    }
  }

  // Rows of a piece are pixels here, columns channels: the tile is the 16 x 8 operand, the matrix the 8 x 8 one.
  static __device__ Element element(const Plan& plan, int piece, int i, int j) {
    return {piece / pixel_parts(plan) * 16 + col_of(i, j), piece % pixel_parts(plan) * 32 + row_of(i, j)};
  }

  static __device__ void add_product(const Plan& plan, int piece, const float* matrix, const float* tile, int channels,
                                     Sums& sum) {
    const int channel = piece / pixel_parts(plan) * 16, pixel = piece % pixel_parts(plan) * 32;
    const int width = plan.width, pitch = plan.tiling.pitch;
    add(
        0, channels, 8,
        [&](int row, int c) { return c < channels && pixel + row < pitch ? tile[c * pitch + pixel + row] : 0.0f; },
        [&](int col, int c) {
          return c < channels && channel + col < width ? matrix[c * width + channel + col] : 0.0f;
        },
        sum);
  }

  static __device__ Entry entry(const Plan& plan, int piece, int i, int j) {
    return {piece / narrow_parts(plan) * 32 + row_of(i, j), piece % narrow_parts(plan) * 16 + col_of(i, j)};
  }

  // Eight pixels are read at a time: the four past the tile's last are zeros.
  static __device__ void add_cross(const Plan& plan, int piece, const float* a, const float* b, int split, int splits,
                                   Sums& sum) {
    const int first_row = piece / narrow_parts(plan) * 32, first_col = piece % narrow_parts(plan) * 16;
    const int pitch = plan.tiling.pitch, width = plan.width;
    const auto from = [=](const float* tile, int first) {
      return [=](int i, int pixel) { return first + i < width ? tile[(first + i) * pitch + pixel] : 0.0f; };
    };
    add(8 * split, pitch - 4, 8 * splits, from(a, first_row), from(b, first_col), sum);
  }
};

// A worker is a thread on CUDA cores (128 of them) and a warp on tensor cores (4).
template <class Units> __device__ int worker_index() { return int(threadIdx.x) / Units::kTeam; }
template <class Units> constexpr int kWorkers = kThreads / Units::kTeam;

// Computes matrix^T tile, matrix [channels][width]: the sums of a block over all channels and pixels of one tile.
// Products add up, so all terms of a node go into the same registers and are stored once.
template <class Units, int M> struct Product {
  float sum[M][4][4] = {};

  // Calls f(piece, its sums) for the pieces that there are.
  template <class F> __device__ void each_piece(const Plan& plan, F f) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int piece = worker_index<Units>() + m * kWorkers<Units>;
      if (piece < Units::product_pieces(plan)) f(piece, sum[m]);
    }
  }

  __device__ void add(const Plan& plan, const float* matrix, const float* tile, int channels) {
    each_piece(plan, [&](int piece, float(&own)[4][4]) {
      Units::add_product(plan, piece, matrix, tile, channels, own);
    });
  }

  // Calls f(sum, channel, pixel) over the elements of a tile.
  template <class F> __device__ void each_element(const Plan& plan, F f) {
    each_piece(plan, [&](int piece, float(&own)[4][4]) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Element at = Units::element(plan, piece, i, j);
          if (at.channel < plan.C && at.pixel < plan.tiling.tile.pixels()) f(own[i][j], at.channel, at.pixel);
        }
    });
  }

  __device__ void add_tile(const Plan& plan, const float* tile) {
    each_element(plan, [&](float& sum, int c, int pixel) { sum += tile[c * plan.tiling.pitch + pixel]; });
  }

  // Calls f(sum, channel, offset in a plane) over the elements inside of the image.
  template <class F> __device__ void each_inside(const Plan& plan, const Tile& tile, F f) {
    each_element(plan, [&](float& sum, int c, int pixel) {
      const int at = pixel_offset(plan.tiling, tile, pixel);
      if (at >= 0) f(sum, c, at);
    });
  }
};

// Sums a b^T over the pixels of many tiles, [C][C]: the pieces from `base` on, of matrices of more pieces than the
// block has workers; small matrices are split over pixels too, or at C = 16 112 of the 128 threads would have none.
template <class Units, int M> struct Cross {
  float sum[M][4][4] = {};
  int base, splits = 1;

  __device__ Cross(const Plan& plan, int base) : base(base) {
    while (Units::cross_pieces(plan) * splits * 2 <= kWorkers<Units>) splits *= 2;
  }
  __device__ int per_split() const { return kWorkers<Units> / splits; }
  __device__ int split() const { return worker_index<Units>() / per_split(); }
  __device__ int piece(int m) const { return base + worker_index<Units>() % per_split() + m * per_split(); }

  __device__ void add(const Plan& plan, const float* a, const float* b) {
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (piece(m) < Units::cross_pieces(plan)) Units::add_cross(plan, piece(m), a, b, split(), splits, sum[m]);
  }

  // Writes the pieces to [C][C]. The splits of a piece are added in their order, one entry at a time by way of
  // `space`, which holds kThreads floats: a barrier before it is overwritten, one before it is read.
  __device__ void store(const Plan& plan, float* space, float* to) {
    const int stride = per_split() * Units::kTeam;
#pragma unroll
    for (int m = 0; m < M; ++m)
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
            for (int s = 0; s < splits; ++s) total += space[s * stride + int(threadIdx.x) % stride];
          }
          const Entry at = Units::entry(plan, piece(m), i, j);
          if (split() == 0 && piece(m) < Units::cross_pieces(plan) && at.row < plan.C && at.col < plan.C)
            to[at.row * plan.C + at.col] = total;
        }
  }
};

// Writes to [C][C] = a b^T over all tiles of a group of images: load(tile, whether it is the first) fills a and b,
// which may be one; each() sees every tile once. All threads of the block call it, as it has barriers: one before a
// tile is loaded, when other warps may still read the last one, one before it is read. A matrix of more pieces than
// M workers hold is made in several passes over the images.
template <class Units, int M, class Load, class Each>
__device__ void cross_group(const Plan& plan, int group, const float* a, const float* b, float* to, Load load,
                            Each each) {
  SHARED(float, space, kThreads);
  for (int base = 0; base < Units::cross_pieces(plan); base += M * kWorkers<Units>) {
    Cross<Units, M> cross(plan, base);
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

}  // namespace
}  // namespace fastnas::cuda
