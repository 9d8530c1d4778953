// Folds partial sums: what the last block of a job does. Sums of groups are added in the groups' order, in fp64, so
// the bits do not depend on which block comes last. No loop over groups divides: a fold is one block's work, and
// whatever it waits for, the launch waits for.
#pragma once

#include "mixed_edges_tile.h"

namespace fastnas::cuda {
namespace {

constexpr int kRowsAtOnce = 4;  // rows of W that a warp folds together, so that it reads cov(u) a quarter as often

__device__ Quad fresh_quad(const float* from) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}

// Makes mean(u) and cov(u) from the groups' partial sums: of u' = u + shift_g, where shift_g is minus the mean of the
// group's first tile, they have sum u' u'^T, sum u' and shift_g.
//
// With c_g = shift_g + mean(u), u - mean(u) = u' - c_g. c_g is small, so nothing cancels in
//  sum (u' - c)(u' - c)^T = sum u' u'^T - c (sum u')^T - (sum u') c^T + n c c^T.
// cov stays fp64 for the rows; backward gets its fp32 copy.
__device__ void fold_gram(const Plan& plan, const Half& h) {
  const int C = plan.C, width = plan.width;
  const float *sums = h.partial + plan.matrix_size(), *shifts = sums + width;
  const int64_t size = plan.partial_size();
  const double per_sample = 1.0 / double(plan.samples());
  for (int c = int(threadIdx.x); c < C; c += kThreads) {
    double sum = 0;
#pragma unroll 8
    for (int g = 0; g < plan.groups; ++g)
      sum += double(__ldcg(sums + g * size + c)) - plan.group_samples(g) * double(__ldcg(shifts + g * size + c));
    const double mean = sum * per_sample;
    h.mean[c] = mean, h.shift[c] = float(-mean);
  }
  __syncthreads();
  for (int k = int(threadIdx.x); k < C * width / 4; k += kThreads) {
    const int i = k / (width / 4), j = k % (width / 4) * 4;
    double cov[4] = {};
#pragma unroll 4
    for (int g = 0; g < plan.groups; ++g) {
      const Quad gram = fresh_quad(h.partial + g * size + i * int64_t(width) + j);
      const Quad sum = fresh_quad(sums + g * size + j), shift = fresh_quad(shifts + g * size + j);
      const double sum_i = double(__ldcg(sums + g * size + i)), n = plan.group_samples(g);
      const double c_i = double(__ldcg(shifts + g * size + i)) + h.mean[i], rest = n * c_i - sum_i;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const double c_j = double(shift.v[e]) + (j + e < C ? h.mean[j + e] : 0.0);
        cov[e] += double(gram.v[e]) + c_j * rest - c_i * double(sum.v[e]);
      }
    }
    for (int e = 0; e < 4 && j + e < C; ++e) {
      h.square[int64_t(i) * C + j + e] = cov[e] * per_sample;
      if (h.gram) h.gram[int64_t(i) * C + j + e] = float(cov[e] * per_sample);
    }
  }
  __syncthreads();
}

// Reads an entry of W; rows past the last are those of the last, whose results nobody stores.
__device__ double pointwise_of(const Plan& plan, const Half& h, int co, int ci) {
  return double(get(h.pointwise, plan.type, int64_t(min(co, plan.C - 1)) * plan.C + ci));
}

// Makes mean and variance of four channels of W u: W mean(u), and a row of W cov(u) W^T. Everything is fp64 in
// registers; lane 0 stores the statistics, and __syncwarp orders that before the warp reads them back, rounded as
// backward and the running statistics will see them.
__device__ void fold_statistics(const Plan& plan, const Half& h, int first) {
  double mean[kRowsAtOnce] = {}, var[kRowsAtOnce] = {};
  for (int j = lane_index(); j < plan.C; j += 32) {
    double product[kRowsAtOnce] = {};
#pragma unroll 4
    for (int i = 0; i < plan.C; ++i) {
      const double cov = h.square[int64_t(i) * plan.C + j];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) product[r] += pointwise_of(plan, h, first + r, i) * cov;
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const double w = pointwise_of(plan, h, first + r, j);
      var[r] += product[r] * w, mean[r] += w * h.mean[j];
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    const double m = warp_total(mean[r]), v = warp_total(var[r]);
    if (lane_index() != 0 || first + r >= plan.C) continue;
    h.stats[first + r] = float(m), h.stats[plan.C + first + r] = stored_variance<float>(v);
  }
  __syncwarp();
}

// Makes A = scale r W, a warp per four rows of W. `gathered`: mean and variance come first, from mean(u) and cov(u).
__device__ void fold_rows(const Plan& plan, const Half& h, bool gathered) {
  const int C = plan.C, lane = lane_index();
  for (int first = kRowsAtOnce * warp_index(); first < C; first += kRowsAtOnce * kWarps) {
    if (gathered) fold_statistics(plan, h, first);
    for (int co = first; co < min(first + kRowsAtOnce, C); ++co) {
      const double rstd = batch_rstd(double(h.stats[C + co]), plan.eps);
      const double scale = h.final ? double(plan.w[h.weight]) : 1.0;
      for (int ci = lane; ci < C; ci += 32)
        h.fold[plan.at(ci, co)] = float(folded(scale, rstd, pointwise_of(plan, h, co, ci)));
      if (h.bias && lane == 0) h.bias[co] = float(-scale * rstd * double(h.stats[co]));
    }
  }
}

// Adds up P = mean(dy (u - mean u)^T) and mean(dy) of the groups.
__device__ void fold_cross_sums(const Plan& plan, const Half& h) {
  const int C = plan.C, width = plan.width;
  const int64_t size = plan.partial_size();
  const double per_sample = 1.0 / double(plan.samples());
  for (int k = int(threadIdx.x); k < C * width / 4; k += kThreads) {
    const int i = k / (width / 4), j = k % (width / 4) * 4;
    double sum[4] = {};
#pragma unroll 8
    for (int g = 0; g < plan.groups; ++g) {
      const Quad quad = fresh_quad(h.partial + g * size + i * int64_t(width) + j);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += double(quad.v[e]);
    }
    for (int e = 0; e < 4 && j + e < C; ++e) h.square[int64_t(i) * C + j + e] = sum[e] * per_sample;
  }
  for (int c = int(threadIdx.x); c < C; c += kThreads) {
    double sum = 0;
#pragma unroll 8
    for (int g = 0; g < plan.groups; ++g) sum += double(__ldcg(h.partial + g * size + plan.matrix_size() + c));
    h.dy_mean[c] = sum * per_sample;
  }
  __syncthreads();
}

// Makes dL/dW = w M r (P - q r W S) for four rows of W, S = cov(u).
__device__ void fold_pointwise_gradient(const Plan& plan, const Half& h, int first,
                                        const double (&scale_rstd)[2][kRowsAtOnce], const double (&q)[kRowsAtOnce]) {
  const int C = plan.C;
  for (int ci = lane_index(); ci < C; ci += 32) {
    double ws[kRowsAtOnce] = {};
#pragma unroll 4
    for (int i = 0; i < C; ++i) {
      const double cov = double(h.gram[int64_t(i) * C + ci]);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) ws[r] += pointwise_of(plan, h, first + r, i) * cov;
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)
      if (first + r < C) {
        const int64_t at = int64_t(first + r) * C + ci;
        put(h.dW, plan.type, at, float(pointwise_gradient(scale_rstd[0][r], double(plan.samples()), scale_rstd[1][r],
                                                          q[r], h.square[at], ws[r])));
      }
  }
}

// Makes what dL/du and dL/dw are made of, a warp per four rows of W: q = r <W_co, P_co>, from_dy = w r W_co, and the
// factor w r^2 q with which the row enters B.
__device__ void fold_cross_rows(const Plan& plan, const Half& h) {
  const int C = plan.C, lane = lane_index();
  for (int first = kRowsAtOnce * warp_index(); first < C; first += kRowsAtOnce * kWarps) {
    double scale_rstd[2][kRowsAtOnce], q[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int co = min(first + r, C - 1);
      const double scale = h.final ? double(plan.w[h.weight]) : 1.0;
      const double rstd = batch_rstd(double(h.stats[C + co]), plan.eps);
      double sum = 0;
      for (int ci = lane; ci < C; ci += 32) {
        const double w = pointwise_of(plan, h, co, ci);
        sum += w * h.square[int64_t(co) * C + ci];
        h.from_dy[plan.at(co, ci)] = float(folded(scale, rstd, w));
      }
      q[r] = warp_total(sum) * rstd, scale_rstd[0][r] = scale, scale_rstd[1][r] = rstd;
      if (lane == 0 && first + r < C) h.q[co] = q[r], h.coefficient[co] = centring(scale, rstd, q[r]);
    }
    if (h.dW) fold_pointwise_gradient(plan, h, first, scale_rstd, q);
  }
  __syncthreads();
}

// Makes -B and the constant of dL/du, a warp per four rows, and dL/dw = M sum q.
//
// from_u = -B with B_ij = sum_co (w r^2 q)_co W_co,i W_co,j; du_bias = -A^T mean(dy), so that no kernel subtracts
// the mean of dy from dy.
__device__ void fold_centring(const Plan& plan, const Half& h) {
  const int C = plan.C, lane = lane_index();
  for (int first = kRowsAtOnce * warp_index(); first < C; first += kRowsAtOnce * kWarps) {
    for (int j = lane; j < C; j += 32) {
      double sum[kRowsAtOnce] = {};
#pragma unroll 4
      for (int co = 0; co < C; ++co) {
        const double w = h.coefficient[co] * pointwise_of(plan, h, co, j);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) sum[r] += w * pointwise_of(plan, h, co, min(first + r, C - 1));
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
        if (first + r < C) h.from_u[plan.at(first + r, j)] = float(-sum[r]);
    }
    for (int i = first; i < min(first + kRowsAtOnce, C); ++i) {
      double bias = 0;
      for (int co = lane; co < C; co += 32) bias -= double(h.from_dy[plan.at(co, i)]) * h.dy_mean[co];
      bias = warp_total(bias);
      if (lane == 0) h.du_bias[i] = float(bias);
    }
  }
  if (warp_index() != 0 || !h.final || !plan.dw) return;
  double q = 0;
  for (int co = lane; co < C; co += 32) q += h.q[co];
  q = warp_total(q);
  if (lane == 0) plan.dw[h.weight] = q * double(plan.samples());
}

__device__ void fold_cross(const Plan& plan, const Half& h) {
  fold_cross_sums(plan, h);
  fold_cross_rows(plan, h);
  fold_centring(plan, h);
}

// --- values ------------------------------------------------------------------------------------------------

// Adds `own` of all threads, in a tree that only the block size fixes; thread 0 gets the total. All threads call it.
template <class T, class Add> __device__ T block_total(T own, Add add) {
  SHARED(T, shared, kThreads);
  __syncthreads();
  shared[threadIdx.x] = own;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] = own = add(own, shared[threadIdx.x + half]);
  }
  return own;
}

// Makes the moments of a channel from the groups': of a value d away from its group's pivot they have sum d, sum d^2.
// About the whole mean, a group's squares are sum d^2 + 2 e sum d + n e^2, e = pivot - mean.
__device__ Moments channel_moments(const Plan& plan, const Value& value, int c) {
  const auto part = [&](int g, int k) { return __ldcg(value.parts + (int64_t(g) * 3 + k) * plan.C + c); };
  const double pixels = double(value.z.grid.pixels()), count = double(plan.images) * pixels, first = part(0, 0);
  double sum = 0, squares = 0;
#pragma unroll 4
  for (int g = 0; g < plan.groups; ++g) {
    const double n = double(plan.first_image(g + 1) - plan.first_image(g)) * pixels;
    sum += n * (part(g, 0) - first) + part(g, 1);
  }
  const double mean = first + sum / count;
#pragma unroll 4
  for (int g = 0; g < plan.groups; ++g) {
    const double n = double(plan.first_image(g + 1) - plan.first_image(g)) * pixels, e = part(g, 0) - mean;
    squares += part(g, 2) + e * (2 * part(g, 1) + n * e);
  }
  return {count, mean, clamp_variance(squares)};
}

// Holds moments where shared memory wants a type without initialisers.
struct PlainMoments { double count, mean, squares; };

// Makes a term's batch statistics, where they are gathered, its rstd, and the spread that noise is relative to. A
// thread has the channels c, c + 128, ...; in the spread of the whole tensor the channels of a normed term have mean 0
// and squares scaled by r^2.
__device__ void fold_plain(const Plan& plan, const Value& value, const Plain& n) {
  const int C = plan.C;
  Moments whole;  // of this thread's channels, as the term's output has them
  for (int c = int(threadIdx.x); c < C; c += kThreads) {
    Moments m;
    if (value.parts) m = channel_moments(plan, value, c);
    if (n.normed) {
      if (value.parts) n.stats[c] = float(m.mean), n.stats[C + c] = stored_variance<float>(m.squares / m.count);
      const double rstd = batch_rstd(double(n.stats[C + c]), plan.eps);
      n.rstd[c] = float(rstd);
      m.mean = 0, m.squares *= rstd * rstd;
    }
    whole = merge(whole, m);
  }
  if (!n.noisy || !is_relative(plan.form) || !value.parts) return;
  const auto merged = [](const PlainMoments& a, const PlainMoments& b) {
    const Moments m = merge({a.count, a.mean, a.squares}, {b.count, b.mean, b.squares});
    return PlainMoments{m.count, m.mean, m.squares};
  };
  const PlainMoments total = block_total(PlainMoments{whole.count, whole.mean, whole.squares}, merged);
  if (threadIdx.x == 0) plan.std[n.skip] = unbiased_std({total.count, total.mean, total.squares});
}

// Makes q and mean(dy) of each channel of a term, and its dL/dw over all of them, from the groups' sums over dy.
__device__ void fold_dots(const Plan& plan, const Plain& n) {
  const int C = plan.C;
  const double samples = double(plan.samples());
  double dw = 0;
  for (int c = int(threadIdx.x); c < C; c += kThreads) {
    double totals[3] = {};
#pragma unroll 4
    for (int g = 0; g < plan.groups; ++g)
      for (int k = 0; k < 3; ++k) totals[k] += __ldcg(n.dots + (int64_t(g) * 3 + k) * C + c);
    dw += totals[2];
    if (!n.normed) continue;
    const double rstd = batch_rstd(double(n.stats[C + c]), plan.eps), q = totals[0] * rstd / samples;
    n.rstd[c] = float(rstd), n.rstd_q[c] = float(rstd * q), n.dy_mean[c] = float(totals[1] / samples);
    dw += q * samples;
  }
  dw = block_total(dw, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0 && plan.dw) plan.dw[n.weight] = dw;
}

// Adds up dL/dW of a part of a strided skip: the rows of its own channels.
__device__ void fold_strided(const Plan& plan, const Value& value, int part) {
  const int C = plan.C, half = C / 2;
  const float* partial = value.partial + part * plan.groups * plan.partial_size();
  for (int i = int(threadIdx.x); i < half * C; i += kThreads) {
    const int64_t at = int64_t(part * half + i / C) * plan.width + i % C;
    double sum = 0;
#pragma unroll 8
    for (int g = 0; g < plan.groups; ++g) sum += double(__ldcg(partial + g * plan.partial_size() + at));
    put(value.dparams[part], plan.type, i, float(sum));
  }
}

}  // namespace
}  // namespace fastnas::cuda
