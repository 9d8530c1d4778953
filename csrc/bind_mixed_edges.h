// mixed_edges and relu_conv_bn as Python calls them, addresses as integers.
#pragma once

#include <array>

#include "bind_mixed_sum.h"

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

// What forward and backward of one call share, and the addresses that only one of them has.
struct MixedEdgesArguments {
  int dtype;
  int64_t images;
  int channels;
  std::vector<int64_t> sizes;
  std::vector<Address> x, params, dx, dparams;
  Address choice = 0, w = 0, dw = 0, out = 0, dout = 0, stats = 0, shift = 0, gram = 0, v = 0, u = 0;
  bool training = true, tf32 = false;
  double eps = 1e-5;
  NoiseForm form = NoiseForm::none;
  Address level = 0, rng = 0, std = 0, stream = 0;
  int threads = 1;

  static const void* const* constant(const std::vector<Address>& a) { return reinterpret_cast<const void* const*>(a.data()); }
  static void* const* pointers(const std::vector<Address>& a) {
    return a.empty() ? nullptr : reinterpret_cast<void* const*>(a.data());
  }

  MixedEdgesParams params_of(const EdgeTable& table, Address workspace) const {
    MixedEdgesParams p;
    p.dtype = DType(dtype);
    p.images = images, p.channels = channels;
    p.inputs = table.inputs, p.nodes = table.nodes, p.candidates = table.candidates;
    p.edge_count = int32_t(table.edges.size());
    p.edges = table.edges.data(), p.terms = table.terms.data();
    p.sizes = sizes.data();
    p.x = constant(x), p.params = constant(params);
    p.dx = pointers(dx), p.dparams = pointers(dparams);
    p.choice = as_pointer<int64_t>(choice), p.w = as_pointer<void>(w), p.dw = as_pointer<double>(dw);
    p.out = as_pointer<void>(out), p.dout = as_pointer<void>(dout);
    p.stats = as_pointer<void>(stats), p.shift = as_pointer<void>(shift), p.gram = as_pointer<void>(gram);
    p.v = as_pointer<void>(v), p.u = as_pointer<void>(u);
    p.training = training, p.tf32 = tf32, p.eps = eps;
    p.form = form;
    p.level = as_pointer<double>(level), p.rng = as_pointer<int64_t>(rng), p.std = as_pointer<double>(std);
    p.workspace = as_pointer<void>(workspace);
    p.threads = threads;
    p.stream = as_pointer<void>(stream);
    return p;
  }
};

// workspace(params) -> bytes; fwd and bwd run a filled struct.
template <class Size, class Run>
void bind_mixed_edges(pybind11::module_& m, Size workspace, Run fwd, Run bwd) {
  namespace py = pybind11;
  py::class_<EdgeTable>(m, "EdgeTable", py::module_local())
      .def(py::init<int, int, int, const std::vector<std::array<int, 4>>&, const std::vector<std::array<int, 4>>&>(),
           py::arg("inputs"), py::arg("nodes"), py::arg("candidates"), py::arg("edges"), py::arg("terms"))
      .def_readonly("halves", &EdgeTable::halves)
      .def_readonly("seps", &EdgeTable::seps)
      .def_readonly("skips", &EdgeTable::skips)
      .def_readonly("norms", &EdgeTable::norms)
      .def_readonly("params", &EdgeTable::params)
      .def_readonly("kept", &EdgeTable::kept);
  using Arguments = MixedEdgesArguments;
  py::class_<Arguments>(m, "MixedEdgesArguments", py::module_local(), py::dynamic_attr())
      .def(py::init<>())
      .def_readwrite("dtype", &Arguments::dtype)
      .def_readwrite("images", &Arguments::images)
      .def_readwrite("channels", &Arguments::channels)
      .def_readwrite("sizes", &Arguments::sizes)
      .def_readwrite("x", &Arguments::x)
      .def_readwrite("params", &Arguments::params)
      .def_readwrite("dx", &Arguments::dx)
      .def_readwrite("dparams", &Arguments::dparams)
      .def_readwrite("choice", &Arguments::choice)
      .def_readwrite("w", &Arguments::w)
      .def_readwrite("dw", &Arguments::dw)
      .def_readwrite("out", &Arguments::out)
      .def_readwrite("dout", &Arguments::dout)
      .def_readwrite("stats", &Arguments::stats)
      .def_readwrite("shift", &Arguments::shift)
      .def_readwrite("gram", &Arguments::gram)
      .def_readwrite("v", &Arguments::v)
      .def_readwrite("u", &Arguments::u)
      .def_readwrite("training", &Arguments::training)
      .def_readwrite("tf32", &Arguments::tf32)
      .def_readwrite("eps", &Arguments::eps)
      .def_readwrite("form", &Arguments::form)
      .def_readwrite("level", &Arguments::level)
      .def_readwrite("rng", &Arguments::rng)
      .def_readwrite("std", &Arguments::std)
      .def_readwrite("threads", &Arguments::threads)
      .def_readwrite("stream", &Arguments::stream);
  m.def("mixed_edges_workspace", [=](const EdgeTable& table, const Arguments& a) { return workspace(a.params_of(table, 0)); });
  m.def("mixed_edges_fwd", [=](const EdgeTable& table, const Arguments& a, Address space) {
    const MixedEdgesParams p = a.params_of(table, space);
    py::gil_scoped_release unlocked;
    fwd(p);
  });
  m.def("mixed_edges_bwd", [=](const EdgeTable& table, const Arguments& a, Address space) {
    const MixedEdgesParams p = a.params_of(table, space);
    py::gil_scoped_release unlocked;
    bwd(p);
  });
}

template <class Size, class Run>
void bind_relu_conv_bn(pybind11::module_& m, Size workspace, Run fwd, Run bwd) {
  namespace py = pybind11;
  const auto params_of = [](int dtype, int64_t images, int64_t rows, int64_t cols, int in_channels, int channels,
                            Address x, const std::vector<Address>& params, const std::vector<Address>& dparams, Address y,
                            Address dy, Address dx, Address stats, bool training, double eps, Address space,
                            int threads) {
    ReluConvBnParams p;
    p.dtype = DType(dtype);
    p.images = images, p.rows = rows, p.cols = cols, p.in_channels = in_channels, p.channels = channels;
    p.reduce = params.size() == 2;
    p.x = as_pointer<void>(x);
    for (size_t i = 0; i < params.size(); ++i) p.params[i] = as_pointer<void>(params[i]);
    for (size_t i = 0; i < dparams.size(); ++i) p.dparams[i] = as_pointer<void>(dparams[i]);
    p.y = as_pointer<void>(y), p.dy = as_pointer<void>(dy), p.dx = as_pointer<void>(dx);
    p.stats = as_pointer<void>(stats);
    p.training = training, p.eps = eps;
    p.workspace = as_pointer<void>(space);
    p.threads = threads;
    return p;
  };
  // f(params) under all the arguments of params_of.
  const auto define = [&](const char* name, auto f) {
    m.def(name, [=](int dtype, int64_t images, int64_t rows, int64_t cols, int in_channels, int channels, Address x,
                    const std::vector<Address>& params, const std::vector<Address>& dparams, Address y, Address dy,
                    Address dx, Address stats, bool training, double eps, Address space, int threads) {
      const ReluConvBnParams p = params_of(dtype, images, rows, cols, in_channels, channels, x, params, dparams, y, dy,
                                           dx, stats, training, eps, space, threads);
      py::gil_scoped_release unlocked;
      return f(p);
    });
  };
  define("relu_conv_bn_workspace", workspace);
  define("relu_conv_bn_fwd", fwd);
  define("relu_conv_bn_bwd", bwd);
}

}  // namespace fastnas
