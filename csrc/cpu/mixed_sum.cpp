// y = sum_k w_k v_k and its gradients on the CPU: tiles that stay in L1, several terms read side by side.
// Compiled once per instruction set; FASTNAS_ISA names the namespace.
#include "mixed_sum.h"

#include "../formulas/mixed_sum.h"
#include "tile.h"
#include "vector.h"

namespace fastnas::FASTNAS_ISA {
namespace {

// Terms side by side, and what lies ahead of each asked for: memory answers many open pages sooner than one after
// another. 8 terms x 2 KiB fit L1 beside the tile; what is converted first takes 4 KiB a term there.
template <class T, class A> constexpr int kReadTogether = std::is_same_v<T, A> ? 8 : 4;
constexpr int kWrittenTogether = 2;
constexpr int kBytesAhead = 2048, kLineBytes = 64;
template <class A> constexpr int kStep = 2 * kLanes<A>;

// The lines of a step, kBytesAhead from here. Beyond the end of an array a prefetch does nothing.
template <bool kWrite = false, class A>
void prefetch_step(const A* here) {
  for (int byte = 0; byte < 2 * kVectorBytes; byte += kLineBytes)
    __builtin_prefetch(reinterpret_cast<const char*>(here) + kBytesAhead + byte, kWrite);
}

// acc = (first ? 0 : acc) + sum of w v. A missing term is left out, not given weight 0: its inf would become NaN.
template <class A>
void add_terms(int terms, const A* const* v, const A* w, bool first, int64_t count, A* acc) {
  int64_t i = 0;
  for (; i + kStep<A> <= count; i += kStep<A>) {
    Vec<A> low{}, high{};
    if (!first) low = load_lanes<A, A>(acc + i, kLanes<A>), high = load_lanes<A, A>(acc + i + kLanes<A>, kLanes<A>);
    for (int k = 0; k < terms; ++k) {
      prefetch_step(v[k] + i);
      low += w[k] * load_lanes<A, A>(v[k] + i, kLanes<A>);
      high += w[k] * load_lanes<A, A>(v[k] + i + kLanes<A>, kLanes<A>);
    }
    store_lanes<A, A>(acc + i, low, kLanes<A>);
    store_lanes<A, A>(acc + i + kLanes<A>, high, kLanes<A>);
  }
  for (; i < count; ++i) {
    A sum = first ? A(0) : acc[i];
    for (int k = 0; k < terms; ++k) sum += w[k] * v[k][i];
    acc[i] = sum;
  }
}

template <class T, class A>
void fwd_tile(const MixedSumParams& p, int64_t begin, int64_t count) {
  constexpr int kGroup = kReadTogether<T, A>;
  alignas(64) A sum[kTile], scratch[kGroup][kTile], d[kTile];
  const A* w = static_cast<const A*>(p.w);
  T* y = static_cast<T*>(p.y) + begin;
  A* acc = sum;
  if constexpr (std::is_same_v<T, A>) acc = y;

  for (int k = 0; k < p.terms; k += kGroup) {
    const int size = p.terms - k < kGroup ? p.terms - k : kGroup;
    const A* v[kGroup];
    for (int j = 0; j < size; ++j) {
      v[j] = load_tile<T, A>(p.x[k + j], begin, count, scratch[j]);
      if (p.ordinal[k + j] < 0) continue;
      draw_tile(p, p.ordinal[k + j], begin, count, d);
      apply_draw(is_multiplicative(p.form), v[j], d, count, scratch[j]);
      v[j] = scratch[j];
    }
    add_terms(size, v, w + k, k == 0, count, acc);
  }
  if constexpr (!std::is_same_v<T, A>)
    for (int64_t i = 0; i < count; ++i) y[i] = store<T>(sum[i]);
}

template <class A>
A dot(const A* dy, const A* v, int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += dy[i] * v[i];
  return sum;
}

template <class T, class A>
void store_scaled(A w, const A* dy, int64_t count, T* dx) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) dx[i] = store<T>(mixed_dx(w, dy[i]));
}

// dw and dx of the terms k[0 .. kTerms), which carry no noise.
template <int kTerms, class T, class A>
void dot_and_store_scaled(const MixedSumParams& p, const int* k, int64_t begin, int64_t count, const A* dy, double* dw) {
  const T* x[kTerms];
  T* dx[kTerms];
  A w[kTerms];
  Vec<A> low[kTerms] = {}, high[kTerms] = {};
  for (int j = 0; j < kTerms; ++j) {
    x[j] = static_cast<const T*>(p.x[k[j]]) + begin;
    dx[j] = static_cast<T*>(p.dx[k[j]]) + begin;
    w[j] = static_cast<const A*>(p.w)[k[j]];
  }
  int64_t done = 0;
  if constexpr (std::is_same_v<T, A>) {
    for (; done + kStep<A> <= count; done += kStep<A>) {
      const Vec<A> g = load_lanes<A, A>(dy + done, kLanes<A>), h = load_lanes<A, A>(dy + done + kLanes<A>, kLanes<A>);
      for (int j = 0; j < kTerms; ++j) {
        prefetch_step(x[j] + done);
        prefetch_step<true>(dx[j] + done);
        low[j] += g * load_lanes<A, A>(x[j] + done, kLanes<A>);
        high[j] += h * load_lanes<A, A>(x[j] + done + kLanes<A>, kLanes<A>);
        store_lanes<A, A>(dx[j] + done, w[j] * g, kLanes<A>);
        store_lanes<A, A>(dx[j] + done + kLanes<A>, w[j] * h, kLanes<A>);
      }
    }
  }
  for (int j = 0; j < kTerms; ++j) {
    const T* from = x[j];
    T* to = dx[j];
    const A scale = w[j];
    A sum = sum_lanes<A>(low[j] + high[j]);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = done; i < count; ++i) {
      sum += dy[i] * load(from[i]);
      to[i] = store<T>(mixed_dx(scale, dy[i]));
    }
    dw[k[j]] += sum;
  }
}

template <class T, class A>
void bwd_tile(const MixedSumParams& p, int64_t begin, int64_t count, double* dw) {
  alignas(64) A dy_scratch[kTile], x_scratch[kTile], v_scratch[kTile], d[kTile], scaled[kTile];
  const A* w = static_cast<const A*>(p.w);
  const A* dy = load_tile<T, A>(p.dy, begin, count, dy_scratch);
  const bool multiplicative = is_multiplicative(p.form);

  int waiting[kWrittenTogether], count_waiting = 0;
  for (int k = 0; k < p.terms; ++k) {
    T* dx = p.dx[k] ? static_cast<T*>(p.dx[k]) + begin : nullptr;
    const bool noisy = p.ordinal[k] >= 0;
    if (dx && p.dw && !noisy) {
      waiting[count_waiting++] = k;
      if (count_waiting < kWrittenTogether) continue;
      dot_and_store_scaled<kWrittenTogether, T>(p, waiting, begin, count, dy, dw);
      count_waiting = 0;
      continue;
    }
    if (noisy && (p.dw || (dx && multiplicative))) draw_tile(p, p.ordinal[k], begin, count, d);
    if (p.dw) {
      const A* v = load_tile<T, A>(p.x[k], begin, count, x_scratch);
      if (noisy) {
        apply_draw(multiplicative, v, d, count, v_scratch);
        v = v_scratch;
      }
      dw[k] += dot(dy, v, count);
    }
    const A* into = dy;
    if (dx && noisy && multiplicative) {
      apply_draw(true, dy, d, count, scaled);
      into = scaled;
    }
    if (dx) store_scaled(w[k], into, count, dx);
  }
  for (int j = 0; j < count_waiting; ++j) dot_and_store_scaled<1, T>(p, waiting + j, begin, count, dy, dw);
}

template <class T>
void fwd(const MixedSumParams& p) {
  using A = typename Accumulate<T>::type;
  if (is_relative(p.form)) standard_deviations<T, A>(p);
  for_each_tile(p, [&](int64_t begin, int64_t count, int64_t) { fwd_tile<T, A>(p, begin, count); });
}

template <class T>
void bwd(const MixedSumParams& p) {
  using A = typename Accumulate<T>::type;
  const int64_t blocks = block_count(p.n);
  if (p.dw)
    for (int64_t i = 0; i < blocks * p.terms; ++i) p.partial[i] = 0;
  for_each_tile(p, [&](int64_t begin, int64_t count, int64_t block) {
    bwd_tile<T, A>(p, begin, count, p.partial + block * p.terms);
  });
  if (!p.dw) return;
  for (int k = 0; k < p.terms; ++k) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += p.partial[b * p.terms + k];
    static_cast<A*>(p.dw)[k] = A(sum);
  }
}

}  // namespace

void mixed_sum_fwd(const MixedSumParams& p) {
  switch (p.dtype) {
    case DType::f32: return fwd<float>(p);
    case DType::bf16: return fwd<bf16_t>(p);
    case DType::f16: return fwd<f16_t>(p);
    case DType::f64: return fwd<double>(p);
  }
}

void mixed_sum_bwd(const MixedSumParams& p) {
  switch (p.dtype) {
    case DType::f32: return bwd<float>(p);
    case DType::bf16: return bwd<bf16_t>(p);
    case DType::f16: return bwd<f16_t>(p);
    case DType::f64: return bwd<double>(p);
  }
}

}  // namespace fastnas::FASTNAS_ISA
