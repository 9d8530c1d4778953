// Runs mixed_edges forward on CUDA: a few launches for each level of the DAG, all edges of it at once.
//
// A level takes 13: pools, moments and folds of what is no convolution; then for the first halves and for the
// second u, the partial Gram matrices of u, two folds; v between them; and one kernel that adds the level's edges
// to every node they enter. Statistics come from Gram matrices of u, so z is never formed before its batch norm is
// known. Launches follow each other on one stream, which is the only barrier between blocks: no kernel waits for
// another block, and there are no atomics, so the bits depend on the inputs alone.
#include "mixed_edges.h"

#include <stdexcept>
#include <string>

#include "mixed_edges_common.h"

namespace fastnas::cuda {
namespace {

// grid (groups, halves): gathers a partial Gram matrix of u + shift, the sum of u + shift, and the shift, which is
// minus the mean of the group's first tile, so that no digits cancel.
//
// A block walks all tiles of a group of images with the matrix in its registers, [C][C] split over its threads. The
// shift is found from the first tile, which is then loaded again, shifted. It lies in global memory, where the fold
// will read it too; the barriers order its writes before its reads. 32 groups fix the order of the sums, and give a
// level of one edge (4 first halves) 128 blocks, about one for each of the 132 multiprocessors of an H100.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) gather_kernel(Plan plan, int first, Which which) {
  const Half* const job = plan.halves.at(first + blockIdx.y);
  if (!is_wanted(job, which)) return;
  const Half& h = *job;
  DYNAMIC_SHARED(float, u);
  const Tiling& t = plan.tiling;
  const int C = plan.C, group = int(blockIdx.x);
  float* const gram = plan.partial + (int64_t(blockIdx.y) * plan.groups + group) * plan.partial_size();
  float *const deviations = gram + int64_t(C) * C, *const shift = deviations + C;
  for (int c = int(threadIdx.x); c < C; c += kThreads) deviations[c] = shift[c] = 0;
  clear_tails(t, C, u);
  const auto load = [&](const Tile& tile, bool opens) {
    load_u(plan, h, tile, shift, u);
    if (!opens) return;
    __syncthreads();
    for (int c = warp_index(); c < C; c += kWarps) {
      float sum = 0;
      for (int i = lane_index(); i < t.tile.pixels(); i += 32) sum += u[c * t.pitch + i];
      sum = warp_total(sum);
      if (lane_index() == 0) shift[c] = -sum / float(tile.rows * tile.cols);
    }
    __syncthreads();
    load_u(plan, h, tile, shift, u);
  };
  cross_group<Units, M>(plan, group, u, u, gram, load, [&] { add_channel_sums(plan, u, deviations); });
}

// grid (halves, C C / kThreads): makes mean(u) and cov(u) from the groups' partial sums, a thread per entry.
//
// With d the mean of a group minus the whole mean, e the mean left after the group's shift and n its pixels,
//  n cov(group, about the whole mean) = gram + n (d_i d_j - e_i e_j).
// fp64 throughout, groups in their order. Each thread sums the means of its row and column itself, which saves a
// launch. cov stays fp64 for the fold; backward gets its fp32 copy.
__global__ void __launch_bounds__(kThreads) fold_gram_kernel(Plan plan, int first, Which which) {
  const Half* const job = plan.halves.at(first + blockIdx.x);
  if (!is_wanted(job, which)) return;
  const Half& h = *job;
  const int C = plan.C, entry = int(blockIdx.y * kThreads + threadIdx.x);
  if (entry >= C * C) return;
  const int i = entry / C, j = entry % C;
  const float* partial = plan.partial + int64_t(blockIdx.x) * plan.groups * plan.partial_size();
  const double total = double(plan.samples());
  double mean_i = 0, mean_j = 0, cov = 0;
  for (int g = 0; g < plan.groups; ++g) {
    const float *deviations = partial + g * plan.partial_size() + int64_t(C) * C, *shift = deviations + C;
    const double n = plan.group_samples(g);
    mean_i += n / total * (double(deviations[i]) / n - double(shift[i]));
    mean_j += n / total * (double(deviations[j]) / n - double(shift[j]));
  }
  for (int g = 0; g < plan.groups; ++g) {
    const float *gram = partial + g * plan.partial_size(), *deviations = gram + int64_t(C) * C, *shift = deviations + C;
    const double n = plan.group_samples(g), a = double(deviations[i]) / n, b = double(deviations[j]) / n;
    const double off = (a - double(shift[i]) - mean_i) * (b - double(shift[j]) - mean_j);
    cov += (double(gram[entry]) + n * (off - a * b)) / total;
  }
  h.cov[entry] = cov;
  if (h.gram) h.gram[entry] = float(cov);
  if (j == 0) h.mean[i] = mean_i, h.shift[i] = float(-mean_i);
}

// grid (groups, gathered): gathers mean and centred squares of a channel, a warp each.
//
// One pass over global memory: deviations from a pivot, the group's first value, are summed with their squares, and
// the correction takes the pivot's distance from the mean off again. Where the fp32 squares vanish or overflow the
// warp goes over the group again in fp64.
__global__ void __launch_bounds__(kThreads) moments_kernel(Plan plan, int first) {
  const Gathered* const job = plan.gathered.at(first + blockIdx.y);
  if (!job) return;
  const Gathered& from = *job;
  const int group = int(blockIdx.x);
  const int64_t begin = plan.first_image(group), pixels = from.z.grid.pixels();
  for (int c = warp_index(); c < plan.C; c += kWarps) {
    const float pivot = get(from.z, begin * from.z.image + c * pixels);
    const double n = double((plan.first_image(group + 1) - begin) * pixels);
    // Sums are of the type of `zero`.
    const auto gathered = [&](auto zero) {
      auto sum = zero, squares = zero;
      for (int64_t image = begin; image < plan.first_image(group + 1); ++image)
        for (int64_t i = lane_index(); i < pixels; i += 32) {
          const auto d = decltype(zero)(get(from.z, image * from.z.image + c * pixels + i)) - pivot;
          sum += d, squares += d * d;
        }
      return moments_of_sums(n, double(pivot), warp_total(double(squares)), warp_total(double(sum)));
    };
    Moments m = gathered(0.0f);
    if (!squares_fit_fp32(m)) m = gathered(0.0);  // all lanes or none
    double* parts = from.parts + (int64_t(group) * plan.C + c) * 2;
    if (lane_index() == 0) parts[0] = m.mean, parts[1] = m.squares;
  }
}

// grid (tiles of all images, sums): adds what the edges of a level give a node.
//
// Reads u of every final half and z of every other term, keeps the sum of a tile in registers, 64 floats a thread
// at most, through all terms and writes it once. Each term's tile passes through the same shared memory, hence the
// two barriers: one before it is overwritten, one before it is read. Terms are added in the table's order. Levels
// before added to the same node in earlier launches; a block reads and writes only its own tile of that sum.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) sum_kernel(Plan plan, int first) {
  const Sum& s = plan.sums[first + blockIdx.y];
  DYNAMIC_SHARED(float, u);
  const Tile tile = tile_of_block(plan.tiling);
  const int C = plan.C;
  const int64_t plane = plan.out.pixels();
  clear_tails(plan.tiling, C, u);
  Product<Units, M> sum;
  for (int i = s.first; i < s.last; ++i) {
    const Term term = plan.terms[i];
    if (term.half >= 0) {
      const Half& h = plan.halves.all[term.half];
      __syncthreads();
      load_u(plan, h, tile, plan.training ? h.shift : nullptr, u);
      __syncthreads();
      sum.add(plan, h.fold, u, C);
      if (h.bias) sum.each_inside(plan, tile, [&](float& value, int c, int) { value += h.bias[c]; });
      if (!h.kept) continue;
      for (int k = int(threadIdx.x); k < C * plan.tiling.tile.pixels(); k += kThreads) {
        const int c = k / plan.tiling.tile.pixels(), pixel = k % plan.tiling.tile.pixels();
        const int at = pixel_offset(plan.tiling, tile, pixel);
        if (at >= 0) put(h.kept, plan.wide, (tile.image * C + c) * plane + at, u[c * plan.tiling.pitch + pixel]);
      }
      continue;
    }
    if (term.plain < 0) continue;
    // Values pass through shared memory: a draw for each of a thread's 64 sums would be 64 copies of Philox.
    const Plain& n = plan.plains.all[term.plain];
    const bool multiplicative = is_multiplicative(plan.form);
    const Draw<float> draw = n.noisy ? draw_of(plan, n) : Draw<float>(plan.form, 0, 0, 0, 0);
    __syncthreads();
    fill_tile(plan.tiling, tile, C, u, [&](int c, int at) {
      float v = get(n.z, tile.image * n.z.image + c * plane + at);
      if (n.normed) v = (v - n.mean[c]) * n.rstd[c];
      if (n.noisy) v = mixed_value(multiplicative, v, draw.element(uint64_t((tile.image * C + c) * plane + at)));
      return plan.w[n.weight] * v;
    });
    __syncthreads();
    sum.add_tile(plan, u);
  }
  const int64_t out = (tile.image * plan.nodes + s.node) * C * plane;
  sum.each_inside(plan, tile, [&](float value, int c, int at) {
    float* total = s.sum + tile.image * s.sum_image + c * plane + at;
    if (!s.opens) value += *total;
    if (s.closes) put(plan.output, plan.wide, out + c * plane + at, value);
    else *total = value;
  });
}

}  // namespace

// Beyond kMostChannels a tile of four pixels would not fit 8192 floats.
size_t mixed_edges_workspace(const MixedEdgesParams& p) {
  if (p.channels > kMostChannels)
    throw std::invalid_argument("mixed_edges on CUDA takes at most " + std::to_string(kMostChannels) +
                                " channels, not " + std::to_string(p.channels));
  return Planner(p, true).arena.used;
}

// Launches level by level; the first level has no node to wait for, each later one reads the node
// that the level before closed.
int mixed_edges_fwd(const MixedEdgesParams& p) {
  const Planner planner(p, false);
  Launcher run{planner, p.stream, planner.upload(p.stream)};
  const int gram_blocks = (run.plan().C * run.plan().C + kThreads - 1) / kThreads;
  for (int level = 0; level < p.nodes; ++level) {
    const Range states = planner.level_states(level);
    const Range halves = planner.halves_of(states), gathered = planner.gathered_of(states);
    const Range sums = planner.level_sums[level];
    launch_pools_and_reduces(run, states);
    run(moments_kernel, dim3(run.plan().groups, gathered.count()), 0, gathered.first);
    launch_fold_plains(run, states);
    for (Which which : {Which::first, Which::second}) {
      launch_depthwise(run, states, which);
      if (p.training) {
        run(FASTNAS_VARIANT(run, cross_pieces, gather_kernel), dim3(run.plan().groups, halves.count()),
            run.shared(1), halves.first, which);
        run(fold_gram_kernel, dim3(halves.count(), gram_blocks), 0, halves.first, which);
      }
      launch_fold_rows(run, states, which, p.training);
      if (which == Which::first) launch_second_inputs(run, states);
    }
    run(FASTNAS_VARIANT(run, product_pieces, sum_kernel), dim3(run.tiles(), sums.count()), run.shared(1), sums.first);
  }
  return run.error;
}

}  // namespace fastnas::cuda
