// Computes y = sum_k w_k v_k and its gradients on the CPU: tiles that stay in L1, terms read side by side. Compiled
// once per instruction set; FASTNAS_ISA names the namespace.
//
// The op waits for memory: forward reads K N and writes N elements, backward reads (K + 1) N and writes K N, and
// two cores need 5.2 ms for that traffic at 8 terms of 64x16x32x32 (the kernels take 5.1). So a tile is read once
// and used for everything: backward makes dw_k and dx_k in one pass over x_k and dy. Stores past the caches, which
// would save reading the lines of y and dx first, were slower here (benchmarks/NOTES.md).
#include "mixed_sum.h"

#include "../formulas/mixed_sum.h"
#include "tile.h"
#include "vector.h"

namespace fastnas::FASTNAS_ISA {
namespace {

// What lies 2 KiB ahead of each term is asked for a line at a time, and with intent to write where it will be
// written: the hardware alone keeps too few of so many streams in flight. 0.5, 1, 3 and 4 KiB ahead were no better.
// Beyond the end of an array the prefetch fetches what nobody needs, and never faults.
constexpr int kLineBytes = 64, kBytesAhead = 2048, kVectors = kLineBytes / kVectorBytes;
template <class A> constexpr int kLine = kVectors * kLanes<A>;
template <bool kWrite = false, class T> void prefetch_ahead(const T* here) {
  __builtin_prefetch(reinterpret_cast<const char*>(here) + kBytesAhead, kWrite);
}

// Makes acc = (first ? 0 : acc) + the sum of w x over up to kGroup terms, side by side. Eight streams
// of 2 KiB fit L1 beside the tile; acc is read and written once for all of them. Terms are added in
// their order, element by element.
constexpr int kGroup = 8;
template <class T, class A>
void add_terms(int terms, const T* const* x, const A* w, bool first, int64_t count, A* acc) {
  int64_t i = 0;
  for (; i + kLine<A> <= count; i += kLine<A>) {
    Vec<A> sum[kVectors] = {};
    for (int j = 0; j < kVectors && !first; ++j) sum[j] = load_vector<A, A>(acc + i + j * kLanes<A>);
    for (int k = 0; k < terms; ++k) {
      prefetch_ahead(x[k] + i);
      for (int j = 0; j < kVectors; ++j) sum[j] += w[k] * load_vector<T, A>(x[k] + i + j * kLanes<A>);
    }
    for (int j = 0; j < kVectors; ++j) store_vector<A, A>(acc + i + j * kLanes<A>, sum[j]);
  }
  for (; i < count; ++i) {
    A sum = first ? A(0) : acc[i];
    for (int k = 0; k < terms; ++k) sum += w[k] * load(x[k][i]);
    acc[i] = sum;
  }
}

// Sums one tile of all terms. Terms without noise wait until kGroup of them are there; noisy ones come
// after them, one at a time, because each needs its tile of draws. For 16-bit dtypes the sum stays in
// fp32 until all terms are in it.
template <class T, class A>
void fwd_tile(const MixedSumParams& p, int64_t begin, int64_t count) {
  alignas(64) A sum[kTile], scratch[kTile], v[kTile], d[kTile];
  const A* w = static_cast<const A*>(p.w);
  T* y = static_cast<T*>(p.y) + begin;
  A* acc = sum;
  if constexpr (std::is_same_v<T, A>) acc = y;

  const T* clean[kGroup];
  A clean_w[kGroup];
  int waiting = 0;
  bool first = true;
  const auto add_waiting = [&] {
    add_terms(waiting, clean, clean_w, first, count, acc);
    waiting = 0, first = false;
  };
  for (int k = 0; k < p.terms; ++k) {
    if (p.ordinal[k] >= 0) continue;
    clean[waiting] = static_cast<const T*>(p.x[k]) + begin;
    clean_w[waiting++] = w[k];
    if (waiting == kGroup) add_waiting();
  }
  if (waiting || first) add_waiting();
  for (int k = 0; k < p.terms; ++k) {
    if (p.ordinal[k] < 0) continue;
    draw_tile(p, p.ordinal[k], begin, count, d);
    apply_draw(is_multiplicative(p.form), load_tile<T, A>(p.x[k], begin, count, scratch), d, count, v);
    const A* const noisy = v;
    add_terms(1, &noisy, w + k, false, count, acc);
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

// Handles the common case of backward, dw and dx of a term without noise, in one pass: dy comes from L1, x and dx
// are asked for ahead. The lanes' partial dots are added once a tile.
template <class T, class A>
A dot_and_store_scaled(A w, const A* dy, const T* x, int64_t count, T* dx) {
  Vec<A> lanes{};
  int64_t i = 0;
  for (; i + kLine<A> <= count; i += kLine<A>) {
    prefetch_ahead(x + i);
    prefetch_ahead<true>(dx + i);
    for (int j = 0; j < kLine<A>; j += kLanes<A>) {
      const Vec<A> g = load_vector<A, A>(dy + i + j);
      lanes += g * load_vector<T, A>(x + i + j);
      store_vector<T, A>(dx + i + j, w * g);
    }
  }
  A sum = sum_lanes<A>(lanes);
  for (; i < count; ++i) {
    sum += dy[i] * load(x[i]);
    dx[i] = store<T>(mixed_dx(w, dy[i]));
  }
  return sum;
}

// Computes one tile of every gradient; dw[k] is the block's partial sum. The noise is drawn again where dw needs v,
// or where it scales dx (multiplicative noise); additive noise does not touch dx.
template <class T, class A>
void bwd_tile(const MixedSumParams& p, int64_t begin, int64_t count, double* dw) {
  alignas(64) A dy_scratch[kTile], x_scratch[kTile], v_scratch[kTile], d[kTile], scaled[kTile];
  const A* w = static_cast<const A*>(p.w);
  const A* dy = load_tile<T, A>(p.dy, begin, count, dy_scratch);
  const bool multiplicative = is_multiplicative(p.form);

  for (int k = 0; k < p.terms; ++k) {
    T* dx = p.dx[k] ? static_cast<T*>(p.dx[k]) + begin : nullptr;
    const bool noisy = p.ordinal[k] >= 0;
    if (p.dw && dx && !noisy) {
      dw[k] += dot_and_store_scaled(w[k], dy, static_cast<const T*>(p.x[k]) + begin, count, dx);
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
    if (!dx) continue;
    const A* into = dy;
    if (noisy && multiplicative) {
      apply_draw(true, dy, d, count, scaled);
      into = scaled;
    }
    store_scaled(w[k], into, count, dx);
  }
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
  Partials partials(p.dw ? blocks * p.terms : 0);
  for_each_tile(p, [&](int64_t begin, int64_t count, int64_t block) {
    bwd_tile<T, A>(p, begin, count, p.dw ? partials.at(block * p.terms) : nullptr);
  });
  if (!p.dw) return;
  for (int k = 0; k < p.terms; ++k) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += *partials.at(b * p.terms + k);
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
