// Declares what forward and backward of mixed_edges share: launches, and the steps that are computed again on the way
// back.
#pragma once

#include "mixed_edges_mix.h"
#include "mixed_edges_products.h"

namespace fastnas::cuda {

// Names the halves that a launch is about: its grid has a block row for every half of a level, and those of the
// other kind return at once. `inner` are first halves of sep_convs; a half of a dil_conv is both first and final.
enum class Which { first, second, final, inner };

// Names what the blocks of a gather sum over the pixels: nothing, u u^T or dy u^T.
enum class Sums { none, gram, cross };

// Says what a launch of gather_kernel is about. `strided`: of the values it is the weights of strided skips that are
// wanted. `wide`: u and z are computed, nothing is summed. `centres`: u is stored centred. The floats are of shared
// memory: of a tile, of the sums of a block's pieces, of a warp's patches and taps.
struct Gather {
  int first_half, halves, first_value, values;
  Which which;
  Sums sums;
  bool strided, wide, centres, two_tiles;
  int tile_floats, sum_floats, warp_floats;
};

namespace {

// Says whether a block has work: the job is in the path (not null) and of the kind that the launch is about.
__device__ __host__ inline bool is_wanted(const Half* h, Which which) {
  if (!h) return false;
  switch (which) {
    case Which::first: return !h->second;
    case Which::second: return h->second;
    case Which::final: return h->final;
    default: return !h->final;  // inner
  }
}

// Finds the index-th of some halves that a launch is about; null: there are fewer, as a sampled path may have. The
// lanes ask for 32 at once: one by one, each would cost a load that is waited for. All lanes of a warp must call it.
__device__ const Half* wanted_half(const Plan& plan, Range halves, Which which, int index) {
  for (int base = halves.first; base < halves.last; base += 32) {
    const int own = base + lane_index();
    unsigned found = __ballot_sync(0xffffffffu, own < halves.last && is_wanted(plan.halves.at(own), which));
    if (const int count = __popc(found); index >= count) {
      index -= count;
      continue;
    }
    for (; index > 0; --index) found &= found - 1;
    return plan.halves.at(base + __popc(~found & (found - 1)));
  }
  return nullptr;
}

// Loads relu(x) of the pixels that a part of a strided skip reads: (2 row + part, 2 col + part),
// zeros beyond the image.
__device__ void load_strided(const Plan& plan, const Tiling& t, const Value& value, const Tile& tile, int part,
                             float* to) {
  const Planes& x = value.x;
  for (int i = int(threadIdx.x); i < plan.C * t.quads(); i += kThreads) {
    const Place p = place_of_quad(t, tile, i / t.quads(), i % t.quads());
    const int row = p.offset / t.grid.cols * 2 + part, col = p.offset % t.grid.cols * 2 + part;
    const int64_t at = tile.image * x.image + p.channel * int64_t(x.grid.pixels()) + int64_t(row) * x.grid.cols + col;
    Quad quad{};
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < p.count && row < x.grid.rows && col + 2 * k < x.grid.cols) quad.v[k] = relu(get(x, at + 2 * k));
    store_quad(to + p.channel * t.pitch + p.pixel, quad);
  }
}

// Loads a tile of a gradient or of centred u, all channels.
__device__ void load_plainly(const Plan& plan, const Tiling& t, const Planes& from, const Tile& tile, float* to) {
  load_tile(t, tile, plan.C, from, tile.image * from.image, to, [](int) { return 0.0f; });
}

// Says where the u of a half lies that products read: where forward kept it, it is centred and of the call's dtype.
__device__ Planes u_of(const Plan& plan, const Half& h) {
  return h.u ? plan.own(h.u, DType::f32) : plan.own(h.kept);
}

// Makes the noise of a term: the stream of its node and ordinal, and the spread, which fold_plain has left in plan.std.
__device__ Draw<float> draw_of(const Plan& plan, const Plain& n) {
  const double spread = plan.level[1] * (is_relative(plan.form) ? plan.std[n.skip] : 1.0);
  return Draw<float>(plan.form, uint64_t(plan.rng[2 * n.target]),
                     uint64_t(plan.rng[2 * n.target + 1]) + uint64_t(n.ordinal), plan.level[0], spread);
}

// Draws the noise of a term for four elements. It is not inlined, as it is long and seldom wanted.
__device__ __noinline__ float4 noise_of(const Plan& plan, const Plain& n, int64_t at) {
  const Draw<float> draw = draw_of(plan, n);
  if (at % 4 == 0) {
    const Draws<float> d = draw.quad(uint64_t(at) / 4);
    return make_float4(d.v[0], d.v[1], d.v[2], d.v[3]);
  }
  return make_float4(draw.element(uint64_t(at)), draw.element(uint64_t(at + 1)), draw.element(uint64_t(at + 2)),
                     draw.element(uint64_t(at + 3)));
}

// Computes dL/dz of a normed term at an element of [N, C, rows, cols]: w r (dy - mean dy - (z - mean z) r q), with
// the noise's d drawn again where it multiplies dy; outside of training w r dy.
__device__ float plain_gradient(const Plan& plan, const Plain& n, float z, int64_t at, int c) {
  float dy = static_cast<const float*>(n.dy.data)[at];
  if (n.noisy && is_multiplicative(plan.form)) dy *= draw_of(plan, n).element(uint64_t(at));
  if (!plan.training) return plan.w[n.weight] * n.rstd[c] * dy;
  return norm_gradient(plan.w[n.weight] * n.rstd[c], dy, n.dy_mean[c], z - n.stats[c], n.rstd_q[c]);
}

}  // namespace

// --- launches ----------------------------------------------------------------------------------------------

// Launches the kernels of one call, in order on one stream; what comes after an error is not launched. A launch
// without jobs (a level without pools, say) is left out, since CUDA refuses a grid of zero.
struct Launcher {
  const Planner& planner;
  void* stream;
  int error = 0;

  const Plan& plan() const { return planner.plan; }
  template <class... P, class... A> void operator()(void (*kernel)(P...), dim3 grid, size_t bytes, A... arguments) {
    if (!error && grid.x && grid.y) error = launch(kernel, grid, kThreads, bytes, stream, plan(), arguments...);
  }
  // Counts the halves of some states that a launch is about. Of a sampled path it is one an edge, at most.
  int wanted(Range states, Which which) const {
    if (planner.p.choice) return planner.halves_of(states).count() / 2;
    const std::vector<Half> halves = planner.all_halves(states);
    return int(std::count_if(halves.begin(), halves.end(), [&](const Half& h) { return is_wanted(&h, which); }));
  }
  // Launches a kernel that mixes channels, on the units that the call uses: a block for each tile and job.
  template <class Kernel, class... A> void mix(Kernel cuda, Kernel tensor, int jobs, A... arguments) {
    const Tiling& t = plan().product;
    (*this)(plan().tensor ? tensor : cuda, dim3(unsigned(plan().images) * t.count(), unsigned(jobs)),
            sizeof(float) * size_t(mixing_floats(plan())), arguments...);
  }
};

// The steps of what leaves some states. Each is one launch, but gather of wide cells two.
void launch_gather(Launcher& run, Range states, Which which, Sums sums, bool values);
void launch_second_inputs(Launcher& run, Range states);                 // v
void launch_dv(Launcher& run, Range states);                            // dL/dv of second halves: needs du
void launch_state_gradients(Launcher& run, int state);                  // dL/dx and dL/dD: need du

}  // namespace fastnas::cuda
