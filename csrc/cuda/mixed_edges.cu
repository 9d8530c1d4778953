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

// Finds u of a half as an operand: it is multiplied by A, centred in training.
__device__ Operand operand_of(const Plan& plan, const Half& h, int64_t image) {
  const Planes u = u_of(plan, h);
  return {u, image * u.image, h.fold, plan.training ? h.shift : nullptr, h.kept};
}

// grid (tiles of all images, first halves of sep_convs): computes v = relu(BN(W u)), written as the stored dtype.
// Outside of training, where u is not centred, the constant is `bias`.
template <class Units>
__global__ void __launch_bounds__(kThreads, Units::kBlocks)
    second_input_kernel(const __grid_constant__ Plan plan, const Range halves) {
  const Half* const h = wanted_half(plan, halves, Which::inner, int(blockIdx.y));
  if (!h || !h->output) return;
  DYNAMIC_SHARED(float, shared);
  SHARED(Operand, operands, 1);
  Mixing<Units> mixing(plan, shared);
  if (threadIdx.x == 0) operands[0] = operand_of(plan, *h, mixing.tile.image);
  const Planes v = plan.own(h->output);
  mixing.each_pass([&] {
    mixing.add(operands, 1, plan.C, [&] {
      if (h->bias) mixing.add_constants(h->bias);
    });
    mixing.each_quad([&](const Place&, float(&sum)[4]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] = relu(sum[k]);
    });
    mixing.put(v, mixing.tile.image * v.image);
  });
}

// Holds what a term that is no convolution needs: z of the tile's image, and if it is batch normalised mean and rstd.
struct PlainTerm {
  Planes z;
  int64_t at;
  const float *mean, *rstd;
  float w;
  int plain;
  bool takes_long;  // it is noisy, or its planes are read value by value
};

// Adds a term that takes long to the sums.
template <class Units> __device__ void add_by_turns(const Plan& plan, const PlainTerm& term, Mixing<Units>& mixing) {
  const Plain& n = plan.plains.all[term.plain];
  const bool multiplicative = is_multiplicative(plan.form);
  mixing.each_quad_by_turns([&](const Place& p, float(&sum)[4]) {
    const int64_t at = p.channel * plan.plane() + p.offset;
    const float mean = term.mean ? term.mean[p.channel] : 0.0f, rstd = term.mean ? term.rstd[p.channel] : 1.0f;
    Quad z = get_quad(term.z, term.at + at, p.count);
#pragma unroll
    for (int k = 0; k < 4; ++k) z.v[k] = (z.v[k] - mean) * rstd;
    if (n.noisy) {
      const float4 d = noise_of(plan, n, mixing.tile.image * plan.image() + at);
      z = {{mixed_value(multiplicative, z.v[0], d.x), mixed_value(multiplicative, z.v[1], d.y),
            mixed_value(multiplicative, z.v[2], d.z), mixed_value(multiplicative, z.v[3], d.w)}};
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += term.w * z.v[k];
  });
}

// Adds another.
template <class Units> __device__ void add_plain(const PlainTerm& term, Mixing<Units>& mixing) {
  with_type(term.z.type, [&](auto zero) {
    const auto* const image = static_cast<const decltype(zero)*>(term.z.data) + term.at;
    mixing.each_four([&](const Place& at, int i) {
      Quad z[4];
      float mean[4] = {}, rstd[4] = {1, 1, 1, 1};
      mixing.four(image, at, i, z);
      if (term.mean) mixing.channels(term.mean, i, mean), mixing.channels(term.rstd, i, rstd);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) mixing.sum[i + k][j] += term.w * ((z[k].v[j] - mean[k]) * rstd[k]);
    });
  });
}

// Lists the terms from `first` on that are in the path, at most 32, each by a lane of the block's first warp.
struct Terms {
  Operand operands[kMostOperands];
  PlainTerm plains[kMostOperands];
  int operands_count, plains_count;
};
__device__ void list_terms(const Plan& plan, int first, int last, int64_t image, Terms& terms) {
  if (warp_index() != 0) return;
  const int own = first + lane_index();
  const Term term = own < last ? plan.terms[own] : Term{-1, -1};
  const bool is_plain = term.half < 0 && term.plain >= 0;
  const unsigned below = (1u << lane_index()) - 1;
  const unsigned halves = __ballot_sync(0xffffffffu, term.half >= 0), plains = __ballot_sync(0xffffffffu, is_plain);
  if (lane_index() == 0) terms.operands_count = __popc(halves), terms.plains_count = __popc(plains);
  if (term.half >= 0) {
    terms.operands[__popc(halves & below)] = operand_of(plan, plan.halves.all[term.half], image);
  } else if (is_plain) {
    const Plain& n = plan.plains.all[term.plain];
    const float* const mean = n.normed ? n.stats : nullptr;
    terms.plains[__popc(plains & below)] = {n.z,  image * n.z.image, mean, n.rstd, plan.w[n.weight],
                                            term.plain, n.noisy || !n.z.aligned};
  }
}

// Adds what levels before gave.
template <class Units> __device__ void add_before(const Plan& plan, const Planes& total, Mixing<Units>& mixing) {
  if (!total.aligned)
    return mixing.each_quad_by_turns([&](const Place& p, float(&sum)[4]) {
      const int64_t at = mixing.tile.image * total.image + p.channel * plan.plane() + p.offset;
      const Quad before = get_quad(total, at, p.count);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += before.v[k];
    });
  const float* const image = static_cast<const float*>(total.data) + mixing.tile.image * total.image;
  mixing.each_four([&](const Place& at, int i) {
    Quad before[4];
    mixing.four(image, at, i, before);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) mixing.sum[i + k][j] += before[k].v[j];
  });
}

// grid (tiles of all images, sums): adds what the edges of a level give a node.
//
// Reads u of every final half and z of every other term, keeps the sum of a tile in registers through all terms and
// writes it once. Terms without a convolution are added while u of the first is on its way; biases, which there are
// outside of training only, at the end. Levels before added to the same node in earlier launches; a block reads and
// writes only its own tile of that sum.
template <class Units>
__global__ void __launch_bounds__(kThreads, Units::kBlocks - 1)
    sum_kernel(const __grid_constant__ Plan plan, int first) {
  const Sum& s = plan.sums[first + blockIdx.y];
  DYNAMIC_SHARED(float, shared);
  SHARED(Terms, terms, 1);
  Mixing<Units> mixing(plan, shared);
  const Planes output{plan.output, plan.nodes * plan.image(), plan.out, plan.type, plan.output_aligned};
  const Planes total{s.sum, s.sum_image, plan.out, DType::f32, plan.output_aligned};
  const auto image = [&](const Planes& of) { return mixing.tile.image * of.image; };
  mixing.each_pass([&] {
    if (!s.opens) add_before(plan, total, mixing);
    for (int begin = s.first; begin < s.last; begin += kMostOperands) {
      if (begin > s.first) __syncthreads();
      list_terms(plan, begin, s.last, mixing.tile.image, terms[0]);
      __syncthreads();
      for (int k = 0; k < terms[0].plains_count; ++k)
        if (terms[0].plains[k].takes_long) add_by_turns(plan, terms[0].plains[k], mixing);
      mixing.add(terms[0].operands, terms[0].operands_count, plan.C, [&] {
        for (int k = 0; k < terms[0].plains_count; ++k)
          if (!terms[0].plains[k].takes_long) add_plain(terms[0].plains[k], mixing);
      });
    }
    for (int i = s.first; i < s.last && !plan.training; ++i)
      if (const int half = plan.terms[i].half; half >= 0) mixing.add_constants(plan.halves.all[half].bias);
    if (s.closes) mixing.put(output, image(output) + s.node * plan.image());
    else mixing.put(total, image(total));
  });
}

}  // namespace

void launch_second_inputs(Launcher& run, Range states) {
  run.mix(second_input_kernel<CudaMixing>, second_input_kernel<TensorMixing>, run.wanted(states, Which::inner),
          run.planner.halves_of(states));
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
    run.mix(sum_kernel<CudaMixing>, sum_kernel<TensorMixing>, sums.count(), sums.first);
  }
  return run.error;
}

}  // namespace fastnas::cuda
