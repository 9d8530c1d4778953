// Kernels with one fault each, which a checking build finds; driven by test_checks.py. `right` mends the fault and
// leaves the rest as it is.
#include <cstdint>

#include "async_copy.h"

using namespace fastnas::cuda;

constexpr int kThreads = 64;
constexpr int kBlocks = 4;

// --- races ---------------------------------------------------------------------------------------------------

template <bool right> __global__ void missing_block_barrier(float* x) {
  SHARED(float, tile, kThreads);
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads + t;
  tile[t] = x[at];
  if (right) __syncthreads();
  x[at] = tile[kThreads - 1 - t];
}

template <bool right> __global__ void missing_warp_barrier(float* x) {
  SHARED(float, tile, kThreads);
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads + t;
  tile[t] = x[at];
  if (right) __syncwarp();
  x[at] = tile[t ^ 1];
}

// Two tiles through one array. A warp that is ahead overwrites what another still reads.
template <bool right> __global__ void tile_used_again(float* x) {
  SHARED(float, tile, kThreads);
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads + t;
  float sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    tile[t] = x[at] + float(turn);
    __syncthreads();
    sum += tile[kThreads - 1 - t];
    if (right) __syncthreads();
  }
  x[at] = sum;
}

// The last thread writes a word too many: the first of the next block's.
template <bool right> __global__ void blocks_write_one_word(float* x) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads + t;
  x[at] = 1;
  const bool last = blockIdx.x == gridDim.x - 1;
  if (!right && t == kThreads - 1 && !last) x[at + 1] = 1;
}

// A sum of blocks' sums by the block that comes last; or, by mistake, by the block that has the last number.
template <bool right> __global__ void block_reads_without_the_counter(float* x, float* partial, unsigned* counter) {
  SHARED(float, tile, kThreads);
  SHARED(int, last, 1);
  const int t = int(threadIdx.x);
  tile[t] = x[int(blockIdx.x) * kThreads + t];
  __syncthreads();
  if (t == 0) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += tile[i];
    partial[blockIdx.x] = sum;
    __threadfence();
    const unsigned came = right ? atomicAdd(counter, 1u) : blockIdx.x;
    last[0] = came == gridDim.x - 1;
  }
  __syncthreads();
  __threadfence();
  if (last[0] && t < kBlocks) x[t] = partial[t];
}

// The same without a fence in front of the counter, or without one behind it: the sums may not have arrived.
template <bool before, bool behind> __global__ void counter_without_a_fence(float* partial, unsigned* counter) {
  SHARED(int, last, 1);
  const int t = int(threadIdx.x);
  partial[int(blockIdx.x) * kThreads + t] = 1;
  if (before) __threadfence();
  __syncthreads();
  if (t == 0) last[0] = atomicAdd(counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (behind) __threadfence();
  if (!last[0]) return;
  float sum = 0;
  for (int b = 0; b < kBlocks; ++b) sum += partial[b * kThreads + t];
  partial[t] = sum;
  if (t == 0) *counter = 0;
}

// The last block of each pair adds up the pair, and the last of those reads all that there is: what a block of the
// other pair left comes to it by way of that pair's last block.
template <bool right> __global__ void counters_in_two_steps(float* sums, float* pairs, unsigned* counters) {
  SHARED(int, last, 1);
  const int t = int(threadIdx.x), pair = int(blockIdx.x) / 2;
  if (t == 0) {
    sums[blockIdx.x] = 1;
    __threadfence();
    last[0] = atomicAdd(&counters[pair], 1u) == 1;
    __threadfence();
    if (last[0]) {
      pairs[pair] = sums[2 * pair] + sums[2 * pair + 1];
      if (right) __threadfence();
      last[0] = atomicAdd(&counters[2], 1u) == 1;
      __threadfence();
    }
  }
  __syncthreads();
  if (!last[0]) return;
  if (t < kBlocks) sums[t] += pairs[t / 2];
  if (t < 3) counters[t] = 0;
}

// A copy that nobody has waited for when the barrier opens: another thread reads what may have landed or not.
template <bool right> __global__ void copy_waited_for_too_late(float* x) {
  SHARED(float4, tile, kThreads);
  const int t = int(threadIdx.x);
  x += 4 * (int(blockIdx.x) * kThreads + t);
  copy_async16(&tile[t], x);
  commit();
  if (right) wait<0>();
  __syncthreads();
  const float other = tile[kThreads - 1 - t].y;
  __syncthreads();
  wait<0>();
  x[0] = other;
}

// The same of a thread's own copy.
template <bool right> __global__ void copy_read_by_its_own_thread(float* x) {
  SHARED(float4, tile, kThreads);
  const int t = int(threadIdx.x);
  x += 4 * (int(blockIdx.x) * kThreads + t);
  copy_async16(&tile[t], x);
  commit();
  if (right) wait<0>();
  x[0] = tile[t].y;
}

// A copy to a tile that another thread still reads.
template <bool right> __global__ void copy_over_what_is_read(float* x) {
  SHARED(float4, tile, kThreads);
  const int t = int(threadIdx.x);
  x += 4 * (int(blockIdx.x) * kThreads + t);
  tile[t] = make_float4(1, 2, 3, 4);
  __syncthreads();
  const float other = tile[kThreads - 1 - t].y;
  if (right) __syncthreads();
  copy_async16(&tile[t], x);
  commit();
  wait<0>();
  x[0] = other + tile[t].x;
}

// Neighbours write halves of one word, which is no race.
__global__ void halves_of_words(uint16_t* x) { x[blockIdx.x * kThreads + threadIdx.x] = uint16_t(threadIdx.x); }

// --- misaligned accesses ---------------------------------------------------------------------------------------

struct alignas(4) HalfPair { uint16_t x, y; };

__global__ void load_float4(const float* from, float* to) { to[0] = reinterpret_cast<const float4*>(from)->y; }
__global__ void store_uint4(const float* from, float* to) {
  const unsigned bits = unsigned(from[0]);
  *reinterpret_cast<uint4*>(to) = make_uint4(bits, bits, bits, bits);
}
__global__ void load_float2(const float* from, float* to) {
  const float2 pair = *reinterpret_cast<const float2*>(from);
  to[0] = pair.x + pair.y;
}
__global__ void load_half_pair(const uint16_t* from, float* to) {
  const HalfPair pair = *reinterpret_cast<const HalfPair*>(from);
  to[0] = float(pair.x) + float(pair.y);
}
__global__ void copy_from(const float* from, float* to) {
  SHARED(float4, tile, 1);
  copy_async16(tile, from);
  commit();
  wait<0>();
  to[0] = tile[0].x;
}

extern "C" {

#define RACE(name)                                                                                 \
  int name##_run(int right, float* x) {                                                            \
    return launch(right ? name<true> : name<false>, kBlocks, kThreads, 0, nullptr, x);             \
  }
RACE(missing_block_barrier)
RACE(missing_warp_barrier)
RACE(tile_used_again)
RACE(blocks_write_one_word)
RACE(copy_waited_for_too_late)
RACE(copy_read_by_its_own_thread)
RACE(copy_over_what_is_read)
int block_reads_without_the_counter_run(int right, float* x) {
  unsigned* const counter = reinterpret_cast<unsigned*>(x + kBlocks * kThreads);
  return launch(right ? block_reads_without_the_counter<true> : block_reads_without_the_counter<false>, kBlocks,
                kThreads, 0, nullptr, x, x + kBlocks * kThreads + 1, counter);
}
int counters_in_two_steps_run(int right, float* x) {
  unsigned* const counters = reinterpret_cast<unsigned*>(x + 2 * kBlocks);
  return launch(right ? counters_in_two_steps<true> : counters_in_two_steps<false>, kBlocks, kThreads, 0, nullptr, x,
                x + kBlocks, counters);
}
int counter_without_a_fence_run(int before, int behind, float* x) {
  unsigned* const counter = reinterpret_cast<unsigned*>(x + kBlocks * kThreads);
  const auto kernel = before ? behind ? counter_without_a_fence<true, true> : counter_without_a_fence<true, false>
                             : counter_without_a_fence<false, true>;
  return launch(kernel, kBlocks, kThreads, 0, nullptr, x, counter);
}
int halves_of_words_run(void* x) {
  return launch(halves_of_words, kBlocks, kThreads, 0, nullptr, static_cast<uint16_t*>(x));
}

// Way by way the accesses above, at `off` bytes past an address that is aligned for all of them.
int misaligned_run(int way, int off, char* x) {
  float* const other = reinterpret_cast<float*>(x + 64);
  float* const at = reinterpret_cast<float*>(x + off);
  if (way == 0) return launch(load_float4, 1, 1, 0, nullptr, at, other);
  if (way == 1) return launch(store_uint4, 1, 1, 0, nullptr, other, at);
  if (way == 2) return launch(load_float2, 1, 1, 0, nullptr, at, other);
  if (way == 3) return launch(load_half_pair, 1, 1, 0, nullptr, reinterpret_cast<const uint16_t*>(at), other);
  return launch(copy_from, 1, 1, 0, nullptr, at, other);
}
}
