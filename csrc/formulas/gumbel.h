// Computes standard Gumbel noise g = -ln(-ln u), with the same bits on every machine: its logarithm is made of + -
// * / alone, which IEEE 754 rounds correctly, in one order, none contracted to an FMA
// (fastnas/reference/gumbel.py).
#pragma once

#include "mixed_sum.h"

namespace fastnas {

// nvcc contracts a * b + c unless told by these; on the host the sources that include this are
// compiled with -ffp-contract=off.
FASTNAS_HD double mul_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
FASTNAS_HD double add_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

// Adds 1 + z/3 + z^2/5 + ... from the last term, by recursion, for the reason that philox_rounds() has.
constexpr int kAtanhTerms = 11;
template <int k = 0> FASTNAS_HD double atanh_series(double z) {
  if constexpr (k == kAtanhTerms) {
    return 1.0 / (2 * k + 1);
  } else {
    return add_rn(mul_rn(atanh_series<k + 1>(z), z), 1.0 / (2 * k + 1));
  }
}

// Computes ln x for x > 0, by x = 2^e m, m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1)/(m + 1)).
FASTNAS_HD double portable_log(double x) {
  constexpr int64_t root_half = 0x3fe6a09e667f3bcd, mantissa = (int64_t(1) << 52) - 1;
  const int64_t bits = bit_cast<int64_t>(x) - root_half;
  const double e = double(int32_t(bits >> 52));
  const double m = bit_cast<double>((bits & mantissa) + root_half);
  const double s = add_rn(m, -1.0) / add_rn(m, 1.0);
  return add_rn(mul_rn(e, 0.6931471805599453), mul_rn(mul_rn(2.0, s), atanh_series(mul_rn(s, s))));
}

FASTNAS_HD double gumbel(double u) { return -portable_log(-portable_log(u)); }

// Draws u in (0, 1) of stream `ordinal`, exact in fp64.
FASTNAS_HD Draw<double> unit_draw(const int64_t* rng, int ordinal) {
  return Draw<double>(NoiseForm::uniform_additive, uint64_t(rng[0]), uint64_t(rng[1]) + uint64_t(ordinal), 0.5, 0.5);
}

}  // namespace fastnas
