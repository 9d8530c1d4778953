// weight = B_st A_st: A_st = 1 + At - sg(At) at o* = argmax_o (alpha + g), At = softmax((log softmax(alpha) + g)/tau), B alike of beta
// dalpha = At (c - <c, At>)/tau, c = dweight at the sampled entries, 0 elsewhere; dbeta alike with Bt over a node's edges or pairs.
#pragma once

#include "../params.h"
#include "gumbel.h"

namespace fastnas {

// Holds a logit with its noise. The larger of two is found with NaN before numbers, then the lower index.
struct Perturbed {
  double value;
  int index;
};
FASTNAS_HD bool beats(double a, double b) { return a > b || (a != a && b == b); }
FASTNAS_HD Perturbed larger(const Perturbed& a, const Perturbed& b) {
  if (beats(a.value, b.value)) return a;
  return beats(b.value, a.value) || b.index < a.index ? b : a;
}

// Computes 1 + At - sg(At) of a row whose largest is `top`: 1, or NaN where softmax is NaN.
FASTNAS_HD double straight_through(double top, double tau) { return 1.0 + 0.0 * (top / tau); }

// Computes the gradient of a logit, of which `soft` and `c` are its At and cotangent and dot is <c, At> of its row.
FASTNAS_HD double relaxed_grad(double soft, double c, double dot, double tau) { return soft * (c - dot) / tau; }

// Finds a pair by its number among the unordered pairs of n predecessors: (0, 1), (0, 2), ..., (n - 2, n - 1).
struct EdgePair { int first, second; };
FASTNAS_HD EdgePair edge_pair(int n, int ordinal) {
  int first = 0;
  for (; ordinal >= n - 1 - first; ++first) ordinal -= n - 1 - first;
  return {first, first + 1 + ordinal};
}

// Finds the first of a node's n edges that is in the path, from `edge` on; n if there is none, as
// where op was overwritten.
FASTNAS_HD int next_kept(const int64_t* op, int edge, int n) {
  while (edge < n && op[edge] < 0) ++edge;
  return edge;
}

// Holds c of a node's topology logits: dweight of both edges kept, or in `pairs` their sum at their pair.
struct NodeCotangent {
  int at[2];
  double value[2];

  template <class T>
  FASTNAS_HD NodeCotangent(Topology topology, int n, const int64_t* op, const T* dweight) {
    const int i = next_kept(op, 0, n), k = next_kept(op, i + 1, n);
    at[0] = i, at[1] = k;
    value[0] = i < n ? load(dweight[i]) : 0, value[1] = k < n ? load(dweight[k]) : 0;
    if (topology == Topology::pairs) {
      at[0] = k < n ? i * (2 * n - i - 1) / 2 + k - i - 1 : -1, at[1] = -1;
      value[0] += value[1];
    }
  }
  FASTNAS_HD double operator[](int i) const { return i == at[0] ? value[0] : i == at[1] ? value[1] : 0.0; }
};

// Says whether a node's topology is drawn. Both edges of a node of two are kept in any case: its
// gradient would be noise.
FASTNAS_HD bool is_sampled(Topology topology, int n) { return !(topology == Topology::top2 && n == 2); }

}  // namespace fastnas
