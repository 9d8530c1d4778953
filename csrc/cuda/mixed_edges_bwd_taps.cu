// Computes dL/dD of mixed_edges on CUDA, the gradients of the depthwise kernels.
//
// dL/dD[c][tap] = sum over images and pixels of du times the input shifted by the tap. torch's own kernel has a
// block for every channel and tap, each of which reads x and du again: 25 times for a 5x5. Here a thread holds all
// taps of a channel, so x and du are read once: x as a patch in shared memory, du straight from where it lies.
#include "mixed_edges_common.h"

namespace fastnas::cuda {
namespace {

// A thread works on so many rows of du at once. With four of them beside 25 taps the kernel takes
// 128 registers a thread.
constexpr int kTapRows = 4;
// Counts the channels of which a block sums the taps at once: those whose strips its threads
// cover, if their patches fit.
__device__ __host__ inline int channels_of_taps(const Plan& plan, const Half& h) {
  const Grid tile = plan.strip_tiling.tile, patch = patch_size(h, plan.strip_tiling);
  const int by_threads = kThreads / ((tile.rows + kTapRows - 1) / kTapRows * tile.cols);
  const int by_patch = plan.patch_floats / patch.pixels();
  return by_threads < 1 ? 1 : by_threads < by_patch ? by_threads : by_patch;
}

// Adds one strip of du, kTapRows rows of a column, to all taps: an input is loaded once per column of taps and
// meets every row of du that some tap brings together with it. The tests are known when compiling.
template <int K, int D, int S>
__device__ void add_strip(const float (&g)[kTapRows], const float* from, int pitch, float (&sum)[K * K]) {
  constexpr int kReach = (kTapRows - 1) * S + (K - 1) * D + 1;
#pragma unroll
  for (int y = 0; y < kReach; ++y)
#pragma unroll
    for (int kx = 0; kx < K; ++kx) {
      const float v = from[y * pitch + kx * D];
#pragma unroll
      for (int ky = 0; ky < K; ++ky) {
        const int r = y - ky * D;
        if (r >= 0 && r % S == 0 && r / S < kTapRows) sum[ky * K + kx] += g[r / S] * v;
      }
    }
}

// Sums all taps of a channel in registers, over the images of a group; then over the threads of
// the channel, in order.
//
// The barriers around the patch: other threads may still read the one before, and all of it must be there.
// Threads that have no channel go on to the next tile, and so meet them. At the end the taps take turns in
// `totals`, kThreads floats: one thread of each channel adds what the channel's threads have, in their order, so
// the result depends on no schedule.
template <int K, int D, int S> __device__ void sum_taps(const Plan& plan, const Half& h, float* space) {
  constexpr int R = kTapRows;
  SHARED(float, totals, kThreads);
  const Tiling& t = plan.strip_tiling;
  const int group = int(blockIdx.x), cols = t.tile.cols, strips = (t.tile.rows + R - 1) / R;
  const int a_channel = min(strips * cols, kThreads), at_once = channels_of_taps(plan, h);
  const int C = plan.C, first = int(blockIdx.z) * at_once, channels = min(at_once, C - first);
  if (channels <= 0) return;
  const int c = int(threadIdx.x) / a_channel, item = int(threadIdx.x) % a_channel;
  const Grid size = patch_size(h, t);
  Patch patch{space, 0, 0, size.rows, size.cols};
  float sum[K * K] = {};
  for (int64_t image = plan.first_image(group); image < plan.first_image(group + 1); ++image)
    for (int index = 0; index < t.count(); ++index) {
      const Tile tile = tile_at(t, image, index);
      patch.row = tile.row * S - h.pad(), patch.col = tile.col * S - h.pad();
      __syncthreads();
      stage(h.in, image, first, channels, true, patch);
      __syncthreads();
      if (c >= channels) continue;
      const float* du = h.du + (image * C + first + c) * plan.out.pixels();
      for (int k = item; k < strips * cols; k += a_channel) {
        const int row = k / cols * R, col = k % cols;
        float g[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const bool inside = row + r < tile.rows && col < tile.cols;
          g[r] = inside ? du[(tile.row + row + r) * t.grid.cols + tile.col + col] : 0.0f;
        }
        add_strip<K, D, S>(g, space + (c * patch.rows + row * S) * patch.cols + col * S, patch.cols, sum);
      }
    }
#pragma unroll
  for (int k = 0; k < K * K; ++k) {
    __syncthreads();
    totals[threadIdx.x] = sum[k];
    __syncthreads();
    if (item != 0 || c >= channels) continue;
    float total = 0;
    for (int i = 0; i < a_channel; ++i) total += totals[c * a_channel + i];
    h.dtaps[(int64_t(group) * C + first + c) * (K * K) + k] = total;
  }
}

struct RunTaps {
  const Plan& plan;
  const Half& h;
  float* space;
  template <int K, int D, int S> __device__ void run() const { sum_taps<K, D, S>(plan, h, space); }
};

// grid (groups, halves, channels): gathers partial sums of dL/dD, [groups][C][taps]. The relu of a half's input is
// applied in the patch; of a second half it changes nothing.
__global__ void __launch_bounds__(kThreads) taps_kernel(Plan plan, int first) {
  const Half* const job = plan.halves.at(first + blockIdx.y);
  if (!job) return;
  const Half& h = *job;
  DYNAMIC_SHARED(float, space);
  with_kernel(h.size, h.dilation, h.stride, RunTaps{plan, h, space});
}

// grid (halves): adds the groups in their order, in fp64, and rounds to the stored dtype.
__global__ void __launch_bounds__(kThreads) fold_taps_kernel(Plan plan, int first) {
  const Half* const job = plan.halves.at(first + blockIdx.x);
  if (!job) return;
  const Half& h = *job;
  const int count = plan.C * h.taps_count();
  for (int i = int(threadIdx.x); i < count; i += kThreads) {
    double sum = 0;
    for (int g = 0; g < plan.groups; ++g) sum += double(h.dtaps[int64_t(g) * count + i]);
    put(h.dD, plan.wide, i, float(sum));
  }
}

}  // namespace

void launch_taps(Launcher& run, Range states) {
  const Plan& plan = run.plan();
  const Range halves = run.planner.halves_of(states);
  // The grid is for the half with most blocks; blocks that a half of many channels a
  // block does not need end at once.
  int most = 1;
  for (const Half& h : run.planner.all_halves(states)) {
    const int channels = channels_of_taps(plan, h);
    most = std::max(most, (plan.C + channels - 1) / channels);
  }
  run(taps_kernel, dim3(plan.groups, halves.count(), most), sizeof(float) * plan.patch_floats, halves.first);
  run(fold_taps_kernel, dim3(halves.count()), 0, halves.first);
}

}  // namespace fastnas::cuda
