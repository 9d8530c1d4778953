// Runs CUDA kernels on the host, so that CI without a GPU executes the text of the .cu files:
//   g++ -std=c++17 -O2 -x c++ -DFASTNAS_HOST_SIMT -Wno-unknown-pragmas -shared -fPIC foo.cu
// Included by launch.h only. Kernels take host pointers; start() returns when they are done.
//
// The threads of a block are fibers of the calling OS thread; blocks run one after the other, in
// shuffled order. Between two block barriers the threads are resumed in shuffled order, either
// over the whole block or warp by warp, each warp running as far ahead as it can, so that a
// missing barrier gives a wrong result for some seed: host_simt_seed(). A launch depends on the
// seed and its arguments only. Shared memory is filled with 0xFF (NaN, -1) before each block.
//
// launch() returns 9 or 1 for a grid, block or shared memory size that CUDA refuses, and 719
// with a line on stderr where threads can never meet: __syncthreads() reached at different source
// lines, or by some while others wait in a warp operation; a warp operation that a named lane
// does not join, or a shuffle naming a lane that has exited. Exited threads count as arrived at
// __syncthreads(), __syncwarp() and votes; lanes that a partial warp never had may be named. A
// shuffle from a lane outside the mask or the block gives 0xFF bytes.
//
// Races are seen in a build for them (host_simt_races.cpp), misaligned accesses in one with
// -fsanitize=alignment: tests/host_cuda.py makes both.
//
// Not modelled: the memory model (every write is seen at once);
// blocks at the same time, so without the detector races between blocks hardly show, and a block spinning on another
// hangs, as does a thread spinning on another; streams; divergent branches that meet in the same
// __syncthreads() line of a function; bank conflicts, registers, launch bounds,
// contraction to FMA. Bad addresses, also past a shared array, are left to -fsanitize=address.
#pragma once

#include "host_simt_copies.h"
#include "host_simt_machine.h"
#include "host_simt_names.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __noinline__ __attribute__((noinline))
#define __forceinline__ __inline__ __attribute__((always_inline))

#pragma GCC visibility push(hidden)

#define HOST_SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(HOST_SIMT_SITE) {
  host_simt::wait_for({host_simt::Wait::block_barrier, file, line, 0, 0, 0});
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, HOST_SIMT_SITE) {
  host_simt::wait_for({host_simt::Wait::warp_barrier, file, line, mask, 0, 0});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, HOST_SIMT_SITE) {
  return unsigned(host_simt::wait_for({host_simt::Wait::vote, file, line, mask, predicate != 0, 0}));
}
inline int __any_sync(unsigned mask, int predicate, HOST_SIMT_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, HOST_SIMT_SITE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}

// `width` cuts the warp into segments; a source outside the own segment means the own lane.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, HOST_SIMT_SITE) {
  const int segment = host_simt::lane() & ~(width - 1);
  return host_simt::shuffle(mask, value, segment | (source & (width - 1)), file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, HOST_SIMT_SITE) {
  const int lane = host_simt::lane();
  const bool inside = delta <= unsigned(lane & (width - 1));
  return host_simt::shuffle(mask, value, inside ? lane - int(delta) : lane, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, HOST_SIMT_SITE) {
  const int lane = host_simt::lane();
  const bool inside = delta <= unsigned((lane | (width - 1)) - lane);
  return host_simt::shuffle(mask, value, inside ? lane + int(delta) : lane, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, HOST_SIMT_SITE) {
  const int lane = host_simt::lane();
  const bool inside = (lane ^ flip) <= (lane | (width - 1));
  return host_simt::shuffle(mask, value, inside ? lane ^ flip : lane, file, line);
}

inline void __threadfence() { host_simt::watch::fence(); }
inline void __threadfence_block() {}

// Fibers hand over at barriers only, so a plain read and write is atomic here.
template <class T> __forceinline__ T atomicAdd(T* address, std::common_type_t<T> value) {
  host_simt::watch::atomic(address);
  const host_simt::watch::Watch shim(false);
  return std::exchange(*address, *address + value);
}
__forceinline__ unsigned atomicInc(unsigned* address, unsigned last) {
  host_simt::watch::atomic(address);
  const host_simt::watch::Watch shim(false);
  return std::exchange(*address, *address >= last ? 0 : *address + 1);
}

template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> void __stcs(T* address, std::common_type_t<T> value) { *address = value; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

// An array is found by the address of a static of its declaration, since a block's fibers share no stack. nvcc
// refuses a __shared__ array whose elements have initialisers, hence the assertion.
#define SHARED(type, name, count)                                                        \
  static_assert(std::is_trivially_default_constructible_v<type> && alignof(type) <= 16); \
  static char name##_declaration;                                                        \
  type(&name)[count] = *reinterpret_cast<type(*)[count]>(                                \
      host_simt::shared_array(&name##_declaration, sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(host_simt::shared_array(&host_simt::machine, 0))

template <class... P>
int start(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void*, P... arguments) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (host_simt::observer) {
    const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
    const auto parameters = host_simt::laid_out(arguments...);
    if (host_simt::observer(address, sizes, shared_bytes, parameters.data(), parameters.size())) return 0;
  }
  return host_simt::run_grid(grid, block, shared_bytes, address,
                             [kernel, parameters = std::tuple<P...>(arguments...)] {
                               std::apply(kernel, parameters);
                             });
}
// A launch is over when start() returns, with its errors.
inline int finish(void*) { return 0; }
inline std::string kernel_name(const void* kernel) { return host_simt::name_of_code(kernel).function; }

#pragma GCC visibility pop

extern "C" __attribute__((used, visibility("default"))) inline void host_simt_observe(host_simt::Observer observer) {
  host_simt::observer = observer;
}
extern "C" __attribute__((used, visibility("default"))) inline void host_simt_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(host_simt::machine.in_use);
  host_simt::machine.seed = seed;
}
