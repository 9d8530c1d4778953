// 16-bit floating point as stored, and its conversions to the fp32 in which all arithmetic is done.
// Branch free, so that compilers vectorise them; round to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTNAS_HD __host__ __device__ __forceinline__
#else
// Always inlined: one object file per instruction set includes these headers, and a shared weak
// copy compiled for AVX-512 must not end up serving the baseline.
#define FASTNAS_HD inline __attribute__((always_inline))
#endif

namespace fastnas {

struct bf16_t { uint16_t bits; };
struct f16_t { uint16_t bits; };

template <class To, class From>
FASTNAS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FASTNAS_HD float load(float v) { return v; }
FASTNAS_HD double load(double v) { return v; }
FASTNAS_HD float load(bf16_t v) { return bit_cast<float>(uint32_t(v.bits) << 16); }

FASTNAS_HD float load(f16_t v) {
  const uint32_t magnitude = uint32_t(v.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude | 0x7f800000u;
  // A subnormal half is its mantissa times 2^-24, which fp32 holds exactly.
  const uint32_t tiny = bit_cast<uint32_t>(float(int32_t(v.bits & 0x7fffu)) * 0x1p-24f);
  const uint32_t bits = magnitude < (1u << 23) ? tiny : magnitude >= (31u << 23) ? special : normal;
  return bit_cast<float>(sign | bits);
}

template <class T> FASTNAS_HD T store(float v);
template <class T> FASTNAS_HD T store(double v);

template <> FASTNAS_HD float store<float>(float v) { return v; }
template <> FASTNAS_HD double store<double>(double v) { return v; }

template <> FASTNAS_HD bf16_t store<bf16_t>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {uint16_t(is_nan ? 0x7fc0u : rounded)};
}

template <> FASTNAS_HD f16_t store<f16_t>(float v) {
  const uint32_t sign = bit_cast<uint32_t>(v) & 0x80000000u;
  const uint32_t a = bit_cast<uint32_t>(v) ^ sign;
  const uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Adding 1/2 moves a value below 2^-14 so that its last kept bit weighs 2^-24, rounded by the FPU.
  const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t bits = a < (113u << 23) ? tiny : a >= (143u << 23) ? special : normal;
  return {uint16_t((sign >> 16) | bits)};
}

// The dtype in which sums over a stored dtype are accumulated.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };

}  // namespace fastnas
