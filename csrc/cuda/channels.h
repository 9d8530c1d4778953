// Reads and writes a tensor with channels, in either layout: a block of threads takes one part of the values of one
// tile of channels, a thread kHeld of them, each of its loads 16 bytes where the tensor allows it.
//
// A thread's values stay in registers between loads and stores, so one read of a tensor serves a two-pass
// variance. Channels last, a tile is 8 to 32 channels wide and neighbouring threads take neighbouring
// channels: a warp reads whole lines.
#pragma once

#include "packed.h"

#include "../params.h"

namespace fastnas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kHeld = int(kBlock) / kThreads;  // values of a thread
constexpr int kTile = 32;                      // channels of a tile at most

// Cuts channels into parts. All is fixed by the shape alone, so that sums do not depend on dtype,
// alignment or device.
struct Tiling {
  int64_t channels, pixels, values;  // of an image; of a channel
  int64_t parts, span;               // that a channel's values are cut into; values of a part
  int32_t tile, tiles;               // channels of a tile; of the tensor
  bool planar;                       // the pixels of a channel follow each other

  explicit Tiling(const MixedNormSumParams& p)
      : channels(p.channels > 0 ? p.channels : 1), pixels(p.pixels), values(p.sum.n / channels),
        planar(!p.channels_last && p.pixels > 1) {
    tile = planar ? 1 : 8;  // 8: the channels of one 16-byte load of a 16-bit dtype
    while (!planar && tile < kTile && tile < channels) tile *= 2;
    tiles = int32_t((channels + tile - 1) / tile);
    span = kBlock / tile;
    parts = (values + span - 1) / span;
  }
  dim3 grid(int64_t rows = 1) const { return dim3(unsigned(parts * tiles), unsigned(rows)); }
};

// Holds the values of one thread. `wide`: every load is 16 aligned bytes of one channel (planar) or of
// neighbouring channels. Otherwise values are read one by one, and a run of pixels may go on in the next
// image, `jump` elements further.
template <class T, bool planar, bool wide_> struct View {
  static constexpr bool wide = wide_;
  static constexpr int kVector = kPacked<T>, kLoads = kHeld / kVector;
  static constexpr int kSums = planar ? 1 : kVector;  // channels of a thread

  int64_t part, first_channel;
  int64_t count;               // values of a channel in this part
  int lanes, column;           // threads side by side in a tile; first channel of this one in it
  int64_t at[kLoads];          // index in memory of a load's first value
  int there[kLoads];           // how many values it has
  int64_t pixels, jump, pixel[kLoads];  // planar: what a load that is not wide needs to go on in the next image

  __device__ explicit View(const Tiling& g)
      : part(blockIdx.x / unsigned(g.tiles)), first_channel(int64_t(blockIdx.x % unsigned(g.tiles)) * g.tile),
        lanes(planar ? 1 : g.tile / kVector), pixels(g.pixels), jump((g.channels - 1) * g.pixels) {
    const int thread = int(threadIdx.x);
    const int64_t first = part * g.span;
    count = g.values - first < g.span ? g.values - first : g.span;
    column = planar ? 0 : thread % lanes * kVector;
    const int64_t image = planar ? first / pixels : 0, begin = planar ? first % pixels : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if constexpr (planar) {
        const int64_t value = int64_t(i * kThreads + thread) * kVector, from = begin + value;
        // A part reaches into one more image at most where images are as long as it is.
        const int64_t further = pixels >= kBlock ? from >= pixels : uint32_t(from) / uint32_t(pixels);
        pixel[i] = from - further * pixels;
        at[i] = ((image + further) * g.channels + first_channel) * pixels + pixel[i];
        there[i] = within(count - value);
      } else {
        const int row = i * (kThreads / lanes) + thread / lanes;
        at[i] = (first + row) * g.channels + first_channel + column;
        there[i] = row < count ? within(g.channels - first_channel - column) : 0;
      }
    }
  }

  // Says how many of a load's kVector values there are; the others read 0 and are not written.
  static __device__ int within(int64_t left) { return left < 0 ? 0 : left < kVector ? int(left) : kVector; }
  // Which of the thread's sums a held value belongs to.
  static constexpr __device__ int sum_of(int slot) { return planar ? 0 : slot % kVector; }
  __device__ bool has(int slot) const { return slot % kVector < there[slot / kVector]; }

  // Calls f(slot, index in memory) for the values that there are.
  template <class F> __device__ void for_each(F f) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int64_t index = at[i], left = planar && !wide ? pixels - pixel[i] : 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j, ++index) {
        if (j < there[i]) f(i * kVector + j, index);
        if (planar && !wide && --left == 0) index += jump, left = pixels;
      }
    }
  }

  // Reads the thread's values, 0 where there is none.
  __device__ void read(const void* base, float (&v)[kHeld]) const {
    const T* from = static_cast<const T*>(base);
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) v[slot] = 0;
    if constexpr (wide) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (there[i]) load_packed(from + at[i], v + i * kVector);
    } else {
      for_each([&](int slot, int64_t index) { v[slot] = load(from[index]); });
    }
  }

  __device__ void write(void* base, const float (&v)[kHeld]) const {
    T* to = static_cast<T*>(base);
    if constexpr (wide) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (there[i]) store_packed(to + at[i], v + i * kVector);
    } else {
      for_each([&](int slot, int64_t index) { to[index] = store<T>(v[slot]); });
    }
  }

  // Adds up over the threads of each warp into per_warp [kWarps][kTile]. Threads of one channel are `lanes` apart,
  // so the butterfly stops at that distance and leaves the sums of different channels alone.
  __device__ void warp_sums(float (&v)[kSums], float* per_warp) const {
    const int lane = int(threadIdx.x) % 32;
    for (int step = 16; step >= lanes; step /= 2)
#pragma unroll
      for (int s = 0; s < kSums; ++s) v[s] += __shfl_xor_sync(0xffffffffu, v[s], step);
    if (lane < lanes)
#pragma unroll
      for (int s = 0; s < kSums; ++s) per_warp[int(threadIdx.x) / 32 * kTile + column + s] = v[s];
  }

  // Adds up over the block, in every thread of the channel: warps are added in their order.
  __device__ void block_sums(float (&v)[kSums], float* per_warp) const {
    __syncthreads();  // per_warp may still be read from the call before
    warp_sums(v, per_warp);
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      v[s] = 0;
      for (int warp = 0; warp < kWarps; ++warp) v[s] += per_warp[warp * kTile + column + s];
    }
  }
};

template <class V> struct ViewTag { using View = V; };

// Calls run(tag of the view) for tensors of T; wide where every one of them can be read 16 bytes at
// a time: all pointers are aligned, and a row of a channel (or the channels of a pixel) is whole
// loads, so that none crosses its end.
template <class T, class F> int with_view(const MixedNormSumParams& p, const Tiling& g, F run) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.sum.y) | reinterpret_cast<uintptr_t>(p.sum.dy);
  for (int k = 0; k < p.sum.terms; ++k)
    bits |= reinterpret_cast<uintptr_t>(p.sum.x[k]) | reinterpret_cast<uintptr_t>(p.sum.dx[k]);
  const int64_t run_length = g.planar ? g.pixels : g.channels;
  const bool wide = bits % 16 == 0 && run_length % (16 / int64_t(sizeof(T))) == 0;
  if (g.planar) return wide ? run(ViewTag<View<T, true, true>>{}) : run(ViewTag<View<T, true, false>>{});
  return wide ? run(ViewTag<View<T, false, true>>{}) : run(ViewTag<View<T, false, false>>{});
}

}  // namespace
}  // namespace fastnas::cuda
