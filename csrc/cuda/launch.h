// What every .cu includes in place of cuda_runtime.h: CUDA under nvcc, the host shim under g++
// (see host_simt.h). One source text for both; only these four differ from plain CUDA:
//   SHARED(type, name, count)      __shared__ type name[count];
//   DYNAMIC_SHARED(type, name)     type* name: the shared_bytes of the launch, 16-byte aligned;
//                                  all uses in one kernel are the same bytes
//   launch(kernel, grid, block, shared_bytes, stream, args...)   kernel<<<...>>>(args...);
//                                  returns the cudaError_t of the launch as int
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

// What a kernel may take, in both worlds: plain values, within what CUDA 12.1 and later allow on sm_70 and later.
template <class... P> constexpr bool kernel_parameters_fit() {
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters must be plain values");
  return (sizeof(P) + ... + size_t(0)) <= 32764;
}

// Of dynamic shared memory, from where launch() asks for more than a kernel gets by default: those 48 KiB also hold
// what the kernel declares itself.
constexpr size_t kOptInBytes = 40 * 1024;

// Each world defines start(), which launches; finish(), which waits for the stream and returns what went wrong on
// it; and kernel_name().
#if defined(__CUDACC__)
#include "launch_cuda.h"
#elif defined(FASTNAS_HOST_SIMT)
#include "host_simt.h"
#else
#error "compile with nvcc, or for the host with -DFASTNAS_HOST_SIMT"
#endif

// Says whether FASTNAS_CUDA_SYNC asks to wait after every launch, so that a fault inside a kernel is told by its own
// launch and not by a later call of whoever uses the device next.
inline bool waits_for_launches() {
  static const bool waits = [] {
    const char* const value = getenv("FASTNAS_CUDA_SYNC");
    return value && *value && strcmp(value, "0") != 0;
  }();
  return waits;
}

// Names the kernel of the calling thread's latest launch that failed.
inline thread_local std::string failed_kernel;

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, A... args) {
  static_assert(kernel_parameters_fit<P...>());
  const void* const address = reinterpret_cast<const void*>(kernel);
  const bool waits = waits_for_launches();
  // Asked for before: after a fault the runtime may answer every question with that fault.
  if (waits) failed_kernel = kernel_name(address);
  int error = start(kernel, grid, block, shared_bytes, stream, P(args)...);
  if (error && !waits) failed_kernel = kernel_name(address);
  if (!error && waits) error = finish(stream);
  return error;
}
