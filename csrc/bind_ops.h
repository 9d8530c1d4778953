// The fields of every op's params by the names that Python gives them: the only list beside the struct itself.
// Shared by the two bind files, which add the kernels that run on them.
#pragma once

#include "bind_mixed_edges.h"
#include "bind_params.h"

namespace fastnas {

// Which terms are noisy, as a list of their indices.
inline void set_noisy(Bound<MixedSumParams>& bound, py::handle given) {
  MixedSumParams& p = bound.params;
  for (const py::handle item : py::reinterpret_borrow<py::sequence>(given)) {
    const int k = item.cast<int>();
    if (k < 0 || k >= p.terms)
      throw std::invalid_argument("mixed_sum: noisy is term " + text(k) + " of " + text(p.terms));
    p.ordinal[k] = int8_t(p.noisy_terms++);
  }
}

inline Fields<MixedSumParams> bind_mixed_sum(py::module_& m) {
  using P = MixedSumParams;
  m.attr("max_terms") = kMaxTerms;
  m.def("block_count", &block_count, "Partial sums that n elements need room for; the CPU kernels bring theirs.");
  const auto no_noise = [](P& p) { std::fill(p.ordinal, p.ordinal + kMaxTerms, int8_t(-1)); };
  const auto has_terms = [](P& p) {
    if (!p.terms) throw std::invalid_argument("mixed_sum: 0 terms; 1 to " + text(kMaxTerms) + " are allowed");
  };
  Fields<P> fields(m, "MixedSumParams", no_noise, has_terms);
  fields.field("n", &P::n).field("dtype", &P::dtype).array("x", &P::x, &P::terms).array("dx", &P::dx, &P::terms);
  fields.field("w", &P::w).field("y", &P::y).field("dy", &P::dy).field("dw", &P::dw).field("partial", &P::partial);
  fields.on("noisy", &set_noisy).field("form", &P::form).field("level", &P::level).field("rng", &P::rng);
  fields.field("std", &P::std).field("channels", &P::channels).field("pixels", &P::pixels);
  fields.field("threads", &P::threads).field("stream", &P::stream);
  return fields;
}

// Needs `sum` first: the rows of its terms among the statistics, -1 where a term is not normed.
inline void set_norm(Bound<MixedNormSumParams>& bound, py::handle given) {
  MixedNormSumParams& p = bound.params;
  const auto rows = py::reinterpret_borrow<py::sequence>(given);
  if (rows.size() != size_t(p.sum.terms))
    throw std::invalid_argument("mixed_norm_sum: norm has " + text(rows.size()) + " of " + text(p.sum.terms) + " terms");
  for (int k = 0; k < p.sum.terms; ++k) {
    p.norm[k] = rows[size_t(k)].cast<int16_t>();
    p.norms += p.norm[k] >= 0;
  }
}

inline Fields<MixedNormSumParams> bind_mixed_norm_sum(py::module_& m) {
  using P = MixedNormSumParams;
  const auto not_normed = [](P& p) { std::fill(p.norm, p.norm + kMaxTerms, int16_t(-1)); };
  Fields<P> fields(m, "MixedNormSumParams", not_normed);
  fields.on("sum", [](Bound<P>& bound, py::handle given) {
    bound.params.sum = given.cast<const Bound<MixedSumParams>&>().params;
  });
  fields.on("norm", &set_norm).field("channels", &P::channels).field("pixels", &P::pixels);
  fields.field("channels_last", &P::channels_last).field("training", &P::training).field("eps", &P::eps);
  fields.field("mean", &P::mean).field("var", &P::var).field("partial", &P::partial);
  return fields;
}

inline Fields<ReluConvBnParams> bind_relu_conv_bn(py::module_& m) {
  using P = ReluConvBnParams;
  Fields<P> fields(m, "ReluConvBnParams");
  fields.field("dtype", &P::dtype).field("images", &P::images).field("rows", &P::rows).field("cols", &P::cols);
  fields.field("in_channels", &P::in_channels).field("channels", &P::channels).field("reduce", &P::reduce);
  fields.field("x", &P::x).array("params", &P::params).array("dparams", &P::dparams).field("y", &P::y);
  fields.field("dy", &P::dy).field("dx", &P::dx).field("stats", &P::stats).field("training", &P::training);
  fields.field("eps", &P::eps).field("workspace", &P::workspace).field("threads", &P::threads);
  return fields;
}

// The predecessors of each node; their first edges follow.
inline void set_nodes(Bound<SamplePathsParams>& bound, py::handle given) {
  SamplePathsParams& p = bound.params;
  const auto nodes = py::reinterpret_borrow<py::sequence>(given);
  if (nodes.size() == 0 || nodes.size() > size_t(kMaxNodes))
    throw std::invalid_argument("sample_paths: " + text(nodes.size()) + " nodes; 1 to " + text(kMaxNodes) + " are allowed");
  p.nodes = int32_t(nodes.size());
  for (int node = 0; node < p.nodes; ++node)
    p.first_edge[node + 1] = p.first_edge[node] + nodes[size_t(node)].cast<int>();
  p.edges = p.first_edge[p.nodes];
}

// The logits of each node follow from its edges and the topology; a row of them has to fit a kernel's buffer.
inline void count_logits(SamplePathsParams& p) {
  if (p.ops < 1) throw std::invalid_argument("sample_paths: " + text(p.ops) + " operations; 1 are needed");
  int longest = p.ops;
  for (int node = 0; node < p.nodes; ++node) {
    const int n = p.first_edge[node + 1] - p.first_edge[node];
    const int logits = p.topology == Topology::none ? 0 : p.topology == Topology::top2 ? n : n * (n - 1) / 2;
    p.first_logit[node + 1] = p.first_logit[node] + logits;
    longest = std::max(longest, logits);
  }
  if (longest > kMaxRow)
    throw std::invalid_argument("sample_paths: a row of " + text(longest) + " logits; at most " + text(kMaxRow) +
                                " are allowed");
  p.logits = p.first_logit[p.nodes];
}

inline Fields<SamplePathsParams> bind_sample_paths(py::module_& m) {
  using P = SamplePathsParams;
  Fields<P> fields(m, "SamplePathsParams", nullptr, &count_logits);
  fields.field("dtype", &P::dtype).field("topology", &P::topology).field("paths", &P::paths).field("types", &P::types);
  fields.on("nodes", &set_nodes).field("ops", &P::ops).field("alpha", &P::alpha).field("beta", &P::beta);
  fields.field("tau", &P::tau).field("rng", &P::rng).field("op", &P::op).field("weight", &P::weight);
  fields.field("dweight", &P::dweight).field("dalpha", &P::dalpha).field("dbeta", &P::dbeta);
  fields.field("threads", &P::threads).field("stream", &P::stream);
  return fields;
}

}  // namespace fastnas
