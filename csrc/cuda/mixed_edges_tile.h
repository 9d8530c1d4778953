// Moves tiles between global and shared memory, and says which thread of a block has what. A tile is [C][pitch]
// floats, pixels row by row; its pixels outside of the image are 0. Convolutions: mixed_edges_strips.h. Products:
// mixed_edges_products.h.
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

// --- values of a dtype that is data ------------------------------------------------------------------------

// The dtype is data, so that a kernel is compiled once; it is the same for the whole grid, so a branch on it never
// diverges. Loops over many values ask once, outside of the loop (with_type), single values each time (get, put).
template <class F> __device__ void with_type(DType type, F f) {
  if (type == DType::f32) f(float{});
  else if (type == DType::bf16) f(bf16_t{});
  else f(f16_t{});
}
__device__ float get(const void* from, DType type, int64_t at) {
  if (type == DType::f32) return static_cast<const float*>(from)[at];
  if (type == DType::bf16) return load(static_cast<const bf16_t*>(from)[at]);
  return load(static_cast<const f16_t*>(from)[at]);
}
__device__ void put(void* to, DType type, int64_t at, float v) {
  if (type == DType::f32) static_cast<float*>(to)[at] = v;
  else if (type == DType::bf16) static_cast<bf16_t*>(to)[at] = store<bf16_t>(v);
  else static_cast<f16_t*>(to)[at] = store<f16_t>(v);
}
__device__ float get(const Planes& z, int64_t at) { return get(z.data, z.type, at); }

// Four neighbouring values of a row, as the arithmetic has them.
struct Quad { float v[4]; };
template <class T> struct alignas(4 * sizeof(T)) PackedQuad { T v[4]; };

// Reads or writes a quad by one access of 16 bytes, or 8 of a 16-bit type, at an address that allows it.
template <class T> __device__ Quad load_quad(const T* from) {
  const PackedQuad<T> packed = *reinterpret_cast<const PackedQuad<T>*>(from);
  return {{load(packed.v[0]), load(packed.v[1]), load(packed.v[2]), load(packed.v[3])}};
}
template <class T> __device__ void store_quad(T* to, const Quad& quad) {
  PackedQuad<T> packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed.v[i] = store<T>(quad.v[i]);
  *reinterpret_cast<PackedQuad<T>*>(to) = packed;
}
__device__ Quad quad_at(const float* shared) { return load_quad(shared); }

// Reads `count` values of a quad, the others are 0; writes `count` of them. Planes that are not aligned, and quads
// that end outside of the image, go value by value.
__device__ Quad get_quad(const Planes& from, int64_t at, int count) {
  Quad quad{};
  if (from.aligned && count == 4) {
    with_type(from.type, [&](auto zero) { quad = load_quad(static_cast<const decltype(zero)*>(from.data) + at); });
    return quad;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) quad.v[i] = get(from, at + i);
  return quad;
}
__device__ void put_quad(const Planes& to, int64_t at, int count, const Quad& quad) {
  void* const data = const_cast<void*>(to.data);
  if (to.aligned && count == 4) {
    with_type(to.type, [&](auto zero) { store_quad(static_cast<decltype(zero)*>(data) + at, quad); });
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) put(data, to.type, at + i, quad.v[i]);
}

// Writes `count` values of a quad to a plane of floats.
__device__ void put_floats(const Planes& to, int64_t at, int count, const Quad& quad) {
  float* const data = static_cast<float*>(const_cast<void*>(to.data)) + at;
  if (to.aligned && count == 4) return store_quad(data, quad);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) data[i] = quad.v[i];
}

// --- tiles -------------------------------------------------------------------------------------------------

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

// Names four pixels of a channel of a tile: their place in the tile, in the plane, and how many lie inside of the
// image.
struct Place {
  int channel, pixel;
  int offset, count;
};
__device__ Place place_of_quad(const Tiling& t, const Tile& tile, int channel, int quad) {
  const int across = t.tile.cols / 4, row = quad / across, col = quad % across * 4;
  const int count = row < tile.rows ? min(4, max(0, tile.cols - col)) : 0;
  return {channel, 4 * quad, (tile.row + row) * t.grid.cols + tile.col + col, count};
}

// Finds the place of a quad without a division where rows are whole.
__device__ Place place_at(const Tiling& t, const Tile& tile, int channel, int quad) {
  if (!t.whole_rows()) return place_of_quad(t, tile, channel, quad);
  return {channel, 4 * quad, tile.row * t.grid.cols + 4 * quad, 4 * quad < tile.rows * t.tile.cols ? 4 : 0};
}

// Walks over the quads of a tile, all channels, a block's width at a time. Where rows are whole a channel's quads
// follow each other in the plane, so the walk only adds: a division an element would cost more than the load.
struct QuadWalk {
  int quads, channel, quad, channels_on, quads_on;
  __device__ explicit QuadWalk(const Tiling& t)
      : quads(t.quads()), channel(int(threadIdx.x) / quads), quad(int(threadIdx.x) % quads),
        channels_on(kThreads / quads), quads_on(kThreads % quads) {}
  __device__ void go_on() {
    quad += quads_on, channel += channels_on;
    if (quad >= quads) quad -= quads, ++channel;
  }
};

// Calls put(place, load(place)) for all quads of a tile of whole rows, with four loads in flight: what put does with
// the first comes after the fourth has been asked for.
template <class Load, class Put>
__device__ void move_whole_rows(const Tiling& t, const Tile& tile, int channels, Load load, Put put) {
  QuadWalk walk(t);
  const int inside = tile.rows * tile.cols, first = tile.row * t.grid.cols;
  while (walk.channel < channels) {
    Place place[4];
    Quad quad[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int count = walk.channel >= channels ? -1 : 4 * walk.quad < inside ? 4 : 0;
      place[k] = {walk.channel, 4 * walk.quad, first + 4 * walk.quad, count};
      quad[k] = {};
      if (count > 0) quad[k] = load(place[k]);
      walk.go_on();
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (place[k].count >= 0) put(place[k], quad[k]);
  }
}

// Loads a tile of `channels` channels from planes that begin at `at`: to[c][pixel] = f(c, value), 0 outside of the
// image. Neighbouring threads take neighbouring quads, in global memory and in shared. It does not wait: a barrier
// is the caller's.
template <class F>
__device__ void load_tile(const Tiling& t, const Tile& tile, int channels, const Planes& from, int64_t at, float* to,
                          F f) {
  const int64_t plane = from.grid.pixels();
  if (t.whole_rows() && from.aligned) {
    with_type(from.type, [&](auto zero) {
      const auto* const data = static_cast<const decltype(zero)*>(from.data) + at;
      move_whole_rows(
          t, tile, channels, [&](const Place& p) { return load_quad(data + p.channel * plane + p.offset); },
          [&](const Place& p, Quad quad) {
            const float shift = p.count > 0 ? f(p.channel) : 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) quad.v[i] += shift;
            store_quad(to + p.channel * t.pitch + p.pixel, quad);
          });
    });
    return;
  }
  for (int i = int(threadIdx.x); i < channels * t.quads(); i += kThreads) {
    const Place p = place_of_quad(t, tile, i / t.quads(), i % t.quads());
    Quad quad = get_quad(from, at + p.channel * plane + p.offset, p.count);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < p.count) quad.v[k] += f(p.channel);
    store_quad(to + p.channel * t.pitch + p.pixel, quad);
  }
}

// Stores a tile of `channels` channels to planes that begin at `at`.
__device__ void store_tile(const Tiling& t, const Tile& tile, int channels, const float* from, const Planes& to,
                           int64_t at) {
  const int64_t plane = to.grid.pixels();
  if (t.whole_rows() && to.aligned) {
    with_type(to.type, [&](auto zero) {
      auto* const data = static_cast<decltype(zero)*>(const_cast<void*>(to.data)) + at;
      move_whole_rows(
          t, tile, channels, [&](const Place& p) { return quad_at(from + p.channel * t.pitch + p.pixel); },
          [&](const Place& p, const Quad& quad) {
            if (p.count > 0) store_quad(data + p.channel * plane + p.offset, quad);
          });
    });
    return;
  }
  for (int i = int(threadIdx.x); i < channels * t.quads(); i += kThreads) {
    const Place p = place_of_quad(t, tile, i / t.quads(), i % t.quads());
    put_quad(to, at + p.channel * plane + p.offset, p.count, quad_at(from + p.channel * t.pitch + p.pixel));
  }
}

// The pixels past the tile's last are read four (or on tensor cores eight) at a time and never written: they are set
// to 0 once a kernel, because shared memory is not cleared and a NaN there would spread through the products.
__device__ void clear_tails(const Tiling& t, int channels, float* tile) {
  for (int i = int(threadIdx.x); i < 4 * channels; i += kThreads) tile[i / 4 * t.pitch + t.tile.pixels() + i % 4] = 0;
}

constexpr int kSumsAtOnce = 4;  // channels that a warp sums together, or each would wait for its shuffles

// Sums the pixels of all channels of a tile, and calls put(c, sum) in one lane for each: a warp has four channels at
// once.
template <class Put> __device__ void channel_sums(const Tiling& t, int channels, const float* tile, Put put) {
  for (int first = kSumsAtOnce * warp_index(); first < channels; first += kSumsAtOnce * kWarps) {
    float sum[kSumsAtOnce] = {};
    const float* from[kSumsAtOnce];
#pragma unroll
    for (int k = 0; k < kSumsAtOnce; ++k) from[k] = tile + min(first + k, channels - 1) * t.pitch;
#pragma unroll 2
    for (int i = 4 * lane_index(); i < t.tile.pixels(); i += 128)
#pragma unroll
      for (int k = 0; k < kSumsAtOnce; ++k) {
        const Quad q = quad_at(from[k] + i);
        sum[k] += (q.v[0] + q.v[1]) + (q.v[2] + q.v[3]);
      }
#pragma unroll
    for (int k = 0; k < kSumsAtOnce; ++k) sum[k] = warp_total(sum[k]);
#pragma unroll
    for (int k = 0; k < kSumsAtOnce; ++k)
      if (lane_index() == k && first + k < channels) put(first + k, sum[k]);
  }
}

// Counts the floats of shared memory that a tile of all channels takes. Rows C to width are never written; what is
// read of them reaches sums that are not stored.
__device__ __host__ inline int tile_floats(const Plan& plan, const Tiling& t) { return plan.width * t.pitch; }

// Says, to all threads of the block, whether it is the last of `blocks` to come here, by a counter that began at 0.
// What each of them wrote before is visible to the last one: its reads must go past L1 (__ldcg), which may hold a
// line from before. No block waits for another.
__device__ bool is_last_block(unsigned* counter, unsigned blocks) {
  SHARED(int, last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicAdd(counter, 1u) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last[0];
}

}  // namespace
}  // namespace fastnas::cuda
