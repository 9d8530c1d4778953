// Computes the gradients behind the depthwise convolutions of mixed_edges: dL/dv of second halves, and in one launch
// dL/dx of a state and dL/dD of all halves that leave it.
//
// All of it is done by warps with a strip a lane, as forward's convolutions are (mixed_edges_strips.h). A block of dx
// has one group of channels of one tile. Its four warps share the halves and pools that leave the state, each adds
// what it has in registers, and the block adds the four and writes dx, once. With a warp to a tile there would be 128
// of them for a state of 64 images of 64 channels, 8x8, on 132 multiprocessors. A warp of dL/dD has some channels of
// a group of images, and all taps in registers until the last image.
#include "mixed_edges_fold.h"
#include "mixed_edges_pools.h"
#include "mixed_edges_taps.h"

namespace fastnas::cuda {
namespace {

// Says what a launch of gradients_kernel is about: a state; the tilings of the outputs' grid in which dL/dD of halves
// of stride 1 and 2 is summed; blocks of dx, and for each half; floats of shared memory for each warp.
struct Gradients {
  Source source;
  Tiling taps[2];
  int dx_blocks, taps_blocks, half_blocks, warp_floats;  // half_blocks: of dL/dD and dL/dW of a half
};

// grid (parts of all images by kWarps, halves): computes dL/dv of second halves, through the relu before them, kept in
// their first halves. v is the half's own input, so it is the mask, too.
__global__ void __launch_bounds__(kThreads)
    dv_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Tiling t, int first, int warp_floats) {
  const Half* const job = plan.halves.at(first + int(blockIdx.y));
  if (!is_wanted(job, Which::second)) return;
  DYNAMIC_SHARED(float, shared);
  float* const space = shared + warp_index() * warp_floats;
  const Part part = part_at(plan, t, blockIdx.x * kWarps + warp_index());
  if (part.tile.image >= plan.images) return;
  float acc[8][8] = {};
  int cleared = 0;
  add_transposed<false>(plan, *job, t, part, space, cleared, acc);
  mask(job->in, t, part, space, acc);
  put_part(t, part, acc, space);
  __syncwarp();
  const Planes dv = plan.own(job[-1].dv);  // the first half comes just before
  const int64_t at = part.tile.image * dv.image + part.first * plan.plane();
  int channel = 0;
  for (int quad = lane_index();; quad += 32) {
    for (; quad >= t.quads(); quad -= t.quads()) ++channel;
    if (channel >= part.channels) return;
    const Place p = place_at(t, part.tile, channel, quad);
    put_quad(dv, at + channel * plan.plane() + p.offset, p.count, quad_at(space + channel * t.pitch + p.pixel));
  }
}

// --- the gradient of a state ---------------------------------------------------------------------------------

// Adds what strided skips give: a part of their gradient reaches every second pixel, from (part, part) on.
__device__ __forceinline__ void add_strided(const Plan& plan, const Value& value, const Tiling& t, const Part& part,
                                            float (&acc)[8][8]) {
  const Spot spot = spot_of_lane(t, part);
  if (!spot.exists) return;
  const int row = spot.row / 2, col = spot.col / 2, count = min(4, plan.out.cols - col);
  const int64_t at = part.tile.image * plan.image() + (part.first + spot.channel) * plan.plane() +
                     int64_t(row) * plan.out.cols + col;
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const Planes dx = plan.own(value.dx + odd * plan.images * plan.image(), DType::f32);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (row + r >= plan.out.rows) continue;
      const Quad quad = get_quad(dx, at + r * plan.out.cols, count);
#pragma unroll
      for (int q = 0; q < 4; ++q) acc[2 * r + odd][2 * q + odd] += quad.v[q];
    }
  }
}

template <int S>
__device__ __forceinline__ void pool_back(const float* dz, const float* winner, int pitch, strips::Edges edges,
                                          float (&acc)[8][8]) {
  if (winner) strips::maximum_back<S>(dz, winner, pitch, edges, acc);
  else strips::average_back<S>(dz, pitch, edges, acc);
}

// Adds what a pool gives: of an average each window's share, of a maximum all of dz to the pixel that won. The winners
// of a maximum are staged beside dz, of half of the channels at a time, so that they need no more space than a half.
__device__ __forceinline__ void add_pool(const Plan& plan, const Value& value, const Tiling& t, const Part& part,
                                         float* space, float (&acc)[8][8]) {
  const strips::Reach reach{3, 1, value.stride, true};
  const int at_once = value.winner ? max(1, part.lanes.channels / 2) : part.lanes.channels;
  strips::Patch patch = strips::patch_of(reach, t, plan.out, space);
  const Spot spot = spot_of_lane(t, part);
  const int apart = at_once * patch.plane, row = reach.below(spot.row), col = reach.below(spot.col);
  __syncwarp();
  strips::clear(patch, value.winner ? 2 * at_once : at_once);
  strips::place(patch, reach, part.tile.row, part.tile.col);
  for (int begin = 0; begin < part.channels; begin += at_once) {
    const int count = min(at_once, part.channels - begin), own = spot.channel - begin;
#pragma unroll 1
    for (int k = 0; k < (value.winner ? 2 : 1); ++k) {
      strips::Patch to = patch;
      to.data += k * apart;
      strips::stage(plan.own(k ? value.winner : value.dz, DType::f32), part.tile.image, part.first + begin, count, to);
    }
    strips::wait_staged();
    if (!spot.exists || own < 0 || own >= count) continue;
    const float* const dz = patch.at(own, row, col);
    const float* const winner = value.winner ? dz + apart : nullptr;
    const strips::Edges edges = strips::edges_of(reach, patch, row);
    if (value.stride == 1) pool_back<1>(dz, winner, patch.pitch, edges, acc);
    else pool_back<2>(dz, winner, patch.pitch, edges, acc);
  }
}

// Adds all that a warp has to add. The i-th half is done by warp i + i / 4, as neighbours in the table have kernels of
// different size; pools begin with those warps that an odd number of edges leaves with the smaller kernels. The mask
// covers the convolutions and strided skips, which read relu(x), but not the pools, which read x itself.
__device__ __forceinline__ void add_all(const Plan& plan, const Source& s, const Part& part, float* space,
                                        float (&acc)[8][8]) {
  int turn = 0, cleared = 0;
  bool masks = false;
  const auto is_mine = [](int i) { return i % kWarps == warp_index(); };
  each_wanted(
      s.halves, [&](int k) { return is_wanted(plan.halves.at(k), Which::first); },
      [&](int k) {
        if (const int i = turn++; !is_mine(i + i / kWarps)) return;
        add_transposed<true>(plan, *plan.halves.at(k), s.tiling, part, space, cleared, acc);
        masks = true;
      });
  const auto is_made = [&](int k, bool strided) {
    const Value* const value = plan.values.at(k);
    return value && value->made != Made::state && strided == (value->made == Made::strided);
  };
  turn = 0;
  each_wanted(
      s.values, [&](int k) { return is_made(k, true); },
      [&](int k) {
        if (!is_mine(turn++)) return;
        add_strided(plan, *plan.values.at(k), s.tiling, part, acc);
        masks = true;
      });
  if (masks) mask(s.x, s.tiling, part, space, acc);
  turn = 0;
  each_wanted(
      s.values, [&](int k) { return is_made(k, false); },
      [&](int k) {
        if (const int i = turn++; is_mine(2 * i + i / 2))
          add_pool(plan, *plan.values.at(k), s.tiling, part, space, acc);
      });
}

constexpr int kHeld = 4;  // quads of a thread whose loads are in flight at once: all that it has of a tile

// Adds w dy of the plain skips, noisy or not, to the quads of a thread at `at` + offset[k] of [N, C, rows, cols].
__device__ __forceinline__ void add_skips(const Plan& plan, Range plains, int64_t at, const int (&offset)[kHeld],
                                          const int (&count)[kHeld], Quad (&dx)[kHeld]) {
  const bool multiplicative = is_multiplicative(plan.form);
  const auto is_skip = [&](int k) {
    const Plain* const n = plan.plains.at(k);
    return n && !n->normed;
  };
  each_wanted(plains, is_skip, [&](int i) {
    const Plain& n = *plan.plains.at(i);
    const Planes from = plan.own(n.dy.data, DType::f32);
    const float w = plan.w[n.weight];
    Quad dy[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) dy[k] = get_quad(from, at + offset[k], count[k]);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      float4 d = make_float4(1, 1, 1, 1);
      if (n.noisy && multiplicative) d = noise_of(plan, n, at + offset[k]);
      dx[k].v[0] += w * (dy[k].v[0] * d.x), dx[k].v[1] += w * (dy[k].v[1] * d.y);
      dx[k].v[2] += w * (dy[k].v[2] * d.z), dx[k].v[3] += w * (dy[k].v[3] * d.w);
    }
  });
}

// Adds the tiles of the block's warps, in their order, then what needs no windows, and writes dx.
__device__ __forceinline__ void finish(const Plan& plan, const Source& s, const Part& part, const float* shared,
                                       int warp_floats) {
  const Tiling& t = s.tiling;
  const int plane = s.x.grid.pixels(), quads = t.quads();
  const bool is_node = s.dout.data, aligned = reinterpret_cast<size_t>(s.dx) % 16 == 0 && s.x.grid.cols % 4 == 0;
  const Planes dx{s.dx, int64_t(plan.C) * plane, s.x.grid, is_node ? DType::f32 : plan.type, aligned};
  const int64_t at = part.tile.image * dx.image + int64_t(part.first) * plane;
  for (int begin = 0; begin < part.channels * quads; begin += kHeld * kThreads) {
    int offset[kHeld], count[kHeld];
    Quad sum[kHeld] = {};
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = begin + k * kThreads + int(threadIdx.x), channel = i / quads;
      const Place p = place_at(t, part.tile, channel, i % quads);
      offset[k] = channel * plane + p.offset, count[k] = channel < part.channels ? p.count : 0;
      if (count[k] == 0) continue;
      const float* const from = shared + channel * t.pitch + p.pixel;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const Quad quad = quad_at(from + warp * warp_floats);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[k].v[j] += quad.v[j];
      }
    }
    add_skips(plan, s.plains, at, offset, count, sum);
    const int64_t dout = part.tile.image * s.dout.image + int64_t(part.first) * plane;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const Quad quad = is_node ? get_quad(s.dout, dout + offset[k], count[k]) : Quad{};
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[k].v[j] += quad.v[j];
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) put_quad(dx, at + offset[k], count[k], sum[k]);
  }
}

__device__ __forceinline__ void state_gradient(const Plan& plan, const Gradients& call, float* shared) {
  SHARED(Part, part, 1);  // where it takes no registers: the sums leave few
  const Tiling& t = call.source.tiling;
  if (threadIdx.x == 0) part[0] = part_at(plan, t, blockIdx.x);
  __syncthreads();
  float* const space = shared + warp_index() * call.warp_floats;
  float acc[8][8] = {};
  add_all(plan, call.source, part[0], space, acc);
  put_part(t, part[0], acc, space);
  __syncthreads();
  finish(plan, call.source, part[0], shared, call.warp_floats);
}

__device__ __forceinline__ void taps_gradient(const Plan& plan, const Half& h, const Gradients& call, int block,
                                              float* space) {
  const Tiling& t = call.taps[h.stride - 1];
  const int blocks = blocks_of_taps(plan, t, h.stride);
  if (block >= blocks) return;
  const int a_group = channel_groups(plan.C, t, h.stride == 1 ? 8 : 4), index = block * kWarps + warp_index();
  const int group = index / a_group, channels_at = index % a_group;
  if (group < plan.tap_groups()) sum_taps(plan, h, t, group, channels_at, space);
  if (is_last_block(h.taps_done, unsigned(blocks))) fold_taps(plan, h);
}

// grid (blocks of dx, then blocks of dL/dD and of dL/dW half by half): they need du, but not each other. dx comes
// first, because its blocks are few and long.
__global__ void __launch_bounds__(kThreads, 3)
    gradients_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Gradients call) {
  DYNAMIC_SHARED(float, shared);
  const int index = int(blockIdx.x) - call.dx_blocks;
  if (index < 0) return state_gradient(plan, call, shared);
  const Half* const h = plan.halves.at(call.source.halves.first + index / call.half_blocks);
  const int own = index % call.half_blocks, rows = kRowsAtOnce * (own - call.taps_blocks) * kWarps;
  if (!h) return;
  if (rows < 0) return taps_gradient(plan, *h, call, own, shared + warp_index() * call.warp_floats);
  if (const int first = rows + kRowsAtOnce * warp_index(); first < plan.C)
    fold_pointwise_gradient(plan, *h, first, shared);
}

// --- launches ------------------------------------------------------------------------------------------------

// Counts the floats that a warp needs for D^T du in a tiling, and then to hand its tile on. Of a sampled path the host
// does not know which candidates run, so it is for all of them.
int transposing_floats(const std::vector<Half>& halves, const Tiling& t, bool second) {
  int most = std::max(strips::lanes_of(t.tile, 8).channels * t.pitch, strips::patch_floats(pixels_alone(), t));
  for (const Half& h : halves) {
    const strips::Reach reach{h.size, h.dilation, h.stride, true};
    if (h.second == second) most = std::max(most, strips::patch_floats(reach, t) + strips::tap_floats(reach, t));
  }
  return most;
}
int parts_of(const Plan& plan, const Tiling& t) {
  return int(plan.images) * t.count() * channel_groups(plan.C, t, 8);
}

int dx_floats(const std::vector<Half>& halves, const std::vector<Value>& values, const Tiling& t) {
  int most = transposing_floats(halves, t, false);
  for (const Value& value : values) {
    const strips::Reach reach{3, 1, value.stride, true};
    if (value.made == Made::average || value.made == Made::maximum)
      most = std::max(most, strips::patch_floats(reach, t) * (strips::lanes_of(t.tile, 8).channels == 1 ? 2 : 1));
  }
  return most;
}
int taps_floats(const Plan& plan, const std::vector<Half>& halves, const Tiling (&taps)[2]) {
  int most = 0;
  for (const Half& h : halves) {
    const Tiling& t = taps[h.stride - 1];
    const strips::Reach reach{h.size, h.dilation, h.stride, false};
    const int du = strips::patch_of(pixels_alone(), t, plan.out, nullptr).plane;
    most = std::max(most, strips::patch_floats(reach, t) + strips::lanes_of(t.tile, reach.strip()).channels * du);
  }
  return most;
}

}  // namespace

void launch_dv(Launcher& run, Range states) {
  const Plan& plan = run.plan();
  const Range halves = run.planner.halves_of(states);
  const Tiling t = strip_tiling(plan.out, kMostSourcePixels, 8);
  const int floats = transposing_floats(run.planner.all_halves(states), t, true);
  const int blocks = (parts_of(plan, t) + kWarps - 1) / kWarps;
  run(dv_kernel, dim3(unsigned(blocks), unsigned(halves.count())), sizeof(float) * size_t(kWarps) * floats, t,
      halves.first, floats);
}

void launch_state_gradients(Launcher& run, int state) {
  const Plan& plan = run.plan();
  const Range here{state, state + 1};
  const std::vector<Half> halves = run.planner.all_halves(here);
  Gradients call{};
  call.source = run.planner.sources[state];
  call.taps[0] = strip_tiling(plan.out, kMostSourcePixels, 8);
  call.taps[1] = strip_tiling(plan.out, kMostSourcePixels / 4, 4);  // as many pixels of the input
  if (call.source.wanted) {
    call.dx_blocks = parts_of(plan, call.source.tiling);
    call.warp_floats = dx_floats(halves, run.planner.all_values(here), call.source.tiling);
  }
  if (plan.wants_params) {
    for (const Half& h : halves)
      call.taps_blocks = std::max(call.taps_blocks, blocks_of_taps(plan, call.taps[h.stride - 1], h.stride));
    call.half_blocks = call.taps_blocks;
    // Outside of training dL/dW is no product, and the gather's last block has made it.
    if (plan.training) call.half_blocks += (plan.C + kRowsAtOnce * kWarps - 1) / (kRowsAtOnce * kWarps);
    call.warp_floats = std::max({call.warp_floats, taps_floats(plan, halves, call.taps), kFoldFloats / kWarps});
  }
  const int blocks = call.dx_blocks + call.source.halves.count() * call.half_blocks;
  run(gradients_kernel, dim3(unsigned(blocks)), sizeof(float) * size_t(kWarps) * call.warp_floats, call);
}

}  // namespace fastnas::cuda
