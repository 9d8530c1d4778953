// sample_paths as Python calls it, addresses as integers. Shared by the two bind files.
#pragma once

#include "bind_mixed_sum.h"

namespace fastnas {

// What forward and backward are told alike.
struct PathArguments {
  int dtype;
  int64_t paths, types;
  const std::vector<int>& nodes;
  int ops, topology;
  Address alpha, beta, tau, rng, op;
};

inline SamplePathsParams sample_paths_params(const PathArguments& a) {
  if (a.nodes.empty() || a.nodes.size() > size_t(kMaxNodes))
    throw std::invalid_argument("sample_paths: " + std::to_string(a.nodes.size()) + " nodes; 1 to " +
                                std::to_string(kMaxNodes) + " are allowed");
  if (a.ops < 1) throw std::invalid_argument("sample_paths: " + std::to_string(a.ops) + " operations; 1 are needed");
  SamplePathsParams p;
  p.dtype = DType(a.dtype);
  p.topology = Topology(a.topology);
  p.paths = a.paths, p.types = a.types;
  p.nodes = int32_t(a.nodes.size());
  p.ops = a.ops;
  int longest = p.ops;
  for (int node = 0; node < p.nodes; ++node) {
    const int n = a.nodes[size_t(node)];
    const int logits = p.topology == Topology::none ? 0 : p.topology == Topology::top2 ? n : n * (n - 1) / 2;
    p.first_edge[node + 1] = p.first_edge[node] + n;
    p.first_logit[node + 1] = p.first_logit[node] + logits;
    longest = logits > longest ? logits : longest;
  }
  if (longest > kMaxRow)
    throw std::invalid_argument("sample_paths: a row of " + std::to_string(longest) + " logits; at most " +
                                std::to_string(kMaxRow) + " are allowed");
  p.edges = p.first_edge[p.nodes];
  p.logits = p.first_logit[p.nodes];
  p.alpha = as_pointer<void>(a.alpha), p.beta = as_pointer<void>(a.beta);
  p.tau = as_pointer<double>(a.tau), p.rng = as_pointer<int64_t>(a.rng);
  p.op = as_pointer<int64_t>(a.op);
  return p;
}

// Launch and place as in bind_mixed_sum.
template <class Launch, class Place, class Run>
void bind_sample_paths(pybind11::module_& m, Place place, Run fwd, Run bwd) {
  namespace py = pybind11;
  m.def("sample_paths_fwd",
        [=](int dtype, int64_t paths, int64_t types, const std::vector<int>& nodes, int ops, int topology,
            Address alpha, Address beta, Address tau, Address rng, Address op, Address weight, Launch launch) {
          SamplePathsParams p =
              sample_paths_params({dtype, paths, types, nodes, ops, topology, alpha, beta, tau, rng, op});
          p.weight = as_pointer<void>(weight);
          place(p, launch);
          py::gil_scoped_release unlocked;
          fwd(p);
        });
  m.def("sample_paths_bwd",
        [=](int dtype, int64_t paths, int64_t types, const std::vector<int>& nodes, int ops, int topology,
            Address alpha, Address beta, Address tau, Address rng, Address op, Address dweight, Address dalpha,
            Address dbeta, Launch launch) {
          SamplePathsParams p =
              sample_paths_params({dtype, paths, types, nodes, ops, topology, alpha, beta, tau, rng, op});
          p.dweight = as_pointer<void>(dweight);
          p.dalpha = as_pointer<void>(dalpha), p.dbeta = as_pointer<void>(dbeta);
          place(p, launch);
          py::gil_scoped_release unlocked;
          bwd(p);
        });
}

}  // namespace fastnas
