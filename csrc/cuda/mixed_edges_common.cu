// Holds the steps of mixed_edges that forward and backward share, because backward computes again what forward did
// not keep: pools, depthwise outputs u, the folded matrix A, v, strided skips.
#include "mixed_edges_common.h"

namespace fastnas::cuda {
namespace {

// grid (blocks, pools): reads x, writes z [N, C, rows, cols] and, where backward asks, which pixel of its window a
// maximum is, row by row; ties and NaN as torch. At most 1024 blocks stride over all outputs.
//
// z is stored, unlike on the CPU: the moments, the sum of every edge's node and the sums over dy read
// it, and nine loads each time cost more than one. The winner is a byte beside it, so pool_gradient
// needs neither x nor comparisons.
__global__ void __launch_bounds__(kThreads) pool_kernel(Plan plan, int first) {
  const Pool* const job = plan.pools.at(first + blockIdx.y);
  if (!job) return;
  const Pool& pool = *job;
  const Grid from = pool.x.grid, to = plan.out;
  const int64_t count = plan.images * plan.C * to.pixels();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int pixel = int(i % to.pixels()), row = pixel / to.cols * pool.stride, col = pixel % to.cols * pool.stride;
    const int64_t plane = i / to.pixels();
    const int64_t x = plane / plan.C * pool.x.image + plane % plan.C * from.pixels();
    // An average sums differences from the centre pixel: nine values far from zero would round at the size
    // of their sum, and the batch norm after the pool divides that error by their small spread. An inf or
    // NaN is no pivot; 0 is taken instead.
    const float here = get(pool.x, x + row * from.cols + col), centre = here - here == 0 ? here : 0.0f;
    float best = -INFINITY, sum = 0;
    int winner = 4, covered = 0;
    for (int k = 0; k < 9; ++k) {
      const int r = row + k / 3 - 1, c = col + k % 3 - 1;
      if (r < 0 || r >= from.rows || c < 0 || c >= from.cols) continue;
      const float v = get(pool.x, x + r * from.cols + c);
      sum += v - centre, ++covered;
      if (v > best || v != v || covered == 1) best = v, winner = k;
    }
    pool.z[i] = pool.average ? centre + sum / float(covered) : best;
    if (pool.winner) pool.winner[i] = uint8_t(winner);
  }
}

// grid (tiles and channels of all images, halves): computes u = D * relu(in), uncentred, in fp32.
//
// u goes to memory for one level, 4 bytes written and read again by each product, because computing it again in
// every one of them (as the CPU does) would cost 102 FMA an element and branch set, on the cores that are the
// bottleneck, and five kernels with ten convolutions inside took nvcc four minutes.
__global__ void __launch_bounds__(kThreads) depthwise_kernel(Plan plan, int at_once, int first, Which which) {
  const Half* const job = plan.halves.at(first + blockIdx.y);
  if (!is_wanted(job, which)) return;
  const Half& h = *job;
  if (!h.u) return;
  DYNAMIC_SHARED(float, space);
  const Tiling& t = plan.strip_tiling;
  const Slab slab = slab_of_block(plan, t, at_once);
  const Tile& tile = slab.tile;
  const Patch patch = patch_of(h, t, tile, space);
  stage(h.in, tile.image, slab.first, slab.channels, true, patch);
  __syncthreads();
  const int64_t plane = plan.out.pixels();
  float* u = h.u + (tile.image * plan.C + slab.first) * plane + int64_t(tile.row) * plan.out.cols + tile.col;
  const Strips strips{patch, slab.channels, t.tile.rows, t.tile.cols, tile, u, plane, plan.out.cols, false};
  const Taps taps{h.taps, plan.wide, false, int64_t(slab.first) * h.taps_count()};
  with_kernel(h.size, h.dilation, h.stride, RunStrips{strips, taps});
}

// grid (halves, C / kWarps): makes A = scale r W, transposed, from mean and variance of W u, a warp per row of W.
// `gathered`: these come first, from mean(u) and cov(u): mean(z) = W mean(u), var(z) = a row of W cov(u) W^T.
// Everything is fp64 in registers; lane 0 stores the statistics, and __syncwarp orders that before the warp reads
// them back, rounded as backward and the running statistics will see them.
__global__ void __launch_bounds__(kThreads) fold_rows_kernel(Plan plan, int first, Which which, bool gathered) {
  const Half* const job = plan.halves.at(first + blockIdx.x);
  if (!is_wanted(job, which)) return;
  const Half& h = *job;
  const int C = plan.C, co = int(blockIdx.y) * kWarps + warp_index(), lane = lane_index();
  if (co >= C) return;
  const auto row = [&](int ci) { return double(get(h.pointwise, plan.wide, int64_t(co) * C + ci)); };
  if (gathered) {
    double mean = 0, var = 0;
    for (int j = lane; j < C; j += 32) {
      double product = 0;
      for (int i = 0; i < C; ++i) product += row(i) * h.cov[int64_t(i) * C + j];
      var += product * row(j);
      mean += row(j) * h.mean[j];
    }
    mean = warp_total(mean), var = warp_total(var);
    if (lane == 0) h.stats[co] = float(mean), h.stats[C + co] = stored_variance<float>(var);
    __syncwarp();
  }
  const double rstd = batch_rstd(double(h.stats[C + co]), plan.eps);
  const double scale = h.final ? double(plan.w[h.weight]) : 1.0;
  for (int ci = lane; ci < C; ci += 32)
    h.fold[int64_t(ci) * plan.width + co] = float(folded(scale, rstd, row(ci)));
  if (h.bias && lane == 0) h.bias[co] = float(-scale * rstd * double(h.stats[co]));
}

// grid (tiles of all images, halves): computes v = relu(BN(W u)) of the first halves of sep_convs, written as the
// stored dtype. In training u is centred while it is loaded, outside of it the constant is `bias`.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) second_input_kernel(Plan plan, int first) {
  const Half* const job = plan.halves.at(first + blockIdx.y);
  if (!job) return;
  const Half& h = *job;
  if (h.final || !h.output) return;
  DYNAMIC_SHARED(float, u);
  const Tile tile = tile_of_block(plan.tiling);
  clear_tails(plan.tiling, plan.C, u);
  load_u(plan, h, tile, plan.training ? h.shift : nullptr, u);
  __syncthreads();
  Product<Units, M> sum;
  sum.add(plan, h.fold, u, plan.C);
  const int64_t v = tile.image * plan.C * plan.out.pixels();
  sum.each_inside(plan, tile, [&](float value, int c, int at) {
    put(h.output, plan.wide, v + int64_t(c) * plan.out.pixels() + at, relu(value + (h.bias ? h.bias[c] : 0.0f)));
  });
}

// grid (blocks, strided skips): lays out W and its transpose as floats, the parts one above the other.
__global__ void __launch_bounds__(kThreads) reduce_matrix_kernel(Plan plan, int first) {
  const Reduce* const job = plan.reduces.at(first + blockIdx.y);
  if (!job) return;
  const Reduce& r = *job;
  const int C = plan.C, half = C / 2;
  for (int i = int(blockIdx.x * kThreads + threadIdx.x); i < C * C; i += int(gridDim.x) * kThreads) {
    const int co = i / C, ci = i % C, part = co >= half;
    const float w = get(r.params[part], plan.wide, int64_t(co - part * half) * C + ci);
    r.matrix[int64_t(ci) * plan.width + co] = r.back[int64_t(co) * plan.width + ci] = w;
  }
}

// grid (tiles of all images, 2 strided skips): computes the channels of z that a part makes. (All are multiplied;
// zeros for the others' would make NaN of inf.)
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) reduce_kernel(Plan plan, int first) {
  const Reduce* const job = plan.reduces.at(first + blockIdx.y / 2);
  if (!job) return;
  const Reduce& r = *job;
  DYNAMIC_SHARED(float, x);
  const Tile tile = tile_of_block(plan.tiling);
  clear_tails(plan.tiling, plan.C, x);
  const int part = int(blockIdx.y % 2);
  load_strided(plan, r, tile, part, x);
  __syncthreads();
  Product<Units, M> sum;
  sum.add(plan, r.matrix, x, plan.C);
  sum.each_inside(plan, tile, [&](float value, int c, int at) {
    if (part == (c >= plan.C / 2)) r.z[(tile.image * plan.C + c) * plan.out.pixels() + at] = value;
  });
}

// Merges the groups' moments of a channel, in their order.
__device__ Moments channel_moments(const Plan& plan, const Gathered& from, int c) {
  Moments m;
  for (int g = 0; g < plan.groups; ++g) {
    const double* parts = from.parts + (int64_t(g) * plan.C + c) * 2;
    const double n = double((plan.first_image(g + 1) - plan.first_image(g)) * from.z.grid.pixels());
    m = merge(m, {n, parts[0], parts[1]});
  }
  return m;
}

// grid (plains): makes batch statistics where they are gathered, mean and rstd, and the spread
// that noise is relative to.
//
// A thread has the channels c, c + 128, ...; for the spread of the whole tensor the threads' moments are
// merged by halving, in a tree that only the block size fixes. Channels of a normed term have mean 0 and
// squares scaled by r^2 there. No thread returns before the barriers of the tree: the condition in front of
// them is the same for the block.
__global__ void __launch_bounds__(kThreads) fold_plain_kernel(Plan plan, int first) {
  SHARED(double, shared, 3 * kThreads);
  const Plain* const job = plan.plains.at(first + blockIdx.x);
  if (!job) return;
  const Plain& n = *job;
  const int C = plan.C;
  Moments whole;  // of this thread's channels, as the term's output has them
  for (int c = int(threadIdx.x); c < C; c += kThreads) {
    Moments m;
    if (n.gathered >= 0) m = channel_moments(plan, plan.gathered.all[n.gathered], c);
    if (n.normed) {
      if (n.gathered >= 0) n.stats[c] = float(m.mean), n.stats[C + c] = stored_variance<float>(m.squares / m.count);
      const double rstd = batch_rstd(double(n.stats[C + c]), plan.eps);
      n.mean[c] = n.stats[c], n.rstd[c] = float(rstd);
      m.mean = 0, m.squares *= rstd * rstd;
    }
    whole = merge(whole, m);
  }
  if (!n.noisy || !is_relative(plan.form) || n.gathered < 0) return;
  double* own = shared + 3 * threadIdx.x;
  own[0] = whole.count, own[1] = whole.mean, own[2] = whole.squares;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      const double* other = own + 3 * half;
      whole = merge(whole, {other[0], other[1], other[2]});
      own[0] = whole.count, own[1] = whole.mean, own[2] = whole.squares;
    }
  }
  if (threadIdx.x == 0) plan.std[n.skip] = unbiased_std(whole);
}

}  // namespace

// Launches u of the halves that are `which`. Shared memory is for the largest patch among all candidates, since the
// host does not know which ones a sampled path runs.
void launch_depthwise(Launcher& run, Range states, Which which) {
  const Plan& plan = run.plan();
  const Range halves = run.planner.halves_of(states);
  Grid patch{1, 1};
  for (const Half& h : run.planner.all_halves(states)) {
    const Grid own = patch_size(h, plan.strip_tiling);
    if (own.pixels() > patch.pixels()) patch = own;
  }
  const int at_once = run.channels_at_once(plan.strip_tiling, patch);
  run(depthwise_kernel, dim3(run.slabs(plan.strip_tiling, at_once), halves.count()),
      sizeof(float) * at_once * size_t(patch.pixels()), at_once, halves.first, which);
}

// Launches what the terms that are no convolutions need before their statistics: z of pools and strided skips.
void launch_pools_and_reduces(Launcher& run, Range states) {
  const Range pools = run.planner.pools_of(states), reduces = run.planner.reduces_of(states);
  run(pool_kernel, dim3(run.elementwise_blocks(), pools.count()), 0, pools.first);
  run(reduce_matrix_kernel, dim3(8, reduces.count()), 0, reduces.first);
  run(FASTNAS_VARIANT(run, product_pieces, reduce_kernel), dim3(run.tiles(), 2 * reduces.count()), run.shared(1),
      reduces.first);
}

void launch_fold_rows(Launcher& run, Range states, Which which, bool gathered) {
  const Range halves = run.planner.halves_of(states);
  run(fold_rows_kernel, dim3(halves.count(), run.row_blocks()), 0, halves.first, which, gathered);
}

void launch_second_inputs(Launcher& run, Range states) {
  const Range halves = run.planner.halves_of(states);
  run(FASTNAS_VARIANT(run, product_pieces, second_input_kernel), dim3(run.tiles(), halves.count()), run.shared(1),
      halves.first);
}

void launch_fold_plains(Launcher& run, Range states) {
  const Range plains = run.planner.plains_of(states);
  run(fold_plain_kernel, dim3(plains.count()), 0, plains.first);
}

}  // namespace fastnas::cuda
