// The edges of a cell as Python describes them, and the fields of a call of mixed_edges on them.
#pragma once

#include <pybind11/stl.h>

#include <array>

#include "bind_params.h"

namespace fastnas {

// The edges of a cell, made once per kind of cell: per edge (source, target, stride, terms), per term
// (op, weight, size, dilation).
struct EdgeTable {
  int inputs, nodes, candidates, halves = 0, seps = 0, skips = 0, norms = 0, params = 0, kept = 0;
  std::vector<Edge> edges;
  std::vector<EdgeTerm> terms;

  EdgeTable(int inputs, int nodes, int candidates, const std::vector<std::array<int, 4>>& edge_rows,
            const std::vector<std::array<int, 4>>& term_rows)
      : inputs(inputs), nodes(nodes), candidates(candidates) {
    int term = 0;
    for (const auto& [source, target, stride, count] : edge_rows) {
      edges.push_back({source, target, stride, term, term + count});
      for (const int last = term + count; term < last; ++term) add_term(int(edges.size()) - 1, term_rows.at(size_t(term)));
    }
  }

  void add_term(int edge, const std::array<int, 4>& row) {
    EdgeTerm t{EdgeOp(row[0]), edge, row[1], row[2], row[3], params, norms, -1, -1, -1};
    if (t.op == EdgeOp::sep_conv) t.half = halves, t.input = seps++, halves += 2, params += 4, norms += 2;
    if (t.op == EdgeOp::dil_conv) t.half = halves++, params += 2, ++norms;
    if (t.op == EdgeOp::reduce_skip) params += 2, ++norms;
    if (t.op == EdgeOp::max_pool || t.op == EdgeOp::avg_pool) ++norms;
    if (t.op == EdgeOp::skip || t.op == EdgeOp::reduce_skip) t.skip = skips++;
    if (t.half >= 0 && t.size >= 5) ++kept;
    terms.push_back(t);
  }
};

// The edges, which the struct points to: the table is kept as long as it.
inline void set_table(Bound<MixedEdgesParams>& bound, py::handle given) {
  const auto table = std::make_shared<py::object>(py::reinterpret_borrow<py::object>(given));
  const auto& t = table->cast<const EdgeTable&>();
  MixedEdgesParams& p = bound.params;
  p.inputs = t.inputs, p.nodes = t.nodes, p.candidates = t.candidates, p.edge_count = int32_t(t.edges.size());
  p.edges = t.edges.data(), p.terms = t.terms.data();
  bound.alive.push_back(table);
}

inline Fields<MixedEdgesParams> bind_mixed_edges(py::module_& m) {
  using P = MixedEdgesParams;
  py::class_<EdgeTable>(m, "EdgeTable", py::module_local())
      .def(py::init<int, int, int, const std::vector<std::array<int, 4>>&, const std::vector<std::array<int, 4>>&>(),
           py::arg("inputs"), py::arg("nodes"), py::arg("candidates"), py::arg("edges"), py::arg("terms"))
      .def_readonly("halves", &EdgeTable::halves)
      .def_readonly("seps", &EdgeTable::seps)
      .def_readonly("skips", &EdgeTable::skips)
      .def_readonly("norms", &EdgeTable::norms)
      .def_readonly("params", &EdgeTable::params)
      .def_readonly("kept", &EdgeTable::kept);
  Fields<P> fields(m, "MixedEdgesParams");
  fields.on("table", &set_table).field("dtype", &P::dtype).field("images", &P::images).field("channels", &P::channels);
  fields.list("sizes", &P::sizes).list("x", &P::x).list("dx", &P::dx).list("params", &P::params);
  fields.list("dparams", &P::dparams).field("choice", &P::choice).field("w", &P::w).field("dw", &P::dw);
  fields.field("out", &P::out).field("dout", &P::dout).field("stats", &P::stats).field("shift", &P::shift);
  fields.field("gram", &P::gram).field("v", &P::v).field("u", &P::u).field("training", &P::training);
  fields.field("tf32", &P::tf32).field("eps", &P::eps).field("form", &P::form).field("level", &P::level);
  fields.field("rng", &P::rng).field("std", &P::std).field("workspace", &P::workspace);
  fields.field("threads", &P::threads).field("stream", &P::stream);
  return fields;
}

}  // namespace fastnas
