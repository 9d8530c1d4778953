// Defines 16-bit floating point as stored, and its conversions to the fp32 in which all arithmetic is done. Branch
// free, so that compilers vectorise them; round to nearest even; NaN stays NaN.
//
// They are written on bits so that one text serves a scalar, a compiler vector and a GPU, with the same results.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTNAS_HD __host__ __device__ __forceinline__
#else
// These are always inlined: one object file per instruction set includes these headers, and a shared weak copy
// compiled for AVX-512 must not end up serving the baseline.
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

// Converts on bits: U is uint32_t, or a vector of them, and F float, or a vector alike.
template <class F, class U> FASTNAS_HD F value_of_f16(U half) {
  const U magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  const U normal = magnitude + (112u << 23), special = magnitude | 0x7f800000u;
  // A subnormal half is its mantissa times 2^-24, which fp32 holds exactly; 2^23 + n - 2^23 is n as a float.
  const F mantissa = bit_cast<F>((half & 0x7fffu) | 0x4b000000u) - 0x1p23f;
  const U tiny = bit_cast<U>(mantissa * 0x1p-24f);
  const U bits = magnitude < (1u << 23) ? tiny : magnitude >= (31u << 23) ? special : normal;
  return bit_cast<F>(sign | bits);
}
// A bf16 is the upper half of a float. Adding 0x7fff and the lowest kept bit rounds to nearest, ties to even; of a
// NaN the sum could carry into inf, hence the fixed one.
template <class U> FASTNAS_HD U bf16_of(U bits) {
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = U{} + 0x7fc0u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}
template <class F, class U> FASTNAS_HD U f16_of(U value) {
  const U sign = value & 0x80000000u, a = value ^ sign;
  const U normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Adding 1/2 moves a value below 2^-14 so that its last kept bit weighs 2^-24, rounded by the FPU.
  const U tiny = bit_cast<U>(bit_cast<F>(a) + 0.5f) - 0x3f000000u;
  const U inf = U{} + 0x7c00u, nan = U{} + 0x7e00u;
  const U special = a > 0x7f800000u ? nan : inf;
  const U bits = a < (113u << 23) ? tiny : a >= (143u << 23) ? special : normal;
  return (sign >> 16) | bits;
}

FASTNAS_HD float load(float v) { return v; }
FASTNAS_HD double load(double v) { return v; }
FASTNAS_HD float load(bf16_t v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
// Under nvcc a conversion is one instruction of the device, where the same on bits takes a dozen; of a NaN the payload
// may differ.
FASTNAS_HD float load(f16_t v) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(v.bits));
  return value;
#else
  return value_of_f16<float>(uint32_t(v.bits));
#endif
}

template <class T> FASTNAS_HD T store(float v);
template <class T> FASTNAS_HD T store(double v);

template <> FASTNAS_HD float store<float>(float v) { return v; }
template <> FASTNAS_HD double store<double>(double v) { return v; }
template <> FASTNAS_HD bf16_t store<bf16_t>(float v) {
#if defined(__CUDA_ARCH__)
  bf16_t stored;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(stored.bits) : "f"(v));
  return stored;
#else
  return {uint16_t(bf16_of(bit_cast<uint32_t>(v)))};
#endif
}
template <> FASTNAS_HD f16_t store<f16_t>(float v) {
#if defined(__CUDA_ARCH__)
  f16_t stored;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored.bits) : "f"(v));
  return stored;
#else
  return {uint16_t(f16_of<float>(bit_cast<uint32_t>(v)))};
#endif
}

// Names the dtype in which sums over a stored dtype are accumulated.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };

}  // namespace fastnas
