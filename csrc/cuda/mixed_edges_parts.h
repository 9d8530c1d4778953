// Names what a warp of the last kernels of backward works on, and has it add transposed convolutions in registers.
#pragma once

#include "mixed_edges_common.h"
#include "mixed_edges_strips.h"

namespace fastnas::cuda {
namespace {

// Names what a warp works on: some channels of a tile, and how its lanes share them.
struct Part {
  Tile tile;
  strips::Lanes lanes;
  int strip, first, channels;  // the side of a strip
};

FASTNAS_HD int channel_groups(int C, const Tiling& t, int strip) {
  const int at_once = strips::lanes_of(t.tile, strip).channels;
  return (C + at_once - 1) / at_once;
}
__device__ Part part_of(const Plan& plan, const Tiling& t, int strip, const Tile& tile, int group) {
  const strips::Lanes lanes = strips::lanes_of(t.tile, strip);
  const int first = group * lanes.channels;
  return {tile, lanes, strip, first, min(lanes.channels, plan.C - first)};
}
// Counts groups of channels first, then tiles, then images.
__device__ Part part_at(const Plan& plan, const Tiling& t, unsigned index) {
  const unsigned groups = unsigned(channel_groups(plan.C, t, strips::kSourceSide)), tiles = index / groups;
  const Tile tile = tile_at(t, tiles / t.count(), int(tiles % t.count()));
  return part_of(plan, t, strips::kSourceSide, tile, int(index % groups));
}

// Names a lane's strip of a part: its channel in the part, its first row and column in the plane. Strips below the
// image or beside it do not exist: a tile before may have left other pixels in their patch.
struct Spot {
  int channel, row, col;
  bool exists;
};
__device__ Spot spot_of_lane(const Tiling& t, const Part& part) {
  const strips::Strip strip = strips::strip_of_lane(part.lanes, t.tile, part.strip);
  return {strip.channel, part.tile.row + strip.row, part.tile.col + strip.col,
          strip.channel < part.channels && strip.row < part.tile.rows && strip.col < part.tile.cols};
}

// Calls f(i) for the jobs of a range that are wanted, in order. The lanes ask for 32 jobs at once: one by one, each
// would cost a load that is waited for. All lanes of the warp must call it.
template <class Wanted, class F> __device__ __forceinline__ void each_wanted(Range jobs, Wanted wanted, F f) {
  for (int base = jobs.first; base < jobs.last; base += 32) {
    const int own = base + lane_index();
    unsigned left = __ballot_sync(0xffffffffu, own < jobs.last && wanted(own));
    for (; left; left &= left - 1) f(base + __popc(~left & (left - 1)));
  }
}

// --- convolutions, transposed --------------------------------------------------------------------------------

// Adds D^T du to the strip of a lane. A dv has no half of stride 2: the kernels for these are left out.
template <bool kStrided> struct TransposedStrip {
  const float* du;
  int pitch;
  strips::Edges edges;
  const float* taps;
  float (&acc)[8][8];
  template <int K, int D, int S> __device__ __forceinline__ void run() const {
    if constexpr (S == 1 || kStrided) strips::transpose<K, D, S>(du, pitch, edges, taps, acc);
  }
};

// Adds D^T du of a half to the strips of a warp. Patches of du and taps lie in the warp's `space`; `cleared` says of
// which shape patches have zeros around their pixels there.
template <bool kStrided>
__device__ __forceinline__ void add_transposed(const Plan& plan, const Half& h, const Tiling& t, const Part& part,
                                               float* space, int& cleared, float (&acc)[8][8]) {
  const strips::Reach reach{h.size, h.dilation, h.stride, true};
  strips::Patch patch = strips::patch_of(reach, t, plan.out, space);
  float* const taps = space + part.lanes.channels * patch.plane;
  if (const int shape = patch.plane << 6 | patch.pitch; cleared != shape) {
    __syncwarp();
    strips::clear(patch, part.lanes.channels);
    cleared = shape;
  }
  strips::place(patch, reach, part.tile.row, part.tile.col);
  strips::stage(plan.own(h.du), part.tile.image, part.first, part.channels, patch);
  strips::stage_taps(h.taps, plan.type, h.size, part.first, part.channels, taps);
  strips::wait_staged();
  const Spot spot = spot_of_lane(t, part);
  if (!spot.exists) return;
  const int row = reach.below(spot.row), col = reach.below(spot.col);
  const TransposedStrip<kStrided> strip{patch.at(spot.channel, row, col), patch.pitch,
                                        strips::edges_of(reach, patch, row),
                                        taps + spot.channel * strips::tap_pitch(h.size), acc};
  strips::with_kernel(h.size, h.dilation, h.stride, strip);
}

// What is read without a window: a strip's own pixels.
FASTNAS_HD strips::Reach pixels_alone() { return {1, 1, 1, false}; }

// Sets to 0 what the relu of `x`, the convolution's input, stops.
__device__ __forceinline__ void mask(const Planes& x, const Tiling& t, const Part& part, float* space,
                                     float (&acc)[8][8]) {
  strips::Patch patch = strips::patch_of(pixels_alone(), t, x.grid, space);
  strips::place(patch, pixels_alone(), part.tile.row, part.tile.col);
  strips::stage(x, part.tile.image, part.first, part.channels, patch);
  strips::wait_staged();
  const Spot spot = spot_of_lane(t, part);
  if (!spot.exists) return;
  const float* const from = patch.at(spot.channel, spot.row, spot.col);
#pragma unroll
  for (int r = 0; r < 8; ++r)
#pragma unroll
    for (int q = 0; q < 8; q += 4) {
      const Quad v = quad_at(from + r * patch.pitch + q);
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[r][q + k] = relu_passes(v.v[k]) ? acc[r][q + k] : 0.0f;
    }
}

// Puts the strips of a warp into a tile of its channels in its `space`, where patches lay.
__device__ __forceinline__ void put_part(const Tiling& t, const Part& part, const float (&acc)[8][8], float* space) {
  __syncwarp();
  const Spot spot = spot_of_lane(t, part);
  if (!spot.exists) return;
  const int row = spot.row - part.tile.row, col = spot.col - part.tile.col;
  strips::put_strip(acc, space + spot.channel * t.pitch + row * t.tile.cols + col, t.tile.cols, t.tile.rows - row,
                    t.tile.cols - col);
}

}  // namespace
}  // namespace fastnas::cuda
