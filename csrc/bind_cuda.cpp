// fastnas._cuda: the CUDA kernels. Imports without a driver; device_problem() says what is missing.
#include <pybind11/pybind11.h>

#include "bind_ops.h"
#include "cuda/device.h"
#include "cuda/mixed_edges.h"
#include "cuda/mixed_norm_sum.h"
#include "cuda/mixed_sum.h"
#include "cuda/sample_paths.h"

namespace fastnas {
namespace {

void check(const char* op, int error) {
  if (!error) return;
  throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cuda::error_text(error) + ", in " +
                           cuda::failed_kernel_name());
}

}  // namespace
}  // namespace fastnas

#ifndef FASTNAS_MODULE
#define FASTNAS_MODULE _cuda
#endif

PYBIND11_MODULE(FASTNAS_MODULE, m) {
  using namespace fastnas;
  m.doc() = "fastnas CUDA kernels";
  m.def("device_problem", &cuda::device_problem);

  using Sum = const MixedSumParams&;
  bind_mixed_sum(m)
      .run("mixed_sum_fwd", [](Sum p) { check("mixed_sum_fwd", cuda::mixed_sum_fwd(p)); })
      .run("mixed_sum_bwd", [](Sum p) { check("mixed_sum_bwd", cuda::mixed_sum_bwd(p)); });

  using NormSum = const MixedNormSumParams&;
  bind_mixed_norm_sum(m)
      .run("mixed_norm_sum_parts", &cuda::mixed_norm_sum_parts)
      .run("mixed_norm_sum_fwd", [](NormSum p) { check("mixed_norm_sum_fwd", cuda::mixed_norm_sum_fwd(p)); })
      .run("mixed_norm_sum_bwd", [](NormSum p) { check("mixed_norm_sum_bwd", cuda::mixed_norm_sum_bwd(p)); });

  using Edges = const MixedEdgesParams&;
  bind_mixed_edges(m)
      .run("mixed_edges_workspace", &cuda::mixed_edges_workspace)
      .run("mixed_edges_fwd", [](Edges p) { check("mixed_edges_fwd", cuda::mixed_edges_fwd(p)); })
      .run("mixed_edges_bwd", [](Edges p) { check("mixed_edges_bwd", cuda::mixed_edges_bwd(p)); });

  using Sample = const SamplePathsParams&;
  bind_sample_paths(m)
      .run("sample_paths_fwd", [](Sample p) { check("sample_paths_fwd", cuda::sample_paths_fwd(p)); })
      .run("sample_paths_bwd", [](Sample p) { check("sample_paths_bwd", cuda::sample_paths_bwd(p)); });
}
