// Runs mixed_edges backward on CUDA: state by state from the last; everything that leaves a state at once, so that
// the gradient of the state is complete and written once. u is computed again, or read where it was kept.
//
// The order of the launches follows from what needs a sum over all images. dy of every node that the state's edges
// enter is complete, as those nodes come later. (1) Pools, strided skips and their sums over dy; u; P = sum dy (u -
// mean u)^T of the final halves, folded to dL/dw, dL/dW and the matrices of dL/du. (2) du, and dv of the sep_convs
// through the transposed second convolution. (3) The same for their first halves, with dv in place of dy. (4) dL/dz
// of pools and strided skips, dx, and dL/dD from du. 19 launches a state. No two blocks add to one address; partial
// sums of groups of images are added in order by the folds.
#include "mixed_edges.h"

#include "mixed_edges_common.h"

namespace fastnas::cuda {
namespace {

// grid (groups, halves): gathers partial sums of P = sum dy (u - mean u)^T and of dy.
//
// Two tiles lie in shared memory, u and dy, so a tile of all channels takes twice what gather_kernel needs. u is
// centred by the exact mean: summing dy u^T and taking the means off afterwards would cancel.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) cross_kernel(Plan plan, int first, Which which) {
  const Half* const job = plan.halves.at(first + blockIdx.y);
  if (!is_wanted(job, which)) return;
  const Half& h = *job;
  DYNAMIC_SHARED(float, u);
  float* const dy = u + tile_floats(plan);
  const int C = plan.C, group = int(blockIdx.x);
  float* const sums = plan.partial + (int64_t(blockIdx.y) * plan.groups + group) * plan.partial_size();
  float* const dy_sums = sums + int64_t(C) * C;
  for (int c = int(threadIdx.x); c < C; c += kThreads) dy_sums[c] = 0;
  clear_tails(plan.tiling, C, u);
  clear_tails(plan.tiling, C, dy);
  const auto load = [&](const Tile& tile, bool) {
    load_u(plan, h, tile, h.shift, u);
    load_gradient(plan, h.dy, tile, dy);
  };
  cross_group<Units, M>(plan, group, dy, u, sums, load, [&] { add_channel_sums(plan, dy, dy_sums); });
}

// grid (halves, C / kWarps): makes dL/dW and what dL/du and dL/dw are made of, a warp per row of W.
//
// For row co: q = r <W_co, P_co>, from_dy = w r W_co, dL/dW_co = w M r (P_co - q r W_co S), and the factor w r^2 q
// with which the row enters B. B itself is a sum over all rows, and rows belong to different blocks, so it waits
// for the next launch. P is summed from the partial sums twice, for q and for dL/dW, rather than stored.
__global__ void __launch_bounds__(kThreads) fold_cross_kernel(Plan plan, int first, Which which) {
  const Half* const job = plan.halves.at(first + blockIdx.x);
  if (!is_wanted(job, which)) return;
  const Half& h = *job;
  const int C = plan.C, co = int(blockIdx.y) * kWarps + warp_index(), lane = lane_index();
  if (co >= C) return;
  const float* partial = plan.partial + int64_t(blockIdx.x) * plan.groups * plan.partial_size();
  const auto row = [&](int ci) { return double(get(h.pointwise, plan.wide, int64_t(co) * C + ci)); };
  const double samples = double(plan.samples()), scale = h.final ? double(plan.w[h.weight]) : 1.0;
  const double rstd = batch_rstd(double(h.stats[C + co]), plan.eps);
  const auto p_of = [&](int ci) {
    double sum = 0;
    for (int g = 0; g < plan.groups; ++g) sum += double(partial[g * plan.partial_size() + int64_t(co) * C + ci]);
    return sum / samples;
  };
  double q = 0;
  for (int ci = lane; ci < C; ci += 32) q += row(ci) * p_of(ci);
  q = warp_total(q) * rstd;
  for (int ci = lane; ci < C; ci += 32) {
    const double w = row(ci);
    h.from_dy[int64_t(co) * plan.width + ci] = float(folded(scale, rstd, w));
    if (!h.dW) continue;
    double ws = 0;
    for (int i = 0; i < C; ++i) ws += row(i) * double(h.gram[int64_t(i) * C + ci]);
    put(h.dW, plan.wide, int64_t(co) * C + ci, float(pointwise_gradient(scale, samples, rstd, q, p_of(ci), ws)));
  }
  if (lane != 0) return;
  double sum = 0;
  for (int g = 0; g < plan.groups; ++g) sum += double(partial[g * plan.partial_size() + int64_t(C) * C + co]);
  h.dy_mean[co] = sum / samples, h.q[co] = q, h.coefficient[co] = centring(scale, rstd, q);
}

// grid (halves, C / kWarps): makes -B and the constant of dL/du, a warp per row, and dL/dw.
//
// from_u = -B with B_ij = sum_co (w r^2 q)_co W_co,i W_co,j; du_bias = -A^T mean(dy), so that no kernel subtracts
// the mean of dy from dy; dL/dw = M sum q, by the one warp that has row 0.
__global__ void __launch_bounds__(kThreads) fold_centring_kernel(Plan plan, int first, Which which) {
  const Half* const job = plan.halves.at(first + blockIdx.x);
  if (!is_wanted(job, which)) return;
  const Half& h = *job;
  const int C = plan.C, i = int(blockIdx.y) * kWarps + warp_index(), lane = lane_index();
  if (i >= C) return;
  const auto W = [&](int co, int ci) { return double(get(h.pointwise, plan.wide, int64_t(co) * C + ci)); };
  for (int j = lane; j < C; j += 32) {
    double sum = 0;
    for (int co = 0; co < C; ++co)
      sum += h.coefficient[co] * W(co, i) * W(co, j);
    h.from_u[int64_t(i) * plan.width + j] = float(-sum);
  }
  double bias = 0, q = 0;
  for (int co = lane; co < C; co += 32) {
    bias -= double(h.from_dy[int64_t(co) * plan.width + i]) * h.dy_mean[co];
    q += h.q[co];
  }
  bias = warp_total(bias), q = warp_total(q);
  if (lane == 0) h.du_bias[i] = float(bias);
  if (lane == 0 && i == 0 && h.final && plan.dw) plan.dw[h.weight] = q * double(plan.samples());
}

// grid (tiles of all images, halves): computes dL/du = A^T dy - B (u - mean u) - A^T mean(dy), two products into
// one set of sums, written once. Reads dy (or dv) and u, writes du [N, C, rows, cols] in fp32.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) du_kernel(Plan plan, int first, Which which) {
  const Half* const job = plan.halves.at(first + blockIdx.y);
  if (!is_wanted(job, which)) return;
  const Half& h = *job;
  DYNAMIC_SHARED(float, u);
  float* const dy = u + tile_floats(plan);
  const Tile tile = tile_of_block(plan.tiling);
  clear_tails(plan.tiling, plan.C, u);
  clear_tails(plan.tiling, plan.C, dy);
  load_u(plan, h, tile, h.shift, u);
  load_gradient(plan, h.dy, tile, dy);
  __syncthreads();
  Product<Units, M> sum;
  sum.add(plan, h.from_dy, dy, plan.C);
  sum.add(plan, h.from_u, u, plan.C);
  sum.each_inside(plan, tile, [&](float value, int c, int at) {
    h.du[(tile.image * plan.C + c) * plan.out.pixels() + at] = value + h.du_bias[c];
  });
}

// --- depthwise convolutions, transposed ----------------------------------------------------------------------

// Adds D^T du of some channels over a tile of the input's grid to sum [channels][pixels] in shared memory.
//
// At stride 1 the transpose is the convolution with the taps turned by 180 degrees, so du is staged as a patch and
// the strips of forward run on it. At stride 2 few of each gradient's taps meet an output (3x3: 1 to 4 of 9), so du
// is read where it lies. The barriers: `space` may still be read by the half before, the patch must be there before
// it is read, and sum must be there before the caller reads other threads' parts of it.
__device__ void add_transposed(const Plan& plan, const Half& h, const Tiling& t, const Tile& tile, int first,
                               int channels, float* space, float* sum) {
  const Taps taps{h.taps, plan.wide, true, int64_t(first) * h.taps_count()};
  const Planes du{h.du, int64_t(plan.C) * plan.out.pixels(), plan.out, true};
  __syncthreads();
  if (h.stride == 1) {
    const Patch patch = patch_of(h, t, tile, space);
    stage(du, tile.image, first, channels, false, patch);
    __syncthreads();
    const Strips strips{patch, channels, t.tile.rows, t.tile.cols, tile, sum, t.tile.pixels(), t.tile.cols, true};
    with_kernel(h.size, h.dilation, 1, RunStrips{strips, taps});
    __syncthreads();
    return;
  }
  const int pixels = t.tile.pixels();
  for (int i = int(threadIdx.x); i < channels * pixels; i += kThreads) {
    const int c = i / pixels, at = pixel_offset(t, tile, i % pixels);
    if (at < 0) continue;
    const int row = at / t.grid.cols + h.pad(), col = at % t.grid.cols + h.pad();
    const float* from = h.du + tile.image * du.image + int64_t(first + c) * plan.out.pixels();
    float v = 0;
    for (int ky = 0; ky < h.size; ++ky) {
      const int r = row - ky * h.dilation;
      if (r < 0 || r % 2 || r / 2 >= plan.out.rows) continue;
      for (int kx = 0; kx < h.size; ++kx) {
        const int w = col - kx * h.dilation;
        if (w < 0 || w % 2 || w / 2 >= plan.out.cols) continue;
        v += get(h.taps, plan.wide, taps.first + c * h.taps_count() + ky * h.size + kx) *
             from[r / 2 * plan.out.cols + w / 2];
      }
    }
    sum[i] += v;
  }
  __syncthreads();
}

// grid (tiles and channels of all images, halves): computes dL/dv, through the relu before a second half, kept in
// the first. v is the half's own input, so it is the mask, too. Blocks write disjoint tiles.
__global__ void __launch_bounds__(kThreads) dv_kernel(Plan plan, int at_once, int first) {
  const Tiling& t = plan.strip_tiling;
  const Half* const job = plan.halves.at(first + blockIdx.y);
  if (!is_wanted(job, Which::second)) return;
  const Half& h = *job;
  DYNAMIC_SHARED(float, sum);
  const Slab slab = slab_of_block(plan, t, at_once);
  const int pixels = t.tile.pixels();
  for (int i = int(threadIdx.x); i < slab.channels * pixels; i += kThreads) sum[i] = 0;
  add_transposed(plan, h, t, slab.tile, slab.first, slab.channels, sum + at_once * pixels, sum);
  float* dv = job[-1].dv;  // the first half comes just before
  for (int i = int(threadIdx.x); i < slab.channels * pixels; i += kThreads) {
    const int at = pixel_offset(t, slab.tile, i % pixels);
    if (at < 0) continue;
    const int64_t offset = int64_t(slab.first + i / pixels) * plan.out.pixels() + at;
    const float v = get(h.in, slab.tile.image * h.in.image + offset);
    dv[slab.tile.image * plan.C * plan.out.pixels() + offset] = relu_passes(v) ? sum[i] : 0.0f;
  }
}

// Computes what the pools of a state give one of its pixels: of a maximum, the windows that it
// won; of a mean, its share of each.
//
// This gathers: the up to nine windows that cover the pixel are visited in a fixed order, where scattering
// dz from the windows would need atomics. Window k lies so that the pixel is its k-th, hence the
// comparison of the winner with k.
__device__ float pool_gradient(const Plan& plan, const Pool& pool, int64_t plane, int row, int col) {
  const Grid from = pool.x.grid, out = plan.out;
  float sum = 0;
  for (int k = 0; k < 9; ++k) {
    const int r = row + 1 - k / 3, c = col + 1 - k % 3;  // stride times the window
    if (r < 0 || c < 0 || r % pool.stride || c % pool.stride) continue;
    const int h = r / pool.stride, w = c / pool.stride;
    if (h >= out.rows || w >= out.cols) continue;
    const int64_t at = plane * out.pixels() + int64_t(h) * out.cols + w;
    if (pool.average) {
      const int rows = 1 + (r > 0) + (r + 1 < from.rows), cols = 1 + (c > 0) + (c + 1 < from.cols);
      sum += pool.dz[at] / float(rows * cols);
    } else if (pool.winner[at] == k) {
      sum += pool.dz[at];
    }
  }
  return sum;
}

// grid (tiles and channels of all images): writes the gradient of a state, once.
//
// All convolutions that leave the state are added up in shared memory first, because one relu's mask covers
// them all, and the strided skips with them; pools and skips read x itself, so they come after the mask, then
// the output's gradient. The halves follow each other in the block in place of blocks of their own, which
// would have to add to one address.
__global__ void __launch_bounds__(kThreads) dx_kernel(Plan plan, int at_once, int state) {
  const Source& s = plan.sources[state];
  DYNAMIC_SHARED(float, sum);
  const Tiling& t = s.tiling;
  const Slab slab = slab_of_block(plan, t, at_once);
  const Tile& tile = slab.tile;
  const int pixels = t.tile.pixels(), C = plan.C;
  for (int i = int(threadIdx.x); i < slab.channels * pixels; i += kThreads) sum[i] = 0;
  for (int k = s.halves.first; k < s.halves.last; ++k)
    if (const Half* h = plan.halves.at(k); is_wanted(h, Which::first))
      add_transposed(plan, *h, t, tile, slab.first, slab.channels, sum + at_once * pixels, sum);
  __syncthreads();
  const bool multiplicative = is_multiplicative(plan.form);
  for (int i = int(threadIdx.x); i < slab.channels * pixels; i += kThreads) {
    const int c = slab.first + i / pixels, at = pixel_offset(t, tile, i % pixels);
    if (at < 0) continue;
    const int row = at / t.grid.cols, col = at % t.grid.cols;
    const int64_t plane = tile.image * C + c, here = c * int64_t(t.grid.pixels()) + at;
    float dx = sum[i];
    for (int k = s.reduces.first; k < s.reduces.last; ++k)
      if (const Reduce* r = plan.reduces.at(k); r && row % 2 == col % 2)
        dx += r->dx[(row % 2 * plan.images * C + plane) * plan.out.pixels() + row / 2 * plan.out.cols + col / 2];
    if (!relu_passes(get(s.x, tile.image * s.x.image + here))) dx = 0;
    for (int k = s.pools.first; k < s.pools.last; ++k)
      if (const Pool* pool = plan.pools.at(k)) dx += pool_gradient(plan, *pool, plane, row, col);
    for (int k = s.plains.first; k < s.plains.last; ++k) {
      const Plain* const job = plan.plains.at(k);
      if (!job || job->normed) continue;
      const Plain& n = *job;
      float dy = static_cast<const float*>(n.dy.data)[tile.image * n.dy.image + here];
      if (n.noisy && multiplicative) dy *= draw_of(plan, n).element(uint64_t(tile.image * n.dy.image + here));
      dx += plan.w[n.weight] * dy;
    }
    if (s.dout.data) {
      dx += get(s.dout, tile.image * s.dout.image + here);
      static_cast<float*>(s.dx)[plane * t.grid.pixels() + at] = dx;
    } else {
      put(s.dx, plan.wide, plane * t.grid.pixels() + at, dx);
    }
  }
}

// --- launches ------------------------------------------------------------------------------------------------

// Finds the largest patch of du that a tile of this tiling needs, whatever its kernels are.
Grid largest_patch(const Tiling& t) {
  Half h{};
  h.size = kFarthestSize, h.dilation = kFarthestDilation, h.stride = 1;
  return patch_size(h, t);
}
// Counts shared memory for the sums of a tile and the patch of du beside them, for so many channels.
size_t transposing_bytes(const Tiling& t, int at_once) {
  return sizeof(float) * at_once * (size_t(t.tile.pixels()) + largest_patch(t).pixels());
}
// Launches the sums over dy of some halves and what is folded from them.
void launch_halves(Launcher& run, Range halves, Which which) {
  const Plan& plan = run.plan();
  run(FASTNAS_VARIANT(run, cross_pieces, cross_kernel), dim3(plan.groups, halves.count()), run.shared(2), halves.first,
      which);
  run(fold_cross_kernel, dim3(halves.count(), run.row_blocks()), 0, halves.first, which);
  run(fold_centring_kernel, dim3(halves.count(), run.row_blocks()), 0, halves.first, which);
}

// Launches everything that leaves one state. If neither the state's gradient nor parameters are
// wanted it ends after dL/dw.
void launch_state(Launcher& run, int state) {
  const Plan& plan = run.plan();
  const Planner& planner = run.planner;
  const Source& source = planner.sources[state];
  const Range here{state, state + 1};
  const Range halves = planner.halves_of(here);
  const bool goes_on = source.wanted || plan.wants_params;

  launch_pools_and_reduces(run, here);
  launch_fold_plains(run, here);
  launch_dots(run, here);

  launch_depthwise(run, here, Which::first);
  if (!planner.p.v) {
    launch_fold_rows(run, here, Which::inner, false);
    launch_second_inputs(run, here);
  }
  launch_depthwise(run, here, Which::second);
  launch_halves(run, halves, Which::final);
  if (!goes_on) return;
  const auto du = FASTNAS_VARIANT(run, product_pieces, du_kernel);
  run(du, dim3(run.tiles(), halves.count()), run.shared(2), halves.first, Which::final);
  const Tiling& inner = plan.strip_tiling;
  const int at_once = run.channels_at_once(inner, largest_patch(inner));
  run(dv_kernel, dim3(run.slabs(inner, at_once), halves.count()), transposing_bytes(inner, at_once), at_once,
      halves.first);
  launch_halves(run, halves, Which::inner);
  run(du, dim3(run.tiles(), halves.count()), run.shared(2), halves.first, Which::inner);
  launch_plain_gradients(run, here, source.wanted);
  if (source.wanted) {
    const int channels = run.channels_at_once(source.tiling, largest_patch(source.tiling));
    run(dx_kernel, dim3(run.slabs(source.tiling, channels)), transposing_bytes(source.tiling, channels), channels,
        state);
  }
  if (plan.wants_params) launch_taps(run, here);
}

}  // namespace

int mixed_edges_bwd(const MixedEdgesParams& p) {
  const Planner planner(p, false);
  Launcher run{planner, p.stream, planner.upload(p.stream)};
  for (int state = planner.states() - 1; state >= 0; --state) launch_state(run, state);
  return run.error;
}

}  // namespace fastnas::cuda
