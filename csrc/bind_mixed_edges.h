// The edges of a cell as Python describes them, and the fields of a call of mixed_edges on them.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "bind_params.h"

namespace fastnas {

// The edges of a cell, made once per kind of cell: per edge (source, target, stride, terms), per term the numbers of
// EdgeTerm, all counted by fastnas.spaces.EdgeTable.
struct EdgeTable {
  int inputs, nodes, outputs, candidates;
  std::vector<Edge> edges;
  std::vector<EdgeTerm> terms;

  EdgeTable(int inputs, int nodes, int outputs, int candidates, const std::vector<std::array<int, 4>>& edge_rows,
            const std::vector<std::array<int, 12>>& term_rows)
      : inputs(inputs), nodes(nodes), outputs(outputs), candidates(candidates) {
    int first = 0;
    for (const auto& [source, target, stride, count] : edge_rows) {
      edges.push_back({source, target, stride, first, first + count});
      first += count;
    }
    if (size_t(first) != term_rows.size()) throw std::invalid_argument("EdgeTable: the edges have other terms");
    for (const auto& [op, edge, weight, size, dilation, halves, param, norm, half, input, kept, skip] : term_rows)
      terms.push_back({EdgeOp(op), edge, weight, size, dilation, halves, param, norm, half, input, kept, skip});
  }
};

// The edges, which the struct points to: the table is kept as long as it.
inline void set_table(Bound<MixedEdgesParams>& bound, py::handle given) {
  const auto table = std::make_shared<py::object>(py::reinterpret_borrow<py::object>(given));
  const auto& t = table->cast<const EdgeTable&>();
  MixedEdgesParams& p = bound.params;
  p.inputs = t.inputs, p.nodes = t.nodes, p.outputs = t.outputs;
  p.candidates = t.candidates, p.edge_count = int32_t(t.edges.size());
  p.edges = t.edges.data(), p.terms = t.terms.data();
  bound.alive.push_back(table);
}

inline Fields<MixedEdgesParams> bind_mixed_edges(py::module_& m) {
  using P = MixedEdgesParams;
  py::class_<EdgeTable>(m, "EdgeTable", py::module_local())
      .def(py::init<int, int, int, int, const std::vector<std::array<int, 4>>&,
                    const std::vector<std::array<int, 12>>&>(),
           py::arg("inputs"), py::arg("nodes"), py::arg("outputs"), py::arg("candidates"), py::arg("edges"),
           py::arg("terms"));
  Fields<P> fields(m, "MixedEdgesParams");
  fields.on("table", &set_table).field("dtype", &P::dtype).field("images", &P::images).field("channels", &P::channels);
  fields.list("sizes", &P::sizes).list("x", &P::x).list("dx", &P::dx).list("params", &P::params);
  fields.list("dparams", &P::dparams).field("choice", &P::choice).field("w", &P::w).field("dw", &P::dw);
  fields.field("out", &P::out).field("dout", &P::dout).field("stats", &P::stats).field("shift", &P::shift);
  fields.field("gram", &P::gram).field("v", &P::v).field("u", &P::u).field("z", &P::z);
  fields.field("inner", &P::inner).field("training", &P::training);
  fields.field("tf32", &P::tf32).field("eps", &P::eps).field("form", &P::form).field("level", &P::level);
  fields.field("rng", &P::rng).field("std", &P::std).field("workspace", &P::workspace);
  fields.field("threads", &P::threads).field("stream", &P::stream);
  return fields;
}

}  // namespace fastnas
