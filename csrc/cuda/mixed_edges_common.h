// Declares what forward and backward of mixed_edges share: launches, and the steps that are computed again on the way
// back.
#pragma once

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
__device__ bool is_wanted(const Half* h, Which which) {
  if (!h) return false;
  switch (which) {
    case Which::first: return !h->second;
    case Which::second: return h->second;
    case Which::final: return h->final;
    default: return !h->final;  // inner
  }
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

// Computes dL/dz of a normed term at an element of [N, C, rows, cols]: w r (dy - mean dy - (z - mean z) r q), with
// the noise's d drawn again where it multiplies dy.
__device__ float plain_gradient(const Plan& plan, const Plain& n, float z, int64_t at, int c) {
  float dy = static_cast<const float*>(n.dy.data)[at];
  if (n.noisy && is_multiplicative(plan.form)) dy *= draw_of(plan, n).element(uint64_t(at));
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
  int tiles() const { return int(plan().images) * plan().product.count(); }
  size_t shared(const Tiling& t, int tiles_held) const {
    return sizeof(float) * size_t(tiles_held) * tile_floats(plan(), t);
  }
  template <class... P, class... A> void operator()(void (*kernel)(P...), dim3 grid, size_t bytes, A... arguments) {
    if (!error && grid.x && grid.y) error = launch(kernel, grid, kThreads, bytes, stream, plan(), arguments...);
  }
  // Pieces of a tile's product that a worker has.
  int product_pieces() const {
    return plan().tensor ? a_worker<TensorCores>(TensorCores::product_pieces(plan(), plan().product))
                         : a_worker<CudaCores>(CudaCores::product_pieces(plan(), plan().product));
  }

 private:
  template <class Units> static int a_worker(int pieces) { return (pieces + kWorkers<Units> - 1) / kWorkers<Units>; }
};

// Picks the kernel for these units and that many pieces of a worker. Tilings are made so that four
// are enough (plan.cu).
template <class Kernel> struct Variants { Kernel cuda[3], tensor[3]; };
template <class Kernel> Kernel variant(bool tensor, int pieces, const Variants<Kernel>& of) {
  const int index = pieces <= 1 ? 0 : pieces <= 2 ? 1 : 2;
  return tensor ? of.tensor[index] : of.cuda[index];
}
#define FASTNAS_VARIANT(run, pieces, kernel)                                                      \
  variant<decltype(&kernel<CudaCores, 1>)>(                                                       \
      (run).plan().tensor, (run).pieces(),                                                        \
      {{kernel<CudaCores, 1>, kernel<CudaCores, 2>, kernel<CudaCores, 4>},                        \
       {kernel<TensorCores, 1>, kernel<TensorCores, 2>, kernel<TensorCores, 4>}})

// The steps of what leaves some states. Each is one launch, but gather of wide cells two.
void launch_gather(Launcher& run, Range states, Which which, Sums sums, bool values);
void launch_second_inputs(Launcher& run, Range states);                 // v
void launch_dv(Launcher& run, Range states);                            // dL/dv of second halves: needs du
void launch_state_gradients(Launcher& run, int state);                  // dL/dx and dL/dD: need du

}  // namespace fastnas::cuda
