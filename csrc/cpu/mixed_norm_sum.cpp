// Runs mixed_norm_sum on the CPU. Compiled once per instruction set; FASTNAS_ISA names the namespace.
//
// A batch norm's statistics stand between reading z_k and writing y, and its two sums between reading dy and
// writing dz_k. So forward takes two sweeps over all terms, the moments of z, then the mix; backward two, the sums
// over dy, then dz. Mean and variance are held, and nothing of the size of a term. Terms that need no sums (not
// normed, or with given statistics) get their dz in the first sweep. Sums are made by column of a tile in the
// accumulation dtype and go from tile to tile in fp64.
#include "mixed_norm_sum.h"

#include "../formulas/mixed_norm_sum.h"
#include "mixed_norm_sum_tiles.h"

namespace fastnas::FASTNAS_ISA {
namespace {

constexpr int kGroup = 4;  // terms that one pass adds: the sum is read and written once for four of them

// Holds what is known of one term: a view of the parameters for the channels of a tile, spread over its columns.
template <class A>
struct Term {
  A w;
  const A *mean, *var;
  A eps;

  Term(const MixedNormSumParams& p, int k, const Tile& t) : w(static_cast<const A*>(p.sum.w)[k]), eps(A(p.eps)) {
    const bool normed = p.norm[k] >= 0;
    const int64_t at = p.norm[k] * p.channels + t.channel;
    mean = normed ? static_cast<const A*>(p.mean) + at : nullptr;
    var = normed ? static_cast<const A*>(p.var) + at : nullptr;
  }
  A r(int64_t c) const { return var ? reciprocal_std(var[c], eps) : A(1); }
  void means(const Tile& t, A* column) const {
    spread(t, column, [&](int64_t c) { return mean ? mean[c] : A(0); });
  }
  void scales(const Tile& t, A* column) const {
    spread(t, column, [&](int64_t c) { return w * r(c); });
  }
};

// Makes the draws of a row. Four come of a Philox block where memory is in logical order.
template <class A>
void draw_row(const MixedNormSumParams& p, int k, int64_t begin, int64_t count, A* d) {
  const int ordinal = p.sum.ordinal[k];
  if (p.sum.channels == 0) draw_range(Draw<A>(p.sum, ordinal), begin, count, d);
  else draw_tile(p.sum, ordinal, begin, count, d);
}

// Gathers moments of one tile of one term: the sum of each column, folded to channels, gives their means; a second
// pass over the tile, which is in L2 by now, adds squares and deviations from them. As in moments.h the deviations
// correct both, in fp64; the mean of one inf stays inf, where the correction would make it NaN.
template <class T, class A>
void moments(const MixedNormSumParams& p, const Tiling& g, const Tile& t, int k) {
  alignas(64) A sum[kColumns] = {}, mean[kColumns], squares[kColumns] = {}, deviations[kColumns] = {};
  alignas(64) A total[kColumns], total_deviations[kColumns];
  const T* z = static_cast<const T*>(p.sum.x[k]);
  int64_t elements = 0;
  g.for_each_row(t, [&](int64_t, int64_t begin, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) sum[i] += load(z[begin + i]);
    elements += width;
  });
  const double count = double(elements / t.channels);
  fold(t, sum, total);
  spread(t, mean, [&](int64_t c) { return total[c] /= A(count); });
  g.for_each_row(t, [&](int64_t, int64_t begin, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A delta = load(z[begin + i]) - mean[i];
      squares[i] += delta * delta;
      deviations[i] += delta;
    }
  });
  fold(t, squares, sum);
  fold(t, deviations, total_deviations);
  double* part = p.partial + 3 * ((p.norm[k] * g.parts + t.part) * g.channels + t.channel);
  for (int64_t c = 0; c < t.channels; ++c, part += 3) {
    const double correction = double(total_deviations[c]) / count;  // NaN where the mean is inf
    part[0] = count;
    part[1] = double(total[c]) + (std::isfinite(correction) ? correction : 0);
    part[2] = clamp_variance(double(sum[c]) - double(total_deviations[c]) * correction);
  }
}

// Makes mean and biased variance of every channel out of its parts, in their order: first the mean, then the
// squares about it (Chan, Golub, LeVeque), in fp64.
template <class A>
void statistics(const MixedNormSumParams& p, const Tiling& g) {
  const double count = double(g.per_channel());
  for (int64_t i = 0; i < p.norms * g.channels; ++i) {
    const double* first = p.partial + 3 * (i / g.channels * g.parts * g.channels + i % g.channels);
    const int64_t stride = 3 * g.channels;
    double sum = 0, squares = 0;
    for (int64_t b = 0; b < g.parts; ++b) sum += first[b * stride] * first[b * stride + 1];
    const double mean = sum / count;
    for (int64_t b = 0; b < g.parts; ++b) {
      const double* part = first + b * stride;
      squares += part[2] + part[0] * (part[1] - mean) * (part[1] - mean);
    }
    static_cast<A*>(p.mean)[i] = A(mean);
    static_cast<A*>(p.var)[i] = stored_variance<A>(squares / count);
  }
}

// Adds to acc (or writes, if `first`) the terms of a group, each scale (v - mean), added pairwise. A missing term
// is left out, not given weight 0, which would turn its inf into NaN. The mean comes off first: where v is far
// from zero the difference is exact.
template <class A>
void add_group(int size, const A* const* v, const A (*scale)[kColumns], const A (*mean)[kColumns], bool first,
               int64_t count, A* acc) {
  const auto term = [=](int j, int64_t i) { return scaled_norm(scale[j][i], v[j][i], mean[j][i]); };
  const auto run = [&](auto value) {
    if (first) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) acc[i] = value(i);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) acc[i] += value(i);
    }
  };
  if (size == 4) run([=](int64_t i) { return (term(0, i) + term(1, i)) + (term(2, i) + term(3, i)); });
  if (size == 3) run([=](int64_t i) { return (term(0, i) + term(1, i)) + term(2, i); });
  if (size == 2) run([=](int64_t i) { return term(0, i) + term(1, i); });
  if (size == 1) run([=](int64_t i) { return term(0, i); });
}

// Writes the weighted sum of one tile. Terms come in groups of kGroup: their scales and means are
// spread over the columns once for all rows of the tile. In fp32 and fp64 the sum is y itself, 16-bit
// dtypes sum in `sum` and round once.
template <class T, class A>
void mix(const MixedNormSumParams& p, const Tiling& g, const Tile& t) {
  alignas(64) A sum[kElements], scale[kGroup][kColumns], mean[kGroup][kColumns];
  alignas(64) A scratch[kGroup][kColumns], d[kColumns];
  T* y = static_cast<T*>(p.sum.y);
  for (int k = 0; k < p.sum.terms; k += kGroup) {
    const int size = std::min(kGroup, p.sum.terms - k);
    for (int j = 0; j < size; ++j) {
      const Term<A> term(p, k + j, t);
      term.scales(t, scale[j]);
      term.means(t, mean[j]);
    }
    g.for_each_row(t, [&](int64_t r, int64_t begin, int64_t width) {
      const A* v[kGroup] = {};
      for (int j = 0; j < size; ++j) {
        v[j] = load_tile<T, A>(p.sum.x[k + j], begin, width, scratch[j]);
        if (p.sum.ordinal[k + j] < 0) continue;
        draw_row(p, k + j, begin, width, d);
        apply_draw(is_multiplicative(p.sum.form), v[j], d, width, scratch[j]);
        v[j] = scratch[j];
      }
      A* acc = sum + r * t.width;
      if constexpr (std::is_same_v<T, A>) acc = y + begin;
      add_group(size, v, scale, mean, k == 0, width, acc);
      if constexpr (!std::is_same_v<T, A>)
        if (k + kGroup >= p.sum.terms)
          for (int64_t i = 0; i < width; ++i) y[begin + i] = store<T>(acc[i]);
    });
  }
}

// Says whether dz_k needs the sums of its channel first: only through a batch norm whose
// statistics are those of the batch.
bool needs_sums(const MixedNormSumParams& p, int k) {
  return p.training && p.norm[k] >= 0 && p.sum.dx[k] != nullptr;
}

// Finds a part of sum dy (z_k - mu_k) by channel; k = terms is sum dy.
double* product_part(const MixedNormSumParams& p, const Tiling& g, int k, int64_t part) {
  return p.partial + (k * g.parts + part) * g.channels;
}

// Runs the first backward sweep over one tile: the parts of sum dy and of sum dy (v_k - mu_k) by channel, which dz
// and dw are made of, and the dz that need neither. dy is converted once for all terms. z - mu rather than z is
// multiplied with dy, since the sum of dy z minus mu times the sum of dy would cancel.
template <class T, class A>
void reduce(const MixedNormSumParams& p, const Tiling& g, const Tile& t, bool sum_dy) {
  alignas(64) A dy_tile[kElements], products[kColumns], mean[kColumns], scale[kColumns];
  alignas(64) A scratch[kColumns], d[kColumns], scaled[kColumns], total[kColumns];
  const bool multiplicative = is_multiplicative(p.sum.form);
  // dy of a row as the accumulation dtype: where it lies if it is stored so, else from the tile converted before.
  const auto dy_row = [&](int64_t r, int64_t begin) {
    if constexpr (std::is_same_v<T, A>) return static_cast<const A*>(p.sum.dy) + begin;
    else return static_cast<const A*>(dy_tile + r * t.width);
  };
  // Folds the sums by column to channels and keeps them as this tile's part.
  const auto keep = [&](int k) {
    fold(t, products, total);
    std::copy_n(total, t.channels, product_part(p, g, k, t.part) + t.channel);
  };
  g.for_each_row(t, [&](int64_t r, int64_t begin, int64_t width) {
    load_tile<T, A>(p.sum.dy, begin, width, dy_tile + r * t.width);
  });
  if (sum_dy) {
    std::fill_n(products, t.width, A(0));
    g.for_each_row(t, [&](int64_t r, int64_t begin, int64_t width) {
      const A* dy = dy_row(r, begin);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) products[i] += dy[i];
    });
    keep(p.sum.terms);
  }
  for (int k = 0; k < p.sum.terms; ++k) {
    const bool wants_products = p.sum.dw || needs_sums(p, k), noisy = p.sum.ordinal[k] >= 0;
    T* dz = needs_sums(p, k) ? nullptr : static_cast<T*>(p.sum.dx[k]);
    if (!wants_products && !dz) continue;
    const Term<A> term(p, k, t);
    term.means(t, mean);
    if (dz) term.scales(t, scale);
    std::fill_n(products, t.width, A(0));
    g.for_each_row(t, [&](int64_t r, int64_t begin, int64_t width) {
      const A *dy = dy_row(r, begin), *into = dy;
      if (noisy && (wants_products || multiplicative)) draw_row(p, k, begin, width, d);
      if (wants_products) {
        const A* v = load_tile<T, A>(p.sum.x[k], begin, width, scratch);
        if (noisy) {
          apply_draw(multiplicative, v, d, width, scratch);
          v = scratch;
        }
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) products[i] += dy[i] * (v[i] - mean[i]);
      }
      if (!dz) return;
      if (noisy && multiplicative) {
        apply_draw(true, dy, d, width, scaled);
        into = scaled;
      }
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) dz[begin + i] = store<T>(mixed_dx(scale[i], into[i]));
    });
    if (wants_products) keep(k);
  }
}

// Adds up the parts of a sum into part 0, in their order.
void add_parts(const MixedNormSumParams& p, const Tiling& g, int k) {
  double* total = product_part(p, g, k, 0);
  for (int64_t b = 1; b < g.parts; ++b) {
    const double* part = product_part(p, g, k, b);
    for (int64_t c = 0; c < g.channels; ++c) total[c] += part[c];
  }
}

// Runs the second backward sweep over one tile: dz_k = w r (dy - mean dy) - slope (z - mu) for the
// terms that need the sums.
template <class T, class A>
void write_dz(const MixedNormSumParams& p, const Tiling& g, const Tile& t) {
  alignas(64) A mean_dy[kColumns], mean[kColumns], scale[kColumns], slope[kColumns];
  const T* dy = static_cast<const T*>(p.sum.dy);
  const double count = double(g.per_channel());
  const double* sum_dy = product_part(p, g, p.sum.terms, 0) + t.channel;
  spread(t, mean_dy, [&](int64_t c) { return A(sum_dy[c] / count); });
  for (int k = 0; k < p.sum.terms; ++k) {
    if (!needs_sums(p, k)) continue;
    const Term<A> term(p, k, t);
    const double* products = product_part(p, g, k, 0) + t.channel;
    term.means(t, mean);
    term.scales(t, scale);
    spread(t, slope, [&](int64_t c) { return norm_slope(term.w, term.r(c), A(products[c] / count)); });
    const T* z = static_cast<const T*>(p.sum.x[k]);
    T* dz = static_cast<T*>(p.sum.dx[k]);
    g.for_each_row(t, [&](int64_t, int64_t begin, int64_t width) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const int64_t at = begin + i;
        dz[at] = store<T>(norm_dz(scale[i], load(dy[at]), mean_dy[i], slope[i], load(z[at]), mean[i]));
      }
    });
  }
}

// The mix runs backwards over the tiles, to find in cache what the moments left there.
template <class T>
void fwd(const MixedNormSumParams& p) {
  using A = typename Accumulate<T>::type;
  if (is_relative(p.sum.form)) standard_deviations<T, A>(p.sum);
  if (p.sum.n == 0) return;
  const Tiling g(p);
  if (p.training && p.norms > 0) {
    g.for_each_tile(false, [&](const Tile& t) {
      for (int k = 0; k < p.sum.terms; ++k)
        if (p.norm[k] >= 0) moments<T, A>(p, g, t, k);
    });
    statistics<A>(p, g);
  }
  g.for_each_tile(true, [&](const Tile& t) { mix<T, A>(p, g, t); });
}

// Runs the first sweep, adds up totals and dw = sum_c r_c total_c, runs the second sweep. An empty
// batch has dw of 0.
template <class T>
void bwd(const MixedNormSumParams& p) {
  using A = typename Accumulate<T>::type;
  if (p.sum.n == 0) {
    if (p.sum.dw) std::fill_n(static_cast<A*>(p.sum.dw), p.sum.terms, A(0));
    return;
  }
  const Tiling g(p);
  bool second_sweep = false;
  for (int k = 0; k < p.sum.terms; ++k) second_sweep |= needs_sums(p, k);
  g.for_each_tile(false, [&](const Tile& t) { reduce<T, A>(p, g, t, second_sweep); });

  // All channels as one tile, which is what Term takes to find statistics.
  const Tile all{0, 0, 0, 0, 0, g.channels, 1, 0};
  if (second_sweep) add_parts(p, g, p.sum.terms);
  for (int k = 0; k < p.sum.terms; ++k) {
    if (!p.sum.dw && !needs_sums(p, k)) continue;
    add_parts(p, g, k);
    if (!p.sum.dw) continue;
    const Term<A> term(p, k, all);
    const double* products = product_part(p, g, k, 0);
    double dw = 0;
    for (int64_t c = 0; c < g.channels; ++c) dw += double(term.r(c)) * products[c];
    static_cast<A*>(p.sum.dw)[k] = A(dw);
  }
  if (second_sweep) g.for_each_tile(true, [&](const Tile& t) { write_dz<T, A>(p, g, t); });
}

}  // namespace

int64_t mixed_norm_sum_parts(const MixedNormSumParams& p) { return Tiling(p).parts; }

void mixed_norm_sum_fwd(const MixedNormSumParams& p) {
  switch (p.sum.dtype) {
    case DType::f32: return fwd<float>(p);
    case DType::bf16: return fwd<bf16_t>(p);
    case DType::f16: return fwd<f16_t>(p);
    case DType::f64: return fwd<double>(p);
  }
}

void mixed_norm_sum_bwd(const MixedNormSumParams& p) {
  switch (p.sum.dtype) {
    case DType::f32: return bwd<float>(p);
    case DType::bf16: return bwd<bf16_t>(p);
    case DType::f16: return bwd<f16_t>(p);
    case DType::f64: return bwd<double>(p);
  }
}

}  // namespace fastnas::FASTNAS_ISA
