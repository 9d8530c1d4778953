// Copies from global to shared memory without waiting for what is read, nor passing it through registers; sm_80 and
// later. A thread waits for its own copies only:
//   copy_async16(shared, global);  ...  commit();  ...  wait<0>();  __syncthreads();  // or __syncwarp()
// wait<N>() returns when all but the N groups committed last have landed; what was not committed is not waited for.
// Until then the bytes in shared memory are undefined, and the source must stay as it is. Both addresses are multiples
// of the size. The host shim lands a copy in wait() and no earlier, so that a missing wait reads poison.
#pragma once

#include "launch.h"

namespace fastnas::cuda {
namespace {

#if defined(__CUDACC__)

// 16 bytes go past the first-level cache.
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// Writes zeros where the source lies outside of its array; `global` is not read then.
__device__ __forceinline__ void copy_async16_or_zero(void* shared, const void* global, bool inside) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async4(void* shared, const void* global) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#else

__forceinline__ void copy_async16(void* shared, const void* global, HOST_SIMT_SITE) {
  host_simt::copy_async(shared, global, 16, file, line);
}
__forceinline__ void copy_async16_or_zero(void* shared, const void* global, bool inside, HOST_SIMT_SITE) {
  host_simt::copy_async(shared, inside ? global : nullptr, 16, file, line);
}
__forceinline__ void copy_async4(void* shared, const void* global, HOST_SIMT_SITE) {
  host_simt::copy_async(shared, global, 4, file, line);
}
inline void commit() { host_simt::commit_copies(); }
template <int N> __forceinline__ void wait() { host_simt::land_copies(N); }

#endif

// Finds the larger of two, and NaN where one is, as torch does. One instruction, where comparisons and a choice would be
// three.
__device__ __forceinline__ float max_nan(float a, float b) {
#if defined(__CUDACC__)
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}
__device__ __forceinline__ float relu_nan(float v) { return max_nan(v, 0.0f); }

}  // namespace
}  // namespace fastnas::cuda
