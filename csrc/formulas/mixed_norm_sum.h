// y = sum_k w_k v_k,  v_k = (z_k - mu_k) r_k,  mu, var of z_k per channel, r = (var + eps)^-1/2;  not normed: as mixed_sum
// dz_k = w_k r_k (dy - mean(dy) - v_k mean(dy v_k)),  dw_k = <dy, v_k>.  Given statistics: dz_k = w_k r_k dy
#pragma once

#include "mixed_sum.h"

namespace fastnas {

// Clamps a variance as it is stored: that of cancelled sums is 0 rather than negative, and one beyond the range of
// A is NaN: of an inf, the reciprocal std is 0, and the term would vanish without a word.
template <class A> FASTNAS_HD A stored_variance(double var) {
  const A stored = A(var < 0 ? 0 : var);
  return stored + (stored - stored);  // NaN of inf
}
template <class A> FASTNAS_HD A reciprocal_std(A var, A eps) { return A(1) / A(sqrt(var + eps)); }

// Computes w v of a normed element, scale = w r. z - mu comes first: where the two are large the
// difference is exact.
template <class A> FASTNAS_HD A scaled_norm(A scale, A z, A mean) { return scale * (z - mean); }

// Computes w r^2 mean(dy v), from mean(dy (z - mu)). Eager takes means of w dy: NaN where w is inf, as w - w is.
template <class A> FASTNAS_HD A norm_slope(A w, A r, A mean_product) {
  return w * r * (r * r * mean_product) + (w - w);
}

// Computes dz of a normed element.
template <class A> FASTNAS_HD A norm_dz(A scale, A dy, A mean_dy, A slope, A z, A mean) {
  return scale * (dy - mean_dy) - slope * (z - mean);
}

}  // namespace fastnas
