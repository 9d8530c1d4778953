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
  // Spelled out: unoptimised, nvcc takes a name for this array's type for one of variable length.
  const auto put_winners = [&](int r, float (&z)[strips::kSide<S>], float (&winner)[strips::kSide<S>]) {
    put_row(r, z);
    if (!value.winner || strip.row + r >= tile.rows) return;
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

// Sums deviations of a tile's channel from the pivot, and their squares, over a warp; sums are of the type of `zero`.
template <class A>
__device__ void sum_deviations(const Tiling& t, const Tile& tile, const float* channel, float pivot, A zero,
                               double (&sums)[2]) {
  A sum = zero, squares = zero;
  for (int q = lane_index(); q < t.quads(); q += 32) {
    const Place p = place_at(t, tile, 0, q);
    const Quad quad = quad_at(channel + p.pixel);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const A d = k < p.count ? A(quad.v[k]) - A(pivot) : zero;
      sum += d, squares += d * d;
    }
  }
  sums[0] = warp_total(double(sum)), sums[1] = warp_total(double(squares));
}

// Adds a tile to the moments of a group, a warp per channel: about a pivot, the first value that the group has of the
// channel. Where the squares vanish or overflow in fp32 the warp sums the tile again in fp64.
__device__ void add_moments(const Plan& plan, const Value& value, const Tile& tile, const float* z, bool opens) {
  const Tiling& t = plan.tiling;
  double* const parts = value.parts + int64_t(blockIdx.x) * 3 * plan.C;
  for (int c = warp_index(); c < plan.C; c += kWarps) {
    const float* channel = z + c * t.pitch;
    __syncwarp();
    const float pivot = opens ? channel[0] : float(parts[c]);
    double sums[2];
    sum_deviations(t, tile, channel, pivot, 0.0f, sums);
    const double count = double(tile.rows * tile.cols);
    if (!squares_fit_fp32(moments_of_sums(count, double(pivot), sums[1], sums[0])))  // all lanes or none
      sum_deviations(t, tile, channel, pivot, 0.0, sums);
    __syncwarp();
    if (lane_index() != 0) continue;
    if (opens) parts[c] = pivot, parts[plan.C + c] = sums[0], parts[2 * plan.C + c] = sums[1];
    else parts[plan.C + c] += sums[0], parts[2 * plan.C + c] += sums[1];
  }
}

constexpr int kQuadsAtOnce = 4;  // of a lane, whose loads are in flight together: a channel of a tile of 512 pixels

// Reads quads of a plane of floats that a lane has of a tile's channel, from its quad `first` on, 32 apart; where there
// is none the count is 0.
__device__ void get_quads(const Tiling& t, const Tile& tile, int channel, int first, const Planes& from, int64_t plane,
                          Place (&places)[kQuadsAtOnce], Quad (&quads)[kQuadsAtOnce]) {
  const float* const data = static_cast<const float*>(from.data) + plane;
#pragma unroll
  for (int i = 0; i < kQuadsAtOnce; ++i) {
    const int q = first + 32 * i;
    places[i] = place_at(t, tile, channel, q), quads[i] = {};
    if (q >= t.quads()) places[i].count = 0;
  }
  if (from.aligned) {  // a quad is inside of the image or it is not
#pragma unroll
    for (int i = 0; i < kQuadsAtOnce; ++i)
      if (places[i].count > 0) quads[i] = load_quad(data + places[i].offset);
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuadsAtOnce; ++i) quads[i] = get_quad(from, plane + places[i].offset, places[i].count);
}

// Adds a tile to a term's sums over dy, a warp per channel: <dy, z - mean>, the sum of dy, and what dL/dw needs of a
// noisy skip. Multiplicative noise after a batch norm makes its dy dy d, so the first two are sums of that. Draws are
// made again.
__device__ void add_dots(const Plan& plan, const Plain& n, const Tile& tile, const float* z, bool opens) {
  const Tiling& t = plan.tiling;
  const bool multiplicative = is_multiplicative(plan.form);
  // A plain skip's z counts only for dL/dw; the noise of a normed one counts also where it scales dy.
  const bool draws = n.noisy && (plan.dw || (multiplicative && n.normed));
  const Draw<float> draw = draws ? draw_of(plan, n) : Draw<float>(plan.form, 0, 0, 0, 0);
  double* const dots = n.dots + int64_t(blockIdx.x) * 3 * plan.C;
  for (int c = warp_index(); c < plan.C; c += kWarps) {
    const float mean = n.normed ? n.stats[c] : 0.0f;
    const int64_t plane = (tile.image * plan.C + c) * plan.plane();
    float centred = 0, sum = 0, other = 0;
    for (int first = lane_index(); first - lane_index() < t.quads(); first += kQuadsAtOnce * 32) {
      Place places[kQuadsAtOnce];
      Quad all_dy[kQuadsAtOnce];
      get_quads(t, tile, c, first, n.dy, plane, places, all_dy);
#pragma unroll
      for (int i = 0; i < kQuadsAtOnce; ++i) {
        const Place& p = places[i];
        if (p.count == 0) continue;
        const Quad zs = quad_at(z + c * t.pitch + p.pixel);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (k >= p.count) continue;
          float dy = all_dy[i].v[k];
          const float d = draws ? draw.element(uint64_t(plane + p.offset + k)) : 0.0f;
          if (!n.normed) other += dy * (draws ? mixed_value(multiplicative, zs.v[k], d) : zs.v[k]);
          else if (draws && multiplicative) dy *= d;
          else if (draws) other += dy * d;
          centred += dy * (zs.v[k] - mean), sum += dy;
        }
      }
    }
    const double totals[3] = {warp_total(double(centred)), warp_total(double(sum)), warp_total(double(other))};
    if (lane_index() != 0) continue;
    for (int k = 0; k < 3; ++k) dots[k * plan.C + c] = totals[k] + (opens ? 0.0 : dots[k * plan.C + c]);
  }
}

// Computes a value over a group of images and sums what its terms need: moments forward, sums over dy on the way back.
__device__ __forceinline__ void gather_value(const Plan& plan, const Gather& call, const Space& space, Stand& stand) {
  const Value& value = stand.value;
  for (begin_pass(stand, 0); !stand.ends; go_on(stand)) {
    bring_value(plan, call, stand, space);
    if (call.wide) continue;
    if (value.parts) add_moments(plan, value, stand.tile, space.tile, stand.opens);
    for (int k = value.first_plain; plan.backward && k < value.last_plain; ++k)
      add_dots(plan, plan.plains.all[plan.readers[k]], stand.tile, space.tile, stand.opens);
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
