// Kernels that show what the host shim guarantees; driven by test_simt_shim.py through ctypes.
#include <cstdint>

#include "async_copy.h"

using namespace fastnas::cuda;

constexpr int kThreads = 256;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Tree reduction over shared memory. `synced` = false leaves one of its barriers out.
template <class T, bool synced>
__global__ void __launch_bounds__(kThreads) tree_sum(const T* __restrict__ x, int n, T* sums) {
  SHARED(T, partial, kThreads);
  const int t = int(threadIdx.x);
  T sum = 0;
  for (int i = int(blockIdx.x) * kThreads + t; i < n; i += int(gridDim.x) * kThreads) sum += x[i];
  partial[t] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) partial[t] += partial[t + half];
    if (synced || half != 64) __syncthreads();
  }
  if (t == 0) sums[blockIdx.x] = partial[0];
}

// Two block sums through one array. Without the barrier after the first is read, a warp that runs
// ahead overwrites it: only a schedule in which warps drift apart shows that.
template <bool synced>
__device__ __forceinline__ float block_sum(float value, float* partial) {
#pragma unroll
  for (unsigned delta = 16; delta > 0; delta /= 2)
    value += __shfl_down_sync(kWholeWarp, value, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += partial[warp];
  if (synced) __syncthreads();
  return sum;
}

template <bool synced> __global__ void two_sums(float* sums) {
  SHARED(float, partial, 32);
  const float first = block_sum<synced>(1.0f, partial);
  const float second = block_sum<synced>(3.0f, partial);
  sums[2 * threadIdx.x] = first;
  sums[2 * threadIdx.x + 1] = second;
}

// Even threads write shared memory, then all is copied out.
__global__ void read_unwritten(float* floats, double* doubles, int* ints) {
  SHARED(float, a, 64);
  SHARED(int, b, 64);
  DYNAMIC_SHARED(double, c);
  const unsigned t = threadIdx.x, out = blockIdx.x * 64 + t;
  if (t % 2 == 0) {
    a[t] = 1;
    b[t] = 2;
    c[t] = 3;
  }
  __syncthreads();
  floats[out] = a[t];
  ints[out] = b[t];
  doubles[out] = c[t];
}

// Sums of whole and partial warps: lanes that do not exist are not added.
template <class T> __global__ void warp_sums(const T* x, T* sums) {
  const unsigned first = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  const unsigned lanes = min(32u, blockDim.x - first);
  const unsigned mask = __ballot_sync(kWholeWarp, 1);
  T value = x[threadIdx.x];
  for (unsigned delta = 16; delta > 0; delta /= 2) {
    const T other = __shfl_down_sync(mask, value, delta);
    if (lane + delta < lanes) value += other;
  }
  if (lane == 0) sums[first / 32] = value;
}

__global__ void read_missing_lane(float* out) {
  out[threadIdx.x] = __shfl_down_sync(kWholeWarp, 1.0f, 1);
}

// out[kind][lane]; one warp.
__global__ void every_warp_operation(int* out) {
  const int lane = int(threadIdx.x);
  int row = 0;
  const auto put = [&](int value) { out[32 * row++ + lane] = value; };
  put(__shfl_sync(kWholeWarp, lane, 5));
  put(__shfl_sync(kWholeWarp, lane, lane + 1, 8));
  put(__shfl_up_sync(kWholeWarp, lane, 3));
  put(__shfl_up_sync(kWholeWarp, lane, 3, 8));
  put(__shfl_down_sync(kWholeWarp, lane, 3));
  put(__shfl_down_sync(kWholeWarp, lane, 3, 8));
  put(__shfl_xor_sync(kWholeWarp, lane, 6));
  put(__shfl_xor_sync(kWholeWarp, lane, 12, 8));
  put(int(__ballot_sync(kWholeWarp, lane % 3 == 0)));
  put(__any_sync(kWholeWarp, lane == 31));
  put(__all_sync(kWholeWarp, lane != 31));
  if (lane < 16)
    put(__shfl_xor_sync(0x0000FFFFu, lane, 1));
  else
    put(__shfl_xor_sync(0xFFFF0000u, lane, 2));
}

__global__ void misused(int way, int* out) {
  const unsigned t = threadIdx.x;
  if (way == 0) {  // fine: exited threads count as arrived
    if (t >= 32) return;
    __syncthreads();
  } else if (way == 1) {  // a barrier of its own for half of the block
    if (t < 32) __syncthreads();
    __syncthreads();
  } else if (way == 2) {  // a barrier here, a shuffle there
    if (t % 2)
      __syncthreads();
    else
      __shfl_xor_sync(kWholeWarp, t, 1);
  } else if (way == 3) {  // a shuffle with lanes that are gone
    if (t % 32 == 7) return;
    __shfl_xor_sync(kWholeWarp, t, 1);
  } else if (way == 4) {  // masks that do not agree
    __shfl_xor_sync(t % 2 ? kWholeWarp : 0x7FFFFFFFu, t, 2);
  } else if (way == 5) {  // not in its own mask
    __syncwarp(1u);
  }
  out[blockIdx.x * blockDim.x + t] = 1;
}

// The last block to arrive adds what the others left, in a fixed order.
__global__ void last_arriver_sum(const float* x, float* partial, unsigned* arrived, float* sum) {
  SHARED(float, values, kThreads);
  SHARED(int, is_last, 1);
  const unsigned t = threadIdx.x;
  values[t] = x[blockIdx.x * kThreads + t];
  __syncthreads();
  if (t == 0) {
    float total = 0;
    for (int i = 0; i < kThreads; ++i) total += values[i];
    partial[blockIdx.x] = total;
    __threadfence();
    is_last[0] = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last[0] && t == 0) {
    __threadfence();
    float total = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
    *sum = total;
    *arrived = 0;
  }
}

// Rows of 128 floats through two buffers: one is copied to while the other is added up. `kept` groups of copies may
// still be on their way when a row is read; 1 is right.
template <int kept> __global__ void sum_rows(const float* x, int rows, float* sums) {
  SHARED(float4, buffer, 2 * 32);
  const unsigned t = threadIdx.x;
  copy_async16(&buffer[t], x + 4 * t);
  commit();
  float sum = 0;
  for (int row = 0; row < rows; ++row) {
    const bool more = row + 1 < rows;
    copy_async16_or_zero(&buffer[(row + 1) % 2 * 32 + t], x + 128 * (row + 1) + 4 * t, more);
    commit();
    wait<kept>();
    __syncwarp();
    const float4 other = buffer[row % 2 * 32 + (t + 1) % 32];
    sum += other.x + other.y + other.z + other.w;
    __syncwarp();
  }
  wait<0>();
  const float4 past = buffer[rows % 2 * 32 + t];
  sums[t] = sum + past.x + past.y + past.z + past.w;
}

__global__ void copy_wrongly(int way, const float* x, float* to) {
  SHARED(float4, values, 2);
  float* const floats = &values[0].x;
  if (way == 0) copy_async16(floats, x + 1);
  else if (way == 1) copy_async16(floats + 1, x);
  else if (way == 2) copy_async4(to, x);
  else copy_async4(floats + 1, x + 1);
  commit();
  wait<0>();
  *to = floats[1];
}

__global__ void rectify(float* x) { x[threadIdx.x] = relu_nan(x[threadIdx.x]); }

// Vectors by one load each, and a counter that wraps.
__global__ void read_vectors(const float4* __restrict__ x, const uint2* __restrict__ bits, unsigned* counter,
                             float4* to) {
  const float4 v = __ldg(&x[threadIdx.x]);
  const uint2 two = __ldg(&bits[threadIdx.x]);
  to[threadIdx.x] = make_float4(v.w, v.x + float(two.x), v.y + float(two.y), v.z);
  atomicInc(counter, 9);
}

struct Table {
  const float* x[250];
  float* y;
  int64_t n;
  int8_t flags[512];
};

__global__ void sum_table(Table table, float scale) {
  const unsigned i = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x * blockDim.y +
                     threadIdx.y * blockDim.x + threadIdx.x;
  if (i >= table.n) return;
  table.flags[0] = int8_t(table.flags[0] + 1);  // each thread has its own copy
  float sum = 0;
  for (const float* x : table.x) sum += x[i];
  table.y[i] = scale * sum * table.flags[0];
}

__global__ void eleven_barriers(float* out) {
  SHARED(float, partial, kThreads);
  partial[threadIdx.x] = 0;
  for (int i = 0; i < 11; ++i) {
    partial[(threadIdx.x + unsigned(i)) % kThreads] += 1;
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}

__global__ void write_past_the_end(float* x, int n) { x[n] = 1; }

__global__ void write_past_shared(float* x) {
  SHARED(float, values, 64);
  values[threadIdx.x + 1] = 1;
  __syncthreads();
  x[0] = values[1];
}

extern "C" {

const char* failed_kernel_name() { return failed_kernel.c_str(); }

int run_tree_sum(int blocks, int synced, const float* x, int n, float* sums) {
  return launch(synced ? tree_sum<float, true> : tree_sum<float, false>, blocks, kThreads, 0,
                nullptr, x, n, sums);
}
int run_two_sums(int synced, float* sums) {
  return launch(synced ? two_sums<true> : two_sums<false>, 1, kThreads, 0, nullptr, sums);
}
int run_read_unwritten(float* floats, double* doubles, int* ints) {
  return launch(read_unwritten, 2, 64, 64 * sizeof(double), nullptr, floats, doubles, ints);
}
int run_warp_sums_float(int threads, const float* x, float* sums) {
  return launch(warp_sums<float>, 1, threads, 0, nullptr, x, sums);
}
int run_warp_sums_double(int threads, const double* x, double* sums) {
  return launch(warp_sums<double>, 1, threads, 0, nullptr, x, sums);
}
int run_read_missing_lane(int threads, float* out) {
  return launch(read_missing_lane, 1, threads, 0, nullptr, out);
}
int run_every_warp_operation(int* out) {
  return launch(every_warp_operation, 1, 32, 0, nullptr, out);
}
int run_misused(int way, int* out) { return launch(misused, 2, 64, 0, nullptr, way, out); }
int run_last_arriver_sum(int blocks, const float* x, float* partial, unsigned* arrived, float* sum) {
  return launch(last_arriver_sum, blocks, kThreads, 0, nullptr, x, partial, arrived, sum);
}
int run_sum_rows(int kept, const float* x, int rows, float* sums) {
  return launch(kept == 0 ? sum_rows<0> : kept == 1 ? sum_rows<1> : sum_rows<2>, 1, 32, 0, nullptr, x, rows, sums);
}
int run_copy_wrongly(int way, const float* x, float* to) {
  return launch(copy_wrongly, 1, 1, 0, nullptr, way, x, to);
}
int run_rectify(int threads, float* x) { return launch(rectify, 1, threads, 0, nullptr, x); }
int run_read_vectors(const float4* x, const uint2* bits, unsigned* counter, float4* to) {
  return launch(read_vectors, 1, 32, 0, nullptr, x, bits, counter, to);
}
int run_sum_table(const float* x, float* y, int64_t n) {
  Table table = {};
  for (const float*& row : table.x) row = x;
  table.y = y;
  table.n = n;
  return launch(sum_table, dim3(3, 2), dim3(8, 4), 0, nullptr, table, 2);
}
int run_eleven_barriers(float* out) {
  return launch(eleven_barriers, 64, kThreads, 0, nullptr, out);
}
int run_sized(unsigned grid, unsigned block, size_t shared_bytes, float* out) {
  return launch(read_missing_lane, grid, block, shared_bytes, nullptr, out);
}
int run_write_past_the_end(float* x, int n) {
  return launch(write_past_the_end, 1, 1, 0, nullptr, x, n);
}
int run_write_past_shared(float* x) { return launch(write_past_shared, 1, 64, 0, nullptr, x); }
}
