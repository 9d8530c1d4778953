// Computes Philox4x32-10 (Salmon et al., SC'11) and the standard draws made of its words. Element i of noisy term j
// takes word i % 4 of the block whose counter is (i / 4, offset + j).
//
// A draw is a function of key, offset and index: it needs no state and no order, so backward makes it again, and
// every backend, layout and thread count has the same words. In fp32 the functions from words to draws are
// polynomials of our own: they vectorise, and CUDA's fast logarithm and sine are off by far more than rounding.
#pragma once

#include <cmath>
#include <cstdint>

#include "storage.h"

namespace fastnas {

struct Words { uint32_t v[4]; };

FASTNAS_HD uint32_t mulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

// The rounds recurse instead of looping: g++ vectorises the caller's loop only when nothing loops inside.
template <int rounds>
FASTNAS_HD Words philox_rounds(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  if constexpr (rounds == 0) {
    return {{c0, c1, c2, c3}};
  } else {
    const uint32_t h0 = mulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const uint32_t h1 = mulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    return philox_rounds<rounds - 1>(h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0, k0 + 0x9E3779B9u, k1 + 0xBB67AE85u);
  }
}
FASTNAS_HD Words philox(uint64_t key, uint64_t quad, uint64_t offset) {
  return philox_rounds<10>(uint32_t(quad), uint32_t(quad >> 32), uint32_t(offset), uint32_t(offset >> 32),
                           uint32_t(key), uint32_t(key >> 32));
}

// Maps a word to (0, 1): 23 bits and a half, exact in fp32, never 0, whose logarithm Box-Muller could not take, nor
// 1, where a Gumbel draw is infinite.
template <class A> FASTNAS_HD A unit(uint32_t word) {
  return (A(int32_t(word >> 9)) + A(0.5)) * A(0x1p-23);
}

template <class A> FASTNAS_HD A uniform(uint32_t word) { return A(2) * unit<A>(word) - A(1); }

// Computes ln u for u in (0, 1), by u = 2^e m, m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m-1)/(m+1)). Taking
// sqrt(1/2) off the bits before splitting them puts m into that interval without a branch.
FASTNAS_HD float log_unit(float u) {
  const uint32_t bits = bit_cast<uint32_t>(u) - 0x3f3504f3u;  // sqrt(1/2)
  const float e = float(int32_t(bits) >> 23);
  const float m = bit_cast<float>((bits & 0x7fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const float series = 1.0f + z * (1.0f / 3 + z * (0.2f + z * (1.0f / 7 + z * (1.0f / 9))));
  return e * 0.693147180559945f + 2.0f * s * series;
}
FASTNAS_HD double log_unit(double u) { return log(u); }

template <class A> struct Pair { A cosine, sine; };

// Computes cos and sin of 2 pi u. The reduction to |angle| <= pi/4 is exact because 4u is.
FASTNAS_HD Pair<float> turn(float u) {
  const int32_t quadrant = int32_t(4.0f * u + 0.5f);
  const float a = (4.0f * u - float(quadrant)) * 1.57079632679490f, z = a * a;
  const float sine = a * (1 + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880)))));
  const float cosine =
      1 + z * (-0.5f + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320 - z * (1.0f / 3628800)))));
  const bool swap = quadrant & 1;
  const float c = swap ? sine : cosine, s = swap ? cosine : sine;
  return {(quadrant + 1) & 2 ? -c : c, quadrant & 2 ? -s : s};
}
FASTNAS_HD Pair<double> turn(double u) {
  return {cos(6.283185307179586477 * u), sin(6.283185307179586477 * u)};
}

// Maps two words to two standard normals (Box-Muller).
template <class A> FASTNAS_HD Pair<A> normals(uint32_t radius_word, uint32_t angle_word) {
  const A radius = sqrt(A(-2) * log_unit(unit<A>(radius_word)));
  const Pair<A> point = turn(unit<A>(angle_word));
  return {radius * point.cosine, radius * point.sine};
}

// Makes the four standard draws of one Philox block.
template <class A> struct Draws { A v[4]; };
template <class A> FASTNAS_HD Draws<A> draws(bool gaussian, const Words& words) {
  if (!gaussian)
    return {{uniform<A>(words.v[0]), uniform<A>(words.v[1]), uniform<A>(words.v[2]), uniform<A>(words.v[3])}};
  const Pair<A> low = normals<A>(words.v[0], words.v[1]), high = normals<A>(words.v[2], words.v[3]);
  return {{low.cosine, low.sine, high.cosine, high.sine}};
}

}  // namespace fastnas
