// Adds the partial sums of the groups of a job. It takes two steps, as one block that reads those of all groups is what
// a whole launch would wait for (200 us of 270 at 64 channels): of every eight groups, a cluster, the block that ends
// last adds theirs, and of the clusters the last adds those. Which block that is does not matter for the bits: parts
// are added in their order.
#pragma once

#include "mixed_edges_tile.h"

namespace fastnas::cuda {
namespace {

constexpr int kMostParts = 8;  // that a step adds, all loads in flight together
static_assert(kClusterGroups <= kMostParts && kMostGroups <= kMostParts * kClusterGroups);

__device__ Quad fresh_quad(const float* from) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}

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
    return double(int(plan.first_image(last) - plan.first_image(first))) * double(plan.out.pixels());
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

// Says which quads of a [C][width] matrix a thread has: of columns first, first + 4 threads_across, ..., those in rows
// row, row + rows_on, ... Threads lie over rows as powers of two, because a division would cost more than a load.
struct MatrixQuads {
  int col, cols_on, row, rows_on;
  __device__ explicit MatrixQuads(int width) {
    int bits = 0;
    while (4 << bits < width && 1 << bits < kThreads) ++bits;
    col = 4 * (int(threadIdx.x) & ((1 << bits) - 1)), cols_on = 4 << bits;
    row = int(threadIdx.x) >> bits, rows_on = kThreads >> bits;
  }
};

// Adds up a thread's quads of one column, of all parts, whose loads are in flight at once: of(part, quad, row) may
// change a part's quad before.
template <class Of>
__device__ void merge_column(const Plan& plan, const Parts& parts, const MatrixQuads& own, int col, Of of) {
#pragma unroll 1
  for (int row = own.row; row < plan.C; row += own.rows_on) {
    float* const first = parts.data + row * plan.width + col;
    Quad part[kMostParts];
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) part[p] = fresh_quad(first + min(p, parts.count - 1) * parts.apart);
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) of(p, part[p], row);
#pragma unroll
    for (int p = 1; p < kMostParts; ++p)  // after the loads: a branch around each would have them wait in line
      if (p >= parts.count) part[p] = {};
#pragma unroll
    for (int half = kMostParts / 2; half > 0; half /= 2)
#pragma unroll
      for (int p = 0; p < half; ++p)
#pragma unroll
        for (int e = 0; e < 4; ++e) part[p].v[e] += part[p + half].v[e];
    store_quad(first, part[0]);
  }
}

// Adds matrices that need no moving.
__device__ void merge_plainly(const Plan& plan, const Parts& parts) {
  const MatrixQuads own(plan.width);
  for (int col = own.col; col < plan.width; col += own.cols_on)
    merge_column(plan, parts, own, col, [](int, Quad&, int) {});
}

// Adds sums dy u^T, and of dy alone.
__device__ void merge_crosses(const Plan& plan, const Parts& parts) {
  for (int c = int(threadIdx.x); c < plan.C; c += kThreads) {
    double sum = 0;
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) {
      const double part = double(__ldcg(parts.sum(plan, min(p, parts.count - 1)) + c));
      sum += p < parts.count ? part : 0.0;
    }
    parts.total(plan, 0)[c] = float(sum);
  }
  merge_plainly(plan, parts);
}

// Moves the parts to one shift, minus the mean of them all, about which a Gram matrix is smallest and so cancels least.
// Part p has sum u' of u' = u + shift_p; it gets d = shift - shift_p in place of its shift, and sum u' + n d. The
// total's sum would be 0, but the shift is rounded: what is left of it is kept.
__device__ void move_to_mean(const Plan& plan, const Parts& parts) {
  const double count = parts.samples(plan, 0, parts.count);
  for (int c = int(threadIdx.x); c < plan.C; c += kThreads) {
    float sum[kMostParts], shift[kMostParts];
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) {
      const int k = min(p, parts.count - 1);
      sum[p] = __ldcg(parts.sum(plan, k) + c), shift[p] = __ldcg(parts.shift(plan, k) + c);
    }
    double total = 0, rest = 0;
#pragma unroll
    for (int p = 0; p < kMostParts; ++p)
      if (p < parts.count) total += double(sum[p]) - parts.samples(plan, p, 1) * double(shift[p]);
    const float mean = float(-total / count);
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) {
      if (p >= parts.count) continue;
      const float d = mean - shift[p];
      const double moved = double(sum[p]) + parts.samples(plan, p, 1) * double(d);
      rest += moved;
      parts.shift(plan, p)[c] = d, parts.moved(plan, p)[c] = float(moved);
    }
    parts.total(plan, 0)[c] = float(rest), parts.total(plan, 1)[c] = mean;
  }
}

// Adds Gram matrices, of u + d: sum (u' + d)(u' + d)^T = sum u' u'^T + d (sum u')^T + (sum u' + n d) d^T. What a column
// needs of the parts is the same for all its rows.
__device__ void merge_grams(const Plan& plan, const Parts& parts) {
  move_to_mean(plan, parts);
  __syncthreads();
  const float* const rows = parts.sum(plan, 0);
  const int width = plan.width, moved = int(parts.moved(plan, 0) - rows);
  const MatrixQuads own(width);
  for (int col = own.col; col < width; col += own.cols_on) {
    Quad sum[kMostParts], d[kMostParts];
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) {
      const float* const j = rows + min(p, parts.count - 1) * parts.apart + col;
      sum[p] = fresh_quad(j), d[p] = fresh_quad(j + width);
    }
    merge_column(plan, parts, own, col, [&](int p, Quad& gram, int row) {
      const float* const i = rows + min(p, parts.count - 1) * parts.apart + row;
      const float d_i = __ldcg(i + width), moved_i = __ldcg(i + moved);
#pragma unroll
      for (int e = 0; e < 4; ++e) gram.v[e] += d_i * sum[p].v[e] + moved_i * d[p].v[e];
    });
  }
}

}  // namespace
}  // namespace fastnas::cuda
