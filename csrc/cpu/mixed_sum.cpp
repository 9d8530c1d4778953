// y = sum_k w_k v_k and its gradients on the CPU: tiles that stay in L1, terms in groups of four.
// Compiled once per instruction set; FASTNAS_ISA names the namespace.
#include "mixed_sum.h"

#include "../formulas/mixed_sum.h"
#include "tile.h"
#include "vector.h"

namespace fastnas::FASTNAS_ISA {
namespace {

constexpr int kGroup = 4;
template <class A> constexpr int kLine = 64 / int(sizeof(A));

// The address of term k of this tile, or of the next; 0, near which a prefetch does nothing, where there is none.
template <class T, class Pointer>
uintptr_t ahead(const MixedSumParams& p, const Pointer* terms, int k, int64_t begin, bool next_tile) {
  if (next_tile) begin += kTile;
  if (k >= p.terms || !terms[k] || begin >= p.n) return 0;
  return reinterpret_cast<uintptr_t>(static_cast<const T*>(terms[k]) + begin);
}
template <class T, bool kWrite = false>
void prefetch_line(uintptr_t tile, int64_t element) {
  __builtin_prefetch(reinterpret_cast<const void*>(tile + element * sizeof(T)), kWrite);
}

// `next` is what the next group will read (or the next tile's first): asked for a line at a time while this one
// is summed, because the hardware alone keeps too few of so many streams in flight.
template <class T, class A>
void add_group(int size, const A* const* v, const A* w, bool first, int64_t count, A* acc,
               const uintptr_t* next) {
  const A *v0 = v[0], *v1 = v[size > 1], *v2 = v[size > 2 ? 2 : 0], *v3 = v[size > 3 ? 3 : 0];
  const A w0 = w[0], w1 = w[size > 1], w2 = w[size > 2 ? 2 : 0], w3 = w[size > 3 ? 3 : 0];
  // A missing term is left out, not given weight 0, which would turn its inf into NaN.
  const auto run = [&](auto value) {
    const auto add = [&](int64_t i) { acc[i] = first ? value(i) : acc[i] + value(i); };
    int64_t line = 0;
    for (; line + kLine<A> <= count; line += kLine<A>) {
      for (int j = 0; j < kGroup; ++j) prefetch_line<T>(next[j], line);
#pragma omp simd
      for (int i = 0; i < kLine<A>; ++i) add(line + i);
    }
    for (; line < count; ++line) add(line);
  };
  if (size == 4) run([=](int64_t i) { return (w0 * v0[i] + w1 * v1[i]) + (w2 * v2[i] + w3 * v3[i]); });
  if (size == 3) run([=](int64_t i) { return (w0 * v0[i] + w1 * v1[i]) + w2 * v2[i]; });
  if (size == 2) run([=](int64_t i) { return w0 * v0[i] + w1 * v1[i]; });
  if (size == 1) run([=](int64_t i) { return w0 * v0[i]; });
}

template <class T, class A>
void fwd_tile(const MixedSumParams& p, int64_t begin, int64_t count) {
  alignas(64) A sum[kTile], scratch[kGroup][kTile], d[kTile];
  const A* w = static_cast<const A*>(p.w);
  T* y = static_cast<T*>(p.y) + begin;
  A* acc = sum;
  if constexpr (std::is_same_v<T, A>) acc = y;

  for (int k = 0; k < p.terms; k += kGroup) {
    const int size = p.terms - k < kGroup ? p.terms - k : kGroup;
    const bool last = k + kGroup >= p.terms;
    const A* v[kGroup] = {};
    uintptr_t next[kGroup];
    for (int j = 0; j < kGroup; ++j) next[j] = ahead<T>(p, p.x, last ? j : k + kGroup + j, begin, last);
    for (int j = 0; j < size; ++j) {
      v[j] = load_tile<T, A>(p.x[k + j], begin, count, scratch[j]);
      if (p.ordinal[k + j] < 0) continue;
      draw_tile(p, p.ordinal[k + j], begin, count, d);
      apply_draw(is_multiplicative(p.form), v[j], d, count, scratch[j]);
      v[j] = scratch[j];
    }
    add_group<T>(size, v, w + k, k == 0, count, acc, next);
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

// As in add_group, lines of what follows: of x to read, of dx to write; in the narrow dtypes conversion is the cost.
template <class T, class A>
A dot_and_store_scaled(A w, const A* dy, const A* v, int64_t count, T* dx, uintptr_t next_x, uintptr_t next_dx) {
  A sum = 0;
  int64_t line = 0;
  if constexpr (std::is_same_v<T, A>) {
    Vec<A> lanes{};
    for (; line + kLanes<A> <= count; line += kLanes<A>) {
      prefetch_line<T>(next_x, line);
      prefetch_line<T, true>(next_dx, line);
      const Vec<A> g = load_lanes<A, A>(dy + line, kLanes<A>);
      lanes += g * load_lanes<A, A>(v + line, kLanes<A>);
      store_lanes<A, A>(dx + line, w * g, kLanes<A>);
    }
    sum = sum_lanes<A>(lanes);
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = line; i < count; ++i) {
    sum += dy[i] * v[i];
    dx[i] = store<T>(mixed_dx(w, dy[i]));
  }
  return sum;
}

template <class T, class A>
void bwd_tile(const MixedSumParams& p, int64_t begin, int64_t count, double* dw) {
  alignas(64) A dy_scratch[kTile], x_scratch[kTile], v_scratch[kTile], d[kTile], scaled[kTile];
  const A* w = static_cast<const A*>(p.w);
  const A* dy = load_tile<T, A>(p.dy, begin, count, dy_scratch);
  const bool multiplicative = is_multiplicative(p.form);

  for (int k = 0; k < p.terms; ++k) {
    T* dx = p.dx[k] ? static_cast<T*>(p.dx[k]) + begin : nullptr;
    const bool noisy = p.ordinal[k] >= 0;
    const A* v = nullptr;
    if (noisy && (p.dw || (dx && multiplicative))) draw_tile(p, p.ordinal[k], begin, count, d);
    if (p.dw) {
      v = load_tile<T, A>(p.x[k], begin, count, x_scratch);
      if (noisy) {
        apply_draw(multiplicative, v, d, count, v_scratch);
        v = v_scratch;
      }
    }
    const A* into = dy;
    if (dx && noisy && multiplicative) {
      apply_draw(true, dy, d, count, scaled);
      into = scaled;
    }
    if (v && dx && into == dy) {
      const bool last = k + 1 == p.terms;
      const int next = last ? 0 : k + 1;
      dw[k] += dot_and_store_scaled(w[k], dy, v, count, dx, ahead<T>(p, p.x, next, begin, last),
                                    ahead<T>(p, p.dx, next, begin, last));
      continue;
    }
    if (v) dw[k] += dot(dy, v, count);
    if (dx) store_scaled(w[k], into, count, dx);
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
