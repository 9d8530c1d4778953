// fastnas._cuda: the CUDA kernels. Imports without a driver; device_problem() says what is missing.
#include <pybind11/pybind11.h>

#include "bind_mixed_edges.h"
#include "bind_mixed_norm_sum.h"
#include "bind_mixed_sum.h"
#include "bind_sample_paths.h"
#include "cuda/device.h"
#include "cuda/mixed_edges.h"
#include "cuda/mixed_norm_sum.h"
#include "cuda/mixed_sum.h"
#include "cuda/sample_paths.h"

namespace fastnas {
namespace {

void check(const char* op, int error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cuda::error_text(error));
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

  using Run = void (*)(const MixedSumParams&);
  bind_mixed_sum<Address>(
      m, [](MixedSumParams& p, Address stream) { p.stream = as_pointer<void>(stream); },
      Run([](const MixedSumParams& p) { check("mixed_sum_fwd", cuda::mixed_sum_fwd(p)); }),
      Run([](const MixedSumParams& p) { check("mixed_sum_bwd", cuda::mixed_sum_bwd(p)); }));

  using NormRun = void (*)(const MixedNormSumParams&);
  bind_mixed_norm_sum<Address>(
      m, [](MixedSumParams& p, Address stream) { p.stream = as_pointer<void>(stream); }, &cuda::mixed_norm_sum_parts,
      NormRun([](const MixedNormSumParams& p) { check("mixed_norm_sum_fwd", cuda::mixed_norm_sum_fwd(p)); }),
      NormRun([](const MixedNormSumParams& p) { check("mixed_norm_sum_bwd", cuda::mixed_norm_sum_bwd(p)); }));

  using RunEdges = void (*)(const MixedEdgesParams&);
  bind_mixed_edges(m, &cuda::mixed_edges_workspace,
                   RunEdges([](const MixedEdgesParams& p) { check("mixed_edges_fwd", cuda::mixed_edges_fwd(p)); }),
                   RunEdges([](const MixedEdgesParams& p) { check("mixed_edges_bwd", cuda::mixed_edges_bwd(p)); }));

  using RunSample = void (*)(const SamplePathsParams&);
  bind_sample_paths<Address>(
      m, [](SamplePathsParams& p, Address stream) { p.stream = as_pointer<void>(stream); },
      RunSample([](const SamplePathsParams& p) { check("sample_paths_fwd", cuda::sample_paths_fwd(p)); }),
      RunSample([](const SamplePathsParams& p) { check("sample_paths_bwd", cuda::sample_paths_bwd(p)); }));
}
