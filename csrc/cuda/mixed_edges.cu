// Runs mixed_edges forward on CUDA: four launches for each level of the DAG, all edges of it at once.
//
// (1) u of the first halves with its Gram matrices, pools and strided skips with their moments, and from these the
// batch statistics; (2) v between the two halves of a sep_conv; (3) u of the second halves, alike; (4) one kernel that
// adds the level's edges to every node they enter. Statistics come from Gram matrices of u, so z is never formed
// before its batch norm is known. Launches follow each other on one stream, which is the only barrier between blocks:
// no kernel waits for another block. The last block of a job to end folds its sums, in an order that does not depend
// on which block that is, so the bits depend on the inputs alone.
#include "mixed_edges.h"

#include <stdexcept>
#include <string>

#include "mixed_edges_common.h"

namespace fastnas::cuda {
namespace {

// Loads a tile of u, centred in training.
__device__ void load_u(const Plan& plan, const Tiling& t, const Half& h, const Tile& tile, float* to) {
  const Planes u = u_of(plan, h);
  const float* const shift = plan.training ? h.shift : nullptr;
  load_tile(t, tile, plan.C, u, tile.image * u.image, to, [&](int c) { return shift ? shift[c] : 0.0f; });
}

// grid (tiles of all images, halves): computes v = relu(BN(W u)) of the first halves of sep_convs, written as the
// stored dtype. In training u is centred while it is loaded, outside of it the constant is `bias`.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) second_input_kernel(const __grid_constant__ Plan plan, int first) {
  const Half* const job = plan.halves.at(first + blockIdx.y);
  if (!job || job->final || !job->output) return;
  const Half& h = *job;
  DYNAMIC_SHARED(float, u);
  const Tiling& t = plan.product;
  const Tile tile = tile_of_block(t);
  clear_tails(t, plan.C, u);
  load_u(plan, t, h, tile, u);
  __syncthreads();
  Product<Units, M> sum;
  sum.add(plan, t, h.fold, u, plan.C);
  const Planes v = plan.own(h.output);
  sum.each_quad(plan, t, tile, u, [&](const Place& p, Quad quad) {
    const float bias = h.bias ? h.bias[p.channel] : 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) quad.v[k] = relu(quad.v[k] + bias);
    put_quad(v, tile.image * v.image + p.channel * plan.plane() + p.offset, p.count, quad);
  });
}

// Brings a term that is no convolution into a tile, batch normalised or not, times its weight, without noise.
__device__ void bring_plain(const Plan& plan, const Tiling& t, const Plain& n, const Tile& tile, float* to) {
  const float w = plan.w[n.weight];
  load_plainly(plan, t, n.z, tile, to);
  __syncthreads();
  for (QuadWalk walk(t); walk.channel < plan.C; walk.go_on()) {
    const float mean = n.normed ? n.stats[walk.channel] : 0.0f, rstd = n.normed ? n.rstd[walk.channel] : 1.0f;
    float* const at = to + walk.channel * t.pitch + 4 * walk.quad;
    Quad quad = quad_at(at);
#pragma unroll
    for (int k = 0; k < 4; ++k) quad.v[k] = w * ((quad.v[k] - mean) * rstd);
    store_quad(at, quad);
  }
}

// Brings a noisy term into a tile. Values are drawn one by one, in a loop that is not unrolled: a draw for each of a
// thread's 64 sums would be 64 copies of Philox.
__device__ void bring_noisy(const Plan& plan, const Tiling& t, const Plain& n, const Tile& tile, float* to) {
  const bool multiplicative = is_multiplicative(plan.form);
  const Draw<float> draw = draw_of(plan, n);
  for (int i = int(threadIdx.x); i < plan.C * t.tile.pixels(); i += kThreads) {
    const int c = i / t.tile.pixels(), pixel = i % t.tile.pixels(), k = pixel % 4;
    const Place p = place_of_quad(t, tile, c, pixel / 4);
    float v = 0;
    if (k < p.count) {
      const int64_t at = p.channel * plan.plane() + p.offset + k;
      v = get(n.z, tile.image * n.z.image + at);
      if (n.normed) v = (v - n.stats[c]) * n.rstd[c];
      v = plan.w[n.weight] * mixed_value(multiplicative, v, draw.element(uint64_t(tile.image * plan.image() + at)));
    }
    to[c * t.pitch + pixel] = v;
  }
}

// Adds w BN(W u) of a final half to the sums, and keeps u where backward will read it ("fast"). Readers of the tile
// before leave it at the first barrier.
template <class Units, int M>
__device__ void add_half(const Plan& plan, const Tiling& t, const Half& h, const Tile& tile, float* u,
                         Product<Units, M>& sum) {
  __syncthreads();
  load_u(plan, t, h, tile, u);
  __syncthreads();
  sum.add(plan, t, h.fold, u, plan.C);
  const Planes kept = plan.own(h.kept);
  if (h.kept) store_tile(t, tile, plan.C, u, kept, tile.image * kept.image);
}

// grid (tiles of all images, sums): adds what the edges of a level give a node.
//
// Reads u of every final half and z of every other term, keeps the sum of a tile in registers, 64 floats a thread
// at most, through all terms and writes it once. Each term's tile passes through the same shared memory, hence the
// two barriers: one before it is overwritten, one before it is read. Terms are added in the table's order; biases,
// which there are outside of training only, at the end. Levels before added to the same node in earlier launches; a
// block reads and writes only its own tile of that sum.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ Plan plan, int first) {
  const Sum& s = plan.sums[first + blockIdx.y];
  DYNAMIC_SHARED(float, u);
  const Tiling& t = plan.product;
  const Tile tile = tile_of_block(t);
  clear_tails(t, plan.C, u);
  Product<Units, M> sum;
  for (int i = s.first; i < s.last; ++i) {
    const Term term = plan.terms[i];
    if (term.half >= 0) {
      add_half(plan, t, plan.halves.all[term.half], tile, u, sum);
    } else if (term.plain >= 0) {
      const Plain& n = plan.plains.all[term.plain];
      __syncthreads();
      if (n.noisy) bring_noisy(plan, t, n, tile, u);
      else bring_plain(plan, t, n, tile, u);
      __syncthreads();
      sum.add_tile(plan, t, u);
    }
  }
  const Planes output{plan.output, plan.nodes * plan.image(), plan.out, plan.type, plan.output_aligned};
  const Planes total{s.sum, s.sum_image, plan.out, DType::f32, plan.output_aligned};
  sum.each_quad(plan, t, tile, u, [&](const Place& p, Quad quad) {
    const int64_t at = p.channel * plan.plane() + p.offset;
    for (int i = s.first; i < s.last && !plan.training; ++i)
      if (const int half = plan.terms[i].half; half >= 0)
        for (int k = 0; k < 4; ++k) quad.v[k] += plan.halves.all[half].bias[p.channel];
    if (!s.opens) {
      const Quad before = get_quad(total, tile.image * s.sum_image + at, p.count);
#pragma unroll
      for (int k = 0; k < 4; ++k) quad.v[k] += before.v[k];
    }
    if (s.closes) put_quad(output, (tile.image * plan.nodes + s.node) * plan.image() + at, p.count, quad);
    else put_quad(total, tile.image * s.sum_image + at, p.count, quad);
  });
}

}  // namespace

void launch_second_inputs(Launcher& run, Range states) {
  const Range halves = run.planner.halves_of(states);
  run(FASTNAS_VARIANT(run, product_pieces, second_input_kernel), dim3(run.tiles(), halves.count()),
      run.shared(run.plan().product, 1), halves.first);
}

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
  const Sums gram = p.training ? Sums::gram : Sums::none;
  for (int level = 0; level < p.nodes; ++level) {
    const Range states = planner.level_states(level), sums = planner.level_sums[level];
    launch_gather(run, states, Which::first, gram, true);
    launch_second_inputs(run, states);
    launch_gather(run, states, Which::second, gram, false);
    run(FASTNAS_VARIANT(run, product_pieces, sum_kernel), dim3(run.tiles(), sums.count()),
        run.shared(run.plan().product, 1), sums.first);
  }
  return run.error;
}

}  // namespace fastnas::cuda
