// Adds the partial sums of the groups of a job. It takes two steps, as one block that reads those of all groups is what
// a whole launch would wait for (200 us of 270 at 64 channels): of every eight groups, a cluster, the block that ends
// last adds theirs, and of the clusters the last adds those. Which block that is does not matter for the bits: parts
// are added in their order.
#pragma once

#include "mixed_edges_tile.h"

namespace fastnas::cuda {
namespace {

constexpr int kPartsAtOnce = 8;  // whose loads are in flight together

__device__ Quad fresh_quad(const float* from) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}

// Says how threads share the channels of a fold: neighbours have groups of one channel, a power of two of them, as many
// as there are threads for. With a thread a channel one of 16 channels would read all groups one after the other.
struct Sharing {
  int lanes;
  __device__ explicit Sharing(int C) : lanes(1) {
    while (lanes < 32 && 2 * lanes * C <= kThreads) lanes *= 2;
  }
  __device__ int lane() const { return int(threadIdx.x) & (lanes - 1); }
  __device__ int channel() const { return int(threadIdx.x) / lanes; }
  __device__ int step() const { return kThreads / lanes; }
  // Adds up over the lanes of a channel, by a butterfly whose order is fixed. Whole warps call it.
  __device__ double total(double v) const {
    for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
  }
};

// Names partial sums that are added up, in place of the first: those of the groups of a cluster, then those of the
// clusters. Each is a [C][width] matrix and rows of it: sum and shift of a group, then of a cluster, then what
// merge_grams makes of the sum. 512 MB of them are the most, so a place among them is an int.
struct Parts {
  float* data;
  int apart;               // floats from one part to the next
  int count, group, step;  // the first part's first group; groups of a part
  int first_row;
  __device__ const float* matrix(int part) const { return data + part * apart; }
  __device__ float* row(const Plan& plan, int part, int k) const {
    return data + part * apart + (plan.C + k) * plan.width;
  }
  __device__ float* sum(const Plan& plan, int part) const { return row(plan, part, first_row); }
  __device__ float* shift(const Plan& plan, int part) const { return row(plan, part, first_row + 1); }
  __device__ float* moved(const Plan& plan, int part) const { return row(plan, part, 4); }
  // Where sum and shift of all parts go: not over those of a part, which are still read.
  __device__ float* total(const Plan& plan, int k) const { return row(plan, 0, 2 - first_row + k); }
  // Counts the samples of some parts.
  __device__ double samples(const Plan& plan, int part, int parts) const {
    const int first = group + part * step, last = min(first + parts * step, plan.groups);
    return double((plan.first_image(last) - plan.first_image(first)) * plan.plane());
  }
};
__device__ Parts groups_of_cluster(const Plan& plan, float* partial, int cluster) {
  const int first = cluster * kClusterGroups;
  const int size = int(plan.partial_size());
  return {partial + int64_t(first) * size, size, min(kClusterGroups, plan.groups - first), first, 1, 0};
}
__device__ Parts clusters(const Plan& plan, float* partial) {
  return {partial, kClusterGroups * int(plan.partial_size()), plan.clusters(), 0, kClusterGroups, 2};
}

// Adds all partial sums of the block's job, by merge(parts), if it is the last of its cluster, and then of the job, to
// come here; says whether it is. `done` counts the clusters that are merged, behind it the blocks of each.
template <class Merge> __device__ bool merges_all(const Plan& plan, float* partial, unsigned* done, Merge merge) {
  const int cluster = int(blockIdx.x) / kClusterGroups;
  Parts parts = groups_of_cluster(plan, partial, cluster);
  unsigned* counter = done + 1 + cluster;
#pragma unroll 1
  for (int step = 0; step < 2; ++step) {
    if (!is_last_block(counter, unsigned(parts.count))) return false;
    merge(parts);
    parts = clusters(plan, partial), counter = done;
  }
  __syncthreads();
  return true;
}

// Calls f(row, column) for the quads of a [C][width] matrix, those of neighbouring threads side by side. Threads lie
// over rows as powers of two, because a division would cost more than a load.
template <class F> __device__ void each_quad_of_matrix(const Plan& plan, F f) {
  int bits = 0;
  while (4 << bits < plan.width && 1 << bits < kThreads) ++bits;
#pragma unroll 1
  for (int row = int(threadIdx.x) >> bits; row < plan.C; row += kThreads >> bits)
#pragma unroll 1
    for (int col = 4 * (int(threadIdx.x) & ((1 << bits) - 1)); col < plan.width; col += 4 << bits) f(row, col);
}

// Adds up the quads of all parts: of(part, place, row) gives a part's at a place of the matrix. Eight parts are asked
// for at once, and added in pairs.
template <class Of> __device__ void merge_matrices(const Plan& plan, const Parts& parts, Of of) {
  each_quad_of_matrix(plan, [&](int row, int col) {
    const int place = row * plan.width + col;
    Quad total{};
#pragma unroll 1
    for (int base = 0; base < parts.count; base += kPartsAtOnce) {
      Quad part[kPartsAtOnce];
#pragma unroll
      for (int p = 0; p < kPartsAtOnce; ++p) part[p] = of(min(base + p, parts.count - 1), place, row);
#pragma unroll
      for (int p = 1; p < kPartsAtOnce; ++p)  // after the loads: a branch around each would have them wait in line
        if (base + p >= parts.count) part[p] = {};
#pragma unroll
      for (int half = kPartsAtOnce / 2; half > 0; half /= 2)
#pragma unroll
        for (int p = 0; p < half; ++p)
#pragma unroll
          for (int e = 0; e < 4; ++e) part[p].v[e] += part[p + half].v[e];
#pragma unroll
      for (int e = 0; e < 4; ++e) total.v[e] += part[0].v[e];
    }
    store_quad(parts.data + place, total);
  });
}

// Adds matrices that need no moving.
__device__ void merge_plainly(const Plan& plan, const Parts& parts) {
  merge_matrices(plan, parts, [&](int p, int place, int) { return fresh_quad(parts.matrix(p) + place); });
}

// Adds sums dy u^T, and of dy alone.
__device__ void merge_crosses(const Plan& plan, const Parts& parts) {
  for (int c = int(threadIdx.x); c < plan.C; c += kThreads) {
    double sum = 0;
#pragma unroll kPartsAtOnce
    for (int p = 0; p < parts.count; ++p) sum += double(__ldcg(parts.sum(plan, p) + c));
    parts.total(plan, 0)[c] = float(sum);
  }
  merge_plainly(plan, parts);
}

// Moves the parts to one shift, minus the mean of them all, about which a Gram matrix is smallest and so cancels least.
// Part p has sum u' of u' = u + shift_p; it gets d = shift - shift_p in place of its shift, and sum u' + n d. The
// total's sum would be 0, but the shift is rounded: what is left of it is kept.
__device__ void move_to_mean(const Plan& plan, const Parts& parts) {
  const Sharing sharing(plan.C);
  const double count = parts.samples(plan, 0, parts.count);
  for (int base = 0; base < plan.C; base += sharing.step()) {
    const int c = base + sharing.channel(), own = min(c, plan.C - 1);
    double sum = 0, rest = 0;
#pragma unroll 4
    for (int p = sharing.lane(); p < parts.count; p += sharing.lanes)
      sum += double(__ldcg(parts.sum(plan, p) + own)) -
             parts.samples(plan, p, 1) * double(__ldcg(parts.shift(plan, p) + own));
    const float shift = float(-sharing.total(sum) / count);
#pragma unroll 4
    for (int p = sharing.lane(); p < parts.count; p += sharing.lanes) {
      const float d = shift - __ldcg(parts.shift(plan, p) + own);
      const double moved = double(__ldcg(parts.sum(plan, p) + own)) + parts.samples(plan, p, 1) * double(d);
      rest += moved;
      if (c < plan.C) parts.shift(plan, p)[c] = d, parts.moved(plan, p)[c] = float(moved);
    }
    rest = sharing.total(rest);
    if (sharing.lane() == 0 && c < plan.C) parts.total(plan, 0)[c] = float(rest), parts.total(plan, 1)[c] = shift;
  }
}

// Adds Gram matrices, of u + d: sum (u' + d)(u' + d)^T = sum u' u'^T + d (sum u')^T + (sum u' + n d) d^T.
__device__ void merge_grams(const Plan& plan, const Parts& parts) {
  move_to_mean(plan, parts);
  __syncthreads();
  const float* const rows = parts.sum(plan, 0);
  const int width = plan.width, moved = int(parts.moved(plan, 0) - rows);
  merge_matrices(plan, parts, [&](int p, int place, int row) {
    const float *i = rows + p * parts.apart + row, *j = i + place - (width + 1) * row;
    Quad gram = fresh_quad(parts.matrix(p) + place);
    const Quad sum = fresh_quad(j), d = fresh_quad(j + width);
    const float d_i = __ldcg(i + width), moved_i = __ldcg(i + moved);
#pragma unroll
    for (int e = 0; e < 4; ++e) gram.v[e] += d_i * sum.v[e] + moved_i * d.v[e];
    return gram;
  });
}

}  // namespace
}  // namespace fastnas::cuda
