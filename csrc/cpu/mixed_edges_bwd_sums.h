// Holds the first part of mixed_edges' backward on the CPU: its buffers, the sums over dy, and
// what is folded from them.
//
// The gradient of a batch norm needs mean(dy) and q = mean(dy zhat) of every channel, sums over all images, before
// the first dL/du can be written. With z never formed, q comes from P = mean(dy (u - mean u)^T), a C x C matrix: q
// is r * rowsum(W o P), and P and the kept S give dL/dw and dL/dW as well. So one sweep gathers P for every
// convolution into a node, and the folds turn it into the three things that dL/du is made of:
//  dL/du = A^T dy - B (u - mean u) - A^T mean(dy),   A = w diag(r) W,   B = W^T diag(w r^2 q) W.
// u is computed again for both the sums and the products, from the state or from v; only "fast" reads it.
#pragma once

#include "mixed_edges_call.h"

namespace fastnas::FASTNAS_ISA {

template <class T> struct BackwardSums : Call<T> {
  using Base = Call<T>;
  using typename Base::A;
  using typename Base::Norm;
  using typename Base::Scratch;
  using Base::p, Base::C, Base::L, Base::blocks, Base::width, Base::groups, Base::halves, Base::out, Base::norms;
  using Base::batch, Base::pack, Base::fill_lanes;

  std::vector<A*> crosses;  // [halves of one sweep][groups]: partial sums of dy (u - mean u)^T, [width][width]
  A *dy_sums, *dv_sums;  // [groups][width] of dy; the same of dv, for each sep_conv into the node
  A* dy_mean;  // [nodes][width], kept: the pools that leave a state are finished after the node they enter
  // The gradients of the states are in the accumulation dtype, since all edges that leave a state add to its own,
  // one after the other; a 16-bit sum would round every time.
  std::vector<A*> gradients;  // of each state, [N][pixels][C]; null: not wanted
  std::vector<bool> needed;  // of each state: some gradient hangs on its own; true of every node
  std::vector<int> writer;  // of each state: the edge that writes its gradient first, -1: none
  A* dv;  // [sep_convs into the node][N][pixels][C]: dL/dv through the relu, from second to first half
  std::vector<A*> skip_dots;      // [terms]: [groups][2][width] of <dy, x + noise> and, multiplicative, sum of dy d
  std::vector<A*> reduce_crosses; // [terms]: [groups][2][width][width]
  double* fold_scratch;  // [threads][2][C][width]
  int most_halves = 0, most_inputs = 0;

  // The cross matrices and dv are used again by every node, so they are as large as the node with most
  // needs. `writer` is found in the order in which run() visits edges: nodes from the last, the edges into a
  // node in their order. Strided skips keep a cross matrix of [width][width] for each of their two parts,
  // but only if parameters have gradients.
  BackwardSums(const MixedEdgesParams& params, bool measure) : Base(params, measure) {
    std::vector<int> final_halves(p.nodes), inputs(p.nodes);
    for (const auto& h : halves) {
      const int node = this->edge_of(*h.term).target;
      if (h.final) most_halves = std::max(most_halves, ++final_halves[node]);
      else most_inputs = std::max(most_inputs, ++inputs[node]);
    }
    // Constant statistics take other sums, and no dv waits for them (mixed_edges_bwd_linear.h).
    if (!p.training) most_halves = most_inputs = 0;
    for (int i = 0; i < std::max(most_halves, most_inputs) * groups; ++i)
      crosses.push_back(this->arena.template take<A>(int64_t(width) * width));
    dy_sums = this->arena.template take<A>(int64_t(groups) * width);
    dv_sums = this->arena.template take<A>(int64_t(std::max(1, most_inputs)) * groups * width);
    dy_mean = this->arena.template take<A>(int64_t(p.nodes) * width);
    dv = this->arena.template take<A>(int64_t(most_inputs) * p.images * out.pixels() * C);
    for (int s = 0; s < this->states(); ++s) {
      needed.push_back(s >= p.inputs || p.dx[s] != nullptr);
      gradients.push_back(needed[s] ? this->arena.template take<A>(p.images * this->grids[s].pixels() * C) : nullptr);
    }
    skip_dots.resize(this->terms());
    reduce_crosses.resize(this->terms());
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (t.skip >= 0 || this->is_plain_pool(t))
        skip_dots[i] = this->arena.template take<A>(int64_t(groups) * 2 * width);
      if (t.op == EdgeOp::reduce_skip && p.dparams)
        reduce_crosses[i] = this->arena.template take<A>(int64_t(groups) * 2 * width * width);
    }
    fold_scratch = this->arena.template take<double>(int64_t(this->scratch.size()) * 2 * C * width);
    writer.assign(this->states(), -1);
    for (int node = p.nodes - 1; node >= 0; --node)
      for (int e = 0; e < p.edge_count; ++e)
        if (p.edges[e].target == node && writer[p.edges[e].source] < 0 && has_convolutions(e))
          writer[p.edges[e].source] = e;
  }

  // Says whether the edge gives relu(x) a gradient, which first_halves writes; pools and skips are
  // added by finish_state.
  bool has_convolutions(int e) const {
    for (int i = p.edges[e].first_term; i < p.edges[e].last_term; ++i)
      if (p.terms[i].half >= 0 || p.terms[i].op == EdgeOp::reduce_skip || this->is_dense(p.terms[i])) return true;
    return false;
  }
  // Says whether anything of an edge but dL/dw is wanted. With frozen parameters nothing is of edges from an input
  // without a gradient: they end at the sums over dy.
  bool goes_on(const Edge& e) const { return p.dparams != nullptr || needed[e.source]; }
  Pixels<A> gradient(int state, int64_t image) const {
    return pack(gradients[state], this->grids[state], C, image);
  }
  // Finds dL/dv of a sep_conv, by its slot among those into the node.
  Pixels<A> input_gradient(int slot, int64_t image) const {
    return this->template kept_pack<A>(dv, slot, image);
  }

  // Calls f(slot among those of the node, half) over the node's final halves, or over its sep_convs' first ones.
  template <class F> void for_halves(int node, bool final, F f) {
    int slot = 0;
    for (const auto& h : halves)
      if (this->edge_of(*h.term).target == node && h.final == final) f(slot++, h);
  }

  void load_gradient(Scratch& s, int node, int64_t image) {
    load_image<A, A>(gradient(p.inputs + node, image).to_read(), out, C, s.g);
  }

  // --- sums over dy --------------------------------------------------------------------------------------

  // Adds one image to the sums over dy of a node: sum of dy, the cross matrix of every final half, <dy, z - mean>
  // of every pool and strided skip, and what dL/dw of a skip needs. dy is complete here: finish_state came before,
  // in the same sweep. `opens` clears the group's partial sums at its first image. Kept u need no source, so the
  // images of a "fast" edge are not loaded.
  void add_sums(Scratch& s, int node, int group, int64_t image) {
    const bool opens = image == this->first_image(group);
    const int64_t pixels = out.pixels();
    load_gradient(s, node, image);
    if (opens) std::fill_n(dy_sums + int64_t(group) * width, width, A(0));
    add_channel_sums(s.g, pixels, blocks, dy_sums + int64_t(group) * width);
    int slot = 0;
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (this->edge_of(t).target != node) continue;
      if (t.half >= 0) {
        const bool two = t.halves == 2;
        const Half<A>& h = halves[t.half + two];
        A* sum = crosses[slot++ * groups + group];
        if (opens) std::fill_n(sum, int64_t(width) * width, A(0));
        if (!this->keeps(h)) {
          if (two) this->load_second_input(s, t, image);
          else this->load_source(s, this->edge_of(t).source, image, false);
        }
        this->centred_rows(s, h, image, true, [&](Rows rows, const Grid& part) {
          outer(this->rows_of(s.g, rows), C, pixels, s.u, blocks, part.pixels(), part.pixels(), this->slots(), false,
                sum);
        });
        continue;
      }
      add_other_sums(s, i, group, image, opens);
    }
  }

  // Adds one image to the sums of a term that is not of halves: a pool, a skip, a dense convolution.
  void add_other_sums(Scratch& s, int i, int group, int64_t image, bool opens) {
    const EdgeTerm& t = p.terms[i];
    if (!this->is_dense(t)) this->load_source(s, this->edge_of(t).source, image, true);
    if (this->is_plain_pool(t)) return add_pool_sums(s, i, group, opens);
    if (!this->is_pool(t) && !this->is_dense(t)) return add_skip_sums(s, i, group, image, opens);
    if (opens) std::fill_n(norms[i].dot + int64_t(group) * width, width, A(0));
    centred_norm(s, i, image, s.z);
    add_channel_dots(s.g, s.z, out.pixels(), blocks, norms[i].dot + int64_t(group) * width);
  }

  // Adds <dy, pool(x)>, which is dL/dw, where that is wanted.
  void add_pool_sums(Scratch& s, int i, int group, bool opens) {
    if (!p.dw) return;
    A* dots = skip_dots[i] + int64_t(group) * 2 * width;
    if (opens) std::fill_n(dots, width, A(0));
    this->pool(p.terms[i], s, s.z);
    add_channel_dots(s.g, s.z, out.pixels(), blocks, dots);
  }

  // Computes z - mean(z) of a pool, strided skip or dense convolution again. Products with dy then need no correction
  // by the mean, which would cancel. Overwrites s.u.
  void centred_norm(Scratch& s, int i, int64_t image, A* z) {
    const EdgeTerm& t = p.terms[i];
    if (this->is_pool(t)) this->pool(t, s, z);
    else if (this->is_dense(t)) this->load_dense(s, t, image, z);
    else this->reduce(t, s, s.u, z);
    for (int b = 0; b < blocks; ++b) {
      const Vec<A> mean = get(norms[i].mean + b * L);
      for (int64_t k = 0; k < out.pixels(); ++k) {
        A* at = z + (b * int64_t(out.pixels()) + k) * L;
        put(at, get(at) - mean);
      }
    }
  }

  // Adds what dL/dw of a skip needs, <dy, x + d> or <dy, x d>, where dL/dw is wanted. Additive noise on a
  // strided skip adds <dy, d> to the <dy, BN(z)> that comes from the norm's own dots. Multiplicative noise turns
  // its dy into dy d before the batch norm sees it, so the sum of dy d is gathered too: the mean of the node's
  // dy is not what that norm needs.
  void add_skip_sums(Scratch& s, int i, int group, int64_t image, bool opens) {
    const EdgeTerm& t = p.terms[i];
    const int64_t pixels = out.pixels();
    A *dots = skip_dots[i] + int64_t(group) * 2 * width, *sums = dots + width;
    if (opens) std::fill_n(dots, 2 * width, A(0));
    const bool strided = t.op == EdgeOp::reduce_skip, times = this->multiplicative();
    const bool draws = this->noisy(t) && (p.dw || (times && strided));
    if (draws) this->draw_noise(s, t, image, s.work);
    if (!strided) {
      if (!p.dw) return;
      if (!draws) {
        add_channel_dots(s.g, s.x, pixels, blocks, dots);
        return;
      }
      combine(s.x, s.work, times, s.u);
      add_channel_dots(s.g, s.u, pixels, blocks, dots);
      return;
    }
    centred_norm(s, i, image, s.z);
    const A* dy = s.g;
    if (draws && times) {
      combine(s.g, s.work, true, s.work);
      dy = s.work;
      add_channel_sums(dy, pixels, blocks, sums);
    } else if (draws) {
      add_channel_dots(s.g, s.work, pixels, blocks, dots);
    }
    if (opens) std::fill_n(norms[i].dot + int64_t(group) * width, width, A(0));
    add_channel_dots(dy, s.z, pixels, blocks, norms[i].dot + int64_t(group) * width);
  }

  // Writes x d, or x + d.
  void combine(const A* x, const A* d, bool times, A* to) {
    for (int64_t k = 0; k < int64_t(out.pixels()) * width; k += L)
      put(to + k, times ? get(x + k) * get(d + k) : get(x + k) + get(d + k));
  }

  double total(const A* partial, int64_t stride, int64_t at) const {
    return batch.sum(partial, stride, at);
  }

  // Goes from the groups' partial sums to mean(dy), dL/dw, dL/dW and the matrices of dL/du. For pools and strided
  // skips q comes from <dy, z - mean>; M q is their dL/dw, summed over channels.
  void fold_sums(int node) {
    fill_lanes(dy_mean + int64_t(node) * width,
               [&](int c) { return total(dy_sums, width, c) / double(this->samples()); });
    fold_halves(node, true);
    fold_others(node);
  }

  void fold_others(int node) {
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (t.half >= 0 || this->edge_of(t).target != node) continue;
      double dw = 0;
      if (this->has_norm(t)) {
        Norm& n = norms[i];
        std::vector<double> q(C);
        for (int c = 0; c < C; ++c) {
          q[c] = total(n.dot, width, c) * n.rstd[c] / double(this->samples());
          dw += q[c] * double(this->samples());
        }
        fill_lanes(n.rstd_q, [&](int c) { return n.rstd[c] * q[c]; });
      }
      if (skip_dots[i])
        for (int c = 0; c < C; ++c) dw += total(skip_dots[i], 2 * width, c);
      if (p.dw) p.dw[t.edge * p.candidates + t.weight] = dw;
    }
  }

  // Folds the node's halves, one job each. Second halves take the sums of dy, first halves those of
  // dv. Where an edge does not go on (goes_on), its first halves were not gathered: what is folded
  // from the old sums is read by nobody.
  void fold_halves(int node, bool final) {
    std::vector<const Half<A>*> chosen;
    for_halves(node, final, [&](int, const Half<A>& h) { chosen.push_back(&h); });
    this->for_each_job(int64_t(chosen.size()), [&](int64_t i) {
      const A* sums = final ? dy_sums : dv_sums + i * groups * width;
      fold_half_gradient(*chosen[i], int(i), sums, fold_scratch + thread_number() * 2 * C * width);
    });
  }

  // Goes from P and the sum of dy (or dv) of a half to dL/dw, dL/dW, A^T, -B and the constant of dL/du.
  //
  // Row by row of W, with the partial sums added in fp64 in the order of the groups:
  //   q = r <W_co, P_co>,  dL/dw += M q,  dL/dW_co = w M r (P_co - q r W_co S),
  //   B += w r^2 q W_co^T W_co,  constant -= A_co^T mean(dy)_co.
  // S is the covariance that forward kept; without it there is no dL/dW, and none is asked for. B is
  // summed in fp64 and negated once. from_dy has a row per channel of dy, from_u a row per channel of u:
  // both lie as product() wants them.
  void fold_half_gradient(const Half<A>& h, int slot, const A* sums, double* B) {
    const double samples = double(this->samples()), scale = this->scale_of(h);
    const T* pointwise = this->param(h.param + 1);
    const A* S = p.gram ? static_cast<const A*>(p.gram) + int64_t(h.index) * C * C : nullptr;
    T* dW = p.dparams ? static_cast<T*>(p.dparams[h.param + 1]) : nullptr;
    double* row = B + int64_t(C) * width;
    std::vector<double> P(width), W(width), bias(width, 0.0);
    std::fill_n(B, int64_t(C) * width, 0.0);
    double dw = 0;
    for (int co = 0; co < C; ++co) {
      std::fill(P.begin(), P.end(), 0.0);
      batch.for_each_slot([&](int g, int lane) {
        const A* partial = crosses[slot * groups + g] + int64_t(co) * width + lane;
        for (int ci = 0; ci < C; ++ci) P[ci] += double(partial[ci]);
      });
      double q = 0;
      for (int ci = 0; ci < C; ++ci) {
        P[ci] /= samples;
        W[ci] = load(pointwise[int64_t(co) * C + ci]);
        q += W[ci] * P[ci];
      }
      q *= h.rstd[co];
      dw += q * samples;
      const double mean = total(sums, width, co) / samples;
      fill_lanes(h.from_dy + int64_t(co) * width, [&](int ci) { return folded(scale, h.rstd[co], W[ci]); });
      for (int ci = 0; ci < C; ++ci) bias[ci] -= folded(scale, h.rstd[co], W[ci]) * mean;
      if (dW) {
        std::fill_n(row, C, 0.0);
        for (int i = 0; i < C; ++i)
          for (int j = 0; j < C; ++j) row[j] += W[i] * double(S[int64_t(i) * C + j]);
        for (int ci = 0; ci < C; ++ci)
          dW[int64_t(co) * C + ci] =
              store<T>(A(pointwise_gradient(scale, samples, h.rstd[co], q, P[ci], row[ci])));
      }
      const double coefficient = centring(scale, h.rstd[co], q);
      for (int i = 0; i < C; ++i) {
        const double wi = coefficient * W[i];
        for (int j = 0; j < C; ++j) B[int64_t(i) * width + j] += wi * W[j];
      }
    }
    for (int i = 0; i < C; ++i)
      fill_lanes(h.from_u + int64_t(i) * width, [&](int j) { return -B[int64_t(i) * width + j]; });
    fill_lanes(h.du_bias, [&](int c) { return bias[c]; });
    if (h.final && p.dw) p.dw[h.term->edge * p.candidates + h.term->weight] = dw;
  }
};

}  // namespace fastnas::FASTNAS_ISA
