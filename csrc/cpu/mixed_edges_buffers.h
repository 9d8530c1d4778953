// The buffers of one call of mixed_edges, and the facts that forward and backward both ask for.
#pragma once

#include <vector>

#include "../formulas/mixed_edges.h"
#include "../params.h"
#include "depthwise.h"
#include "groups.h"
#include "moments.h"

namespace fastnas::FASTNAS_ISA {

// Depthwise -> pointwise -> batch norm. A sep_conv is two of them, a relu between.
template <class A> struct Half {
  Kernel kernel;
  int norm, param, index;
  const EdgeTerm* term;
  bool final;              // its batch norm's output is weighted and summed; else it feeds the next half
  int kept;                // place in `u`, -1: computed again
  A *taps, *dtaps;         // [blocks][size^2][lanes]; gradient partials [groups] of it
  A* shift;                // [blocks lanes]: minus mean(u), the bias that centres u
  A* fold;                 // [C][blocks lanes]: A transposed
  A* bias;                 // [blocks lanes] of A (u - mean u), or null: only eval mode has one
  A *from_dy, *from_u, *du_bias;  // dL/du = from_dy dy + from_u (u - mean u) + du_bias
  double* rstd;            // [C]
};

template <class T> struct Buffers {
  using A = typename Accumulate<T>::type;
  static constexpr int L = kLanes<A>;

  const MixedEdgesParams& p;
  int C, blocks, width;  // width: channels up to full lanes
  int groups;
  std::vector<Grid> grids;  // of each state
  Grid out;
  std::vector<Half<A>> halves;
  Arena arena;

  // Per norm of a pool or reduce_skip.
  struct Norm {
    A *mean, *scale;   // [width]; scale = w r
    double* rstd;      // [C]
    A *dot, *rstd_q;   // backward: [groups][width] of <dy, z - mean>; r q
  };
  std::vector<Norm> norms;
  std::vector<ChannelMoments<A>> pool_moments;    // [states][op][stride]
  std::vector<ChannelMoments<A>> state_moments;   // [states], for relative noise
  std::vector<ChannelMoments<A>> reduce_moments;  // [terms]
  std::vector<A*> reduce_matrix;                  // [terms]: W1 then W2, [C][width] each, then both transposed

  // What one thread needs for one image.
  struct Scratch {
    A *x, *relu_x;     // source: unpadded as it is, padded after relu
    A *v, *u, *work;      // second half's input (padded), depthwise output, spare
    A *y, *g;          // sum of a node, gradient of a node
    A *du, *dx, *z, *noise;
    A *columns, *column_gradients;  // half-way through the pools of one channel block
    int state = -1;    // whose image relu_x holds, and x where `raw`
    int64_t image = -1;
    bool raw = false;
  };
  std::vector<Scratch> scratch;

  Buffers(const MixedEdgesParams& params, bool measure)
      : p(params), C(params.channels), blocks(blocks_of<A>(C)), width(blocks * L),
        groups(group_count(params.images)),
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
  bool is_pool(const EdgeTerm& t) const { return t.op == EdgeOp::max_pool || t.op == EdgeOp::avg_pool; }
  int64_t samples() const { return p.images * out.pixels(); }
  int64_t first_image(int group) const { return p.images * group / groups; }
  const T* param(int i) const { return static_cast<const T*>(p.params[i]); }
  const Grid& half_grid(const Half<A>& h) const { return h.final && h.term->op == EdgeOp::sep_conv ? out : source_grid(*h.term); }
  ChannelMoments<A>& pooled(int state, EdgeOp op, int stride) {
    return pool_moments[(state * 2 + (op == EdgeOp::avg_pool)) * 2 + stride - 1];
  }

  void lay_out_halves() {
    int kept = 0;
    for (int i = 0; i < terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (t.half < 0) continue;
      const int count = t.op == EdgeOp::sep_conv ? 2 : 1;
      for (int part = 0; part < count; ++part) {
        Half<A> h{};
        h.kernel = {t.size, t.dilation, part == 0 ? edge_of(t).stride : 1};
        h.norm = t.norm + part;
        h.param = t.param + 2 * part;
        h.index = t.half + part;
        h.term = &t;
        h.final = part + 1 == count;
        h.kept = h.final && t.size >= 5 ? kept++ : -1;
        h.taps = arena.template take<A>(int64_t(width) * h.kernel.taps());
        h.shift = arena.template take<A>(width);
        h.fold = arena.template take<A>(int64_t(C) * width);
        h.bias = p.training ? nullptr : arena.template take<A>(width);
        h.rstd = arena.template take<double>(C);
        if (p.dout) {
          h.dtaps = p.dparams ? arena.template take<A>(int64_t(groups) * width * h.kernel.taps()) : nullptr;
          h.from_dy = arena.template take<A>(int64_t(C) * width);
          h.from_u = arena.template take<A>(int64_t(C) * width);
          h.du_bias = arena.template take<A>(width);
        }
        halves.push_back(h);
      }
    }
  }

  ChannelMoments<A> take_moments() {
    return {arena.template take<double>(int64_t(groups) * width), arena.template take<double>(int64_t(groups) * width)};
  }

  void lay_out_norms() {
    norms.resize(terms());
    reduce_moments.resize(terms());
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
      if (t.op != EdgeOp::reduce_skip) continue;
      reduce_moments[i] = take_moments();
      reduce_matrix[i] = arena.template take<A>(int64_t(C) * width * 4);
    }
    for (int s = 0; s < states(); ++s) {
      for (int k = 0; k < 4; ++k) pool_moments.push_back(take_moments());
      state_moments.push_back(take_moments());
    }
  }

  void lay_out_scratch() {
    int64_t pixels = out.pixels(), padded = out.padded();
    for (const Grid& g : grids) {
      pixels = std::max<int64_t>(pixels, g.pixels());
      padded = std::max<int64_t>(padded, g.padded());
    }
    const int64_t plain = pixels * width;
    padded *= width;
    scratch.resize(std::max(1, std::min(p.threads, groups)));
    for (Scratch& s : scratch) {
      for (A** plane : {&s.x, &s.u, &s.work, &s.y, &s.z}) *plane = arena.template take<A>(plain);
      for (A** plane : {&s.relu_x, &s.v}) *plane = arena.template take<A>(padded);
      s.noise = arena.template take<A>(p.form == NoiseForm::none ? 0 : int64_t(C) * pixels + 8);
      s.columns = arena.template take<A>(pixels * L);
      if (!p.dout) continue;
      s.column_gradients = arena.template take<A>(pixels * L);
      s.g = arena.template take<A>(plain);
      s.du = arena.template take<A>(padded);
      s.dx = arena.template take<A>(padded);
    }
  }
};

}  // namespace fastnas::FASTNAS_ISA
