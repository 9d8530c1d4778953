// Runs mixed_edges backward on CUDA: state by state from the last; everything that leaves a state at once, so that
// the gradient of the state is complete and written once. u is computed again, or read where it was kept.
//
// The order of the six launches follows from what needs a sum over all images. dy of every node that the state's
// edges enter is complete, as those nodes come later. (1) u of the final halves with P = sum dy (u - mean u)^T, values
// with their sums over dy, folded to dL/dw, dL/dW and the matrices of dL/du. (2) du, and (3) dv of the sep_convs
// through the transposed second convolution. (4) As (1) for their first halves, with dv in place of dy, and dL/dW of
// strided skips. (5) du of these; dL/dz of pools and strided skips. (6) dx, and dL/dD from du. No two blocks add to
// one address; partial sums of groups of images are added in order by the last block of a job.
#include "mixed_edges.h"

#include "mixed_edges_common.h"
#include "mixed_edges_pools.h"

namespace fastnas::cuda {
namespace {

// Computes dL/du = A^T dy - B (u - mean u) - A^T mean(dy) over a tile: two products into one set of sums, written once.
template <class Units, int M> __device__ void half_gradient(const Plan& plan, const Half& h, float* u) {
  const Tiling& t = plan.product;
  float* const dy = u + tile_floats(plan, t);
  const Tile tile = tile_of_block(t);
  clear_tails(t, plan.C, u);
  clear_tails(t, plan.C, dy);
  load_plainly(plan, t, u_of(plan, h), tile, u);
  load_plainly(plan, t, h.dy, tile, dy);
  __syncthreads();
  Product<Units, M> sum;
  sum.add(plan, t, h.from_dy, dy, plan.C);
  sum.add(plan, t, h.from_u, u, plan.C);
  const Planes du = plan.own(h.du);
  sum.each_quad(plan, t, tile, u, [&](const Place& p, Quad quad) {
    const float bias = h.du_bias[p.channel];
#pragma unroll
    for (int k = 0; k < 4; ++k) quad.v[k] += bias;
    put_quad(du, tile.image * du.image + p.channel * plan.plane() + p.offset, p.count, quad);
  });
}

// Computes dL/dz of a quad of a value, of all the terms that read it. Each has its own dy, q and weight; they are added
// here, so that dx goes through the windows of a pool once. Averages are divided by their windows' counts.
__device__ Quad value_gradient(const Plan& plan, const Value& value, const Place& p, int64_t at) {
  const Quad z = get_quad(value.z, at, p.count);
  Quad dz{};
  for (int k = value.first_plain; k < value.last_plain; ++k) {
    const Plain& n = plan.plains.all[plan.readers[k]];
    for (int i = 0; i < p.count; ++i) dz.v[i] += plain_gradient(plan, n, z.v[i], at + i, p.channel);
  }
  if (value.made != Made::average) return dz;
  const int row = p.offset / plan.out.cols, col = p.offset % plan.out.cols;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    dz.v[i] *= strips::pool_share(row * value.stride, (col + i) * value.stride, value.x.grid);
  return dz;
}

// Writes dL/dz of a pool over a tile, or takes dL/dz of a strided skip back through its matrices: W^T dz of a part,
// from the part's own channels of dz, as those of the other part have zeros in W, and 0 times their inf would be NaN.
// The parts reach different pixels of x, so each has a plane.
template <class Units, int M> __device__ void gradient_of_value(const Plan& plan, const Value& value, float* dz) {
  const Tiling& t = plan.product;
  const Tile tile = tile_of_block(t);
  const bool strided = value.made == Made::strided;
  const Planes to = plan.own(value.dz, DType::f32);
  clear_tails(t, plan.C, dz);
  for (int i = int(threadIdx.x); i < plan.C * t.quads(); i += kThreads) {
    const Place p = place_of_quad(t, tile, i / t.quads(), i % t.quads());
    const int64_t at = tile.image * plan.image() + p.channel * plan.plane() + p.offset;
    const Quad quad = value_gradient(plan, value, p, at);
    if (strided) store_quad(dz + p.channel * t.pitch + p.pixel, quad);
    else put_quad(to, at, p.count, quad);
  }
  if (!strided) return;
  float* const space = dz + tile_floats(plan, t);
  for (int part = 0; part < 2; ++part) {
    __syncthreads();
    Product<Units, M> sum;
    const int own = plan.C / 2 * part;
    sum.add(plan, t, value.back + 4 * own, dz + own * t.pitch, plan.C / 2);
    const Planes dx = plan.own(value.dx + part * plan.images * plan.image(), DType::f32);
    sum.each_quad(plan, t, tile, space, [&](const Place& p, const Quad& quad) {
      put_quad(dx, tile.image * dx.image + p.channel * plan.plane() + p.offset, p.count, quad);
    });
  }
}

// grid (tiles of all images, halves + values): computes dL/du of halves, from dy (or dv) and u, and dL/dz of values.
template <class Units, int M>
__global__ void __launch_bounds__(kThreads)
    du_kernel(const __grid_constant__ Plan plan, int first, int halves, int first_value, Which which) {
  DYNAMIC_SHARED(float, shared);
  const int job = int(blockIdx.y);
  if (job >= halves) {
    const Value* const value = plan.values.at(first_value + job - halves);
    if (value && value->made != Made::state) gradient_of_value<Units, M>(plan, *value, shared);
    return;
  }
  const Half* const h = plan.halves.at(first + job);
  if (is_wanted(h, which)) half_gradient<Units, M>(plan, *h, shared);
}

// --- launches ------------------------------------------------------------------------------------------------

void launch_du(Launcher& run, Range states, Which which, bool with_values) {
  const Range halves = run.planner.halves_of(states), values = run.planner.values_of(states);
  const int jobs = halves.count() + (with_values ? values.count() : 0);
  run(FASTNAS_VARIANT(run, product_pieces, du_kernel), dim3(run.tiles(), jobs), run.shared(run.plan().product, 2),
      halves.first, halves.count(), values.first, which);
}

// Launches everything that leaves one state. If neither the state's gradient nor parameters are
// wanted it ends after dL/dw.
void launch_state(Launcher& run, int state) {
  const Plan& plan = run.plan();
  const Source& source = run.planner.sources[state];
  const Range here{state, state + 1};
  if (!run.planner.p.v) {  // v is computed again ("minimal")
    launch_gather(run, here, Which::inner, Sums::none, false);
    launch_second_inputs(run, here);
  }
  launch_gather(run, here, Which::final, Sums::cross, true);
  if (!source.wanted && !plan.wants_params) return;
  launch_du(run, here, Which::final, false);
  launch_dv(run, here);
  launch_gather(run, here, Which::inner, Sums::cross, plan.wants_params);
  launch_du(run, here, Which::inner, source.wanted);
  launch_state_gradients(run, state);
}

}  // namespace

int mixed_edges_bwd(const MixedEdgesParams& p) {
  const Planner planner(p, false);
  Launcher run{planner, p.stream, planner.upload(p.stream)};
  for (int state = planner.states() - 1; state >= 0; --state) launch_state(run, state);
  return run.error;
}

}  // namespace fastnas::cuda
