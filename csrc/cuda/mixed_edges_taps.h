// Computes dL/dD of mixed_edges, the gradients of the depthwise kernels: sums over images and pixels of du times the
// input shifted by the tap. A warp has a few channels of a group of images, and all their taps in registers until the
// last image, so it reads input and du once.
#pragma once

#include "mixed_edges_parts.h"

namespace fastnas::cuda {
namespace {

constexpr int kMostTaps = 49;  // 7x7

// Adds du times the shifted input of one strip to the taps.
struct CorrelatedStrip {
  const float *in, *du;
  int pitch, du_pitch;
  strips::Edges edges;
  float (&dtap)[kMostTaps];
  template <int K, int D, int S> __device__ __forceinline__ void run() const {
    float own[K * K];
#pragma unroll
    for (int k = 0; k < K * K; ++k) own[k] = dtap[k];
    const auto load = [&](int row, auto& g) { strips::get_strip(g, du + row * du_pitch, du_pitch); };
    strips::correlate<K, D, S>(in, pitch, edges, load, own);
#pragma unroll
    for (int k = 0; k < K * K; ++k) dtap[k] = own[k];
  }
};

// Sums the taps of a warp's channels over one tile, from patches of the input and of du.
__device__ __forceinline__ void add_taps(const Plan& plan, const Half& h, const strips::Reach& reach, const Tiling& t,
                                         const Part& part, strips::Patch in, strips::Patch du,
                                         float (&dtap)[kMostTaps]) {
  strips::place(in, reach, part.tile.row, part.tile.col);
  strips::place(du, pixels_alone(), part.tile.row, part.tile.col);
  strips::stage(h.in, part.tile.image, part.first, part.channels, in);
  strips::stage(plan.own(h.du), part.tile.image, part.first, part.channels, du);
  strips::wait_staged();
  const Spot spot = spot_of_lane(t, part);
  if (!spot.exists) return;
  const int row = reach.below(spot.row), col = reach.below(spot.col);
  const CorrelatedStrip correlated{in.at(spot.channel, row, col),
                                   du.at(spot.channel, spot.row, spot.col),
                                   in.pitch,
                                   du.pitch,
                                   strips::edges_of(reach, in, row),
                                   dtap};
  strips::with_kernel(reach.size, reach.dilation, reach.stride, correlated);
}

// Sums the taps of some channels over a few groups of images, and over the lanes of each channel, by a butterfly whose
// order is fixed; writes [C][taps].
__device__ __forceinline__ void sum_taps(const Plan& plan, const Half& h, const Tiling& t, int group, int channels_at,
                                         float* space) {
  const strips::Reach reach{h.size, h.dilation, h.stride, false};
  Part part = part_of(plan, t, reach.strip(), {}, channels_at);
  const strips::Lanes& lanes = part.lanes;
  const strips::Patch in = strips::patch_of(reach, t, h.in.grid, space);
  const strips::Patch du = strips::patch_of(pixels_alone(), t, plan.out, space + lanes.channels * in.plane);
  strips::clear(in, lanes.channels);
  strips::clear(du, lanes.channels);
  float dtap[kMostTaps] = {};
  const int64_t last = plan.first_image(min(kGroupsOfTaps * (group + 1), plan.groups));
  for (int64_t image = plan.first_image(kGroupsOfTaps * group); image < last; ++image)
    for (int row = 0; row < t.grid.rows; row += t.tile.rows)
      for (int col = 0; col < t.grid.cols; col += t.tile.cols) {
        part.tile = {image, row, col, min(t.tile.rows, t.grid.rows - row), min(t.tile.cols, t.grid.cols - col)};
        add_taps(plan, h, reach, t, part, in, du, dtap);
      }
  const strips::Strip strip = strips::strip_of_lane(lanes, t.tile, part.strip);
  const int taps = h.taps_count(), channel = part.first + strip.channel;
  const bool writes = channel < plan.C && strip.row == 0 && strip.col == 0;
  float* const to = h.dtaps + group * plan.taps_size(taps) + channel * taps;
#pragma unroll
  for (int k = 0; k < kMostTaps; ++k) {
    if (k >= taps) break;
    for (int step = 16; step > 0; step /= 2)
      if (step < lanes.across() || step >= 32 >> lanes.down_bits)  // from a lane to another of its channel
        dtap[k] += __shfl_xor_sync(0xffffffffu, dtap[k], step);
    if (writes) to[k] = dtap[k];
  }
}

// Says whether a tap meets any row of the input, and not only the padding of a plane lower than the kernel reaches.
__device__ bool meets_input(const Plan& plan, const Half& h, int tap) {
  const int from = tap / h.size * h.dilation - h.pad();  // the row that it meets for the first row of the output
  const int first = from < 0 ? (h.stride - 1 - from) / h.stride : 0;
  return first < plan.out.rows && first * h.stride + from < h.in.grid.rows;
}

// Adds the groups in their order, in fp64, and rounds to the stored dtype, four taps at a time, as one block reads all
// there are: 200 KB of a 5x5 at 64 channels. Rows of padding were skipped, but eager multiplies du by their zeros: a
// tap that meets no others is NaN where du is not finite, as the tap in the centre tells, which meets all of du.
__device__ void fold_taps(const Plan& plan, const Half& h) {
  const int taps = h.taps_count(), count = plan.C * taps, size = int(plan.taps_size(taps));
  const auto sum_of = [&](int i) {
    double sum = 0;
    for (int g = 0; g < plan.tap_groups(); ++g) sum += double(__ldcg(h.dtaps + g * size + i));
    return sum;
  };
  for (int first = 4 * int(threadIdx.x); first < size; first += 4 * kThreads) {
    double sum[4] = {};
#pragma unroll 8
    for (int g = 0; g < plan.tap_groups(); ++g) {
      const float4 part = __ldcg(reinterpret_cast<const float4*>(h.dtaps + g * size + first));
      sum[0] += double(part.x), sum[1] += double(part.y), sum[2] += double(part.z), sum[3] += double(part.w);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = first + k, tap = i % taps;
      if (i >= count) return;
      put(h.dD, plan.type, i, float(meets_input(plan, h, tap) ? sum[k] : 0 * sum_of(i - tap + taps / 2)));
    }
  }
}

// Counts the blocks of a half's taps: its warps count groups of channels first, then groups of images.
FASTNAS_HD int blocks_of_taps(const Plan& plan, const Tiling& t, int stride) {
  return (plan.tap_groups() * channel_groups(plan.C, t, stride == 1 ? 8 : 4) + kWarps - 1) / kWarps;
}

}  // namespace
}  // namespace fastnas::cuda
