// Kernels that call every function of mixed_edges_strips.h and mixed_edges_pools.h; driven by test_strips.py.
#include "mixed_edges_pools.h"

using namespace fastnas;
using namespace fastnas::cuda;
using namespace fastnas::cuda::strips;

constexpr int kThreads = 128;

struct Staged {
  const void* data;
  int64_t image;
  Grid grid;
  DType type;
  bool aligned;
};

// One call: `from` and `beside` are staged, strips are written to `to` and `other`, [images][channels][written].
struct Job {
  Staged from, beside;
  const void* taps;
  DType tap_type;
  float *to, *other;
  int channels, size, dilation, stride, transposed;
  Tiling tiling;
};

// What a lane has of a pass: its strip of a tile, at (row, col) of the written grid.
struct Here {
  int channel, row, col, image;
  float *patch, *beside, *taps, *tile;
  int pitch, beside_pitch;
  Edges edges;
  Place place;
};

// Has a warp stage pass after pass and calls f for the lanes that have a strip, then copies the tile of each channel,
// which f may have filled, to `to`. Two patches, taps and tiles lie side by side, for each warp.
template <class F> __device__ void each_strip(const Job& job, F f) {
  DYNAMIC_SHARED(float, shared);
  const Tiling& t = job.tiling;
  const Reach reach{job.size, job.dilation, job.stride, job.transposed != 0};
  const Lanes lanes = lanes_of(t.tile, reach.strip());
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, floats = patch_floats(reach, t);
  const int tile_plane = t.tile.pixels() + 4, own = 2 * floats + tap_floats(reach, t) + lanes.channels * tile_plane;
  Patch patch = patch_of(reach, t, job.from.grid, shared + warp * own), beside = patch;
  beside.data += floats;
  // A gradient beside an input has its own, smaller patch, without halo.
  const Reach plain{1, 1, 1, false};
  const bool gradients = job.beside.data && !reach.transposed;
  if (gradients) beside = patch_of(plain, t, job.beside.grid, beside.data);
  float* const taps = shared + warp * own + 2 * floats;
  float* const tile = taps + tap_floats(reach, t);
  const Strip strip = strip_of_lane(lanes, t.tile, reach.strip());
  clear(patch, lanes.channels);
  clear(beside, lanes.channels);
  for (int first = warp * lanes.channels; first < job.channels; first += kThreads / 32 * lanes.channels) {
    const int channels = min(lanes.channels, job.channels - first);
    if (job.taps) stage_taps(job.taps, job.tap_type, job.size, first, channels, taps);
    for (int index = 0; index < t.count(); ++index) {
      const int row = index / t.across * t.tile.rows, col = index % t.across * t.tile.cols;
      place(patch, reach, row, col);
      place(beside, gradients ? plain : reach, row, col);
      stage(job.from, blockIdx.x, first, channels, patch);
      if (job.beside.data) stage(job.beside, blockIdx.x, first, channels, beside);
      wait_staged();
      const Here here{first + strip.channel, row + strip.row, col + strip.col, int(blockIdx.x),
                      patch.at(strip.channel, reach.below(row + strip.row), reach.below(col + strip.col)),
                      gradients ? beside.at(strip.channel, row + strip.row, col + strip.col)
                                : beside.at(strip.channel, reach.below(row + strip.row), reach.below(col + strip.col)),
                      taps + strip.channel * tap_pitch(job.size),
                      tile + strip.channel * tile_plane + strip.row * t.tile.cols + strip.col,
                      patch.pitch, beside.pitch, edges_of(reach, patch, reach.below(row + strip.row)),
                      {reach.below(row + strip.row), reach.below(col + strip.col), job.from.grid}};
      const bool exists = strip.inside && strip.channel < channels && here.row < t.grid.rows && here.col < t.grid.cols;
      if (exists) f(here, t.tile.rows - strip.row, t.tile.cols - strip.col);
      __syncwarp();
      for (int c = 0; c < channels && job.to; ++c)
        for (int i = lane; i < t.tile.pixels(); i += 32) {
          const int r = row + i / t.tile.cols, q = col + i % t.tile.cols;
          if (r < t.grid.rows && q < t.grid.cols)
            job.to[((int64_t(blockIdx.x) * job.channels + first + c) * t.grid.rows + r) * t.grid.cols + q] =
                tile[c * tile_plane + i];
        }
      __syncwarp();
    }
  }
}

struct Convolve {
  const Here& here;
  const Grid tile;
  int rows, cols;
  template <int K, int D, int S> __device__ void run() const {
    float acc[kSide<S>][kSide<S>] = {};
    convolve<K, D, S>(here.patch, here.pitch, here.edges, here.taps, acc);
    put_strip(acc, here.tile, tile.cols, rows, cols);
  }
};
struct Transpose {
  const Here& here;
  const Grid tile;
  int rows, cols;
  template <int K, int D, int S> __device__ void run() const {
    float acc[8][8] = {};
    transpose<K, D, S>(here.patch, here.pitch, here.edges, here.taps, acc);
    put_strip(acc, here.tile, tile.cols, rows, cols);
  }
};
// other[image][channel][K K][lane]: what each lane has.
struct Correlate {
  const Here& here;
  float* to;
  template <int K, int D, int S> __device__ void run() const {
    float dtap[K * K] = {};
    const int pitch = here.beside_pitch;
    correlate<K, D, S>(
        here.patch, here.pitch, here.edges,
        [&](int row, auto& g) { get_strip(g, here.beside + row * pitch, pitch); }, dtap);
    for (int k = 0; k < K * K; ++k) to[k * 32] += dtap[k];
  }
};

template <int N> __device__ void put_row(const Job& job, const Here& here, int r, const float (&row)[N], float* to) {
  const Grid grid = job.tiling.grid;
  const int64_t plane = int64_t(here.image) * job.channels + here.channel;
  for (int q = 0; q < N; ++q)
    if (here.row + r < grid.rows && here.col + q < grid.cols)
      to[(plane * grid.rows + here.row + r) * grid.cols + here.col + q] = row[q];
}
template <int S> __device__ void pool(const Job& job, bool averages) {
  Job own = job;
  own.to = nullptr;  // no tile: rows are written as they come
  each_strip(own, [&](const Here& here, int, int) {
    if (averages) {
      average<S>(here.patch, here.pitch, here.place, [&](int r, const auto& z) { put_row(job, here, r, z, job.to); });
      return;
    }
    maximum<S>(here.patch, here.pitch, here.place, [&](int r, const auto& z, const auto& winner) {
      put_row(job, here, r, z, job.to);
      put_row(job, here, r, winner, job.other);
    });
  });
}
template <int S> __device__ void pool_back(const Job& job) {
  each_strip(job, [&](const Here& here, int rows, int cols) {
    float acc[8][8] = {};
    if (job.beside.data) maximum_back<S>(here.patch, here.beside, here.pitch, here.edges, acc);
    else average_back<S>(here.patch, here.pitch, here.edges, acc);
    put_strip(acc, here.tile, job.tiling.tile.cols, rows, cols);
  });
}

__global__ void __launch_bounds__(kThreads, 4) convolve_kernel(Job job) {
  each_strip(job, [&](const Here& here, int rows, int cols) {
    with_kernel(job.size, job.dilation, job.stride, Convolve{here, job.tiling.tile, rows, cols});
  });
}
__global__ void __launch_bounds__(kThreads, 4) transpose_kernel(Job job) {
  each_strip(job, [&](const Here& here, int rows, int cols) {
    with_kernel(job.size, job.dilation, job.stride, Transpose{here, job.tiling.tile, rows, cols});
  });
}
__global__ void __launch_bounds__(kThreads, 4) correlate_kernel(Job job) {
  Job own = job;
  own.to = nullptr;  // no tile
  each_strip(own, [&](const Here& here, int, int) {
    const int64_t plane = int64_t(here.image) * job.channels + here.channel;
    float* const to = job.other + plane * job.size * job.size * 32 + threadIdx.x % 32;
    with_kernel(job.size, job.dilation, job.stride, Correlate{here, to});
  });
}
__global__ void __launch_bounds__(kThreads, 4) pool_kernel(Job job, int averages) {
  job.stride == 1 ? pool<1>(job, averages) : pool<2>(job, averages);
}
__global__ void __launch_bounds__(kThreads, 4) pool_back_kernel(Job job) {
  job.stride == 1 ? pool_back<1>(job) : pool_back<2>(job);
}

// to[lane]: where a lane's strip begins in the warp's patches, -1 if it has none.
__global__ void __launch_bounds__(32) places_kernel(Job job, int* to) {
  DYNAMIC_SHARED(float, shared);
  const Reach reach{job.size, job.dilation, job.stride, job.transposed != 0};
  const Tiling& t = job.tiling;
  const Patch patch = patch_of(reach, t, job.from.grid, shared);
  const Strip strip = strip_of_lane(lanes_of(t.tile, reach.strip()), t.tile, reach.strip());
  const float* const from = patch.at(strip.channel, reach.below(strip.row), reach.below(strip.col));
  to[threadIdx.x] = strip.inside ? int(from - shared) : -1;
}

size_t bytes_of(const Job& job) {
  const Reach reach{job.size, job.dilation, job.stride, job.transposed != 0};
  const size_t tiles = size_t(lanes_of(job.tiling.tile, reach.strip()).channels) * (job.tiling.tile.pixels() + 4);
  return sizeof(float) * kThreads / 32 * (2 * patch_floats(reach, job.tiling) + tap_floats(reach, job.tiling) + tiles);
}

extern "C" {

int run_convolve(const Job* job, int images) {
  return launch(convolve_kernel, images, kThreads, bytes_of(*job), nullptr, *job);
}
int run_transpose(const Job* job, int images) {
  return launch(transpose_kernel, images, kThreads, bytes_of(*job), nullptr, *job);
}
int run_correlate(const Job* job, int images) {
  return launch(correlate_kernel, images, kThreads, bytes_of(*job), nullptr, *job);
}
int run_pool(const Job* job, int images, int averages) {
  return launch(pool_kernel, images, kThreads, bytes_of(*job), nullptr, *job, averages);
}
int run_places(const Job* job, int* to) { return launch(places_kernel, 1, 32, bytes_of(*job), nullptr, *job, to); }
int run_pool_back(const Job* job, int images) {
  return launch(pool_back_kernel, images, kThreads, bytes_of(*job), nullptr, *job);
}
}
