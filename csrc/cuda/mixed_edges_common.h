// Declares what forward and backward of mixed_edges share: launches, and the steps that are
// computed again on the way back.
#pragma once

#include "mixed_edges_products.h"

namespace fastnas::cuda {

// Names the halves that a launch is about: its grid has a block row for every half of a level, and those of the
// other kind return at once. `inner` are first halves of sep_convs; a half of a dil_conv is both first and final.
enum class Which { first, second, final, inner };  // of the halves; inner: first halves of sep_convs

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
__device__ void load_strided(const Plan& plan, const Reduce& r, const Tile& tile, int part, float* to) {
  const Grid from = r.x.grid;
  fill_tile(plan.tiling, tile, plan.C, to, [&](int c, int at) {
    const int row = at / plan.out.cols * 2 + part, col = at % plan.out.cols * 2 + part;
    const bool inside = row < from.rows && col < from.cols;
    return inside ? relu(get(r.x, tile.image * r.x.image + int64_t(c) * from.pixels() + row * from.cols + col)) : 0.0f;
  });
}

// Loads a tile of a gradient: floats, all channels.
__device__ void load_gradient(const Plan& plan, const Planes& dy, const Tile& tile, float* to) {
  const float* from = static_cast<const float*>(dy.data) + tile.image * dy.image;
  fill_tile(plan.tiling, tile, plan.C, to, [&](int c, int at) { return from[c * int64_t(dy.grid.pixels()) + at]; });
}

// Makes the noise of a term: the stream of its node and ordinal, and the spread, which
// fold_plain_kernel has left in plan.std.
__device__ Draw<float> draw_of(const Plan& plan, const Plain& n) {
  const double spread = plan.level[1] * (is_relative(plan.form) ? plan.std[n.skip] : 1.0);
  return Draw<float>(plan.form, uint64_t(plan.rng[2 * n.target]),
                     uint64_t(plan.rng[2 * n.target + 1]) + uint64_t(n.ordinal), plan.level[0], spread);
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
  int tiles() const { return int(plan().images) * plan().tiling.count(); }
  int row_blocks() const { return (plan().C + kWarps - 1) / kWarps; }
  int elementwise_blocks() const {
    return int(std::min<int64_t>(1024, (plan().images * plan().C * plan().out.pixels() + kThreads - 1) / kThreads));
  }
  size_t shared(int tiles_held) const { return sizeof(float) * size_t(tiles_held) * tile_floats(plan()); }
  // Channels that a block convolves at once: their outputs are at most 2048, 16 a thread or two
  // strips, and their patches fit.
  int channels_at_once(const Tiling& t, const Grid& patch) const {
    return std::max(1, std::min({plan().C, 2048 / t.tile.pixels(), plan().patch_floats / patch.pixels()}));
  }
  unsigned slabs(const Tiling& t, int at_once) const {
    return unsigned(plan().images * t.count() * ((plan().C + at_once - 1) / at_once));
  }
  template <class... P, class... A> void operator()(void (*kernel)(P...), dim3 grid, size_t bytes, A... arguments) {
    if (!error && grid.x && grid.y) error = launch(kernel, grid, kThreads, bytes, stream, plan(), arguments...);
  }
  // Pieces of a tile's product, or of a cross, that a worker has.
  int product_pieces() const { return a_worker(&CudaCores::product_pieces, &TensorCores::product_pieces); }
  int cross_pieces() const { return a_worker(&CudaCores::cross_pieces, &TensorCores::cross_pieces); }

 private:
  using Pieces = int(const Plan&);
  int a_worker(Pieces* cuda, Pieces* tensor) const {
    const int pieces = plan().tensor ? tensor(plan()) : cuda(plan());
    const int workers = plan().tensor ? kWorkers<TensorCores> : kWorkers<CudaCores>;
    return (pieces + workers - 1) / workers;
  }
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

// The steps of what leaves some states, of halves those that are `which`. Each is one to three kernels.
void launch_depthwise(Launcher& run, Range states, Which which);                 // u
void launch_fold_rows(Launcher& run, Range states, Which which, bool gathered);  // A
void launch_second_inputs(Launcher& run, Range states);                          // v
void launch_pools_and_reduces(Launcher& run, Range states);                      // z
void launch_fold_plains(Launcher& run, Range states);                            // mean, rstd
void launch_dots(Launcher& run, Range states);                                   // dL/dw, q: needs dL/dy and z
void launch_plain_gradients(Launcher& run, Range states, bool wants_dx);
void launch_taps(Launcher& run, Range states);                                   // dL/dD: needs du

}  // namespace fastnas::cuda
