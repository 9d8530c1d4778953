// mixed_norm_sum as Python calls it, addresses as integers. Shared by the two bind files.
#pragma once

#include "bind_mixed_sum.h"

namespace fastnas {

// Batch norm of one call: row of each term in mean and var or -1, and the shape they are taken over.
struct NormArguments {
  std::vector<int> norm;
  int64_t channels, pixels;
  bool channels_last, training;
  double eps;
  Address mean, var, partial;
};

inline MixedNormSumParams mixed_norm_sum_params(const MixedSumParams& sum, const NormArguments& norm) {
  MixedNormSumParams p;
  p.sum = sum;
  p.channels = norm.channels;
  p.pixels = norm.pixels;
  p.channels_last = norm.channels_last;
  p.training = norm.training;
  p.eps = norm.eps;
  for (int k = 0; k < sum.terms; ++k) {
    p.norm[k] = int16_t(norm.norm.at(k));
    p.norms += p.norm[k] >= 0;
  }
  p.mean = as_pointer<void>(norm.mean);
  p.var = as_pointer<void>(norm.var);
  p.partial = as_pointer<double>(norm.partial);
  return p;
}

// As bind_mixed_sum; parts tells how many partial sums a channel has.
template <class Launch, class Place, class Parts, class Run>
void bind_mixed_norm_sum(pybind11::module_& m, Place place, Parts parts, Run fwd, Run bwd) {
  namespace py = pybind11;
  py::class_<NormArguments>(m, "NormArguments", py::module_local())
      .def(py::init([](std::vector<int> norm, int64_t channels, int64_t pixels, bool channels_last, bool training,
                       double eps, Address mean, Address var, Address partial) {
             return NormArguments{std::move(norm), channels, pixels, channels_last, training,
                                  eps,             mean,     var,    partial};
           }),
           py::arg("norm"), py::arg("channels"), py::arg("pixels"), py::arg("channels_last"),
           py::arg("training"), py::arg("eps"), py::arg("mean"), py::arg("var"), py::arg("partial"));
  m.def("mixed_norm_sum_parts", [=](int64_t n, int64_t channels, int64_t pixels, bool channels_last) {
    MixedNormSumParams p;
    p.sum.n = n;
    p.channels = channels;
    p.pixels = pixels;
    p.channels_last = channels_last;
    return parts(p);
  });
  m.def("mixed_norm_sum_fwd",
        [=](int64_t n, int dtype, const std::vector<Address>& z, Address w, Address partial,
            const NoiseArguments& noise, const NormArguments& norm, Address y, Launch launch) {
          MixedNormSumParams p = mixed_norm_sum_params(mixed_sum_params(n, dtype, z, w, partial, noise), norm);
          p.sum.y = as_pointer<void>(y);
          place(p.sum, launch);
          py::gil_scoped_release unlocked;
          fwd(p);
        });
  m.def("mixed_norm_sum_bwd",
        [=](int64_t n, int dtype, const std::vector<Address>& z, Address w, const NoiseArguments& noise,
            const NormArguments& norm, Address dy, const std::vector<Address>& dz, Address dw, Launch launch) {
          MixedNormSumParams p = mixed_norm_sum_params(mixed_sum_params(n, dtype, z, w, 0, noise), norm);
          p.sum.dy = as_pointer<void>(dy);
          p.sum.dw = as_pointer<void>(dw);
          for (int k = 0; k < p.sum.terms; ++k) p.sum.dx[k] = as_pointer<void>(dz.at(k));
          place(p.sum, launch);
          py::gil_scoped_release unlocked;
          bwd(p);
        });
}

}  // namespace fastnas
