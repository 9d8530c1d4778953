// mixed_sum as Python calls it, addresses as integers. Shared by the two bind files.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

namespace fastnas {

using Address = uintptr_t;

template <class T> T* as_pointer(Address address) { return reinterpret_cast<T*>(address); }

struct NoiseArguments {
  NoiseForm form;
  std::vector<int> noisy;
  Address level, rng, std;
  int64_t channels, pixels;
};

inline MixedSumParams mixed_sum_params(int64_t n, int dtype, const std::vector<Address>& x, Address w,
                                       Address partial, const NoiseArguments& noise) {
  if (x.empty() || x.size() > size_t(kMaxTerms))
    throw std::invalid_argument("mixed_sum: " + std::to_string(x.size()) + " terms; 1 to " +
                                std::to_string(kMaxTerms) + " are allowed");
  MixedSumParams p;
  p.n = n;
  p.terms = int32_t(x.size());
  p.dtype = DType(dtype);
  p.form = noise.form;
  p.noisy_terms = int32_t(noise.noisy.size());
  p.channels = noise.channels;
  p.pixels = noise.pixels;
  for (int k = 0; k < p.terms; ++k) {
    p.x[k] = as_pointer<void>(x[k]);
    p.ordinal[k] = -1;
  }
  for (int j = 0; j < p.noisy_terms; ++j) {
    const int k = noise.noisy[size_t(j)];
    if (k < 0 || k >= p.terms)
      throw std::invalid_argument("mixed_sum: term " + std::to_string(k) + " of " + std::to_string(p.terms) + " is noisy");
    p.ordinal[k] = int8_t(j);
  }
  p.w = as_pointer<void>(w);
  p.partial = as_pointer<double>(partial);
  p.std = as_pointer<double>(noise.std);
  p.level = as_pointer<double>(noise.level);
  p.rng = as_pointer<int64_t>(noise.rng);
  return p;
}

// The bindings of a module. Launch is what its kernels are launched with (threads, or a stream) and
// `place` puts it into the params; fwd and bwd run a filled struct and throw on failure.
template <class Launch, class Place, class Run>
void bind_mixed_sum(pybind11::module_& m, Place place, Run fwd, Run bwd) {
  namespace py = pybind11;
  py::enum_<NoiseForm>(m, "NoiseForm", py::module_local())
      .value("none", NoiseForm::none)
      .value("gaussian_additive", NoiseForm::gaussian_additive)
      .value("gaussian_multiplicative", NoiseForm::gaussian_multiplicative)
      .value("uniform_additive", NoiseForm::uniform_additive)
      .value("uniform_multiplicative", NoiseForm::uniform_multiplicative);
  py::class_<NoiseArguments>(m, "NoiseArguments", py::module_local())
      .def(py::init([](NoiseForm form, std::vector<int> noisy, Address level, Address rng, Address std,
                       int64_t channels, int64_t pixels) {
             return NoiseArguments{form, std::move(noisy), level, rng, std, channels, pixels};
           }),
           py::arg("form"), py::arg("noisy"), py::arg("level"), py::arg("rng"), py::arg("std"),
           py::arg("channels"), py::arg("pixels"));
  m.attr("max_terms") = kMaxTerms;
  m.def("block_count", &block_count, "Partial sums that n elements need room for; the CPU kernels bring theirs.");
  m.def("mixed_sum_fwd",
        [=](int64_t n, int dtype, const std::vector<Address>& x, Address w, Address partial,
            const NoiseArguments& noise, Address y, Launch launch) {
          MixedSumParams p = mixed_sum_params(n, dtype, x, w, partial, noise);
          p.y = as_pointer<void>(y);
          place(p, launch);
          py::gil_scoped_release unlocked;
          fwd(p);
        });
  m.def("mixed_sum_bwd",
        [=](int64_t n, int dtype, const std::vector<Address>& x, Address w, Address partial,
            const NoiseArguments& noise, Address dy, const std::vector<Address>& dx, Address dw, Launch launch) {
          MixedSumParams p = mixed_sum_params(n, dtype, x, w, partial, noise);
          p.dy = as_pointer<void>(dy);
          p.dw = as_pointer<void>(dw);
          for (int k = 0; k < p.terms; ++k) p.dx[k] = as_pointer<void>(dx.at(k));
          place(p, launch);
          py::gil_scoped_release unlocked;
          bwd(p);
        });
}

}  // namespace fastnas
