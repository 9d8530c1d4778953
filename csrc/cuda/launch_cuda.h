// Launches kernels by the CUDA runtime. Included by launch.h only; it holds no CUDA syntax but in macros, so that
// tests compile it with g++ against a runtime that writes down its calls.
#pragma once

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#define SHARED(type, name, count) __shared__ type name[count]
// One raw symbol for all kernels: nvcc rejects one extern name declared with two element types.
#define DYNAMIC_SHARED(type, name)                                      \
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_bytes)

// Takes the runtime's last error off it, where torch or the next launch would find and report it.
inline int taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return int(error);
}

// Lets a kernel have `bytes` of dynamic shared memory on the current device. What it may have only ever grows: a
// thread that sets less would take it from a launch of the same kernel that another thread is about to make.
inline int allow_shared(const void* kernel, size_t bytes) {
  static std::mutex in_use;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  if (const int error = taken(cudaGetDevice(&device))) return error;
  const std::lock_guard<std::mutex> lock(in_use);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return 0;
  const int error = taken(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  if (!error) most = bytes;
  return error;
}

template <class... P>
int start(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, P... parameters) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kOptInBytes)
    if (const int error = allow_shared(address, shared_bytes)) return error;
  void* addresses[] = {static_cast<void*>(&parameters)..., nullptr};
  return taken(cudaLaunchKernel(address, grid, block, addresses, shared_bytes, static_cast<cudaStream_t>(stream)));
}

// A stream that is being captured runs nothing, and waiting for it would end the capture.
inline int finish(void* stream) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  const int error = taken(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capturing));
  if (error || capturing != cudaStreamCaptureStatusNone) return error;
  return taken(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

inline std::string kernel_name(const void* kernel) {
#if CUDART_VERSION >= 12030
  const char* mangled = nullptr;
  if (taken(cudaFuncGetName(&mangled, kernel)) == 0) {
    char* const name = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
    const std::string text = name ? name : mangled;
    free(name);
    return text;
  }
#else
  (void)kernel;
#endif
  return "a kernel that this CUDA runtime does not name";
}
