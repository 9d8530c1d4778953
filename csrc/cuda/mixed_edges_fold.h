// Folds the sums of a job, when they are merged: what its last block does, and what the launch waits for. So no loop
// here waits for one load at a time, and what takes a division or a root takes it for several channels at once, a lane
// each.
#pragma once

#include "mixed_edges_merge.h"

namespace fastnas::cuda {
namespace {

constexpr int kRowsAtOnce = 4;  // rows of W that a warp folds together: it reads other matrices a quarter as often
constexpr int kColsAtOnce = 2;  // columns that a lane has of them, 32 apart
constexpr int kDepth = 32;      // of what a warp stages of four rows
constexpr int kChain = 8;       // products that are added in fp32 before fp64 takes the sum
constexpr int kFoldFloats = kWarps * kRowsAtOnce * kDepth;  // of shared memory that a fold takes

// Finds W as floats, which the first fold of a half copies where the call's are of 16 bits: it is read C times.
__device__ const float* floats_of_weights(const Plan& plan, const Half& h) {
  return plan.type == DType::f32 ? static_cast<const float*>(h.pointwise) : h.weights;
}
__device__ const float* weights_of(const Plan& plan, const Half& h) {
#pragma unroll 4
  for (int i = int(threadIdx.x); h.weights && i < plan.C * plan.C; i += kThreads)
    h.weights[i] = get(h.pointwise, plan.type, i);
  __syncthreads();
  return floats_of_weights(plan, h);
}

// Finds what the output of a half's batch norm is multiplied by.
__device__ double scale_of(const Plan& plan, const Half& h) { return h.final ? double(plan.w[h.weight]) : 1.0; }

// Sums of four rows by two columns that a lane has of a product of [C][C] matrices.
using RowSums = double[kRowsAtOnce][kColsAtOnce];

// Computes sum_i left(r, i) right(i, j) for the rows of a warp and the columns j = col, col + 32 of a lane; `right`
// lies in memory, rows `pitch` apart. Both sides are floats that were rounded before; eight products are added in fp32,
// which rounds less than that did, as one FFMA takes a fourth of the time of a conversion and a DFMA. All loads of 32
// rows of `right` are in flight together, and the warp's part of `scratch` gives all lanes the left side by loads of 16
// bytes.
template <class Left>
__device__ __forceinline__ void multiply_rows(int C, float* scratch, Left left, const float* right, int pitch, int col,
                                              RowSums& sum) {
  float* const staged = scratch + warp_index() * kRowsAtOnce * kDepth;
  const int cols[kColsAtOnce] = {min(col, C - 1), min(col + 32, C - 1)};
#pragma unroll 1
  for (int base = 0; base < C; base += kDepth) {
    const int own = base + lane_index();
    Quad rows{};
    float m[kDepth][kColsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)
      if (own < C) rows.v[r] = left(r, own);
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int q = 0; q < kColsAtOnce; ++q) m[k][q] = base + k < C ? right[(base + k) * pitch + cols[q]] : 0.0f;
    __syncwarp();
    store_quad(staged + lane_index() * kRowsAtOnce, rows);
    __syncwarp();
#pragma unroll
    for (int first = 0; first < kDepth; first += kChain) {
      if (base + first >= C) break;
      float chain[kRowsAtOnce][kColsAtOnce] = {};
#pragma unroll
      for (int k = first; k < first + kChain; ++k) {
        const Quad l = quad_at(staged + k * kRowsAtOnce);
#pragma unroll
        for (int q = 0; q < kColsAtOnce; ++q)
#pragma unroll
          for (int r = 0; r < kRowsAtOnce; ++r) chain[r][q] += l.v[r] * m[k][q];
      }
#pragma unroll
      for (int q = 0; q < kColsAtOnce; ++q)
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) sum[r][q] += double(chain[r][q]);
    }
  }
}

// Picks the value of a lane's row, lane r that of row r.
template <int N> __device__ double of_own_row(const double (&rows)[N]) {
  double own = rows[0];
#pragma unroll
  for (int r = 1; r < N; ++r)
    if (lane_index() % N == r) own = rows[r];
  return own;
}

// --- Gram matrices -----------------------------------------------------------------------------------------

// Makes mean(u), minus mean(u) and, where backward wants it, cov(u) from the merged sums.
__device__ void fold_gram(const Plan& plan, const Half& h) {
  const int C = plan.C;
  const float *gram = h.partial, *sums = gram + plan.matrix_size(), *shifts = sums + plan.width;
  const double per_sample = 1.0 / double(plan.samples());
  for (int c = int(threadIdx.x); c < C; c += kThreads) {
    const double mean = double(sums[c]) * per_sample - double(shifts[c]);
    h.mean[c] = mean, h.shift[c] = float(-mean);
  }
  const MatrixQuads own(plan.width);
  for (int j = own.col; h.gram && j < C; j += own.cols_on) {
    const Quad others = quad_at(sums + j);
#pragma unroll 2
    for (int i = own.row; i < C; i += own.rows_on) {
      Quad cov = quad_at(gram + i * plan.width + j);
      const double mean = double(sums[i]) * per_sample;
#pragma unroll
      for (int k = 0; k < 4; ++k) cov.v[k] = float((double(cov.v[k]) - mean * double(others.v[k])) * per_sample);
      if (C == plan.width) {
        store_quad(h.gram + i * C + j, cov);
      } else {
        for (int k = 0; k < 4 && j + k < C; ++k) h.gram[i * C + j + k] = cov.v[k];
      }
    }
  }
  __syncthreads();
}

// Makes mean and variance of four channels of W u: W mean(u), and of W cov(u) W^T the diagonal. Lane r stores those of
// row r and returns the variance, rounded as backward and the running statistics will see it.
__device__ float fold_statistics(const Plan& plan, const Half& h, const float* weights, int first, float* scratch) {
  const int C = plan.C;
  const float* const sums = h.partial + plan.matrix_size();
  const double per_sample = 1.0 / double(plan.samples());
  const auto weight = [&](int r, int i) { return weights[min(first + r, C - 1) * C + i]; };
  double mean[kRowsAtOnce] = {}, var[kRowsAtOnce] = {}, rest[kRowsAtOnce] = {};
  for (int col = lane_index(); col - lane_index() < C; col += 32 * kColsAtOnce) {
    RowSums product = {};
    multiply_rows(C, scratch, weight, h.partial, plan.width, col, product);
#pragma unroll
    for (int q = 0; q < kColsAtOnce; ++q) {
      const int j = col + 32 * q;
      if (j >= C) continue;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const double w = double(weight(r, j));
        var[r] += product[r][q] * w, mean[r] += w * h.mean[j], rest[r] += w * double(sums[j]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r)
    mean[r] = warp_total(mean[r]), var[r] = warp_total(var[r]), rest[r] = warp_total(rest[r]);
  const double own_rest = of_own_row(rest);
  const float own_mean = float(of_own_row(mean));
  const float own_var = stored_variance<float>((of_own_row(var) - own_rest * own_rest * per_sample) * per_sample);
  const int co = first + lane_index();
  if (lane_index() < kRowsAtOnce && co < C) h.stats[co] = own_mean, h.stats[C + co] = own_var;
  return own_var;
}

// Makes A = scale r W, a warp per four rows of W. `gathered`: mean and variance come first, from mean(u) and cov(u).
__device__ void fold_rows(const Plan& plan, const Half& h, bool gathered, float* scratch) {
  const int C = plan.C, lane = lane_index();
  const float* const weights = weights_of(plan, h);
  const double scale = scale_of(plan, h);
  for (int first = kRowsAtOnce * warp_index(); first < C; first += kRowsAtOnce * kWarps) {
    const int own = min(first + lane % kRowsAtOnce, C - 1);
    const float var = gathered ? fold_statistics(plan, h, weights, first, scratch) : h.stats[C + own];
    const double own_rstd = batch_rstd(double(var), plan.eps);
    if (h.bias && lane < kRowsAtOnce && first + lane < C)
      h.bias[own] = float(-scale * own_rstd * double(h.stats[own]));
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const double rstd = __shfl_sync(0xffffffffu, own_rstd, r);
      const int co = first + r;
      for (int ci = lane; co < C && ci < C; ci += 32)
        h.fold[plan.at(ci, co)] = float(folded(scale, rstd, double(weights[co * C + ci])));
    }
  }
}

// --- cross matrices ----------------------------------------------------------------------------------------

constexpr int kCrossRows = 8;  // that a warp makes q of at once

// Makes q = r <W_co, P_co> of a warp's rows of W, and what depends on a row alone: from_dy = w r W_co, and the factor
// w r^2 q with which the row enters B. P = mean(dy (u - mean u)^T) is the merged sum by the count.
__device__ void fold_cross_rows(const Plan& plan, const Half& h, const float* weights, int first, double scale) {
  const int C = plan.C, lane = lane_index(), own = min(first + lane % kCrossRows, C - 1);
  const double own_rstd = batch_rstd(double(h.stats[C + own]), plan.eps), per_sample = 1.0 / double(plan.samples());
  double rstd[kCrossRows], q[kCrossRows] = {};
#pragma unroll
  for (int r = 0; r < kCrossRows; ++r) rstd[r] = __shfl_sync(0xffffffffu, own_rstd, r);
#pragma unroll 2
  for (int ci = lane; ci < C; ci += 32)
#pragma unroll
    for (int r = 0; r < kCrossRows; ++r) {
      const int co = min(first + r, C - 1);
      const double w = double(weights[co * C + ci]);
      q[r] += w * double(h.partial[co * plan.width + ci]);
      h.from_dy[plan.at(co, ci)] = float(folded(scale, rstd[r], w));
    }
#pragma unroll
  for (int r = 0; r < kCrossRows; ++r) q[r] = warp_total(q[r]);
  const double own_q = of_own_row(q) * per_sample * own_rstd;
  if (lane < kCrossRows && first + lane < C) h.q[own] = own_q, h.coefficient[own] = centring(scale, own_rstd, own_q);
}

// Makes dL/dW = w M r (P - q r W S), S = cov(u), of a warp's four rows of W. Nothing of backward waits for it, so the
// last kernel does it, beside others, and not the block that all others wait for.
__device__ void fold_pointwise_gradient(const Plan& plan, const Half& h, int first, float* scratch) {
  const int C = plan.C, own = min(first + lane_index() % kRowsAtOnce, C - 1);
  const float* const weights = floats_of_weights(plan, h);
  const double scale = scale_of(plan, h), samples = double(plan.samples()), per_sample = 1.0 / samples;
  const double own_rstd = batch_rstd(double(h.stats[C + own]), plan.eps), own_q = h.q[own];
  const auto weight = [&](int r, int i) { return weights[min(first + r, C - 1) * C + i]; };
  for (int col = lane_index(); col - lane_index() < C; col += 32 * kColsAtOnce) {
    RowSums ws = {};
    multiply_rows(C, scratch, weight, h.gram, C, col, ws);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const double rstd = __shfl_sync(0xffffffffu, own_rstd, r), q = __shfl_sync(0xffffffffu, own_q, r);
#pragma unroll
      for (int k = 0; k < kColsAtOnce; ++k) {
        const int co = first + r, ci = col + 32 * k;
        if (co >= C || ci >= C) continue;
        const double p = double(h.partial[co * plan.width + ci]) * per_sample;
        put(h.dW, plan.type, int64_t(co) * C + ci,
            float(pointwise_gradient(scale, samples, rstd, q, p, ws[r][k])));
      }
    }
  }
}

// Makes dL/dw of the term from q of its channels, which is by the `unit` of it.
__device__ void fold_weight(const Plan& plan, const Half& h, double unit) {
  if (warp_index() != 0 || !h.final || !plan.dw) return;
  double q = 0;
  for (int co = lane_index(); co < plan.C; co += 32) q += h.q[co];
  q = warp_total(q);
  if (lane_index() == 0) plan.dw[h.weight] = q * unit;
}

// Makes -B and the constant of dL/du, a warp per four rows, and dL/dw = M sum q.
//
// from_u = -B with B_ij = sum_co (w r^2 q)_co W_co,i W_co,j; du_bias = -A^T mean(dy), so that no kernel subtracts
// the mean of dy from dy.
__device__ void fold_centring(const Plan& plan, const Half& h, const float* weights, float* scratch) {
  const int C = plan.C, lane = lane_index();
  const float* const dy_sums = h.partial + plan.matrix_size();
  const double per_sample = 1.0 / double(plan.samples());
  for (int first = kRowsAtOnce * warp_index(); first < C; first += kRowsAtOnce * kWarps) {
    for (int col = lane; col - lane < C; col += 32 * kColsAtOnce) {
      RowSums sum = {};
      const auto left = [&](int r, int co) {
        return float(h.coefficient[co] * double(weights[co * C + min(first + r, C - 1)]));
      };
      multiply_rows(C, scratch, left, weights, C, col, sum);
#pragma unroll
      for (int q = 0; q < kColsAtOnce; ++q)
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r)
          if (first + r < C && col + 32 * q < C) h.from_u[plan.at(first + r, col + 32 * q)] = float(-sum[r][q]);
    }
    double bias[kRowsAtOnce] = {};
    for (int co = lane; co < C; co += 32)
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
        bias[r] -= double(h.from_dy[plan.at(co, min(first + r, C - 1))]) * double(dy_sums[co]);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) bias[r] = warp_total(bias[r]) * per_sample;
    if (lane < kRowsAtOnce && first + lane < C) h.du_bias[first + lane] = float(of_own_row(bias));
  }
  fold_weight(plan, h, double(plan.samples()));
}

// Makes from_dy = w r W, dL/dW = w r sum dy u^T and dL/dw = <dy, r (W u - mean)> outside of training: a warp per row.
__device__ void fold_linear(const Plan& plan, const Half& h) {
  const int C = plan.C;
  const float *const weights = weights_of(plan, h), *const dy_sums = h.partial + plan.matrix_size();
  const double scale = scale_of(plan, h);
  for (int co = warp_index(); co < C; co += kWarps) {
    const double rstd = batch_rstd(double(h.stats[C + co]), plan.eps);
    double product = 0;
    for (int ci = lane_index(); ci < C; ci += 32) {
      const double w = double(weights[co * C + ci]), sum = double(h.partial[co * plan.width + ci]);
      product += w * sum;
      h.from_dy[plan.at(co, ci)] = float(folded(scale, rstd, w));
      if (h.dW) put(h.dW, plan.type, int64_t(co) * C + ci, float(scale * rstd * sum));
    }
    product = warp_total(product);
    if (lane_index() == 0) h.q[co] = rstd * (product - double(h.stats[co]) * double(dy_sums[co]));
  }
  __syncthreads();
  fold_weight(plan, h, 1.0);
}

__device__ void fold_cross(const Plan& plan, const Half& h, float* scratch) {
  const float* const weights = weights_of(plan, h);
  for (int first = kCrossRows * warp_index(); first < plan.C; first += kCrossRows * kWarps)
    fold_cross_rows(plan, h, weights, first, scale_of(plan, h));
  __syncthreads();
  fold_centring(plan, h, weights, scratch);
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

// Says how threads share the channels of a fold: neighbours have groups of one channel, a power of two of them, as many
// as there are threads for. With a thread a channel one of 16 channels would read all groups one after the other.
struct Sharing {
  int lanes;
  __device__ explicit Sharing(int C) : lanes(1) {
    while (lanes < 32 && 2 * lanes * C <= kThreads) lanes *= 2;
  }
  __device__ int lane() const { return int(threadIdx.x) & (lanes - 1); }
  __device__ int channel() const { return int(threadIdx.x) / lanes; }
  __device__ int step() const { return kThreads / lanes; }
  // Adds up over the lanes of a channel, by a butterfly whose order is fixed. Whole warps call it.
  __device__ double total(double v) const {
    for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
  }
};

// Makes the moments of a channel from the groups': of a value d away from its group's pivot they have sum d, sum d^2.
// About the whole mean, a group's squares are sum d^2 + 2 e sum d + n e^2, e = pivot - mean.
__device__ Moments channel_moments(const Plan& plan, const Value& value, const Sharing& sharing, int c) {
  const auto part = [&](int g, int k) { return __ldcg(value.parts + (int64_t(g) * 3 + k) * plan.C + c); };
  const double pixels = double(value.z.grid.pixels()), count = double(plan.images) * pixels, first = part(0, 0);
  double sum = 0, squares = 0;
#pragma unroll 8
  for (int g = sharing.lane(); g < plan.groups; g += sharing.lanes) {
    const double n = double(plan.first_image(g + 1) - plan.first_image(g)) * pixels;
    sum += n * (part(g, 0) - first) + part(g, 1);
  }
  const double mean = first + sharing.total(sum) / count;
#pragma unroll 8
  for (int g = sharing.lane(); g < plan.groups; g += sharing.lanes) {
    const double n = double(plan.first_image(g + 1) - plan.first_image(g)) * pixels, e = part(g, 0) - mean;
    squares += part(g, 2) + e * (2 * part(g, 1) + n * e);
  }
  return {count, mean, clamp_variance(sharing.total(squares))};
}

// Holds moments where shared memory wants a type without initialisers.
struct PlainMoments { double count, mean, squares; };

// Makes a term's batch statistics, where they are gathered, its rstd, and the spread that noise is relative to. In the
// spread of the whole tensor the channels of a normed term have mean 0 and squares scaled by r^2.
__device__ void fold_plain(const Plan& plan, const Value& value, const Plain& n) {
  const int C = plan.C;
  const Sharing sharing(C);
  Moments whole;  // of this thread's channels, as the term's output has them
  for (int base = 0; base < C; base += sharing.step()) {
    const int c = base + sharing.channel();
    Moments m;
    if (value.parts) m = channel_moments(plan, value, sharing, min(c, C - 1));
    if (sharing.lane() != 0 || c >= C) continue;
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
  const Sharing sharing(C);
  double dw = 0;
  for (int base = 0; base < C; base += sharing.step()) {
    const int c = base + sharing.channel();
    double totals[3] = {};
#pragma unroll 8
    for (int g = sharing.lane(); g < plan.groups; g += sharing.lanes)
#pragma unroll
      for (int k = 0; k < 3; ++k) totals[k] += __ldcg(n.dots + (int64_t(g) * 3 + k) * C + min(c, C - 1));
#pragma unroll
    for (int k = 0; k < 3; ++k) totals[k] = sharing.total(totals[k]);
    if (sharing.lane() != 0 || c >= C) continue;
    dw += totals[2];
    if (!n.normed) continue;
    const double rstd = batch_rstd(double(n.stats[C + c]), plan.eps), q = totals[0] * rstd / samples;
    n.rstd[c] = float(rstd), n.rstd_q[c] = float(rstd * q), n.dy_mean[c] = float(totals[1] / samples);
    dw += q * samples;
  }
  dw = block_total(dw, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0 && plan.dw) plan.dw[n.weight] = dw;
}

// Writes dL/dW of a part of a strided skip, the rows of its own channels of a merged sum.
__device__ void fold_strided(const Plan& plan, const Value& value, int part, const float* sum) {
  const int half = plan.C / 2;
  for (int i = int(threadIdx.x); i < half * plan.C; i += kThreads)
    put(value.dparams[part], plan.type, i, sum[int64_t(part * half + i / plan.C) * plan.width + i % plan.C]);
}

}  // namespace
}  // namespace fastnas::cuda
