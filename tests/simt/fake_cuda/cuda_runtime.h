// A CUDA runtime that runs nothing: it writes down its calls, and fails where a test says so. What launch_cuda.h
// calls is here, with the signatures of the real one.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#define CUDART_VERSION 13000
#define __global__
#define __shared__
#define __align__(n)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorIllegalAddress = 700 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = void*;
struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x) : x(x) {}
};

struct FakeRuntime {
  std::mutex in_use;
  std::string calls;  // one a line
  int device = 0, first_argument = 0;
  bool capturing = false;
  cudaError_t fault = cudaSuccess;      // of the kernel, once it runs: sticks, as on a device
  cudaError_t refusal = cudaSuccess;    // of the next launch
  cudaError_t last_error = cudaSuccess;
  bool has_run = false;
  cudaError_t note(const std::string& call, cudaError_t error) {
    const std::lock_guard<std::mutex> lock(in_use);
    calls += call + "\n";
    if (has_run && fault) error = fault;
    if (error) last_error = error;
    return error;
  }
};
inline FakeRuntime fake;

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fake.last_error;
  fake.last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake.device;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return fake.note("allow " + std::to_string(value), value > 227 * 1024 ? cudaErrorInvalidValue : cudaSuccess);
}
inline cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void** arguments, size_t bytes, cudaStream_t) {
  fake.first_argument = *static_cast<int*>(arguments[0]);
  const cudaError_t error = fake.note("launch " + std::to_string(grid.x) + " " + std::to_string(block.x) + " " +
                                          std::to_string(bytes), fake.refusal);
  fake.has_run = error == cudaSuccess;
  return error;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = fake.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return fake.note("synchronize", cudaSuccess); }
inline cudaError_t cudaFuncGetName(const char** name, const void*) {
  *name = "_ZN7fastnas6kernelEi";
  return fake.note("name", cudaSuccess);
}
