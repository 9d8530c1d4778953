// y = sum_k w_k v_k,  v_k = x_k | x_k + d_k | x_k d_k,  d = shift + scale eps (std(x) eps if gaussian additive)
// dx_k = w_k dy | w_k dy | w_k d_k dy,  dw_k = <dy, v_k>.  d is constant in backward: drawn again, never stored.
//
// Of a Bernoulli variable (dropout) d is scale where u < shift, else 0.
#pragma once

#include "../params.h"
#include "philox.h"

namespace fastnas {

FASTNAS_HD bool is_gaussian(NoiseForm form) {
  return form == NoiseForm::gaussian_additive || form == NoiseForm::gaussian_multiplicative;
}
FASTNAS_HD bool is_multiplicative(NoiseForm form) {
  return form == NoiseForm::gaussian_multiplicative || form == NoiseForm::uniform_multiplicative ||
         form == NoiseForm::bernoulli_multiplicative;
}
// Says whether a skip of a cell carries the noise: dropout stays off the strided ones, as in P-DARTS' code.
FASTNAS_HD bool is_drawn_on(NoiseForm form, EdgeOp skip) {
  return form != NoiseForm::none && !(form == NoiseForm::bernoulli_multiplicative && skip == EdgeOp::reduce_skip);
}
FASTNAS_HD bool is_relative(NoiseForm form) { return form == NoiseForm::gaussian_additive; }

// Draws d = shift + spread eps, with what a whole term shares worked out once: shift and spread are fp64 in memory,
// where a schedule changes them between replays of a graph.
//
// Of a Bernoulli variable shift is the probability to be kept. eps = 2 u - 1 is exact in fp32, and so it is compared
// with 2 shift - 1 rounded to fp32 in every dtype: rounded otherwise, a few elements would be dropped on one backend
// and kept on another.
template <class A> struct Draw {
  bool gaussian, bernoulli;
  uint64_t key, offset;
  A shift, spread;

  FASTNAS_HD Draw(NoiseForm form, uint64_t key, uint64_t offset, double shift, double spread)
      : gaussian(is_gaussian(form)),
        bernoulli(form == NoiseForm::bernoulli_multiplicative),
        key(key),
        offset(offset),
        shift(bernoulli ? A(float(2 * shift - 1)) : A(shift)),
        spread(A(spread)) {}
  FASTNAS_HD Draw(const MixedSumParams& p, int ordinal)
      : Draw(p.form, uint64_t(p.rng[0]), uint64_t(p.rng[1]) + uint64_t(ordinal), p.level[0],
             is_relative(p.form) ? p.level[1] * p.std[ordinal] : p.level[1]) {}

  FASTNAS_HD Draws<A> quad(uint64_t index) const {
    Draws<A> d = draws<A>(gaussian, philox(key, index, offset));
    for (int i = 0; i < 4; ++i) d.v[i] = of(bernoulli, d.v[i]);
    return d;
  }
  FASTNAS_HD A of(bool dropped, A eps) const {
    return dropped ? (eps < shift ? spread : A(0)) : shift + spread * eps;
  }
  FASTNAS_HD A element(uint64_t index) const {
    const Draws<A> d = quad(index >> 2);
    const A low = index & 1 ? d.v[1] : d.v[0], high = index & 1 ? d.v[3] : d.v[2];
    return index & 2 ? high : low;
  }
};

// Finds the NCHW position of the element at a memory index; channels > 0 says that memory is channels last.
FASTNAS_HD int64_t logical_index(int64_t channels, int64_t pixels, int64_t memory) {
  if (channels == 0) return memory;
  const int64_t image = memory / (channels * pixels), within = memory % (channels * pixels);
  return (image * channels + within % channels) * pixels + within / channels;
}
FASTNAS_HD int64_t logical_index(const MixedSumParams& p, int64_t memory) {
  return logical_index(p.channels, p.pixels, memory);
}

template <class A> FASTNAS_HD A mixed_value(bool multiplicative, A x, A d) {
  return multiplicative ? x * d : x + d;
}
template <class A> FASTNAS_HD A mixed_dx(A w, A dy) { return w * dy; }

// Holds count, mean and sum of squared deviations of a part; merging is Chan, Golub, LeVeque (1979), which
// never subtracts two large squares.
struct Moments {
  double count = 0, mean = 0, squares = 0;
};
FASTNAS_HD Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0) return a;
  const double count = a.count + b.count, delta = b.mean - a.mean;
  return {count, a.mean + delta * (b.count / count),
          a.squares + b.squares + delta * delta * (a.count * b.count / count)};
}
// Is NaN of fewer than two values, as in torch.
FASTNAS_HD double unbiased_std(const Moments& m) { return sqrt(m.squares / (m.count > 1 ? m.count - 1 : 0)); }

FASTNAS_HD double clamp_variance(double var) { return var < 0 ? 0 : var; }  // rounding can pass below 0; NaN stays

// Makes the moments of `count` values from the sums of their squared deviations from about their
// mean, and of these deviations.
FASTNAS_HD Moments moments_of_sums(double count, double mean, double squares, double deviations) {
  const double correction = deviations / count;
  return {count, mean + correction, clamp_variance(squares - deviations * correction)};
}
// Says whether squares summed in fp32 can be trusted: they vanish below 1e-38 and overflow above 3e38, long before
// the values themselves do. Where they cannot, the sums are made again in fp64.
FASTNAS_HD bool squares_fit_fp32(const Moments& m) {
  return m.squares > 1e-30 * m.count && m.squares < 3e38;
}

}  // namespace fastnas
