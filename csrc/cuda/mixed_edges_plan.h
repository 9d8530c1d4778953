// Describes one call of mixed_edges as the kernels see it: jobs in device memory, in the order in which they are
// launched. Tensors are contiguous [N, C, rows, cols].
//
// A launch runs all jobs of a level of the DAG (or, on the way back, of one state): blockIdx.y picks the job. So the
// launches grow with the depth of the DAG, not with its edges: 4 a level forward and 6 a state backward, about 340 a
// pass of the default network, where eager takes 17,154. The tables of jobs are built on the host and copied by a
// kernel whose argument they are: a copy from host memory would be read again, and stale, when a CUDA graph is
// replayed.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "launch.h"

#include "../formulas/mixed_edges.h"

namespace fastnas::cuda {

constexpr int kMostGroups = 64;       // groups of images whose partial sums are added in order
constexpr int kClusterGroups = 8;     // of which a first step adds these, a second what comes of it
constexpr int kTileElements = 8192;   // channels times pixels of a tile: four 4x4 pieces a thread
constexpr int kMixedElements = 4096;  // of a tile of products: 32 sums a thread
constexpr int kMostTilePixels = 512;  // 16 rows of 32 columns, which are 8 strips of a warp's 32
constexpr int kMostTensorChannels = 256;  // of which 32 pixels are a tile
constexpr int kMostFusedChannels = kTileElements / 64;  // of which a tile holds a whole strip, 8 x 8
constexpr int kMostChannels = kTileElements / 4;
constexpr int kMostSourcePixels = 1024;  // of a tile of x's gradient: 16 strips of a warp's 32
constexpr int kCountersOfSum = 1 + kMostGroups / kClusterGroups;  // of merged clusters, and of the ended blocks of each
constexpr int kCountersOfTerm = 2 * (kCountersOfSum + 1);  // two halves and their taps, or a value with two parts
constexpr int kGroupsOfTaps = 2;      // of which a warp sums dL/dD, whose partial sums are the largest of all to read
constexpr int64_t kMostPartialBytes = int64_t(512) << 20;  // of partial sums; groups get fewer beyond it

struct Grid {
  int rows, cols;
  FASTNAS_HD int pixels() const { return rows * cols; }
};

struct Range {
  int first, last;
  int count() const { return last - first; }
};

// Planes are those of a tensor, or of a slice of its channels, of values of `type`. `aligned`: each row begins at a
// multiple of four values, so that a quad of them is one access of 16 bytes (8 of a 16-bit type).
struct Planes {
  const void* data;
  int64_t image;  // elements from one image to the next
  Grid grid;
  DType type;
  bool aligned;
};

// Says how a grid is cut into tiles. A tile has a multiple of four columns, so that its quads of pixels are parts of
// one row; what it has beyond the plane is 0. `pitch` is the floats from one channel of a tile to the next in shared
// memory: 4 more than its pixels, so that the quads which neighbouring threads read of neighbouring channels lie in
// different banks. With tiles of 32, 64 or 256 pixels and no padding all channels would begin in bank 0, and a warp
// that reads eight of them at once would wait eight times.
struct Tiling {
  Grid grid, tile;
  int down, across, pitch;
  int quad_bits;  // of a power of two that is at least quads()
  FASTNAS_HD int count() const { return down * across; }
  FASTNAS_HD int quads() const { return tile.pixels() / 4; }
  // The tile's rows are those of the plane, so that a channel of a tile is one run of memory.
  FASTNAS_HD bool whole_rows() const { return tile.cols == grid.cols; }
};

// Says how products read a tile and their matrix in shared memory, a few channels at a time (mixed_edges_mix.h).
struct PartLayout {
  int channels, pitch;  // floats from a channel to the next
  int apart, floats;    // from four outputs of the matrix to the next; of a buffer
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
  double* mean;             // mean(u), [C]
  float* weights;           // W as floats, [C][C]; null where it is
  float *fold, *bias;       // A as a Matrix; -A mean(u), only outside of training
  float* u;      // [N, C, rows, cols], for one level; null where forward kept it
  void *kept, *output;      // u, centred, and, of a first half of a sep_conv, v; null: not stored
  float* partial;           // [groups][partial_size]
  unsigned* done;           // [kCountersOfSum]
  // backward
  Planes dy;
  float *from_dy, *from_u, *du_bias;       // dL/du = from_dy dy + from_u u + du_bias: two of Matrix, [C]
  void* du;                                // [N, C, rows, cols] of the call's dtype
  double *coefficient, *q;                 // [C]
  void* dv;                                // of a sep_conv's first half: dL/dv, like du
  float* dtaps;                            // [tap_groups][taps_size]
  unsigned* taps_done;
  void *dD, *dW;
  FASTNAS_HD int taps_count() const { return size * size; }
  FASTNAS_HD int pad() const { return dilation * (size / 2); }
};

// Tells what a value is made from: the windows of a pool, relu(x) at every second pixel, or the state x itself.
enum class Made { average, maximum, strided, state };

// Describes a value that is no convolution, for all the terms that read it: a pool of a state, computed once for all
// edges that leave it with this stride; a strided skip, z = concat(W1 r, W2 r one pixel further), r = relu(x) at
// every second pixel; or the state itself, which skips read. On the way back dL/dz of the terms that read a pool are
// added before they go through its windows together.
struct Value {
  Planes x, z;
  Made made;
  int stride, first_plain, last_plain;  // the terms that read it, in `readers`
  double* parts;                        // [groups][3][C]: pivot, sums of deviations from it, of squares; or null
  float *winner, *dz;                   // of a maximum: which pixel of the window it is, 0 to 8; sum of dL/dz
  unsigned* done;
  // a strided skip
  const void* params[2];
  void* dparams[2];
  float *matrix, *back, *partial;       // W and its transpose as Matrix; [2][groups][partial_size]
  float* dx;                            // [2][N, C, rows, cols]
  unsigned* reduce_done;                // [2][kCountersOfSum]
};

// Describes a term that is no convolution: z, batch normalised or not, noisy or not.
struct Plain {
  Planes z;
  int value;                // that it reads; -1: x, of which nothing is gathered
  bool normed, noisy, strided;
  int weight, skip, target, ordinal;
  float *stats, *rstd;      // [2, C]; [C]
  // backward
  Planes dy;
  double* dots;             // [groups][3][C]: <dy, z - mean>, sum dy, <dy, z with noise> or <dy, noise>
  float *dy_mean, *rstd_q;
};

struct Term { int half, plain; };  // one of them -1; both: its edge is not in the path

// Lists what a candidate of an edge needs, -1 where it needs none: indices of jobs.
struct Candidate { int first_half = -1, last_half = -1, plain = -1, value = -1; };

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
  int *halves, *values, *plains;
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
  Range halves, values, plains;
  Planes dout;      // of a node; null data: the state is an input
  void* dx;         // float for a node
  bool wanted;
};

// Holds what every kernel gets by value, with the launch: sizes, the tables, and the buffers of the call. A few
// hundred bytes of kernel parameters are constant memory and cost no load of their own.
struct Plan {
  int64_t images, a_group, longer;
  int C, width, groups, nodes;  // width: C up to a multiple of 4
  DType type;                   // of tensors, du and dv; u, node sums and their gradients are floats
  bool tensor;                  // products on tensor cores
  // `fused`: a tile of `tiling` holds whole strips, so that the kernel which convolves also sums over pixels. Beyond
  // kMostFusedChannels u and z are computed first, by a launch of their own in tiles of `strips`.
  bool fused;
  Grid out;
  Tiling tiling, product, strips;  // of sums over pixels; of products; of convolutions alone
  PartLayout parts;                // of products
  Jobs<Half> halves;
  Jobs<Value> values;
  Jobs<Plain> plains;
  const int* readers;
  Term* terms;
  const Sum* sums;
  const Source* sources;
  const float* w;
  void* output;
  double *dw, *std;
  double eps;
  NoiseForm form;
  const double* level;
  const int64_t* rng;
  bool training, backward, wants_params;
  bool output_aligned;  // of output, and of the node sums that may lie in it

  FASTNAS_HD int64_t plane() const { return out.pixels(); }
  FASTNAS_HD int64_t image() const { return C * plane(); }
  FASTNAS_HD int64_t samples() const { return images * plane(); }
  // A partial sum is a [C][width] matrix and five rows of it.
  FASTNAS_HD int64_t partial_size() const { return int64_t(C + 5) * width; }
  FASTNAS_HD int clusters() const { return (groups + kClusterGroups - 1) / kClusterGroups; }
  FASTNAS_HD int64_t matrix_size() const { return int64_t(C) * width; }
  // What a warp sums of dL/dD, and the floats of it, [C][taps] for whole quads.
  FASTNAS_HD int tap_groups() const { return (groups + kGroupsOfTaps - 1) / kGroupsOfTaps; }
  FASTNAS_HD int64_t taps_size(int taps) const { return (int64_t(C) * taps + 3) / 4 * 4; }
  // Groups have `a_group` images, the first `longer` of them one more; nobody divides to find one.
  FASTNAS_HD int64_t first_image(int group) const { return group * a_group + (group < longer ? group : longer); }
  // A Matrix is read by products four outputs at a time, for one input after the other: [out / 4][in][4].
  FASTNAS_HD int64_t at(int in, int out) const { return (int64_t(out / 4) * C + in) * 4 + out % 4; }
  // A tensor [N, C, rows, cols] of the workspace, or of its size.
  FASTNAS_HD Planes own(const void* data, DType of) const { return {data, image(), out, of, out.cols % 4 == 0}; }
  FASTNAS_HD Planes own(const void* data) const { return own(data, type); }
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

FASTNAS_HD constexpr int rounded_up(int value, int step) { return (value + step - 1) / step * step; }

inline Tiling tiling_of(Grid grid, Grid tile) {
  int bits = 0;
  while (4 << bits < tile.pixels()) ++bits;
  return {grid, tile, (grid.rows + tile.rows - 1) / tile.rows, (grid.cols + tile.cols - 1) / tile.cols,
          tile.pixels() + 4, bits};
}

// Tiles for products take at most 32 columns, so that a warp reads whole rows, and as many rows as `most_pixels`
// and shared memory allow.
inline Tiling product_tiling(Grid grid, int channels, int most_pixels) {
  const int most = std::max(4, std::min(most_pixels, kTileElements / channels / 4 * 4));
  const int cols = std::min({rounded_up(grid.cols, 4), 32, most});
  return tiling_of(grid, {std::max(1, std::min(grid.rows, most / cols)), cols});
}

// Tiles for convolutions hold whole strips, 8 x 8, but where they end with the plane; a warp has 32 strips of `strip`
// rows and columns. `most_pixels` is at least 64.
inline Tiling strip_tiling(Grid grid, int most_pixels, int strip) {
  const int all = rounded_up(grid.cols, 4), few = std::min(8, grid.rows);
  const int cols = all <= 32 && all * few <= most_pixels ? all : std::max(8, std::min(32, most_pixels / few / 8 * 8));
  int across = 1;
  while (across * strip < cols) across *= 2;  // as lanes are: a power of two
  const int most = std::min(most_pixels / cols, 32 / across * strip);
  return tiling_of(grid, {grid.rows <= most ? grid.rows : most / 8 * 8, cols});
}

// Builds the tables of a call and where they lie on the device. It reads shapes and addresses only, never the
// values of a tensor, so nothing waits for the device.
class Planner {
 public:
  const MixedEdgesParams& p;
  const size_t element;
  Plan plan{};
  std::vector<Half> halves;
  std::vector<Value> values;
  std::vector<Plain> plains;
  std::vector<int> readers;
  std::vector<Term> terms;
  std::vector<Sum> sums;
  std::vector<Source> sources;
  std::vector<Slot> slots;
  std::vector<Candidate> candidates;
  std::vector<int> half_begin, value_begin, plain_begin;  // by state, and one past
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
  Range values_of(Range states) const { return jobs_of(value_begin, states); }

  // Copies the halves of all candidates, on the host, where a launch is sized by the largest of them.
  std::vector<Half> all_halves(Range states) const {
    return {halves.begin() + half_begin[states.first], halves.begin() + half_begin[states.last]};
  }
  std::vector<Value> all_values(Range states) const {
    return {values.begin() + value_begin[states.first], values.begin() + value_begin[states.last]};
  }

  // Copies the tables to the device, as kernel arguments, and has the jobs of a sampled path picked there.
  int upload(void* stream) const;

 private:
  char* tables = nullptr;
  unsigned* counters = nullptr;  // zeros when the call begins
  int counted = 0;
  float* matrices = nullptr;     // of the strided skips that are still to come
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
  Planes user_planes(const void* data, int64_t image, Grid grid) const {
    const bool aligned = grid.cols % 4 == 0 && reinterpret_cast<size_t>(data) % (4 * element) == 0;
    return {data, image, grid, plan.type, aligned};
  }
  Planes state_planes(int state) const {
    if (state < p.inputs) return user_planes(p.x[state], int64_t(p.channels) * grid_of(state).pixels(), grid_of(state));
    return user_planes(slice(p.out, state - p.inputs), out_image(), plan.out);
  }
  unsigned* count_up(int count) { return counters + std::exchange(counted, counted + count); }

  void lay_out();
  void lay_out_tiles();
  int count_groups() const;
  void add_state(int state, std::vector<std::vector<Term>>& by_edge);
  void begin_state();
  Candidate add_convolution(const EdgeTerm& t, const Edge& e);
  Candidate add_plain(int i, const EdgeTerm& t, const Edge& e, int state);
  int value_of(int state, Made made, int stride);
  void add_matrices(Value& value, const EdgeTerm& t);
  void add_sums(const std::vector<std::vector<Term>>& by_edge);
  void pack_tables();
  template <class T> T* pack(const std::vector<T>& table);

  std::vector<float*> node_values;  // forward: their sums, the output itself where that is float; backward: gradients
};

}  // namespace fastnas::cuda
