// Says what a block of gather_kernel works on, how far it is, and where the parts of its shared memory lie.
#pragma once

#include "mixed_edges_common.h"
#include "mixed_edges_patch.h"

namespace fastnas::cuda {
namespace {

// Holds, in shared memory, what a block works on and how far it is. A strip's sums, taps and window take 105 of the
// 168 registers that leave room for three blocks on a multiprocessor, as many as shared memory does: what outlives a
// strip is better not in registers, or ptxas spills it around every one of them. Thread 0 writes it, between two
// barriers.
struct Stand {
  Half half;  // or a value
  Value value;
  // Patches of the job, without their address: one that is read from memory would make every load of a strip a generic
  // one, as nvcc could not tell that it is shared memory.
  strips::Reach reach;
  strips::Lanes lanes;
  strips::Patch patch;
  int at_once, warp_floats, taps_at;  // channels of a warp's pass; floats of its patches and taps, where these begin
  // The tiles of a group of images (or, `wide`, of one image), in the passes of a matrix; a few channels of them.
  Tiling tiling;
  Tile tile;
  int64_t first_image, last_image, image;
  int index, base, first_channel, channels;
  bool opens, ends;  // a pass: its first tile, and none is left
};

// Counts the channels that a warp takes at once: as many as its lanes have strips for, but not more than its share.
FASTNAS_HD int channels_at_once(const Tiling& t, const strips::Reach& reach, int channels) {
  const int most = strips::lanes_of(t.tile, reach.strip()).channels, share = (channels + kWarps - 1) / kWarps;
  return most < share ? most : share;
}

// Keeps the compiler from fetching what follows before the strip's registers are free.
__device__ void fence_registers() { asm volatile("" ::: "memory"); }

// Begins a pass over the tiles, or goes on to the next; by all threads, with a barrier before and after.
__device__ void begin_pass(Stand& stand, int base) {
  __syncthreads();
  if (threadIdx.x == 0) {
    stand.image = stand.first_image, stand.index = 0, stand.base = base, stand.opens = true;
    stand.ends = stand.image >= stand.last_image;
    stand.tile = tile_at(stand.tiling, stand.image, 0);
  }
  __syncthreads();
}
__device__ void go_on(Stand& stand) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (++stand.index == stand.tiling.count()) stand.index = 0, ++stand.image;
    stand.opens = false, stand.ends = stand.image >= stand.last_image;
    stand.tile = tile_at(stand.tiling, stand.image, stand.index);
    strips::place(stand.patch, stand.reach, stand.tile.row, stand.tile.col);
  }
  __syncthreads();
}

// Finds this warp's patches and taps; `patches` are those of the first warp.
__device__ strips::Patch own_patch(const Stand& stand, float* patches) {
  strips::Patch patch = stand.patch;
  patch.data = patches + warp_index() * stand.warp_floats;
  return patch;
}
__device__ float* own_taps(const Stand& stand, float* patches) {
  return patches + warp_index() * stand.warp_floats + stand.taps_at;
}

// Says where the parts of a block's dynamic shared memory lie: a tile, sums of pieces, and for each warp its patches
// and taps. Another tile, of dy or of what a strided skip reads, lies over the patches: with a place of its own half as
// many blocks would fit on a multiprocessor, and warps wait for memory and each other most of the time.
struct Space {
  float *tile, *sums, *patches, *other;
  __device__ Space(const Gather& call, float* shared)
      : tile(shared), sums(tile + call.tile_floats), patches(sums + call.sum_floats), other(patches) {}
};

// Sets a block to a job: the tiles it walks, and the patches if it convolves or pools (`reach`, of planes `from`).
__device__ void stand_at(const Plan& plan, const Gather& call, const Space& space, Stand& stand, bool patches,
                         const strips::Reach& reach, Grid from) {
  if (threadIdx.x == 0) {
    stand.tiling = call.wide ? plan.strips : plan.tiling;
    stand.first_image = call.wide ? blockIdx.x : plan.first_image(int(blockIdx.x));
    stand.last_image = call.wide ? blockIdx.x + 1 : plan.first_image(int(blockIdx.x) + 1);
    stand.first_channel = int(blockIdx.z) * kMostFusedChannels;
    stand.channels = call.wide ? min(kMostFusedChannels, plan.C - stand.first_channel) : plan.C;
    stand.reach = reach, stand.warp_floats = call.warp_floats;
    stand.lanes = strips::lanes_of(stand.tiling.tile, reach.strip());
    stand.at_once = channels_at_once(stand.tiling, reach, stand.channels);
    stand.patch = strips::patch_of(reach, stand.tiling, from, nullptr);
    stand.taps_at = stand.at_once * stand.patch.plane;
  }
  __syncthreads();
  if (patches && (plan.fused || call.wide)) strips::clear(own_patch(stand, space.patches), stand.at_once);
  else if (call.two_tiles) clear_tails(stand.tiling, stand.channels, space.other);
  clear_tails(stand.tiling, stand.channels, space.tile);
}

FASTNAS_HD bool is_pool(const Value& value) { return value.made == Made::average || value.made == Made::maximum; }
FASTNAS_HD strips::Reach reach_of(const Value& pool) { return {3, 1, pool.stride, false}; }

}  // namespace
}  // namespace fastnas::cuda
