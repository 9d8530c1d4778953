// One plain struct per op: the only thing a kernel sees. Filled by bind_*.cpp, passed by value.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastnas {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// How the draw d of a noisy term meets its input, and what d is made of (see formulas/mixed_sum.h).
enum class NoiseForm : int32_t {
  none = 0,
  gaussian_additive = 1,  // the only form whose spread is relative to std(x)
  gaussian_multiplicative = 2,
  uniform_additive = 3,
  uniform_multiplicative = 4,
  bernoulli_multiplicative = 5,  // dropout; not drawn on strided skips
};

// The pointer tables travel in the kernel argument block, which CUDA limits to 4 KiB.
constexpr int kMaxTerms = 128;

// Elements that one partial sum covers. Fixed, so results do not depend on threads or grid.
constexpr int64_t kBlock = 4096;

inline int64_t block_count(int64_t n) { return (n + kBlock - 1) / kBlock; }

struct MixedSumParams {
  int64_t n = 0;  // elements of every term
  int32_t terms = 0;
  DType dtype = DType::f32;
  NoiseForm form = NoiseForm::none;
  int32_t noisy_terms = 0;
  // Memory order is channels last when channels > 0; noise is indexed by the NCHW position.
  int64_t channels = 0;
  int64_t pixels = 0;

  const void* x[kMaxTerms] = {};   // terms that are not read may be null (backward, dx only)
  void* dx[kMaxTerms] = {};        // null: gradient not wanted
  int8_t ordinal[kMaxTerms] = {};  // position among the noisy terms, -1: no noise
  const void* w = nullptr;         // [terms], accumulation dtype
  void* y = nullptr;
  const void* dy = nullptr;
  void* dw = nullptr;               // [terms], accumulation dtype; null: not wanted
  double* partial = nullptr;        // CUDA: [blocks, terms] for dw, [noisy_terms, blocks, 3] for std
  double* std = nullptr;            // [noisy_terms] of the unbiased standard deviations
  const double* level = nullptr;    // shift, scale
  const int64_t* rng = nullptr;     // Philox key, offset of noisy term 0

  int32_t threads = 1;       // CPU
  void* stream = nullptr;    // CUDA
};
static_assert(std::is_trivially_copyable_v<MixedSumParams>);
static_assert(sizeof(MixedSumParams) <= 4096 - 64);

// What an edge of `mixed_edges` can do; `none` is no term at all.
enum class EdgeOp : int32_t {
  max_pool = 0, avg_pool = 1, skip = 2, reduce_skip = 3, sep_conv = 4, dil_conv = 5,
  dense_conv = 6, plain_avg_pool = 7,  // CPU only; the pool has no batch norm
};

// One candidate of an edge, as fastnas.spaces.TermRow counts it: nothing here follows from `op` alone.
struct EdgeTerm {
  EdgeOp op;
  int32_t edge, weight;      // w[edge][weight]
  int32_t size, dilation;    // of the depthwise or dense convolutions
  int32_t halves;            // depthwise -> pointwise -> batch norm: 2 of a sep_conv, 1 of a dil_conv, else 0
  int32_t param, norm;       // its first parameter and batch norm
  int32_t half;              // its first half, -1: it has none
  int32_t input, kept, skip; // its place among the terms with two halves, in `u` or `z`, and among the skips; -1: none
};

struct Edge {
  int32_t source, target, stride;    // state (inputs, then nodes), node
  int32_t first_term, last_term;
};

// Tensors are channels last, [N, rows, cols, C]; A is the accumulation dtype. What is not wanted is null.
struct MixedEdgesParams {
  DType dtype = DType::f32;
  int64_t images = 0;
  int32_t channels = 0, inputs = 0, nodes = 0, outputs = 0, edge_count = 0, candidates = 0;
  const Edge* edges = nullptr;
  const EdgeTerm* terms = nullptr;
  const int64_t* sizes = nullptr;       // [inputs][2] rows and columns; the nodes' follow from the strides
  const void* const* x = nullptr;       // [inputs]
  void* const* dx = nullptr;            // [inputs]
  // D [C, 1, k, k] and W [C, C] in turn; of a reduce_skip W [C/2, C] twice; of a dense_conv V [C, C, k, k]
  const void* const* params = nullptr;
  void* const* dparams = nullptr;       // all or null
  // CUDA: the candidate that each edge runs, in device memory, -1: none; then w and dw are [edges], halves are
  // counted two an edge, v, u and std one an edge, and what is not sampled is not written. Null: all of them.
  const int64_t* choice = nullptr;
  const void* w = nullptr;              // A [edges, candidates]
  double* dw = nullptr;                 // [edges, candidates], zeroed by the caller
  void* out = nullptr;                  // [N, rows, cols, outputs C]: the last nodes
  const void* dout = nullptr;
  void* stats = nullptr;    // A [norms, 2, C]: mean and biased variance; read where `training` is off
  void* shift = nullptr;    // A [halves, C]: -mean(u), kept for backward
  void* gram = nullptr;     // A [halves, C, C]: cov(u), kept for dL/dW
  void* v = nullptr;        // [sep_convs, N, rows, cols, C]: input of the second half; null: computed again
  void* u = nullptr;        // [terms with a 5x5 or larger kernel, ...]: last depthwise output, centred; null likewise
  void* z = nullptr;        // CPU: [dense 3x3 convolutions, N, rows, cols, C]: their outputs; null likewise
  void* inner = nullptr;    // CPU: [nodes that are no output, N, rows, cols, C]
  bool training = true;
  bool tf32 = false;               // CUDA: products of floats may round to TF32
  double eps = 1e-5;
  NoiseForm form = NoiseForm::none;
  const double* level = nullptr;   // shift, scale
  const int64_t* rng = nullptr;    // [nodes, 2] Philox key and offset
  double* std = nullptr;           // [skips]
  void* workspace = nullptr;       // mixed_edges_workspace() bytes, 64-aligned
  int32_t threads = 1;             // CPU
  void* stream = nullptr;          // CUDA
};

// y = BN(W relu(x)) with 1x1 kernels: one at stride 1, or two of C/2 rows at stride 2, the second a pixel further.
struct ReluConvBnParams {
  DType dtype = DType::f32;
  int64_t images = 0, rows = 0, cols = 0;  // of x
  int32_t in_channels = 0, channels = 0;
  bool reduce = false;
  const void* x = nullptr;
  const void* params[2] = {};
  void* dparams[2] = {};
  void* y = nullptr;           // forward: written; backward: read
  const void* dy = nullptr;
  void* dx = nullptr;
  void* stats = nullptr;       // A [2, C]
  bool training = true;
  double eps = 1e-5;
  void* workspace = nullptr;
  int32_t threads = 1;
};

// mixed_norm_sum: `sum` holds its terms (x is z, dx is dz), weights, noise and launch.
struct MixedNormSumParams {
  MixedSumParams sum;
  int64_t channels = 0;
  int64_t pixels = 0;           // of one image
  bool channels_last = false;
  bool training = false;        // statistics of the batch, else given
  int16_t norm[kMaxTerms] = {};  // row of a term in mean and var, -1: not normed
  int32_t norms = 0;
  double eps = 0;
  void* mean = nullptr;         // [norms, channels], accumulation dtype
  void* var = nullptr;          // biased
  double* partial = nullptr;    // fwd [norms, parts, channels, 3], bwd [terms + 1, parts, channels]
};
static_assert(std::is_trivially_copyable_v<MixedNormSumParams>);
static_assert(sizeof(MixedNormSumParams) <= 4096 - 64);

// How many edges of a node a path keeps: all, the two of largest logits, or the pair of largest logit.
enum class Topology : int32_t { none = 0, top2 = 1, pairs = 2 };

constexpr int kMaxNodes = 64;
constexpr int kMaxRow = 128;  // logits of one softmax: operations of an edge, edges or pairs of a node

struct SamplePathsParams {
  DType dtype = DType::f32;
  Topology topology = Topology::none;
  int64_t paths = 0, types = 0;
  int32_t edges = 0, ops = 0, nodes = 0, logits = 0;  // logits: of the topology, per type
  int32_t first_edge[kMaxNodes + 1] = {};
  int32_t first_logit[kMaxNodes + 1] = {};
  const void* alpha = nullptr;    // [types, edges, ops]
  const void* beta = nullptr;     // [types, logits]
  const double* tau = nullptr;
  const int64_t* rng = nullptr;   // Philox key, offset of alpha's noise; beta's is the next
  int64_t* op = nullptr;          // [paths, types, edges]
  void* weight = nullptr;         // likewise
  const void* dweight = nullptr;
  void* dalpha = nullptr;
  void* dbeta = nullptr;
  int32_t threads = 1;     // CPU
  void* stream = nullptr;  // CUDA
};
static_assert(std::is_trivially_copyable_v<SamplePathsParams>);

}  // namespace fastnas
