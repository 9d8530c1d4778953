// Runs mixed_edges backward on CUDA: state by state from the last; everything that leaves a state at once, so that
// the gradient of the state is complete and written once. u is computed again, or read where it was kept.
//
// The order of the six launches follows from what needs a sum over all images. dy of every node that the state's
// edges enter is complete, as those nodes come later. (1) u of the final halves with P = sum dy (u - mean u)^T, values
// with their sums over dy, folded to dL/dw and the matrices of dL/du. (2) du, and (3) dv of the sep_convs
// through the transposed second convolution. (4) As (1) for their first halves, with dv in place of dy, and dL/dW of
// strided skips. (5) du of these; dL/dz of pools and strided skips. (6) dx, dL/dD from du, and dL/dW. No two blocks add
// to one address; partial sums of groups of images are added in order by the last block of a job.
#include "mixed_edges.h"

#include "mixed_edges_common.h"
#include "mixed_edges_pools.h"

namespace fastnas::cuda {
namespace {

// Computes dL/du = A^T dy - B (u - mean u) - A^T mean(dy) over a tile: two products into one set of sums. Outside of
// training it is the first alone.
template <class Units> __device__ void half_gradient(const Plan& plan, const Half& h, float* shared) {
  SHARED(Operand, operands, 2);
  Mixing<Units> mixing(plan, shared);
  if (threadIdx.x == 0) {
    const Planes u = u_of(plan, h);
    operands[0] = {h.dy, mixing.tile.image * h.dy.image, h.from_dy, nullptr, nullptr};
    operands[1] = {u, mixing.tile.image * u.image, h.from_u, nullptr, nullptr};
  }
  const Planes du = plan.own(h.du);
  mixing.each_pass([&] {
    mixing.add(operands, plan.training ? 2 : 1, plan.C, [&] {
      if (plan.training) mixing.add_constants(h.du_bias);
    });
    mixing.put(du, mixing.tile.image * du.image);
  });
}

// Adds dL/dz of a term that reads a value to the sums, of four quads at a time.
template <class Units>
__device__ void add_plain_gradient(const Plan& plan, const Value& value, const Plain& n, Mixing<Units>& mixing) {
  const int64_t image = mixing.tile.image * plan.image();
  const float w = plan.w[n.weight];
  mixing.each_four([&](const Place& at, int i) {
    Quad z[4], dy[4];
    float rstd[4], mean_dy[4], mean[4], rstd_q[4];
    mixing.four(static_cast<const float*>(n.dy.data) + image, at, i, dy);
    mixing.channels(n.rstd, i, rstd);
    if (!plan.training) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) mixing.sum[i + k][j] += w * rstd[k] * dy[k].v[j];
      return;
    }
    mixing.four(static_cast<const float*>(value.z.data) + image, at, i, z);
    mixing.channels(n.dy_mean, i, mean_dy);
    mixing.channels(n.stats, i, mean), mixing.channels(n.rstd_q, i, rstd_q);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mixing.sum[i + k][j] += norm_gradient(w * rstd[k], dy[k].v[j], mean_dy[k], z[k].v[j] - mean[k], rstd_q[k]);
  });
}

// Adds dL/dz of the terms that read a value. Each term has its own dy, q and weight; they are added here, so that dx
// goes through the windows of a pool once. Those with noise that multiplies take long, as those of unaligned planes.
template <class Units>
__device__ void add_value_gradients(const Plan& plan, const Value& value, Mixing<Units>& mixing) {
  const int64_t image = mixing.tile.image * plan.image();
  for (int reader = value.first_plain; reader < value.last_plain; ++reader) {
    const Plain& n = plan.plains.all[plan.readers[reader]];
    if (n.dy.aligned && !(n.noisy && is_multiplicative(plan.form))) {
      add_plain_gradient(plan, value, n, mixing);
      continue;
    }
    mixing.each_quad_by_turns([&](const Place& p, float(&sum)[4]) {
      const int64_t at = image + p.channel * plan.plane() + p.offset;
      const Quad z = get_quad(value.z, at, p.count);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k < p.count) sum[k] += plain_gradient(plan, n, z.v[k], at + k, p.channel);
    });
  }
}

// Divides dL/dz of an average by the counts of its windows.
template <class Units> __device__ void share_out(const Plan& plan, const Value& value, Mixing<Units>& mixing) {
  const Place first = mixing.place();
  const int row = first.offset / plan.out.cols * value.stride, col = first.offset % plan.out.cols;
  float share[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) share[k] = strips::pool_share(row, (col + k) * value.stride, value.x.grid);
  mixing.each_quad([&](const Place&, float(&sum)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] *= share[k];
  });
}

// Takes dL/dz of a strided skip, which the block has just written, back through its matrices: W^T dz of a part, from
// the part's own channels of dz, as those of the other part have zeros in W, and 0 times their inf would be NaN. The
// parts reach different pixels of x, so each has a plane.
template <class Units>
__device__ void strided_gradient(const Plan& plan, const Value& value, int part, Mixing<Units>& mixing) {
  SHARED(Operand, operands, 1);
  const int own = plan.C / 2 * part;
  const Planes dz = plan.own(value.dz, DType::f32);
  const Planes dx = plan.own(value.dx + part * plan.images * plan.image(), DType::f32);
  __syncthreads();
  if (threadIdx.x == 0)
    operands[0] = {dz, mixing.tile.image * dz.image + own * plan.plane(), value.back + 4 * own, nullptr, nullptr};
  mixing.each_pass([&] {
    mixing.add(operands, 1, plan.C / 2, [] {});
    mixing.put(dx, mixing.tile.image * dx.image);
  });
}

template <class Units> __device__ void gradient_of_value(const Plan& plan, const Value& value, float* shared) {
  Mixing<Units> mixing(plan, shared);
  mixing.each_pass([&] {
    add_value_gradients(plan, value, mixing);
    if (value.made == Made::average) share_out(plan, value, mixing);
    mixing.put(plan.own(value.dz, DType::f32), mixing.tile.image * plan.image());
  });
  if (value.made != Made::strided) return;
#pragma unroll 1
  for (int part = 0; part < 2; ++part) strided_gradient(plan, value, part, mixing);
}

// grid (tiles of all images, halves + values): computes dL/du of halves, from dy (or dv) and u, and dL/dz of values.
template <class Units>
__global__ void __launch_bounds__(kThreads, Units::kBlocks)
    du_kernel(const __grid_constant__ Plan plan, Range halves, Which which, int jobs, int first_value) {
  DYNAMIC_SHARED(float, shared);
  const int job = int(blockIdx.y);
  if (job >= jobs) {
    const Value* const value = plan.values.at(first_value + job - jobs);
    if (value && value->made != Made::state) gradient_of_value<Units>(plan, *value, shared);
    return;
  }
  if (const Half* const h = wanted_half(plan, halves, which, job)) half_gradient<Units>(plan, *h, shared);
}

// --- launches ------------------------------------------------------------------------------------------------

void launch_du(Launcher& run, Range states, Which which, bool with_values) {
  const Range values = run.planner.values_of(states);
  const int jobs = run.wanted(states, which);
  run.mix(du_kernel<CudaMixing>, du_kernel<TensorMixing>, jobs + (with_values ? values.count() : 0),
          run.planner.halves_of(states), which, jobs, values.first);
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
