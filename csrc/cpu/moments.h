// Gathers count, mean and centred squares of values in cache.
//
// E[z^2] - E[z]^2 in fp32 is off by 1e-3 of the variance where the mean is 100 standard deviations away. So
// everything here takes two passes: a mean first, then squares of the deviations from it. The rounded mean is not
// quite the mean; the sum of the deviations (0 but for rounding) corrects both the mean and the squares.
#pragma once

#include "../formulas/mixed_sum.h"
#include "groups.h"

namespace fastnas::FASTNAS_ISA {

// Takes both passes with sums of type S. Reassociating them is allowed here (omp simd), which is
// what lets g++ use vectors.
template <class S, class A> Moments two_pass_moments(const A* v, int64_t count) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += S(v[i]);
  const S mean = sum / S(count);
  S squares = 0, deviations = 0;
#pragma omp simd reduction(+ : squares, deviations)
  for (int64_t i = 0; i < count; ++i) {
    const S delta = S(v[i]) - mean;
    squares += delta * delta;
    deviations += delta;
  }
  return moments_of_sums(double(count), double(mean), double(squares), double(deviations));
}

// Takes them in fp32, and again in fp64 where squares in fp32 vanish or overflow (squares_fit_fp32).
template <class A> Moments moments_of(const A* v, int64_t count) {
  const Moments m = two_pass_moments<A>(v, count);
  return std::is_same_v<A, double> || squares_fit_fp32(m) ? m : two_pass_moments<double>(v, count);
}

// The lanes of a vector as doubles: a vector twice as wide, which the compiler splits in two.
template <class A> struct WideOf {
  typedef double type __attribute__((vector_size(kLanes<A> * int(sizeof(double)))));
};
template <class A> using Wide = typename WideOf<A>::type;

// Mean and centred squares of each lane, that is of each channel of a block.
template <class A> struct LaneMoments {
  Wide<A> mean, squares;
};

// Takes both passes over a plane [pixels][lanes], with sums of type S, a vector of A or of double.
// The correction by the left-over deviations is made in fp64, because their square may lie below
// what fp32 resolves of the squares.
template <class S, class A> LaneMoments<A> two_pass_lanes(const A* plane, int64_t pixels) {
  constexpr int L = kLanes<A>;
  S sum{}, squares{}, deviations{};
  for (int64_t p = 0; p < pixels; ++p) sum += __builtin_convertvector(get(plane + p * L), S);
  const S mean = sum / (S{} + float(pixels));
  for (int64_t p = 0; p < pixels; ++p) {
    const S d = __builtin_convertvector(get(plane + p * L), S) - mean;
    squares += d * d;
    deviations += d;
  }
  const Wide<A> left_over = __builtin_convertvector(deviations, Wide<A>), count = Wide<A>{} + double(pixels);
  return {__builtin_convertvector(mean, Wide<A>) + left_over / count,
          __builtin_convertvector(squares, Wide<A>) - left_over * left_over / count};
}

// Mean and centred squares of channels, gathered pack by pack and merged (Chan, Golub, LeVeque 1979), lane by lane:
// the images of a pack stay apart until the end. A pack is one plane in cache, read twice, of which `lanes` are in use;
// `before` is how many values of the channel a slot of the group has seen, 0 opens the group.
template <class A> struct ChannelMoments {
  double *mean, *squares;  // [groups][blocks lanes]

  void add_pack(const A* z, int64_t pixels, int lanes, int group, int64_t before) {
    constexpr int L = kLanes<A>;
    const int blocks = blocks_of<A>(lanes);
    const double share = double(pixels) / double(before + pixels);
    for (int b = 0; b < blocks; ++b) {
      const LaneMoments<A> here = plane_moments(z + b * pixels * L, pixels, lanes - b * L);
      double *m = mean + (int64_t(group) * blocks + b) * L, *s = squares + (int64_t(group) * blocks + b) * L;
      for (int l = 0; l < L; ++l) {
        const double delta = before == 0 ? 0 : here.mean[l] - m[l];
        s[l] = (before == 0 ? 0 : s[l]) + clamp_variance(here.squares[l]) + delta * delta * (double(before) * share);
        m[l] = before == 0 ? here.mean[l] : m[l] + delta * share;
      }
    }
  }

  // Merges the groups in their order, whatever thread gathered them.
  Moments total(const Batch& batch, int channel, int width, int64_t pixels) const {
    Moments sum;
    batch.for_each_slot([&](int group, int lane) {
      const int64_t at = int64_t(group) * width + lane + channel;
      sum = merge(sum, {double(batch.packs(group) * pixels), mean[at], squares[at]});
    });
    return sum;
  }

 private:
  // Takes the plane again in fp64 if the squares of any lane in use do not fit fp32. The other lanes hold zeros, whose
  // squares never fit; they do not count.
  static LaneMoments<A> plane_moments(const A* plane, int64_t pixels, int lanes) {
    const LaneMoments<A> m = two_pass_lanes<Vec<A>>(plane, pixels);
    if constexpr (!std::is_same_v<A, double>)
      for (int l = 0; l < kLanes<A> && l < lanes; ++l)
        if (!squares_fit_fp32({double(pixels), m.mean[l], m.squares[l]})) return two_pass_lanes<Wide<A>>(plane, pixels);
    return m;
  }
};

}  // namespace fastnas::FASTNAS_ISA
