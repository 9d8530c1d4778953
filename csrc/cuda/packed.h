// Loads and stores 16 bytes of a tensor, 4 to 8 of its values, by one instruction.
#pragma once

#include "launch.h"

#include "../formulas/storage.h"

namespace fastnas::cuda {
namespace {

template <class T> constexpr int kPacked = 16 / int(sizeof(T));  // values in 16 bytes
template <class T> struct alignas(16) Packed { T v[kPacked<T>]; };

template <class T> __device__ void load_packed(const T* from, float* v) {
  const auto packed = *reinterpret_cast<const Packed<T>*>(from);
#pragma unroll
  for (int i = 0; i < kPacked<T>; ++i) v[i] = load(packed.v[i]);
}
template <class T> __device__ void store_packed(T* to, const float* v) {
  Packed<T> packed;
#pragma unroll
  for (int i = 0; i < kPacked<T>; ++i) packed.v[i] = store<T>(v[i]);
#if defined(__CUDA_ARCH__)
  // An assignment, also of a uint4, may be cut into words, each a request of its own to the memory.
  const auto words = bit_cast<uint4>(packed);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *reinterpret_cast<Packed<T>*>(to) = packed;
#endif
}

}  // namespace
}  // namespace fastnas::cuda
