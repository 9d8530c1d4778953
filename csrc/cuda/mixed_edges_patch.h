// Cuts tiles into strips over the lanes of a warp, and stages what they read as patches in shared memory. What is
// computed of patches: mixed_edges_strips.h.
//
// A warp owns whole channels, so nothing here needs a barrier of the block: a warp stages the patches of a few
// channels, waits for its own copies, and its 32 lanes compute a strip each. A strip is a square of pixels of what is
// written, 8x8 at stride 1 and 4x4 at stride 2, so that 8x8 pixels of the input lie under it either way.
//
// The host keeps to three rules: a tile that does not have all rows of its grid has a multiple of 8 of them; one that
// does not have all columns has a multiple of 8 of those; and most_tile_rows() bounds the rows, so that 32 lanes hold
// all strips of a channel.
#pragma once

#include "async_copy.h"
#include "mixed_edges_plan.h"

namespace fastnas::cuda::strips {
namespace {

// Columns before and after each row of a patch. No convolution reaches farther (7x7: 3; 5x5 at dilation 2: 4), and
// quads of floats are aligned on either side of it.
constexpr int kMargin = 4;
constexpr int kMostRows = 24;  // of patches with a way of their own: of a tile of 16, a 5x5 at dilation 2

FASTNAS_HD int rounded_up(int n, int to) { return (n + to - 1) & -to; }  // to a power of two
// Finds the bits of the smallest power of two that is at least n, so that lanes are cut by shifts.
FASTNAS_HD int bits_for(int n) {
  int bits = 0;
  while (1 << bits < n) ++bits;
  return bits;
}

// Returns n in a way that the compiler can not see through. What is computed from it stays where it stands: addresses
// of ten kernels and of every way to stage would otherwise be computed before the loop over tiles, and kept in more
// registers than there are beside a strip.
__device__ int fresh(int n) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(n));
#endif
  return n;
}

// Says what a job reads around a strip. A pool is {3, 1, stride}; pixels alone are {1, 1, 1}. `transposed`: the patch
// is of a gradient, in the grid of the output, and strips are of the input's grid.
struct Reach {
  int size, dilation, stride;
  bool transposed;
  FASTNAS_HD int pad() const { return dilation * (size / 2); }
  // The side of a strip, of the square under it in the patch, and how far beyond that it reads. Strides are 1 and 2.
  FASTNAS_HD int strip() const { return stride == 1 || transposed ? 8 : 4; }
  FASTNAS_HD int footprint() const { return stride == 2 && transposed ? 4 : 8; }
  FASTNAS_HD int halo() const { return transposed ? (pad() + stride - 1) / stride : pad(); }
  // Finds a strip's first row or column, a multiple of 4 of the written grid, in the patch's.
  FASTNAS_HD int below(int at) const { return transposed ? at >> (stride - 1) : at << (stride - 1); }
};

// Says how the strips of a tile lie over the 32 lanes: powers of two, whose product is 32.
struct Lanes {
  int across_bits, down_bits, channels;
  FASTNAS_HD int across() const { return 1 << across_bits; }
};
FASTNAS_HD Lanes lanes_of(Grid tile, int strip) {
  const int bits = strip == 8 ? 3 : 2;
  const int across = bits_for((tile.cols + strip - 1) >> bits), down = bits_for((tile.rows + strip - 1) >> bits);
  return {across, down, 32 >> (across + down)};
}
FASTNAS_HD int most_tile_rows(int tile_cols, int strip) {
  return 32 / lanes_of({1, tile_cols}, strip).across() * strip;
}

// Names the strip of a lane: its channel among those of the warp's pass, its first row and column in the tile.
struct Strip {
  int channel, row, col;
  bool inside;  // of the tile; the pass may still have fewer channels
};

// Lanes count columns first, then channels, then rows of strips. Shared memory serves 16-byte loads eight lanes at a
// time, which should meet eight different groups of four banks. Rows of strips lie a multiple of 32 floats apart,
// always the same banks, so they are counted last; strips of one row are 8 floats apart, and channels 4 more than a
// multiple of 32 (patch_of): four strips of two channels take the groups {0 2 4 6} and {1 3 5 7}, one strip of eight
// channels {0 .. 7}. Two strips of four channels in a row would meet in {0 2}, {1 3}, {2 4}, {3 5}, hence there bits 1
// and 2 of the channel change places: channels 0 1 4 5 take {0 2}, {1 3}, {4 6}, {5 7}. (Strips of du at stride 2, 4
// floats apart, would rather have channels in order; but a lane keeps its channel whatever the stride.)
__device__ Strip strip_of_lane(const Lanes& lanes, Grid tile, int strip) {
  const int lane = fresh(int(threadIdx.x % 32)), rest = lane >> lanes.across_bits;
  int channel = rest & (lanes.channels - 1);
  if (lanes.across() == 2 && lanes.channels >= 8)
    channel = (channel & ~6) | (channel & 2) << 1 | (channel & 4) >> 1;
  const int row = lane >> (5 - lanes.down_bits), col = lane & (lanes.across() - 1);
  return {channel, row * strip, col * strip, row * strip < tile.rows && col * strip < tile.cols};
}

// Says how a patch is staged, where its plane is aligned: whole planes of the three stages of a network, rows of 32
// columns, or anything else.
enum class Way { planes8, planes16, planes32, rows32, any };

// A patch is a part of some channels in shared memory, for whole strips, with zeros for what lies outside of the
// plane. Where a tile has all rows, the rows above and below do not exist, and strips skip them (Edges); otherwise they
// are staged. Where it has all columns, four zeros between two rows are margin for both, set once a kernel; otherwise
// a row has margins of its own, of real pixels.
struct Patch {
  float* data;                  // 16-byte aligned; pixel (row, col) of the plane is data[kMargin]
  int row, col, rows, cols;     // cols without margins, a multiple of 4
  int pitch, plane;             // floats from a row, and from a channel, to the next
  Grid from;                    // the whole plane
  bool all_rows, all_cols;
  Way way;

  // Finds a pixel of the plane.
  __device__ float* at(int channel, int from_row, int from_col) const {
    return data + channel * plane + (from_row - row) * pitch + kMargin + from_col - col;
  }
};

// Shapes the patch for tiles of a grid; `from` is the grid of what is staged. It lies at the first tile until place()
// moves it.
FASTNAS_HD Patch patch_of(const Reach& reach, const Tiling& t, Grid from, float* data) {
  const int rows = reach.below(rounded_up(t.tile.rows, reach.strip()));
  const int cols = reach.below(rounded_up(t.tile.cols, reach.strip()));
  Patch p{data, 0, 0, rows, cols, cols + kMargin, 0, from, t.down == 1, t.across == 1, Way::any};
  if (!p.all_rows) p.row = -reach.halo(), p.rows += 2 * reach.halo();
  if (!p.all_cols) p.pitch += kMargin;
  // For the banks (strip_of_lane): strips 8 floats apart want channels 4 floats apart, strips 4 floats apart want
  // them as many as the strips of a row take.
  const int across = lanes_of(t.tile, reach.strip()).across(), shift = reach.footprint() == 8 ? 4 : 4 * across % 32;
  p.plane = rounded_up(p.rows * p.pitch + kMargin - shift, 32) + shift;
  if (p.all_cols && from.cols == 32 && p.rows <= kMostRows) p.way = Way::rows32;
  if (p.all_rows && p.all_cols && from.rows == from.cols) {
    if (from.rows == 8) p.way = Way::planes8;
    if (from.rows == 16) p.way = Way::planes16;
    if (from.rows == 32) p.way = Way::planes32;
  }
  return p;
}

// Count the floats of shared memory that the patches of a warp's pass take, and the taps beside them.
FASTNAS_HD int patch_floats(const Reach& reach, const Tiling& t) {
  return lanes_of(t.tile, reach.strip()).channels * patch_of(reach, t, t.grid, nullptr).plane;
}
FASTNAS_HD int tap_pitch(int size) { return rounded_up(size * size, 4); }
FASTNAS_HD int tap_floats(const Reach& reach, const Tiling& t) {
  return lanes_of(t.tile, reach.strip()).channels * tap_pitch(reach.size);
}

// Moves a patch to the tile that begins at (row, col) of the written grid.
__device__ void place(Patch& patch, const Reach& reach, int row, int col) {
  if (!patch.all_rows) patch.row = reach.below(row) - reach.halo();
  if (!patch.all_cols) patch.col = reach.below(col);
}

// --- staging -------------------------------------------------------------------------------------------------

// Stores 16 bytes to shared memory at once; nvcc cuts a plain store of a float4 up where it steps through a loop.
__device__ void put_quad(float* to, float4 v) {
#if defined(__CUDACC__)
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(unsigned(__cvta_generic_to_shared(to))), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
#else
  *reinterpret_cast<float4*>(to) = v;
#endif
}
__device__ void put_zeros(float* to) { put_quad(to, make_float4(0, 0, 0, 0)); }

// Sets the patches of a warp to zero, once a kernel: margins, and rows and columns up to whole strips, stay so.
__device__ void clear(const Patch& patch, int channels) {
#pragma unroll 1
  for (int i = int(threadIdx.x % 32) * 4; i < channels * patch.plane; i += 32 * 4) put_zeros(patch.data + i);
  __syncwarp();
}

// The dtype is data, so that a kernel is compiled once. Calls f(zero), a value of the type; the flag is the same for
// the whole grid, so a branch around a whole load costs nothing and never diverges.
template <class F> __device__ void with_type(DType type, F f) {
  if (type == DType::f32) f(0.0f);
  else if (type == DType::bf16) f(bf16_t{});
  else f(f16_t{});
}

__device__ float value_of(float v) { return v; }
__device__ float value_of(bf16_t v) { return load(v); }
__device__ float value_of(f16_t v) {
#if defined(__CUDACC__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  return load(v);
#endif
}

// Tells the compiler that an address from a table is one of global memory.
template <class T> __device__ const T* in_global(const T* from) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(from));
#endif
  return from;
}

// Carries N values of a 16-bit type from global memory, by one load, to floats in shared memory.
template <class T, int N> struct Carried;
template <class T> struct Carried<T, 1> {
  T value;
  __device__ void take(const T* from) { value = *from; }
  __device__ void put(float* to) const { *to = value_of(value); }
};
template <class T> struct Carried<T, 4> {
  uint2 bits;
  __device__ void take(const T* from) { bits = *reinterpret_cast<const uint2*>(from); }
  static __device__ float value(unsigned pair, int shift) { return value_of(T{uint16_t(pair >> shift)}); }
  __device__ void put(float* to) const {
    put_quad(to, make_float4(value(bits.x, 0), value(bits.x, 16), value(bits.y, 0), value(bits.y, 16)));
  }
};

// Copies N values at each of up to M places, `step` elements apart: the i-th while i * a_step < left. Floats go by
// asynchronous copies, without passing through registers; 16-bit types have all loads in flight before the first is
// used. (`carried` begins as 0: a register that only some lanes load is kept for the others all around the caller's
// loop over tiles, and there are dozens of them.)
template <int N, int M>
__device__ void copy(float* to, int to_step, const float* from, int step, int left, int a_step) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
    if (i * a_step >= left) continue;
    if constexpr (N == 4) copy_async16(to + i * to_step, from + i * step);
    else copy_async4(to + i * to_step, from + i * step);
  }
}
template <int N, int M, class T>
__device__ void copy(float* to, int to_step, const T* from, int step, int left, int a_step) {
  Carried<T, N> carried[M] = {};
#pragma unroll
  for (int i = 0; i < M; ++i)
    if (i * a_step < left) carried[i].take(from + i * step);
#pragma unroll
  for (int i = 0; i < M; ++i)
    if (i * a_step < left) carried[i].put(to + i * to_step);
}

// Writes zeros to four such places.
template <int N> __device__ void zero(float* to, int to_step, int left, int a_step) {
  for (int i = 0; i < 4 && i * a_step < left; ++i)
    if constexpr (N == 4) put_zeros(to + i * to_step);
    else to[i * to_step] = 0;
}

// Stages at most kMostRows rows of W quads, all columns of the plane, so that the rows of a channel follow each other
// in memory. A warp takes 32 quads at a time, by one instruction, as all distances are known; they are counted from
// the middle, because the instruction holds no more than 2 KB either way.
template <int W, class T>
__device__ void stage_rows(const T* x, int pixels, int channels, const Patch& patch, unsigned lane) {
  constexpr int kRows = 32 / W, kPitch = 4 * W + kMargin, kMiddle = kMostRows / 2 * 4 * W;
  const int first = max(patch.row, 0), left = min(patch.row + patch.rows, patch.from.rows) - first - int(lane / W);
  const T* from = x + first * 4 * W + 4 * lane + kMiddle;
  float* to = patch.data + kMargin + (first - patch.row + int(lane / W)) * kPitch + lane % W * 4;
#pragma unroll 1
  for (int c = 0; c < channels; ++c, from += pixels, to += patch.plane)
    copy<4, kMostRows / kRows>(to, kRows * kPitch, from - kMiddle, 128, left, kRows);
}

// Stages whole planes of H rows of W quads, which follow each other in memory.
template <int W, int H, class T>
__device__ void stage_planes(const T* x, int channels, const Patch& patch, unsigned lane) {
  constexpr int kQuads = W * H, kSteps = kQuads > 32 ? kQuads / 32 : 1, kAtOnce = kQuads < 32 ? 32 / kQuads : 1;
  constexpr int kPitch = 4 * W + kMargin;
  const int own = int(lane / kQuads);
  const T* from = x + 4 * lane;
  float* to = patch.data + kMargin + own * patch.plane + lane % kQuads / W * kPitch + lane % W * 4;
#pragma unroll kSteps > 2 ? 1 : 4
  for (int c = own; c < channels; c += kAtOnce, from += kAtOnce * kQuads * 4, to += kAtOnce * patch.plane)
    copy<4, kSteps>(to, 32 / W * kPitch, from, 128, kSteps, 1);
}

// Stages any rows and columns, N values at a time: 4 where the plane is aligned, else 1. What lies outside of the plane
// becomes 0: a tile may have left other pixels there.
template <int N, class T>
__device__ void stage_any(const T* x, int pixels, int channels, const Patch& patch, unsigned lane) {
  const Grid from = patch.from;
  const int left = patch.all_cols ? 0 : patch.col - kMargin, first = max(patch.row, 0);
  const int cols = patch.all_cols ? from.cols : patch.cols + 2 * kMargin;
  const int last = min(patch.row + patch.rows, from.rows), units = (cols + N - 1) / N;
  const int bits = min(bits_for(units), 5), at_once = 32 >> bits;
  for (int c = 0; c < channels; ++c)
    for (int u = int(lane) & ((1 << bits) - 1); u < units; u += 1 << bits) {
      const int col = left + u * N;
      const bool inside = col >= 0 && col < from.cols;
      for (int row = first + int(lane >> bits); row < last; row += 4 * at_once) {
        float* const to = patch.at(c, row, col);
        const T* const at = x + int64_t(c) * pixels + row * from.cols + col;
        if (inside) copy<N, 4>(to, at_once * patch.pitch, at, at_once * from.cols, last - row, at_once);
        else zero<N>(to, at_once * patch.pitch, last - row, at_once);
      }
    }
}

// Clears the rows between the end of the plane and the end of the strip that it cuts: in a tile before, other pixels
// lay there. Where a tile has all rows nothing else is ever written to them.
__device__ void clear_below(const Patch& patch, int channels, unsigned lane) {
  const int end = min(patch.row + patch.rows, rounded_up(patch.from.rows, 8)), first = max(patch.from.rows, patch.row);
#pragma unroll 1
  for (int c = 0; c < channels; ++c)
#pragma unroll 1
    for (int i = patch.pitch * (first - patch.row) + int(lane) * 4; i < patch.pitch * (end - patch.row);
         i += 32 * 4)
      put_zeros(patch.data + c * patch.plane + i);
}

// Stages the patches of `channels` channels from `first` on, by a warp. It begins when all lanes are done with what
// lies there, and returns before the copies have landed: wait_staged().
template <class Planes> __device__ void stage(const Planes& from, int64_t image, int first, int channels, Patch patch) {
  __syncwarp();
  const unsigned lane = unsigned(fresh(int(threadIdx.x % 32)));
  patch.pitch = fresh(patch.pitch), patch.plane = fresh(patch.plane);
  patch.from = {fresh(patch.from.rows), fresh(patch.from.cols)};
  const int pixels = patch.from.pixels();
  with_type(from.type, [&](auto zero) {
    using T = decltype(zero);
    const T* x = in_global(static_cast<const T*>(from.data)) + image * from.image + int64_t(first) * pixels;
    if (!from.aligned) return stage_any<1>(x, pixels, channels, patch, lane);
    switch (patch.way) {
      case Way::planes8: return stage_planes<2, 8>(x, channels, patch, lane);
      case Way::planes16: return stage_planes<4, 16>(x, channels, patch, lane);
      case Way::planes32: return stage_planes<8, 32>(x, channels, patch, lane);
      case Way::rows32: return stage_rows<8>(x, pixels, channels, patch, lane);
      case Way::any: return stage_any<4>(x, pixels, channels, patch, lane);
    }
  });
  if (!patch.all_rows && patch.from.rows % 8 != 0) clear_below(patch, channels, lane);
}

// Stages taps of some channels, as floats: to[channel][tap_pitch(size)]. They lie in shared memory because a lane needs
// all of its channel's, up to 49: here the warp loads and converts each value once. tap_pitch() is 3 more than the taps
// of every size, so the i-th value goes 3 floats farther for every channel before it: i / 9, / 25 or / 49 of them, by a
// multiplication, as count is no constant. Like stage() it begins when all lanes are done with what lies there.
__device__ void stage_taps(const void* taps, DType type, int size, int first, int channels, float* to) {
  __syncwarp();
  const int count = size * size, lane = fresh(int(threadIdx.x % 32));
  const unsigned by_count = size == 3 ? ~0u / 9 + 1 : size == 5 ? ~0u / 25 + 1 : ~0u / 49 + 1;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T* const from = in_global(static_cast<const T*>(taps)) + int64_t(first) * count;
#pragma unroll 1
    for (int i = lane; i < channels * count; i += 4 * 32) {
      Carried<T, 1> carried[4] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (i + 32 * k < channels * count) carried[k].take(from + i + 32 * k);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (i + 32 * k < channels * count) carried[k].put(to + i + 32 * k + 3 * __umulhi(i + 32 * k, by_count));
    }
  });
}

// Waits for the warp's own copies. The barrier makes them, and plain stores of other lanes, visible to all lanes.
__device__ void wait_staged() {
  commit();
  wait<0>();
  __syncwarp();
}

}  // namespace
}  // namespace fastnas::cuda::strips
