// Holds the buffers of one call of mixed_edges, and the facts that forward and backward both ask for.
//
// Everything a call needs beyond its tensors lies in one workspace that Python allocates, so that kernels allocate
// nothing and know nothing of torch. Laying it out and measuring it are the same code (Arena). The letters are
// those of the algebra in formulas/mixed_edges.h: u is a depthwise output, z = W u a pointwise one, S = cov(u), A =
// w r W the matrix into which a batch norm and its weight are folded, P = mean(dy (u - mean u)^T), B the centring
// part of dL/du. M is the number of pixels of all images, `samples()`.
#pragma once

#include <vector>

#include "../formulas/mixed_edges.h"
#include "../params.h"
#include "dense.h"
#include "depthwise.h"
#include "moments.h"
#include "winograd.h"

namespace fastnas::FASTNAS_ISA {

// A half is depthwise -> pointwise -> batch norm, the convolutional part of a candidate. A dil_conv is one of them;
// a sep_conv is two, and relu(BN(z)) of the first is the input v of the second. Every half is held in folded form:
// after the statistics are known, w BN(W u) = A (u - mean u), one product, and z itself is never formed.
template <class A> struct Half {
  Kernel kernel;
  int norm, param, index;
  const EdgeTerm* term;
  bool final;              // its batch norm's output is weighted and summed; else it feeds the next half
  int kept;  // place in MixedEdgesParams::u; -1: u is computed again wherever it is needed
  A *taps, *dtaps;  // [blocks][size^2][lanes]; partial sums of dL/dD, [groups] of the same
  A* shift;  // [blocks lanes]: minus mean(u), given to the depthwise kernel as its bias, so that u comes out centred
  A* fold;  // [C][blocks lanes]: A transposed, as product() wants it
  A* bias;  // [blocks lanes]: -w r mean(z); null in training, where u is centred instead
  // backward: dL/du = from_dy dy + from_u (u - mean u) + du_bias, which are A^T, -B and -A^T mean(dy). The mean of
  // dy goes into the constant, so no pass subtracts it from dy.
  A *from_dy, *from_u, *du_bias;
  double* rstd;            // [C]
};

template <class T> struct Buffers {
  using A = typename Accumulate<T>::type;
  static constexpr int L = kLanes<A>;

  const MixedEdgesParams& p;
  int C, blocks, width;  // width: channels up to full lanes
  Batch batch;
  int groups, lanes;  // lanes in use: C, of every slot of a pack
  LaneNumbers<A> starts;
  std::vector<Grid> grids;  // of each state
  Grid out;
  std::vector<Half<A>> halves;
  Arena arena;

  // A norm is the batch norm behind a pool, a strided skip or a dense convolution. Their z is formed: a pool is not
  // linear, a strided skip reads two sets of pixels, so neither has one u to fold; and of a dense 3x3 convolution the
  // Gram matrix of what it reads, [9 C, 9 C], would cost more than z.
  struct Norm {
    A *mean, *scale;   // [width]; scale = w r
    double* rstd;      // [C]
    A *dot, *rstd_q;  // backward: [groups][width] of <dy, z - mean>; r q
  };
  // There is one for each term; those of convolutions and plain skips stay empty.
  std::vector<Norm> norms;
  // Moments are partial sums by group of images. A pool's belong to the state it reads: all edges that leave the
  // state with one stride share its statistics, though each keeps running statistics of its own.
  std::vector<ChannelMoments<A>> pool_moments;    // [states][op][stride]
  std::vector<ChannelMoments<A>> state_moments;   // [states], for relative noise
  std::vector<ChannelMoments<A>> own_moments;     // [terms]: of strided skips and dense convolutions
  std::vector<A*> reduce_matrix;                  // [terms]: W1 then W2, [C][width] each, then both transposed
  // The packed weights of a dense convolution, those of its transpose, and dL/dV of each group of images.
  struct Dense {
    A *forward, *back, *partial;  // partial: [groups][taps][width][width]; null: not wanted
  };
  std::vector<Dense> dense_terms;  // [terms]

  // Holds what one thread needs for one pack of images. All of it together is a dozen packs (1 MiB in backward, at 16
  // channels of 32 x 32 in fp32), so it stays in L2 while the terms of a node are worked through.
  struct Scratch {
    A *x, *relu_x;     // source: unpadded as it is, padded after relu
    A *v, *u, *work;  // second half's input (padded); some rows of a depthwise output, or a whole z; free for any step
    A *y, *g;  // sum of a node, or dL/dv; gradient of a node
    A *du, *dx, *z, *noise;
    A* tiles;                       // a strip of a dense 3x3 convolution
    A *columns, *column_gradients;  // between the two passes of a pool, and of its transpose
    int state = -1;  // whose image relu_x holds, and x where `raw`: see load_source
    int64_t image = -1;
    bool raw = false;
  };
  std::vector<Scratch> scratch;

  // With `measure` the arena starts at null and only counts; no pointer of this object may be followed then.
  Buffers(const MixedEdgesParams& params, bool measure)
      : p(params), C(params.channels), blocks(blocks_of<A>(C)), width(blocks * L),
        batch{params.images, C, images_of_a_pack(params)}, groups(batch.groups()), lanes(C * batch.slots),
        starts(slot_starts<A>(C)),
        arena{measure ? nullptr : static_cast<char*>(params.workspace)} {
    for (int s = 0; s < p.inputs; ++s) grids.push_back({int(p.sizes[2 * s]), int(p.sizes[2 * s + 1])});
    const Edge& first = p.edges[0];
    const Grid& in = grids[first.source];
    out = {(in.rows + first.stride - 1) / first.stride, (in.cols + first.stride - 1) / first.stride};
    for (int j = 0; j < p.nodes; ++j) grids.push_back(out);
    lay_out_halves();
    lay_out_norms();
    lay_out_scratch();
  }

  int states() const { return p.inputs + p.nodes; }
  int terms() const { return p.edges[p.edge_count - 1].last_term; }
  const Edge& edge_of(const EdgeTerm& t) const { return p.edges[t.edge]; }
  const Grid& source_grid(const EdgeTerm& t) const { return grids[edge_of(t).source]; }
  A weight(const EdgeTerm& t) const { return static_cast<const A*>(p.w)[t.edge * p.candidates + t.weight]; }
  bool is_dense(const EdgeTerm& t) const { return t.op == EdgeOp::dense_conv; }
  // By strips of tiles, in training; else direct, where a value that is not finite stays where it is.
  bool by_tiles(const EdgeTerm& t) const { return is_dense(t) && t.size == 3 && p.training; }
  bool is_plain_pool(const EdgeTerm& t) const { return t.op == EdgeOp::plain_avg_pool; }
  // Says whether the term is a pool with a batch norm behind it.
  bool is_pool(const EdgeTerm& t) const { return t.op == EdgeOp::max_pool || t.op == EdgeOp::avg_pool; }
  int64_t samples() const { return p.images * out.pixels(); }
  int64_t first_image(int group) const { return batch.first(group); }
  // Tiles of dense convolutions (dense.h) read one image at a time.
  static int images_of_a_pack(const MixedEdgesParams& p) {
    for (int i = 0; i < p.edges[p.edge_count - 1].last_term; ++i)
      if (p.terms[i].op == EdgeOp::dense_conv) return 1;
    return slots_for<A>(p.channels, p.images);
  }
  const LaneNumbers<A>* slots() const { return batch.slots > 1 ? &starts : nullptr; }
  // Finds, in a channels-last tensor, the pack that begins with an image.
  template <class U> Pixels<U> pack(U* tensor, const Grid& grid, int64_t stride, int64_t image) const {
    const int64_t size = grid.pixels() * stride;
    return {tensor + image * size, stride, size, int(std::min<int64_t>(batch.slots, p.images - image))};
  }
  // Repeats a value of the channels in every slot, with zeros in the lanes that are not in use.
  template <class F> void fill_lanes(A* to, F of_channel) const {
    for (int l = 0; l < width; ++l) to[l] = l < lanes ? A(of_channel(l % C)) : A(0);
  }
  const T* param(int i) const { return static_cast<const T*>(p.params[i]); }
  const Grid& half_grid(const Half<A>& h) const {
    return h.final && h.term->halves == 2 ? out : source_grid(*h.term);
  }
  // Finds the moments of one kind of pool of a state at one stride, 1 or 2.
  ChannelMoments<A>& pooled(int state, EdgeOp op, int stride) {
    return pool_moments[(state * 2 + (op == EdgeOp::avg_pool)) * 2 + stride - 1];
  }

  // In training the shift centres u and no bias is needed; in eval mode the running mean is no mean of this u, so u
  // stays as it is and the constant of the batch norm goes into `bias`.
  void lay_out_halves() {
    for (int i = 0; i < terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      for (int part = 0; part < t.halves; ++part) {
        Half<A> h{};
        h.kernel = {t.size, t.dilation, part == 0 ? edge_of(t).stride : 1};
        h.norm = t.norm + part;
        h.param = t.param + 2 * part;
        h.index = t.half + part;
        h.term = &t;
        h.final = part + 1 == t.halves;
        h.kept = h.final ? t.kept : -1;
        h.taps = arena.template take<A>(int64_t(width) * h.kernel.taps());
        h.shift = arena.template take<A>(width);
        h.fold = arena.template take<A>(int64_t(C) * width);
        h.bias = p.training ? nullptr : arena.template take<A>(width);
        h.rstd = arena.template take<double>(C);
        if (p.dout) {
          h.dtaps = p.dparams ? arena.template take<A>(int64_t(groups) * width * h.kernel.taps()) : nullptr;
          h.from_dy = arena.template take<A>(int64_t(C) * width);
          h.from_u = p.training ? arena.template take<A>(int64_t(C) * width) : nullptr;
          h.du_bias = arena.template take<A>(width);
        }
        halves.push_back(h);
      }
    }
  }

  ChannelMoments<A> take_moments() {
    return {arena.template take<double>(int64_t(groups) * width), arena.template take<double>(int64_t(groups) * width)};
  }

  // The matrices of a reduce_skip are laid out four times: both parts for the product
  // forward, both for the one back.
  void lay_out_norms() {
    norms.resize(terms());
    own_moments.resize(terms());
    dense_terms.resize(terms());
    reduce_matrix.resize(terms());
    for (int i = 0; i < terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (t.half >= 0) continue;
      Norm& n = norms[i];
      n.mean = arena.template take<A>(width);
      n.scale = arena.template take<A>(width);
      n.rstd = arena.template take<double>(C);
      n.dot = p.dout ? arena.template take<A>(int64_t(groups) * width) : nullptr;
      n.rstd_q = p.dout ? arena.template take<A>(width) : nullptr;
      if (is_dense(t)) lay_out_dense(t, dense_terms[i]);
      if (is_dense(t) || t.op == EdgeOp::reduce_skip) own_moments[i] = take_moments();
      if (t.op != EdgeOp::reduce_skip) continue;
      reduce_matrix[i] = arena.template take<A>(int64_t(C) * width * 4);
    }
    for (int s = 0; s < states(); ++s) {
      for (int k = 0; k < 4; ++k) pool_moments.push_back(take_moments());
      state_moments.push_back(take_moments());
    }
  }

  void lay_out_dense(const EdgeTerm& t, Dense& dense) {
    const int64_t count = by_tiles(t) ? winograd_weights(C, width) : dense_weights(C, width, t.size);
    dense.forward = arena.template take<A>(count);
    dense.back = p.dout ? arena.template take<A>(count) : nullptr;
    dense.partial = p.dparams ? arena.template take<A>(groups * dense_sums(t)) : nullptr;
  }
  int64_t dense_sums(const EdgeTerm& t) const { return int64_t(t.size) * t.size * width * width; }

  // Planes are as large as the largest state, whichever the thread works on. A thread beyond the number of groups
  // would have no work, so it gets no scratch.
  void lay_out_scratch() {
    int64_t pixels = out.pixels(), padded = out.padded();
    for (const Grid& g : grids) {
      pixels = std::max<int64_t>(pixels, g.pixels());
      padded = std::max<int64_t>(padded, g.padded());
    }
    const int64_t plain = pixels * width;
    padded *= width;
    const bool any_tiles = std::any_of(p.terms, p.terms + terms(), [&](const EdgeTerm& t) { return by_tiles(t); });
    scratch.resize(std::max(1, std::min(p.threads, groups)));
    for (Scratch& s : scratch) {
      for (A** plane : {&s.x, &s.u, &s.work, &s.y, &s.z}) *plane = arena.template take<A>(plain);
      for (A** plane : {&s.relu_x, &s.v}) *plane = arena.template take<A>(padded);
      s.noise = arena.template take<A>(p.form == NoiseForm::none ? 0 : int64_t(C) * pixels + 8);  // of one image
      s.columns = arena.template take<A>(pixels * L);
      s.tiles = arena.template take<A>(any_tiles ? winograd_scratch<A>(blocks) : 0);
      if (!p.dout) continue;
      s.column_gradients = arena.template take<A>(pixels * L);
      s.g = arena.template take<A>(plain);
      s.du = arena.template take<A>(padded);
      s.dx = arena.template take<A>(padded);
    }
  }
};

}  // namespace fastnas::FASTNAS_ISA
