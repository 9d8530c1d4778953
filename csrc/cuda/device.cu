#include "device.h"

#include "launch.h"

namespace fastnas::cuda {

std::string failed_kernel_name() { return failed_kernel; }

#if defined(__CUDACC__)

namespace {
// Does nothing; asking for its attributes says whether this build holds code for the device.
__global__ void probe_kernel() {}
}  // namespace

std::string error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

// A machine without a driver, or with one older than the build's CUDA, must report that, not fail later in a
// launch. Errors are fetched, so that they do not turn up in a later call of torch. The current device answers for all:
// asking another would make a context there, of hundreds of MB. One that this build has no code for fails at its first
// launch, by an error that says so.
std::string device_problem() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    cudaGetLastError();
    return error == cudaErrorInsufficientDriver ? "no driver, or one older than this build's CUDA" : "no CUDA device";
  }
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return error_text(int(error));
}

#else

std::string error_text(int code) { return "host shim error " + std::to_string(code); }
std::string device_problem() { return ""; }

#endif

}  // namespace fastnas::cuda
