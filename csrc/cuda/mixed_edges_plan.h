// Describes one call of mixed_edges as the kernels see it: jobs in device memory, in the order in which they are
// launched. Tensors are contiguous [N, C, rows, cols].
//
// A launch runs all jobs of one kind of a level of the DAG (or, on the way back, of one state): blockIdx.y picks
// the job. So the launches grow with the depth of the DAG, not with its edges: about 1,500 a pass of the default
// network, where eager takes 17,154. The tables of jobs are built on the host and copied by a kernel whose argument
// they are: a copy from host memory would be read again, and stale, when a CUDA graph is replayed.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "launch.h"

#include "../formulas/mixed_edges.h"

namespace fastnas::cuda {

constexpr int kMostGroups = 32;       // groups of images whose partial sums are added in order
constexpr int kTileElements = 8192;   // channels times pixels of a tile: four 4x4 pieces a thread
constexpr int kMostTensorChannels = 256;  // of which 32 pixels are a tile
constexpr int kMostChannels = kTileElements / 4;
constexpr int kPatchFloats = 4096;    // of staged input: a few channels of a tile with its halo; more if one needs more

struct Grid {
  int rows, cols;
  FASTNAS_HD int pixels() const { return rows * cols; }
};

struct Range {
  int first, last;
  int count() const { return last - first; }
};

// Planes are those of a tensor, or of a slice of its channels. `wide`: of floats, else of bfloat16.
struct Planes {
  const void* data;
  int64_t image;  // elements from one image to the next
  Grid grid;
  bool wide;
};

// Says how a grid is cut into tiles. `pitch` is the floats from one channel of a tile to the next in shared memory:
// 4 more than its pixels (a multiple of 4), so that the quads of pixels which neighbouring threads read of
// neighbouring channels lie in different banks. With tiles of 32, 64 or 256 pixels and no padding all channels
// would begin in bank 0, and a warp that reads eight of them at once would wait eight times.
struct Tiling {
  Grid grid, tile;
  int down, across, pitch;
  FASTNAS_HD int count() const { return down * across; }
};

// A half is depthwise -> pointwise -> batch norm. A sep_conv is two of them, which stand one after the
// other in the table. As on the CPU z is never formed: w BN(W u) = A (u - mean u), with mean and
// variance from mean(u) and cov(u).
struct Half {
  Planes in;  // relu is applied; of a second half it is v, which relu does not change
  const void *taps, *pointwise;
  int size, dilation, stride;
  bool second, final;       // of a sep_conv; its batch norm's output is weighted and summed
  int weight, target;       // index in w; node
  float *stats, *shift;     // [2, C]; minus mean(u)
  float* gram;              // cov(u) for dL/dW, or null
  double *mean, *cov;       // of u
  float *fold, *bias;       // [C][width] of A transposed; -A mean(u), only outside of training
  float* u;  // [N, C, rows, cols], written for one level and read by all its products; null where it was kept
  void *kept, *output;      // u, centred, and, of a first half of a sep_conv, v; null: not stored
  // backward
  Planes dy;
  float *from_dy, *from_u, *du_bias, *du;  // dL/du = from_dy dy + from_u u + du_bias
  double *coefficient, *dy_mean, *q;       // [C]
  float *dv, *dtaps;                       // of a sep_conv's first half: dL/dv; [groups][C][taps]
  void *dD, *dW;
  FASTNAS_HD int taps_count() const { return size * size; }
  FASTNAS_HD int pad() const { return dilation * (size / 2); }
};

// Names a tensor whose channels' mean and spread are wanted: a pool of a state, a strided skip, a state that noise
// is relative to. `parts` [groups][C][2] are means and centred squares.
struct Gathered {
  Planes z;
  double* parts;
};

// Describes a pool of a state, for all edges that leave it with this stride: z is computed once for all of them,
// and on the way back their dL/dz are added before they go through the window together.
struct Pool {
  Planes x;
  bool average;
  int stride, first_plain, last_plain;  // the terms that read it, in `pool_plains`
  float *z, *dz;                        // [N, C, rows, cols]; sum of the terms' gradients
  uint8_t* winner;                      // of a max-pool's windows
};

// Describes a strided skip: z = concat(W1 r, W2 r one pixel further), r = relu(x) at every second pixel.
struct Reduce {
  Planes x;
  const void* params[2];
  void* dparams[2];
  int plain;
  float *z, *matrix, *back;  // [C][width]: W transposed, and W
  float* dx;                 // [2][N, C, rows, cols]
};

// Describes a term that is no convolution: z, batch normalised or not, noisy or not.
struct Plain {
  Planes z;
  int gathered, pool;       // of its statistics; that it is; -1: none
  bool normed, noisy, strided;
  int weight, skip, target, ordinal;
  float *stats, *mean, *rstd;  // [C]
  // backward
  Planes dy;
  double* dots;             // [groups][3][C]: <dy, z - mean>, sum dy, <dy, z with noise> or <dy, noise>
  float *dy_mean, *rstd_q;
};

struct Term { int half, plain; };  // one of them -1; both: its edge is not in the path

// Lists what a candidate of an edge needs, -1 where it needs none: indices of jobs.
struct Candidate { int first_half = -1, last_half = -1, plain = -1, gathered = -1, pool = -1, reduce = -1; };

// A slot is an edge of a sampled path. It has one place in the launches for a job of each kind, two for halves, so
// that a launch is of the same size whichever candidate the path takes, and one CUDA graph serves all paths.
struct Slot { int edge, term; };

// Holds the jobs of one kind. Of a sampled path the i-th of a launch is the one that `picked` says, -1: none. The
// paths are read on the device: no launch waits for the host to know them.
template <class T> struct Jobs {
  T* all;
  const int* picked;
  __device__ const T* at(int i) const {
    const int k = picked ? picked[i] : i;
    return k < 0 ? nullptr : all + k;
  }
};

// Holds the sampled candidates of the edges, and where pick_kernel notes the jobs that they need.
struct Picks {
  const int64_t* choice;        // [edges]
  const Slot* slots;            // [edges], by the state that they leave
  const Candidate* candidates;  // [edges][count]
  int edges, count;
  int *halves, *gathered, *pools, *reduces, *plains;
};

// Says what the edges of one level add to a node. The sum of a node is complete after the level of its last edge:
// the first level writes it (`opens`), the last writes the output (`closes`), those between add in fp32.
struct Sum {
  int node, first, last;    // terms
  bool opens, closes;
  float* sum;               // planes `sum_image` apart; the output itself where that is float
  int64_t sum_image;
};

// Describes a state on the way back: everything that leaves it, as launches count it. Its gradient is summed over
// all of that by the block that has the pixel, so it is written once and needs no atomics.
struct Source {
  Planes x;
  Tiling tiling;
  Range halves, pools, reduces, plains;
  Planes dout;      // of a node; null data: the state is an input
  void* dx;         // float for a node
  bool wanted;
};

// Holds what every kernel gets by value, with the launch: sizes, the tables, and the buffers of the call. A few
// hundred bytes of kernel parameters are constant memory and cost no load of their own.
struct Plan {
  int64_t images;
  int C, width, groups, nodes;  // width: C up to a multiple of 4
  bool wide, tensor;            // the call is of floats, not of bfloat16; products on tensor cores
  int patch_floats;
  Grid out;
  Tiling tiling, strip_tiling;  // for products of all channels; for convolutions of a few
  Jobs<Half> halves;
  Jobs<Gathered> gathered;
  Jobs<Pool> pools;
  Jobs<Reduce> reduces;
  Jobs<Plain> plains;
  const int* pool_plains;
  Term* terms;
  const Sum* sums;
  const Source* sources;
  float* partial;               // [jobs][groups][C C + 2 C]
  const float* w;
  void* output;
  double *dw, *std;
  double eps;
  NoiseForm form;
  const double* level;
  const int64_t* rng;
  bool training, wants_params;

  FASTNAS_HD int64_t samples() const { return images * out.pixels(); }
  FASTNAS_HD int64_t partial_size() const { return int64_t(C) * C + 2 * C; }
  FASTNAS_HD int64_t first_image(int group) const { return images * group / groups; }
  FASTNAS_HD double group_samples(int group) const {
    return double((first_image(group + 1) - first_image(group)) * out.pixels());
  }
};

// Hands out device addresses in one piece of memory; from a null base it only measures. Pieces are 256-aligned, as
// float4 loads and whole cache lines want them.
struct DeviceArena {
  char* base;
  size_t used = 0;
  template <class T> T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
};

// Takes at most 32 columns, so that a warp reads whole rows, and as many rows as `most_pixels` and shared memory
// allow. The pixels of a tile are rounded up to whole quads.
inline Tiling tiling_of(Grid grid, int channels, int most_pixels) {
  const int most = std::max(4, std::min(most_pixels, kTileElements / channels / 4 * 4));
  const int cols = std::min({grid.cols, 32, most});
  const int rows = std::max(1, std::min(grid.rows, most / cols));
  const int pixels = (rows * cols + 3) / 4 * 4;
  return {grid, {rows, cols}, (grid.rows + rows - 1) / rows, (grid.cols + cols - 1) / cols, pixels + 4};
}

// Says how many rows of output a thread computes in one column, so that a loaded input serves several taps: for a
// 3x3 at stride 1, 10 rows of input give 8 of output, 30 loads for 72 FMA.
FASTNAS_HD constexpr int strip_rows(int stride) { return stride == 1 ? 8 : 4; }

// Sizes the input that a tile of a half's output needs, for whole strips: the halo is part of the
// patch, each block loads it.
FASTNAS_HD Grid patch_size(const Half& h, const Tiling& t) {
  const int strip = strip_rows(h.stride), rows = (t.tile.rows + strip - 1) / strip * strip;
  const int reach = (h.size - 1) * h.dilation + 1;
  return {(rows - 1) * h.stride + reach, (t.tile.cols - 1) * h.stride + reach};
}

// Builds the tables of a call and where they lie on the device. It reads shapes and addresses only, never the
// values of a tensor, so nothing waits for the device.
class Planner {
 public:
  const MixedEdgesParams& p;
  const size_t element;
  Plan plan{};
  std::vector<Half> halves;
  std::vector<Gathered> gathered;
  std::vector<Pool> pools;
  std::vector<Reduce> reduces;
  std::vector<Plain> plains;
  std::vector<int> pool_plains;
  std::vector<Term> terms;
  std::vector<Sum> sums;
  std::vector<Source> sources;
  std::vector<Slot> slots;
  std::vector<Candidate> candidates;
  std::vector<int> half_begin, gathered_begin, pool_begin, reduce_begin, plain_begin;  // by state, and one past
  std::vector<int> slot_begin;
  std::vector<Range> level_sums;
  DeviceArena arena;

  Planner(const MixedEdgesParams& params, bool measure)
      : p(params), element(params.dtype == DType::f32 ? 4 : 2),
        arena{measure ? nullptr : static_cast<char*>(params.workspace)} {
    lay_out();
    pack_tables();
  }

  int states() const { return p.inputs + p.nodes; }
  // Finds the states whose edges a level computes: the inputs, then node by node.
  Range level_states(int level) const {
    return level == 0 ? Range{0, p.inputs} : Range{p.inputs + level - 1, p.inputs + level};
  }
  // These are the jobs of some states, as launches count them.
  Range halves_of(Range states) const { return jobs_of(half_begin, states, 2); }
  Range gathered_of(Range states) const { return jobs_of(gathered_begin, states); }
  Range pools_of(Range states) const { return jobs_of(pool_begin, states); }
  Range reduces_of(Range states) const { return jobs_of(reduce_begin, states); }
  Range plains_of(Range states) const { return jobs_of(plain_begin, states); }

  // Copies the halves of all candidates, on the host, where a launch is sized by the largest of them.
  std::vector<Half> all_halves(Range states) const {
    return {halves.begin() + half_begin[states.first], halves.begin() + half_begin[states.last]};
  }

  // Copies the tables to the device, as kernel arguments, and has the jobs of a sampled path picked there.
  int upload(void* stream) const;

 private:
  char* tables = nullptr;
  Picks picks{};
  std::vector<char> image;  // of all tables

  bool backward() const { return p.dout != nullptr; }
  bool sampled() const { return p.choice != nullptr; }
  int weight_of(const EdgeTerm& t) const { return sampled() ? t.edge : t.edge * p.candidates + t.weight; }
  Range jobs_of(const std::vector<int>& begin, Range states, int a_slot = 1) const {
    if (!sampled()) return {begin[states.first], begin[states.last]};
    return {a_slot * slot_begin[states.first], a_slot * slot_begin[states.last]};
  }
  int64_t plane_size() const { return p.images * int64_t(p.channels) * plan.out.pixels(); }
  Grid grid_of(int state) const {
    if (state >= p.inputs) return plan.out;
    return {int(p.sizes[2 * state]), int(p.sizes[2 * state + 1])};
  }
  const char* slice(const void* base, int node) const {
    return static_cast<const char*>(base) + size_t(node) * p.channels * plan.out.pixels() * element;
  }
  int64_t out_image() const { return int64_t(p.nodes) * p.channels * plan.out.pixels(); }
  Planes state_planes(int state) const {
    if (state < p.inputs) return {p.x[state], int64_t(p.channels) * grid_of(state).pixels(), grid_of(state), plan.wide};
    return {slice(p.out, state - p.inputs), out_image(), plan.out, plan.wide};
  }
  Planes own_planes(const void* data, bool wide) const {
    return {data, int64_t(p.channels) * plan.out.pixels(), plan.out, wide};
  }

  void lay_out();
  void add_state(int state, std::vector<std::vector<Term>>& by_edge);
  void begin_state();
  Candidate add_convolution(const EdgeTerm& t, const Edge& e);
  Candidate add_plain(int i, const EdgeTerm& t, const Edge& e, int state);
  void add_reduce(const EdgeTerm& t, const Edge& e);
  int pool_of(int state, const EdgeTerm& t, int stride);
  void add_sums(const std::vector<std::vector<Term>>& by_edge);
  void pack_tables();
  template <class T> T* pack(const std::vector<T>& table);

  std::vector<float*> node_values;  // forward: their sums, the output itself where that is float; backward: gradients
};

}  // namespace fastnas::cuda
