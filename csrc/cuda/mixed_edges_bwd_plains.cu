// Takes the terms of mixed_edges that are no convolutions backward: pools, skips, strided skips.
//
// Their batch norm works on z itself: dz = w r (dy - mean dy - (z - mean z) r q), q = r mean(dy (z - mean z)).
// So the sums over dy come first (dots_kernel), then dz for every term that reads a pool, summed, then what z
// was made by: the windows of a pool in dx_kernel, the two matrices of a strided skip here. A plain skip has no
// batch norm; dx_kernel adds it.
#include "mixed_edges_common.h"

namespace fastnas::cuda {
namespace {

// grid (groups, plains): gathers sums over dy, a warp per channel: <dy, z - mean>, the sum of dy, and what
// dL/dw needs of a noisy skip. Multiplicative noise after a batch norm makes its dy dy d, so the first two are
// sums of that. Draws are made again.
__global__ void __launch_bounds__(kThreads) dots_kernel(Plan plan, int first) {
  const Plain* const job = plan.plains.at(first + blockIdx.y);
  if (!job) return;
  const Plain& n = *job;
  const int group = int(blockIdx.x), C = plan.C;
  const bool multiplicative = is_multiplicative(plan.form);
  // A plain skip's z counts only for dL/dw; the noise of a normed one counts also where it scales dy.
  const bool draws = n.noisy && (plan.dw || (multiplicative && n.normed));
  const Draw<float> draw = draws ? draw_of(plan, n) : Draw<float>(plan.form, 0, 0, 0, 0);
  const int64_t pixels = plan.out.pixels();
  for (int c = warp_index(); c < C; c += kWarps) {
    const float mean = n.normed ? n.mean[c] : 0.0f;
    float centred = 0, sum = 0, other = 0;
    for (int64_t image = plan.first_image(group); image < plan.first_image(group + 1); ++image)
      for (int64_t i = lane_index(); i < pixels; i += 32) {
        float dy = static_cast<const float*>(n.dy.data)[image * n.dy.image + c * pixels + i];
        const float z = get(n.z, image * n.z.image + c * pixels + i);
        const float d = draws ? draw.element(uint64_t((image * C + c) * pixels + i)) : 0.0f;
        if (!n.normed) other += dy * (draws ? mixed_value(multiplicative, z, d) : z);
        else if (draws && multiplicative) dy *= d;
        else if (draws) other += dy * d;
        centred += dy * (z - mean), sum += dy;
      }
    const double totals[3] = {warp_total(double(centred)), warp_total(double(sum)), warp_total(double(other))};
    if (lane_index() == 0)
      for (int k = 0; k < 3; ++k) n.dots[(int64_t(group) * 3 + k) * C + c] = totals[k];
  }
}

// grid (plains): adds the groups in their order, in fp64, to q and mean(dy) of each channel, and dL/dw over all of
// them. Threads' shares of dL/dw are added by halving, an order that the block size fixes.
__global__ void __launch_bounds__(kThreads) fold_dots_kernel(Plan plan, int first) {
  SHARED(double, shared, kThreads);
  const Plain* const job = plan.plains.at(first + blockIdx.x);
  if (!job) return;
  const Plain& n = *job;
  const int C = plan.C;
  const double samples = double(plan.samples());
  double dw = 0;
  for (int c = int(threadIdx.x); c < C; c += kThreads) {
    double totals[3] = {};
    for (int g = 0; g < plan.groups; ++g)
      for (int k = 0; k < 3; ++k) totals[k] += n.dots[(int64_t(g) * 3 + k) * C + c];
    dw += totals[2];
    if (!n.normed) continue;
    const double rstd = batch_rstd(double(n.stats[C + c]), plan.eps), q = totals[0] * rstd / samples;
    n.rstd_q[c] = float(rstd * q), n.dy_mean[c] = float(totals[1] / samples);
    dw += q * samples;
  }
  shared[threadIdx.x] = dw;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0 && plan.dw) plan.dw[n.weight] = shared[0];
}

// Computes dL/dz of a normed term at an element of [N, C, rows, cols]: w r (dy - mean dy - (z - mean z) r q), with
// the noise's d drawn again where it multiplies dy.
__device__ float plain_gradient(const Plan& plan, const Plain& n, float z, int64_t at, int c) {
  float dy = static_cast<const float*>(n.dy.data)[at];
  if (n.noisy && is_multiplicative(plan.form)) dy *= draw_of(plan, n).element(uint64_t(at));
  return norm_gradient(plan.w[n.weight] * n.rstd[c], dy, n.dy_mean[c], z - n.mean[c], n.rstd_q[c]);
}

// grid (blocks, pools): computes dL/dz, of all the terms that read a pool. Each has its own dy, q and weight; they
// are added here, so that dx_kernel goes through the windows once.
__global__ void __launch_bounds__(kThreads) pool_gradient_kernel(Plan plan, int first) {
  const Pool* const job = plan.pools.at(first + blockIdx.y);
  if (!job) return;
  const Pool& pool = *job;
  const int64_t count = plan.images * plan.C * plan.out.pixels();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int c = int(i / plan.out.pixels() % plan.C);
    float dz = 0;
    for (int k = pool.first_plain; k < pool.last_plain; ++k)
      dz += plain_gradient(plan, plan.plains.all[plan.pool_plains[k]], pool.z[i], i, c);
    pool.dz[i] = dz;
  }
}

// grid (blocks, strided skips): writes dL/dz in the place of z, which nothing reads afterwards.
__global__ void __launch_bounds__(kThreads) reduce_gradient_kernel(Plan plan, int first) {
  const Reduce* const job = plan.reduces.at(first + blockIdx.y);
  if (!job) return;
  const Reduce& r = *job;
  const int64_t count = plan.images * plan.C * plan.out.pixels();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads)
    r.z[i] = plain_gradient(plan, plan.plains.all[r.plain], r.z[i], i, int(i / plan.out.pixels() % plan.C));
}

// Finds dL/dz of a strided skip, which lies where z was.
__device__ Planes gradient_planes(const Plan& plan, const Reduce& r) {
  return {r.z, int64_t(plan.C) * plan.out.pixels(), plan.out, true};
}

// grid (groups, 2 strided skips): gathers partial sums of dz relu(x)^T of a part. All C rows are summed, the fold
// takes the part's: the pieces of a cross matrix are laid out for [C][C], and strided skips are few.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) reduce_cross_kernel(Plan plan, int first) {
  const Reduce* const job = plan.reduces.at(first + blockIdx.y / 2);
  if (!job) return;
  const Reduce& r = *job;
  DYNAMIC_SHARED(float, x);
  float* const dz = x + tile_floats(plan);
  const int group = int(blockIdx.x), part = int(blockIdx.y % 2);
  clear_tails(plan.tiling, plan.C, x);
  clear_tails(plan.tiling, plan.C, dz);
  const auto load = [&](const Tile& tile, bool) {
    load_strided(plan, r, tile, part, x);
    load_gradient(plan, gradient_planes(plan, r), tile, dz);
  };
  float* const sums = plan.partial + (int64_t(blockIdx.y) * plan.groups + group) * plan.partial_size();
  cross_group<Units, M>(plan, group, dz, x, sums, load, [] {});
}

// grid (2 strided skips): adds up dL/dW of a part from the groups, in their order.
__global__ void __launch_bounds__(kThreads) fold_reduce_kernel(Plan plan, int first) {
  const Reduce* const job = plan.reduces.at(first + blockIdx.x / 2);
  if (!job) return;
  const Reduce& r = *job;
  const int C = plan.C, half = C / 2, part = int(blockIdx.x % 2);
  const float* partial = plan.partial + int64_t(blockIdx.x) * plan.groups * plan.partial_size();
  for (int i = int(threadIdx.x); i < half * C; i += kThreads) {
    double sum = 0;
    for (int g = 0; g < plan.groups; ++g) sum += double(partial[g * plan.partial_size() + part * half * C + i]);
    put(r.dparams[part], plan.wide, i, float(sum));
  }
}

// grid (tiles of all images, 2 strided skips): computes W^T dz of a part, from the part's own channels of dz:
// those of the other part have zeros in W, and 0 times their inf would be NaN. The parts reach different
// pixels of x, so each has a plane.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) reduce_dx_kernel(Plan plan, int first) {
  const Reduce* const job = plan.reduces.at(first + blockIdx.y / 2);
  if (!job) return;
  const Reduce& r = *job;
  DYNAMIC_SHARED(float, dz);
  const Tile tile = tile_of_block(plan.tiling);
  const int part = int(blockIdx.y % 2);
  clear_tails(plan.tiling, plan.C, dz);
  load_gradient(plan, gradient_planes(plan, r), tile, dz);
  __syncthreads();
  Product<Units, M> sum;
  const int own = plan.C / 2 * part;
  sum.add(plan, r.back + int64_t(own) * plan.width, dz + own * plan.tiling.pitch, plan.C / 2);
  sum.each_inside(plan, tile, [&](float value, int c, int at) {
    r.dx[((part * plan.images + tile.image) * plan.C + c) * plan.out.pixels() + at] = value;
  });
}

}  // namespace

// Launches the sums over dy of the terms that are no convolutions, and their folds to dL/dw and q.
// dL/dw may be all that is wanted.
void launch_dots(Launcher& run, Range states) {
  const Range plains = run.planner.plains_of(states);
  run(dots_kernel, dim3(run.plan().groups, plains.count()), 0, plains.first);
  run(fold_dots_kernel, dim3(plains.count()), 0, plains.first);
}

// Launches dL/dz, then what the terms give x (if wanted) and dL/dW. A strided skip's dz replaces z even where dx
// is not wanted: dL/dW needs it.
void launch_plain_gradients(Launcher& run, Range states, bool wants_dx) {
  const Plan& plan = run.plan();
  const Range pools = run.planner.pools_of(states), reduces = run.planner.reduces_of(states);
  run(reduce_gradient_kernel, dim3(run.elementwise_blocks(), reduces.count()), 0, reduces.first);
  if (wants_dx) {
    run(pool_gradient_kernel, dim3(run.elementwise_blocks(), pools.count()), 0, pools.first);
    run(FASTNAS_VARIANT(run, product_pieces, reduce_dx_kernel),
        dim3(run.tiles(), 2 * reduces.count()), run.shared(1), reduces.first);
  }
  if (!plan.wants_params) return;
  run(FASTNAS_VARIANT(run, cross_pieces, reduce_cross_kernel), dim3(plan.groups, 2 * reduces.count()), run.shared(2),
      reduces.first);
  run(fold_reduce_kernel, dim3(2 * reduces.count()), 0, reduces.first);
}

}  // namespace fastnas::cuda
