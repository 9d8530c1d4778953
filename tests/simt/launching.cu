// What launch() asks of the CUDA runtime; driven by test_launch.py through ctypes, on fake_cuda/cuda_runtime.h.
#include "launch.h"

#include <thread>
#include <vector>

namespace fastnas {
void kernel(int) {}
}  // namespace fastnas
void other_kernel(int) {}

extern "C" {

void set_up(int device, int capturing, int refusal, int fault) {
  fake.calls.clear();
  fake.device = device;
  fake.capturing = capturing;
  fake.refusal = cudaError_t(refusal);
  fake.fault = cudaError_t(fault);
  fake.has_run = false;
}
int run(int other, size_t shared_bytes, int argument) {
  return launch(other ? other_kernel : fastnas::kernel, 3, 64, shared_bytes, nullptr, argument);
}
const char* calls() { return fake.calls.c_str(); }
int pending_error() { return fake.last_error; }
int first_argument() { return fake.first_argument; }
const char* failed_kernel_name() { return failed_kernel.c_str(); }

// Threads launch one kernel at once, each with sizes of its own.
void run_together(int threads, int launches) {
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t)
    running.emplace_back([=] {
      for (int i = 0; i < launches; ++i) allow_shared(reinterpret_cast<const void*>(other_kernel), 1 + (i * 7919 + t) % 100000);
    });
  for (std::thread& thread : running) thread.join();
}
}
