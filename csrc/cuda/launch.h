// What every .cu includes in place of cuda_runtime.h: CUDA under nvcc, the host shim under g++
// (see host_simt.h). One source text for both; only these four differ from plain CUDA:
//   SHARED(type, name, count)      __shared__ type name[count];
//   DYNAMIC_SHARED(type, name)     type* name: the shared_bytes of the launch, 16-byte aligned;
//                                  all uses in one kernel are the same bytes
//   launch(kernel, grid, block, shared_bytes, stream, args...)   kernel<<<...>>>(args...);
//                                  returns the cudaError_t of the launch as int
#pragma once

#include <cstddef>
#include <type_traits>

// What a kernel may take, in both worlds: plain values, within what CUDA 12.1 and later allow on sm_70 and later.
template <class... P> constexpr bool kernel_parameters_fit() {
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters must be plain values");
  return (sizeof(P) + ... + size_t(0)) <= 32764;
}

// Of dynamic shared memory, from where launch() asks for more than a kernel gets by default: those 48 KiB also hold
// what the kernel declares itself.
constexpr size_t kOptInBytes = 40 * 1024;

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define SHARED(type, name, count) __shared__ type name[count]
// One raw symbol for all kernels: nvcc rejects one extern name declared with two element types.
#define DYNAMIC_SHARED(type, name)                                      \
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_bytes)

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           A... args) {
  static_assert(kernel_parameters_fit<P...>());
  if (shared_bytes > kOptInBytes) {
    const cudaError_t refused =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (refused != cudaSuccess) {
      cudaGetLastError();  // or the next launch would report this one
      return int(refused);
    }
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return int(cudaGetLastError());
}

#elif defined(FASTNAS_HOST_SIMT)
#include "host_simt.h"
#else
#error "compile with nvcc, or for the host with -DFASTNAS_HOST_SIMT"
#endif
