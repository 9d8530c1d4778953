// y_j = sum_{e into j} sum_k w_ek o_k(x_e),  o_k(x) = BN(W (D * relu(x))) | BN(V * relu(x)) | BN(pool(x)) | pool(x) | x + noise,  BN(W u) = r W (u - mean u)
// dL/du = A^T (dy - mean dy) - B (u - mean u),  A = w r W,  B = W^T (w r^2 q) W,  q = r rowsum(W o P),  P = mean(dy (u - mean u)^T).
// Given statistics: dL/du = A^T dy
#pragma once

#include "mixed_norm_sum.h"

namespace fastnas {

// Computes r of a channel. var(W u) = diag(W S W^T) for S = cov(u): the pointwise output is never formed.
FASTNAS_HD double batch_rstd(double var, double eps) { return 1.0 / sqrt(var + eps); }

// These are an entry of A = w r W, and the coefficient of W_i W_j in B.
FASTNAS_HD double folded(double w, double rstd, double pointwise) { return w * rstd * pointwise; }
FASTNAS_HD double centring(double w, double rstd, double q) { return w * rstd * rstd * q; }

// Computes an entry of dL/dW = w M r (P - q r W S); `ws` is a row of W S.
FASTNAS_HD double pointwise_gradient(double w, double count, double rstd, double q, double p, double ws) {
  return w * count * rstd * (p - q * rstd * ws);
}

// Computes the gradient of a batch norm itself: w r (dy - mean dy - zhat q), zhat = r (z - mean
// z), q = mean(dy zhat)
template <class A> FASTNAS_HD A norm_gradient(A w_rstd, A dy, A dy_mean, A centred, A rstd_q) {
  return w_rstd * (dy - dy_mean - centred * rstd_q);
}

}  // namespace fastnas
