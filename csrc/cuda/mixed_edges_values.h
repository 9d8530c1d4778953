// Computes values that are no convolutions, pools, strided skips and the states themselves, tile by tile, and sums over
// all images what their terms need.
#pragma once

#include "mixed_edges_fold.h"
#include "mixed_edges_pools.h"
#include "mixed_edges_stand.h"

namespace fastnas::cuda {
namespace {

// --- pools into a tile -------------------------------------------------------------------------------------

// Computes the strip of one lane of a pool, and, where backward asks, the winners, straight to memory.
template <int S>
__device__ void pool_strip(const Value& value, const strips::Patch& patch, const strips::Strip& strip, const Tile& tile,
                           Grid shape, int64_t plane, float* to) {
  const strips::Place at{(tile.row + strip.row) * S, (tile.col + strip.col) * S, patch.from};
  const float* from = patch.at(strip.channel, at.row, at.col);
  const int cols = tile.cols - strip.col;
  const auto put_row = [&](int r, float (&z)[strips::kSide<S>]) {
    if (strip.row + r >= shape.rows) return;
    float* const row = to + (strip.row + r) * shape.cols + strip.col;
#pragma unroll
    for (int q = 0; q < strips::kSide<S>; ++q) z[q] = strip.row + r < tile.rows && q < cols ? z[q] : 0.0f;
#pragma unroll
    for (int q = 0; q < strips::kSide<S>; q += 4)  // a tile has a multiple of four columns
      if (strip.col + q < shape.cols) strips::put_quad(row + q, make_float4(z[q], z[q + 1], z[q + 2], z[q + 3]));
  };
  if (value.made == Made::average) return strips::average<S>(from, patch.pitch, at, put_row);
  if (!value.winner) return strips::highest<S>(from, patch.pitch, at, put_row);
  // Spelled out: unoptimised, nvcc takes a name for this array's type for one of variable length.
  const auto put_winners = [&](int r, float (&z)[strips::kSide<S>], float (&winner)[strips::kSide<S>]) {
    put_row(r, z);
    if (strip.row + r >= tile.rows) return;
    Planes won = value.z;
    won.data = value.winner;
    const int64_t first = plane + int64_t(tile.row + strip.row + r) * won.grid.cols + tile.col + strip.col;
#pragma unroll
    for (int q = 0; q < strips::kSide<S>; q += 4)
      if (q < cols)
        put_quad(won, first + q, min(4, cols - q), {{winner[q], winner[q + 1], winner[q + 2], winner[q + 3]}});
  };
  strips::maximum<S>(from, patch.pitch, at, put_winners);
}

// Computes a pool of the stand's channels over its tile, warp by warp like convolve_tile.
__device__ __forceinline__ void pool_tile(int C, const Stand& stand, float* to, float* patches) {
  const Value& value = stand.value;
  const Tiling& t = stand.tiling;
  const strips::Strip strip = strips::strip_of_lane(stand.lanes, t.tile, stand.reach.strip());
  const strips::Patch patch = own_patch(stand, patches);
  for (int c = warp_index() * stand.at_once; c < stand.channels; c += kWarps * stand.at_once) {
    const int count = min(stand.at_once, stand.channels - c), own = c + strip.channel;
    strips::stage(value.x, stand.tile.image, stand.first_channel + c, count, patch);
    strips::wait_staged();
    if (!strip.inside || strip.channel >= count) continue;
    const int64_t plane = (stand.tile.image * C + stand.first_channel + own) * t.grid.pixels();
    if (value.stride == 1) pool_strip<1>(value, patch, strip, stand.tile, t.tile, plane, to + own * t.pitch);
    else pool_strip<2>(value, patch, strip, stand.tile, t.tile, plane, to + own * t.pitch);
  }
}

// --- values ------------------------------------------------------------------------------------------------

// Brings a value's tile into shared memory: z of a pool or a strided skip, or the state. For wide cells the pools lie
// in memory already.
__device__ __forceinline__ void bring_value(const Plan& plan, const Gather& call, const Stand& stand,
                                            const Space& space) {
  const Value& value = stand.value;
  const Tiling& t = stand.tiling;
  float* const z = space.tile;
  if (value.made == Made::strided) {
    const int half = plan.C / 2;
    for (int part = 0; part < 2; ++part) {
      load_strided(plan, t, value, stand.tile, part, space.other);
      __syncthreads();
      const int first = part * half, last = part ? plan.C : half;
      if (plan.tensor) product_into_tile<TensorCores>(plan, t, value.matrix, space.other, plan.C, z, first, last);
      else product_into_tile<CudaCores>(plan, t, value.matrix, space.other, plan.C, z, first, last);
      __syncthreads();
    }
  } else if (is_pool(value) && (plan.fused || call.wide)) {
    pool_tile(plan.C, stand, z, space.patches);
    __syncthreads();
  } else {
    load_plainly(plan, t, value.z, stand.tile, z);
    __syncthreads();
    return;
  }
  store_tile(t, stand.tile, stand.channels, z, value.z,
             stand.tile.image * value.z.image + stand.first_channel * plan.plane());
}

// Sums deviations of a tile's channel from the pivot, and their squares, over a warp, in fp64.
__device__ void sum_deviations(const Tiling& t, const Tile& tile, const float* channel, float pivot, double& sum,
                               double& squares) {
  sum = squares = 0;
  for (int q = lane_index(); q < t.quads(); q += 32) {
    const Place p = place_at(t, tile, 0, q);
    const Quad quad = quad_at(channel + p.pixel);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const double d = k < p.count ? double(quad.v[k]) - double(pivot) : 0.0;
      sum += d, squares += d * d;
    }
  }
  sum = warp_total(sum), squares = warp_total(squares);
}

// Adds a tile to the moments of a group, a warp per four channels: about a pivot, the first value that the group has of
// the channel. Where the squares vanish or overflow in fp32 the warp sums the tile again in fp64.
__device__ void add_moments(const Plan& plan, const Value& value, const Tile& tile, const float* z, bool opens) {
  const Tiling& t = plan.tiling;
  const double count = double(tile.rows * tile.cols);
  double* const parts = value.parts + int64_t(blockIdx.x) * 3 * plan.C;
  for (int first = kSumsAtOnce * warp_index(); first < plan.C; first += kSumsAtOnce * kWarps) {
    const float* channel[kSumsAtOnce];
    float pivot[kSumsAtOnce], sum[kSumsAtOnce] = {}, squares[kSumsAtOnce] = {};
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kSumsAtOnce; ++c) {
      const int own = min(first + c, plan.C - 1);
      channel[c] = z + own * t.pitch, pivot[c] = opens ? *channel[c] : float(parts[own]);
    }
    for (int q = lane_index(); q < t.quads(); q += 32) {
      const Place p = place_at(t, tile, 0, q);
#pragma unroll
      for (int c = 0; c < kSumsAtOnce; ++c) {
        const Quad quad = quad_at(channel[c] + p.pixel);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float d = k < p.count ? quad.v[k] - pivot[c] : 0.0f;
          sum[c] += d, squares[c] += d * d;
        }
      }
    }
    double sums[kSumsAtOnce][2];
#pragma unroll
    for (int c = 0; c < kSumsAtOnce; ++c)
      sums[c][0] = warp_total(double(sum[c])), sums[c][1] = warp_total(double(squares[c]));
#pragma unroll
    for (int c = 0; c < kSumsAtOnce; ++c) {  // all lanes have the same sums
      if (!squares_fit_fp32(moments_of_sums(count, double(pivot[c]), sums[c][1], sums[c][0])))
        sum_deviations(t, tile, channel[c], pivot[c], sums[c][0], sums[c][1]);
      if (lane_index() != c || first + c >= plan.C) continue;
      double* const own = parts + first + c;
      if (opens) own[0] = pivot[c], own[plan.C] = sums[c][0], own[2 * plan.C] = sums[c][1];
      else own[plan.C] += sums[c][0], own[2 * plan.C] += sums[c][1];
    }
  }
}

// Adds what a tile gives to a channel's sums over dy, or begins them.
__device__ void put_dots(const Plan& plan, const Plain& n, int channel, bool opens, const double (&sums)[3]) {
  double* const dots = n.dots + int64_t(blockIdx.x) * 3 * plan.C + channel;
  double before[3] = {};
#pragma unroll
  for (int k = 0; k < 3; ++k)
    if (!opens) before[k] = dots[k * plan.C];
#pragma unroll
  for (int k = 0; k < 3; ++k) dots[k * plan.C] = before[k] + sums[k];
}

constexpr int kQuadsAtOnce = 2;  // of each of four channels that a lane loads, all in flight together

// Adds a tile to a term's sums over dy, a warp per four channels: <dy, z - mean> and the sum of dy, or of a skip
// <dy, z>.
__device__ void add_dots(const Plan& plan, const Plain& n, const Tile& tile, const float* z, bool opens) {
  const Tiling& t = plan.tiling;
  const int plane = plan.out.pixels();
  const int64_t image = tile.image * plan.image();
  for (int first = kSumsAtOnce * warp_index(); first < plan.C; first += kSumsAtOnce * kWarps) {
    float mean[kSumsAtOnce] = {}, centred[kSumsAtOnce] = {}, sum[kSumsAtOnce] = {};
#pragma unroll
    for (int c = 0; c < kSumsAtOnce; ++c)
      if (n.normed) mean[c] = n.stats[min(first + c, plan.C - 1)];
    for (int q = lane_index(); q < t.quads(); q += 32 * kQuadsAtOnce) {
      Place places[kQuadsAtOnce];
      Quad dy[kQuadsAtOnce][kSumsAtOnce];
#pragma unroll
      for (int i = 0; i < kQuadsAtOnce; ++i) {
        places[i] = place_at(t, tile, 0, q + 32 * i);
        if (q + 32 * i >= t.quads()) places[i].count = 0;
#pragma unroll
        for (int c = 0; c < kSumsAtOnce; ++c) {
          const int at = min(first + c, plan.C - 1) * plane + places[i].offset;
          dy[i][c] = get_quad(n.dy, image + at, places[i].count);
        }
      }
#pragma unroll
      for (int i = 0; i < kQuadsAtOnce; ++i) {
        if (places[i].count == 0) continue;
#pragma unroll
        for (int c = 0; c < kSumsAtOnce; ++c) {
          const Quad zs = quad_at(z + min(first + c, plan.C - 1) * t.pitch + places[i].pixel);
#pragma unroll
          for (int k = 0; k < 4; ++k)  // dy is 0 outside of the image
            centred[c] += dy[i][c].v[k] * (zs.v[k] - mean[c]), sum[c] += dy[i][c].v[k];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kSumsAtOnce; ++c) {
      const double own = warp_total(double(centred[c])), all = warp_total(double(sum[c]));
      if (lane_index() == c && first + c < plan.C) put_dots(plan, n, first + c, opens, {own, all, n.normed ? 0 : own});
    }
  }
}

// Does the same where the term's noise counts, which is drawn again. Multiplicative noise after a batch norm makes its
// dy dy d, so the first two sums are of that; the third is what dL/dw needs.
__device__ void add_drawn_dots(const Plan& plan, const Plain& n, const Tile& tile, const float* z, bool opens) {
  const Tiling& t = plan.tiling;
  const bool multiplicative = is_multiplicative(plan.form);
  const Draw<float> draw = draw_of(plan, n);
  for (int c = warp_index(); c < plan.C; c += kWarps) {
    const float mean = n.normed ? n.stats[c] : 0.0f;
    const int64_t plane = (tile.image * plan.C + c) * plan.plane();
    float centred = 0, sum = 0, other = 0;
    for (int q = lane_index(); q < t.quads(); q += 32) {
      const Place p = place_at(t, tile, c, q);
      const Quad all_dy = get_quad(n.dy, plane + p.offset, p.count), zs = quad_at(z + c * t.pitch + p.pixel);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k >= p.count) continue;
        float dy = all_dy.v[k];
        const float d = draw.element(uint64_t(plane + p.offset + k));
        if (!n.normed) other += dy * mixed_value(multiplicative, zs.v[k], d);
        else if (multiplicative) dy *= d;
        else other += dy * d;
        centred += dy * (zs.v[k] - mean), sum += dy;
      }
    }
    const double totals[3] = {warp_total(double(centred)), warp_total(double(sum)), warp_total(double(other))};
    if (lane_index() == 0) put_dots(plan, n, c, opens, totals);
  }
}

// A plain skip's noise counts only for dL/dw, that of a normed one also where it scales dy.
__device__ void add_dots_of(const Plan& plan, const Plain& n, const Tile& tile, const float* z, bool opens) {
  if (n.noisy && (plan.dw || (is_multiplicative(plan.form) && n.normed))) add_drawn_dots(plan, n, tile, z, opens);
  else add_dots(plan, n, tile, z, opens);
}

// Computes a value over a group of images and sums what its terms need: moments forward, sums over dy on the way back.
__device__ __forceinline__ void gather_value(const Plan& plan, const Gather& call, const Space& space, Stand& stand) {
  const Value& value = stand.value;
  for (begin_pass(stand, 0); !stand.ends; go_on(stand)) {
    bring_value(plan, call, stand, space);
    if (call.wide) continue;
    if (value.parts) add_moments(plan, value, stand.tile, space.tile, stand.opens);
    for (int k = value.first_plain; plan.backward && k < value.last_plain; ++k)
      add_dots_of(plan, plan.plains.all[plan.readers[k]], stand.tile, space.tile, stand.opens);
  }
  if (call.wide || !is_last_block(value.done, gridDim.x)) return;
  for (int k = value.first_plain; k < value.last_plain; ++k) {
    const Plain& n = plan.plains.all[plan.readers[k]];
    if (plan.backward) fold_dots(plan, n);
    else fold_plain(plan, value, n);
  }
}

// Loads dL/dz of a strided skip, which its one term makes of dy and z.
__device__ void load_strided_gradient(const Plan& plan, const Value& value, const Tile& tile, float* to) {
  const Tiling& t = plan.tiling;
  const Plain& n = plan.plains.all[plan.readers[value.first_plain]];
  for (int i = int(threadIdx.x); i < plan.C * t.quads(); i += kThreads) {
    const Place p = place_of_quad(t, tile, i / t.quads(), i % t.quads());
    const int64_t at = tile.image * plan.image() + p.channel * plan.plane() + p.offset;
    Quad z = get_quad(value.z, at, p.count);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < p.count) z.v[k] = plain_gradient(plan, n, z.v[k], at + k, p.channel);
    store_quad(to + p.channel * t.pitch + p.pixel, z);
  }
}

// Gathers partial sums of dz relu(x)^T of a part of a strided skip, for dL/dW. All C rows are summed, the fold takes
// the part's: the pieces of a cross matrix are laid out for [C][C], and strided skips are few.
__device__ void gather_strided(const Plan& plan, int part, const Space& space, Stand& stand) {
  const Value& value = stand.value;
  float* const sums = value.partial + int64_t(part) * plan.groups * plan.partial_size();
  for (int base = 0; base < cross_pieces(plan); base += pieces_of_a_pass(plan)) {
    with_cross(plan, space.sums, base, [](auto product) { product.clear(); });
    for (begin_pass(stand, base); !stand.ends; go_on(stand)) {
      load_strided(plan, stand.tiling, value, stand.tile, part, space.other);
      load_strided_gradient(plan, value, stand.tile, space.tile);
      __syncthreads();
      with_cross(plan, space.sums, base,
                 [&](auto product) { product.add(plan, stand.tiling, space.tile, space.other); });
    }
    with_cross(plan, space.sums, base,
               [&](auto product) { product.store(plan, sums + blockIdx.x * plan.partial_size()); });
  }
  const auto merge = [&](const Parts& parts) { merge_plainly(plan, parts); };
  if (merges_all(plan, sums, value.reduce_done + part * kCountersOfSum, merge)) fold_strided(plan, value, part, sums);
}

}  // namespace
}  // namespace fastnas::cuda
