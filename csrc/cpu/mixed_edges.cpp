// Runs mixed_edges forward on the CPU. Compiled once per instruction set; FASTNAS_ISA names the namespace.
//
// A level of the DAG (the inputs, then one node after the other) takes two sweeps over the images. The first writes
// the node before, if there is one, and gathers the statistics of everything that leaves the level's states but the
// second halves of sep_convs. The second computes v and gathers theirs. A last sweep writes the last node: 2 *
// nodes + 1 sweeps, 9 for a DARTS cell. Between sweeps the partial sums are folded, C x C work. Outside of training
// there is nothing to gather, and one sweep a node writes it.
//
// So u of every half is computed twice, once for its statistics, once for v or for the sum of the node. Keeping it
// would cost a write and a read of 4 bytes an element, which takes longer than its 9 to 25 FMA.
#include "mixed_edges.h"

#include "mixed_edges_bwd_linear.h"
#include "mixed_edges_statistics.h"

namespace fastnas::FASTNAS_ISA {
namespace {

template <class T> struct Forward : Statistics<T> {
  using Base = Statistics<T>;
  using typename Base::A;
  using typename Base::Norm;
  using typename Base::Scratch;
  using Base::p, Base::C, Base::L, Base::blocks, Base::width, Base::halves, Base::out, Base::norms;
  using Base::gather_first, Base::gather_first_halves, Base::gather_second_halves, Base::fold_halves, Base::fold_others;
  using Base::Base;

  // Writes one image of a node, the sum of all its edges' terms, into its slice of the output. The sum stays in
  // s.y, in the accumulation dtype, until every term is in it: 16-bit dtypes round once, and no edge's output is
  // ever stored. Terms are added in the order of the table.
  void sum_node(Scratch& s, int node, int64_t image) {
    const int64_t pixels = out.pixels();
    std::fill_n(s.y, pixels * width, A(0));
    for (int e = 0; e < p.edge_count; ++e) {
      if (p.edges[e].target != node) continue;
      this->load_source(s, p.edges[e].source, image, true);
      for (int i = p.edges[e].first_term; i < p.edges[e].last_term; ++i) add_term(s, i, image);
    }
    store_image<T, A>(s.y, out, C, this->template node_pixels<T>(node, image));
  }

  // Adds one candidate's output, times its weight, to s.y.
  void add_term(Scratch& s, int i, int64_t image) {
    const EdgeTerm& t = p.terms[i];
    if (t.half >= 0) {
      add_convolution(s, t, image);
    } else if (this->is_pool(t)) {
      this->pool(t, s, s.z);
      add_normalised(s, norms[i]);
    } else if (this->is_dense(t)) {
      this->load_dense(s, t, image, s.z);
      add_normalised(s, norms[i]);
    } else if (this->is_plain_pool(t)) {
      this->pool(t, s, s.z);
      add_scaled(s, this->weight(t), s.z);
    } else if (t.op == EdgeOp::skip) {
      add_skip(s, t, s.x, image);
    } else {
      this->reduce(t, s, s.u, s.z);
      if (!this->noisy(t)) return add_normalised(s, norms[i]);
      normalise(s.z, norms[i]);
      add_skip(s, t, s.z, image);
    }
  }

  // Adds w BN(W u) = A (u - mean u) straight to the sum: the last depthwise output comes a few rows at a
  // time, each piece is multiplied while it is in L1, and in memory setting "fast" stored for backward. The
  // second half of a sep_conv starts from v, which its statistics sweep stored or which is computed again
  // here, the same bits either way.
  void add_convolution(Scratch& s, const EdgeTerm& t, int64_t image) {
    const bool two = t.halves == 2;
    const Half<A>& h = halves[t.half + two];
    if (two) this->load_second_input(s, t, image);
    const bool keep = p.training && this->keeps(h);
    this->centred_rows(s, h, image, false, [&](Rows rows, const Grid& part) {
      if (keep) {
        const Pixels<T> to = this->template kept_pixels<T>(h, image);
        store_image<T, A>(s.u, part, C, to.from(int64_t(rows.first) * out.cols));
      }
      const Factor<A> factor{s.u, h.fold, C, this->slots()};
      product(&factor, 1, part, blocks, h.bias, true, this->rows_of(s.y, rows), out.cols, out.pixels());
    });
  }

  // Turns z of a strided skip into BN(z): noise is drawn for the normalised value, so this one
  // cannot be folded into a scale.
  void normalise(A* z, const Norm& norm) {
    for_each_pixel<A>(out, C, [&](int b, int h, int c, int) {
      A* at = z + (int64_t(b) * out.pixels() + h * out.cols + c) * L;
      Vec<A> rstd{};
      for (int l = 0; l < L && b * L + l < this->lanes; ++l) rstd[l] = A(norm.rstd[(b * L + l) % C]);
      put(at, (get(at) - get(norm.mean + b * L)) * rstd);
    });
  }

  void add_scaled(Scratch& s, A w, const A* value) {
    for (int64_t k = 0; k < int64_t(out.pixels()) * width; k += L) put(s.y + k, get(s.y + k) + w * get(value + k));
  }

  // Adds w x, w (x + d) or w (x d). The noise d is drawn here, again in backward, and never stored.
  void add_skip(Scratch& s, const EdgeTerm& t, const A* value, int64_t image) {
    const A w = this->weight(t);
    if (!this->noisy(t)) return add_scaled(s, w, value);
    const int64_t size = int64_t(out.pixels()) * width;
    this->draw_noise(s, t, image, s.u);
    const bool times = this->multiplicative();
    for (int64_t k = 0; k < size; k += L) {
      const Vec<A> x = get(value + k), d = get(s.u + k);
      put(s.y + k, get(s.y + k) + w * (times ? x * d : x + d));
    }
  }

  // Adds w BN(z) of a pool or strided skip. z - mean comes first: where both are large the difference is exact,
  // while scale z - scale mean would cancel.
  void add_normalised(Scratch& s, const Norm& n) {
    for (int b = 0; b < blocks; ++b) {
      const Vec<A> scale = get(n.scale + b * L), mean = get(n.mean + b * L);
      for (int64_t i = 0; i < out.pixels(); ++i) {
        const int64_t at = (b * int64_t(out.pixels()) + i) * L;
        put(s.y + at, get(s.y + at) + scale * (get(s.z + at) - mean));
      }
    }
  }

  // Gathers and folds the statistics of everything that leaves the states [from, to). `summed` is the node
  // that became a state just now, or -1: its sum is written in the same sweep that gathers from it, image
  // by image, so that the image is read back from cache. The sum needs nothing of the new state's
  // statistics, only those folded before.
  void gather(int from, int to, int summed) {
    this->for_each_image([&](Scratch& s, int group, int64_t image) {
      if (summed >= 0) sum_node(s, summed, image);
      for (int state = from; state < to; ++state) {
        this->load_source(s, state, image, true);
        gather_first(s, state, group, image);
        gather_first_halves(s, from, to, state, group, image);
      }
    });
    fold_halves(from, to, true);
    fold_others(from, to);
    bool any = false;
    this->for_halves(from, to, false, [&](int, const Half<A>&) { any = true; });
    if (!any) return;
    this->for_each_image([&](Scratch& s, int group, int64_t image) {
      gather_second_halves(s, from, to, group, image);
    });
    fold_halves(from, to, false);
  }

  // Gathers the statistics of the inputs' edges first; then every node is summed as soon as all that
  // enter it is folded.
  void run() {
    this->pack_taps();
    if (p.training) gather(0, p.inputs, -1);
    else this->fold_all();
    for (int node = 0; node < p.nodes; ++node) {
      const int state = p.inputs + node;
      if (p.training && node + 1 < p.nodes) gather(state, state + 1, node);
      else this->for_each_image([&](Scratch& s, int, int64_t image) { sum_node(s, node, image); });
    }
  }
};

}  // namespace

size_t mixed_edges_workspace(const MixedEdgesParams& p) {
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (!p.dout) return Forward<T>(p, true).arena.used;
    return p.training ? Backward<T>(p, true).arena.used : LinearBackward<T>(p, true).arena.used;
  });
}

void mixed_edges_fwd(const MixedEdgesParams& p) {
  with_dtype(p.dtype, [&](auto t) { Forward<decltype(t)>(p, false).run(); });
}

void mixed_edges_bwd(const MixedEdgesParams& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.training) Backward<T>(p, false).run();
    else LinearBackward<T>(p, false).run();
  });
}

}  // namespace fastnas::FASTNAS_ISA
