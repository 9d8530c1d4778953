// fastnas._C: the CPU kernels. Addresses in, nothing kept, the GIL released while they run.
#include <pybind11/pybind11.h>

#include "bind_ops.h"
#include "cpu/isa.h"
#include "cpu/mixed_edges.h"
#include "cpu/mixed_norm_sum.h"
#include "cpu/mixed_sum.h"
#include "cpu/relu_conv_bn.h"
#include "cpu/sample_paths.h"

namespace fastnas {
namespace {

Isa current_isa = best_isa();

void use_isa(const std::string& name) {
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (name != isa_name(isa)) continue;
    if (!isa_supported(isa)) throw std::invalid_argument("this CPU has no " + name);
    current_isa = isa;
    return;
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; baseline, avx2 and avx512 are allowed");
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (isa_supported(isa)) names.push_back(isa_name(isa));
  return names;
}

// Sums of fp32 and fp64 as they lie wait for memory, and 512-bit ones lower the core's clock: 5 % slower.
Isa isa_of_sum(const MixedSumParams& p) {
  const bool waits_for_memory = p.noisy_terms == 0 && (p.dtype == DType::f32 || p.dtype == DType::f64);
  return waits_for_memory && current_isa == Isa::avx512 ? Isa::avx2 : current_isa;
}

}  // namespace
}  // namespace fastnas

PYBIND11_MODULE(_C, m) {
  using namespace fastnas;
  m.doc() = "fastnas CPU kernels";
  m.def("isa", [] { return isa_name(current_isa); });
  m.def("supported_isas", &supported_isas);
  m.def("use_isa", &use_isa);

  using Sum = const MixedSumParams&;
  bind_mixed_sum(m)
      .run("mixed_sum_fwd", [](Sum p) { FASTNAS_ISA_SELECT(isa_of_sum(p), mixed_sum_fwd)(p); })
      .run("mixed_sum_bwd", [](Sum p) { FASTNAS_ISA_SELECT(isa_of_sum(p), mixed_sum_bwd)(p); });

  using NormSum = const MixedNormSumParams&;
  bind_mixed_norm_sum(m)
      .run("mixed_norm_sum_parts", &baseline::mixed_norm_sum_parts)
      .run("mixed_norm_sum_fwd", [](NormSum p) { FASTNAS_ISA_SELECT(current_isa, mixed_norm_sum_fwd)(p); })
      .run("mixed_norm_sum_bwd", [](NormSum p) { FASTNAS_ISA_SELECT(current_isa, mixed_norm_sum_bwd)(p); });

  using Edges = const MixedEdgesParams&;
  bind_mixed_edges(m)
      .run("mixed_edges_workspace", [](Edges p) { return FASTNAS_ISA_SELECT(current_isa, mixed_edges_workspace)(p); })
      .run("mixed_edges_fwd", [](Edges p) { FASTNAS_ISA_SELECT(current_isa, mixed_edges_fwd)(p); })
      .run("mixed_edges_bwd", [](Edges p) { FASTNAS_ISA_SELECT(current_isa, mixed_edges_bwd)(p); });

  using Conv = const ReluConvBnParams&;
  bind_relu_conv_bn(m)
      .run("relu_conv_bn_workspace", [](Conv p) { return FASTNAS_ISA_SELECT(current_isa, relu_conv_bn_workspace)(p); })
      .run("relu_conv_bn_fwd", [](Conv p) { FASTNAS_ISA_SELECT(current_isa, relu_conv_bn_fwd)(p); })
      .run("relu_conv_bn_bwd", [](Conv p) { FASTNAS_ISA_SELECT(current_isa, relu_conv_bn_bwd)(p); });

  using Sample = const SamplePathsParams&;
  bind_sample_paths(m)
      .run("sample_paths_fwd", [](Sample p) { FASTNAS_ISA_SELECT(current_isa, sample_paths_fwd)(p); })
      .run("sample_paths_bwd", [](Sample p) { FASTNAS_ISA_SELECT(current_isa, sample_paths_bwd)(p); });
}
