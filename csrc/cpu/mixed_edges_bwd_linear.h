// Runs mixed_edges backward on the CPU outside of training, where statistics are constants.
//
// A batch norm is then linear: dL/du = A^T dy alone. No sum over the images comes before it, so nothing waits for
// another sweep. One sweep a node, from the last, completes dL/d(node) and takes it back through all edges into the
// node, one convolution after the other while its u is in cache. P = sum dy u^T is gathered on the way, for dL/dW
// and dL/dw; nothing is read that forward would have to keep but the states.
#pragma once

#include "mixed_edges_bwd.h"

namespace fastnas::FASTNAS_ISA {

template <class T> struct LinearBackward : Backward<T> {
  using Base = Backward<T>;
  using typename Base::A;
  using typename Base::Scratch;
  using Base::p, Base::C, Base::L, Base::blocks, Base::width, Base::groups, Base::halves, Base::out;
  using Base::crosses, Base::dy_sums, Base::needed, Base::has_convolutions, Base::goes_on, Base::load_gradient;

  // Of each half its place in `crosses`, [halves into a node][groups] of partial sums of P. Every node uses them
  // again.
  std::vector<int> places;

  LinearBackward(const MixedEdgesParams& params, bool measure) : Base(params, measure) {
    std::vector<int> used(p.nodes);
    for (const auto& h : halves) places.push_back(used[this->edge_of(*h.term).target]++);
    for (int i = 0; i < *std::max_element(used.begin(), used.end()) * groups; ++i)
      crosses.push_back(this->arena.template take<A>(int64_t(width) * width));
  }

  // Says whether P of a half is wanted: for dL/dW, or for dL/dw, which only the last half of a term has.
  bool wants_cross(const Half<A>& h) const { return p.dparams != nullptr || (h.final && p.dw != nullptr); }

  // Takes one image back through a half: adds to P and dL/dD of the group, and writes du = A^T dy to s.du where the
  // edge goes on. `in` is the padded input of the half.
  void through_half(Scratch& s, const Half<A>& h, A* dy, const A* in, int group, int64_t image, bool on) {
    const bool opens = image == this->first_image(group);
    if (on && h.kernel.stride == 1) clear_halo(out, blocks, s.du);
    const auto back = [&](Rows rows, const Grid& part) {
      const Factor<A> factor{this->rows_of(dy, rows), h.from_dy, C, this->slots(), out.pixels()};
      if (on) this->write_du(s, h, &factor, 1, rows, part);
    };
    if (wants_cross(h)) {
      A* sum = crosses[places[h.index] * groups + group];
      if (opens) std::fill_n(sum, int64_t(width) * width, A(0));
      this->centred_rows(s, h, image, false, [&](Rows rows, const Grid& part) {
        outer(this->rows_of(dy, rows), C, out.pixels(), s.u, blocks, part.pixels(), part.pixels(), this->slots(),
              false, sum);
        back(rows, part);
      });
    } else {
      back({0, out.rows}, out);
    }
    if (on) this->add_taps(s, h, in, group, opens);
  }

  // Takes one image back through a convolution, to s.dx where the source wants a gradient. `fresh`: it is the first
  // on its edge, and writes.
  void through_convolution(Scratch& s, const EdgeTerm& t, int group, int64_t image, bool on, bool fresh) {
    const Half<A>&first = halves[t.half], &last = halves[t.half + t.halves - 1];
    const bool two = t.halves == 2;
    if (two) this->load_second_input(s, t, image);
    through_half(s, last, s.g, two ? s.v : s.relu_x, group, image, on);
    if (!on) return;
    if (two) {
      this->second_input_gradient(s, last);
      through_half(s, first, s.y, s.relu_x, group, image, true);
    }
    const int source = this->edge_of(t).source;
    if (needed[source])
      depthwise_transposed(s.du, out, first.taps, first.kernel, this->grids[source], blocks, fresh, s.dx);
  }

  // Takes one image of a node back through all edges into it; its gradient is complete.
  void through_edges(Scratch& s, int node, int group, int64_t image) {
    const bool opens = image == this->first_image(group);
    load_gradient(s, node, image);
    if (opens) std::fill_n(dy_sums + int64_t(group) * width, width, A(0));
    if (p.dw) add_channel_sums(s.g, out.pixels(), blocks, dy_sums + int64_t(group) * width);
    for (int e = 0; e < p.edge_count; ++e) {
      const Edge& edge = p.edges[e];
      const bool on = goes_on(edge) && has_convolutions(e);
      if (edge.target != node || (!on && !p.dw)) continue;
      this->load_source(s, edge.source, image, p.dw != nullptr);
      if (on && edge.stride == 2) std::fill_n(s.dx, int64_t(blocks) * this->grids[edge.source].padded() * L, A(0));
      bool fresh = edge.stride == 1;
      for (int i = edge.first_term; i < edge.last_term; ++i) {
        const EdgeTerm& t = p.terms[i];
        if (t.half < 0) {
          if (p.dw) this->add_other_sums(s, i, group, image, opens);
          if (on && t.op == EdgeOp::reduce_skip) this->reduce_gradient(s, i, group, image, opens);
          if (!on || !this->is_dense(t)) continue;
          this->dense_gradient(s, i, group, image, opens, fresh);
          fresh = false;
          continue;
        }
        through_convolution(s, t, group, image, on, fresh);
        fresh = false;
      }
      if (on && needed[edge.source]) this->add_to_source(s, edge, e, image);
    }
  }

  // Makes dL/dW = w r P and dL/dw = <dy, r (W u - mean)> of a half from the groups' partial sums, in fp64 and in
  // their order.
  void fold_cross(const Half<A>& h) {
    if (!wants_cross(h)) return;
    const T* pointwise = this->param(h.param + 1);
    T* dW = p.dparams ? static_cast<T*>(p.dparams[h.param + 1]) : nullptr;
    const A* means = this->stats_of(h.norm);
    double dw = 0;
    for (int co = 0; co < C; ++co) {
      double product = 0;
      for (int ci = 0; ci < C; ++ci) {
        const int64_t at = int64_t(co) * C + ci;
        double P = 0;
        this->batch.for_each_slot([&](int g, int lane) {
          P += double(crosses[places[h.index] * groups + g][int64_t(co) * width + lane + ci]);
        });
        product += load(pointwise[at]) * P;
        if (dW) dW[at] = store<T>(A(this->scale_of(h) * h.rstd[co] * P));
      }
      dw += h.rstd[co] * (product - double(means[co]) * this->total(dy_sums, width, co));
    }
    if (h.final && p.dw) p.dw[h.term->edge * p.candidates + h.term->weight] = dw;
  }

  void fold(int node) {
    std::vector<const Half<A>*> chosen;
    for (const auto& h : halves)
      if (this->edge_of(*h.term).target == node) chosen.push_back(&h);
    this->for_each_job(int64_t(chosen.size()), [&](int64_t i) { fold_cross(*chosen[i]); });
    if (p.dw) this->fold_others(node);
  }

  void run() {
    this->pack_taps();
    this->fold_all();
    // Rows of A as the product takes them: one for each channel of dy.
    for (const auto& h : halves)
      for (int co = 0; co < C; ++co)
        this->fill_lanes(h.from_dy + int64_t(co) * width, [&](int ci) { return h.fold[int64_t(ci) * width + co]; });
    for (int node = p.nodes - 1; node >= 0; --node) {
      this->for_each_image([&](Scratch& s, int group, int64_t image) {
        this->finish_state(s, p.inputs + node, image);
        through_edges(s, node, group, image);
        if (node > 0) return;
        for (int state = 0; state < p.inputs; ++state) this->finish_state(s, state, image);
      });
      fold(node);
    }
    this->finish_parameters();
  }
};

}  // namespace fastnas::FASTNAS_ISA
