// Computes products over the pixels of tiles, and over their channels into another tile, on CUDA cores or on tensor
// cores. What is the same for both is below them: a piece is 16 sums of each thread of a team, and a worker of the
// block is a team. Products over channels that stay in registers: mixed_edges_mix.h.
//
// A matrix is read from global memory, where all blocks of a launch share it in L2 and L1, and lies there as Plan::at
// says: a thread's four outputs of one input after the other, so that the addresses of an unrolled loop are one
// register and constants.
#pragma once

#include "mixed_edges_tile.h"
#include "tf32.h"

namespace fastnas::cuda {
namespace {

// Names an element of a tile; past the last channel or pixel there may be none.
struct Element { int channel, pixel; };
// Names an entry of a [C][C] matrix, likewise.
struct Entry { int row, col; };

// Multiplies in fp32. A piece is 4 channels by 4 pixels of a tile, or of a matrix 4 rows by 4 columns, G = width /
// 4 apart, so that neighbouring threads read neighbouring rows.
struct CudaCores {
  static constexpr int kTeam = 1;
  using Sums = float[4][4];

  static __device__ __host__ int product_pieces(const Plan& plan, const Tiling& t) {
    return plan.width / 4 * t.quads();
  }
  static __device__ __host__ int cross_pieces(const Plan& plan) { return plan.width / 4 * (plan.width / 4); }

  static __device__ Element element(const Tiling& t, int piece, int i, int j) {
    return {piece / t.quads() * 4 + i, piece % t.quads() * 4 + j};
  }

  // Each channel takes two loads of 16 bytes for 16 FMA: four entries of the matrix, which neighbouring threads
  // share, and four pixels of the tile, where neighbours read neighbouring quads and meet no bank conflict.
  static __device__ void add_product(const Plan& plan, const Tiling& t, int piece, const float* matrix,
                                     const float* tile, int channels, Sums& sum) {
    const Element first = element(t, piece, 0, 0);
    const float *f = matrix + int64_t(first.channel) * plan.C, *v = tile + first.pixel;
#pragma unroll 8
    for (int c = 0; c < channels; ++c, v += t.pitch) {
      const Quad x = quad_at(f + 4 * c), y = quad_at(v);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += x.v[i] * y.v[j];
    }
  }

  static __device__ Entry entry(const Plan& plan, int piece, int i, int j) {
    const int G = plan.width / 4;
    return {piece / G + i * G, piece % G + j * G};
  }

  // Four pixels at a time take 8 loads of 16 bytes for 64 FMA. Neighbouring threads read columns one channel apart,
  // whose quads lie pitch = 4 (mod 32) banks apart for tiles of whole 32s: eight of them fill the 32 banks once. A
  // split has pixels that follow each other, so that the unrolled loads differ by constants.
  static __device__ void add_cross(const Plan& plan, const Tiling& t, int piece, const float* a, const float* b,
                                   int split, int splits, Sums& sum) {
    const int G = plan.width / 4, apart = G * t.pitch;
    const int begin = t.quads() * split / splits, count = t.quads() * (split + 1) / splits - begin;
    const float* rows = a + piece / G * t.pitch + 4 * begin;
    const float* cols = b + piece % G * t.pitch + 4 * begin;
#pragma unroll 2
    for (int k = 0; k < count; ++k, rows += 4, cols += 4) {
      Quad x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = quad_at(rows + i * apart), y[i] = quad_at(cols + i * apart);
#pragma unroll
      for (int pixel = 0; pixel < 4; ++pixel)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += x[i].v[pixel] * y[j].v[pixel];
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
  static __device__ __host__ int pixel_parts(const Tiling& t) { return wide_parts(t.tile.pixels()); }
  static __device__ __host__ int product_pieces(const Plan& plan, const Tiling& t) {
    return pixel_parts(t) * narrow_parts(plan);
  }
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
  static __device__ Element element(const Tiling& t, int piece, int i, int j) {
    return {piece / pixel_parts(t) * 16 + col_of(i, j), piece % pixel_parts(t) * 32 + row_of(i, j)};
  }

  static __device__ void add_product(const Plan& plan, const Tiling& t, int piece, const float* matrix,
                                     const float* tile, int channels, Sums& sum) {
    const int channel = piece / pixel_parts(t) * 16, pixel = piece % pixel_parts(t) * 32;
    const int width = plan.width, pitch = t.pitch;
    add(
        0, channels, 8,
        [&](int row, int c) { return c < channels && pixel + row < pitch ? tile[c * pitch + pixel + row] : 0.0f; },
        [&](int col, int c) {
          return c < channels && channel + col < width ? matrix[plan.at(c, channel + col)] : 0.0f;
        },
        sum);
  }

  static __device__ Entry entry(const Plan& plan, int piece, int i, int j) {
    return {piece / narrow_parts(plan) * 32 + row_of(i, j), piece % narrow_parts(plan) * 16 + col_of(i, j)};
  }

  // Eight pixels are read at a time: the four past the tile's last are zeros.
  static __device__ void add_cross(const Plan& plan, const Tiling& t, int piece, const float* a, const float* b,
                                   int split, int splits, Sums& sum) {
    const int first_row = piece / narrow_parts(plan) * 32, first_col = piece % narrow_parts(plan) * 16;
    const int pitch = t.pitch, width = plan.width;
    const auto from = [=](const float* tile, int first) {
      return [=](int i, int pixel) { return first + i < width ? tile[(first + i) * pitch + pixel] : 0.0f; };
    };
    add(8 * split, t.tile.pixels(), 8 * splits, from(a, first_row), from(b, first_col), sum);
  }
};

// A worker is a thread on CUDA cores (128 of them) and a warp on tensor cores (4).
template <class Units> __device__ int worker_index() { return int(threadIdx.x) / Units::kTeam; }
template <class Units> constexpr int kWorkers = kThreads / Units::kTeam;
constexpr int kMostHeld = 4;  // pieces of a matrix that a worker holds at once

// Writes matrix^T tile, of `channels` channels of the tile, over channels first .. last - 1 of another tile. A thread
// has one piece at a time, so it needs no variants. A barrier before it and after it is the caller's.
template <class Units>
__device__ void product_into_tile(const Plan& plan, const Tiling& t, const float* matrix, const float* tile,
                                  int channels, float* to, int first, int last) {
  for (int piece = worker_index<Units>(); piece < Units::product_pieces(plan, t); piece += kWorkers<Units>) {
    float sum[4][4] = {};
    Units::add_product(plan, t, piece, matrix, tile, channels, sum);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Element at = Units::element(t, piece, i, j);
        if (at.channel >= first && at.channel < last && at.pixel < t.tile.pixels())
          to[at.channel * t.pitch + at.pixel] = sum[i][j];
      }
  }
}

// Counts how many pieces of a [C][C] matrix a worker holds at once.
template <class Units> FASTNAS_HD int pieces_held(const Plan& plan) {
  const int pieces = (Units::cross_pieces(plan) + kWorkers<Units> - 1) / kWorkers<Units>;
  return pieces < kMostHeld ? pieces : kMostHeld;
}
FASTNAS_HD int pieces_held(const Plan& plan) {
  return plan.tensor ? pieces_held<TensorCores>(plan) : pieces_held<CudaCores>(plan);
}
FASTNAS_HD int cross_pieces(const Plan& plan) {
  return plan.tensor ? TensorCores::cross_pieces(plan) : CudaCores::cross_pieces(plan);
}
FASTNAS_HD int pieces_of_a_pass(const Plan& plan) {
  return pieces_held(plan) * (plan.tensor ? kWorkers<TensorCores> : kWorkers<CudaCores>);
}

// Sums a b^T over the pixels of many tiles, [C][C]: the pieces from `base` on, of matrices of more pieces than the
// block holds; small matrices are split over pixels too, or at C = 16 112 of the 128 threads would have none.
//
// Between tiles the sums rest in shared memory, 16 a piece and thread, as quads that neighbouring threads have side by
// side. In registers they would be there while the block convolves its next tile, which wants 128 registers for
// itself; fetching them back costs 8 instructions for the thousand FMA of a tile.
template <class Units> struct Cross {
  float* sums;  // [held][4][kThreads] quads
  int base, held, splits;

  __device__ Cross(const Plan& plan, float* sums, int base)
      : sums(sums), base(base), held(pieces_held<Units>(plan)), splits(1) {
    while (Units::cross_pieces(plan) * splits * 2 <= kWorkers<Units>) splits *= 2;
  }
  __device__ int per_split() const { return kWorkers<Units> / splits; }
  __device__ int split() const { return worker_index<Units>() / per_split(); }
  __device__ int piece(int m) const { return base + worker_index<Units>() % per_split() + m * per_split(); }
  __device__ float* quad(int m, int i, int thread) const { return sums + ((m * 4 + i) * kThreads + thread) * 4; }

  __device__ void clear() {
    for (int k = 0; k < 4 * held; ++k) store_quad(quad(0, k, int(threadIdx.x)), Quad{});
  }

  __device__ void add(const Plan& plan, const Tiling& t, const float* a, const float* b) {
    for (int m = 0; m < held; ++m) {
      if (piece(m) >= Units::cross_pieces(plan)) continue;
      float sum[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Quad q = quad_at(quad(m, i, int(threadIdx.x)));
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = q.v[j];
      }
      Units::add_cross(plan, t, piece(m), a, b, split(), splits, sum);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_quad(quad(m, i, int(threadIdx.x)), Quad{{sum[i][0], sum[i][1], sum[i][2], sum[i][3]}});
    }
  }

  // Writes the pieces to [C][width], the splits of a piece added in their order. All threads call it; a barrier before
  // the sums are overwritten is the caller's.
  __device__ void store(const Plan& plan, float* to) {
    __syncthreads();
    if (split() != 0) return;
    const int stride = per_split() * Units::kTeam;
    for (int m = 0; m < held; ++m) {
      if (piece(m) >= Units::cross_pieces(plan)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Quad total{};
        for (int s = 0; s < splits; ++s) {
          const Quad part = quad_at(quad(m, i, int(threadIdx.x) + s * stride));
#pragma unroll
          for (int j = 0; j < 4; ++j) total.v[j] += part.v[j];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Entry at = Units::entry(plan, piece(m), i, j);
          if (at.row < plan.C && at.col < plan.C) to[int64_t(at.row) * plan.width + at.col] = total.v[j];
        }
      }
    }
  }
};

// Calls f(Cross) for the units that the call uses; all blocks of a launch use the same.
template <class F> __device__ void with_cross(const Plan& plan, float* sums, int base, F f) {
  if (plan.tensor) f(Cross<TensorCores>(plan, sums, base));
  else f(Cross<CudaCores>(plan, sums, base));
}

}  // namespace
}  // namespace fastnas::cuda
