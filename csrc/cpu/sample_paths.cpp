// Runs sample_paths on the CPU: the logits of as many edges as fit a tile are perturbed at once, then taken row by
// row. Compiled once per instruction set; FASTNAS_ISA names the namespace.
//
// All of it is fp64 and without contracted multiply-adds (CMakeLists.txt), because the perturbed logits are
// compared: a last bit that differs between machines would draw another path. The noise is drawn again in backward.
#include "sample_paths.h"

#include <cmath>

#include "../formulas/sample_paths.h"
#include "noise.h"

namespace fastnas::FASTNAS_ISA {
namespace {

constexpr int kTile = 1024;
static_assert(kTile >= kMaxRow);
// From this many logits on threads are worth their start, which takes 10 us. A path of
// a DARTS cell has a few hundred.
constexpr int64_t kParallel = 1 << 14;

// Makes v = logits + g of `count` logits, the first of which takes element `first` of the stream `ordinal`.
// Elements are counted over all samples, so a sample draws the same path however many are drawn beside it.
template <class T>
void perturb(const SamplePathsParams& p, int ordinal, const T* logits, int64_t first, int count, double* v) {
  draw_range(unit_draw(p.rng, ordinal), first, count, v);
#pragma omp simd
  for (int i = 0; i < count; ++i) v[i] = add_rn(double(load(logits[i])), gumbel(v[i]));
}

// Finds the largest of a row, except the one at `without`; which of equals or NaN wins is
// `larger`'s rule (formulas).
Perturbed largest(const double* v, int count, int without = -1) {
  Perturbed top{v[without == 0], without == 0};
  for (int i = top.index + 1; i < count; ++i)
    if (i != without) top = larger(top, {v[i], i});
  return top;
}

// Calls f(first edge, edges) over the tiles of a type: kTile logits are perturbed by one vectorised loop, where
// rows of eight would leave it short.
template <class F>
void for_each_tile(const SamplePathsParams& p, F f) {
  const int per_tile = kTile / p.ops;
  for (int edge = 0; edge < p.edges; edge += per_tile) f(edge, p.edges - edge < per_tile ? p.edges - edge : per_tile);
}

// Samples the topology of a node: op 0 and weight B_st where an edge is kept, -1 and 0 elsewhere. The operations of
// the edges that are kept follow in sample_path.
template <class T>
void sample_node(const SamplePathsParams& p, int64_t sample, int node, int64_t* op, T* weight) {
  const int n = p.first_edge[node + 1] - p.first_edge[node];
  const int count = p.first_logit[node + 1] - p.first_logit[node];
  const T* beta = static_cast<const T*>(p.beta) + sample % p.types * p.logits + p.first_logit[node];
  alignas(64) double v[kMaxRow];
  perturb(p, 1, beta, sample * p.logits + p.first_logit[node], count, v);
  const Perturbed top = largest(v, count);
  EdgePair kept;
  if (p.topology == Topology::top2) {
    kept = {top.index, largest(v, count, top.index).index};
  } else {
    kept = edge_pair(n, top.index);
  }
  const double B_st = is_sampled(p.topology, n) ? straight_through(top.value, *p.tau) : 1.0;
  for (int i = 0; i < n; ++i) {
    const bool is_kept = i == kept.first || i == kept.second;
    op[i] = is_kept ? 0 : -1;
    weight[i] = T(is_kept ? B_st : 0.0);
  }
}

// Draws one sample: first the topology of every node, then the operation of every edge that is in the path.
template <class T>
void sample_path(const SamplePathsParams& p, int64_t sample) {
  int64_t* op = p.op + sample * p.edges;
  T* weight = static_cast<T*>(p.weight) + sample * p.edges;
  const T* alpha = static_cast<const T*>(p.alpha) + sample % p.types * p.edges * p.ops;
  if (p.topology == Topology::none)
    for (int e = 0; e < p.edges; ++e) op[e] = 0, weight[e] = T(1);
  else
    for (int node = 0; node < p.nodes; ++node)
      sample_node<T>(p, sample, node, op + p.first_edge[node], weight + p.first_edge[node]);
  for_each_tile(p, [&](int edge, int edges) {
    alignas(64) double v[kTile];
    perturb(p, 0, alpha + edge * p.ops, (sample * p.edges + edge) * p.ops, edges * p.ops, v);
    for (int i = 0; i < edges; ++i) {
      if (op[edge + i] < 0) continue;
      const Perturbed top = largest(v + i * p.ops, p.ops);
      op[edge + i] = top.index;
      weight[edge + i] = T(double(weight[edge + i]) * straight_through(top.value, *p.tau));
    }
  });
}

// Adds to d the gradient of a row of perturbed logits with the cotangent c(i), through softmax(v / tau). The
// largest is taken off before the exponential, so that small tau does not overflow. v is overwritten.
template <class C>
void add_relaxed_grads(double* v, int count, double tau, C c, double* d) {
  const double top = largest(v, count).value / tau;
  double sum = 0, dot = 0;
  for (int i = 0; i < count; ++i) {
    v[i] = exp(v[i] / tau - top);
    sum += v[i];
    dot += c(i) * v[i];
  }
  for (int i = 0; i < count; ++i) d[i] += relaxed_grad(v[i] / sum, c(i), dot / sum, tau);
}

template <class T> void store_row(const double* d, int count, void* base, int64_t first) {
  for (int i = 0; i < count; ++i) static_cast<T*>(base)[first + i] = T(d[i]);
}

// Computes dalpha of a type: a row of v is drawn again for every path, the paths' gradients are
// added in their order.
template <class T>
void alpha_grads(const SamplePathsParams& p, int64_t type) {
  const T* alpha = static_cast<const T*>(p.alpha) + type * p.edges * p.ops;
  for_each_tile(p, [&](int edge, int edges) {
    alignas(64) double v[kTile], d[kTile] = {};
    for (int64_t path = 0; path < p.paths; ++path) {
      const int64_t first = (path * p.types + type) * p.edges + edge;
      perturb(p, 0, alpha + edge * p.ops, first * p.ops, edges * p.ops, v);
      for (int i = 0; i < edges; ++i) {
        const int64_t op = p.op[first + i];
        if (op < 0) continue;
        const double dw = double(static_cast<const T*>(p.dweight)[first + i]);
        add_relaxed_grads(v + i * p.ops, p.ops, *p.tau, [&](int o) { return o == op ? dw : 0.0; }, d + i * p.ops);
      }
    }
    store_row<T>(d, edges * p.ops, p.dalpha, (type * p.edges + edge) * p.ops);
  });
}

// Computes dbeta of a node, likewise. A node of two edges keeps both in any case, so its row stays 0.
template <class T>
void beta_grads(const SamplePathsParams& p, int64_t type, int node) {
  const int n = p.first_edge[node + 1] - p.first_edge[node];
  const int count = p.first_logit[node + 1] - p.first_logit[node];
  const int64_t own = type * p.logits + p.first_logit[node];
  alignas(64) double v[kMaxRow], d[kMaxRow] = {};
  for (int64_t path = 0; path < p.paths && is_sampled(p.topology, n); ++path) {
    const int64_t sample = path * p.types + type, edge = sample * p.edges + p.first_edge[node];
    perturb(p, 1, static_cast<const T*>(p.beta) + own, sample * p.logits + p.first_logit[node], count, v);
    const NodeCotangent c(p.topology, n, p.op + edge, static_cast<const T*>(p.dweight) + edge);
    add_relaxed_grads(v, count, *p.tau, [&](int i) { return c[i]; }, d);
  }
  store_row<T>(d, count, p.dbeta, own);
}

template <class T>
void fwd(const SamplePathsParams& p) {
  const int64_t samples = p.paths * p.types;
#pragma omp parallel for num_threads(p.threads) if (samples * (p.edges * p.ops + p.logits) >= kParallel)
  for (int64_t sample = 0; sample < samples; ++sample) sample_path<T>(p, sample);
}

template <class T>
void bwd(const SamplePathsParams& p) {
#pragma omp parallel for num_threads(p.threads) if (p.paths * p.types * (p.edges * p.ops + p.logits) >= kParallel)
  for (int64_t type = 0; type < p.types; ++type) {
    alpha_grads<T>(p, type);
    for (int node = 0; p.topology != Topology::none && node < p.nodes; ++node) beta_grads<T>(p, type, node);
  }
}

}  // namespace

void sample_paths_fwd(const SamplePathsParams& p) { p.dtype == DType::f64 ? fwd<double>(p) : fwd<float>(p); }
void sample_paths_bwd(const SamplePathsParams& p) { p.dtype == DType::f64 ? bwd<double>(p) : bwd<float>(p); }

}  // namespace fastnas::FASTNAS_ISA
