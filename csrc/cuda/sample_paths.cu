// Runs sample_paths on CUDA, one launch each way. Forward: a warp per edge of a sample, its lanes over the logits;
// each edge draws its node's topology again, which is as long as drawing its own operation. Backward: a block per
// row of logits, a warp per path, their sums added in warp order. All in fp64: a few hundred numbers.
//
// Perturbed logits are compared, so their last bits decide paths: they are made of correctly rounded operations
// that are not contracted (formulas/gumbel.h), and the same on every backend.
#include "sample_paths.h"

#include "launch.h"

#include "../formulas/sample_paths.h"

namespace fastnas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerLane = kMaxRow / 32;
constexpr int kNoIndex = 1 << 30;

__device__ double warp_sum(double v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// Finds the largest of a warp, in every lane; `larger` is a total order, so the tree does not matter.
__device__ Perturbed warp_largest(Perturbed top) {
  for (int step = 16; step > 0; step /= 2)
    top = larger(top, {__shfl_xor_sync(0xffffffffu, top.value, step), __shfl_xor_sync(0xffffffffu, top.index, step)});
  return top;
}

// Holds the perturbed logits of one softmax, in the registers of a warp: lane l has l, l + 32, ...
struct Row {
  int count;
  double v[kPerLane];

  template <class T>
  __device__ Row(const SamplePathsParams& p, int ordinal, const T* logits, int64_t first, int count) : count(count) {
    const Draw<double> draw = unit_draw(p.rng, ordinal);
    for (int j = 0; j < kPerLane; ++j) {
      const int i = index(j);
      if (i < count) v[j] = add_rn(double(load(logits[i])), gumbel(draw.element(uint64_t(first + i))));
    }
  }
  __device__ static int index(int j) { return int(threadIdx.x % 32) + 32 * j; }

  // Finds the largest of the row except the one at `without`, in every lane.
  __device__ Perturbed largest(int without = -1) const {
    Perturbed top{-INFINITY, kNoIndex};
    for (int j = 0; j < kPerLane; ++j)
      if (index(j) < count && index(j) != without) top = larger(top, {v[j], index(j)});
    return warp_largest(top);
  }

  // Adds to d the row's gradient through softmax(v / tau); c is its cotangent. The largest is taken
  // off before the exponential.
  template <class C> __device__ void add_relaxed_grads(double tau, C c, double* d) {
    const double top = largest().value / tau;
    double sum = 0, dot = 0;
    for (int j = 0; j < kPerLane; ++j) {
      if (index(j) >= count) continue;
      v[j] = exp(v[j] / tau - top);
      sum += v[j];
      dot += c(index(j)) * v[j];
    }
    sum = warp_sum(sum);
    dot = warp_sum(dot) / sum;
    for (int j = 0; j < kPerLane; ++j)
      if (index(j) < count) d[j] += relaxed_grad(v[j] / sum, c(index(j)), dot, tau);
  }
};

__device__ int node_of(const SamplePathsParams& p, int edge) {
  int node = 0;
  while (p.first_edge[node + 1] <= edge) ++node;
  return node;
}

// Draws the perturbed logits of a node's topology (below, of an edge's operations). Elements of the
// stream are counted over samples.
template <class T>
__device__ Row node_row(const SamplePathsParams& p, int64_t sample, int node) {
  const int first = p.first_logit[node];
  return Row(p, 1, static_cast<const T*>(p.beta) + sample % p.types * p.logits + first, sample * p.logits + first,
             p.first_logit[node + 1] - first);
}

template <class T>
__device__ Row edge_row(const SamplePathsParams& p, int64_t sample, int edge) {
  return Row(p, 0, static_cast<const T*>(p.alpha) + (sample % p.types * p.edges + edge) * p.ops,
             (sample * p.edges + edge) * p.ops, p.ops);
}

// Computes B_st of an edge, 0 where its node does not keep it; the same in every lane.
template <class T>
__device__ double topology_weight(const SamplePathsParams& p, int64_t sample, int edge) {
  if (p.topology == Topology::none) return 1.0;
  const int node = node_of(p, edge), i = edge - p.first_edge[node];
  const int n = p.first_edge[node + 1] - p.first_edge[node];
  if (!is_sampled(p.topology, n)) return 1.0;
  const Row row = node_row<T>(p, sample, node);
  const Perturbed top = row.largest();
  EdgePair kept;
  if (p.topology == Topology::top2) {
    kept = {top.index, row.largest(top.index).index};
  } else {
    kept = edge_pair(n, top.index);
  }
  return i == kept.first || i == kept.second ? straight_through(top.value, *p.tau) : 0.0;
}

// Runs a warp per edge of a sample. Warps past the last return as a whole, so shuffles stay complete.
template <class T>
__global__ void __launch_bounds__(kThreads) sample_paths_fwd_kernel(SamplePathsParams p) {
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (item >= p.paths * p.types * p.edges) return;  // whole warps
  const int64_t sample = item / p.edges;
  const int edge = int(item % p.edges);
  const double B_st = topology_weight<T>(p, sample, edge);
  const Perturbed top = edge_row<T>(p, sample, edge).largest();
  if (threadIdx.x % 32) return;
  const bool is_kept = B_st != 0.0;
  p.op[item] = is_kept ? top.index : -1;
  static_cast<T*>(p.weight)[item] = T(is_kept ? B_st * straight_through(top.value, *p.tau) : 0.0);
}

// grid (edges, then nodes where there is a topology; types): computes a row of dalpha or of dbeta. Warps take the
// paths in turn, each sums its own in registers; warps are added in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) sample_paths_bwd_kernel(SamplePathsParams p) {
  SHARED(double, per_warp, kWarps * kMaxRow);
  const T* dweight = static_cast<const T*>(p.dweight);
  const int edge = int(blockIdx.x), node = edge - p.edges;
  const int64_t type = blockIdx.y;
  const bool is_edge = node < 0;
  const int count = is_edge ? p.ops : p.first_logit[node + 1] - p.first_logit[node];
  double d[kPerLane] = {};
  for (int64_t path = threadIdx.x / 32; path < p.paths; path += kWarps) {
    const int64_t sample = path * p.types + type;
    if (is_edge) {
      const int64_t item = sample * p.edges + edge, op = p.op[item];
      if (op < 0) continue;
      const double dw = double(dweight[item]);
      edge_row<T>(p, sample, edge).add_relaxed_grads(*p.tau, [&](int o) { return o == op ? dw : 0.0; }, d);
    } else {
      const int64_t item = sample * p.edges + p.first_edge[node];
      const int n = p.first_edge[node + 1] - p.first_edge[node];
      if (!is_sampled(p.topology, n)) break;
      const NodeCotangent c(p.topology, n, p.op + item, dweight + item);
      node_row<T>(p, sample, node).add_relaxed_grads(*p.tau, [&](int i) { return c[i]; }, d);
    }
  }
  for (int j = 0; j < kPerLane; ++j) per_warp[threadIdx.x / 32 * kMaxRow + Row::index(j)] = d[j];
  __syncthreads();
  T* out = is_edge ? static_cast<T*>(p.dalpha) + (type * p.edges + edge) * p.ops
                   : static_cast<T*>(p.dbeta) + type * p.logits + p.first_logit[node];
  for (int i = threadIdx.x; i < count; i += kThreads) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += per_warp[warp * kMaxRow + i];
    out[i] = T(sum);
  }
}

template <class T>
int fwd(const SamplePathsParams& p) {
  const int64_t blocks = (p.paths * p.types * p.edges + kWarps - 1) / kWarps;
  return blocks ? launch(sample_paths_fwd_kernel<T>, unsigned(blocks), kThreads, 0, p.stream, p) : 0;
}

template <class T>
int bwd(const SamplePathsParams& p) {
  if (p.types == 0) return 0;
  const dim3 grid(unsigned(p.edges + (p.topology == Topology::none ? 0 : p.nodes)), unsigned(p.types));
  return launch(sample_paths_bwd_kernel<T>, grid, kThreads, 0, p.stream, p);
}

}  // namespace

int sample_paths_fwd(const SamplePathsParams& p) { return p.dtype == DType::f64 ? fwd<double>(p) : fwd<float>(p); }
int sample_paths_bwd(const SamplePathsParams& p) { return p.dtype == DType::f64 ? bwd<double>(p) : bwd<float>(p); }

}  // namespace fastnas::cuda
