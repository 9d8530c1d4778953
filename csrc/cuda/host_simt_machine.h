// Defines the machine on which the host runs CUDA kernels: fibers, barriers, blocks and grids. What it promises,
// and what it does not model, is told in host_simt.h, which includes this file.
#pragma once

#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "host_simt_watch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define HOST_SIMT_VECTORS(type, name, align2)                      \
  struct alignas(align2) name##2 { type x, y; };                   \
  struct name##3 { type x, y, z; };                                \
  struct alignas(16) name##4 { type x, y, z, w; };                 \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
HOST_SIMT_VECTORS(float, float, 8)
HOST_SIMT_VECTORS(double, double, 16)
HOST_SIMT_VECTORS(int, int, 8)
HOST_SIMT_VECTORS(unsigned, uint, 8)
#undef HOST_SIMT_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
};

// Hidden: every shared library built from .cu files has a machine and a seed of its own.
#pragma GCC visibility push(hidden)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace host_simt {

#if defined(__x86_64__) && !defined(HOST_SIMT_UCONTEXT)
using Context = void*;

// swapcontext() without its system call: ten times faster. noipa, because the compiler must not
// conclude from this body that registers and memory survive the call.
__attribute__((naked, noinline, noipa, no_sanitize("thread"))) inline void switch_context(Context*, Context*) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi); movq (%rsi), %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // Six registers, the address that ret takes, and a return address for entry, which has none.
  void** top = reinterpret_cast<void**>(stack + bytes) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context = top;
}
#else
using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  makecontext(&context, entry, 0);
}
#endif

// Says what a fiber waits for. It runs until it reaches an operation that needs other threads,
// says so here, and hands over.
enum class Wait { nothing, block_barrier, warp_barrier, vote, shuffle, exited };

// An operation is what a fiber waits in, with what it gives and gets. File and line tell barriers apart.
struct Operation {
  Wait kind;
  const char* file;
  int line;
  unsigned mask;   // lanes named by a warp operation
  uint64_t value;  // what the thread gives, then what it gets
  int source;      // lane to shuffle from
};

// An asynchronous copy that has not landed: 16 bytes or 4 to shared memory, zeros where there is no source. `group`
// counts the groups that the thread had committed before it.
struct Copy {
  void* to;
  const void* from;
  unsigned bytes, group;
};

struct Thread {
  Context context;
  uint3 index;
  Operation op;
  std::vector<Copy> copies;
  unsigned groups;  // committed
};

struct SharedArray {
  const void* declaration;
  std::vector<unsigned char> bytes;
};

// Holds the one block that runs: its threads, their stacks, its shared arrays. `error` is the first that was found.
struct Machine {
  std::mutex in_use;
  uint64_t seed = 0, random_state = 0;
  std::vector<Thread> threads;
  Thread* current = nullptr;
  Context scheduler;
  char* stacks = nullptr;
  std::vector<SharedArray> shared;
  std::function<void()> kernel;
  int error = 0;
};
// There is one machine a process and library, so launches from several OS threads take turns (in_use).
inline Machine machine;

constexpr size_t kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 64 * 1024;  // lowest part of each stack; the largest page size

// Draws 64 bits by splitmix64, seeded anew for every launch: an order that failed can be run again
// from its seed alone.
inline uint64_t random_bits() {  // splitmix64
  uint64_t z = machine.random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Lists the numbers [first, first + count) in random order: an "inside-out" Fisher-Yates shuffle.
template <class T> void shuffled_range(std::vector<T>& out, T first, T count) {
  out.resize(count);
  for (T i = 0; i < count; ++i) {
    const T j = T(random_bits() % (i + 1));
    out[i] = out[j];
    out[j] = first + i;
  }
}

// In a fiber: hands over to the scheduler until the operation is done, returns what it yields.
inline uint64_t wait_for(const Operation& op) {
  const watch::Watch shim(false);
  Thread& self = *machine.current;
  self.op = op;
  switch_context(&self.context, &machine.scheduler);
  return self.op.value;
}

// Runs the kernel in a fiber. It never returns, as there is no frame to return to: its last switch is for good.
inline void thread_main() {
  machine.kernel();
  wait_for({Wait::exited, "", 0, 0, 0, 0});
  __builtin_unreachable();
}

// Tells where a thread is: what it waits in, and at which line.
inline void print_thread(const Thread& t) {
  static const char* const kinds[] = {
      "runs",            "waits in __syncthreads", "waits in __syncwarp",
      "waits in a vote", "waits in a shuffle",     "has exited"};
  fprintf(stderr, "; thread (%u,%u,%u) %s", t.index.x, t.index.y, t.index.z, kinds[int(t.op.kind)]);
  if (t.op.line) fprintf(stderr, " at %s:%d", t.op.file, t.op.line);
}

constexpr int kLaunchFailure = 719, kMisalignedAddress = 716;  // as CUDA numbers them

// Ends the launch as a device would, with an error that sticks, and says on stderr which threads are at fault.
inline void fail(const char* what, const Thread& a, const Thread& b, int error = kLaunchFailure) {
  if (machine.error) return;
  machine.error = error;
  fprintf(stderr, "host_simt: %s: block (%u,%u,%u)", what, blockIdx.x, blockIdx.y, blockIdx.z);
  print_thread(a);
  if (&a != &b) print_thread(b);
  fprintf(stderr, "\n");
}

// Does the warp operation that `self` waits in, if all lanes that it names have come. Values are read from all
// lanes first, then given out, so a shuffle may read a lane that is itself a reader.
inline bool finish_warp_operation(Thread* warp, unsigned lanes, const Thread& self) {
  const Operation op = self.op;
  unsigned members = 0, ballot = 0;
  uint64_t values[32];
  if (!(op.mask >> (&self - warp) & 1)) fail("lane outside its own mask", self, self);
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Thread& t = warp[lane];
    if (!(op.mask >> lane & 1)) continue;
    if (t.op.kind == Wait::exited) {
      if (op.kind == Wait::shuffle) fail("shuffle names a lane that has exited", self, t);
      continue;
    }
    if (t.op.kind != op.kind || t.op.mask != op.mask) return false;
    members |= 1u << lane;
    values[lane] = t.op.value;
    ballot |= unsigned(t.op.value != 0) << lane;
  }
  if (machine.error) return false;
  if (op.kind == Wait::warp_barrier) watch::warp_barrier_opens(unsigned(warp - machine.threads.data()), members);
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(members >> lane & 1)) continue;
    Operation& got = warp[lane].op;
    got.kind = Wait::nothing;
    if (op.kind == Wait::vote) got.value = ballot;
    if (op.kind == Wait::shuffle)
      got.value = members >> got.source & 1 ? values[got.source] : ~uint64_t(0);
  }
  return true;
}

// Runs whole warps, threads [first, first + count), until each waits for something outside. One warp alone runs
// ahead of the others up to its next block barrier, which is how a missing barrier shows.
inline void run_threads(unsigned first, unsigned count) {
  std::vector<unsigned> order;
  for (bool progress = true; progress && !machine.error;) {
    progress = false;
    shuffled_range(order, first, count);
    for (const unsigned id : order) {
      Thread& t = machine.threads[id];
      if (t.op.kind != Wait::nothing) continue;
      machine.current = &t;
      threadIdx = t.index;
      const watch::Watch kernel(true);
      switch_context(&machine.scheduler, &t.context);
    }
    for (unsigned id = first; id < first + count; ++id) {
      const Thread& t = machine.threads[id];
      const unsigned warp = id / 32 * 32;
      if (t.op.kind == Wait::warp_barrier || t.op.kind == Wait::vote || t.op.kind == Wait::shuffle)
        progress |= finish_warp_operation(&machine.threads[warp],
                                          std::min(32u, first + count - warp), t);
    }
  }
}

// Opens the barrier at which all threads have arrived; they must have come by the same line of source, as CUDA
// demands. False where there is no barrier to open: the block has ended or can not go on.
inline bool open_block_barrier() {
  const Thread* first = nullptr;
  for (const Thread& t : machine.threads) {
    if (t.op.kind == Wait::exited) continue;
    if (!first) first = &t;
    if (t.op.kind != first->op.kind || t.op.line != first->op.line ||
        strcmp(t.op.file, first->op.file) != 0)
      fail("divergent barrier", *first, t);
  }
  if (!first) return false;
  if (first->op.kind != Wait::block_barrier) fail("warp operation never joined", *first, *first);
  for (Thread& t : machine.threads)
    if (t.op.kind == Wait::block_barrier) t.op.kind = Wait::nothing;
  watch::block_barrier_opens();
  return !machine.error;
}

// Runs one block: fresh fibers, poisoned shared memory, then barrier after barrier, each time in another order.
inline void run_block() {
  const unsigned count = unsigned(machine.threads.size());
  for (unsigned i = 0; i < count; ++i) {
    machine.threads[i].op = {Wait::nothing, "", 0, 0, 0, 0};
    machine.threads[i].copies.clear();
    machine.threads[i].groups = 0;
    char* const stack = machine.stacks + i * kStackBytes + kGuardBytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes - kGuardBytes);  // frames that never returned
#endif
    make_context(machine.threads[i].context, stack, kStackBytes - kGuardBytes, thread_main);
  }
  for (SharedArray& array : machine.shared)
    std::fill(array.bytes.begin(), array.bytes.end(), static_cast<unsigned char>(0xFF));
  watch::block_begins();
  std::vector<unsigned> warps;
  do {
    if (random_bits() & 1) {
      run_threads(0, count);
    } else {
      shuffled_range(warps, 0u, (count + 31) / 32);
      for (const unsigned w : warps) run_threads(w * 32, std::min(32u, count - w * 32));
    }
  } while (!machine.error && open_block_barrier());
}

// Finds the block's shared array of this declaration (the address of a static stands for it), made
// when it is first reached.
inline unsigned char* shared_array(const void* declaration, size_t bytes) {
  const watch::Watch shim(false);
  for (SharedArray& array : machine.shared)
    if (array.declaration == declaration) return array.bytes.data();
  machine.shared.push_back({declaration, std::vector<unsigned char>(bytes, 0xFF)});
  return machine.shared.back().bytes.data();
}

inline bool is_shared(const void* address) {
  const auto* const byte = static_cast<const unsigned char*>(address);
  for (const SharedArray& array : machine.shared)
    if (byte >= array.bytes.data() && byte < array.bytes.data() + array.bytes.size()) return true;
  return false;
}

// Reserves address space only, until a fiber touches its part. Kept for the life of the process. The lowest pages
// of each stack are closed, so that an overflow ends the process instead of writing into the next stack.
inline bool allocate_stacks() {
  if (machine.stacks) return true;
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  machine.stacks = static_cast<char*>(memory);
  for (size_t i = 0; i < kMaxThreads; ++i)
    mprotect(machine.stacks + i * kStackBytes, kGuardBytes, PROT_NONE);
  return true;
}

// Checks the launch as CUDA would, then runs the blocks one after the other in random
// order. An error code of CUDA, or 0.
inline int run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, const void* entry, std::function<void()> kernel) {
  constexpr size_t kDefaultShared = 48 * 1024, kLargestShared = 227 * 1024;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535)
    return 9;  // cudaErrorInvalidConfiguration
  if (dynamic_bytes > kLargestShared) return 1;  // cudaErrorInvalidValue
  const std::lock_guard<std::mutex> lock(machine.in_use);
  if (!allocate_stacks()) return 2;  // cudaErrorMemoryAllocation
  machine.random_state = machine.seed;
  machine.error = 0;
  machine.kernel = std::move(kernel);
  machine.shared.clear();
  shared_array(&machine, dynamic_bytes);
  machine.threads.resize(threads);
  for (unsigned i = 0; i < threads; ++i)
    machine.threads[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  blockDim = block;
  gridDim = grid;
  watch::launch_begins(entry);
  std::vector<uint64_t> order;
  shuffled_range(order, uint64_t(0), blocks);
  for (const uint64_t b : order) {
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                unsigned(b / grid.x / grid.y)};
    run_block();
    size_t used = 0;
    for (const SharedArray& array : machine.shared) used += array.bytes.size();
    if (used > (dynamic_bytes > kOptInBytes ? kLargestShared : kDefaultShared)) machine.error = 1;
    if (machine.error) break;
  }
  return machine.error;
}

// Sees each launch before it runs: the kernel, sizes of grid and block, bytes of dynamic shared memory, and the
// parameters as a device gets them. Where it returns true the launch is done, and no block runs.
using Observer = int (*)(const void* kernel, const unsigned* sizes, size_t shared_bytes,
                         const unsigned char* parameters, size_t parameter_bytes);
inline Observer observer = nullptr;

// Copies parameters to one piece of memory, each at a multiple of its alignment.
template <class... P> std::vector<unsigned char> laid_out(const P&... parameters) {
  std::vector<unsigned char> bytes;
  const auto append = [&bytes](const auto& parameter) {
    constexpr size_t alignment = alignof(std::decay_t<decltype(parameter)>);
    const size_t at = (bytes.size() + alignment - 1) / alignment * alignment;
    bytes.resize(at + sizeof(parameter));
    memcpy(bytes.data() + at, &parameter, sizeof(parameter));
  };
  (append(parameters), ...);
  return bytes;
}

// Shuffles a value of 4 or 8 bytes; the others of CUDA are made of it.
template <class T> T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = wait_for({Wait::shuffle, file, line, mask, bits, source});
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return int((machine.current - machine.threads.data()) % 32); }

}  // namespace host_simt

#pragma GCC visibility pop
