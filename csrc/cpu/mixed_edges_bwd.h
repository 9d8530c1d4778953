// Runs mixed_edges backward on the CPU: node by node from the last, two sweeps over the images each.
//
// The first sweep of node j completes dL/d(node j): the first halves into node j + 1 give their share
// (first_halves), the pools and skips of all edges that leave node j theirs, the output's gradient is added
// (finish_state). At once, with the image in cache, it gathers the sums over that dL/dy for everything that enters
// node j (add_sums). They are folded. The second sweep takes the sep_convs into node j from dy through their second
// halves to dv, gathers P of their first halves (second_halves), and those are folded. Their first halves run in
// the next node's first sweep: they need that fold, and that sweep has to read the same sources and dy anyway. A
// sweep more does the inputs: 2 * nodes + 1, as in forward.
//
// Every image of a gradient is written by the thread that has the image, states in a fixed order, so
// nothing is added to from two threads and no sum depends on their number. Weight gradients are
// partial sums of the groups of images.
#pragma once

#include "mixed_edges_bwd_sums.h"

namespace fastnas::FASTNAS_ISA {

template <class T> struct Backward : BackwardSums<T> {
  using Base = BackwardSums<T>;
  using typename Base::A;
  using typename Base::Norm;
  using typename Base::Scratch;
  using Base::p, Base::C, Base::L, Base::blocks, Base::width, Base::groups, Base::halves, Base::out, Base::norms;
  using Base::crosses, Base::dv_sums, Base::dy_mean, Base::needed, Base::writer, Base::skip_dots, Base::reduce_crosses;
  using Base::has_convolutions, Base::goes_on, Base::gradient, Base::input_gradient, Base::load_gradient;
  using Base::centred_norm, Base::combine, Base::total, Base::add_sums, Base::fold_sums, Base::fold_halves;
  using Base::Base;

  // Computes du of a half, then dL/dD: du = A^T dy - B (u - mean u) + constant, one product of two factors, written
  // once, where at stride 1 it goes into a padded plane for the transposed convolution. u is made again a few rows
  // at a time, or read where it was kept. The partial sums of dL/dD read du and `in`, the half's padded input,
  // while both are in cache; they are left out when parameters are frozen. Channels of du past the last are 0,
  // because the matrices are, so they add nothing.
  void depthwise_gradient(Scratch& s, const Half<A>& h, A* dy, const A* in, int group, int64_t image, bool opens) {
    if (h.kernel.stride == 1) clear_halo(out, blocks, s.du);
    this->centred_rows(s, h, image, true, [&](Rows rows, const Grid& part) {
      const Factor<A> factors[2] = {{this->rows_of(dy, rows), h.from_dy, C, this->slots(), out.pixels()},
                                    {s.u, h.from_u, C, this->slots(), part.pixels()}};
      write_du(s, h, factors, 2, rows, part);
    });
    add_taps(s, h, in, group, opens);
  }
  // Writes some rows of du, a product, to s.du: padded at stride 1.
  void write_du(Scratch& s, const Half<A>& h, const Factor<A>* factors, int count, Rows rows, const Grid& part) {
    const A* bias = p.training ? h.du_bias : nullptr;
    if (h.kernel.stride == 1)
      product(factors, count, part, blocks, bias, false, s.du + (out.inside() + rows.first * out.pitch()) * L,
              out.pitch(), out.padded());
    else
      product(factors, count, part, blocks, bias, false, this->rows_of(s.du, rows), out.cols, out.pixels());
  }
  void add_taps(Scratch& s, const Half<A>& h, const A* in, int group, bool opens) {
    if (!p.dparams) return;
    A* dtaps = h.dtaps + int64_t(group) * width * h.kernel.taps();
    if (opens) std::fill_n(dtaps, int64_t(width) * h.kernel.taps(), A(0));
    depthwise_correlate(in, this->half_grid(h), s.du, out, h.kernel, blocks, dtaps);
  }

  // Takes one image of a node back through the second halves of its sep_convs: du2 from dy, dv = D2^T du2 where v >
  // 0 (v is the input itself, so it is its own mask), and the sums of dv that the first batch norm needs. dv is
  // stored, because its batch norm must see all images before it can go further back.
  void second_halves(Scratch& s, int node, int group, int64_t image) {
    const bool opens = image == this->first_image(group);
    load_gradient(s, node, image);
    this->for_halves(node, false, [&](int slot, const Half<A>& first) {
      const EdgeTerm& t = *first.term;
      if (!goes_on(this->edge_of(t))) return;
      const Half<A>& second = halves[t.half + 1];
      this->load_second_input(s, t, image);
      depthwise_gradient(s, second, s.g, s.v, group, image, opens);
      second_input_gradient(s, second);
      store_image<A, A>(s.y, out, C, input_gradient(slot, image));
      this->load_source(s, this->edge_of(t).source, image, false);
      A *sum = crosses[slot * groups + group], *sums = dv_sums + (int64_t(slot) * groups + group) * width;
      if (opens) std::fill_n(sum, int64_t(width) * width, A(0)), std::fill_n(sums, width, A(0));
      this->centred_rows(s, first, image, true, [&](Rows rows, const Grid& part) {
        outer(this->rows_of(s.y, rows), C, out.pixels(), s.u, blocks, part.pixels(), part.pixels(), this->slots(),
              false, sum);
      });
      add_channel_sums(s.y, out.pixels(), blocks, sums);
    });
  }

  // Makes dv of a second half from s.du, in s.y.
  void second_input_gradient(Scratch& s, const Half<A>& second) {
    depthwise_transposed_plain(s.du, out, second.taps, second.kernel, blocks, s.y);
    for_each_pixel<A>(out, C, [&](int b, int h, int w, int) {
      A* at = s.y + (int64_t(b) * out.pixels() + h * out.cols + w) * L;
      const A* v = s.v + (int64_t(b) * out.padded() + out.inside() + h * out.pitch() + w) * L;
      put(at, where_relu_passes(get(v), get(at)));
    });
  }

  // Gives the sources of a node what its convolutions owe them, one image: dy for a dil_conv, dv for a sep_conv,
  // through du and the transposed depthwise convolution into s.dx, summed over the edge in padded planes, then once
  // through the relu that all of them share. `mine` finds dv, which lies by slot whether or not an edge is skipped.
  // `fresh`: the first convolution of an edge writes s.dx, so stride 1 clears nothing.
  void first_halves(Scratch& s, int node, int group, int64_t image) {
    const bool opens = image == this->first_image(group);
    load_gradient(s, node, image);
    int slot = 0;
    for (int e = 0; e < p.edge_count; ++e) {
      const Edge& edge = p.edges[e];
      if (edge.target != node) continue;
      const bool skipped = !goes_on(edge) || !has_convolutions(e);
      const Grid& grid = this->grids[edge.source];
      if (!skipped) {
        this->load_source(s, edge.source, image, false);
        if (edge.stride == 2) std::fill_n(s.dx, int64_t(blocks) * grid.padded() * L, A(0));
      }
      // A strided skip occurs at stride 2 only, where s.dx was cleared; so the first to touch s.dx at stride 1 is a
      // convolution, which overwrites it.
      bool fresh = edge.stride == 1;
      for (int i = edge.first_term; i < edge.last_term; ++i) {
        const EdgeTerm& t = p.terms[i];
        const int mine = t.halves == 2 ? slot++ : 0;
        if (skipped) continue;
        if (t.op == EdgeOp::reduce_skip) reduce_gradient(s, i, group, image, opens);
        if (this->is_dense(t)) {
          dense_gradient(s, i, group, image, opens, fresh);
          fresh = false;
        }
        if (t.half < 0) continue;
        const Half<A>& h = halves[t.half];
        A* dy = s.g;
        if (!h.final) {
          load_image<A, A>(input_gradient(mine, image).to_read(), out, C, s.y);
          dy = s.y;
        }
        depthwise_gradient(s, h, dy, s.relu_x, group, image, opens);
        if (needed[edge.source]) depthwise_transposed(s.du, out, h.taps, h.kernel, grid, blocks, fresh, s.dx);
        fresh = false;
      }
      if (!skipped && needed[edge.source]) add_to_source(s, edge, e, image);
    }
  }

  // Adds s.dx where x > 0 to the state's gradient; the edge that comes first writes instead (writer).
  void add_to_source(Scratch& s, const Edge& edge, int e, int64_t image) {
    const Grid& grid = this->grids[edge.source];
    const bool first = writer[edge.source] == e;
    const auto to = gradient(edge.source, image);
    for_each_pixel<A>(grid, C, [&](int b, int h, int w, int used) {
      const int pixel = h * grid.cols + w;
      const int64_t inside = (int64_t(b) * grid.padded() + grid.inside() + h * grid.pitch() + w) * L;
      Vec<A> d = where_relu_passes(get(s.relu_x + inside), get(s.dx + inside));
      if (!first) d += load_pixel<A, A>(to.to_read(), pixel, b, used);
      store_pixel<A, A>(to, pixel, b, used, d);
    });
  }

  // Computes the gradient of a batch norm whose z is formed, which outside of training is linear and reads no z.
  Vec<A> through_norm(Vec<A> scale, Vec<A> dy, Vec<A> mean, const A* centred, Vec<A> rstd_q) const {
    return p.training ? norm_gradient(scale, dy, mean, get(centred), rstd_q) : scale * dy;
  }

  // Takes one image back through a strided skip: dz of its batch norm, then of each part the group's partial sum of
  // dW = dz r^T, with r the part's pixels of relu(x), and W^T dz added to those pixels in s.dx. With multiplicative
  // noise dy is dy d, and its mean comes from the sums gathered for it. A part multiplies its own C/2 channels
  // alone (Factor::first), because 0 times the inf of another channel is NaN.
  void reduce_gradient(Scratch& s, int i, int group, int64_t image, bool opens) {
    const EdgeTerm& t = p.terms[i];
    const int64_t pixels = out.pixels();
    const Norm& n = norms[i];
    if (p.training) centred_norm(s, i, image, s.z);
    const A* dy = s.g;
    const bool times = this->noisy(t) && this->multiplicative();
    if (times) {
      this->draw_noise(s, t, image, s.work);
      combine(s.g, s.work, true, s.work);
      dy = s.work;
    }
    for (int b = 0; b < blocks; ++b) {
      Vec<A> mean = get(dy_mean + int64_t(this->edge_of(t).target) * width + b * L);
      if (times)
        for (int l = 0; l < L && b * L + l < this->lanes; ++l)
          mean[l] = A(total(skip_dots[i] + width, 2 * width, (b * L + l) % C) / double(this->samples()));
      for (int64_t k = 0; k < pixels; ++k) {
        A* at = s.z + (b * pixels + k) * L;
        put(at, through_norm(get(n.scale + b * L), get(dy + (b * pixels + k) * L), mean, at, get(n.rstd_q + b * L)));
      }
    }
    const Grid& grid = this->source_grid(t);
    for (int part = 0; part < 2; ++part) {
      const A* back = this->reduce_matrix[i] + (2 + part) * int64_t(C) * width;
      if (p.dparams) {
        A* sum = reduce_crosses[i] + (int64_t(group) * 2 + part) * width * width;
        if (opens) std::fill_n(sum, int64_t(width) * width, A(0));
        this->gather(s, grid, part, s.u);
        outer(s.z, C, pixels, s.u, blocks, pixels, pixels, this->slots(), false, sum);
      }
      const Factor<A> factor{s.z, back, part == 0 ? C / 2 : C, this->slots(), 0, part * (C / 2)};
      product(&factor, 1, out, blocks, static_cast<A*>(nullptr), false, s.u);
      for_each_pixel<A>(out, C, [&](int b, int h, int w, int) {
        if (2 * h + part >= grid.rows || 2 * w + part >= grid.cols) return;
        A* at = s.dx + (int64_t(b) * grid.padded() + grid.inside() + (2 * h + part) * grid.pitch() + 2 * w + part) * L;
        put(at, get(at) + get(s.u + (int64_t(b) * pixels + h * out.cols + w) * L));
      });
    }
  }

  // Takes one image back through a dense convolution: dz of its batch norm into a padded plane, from it the group's
  // partial sum of dL/dV and, added to s.dx or with `fresh` written there, the transposed convolution.
  void dense_gradient(Scratch& s, int i, int group, int64_t image, bool opens, bool fresh) {
    const EdgeTerm& t = p.terms[i];
    const Norm& n = norms[i];
    if (p.training) centred_norm(s, i, image, s.z);
    clear_halo(out, blocks, s.du);
    const A* dy_means = dy_mean + int64_t(this->edge_of(t).target) * width;
    for_each_pixel<A>(out, C, [&](int b, int h, int w, int) {
      const int64_t at = (int64_t(b) * out.pixels() + h * out.cols + w) * L;
      put(s.du + (int64_t(b) * out.padded() + out.inside() + h * out.pitch() + w) * L,
          through_norm(get(n.scale + b * L), get(s.g + at), get(dy_means + b * L), s.z + at, get(n.rstd_q + b * L)));
    });
    const auto& own = this->dense_terms[i];
    if (p.dparams) dense_outer(s.relu_x, s.du, out, C, t.size, opens, own.partial + group * this->dense_sums(t));
    if (needed[this->edge_of(t).source])
      this->convolve(s, t, s.du, own.back, !fresh, s.dx + int64_t(out.inside()) * L, out.pitch(), out.padded());
  }

  // Completes the gradient of a state, one image: to what its convolutions gave it are added the pools and skips of
  // all edges that leave it and, for a node, its slice of the output's gradient. An input's goes to dx, rounded
  // once; a node's is kept in the accumulation dtype for the sums over it. Where no convolution leaves the state
  // (writer < 0), nothing was written yet, and the sum begins with zeros.
  void finish_state(Scratch& s, int state, int64_t image) {
    if (!needed[state]) return;
    const Grid& grid = this->grids[state];
    const int64_t size = int64_t(grid.pixels()) * width;
    const auto own = gradient(state, image);
    if (writer[state] >= 0) load_image<A, A>(own.to_read(), grid, C, s.dx);
    else std::fill_n(s.dx, size, A(0));
    pools(s, state, image);
    skips(s, state, image);
    if (state < p.inputs) {
      store_image<T, A>(s.dx, grid, C, this->pack(static_cast<T*>(p.dx[state]), grid, C, image));
      return;
    }
    const int node = state - p.inputs;
    if (node >= p.nodes - p.outputs) {
      load_image<T, A>(this->output_slice(static_cast<const T*>(p.dout), node, image), grid, C, s.z);
      for (int64_t k = 0; k < size; k += L) put(s.dx + k, get(s.dx + k) + get(s.z + k));
    }
    store_image<A, A>(s.dx, grid, C, own);
  }

  // Adds the pools that leave a state, each kind and stride once: dz = w r (dy - mean dy - (z - mean) r q) of every
  // edge that has one (w dy where it has no batch norm), with dy of the node it enters, is summed in s.y, then goes
  // through the transposed pool together. z and its winners are computed again. All edges' dy are folded by now, since
  // they enter later nodes. One transposed pool serves all edges, because it is linear in dz and its winners depend on
  // x alone. q and the mean of dy are those of each edge and node.
  void pools(Scratch& s, int state, int64_t image) {
    const int64_t size = int64_t(out.pixels()) * width;
    for (EdgeOp op : {EdgeOp::max_pool, EdgeOp::avg_pool})
      for (int stride : {1, 2}) {
        bool any = false, centred = false;
        for (int i = 0; i < this->terms(); ++i) {
          const EdgeTerm& t = p.terms[i];
          const Edge& edge = this->edge_of(t);
          const bool plain = this->is_plain_pool(t) && op == EdgeOp::avg_pool;
          if (!(t.op == op || plain) || edge.source != state || edge.stride != stride) continue;
          if (!any) {
            this->load_source(s, state, image, true);
            std::fill_n(s.y, size, A(0));
          }
          any = true;
          load_gradient(s, edge.target, image);
          if (plain) {
            add_scaled(this->weight(t), s.g, s.y);
            continue;
          }
          // The mean of this term's norm centres z for all of them: in training their
          // statistics are those of one z.
          if (p.training && !centred) centred_norm(s, i, image, s.z);
          centred = true;
          const Norm& n = norms[i];
          for (int b = 0; b < blocks; ++b) {
            const Vec<A> scale = get(n.scale + b * L), mean = get(dy_mean + int64_t(edge.target) * width + b * L),
                         rstd_q = get(n.rstd_q + b * L);
            for (int64_t k = b * int64_t(out.pixels()) * L; k < (b + 1) * int64_t(out.pixels()) * L; k += L)
              put(s.y + k, get(s.y + k) + through_norm(scale, get(s.g + k), mean, s.z + k, rstd_q));
          }
        }
        if (!any) continue;
        const Grid& grid = this->grids[state];
        for (int b = 0; b < blocks; ++b) {
          const A* d = s.y + int64_t(b) * out.pixels() * L;
          A* dx = s.dx + int64_t(b) * grid.pixels() * L;
          if (op == EdgeOp::max_pool)
            max_pool_transposed(s.x + int64_t(b) * grid.pixels() * L, d, grid, stride, out, s.columns,
                                s.column_gradients, dx);
          else
            avg_pool_transposed(d, grid, stride, out, s.columns, dx);
        }
      }
  }

  void add_scaled(A w, const A* from, A* to) {
    for (int64_t k = 0; k < int64_t(out.pixels()) * width; k += L) put(to + k, get(to + k) + w * get(from + k));
  }

  // Adds the skips that leave a state: w dy, or w d dy with the draws of forward, made again. Additive noise is
  // constant in x; the standard deviation that it is relative to counts as a constant, too.
  void skips(Scratch& s, int state, int64_t image) {
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (t.op != EdgeOp::skip || this->edge_of(t).source != state) continue;
      load_gradient(s, this->edge_of(t).target, image);
      const A w = this->weight(t);
      if (this->noisy(t) && this->multiplicative()) {
        this->draw_noise(s, t, image, s.work);
        combine(s.g, s.work, true, s.g);
      }
      add_scaled(w, s.g, s.dx);
    }
  }

  // Makes dL/dD and strided skips' dL/dW from the groups' partial sums, in fp64 and in their order, from the
  // layout by channel block back to [C][taps] of the tensors. dL/dW of convolutions was folded from P. Rounding
  // to the stored dtype comes last.
  void finish_parameters() {
    if (!p.dparams) return;
    for (const auto& h : halves) {
      T* dD = static_cast<T*>(p.dparams[h.param]);
      const int taps = h.kernel.taps();
      for (int c = 0; c < C; ++c)
        for (int k = 0; k < taps; ++k)
          dD[int64_t(c) * taps + k] =
              store<T>(A(total(h.dtaps, int64_t(width) * taps, (int64_t(c / L) * taps + k) * L + c % L)));
    }
    this->for_each_job(this->terms(), [&](int64_t i) {
      if (this->is_dense(p.terms[i])) finish_dense(p.terms[i], this->dense_terms[i].partial);
    });
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (t.op != EdgeOp::reduce_skip) continue;
      for (int part = 0; part < 2; ++part)
        for (int row = 0; row < C / 2; ++row)
          for (int ci = 0; ci < C; ++ci)
            static_cast<T*>(p.dparams[t.param + part])[int64_t(row) * C + ci] = store<T>(
                A(total(reduce_crosses[i] + part * int64_t(width) * width, 2 * int64_t(width) * width,
                        int64_t(row + part * (C / 2)) * width + ci)));
    }
  }

  // Goes from partial sums [groups][taps][input][width] to [output][input][taps]. The groups are added a vector at a
  // time: at 64 channels there are 16 times 36,864 numbers of each 3x3 convolution, more than an L2 holds. So every
  // group's lines are read in a row, of up to four vectors, and a tile of four inputs is gathered before it is written,
  // output by output: value by value the writes of one vector went to 16 lines.
  void finish_dense(const EdgeTerm& t, const A* partial) {
    constexpr int kInputs = 4, kBlocks = 4, kTaps = 9;
    T* dV = static_cast<T*>(p.dparams[t.param]);
    const int taps = t.size * t.size;
    A tile[kBlocks * L][kInputs][kTaps];
    for (int in = 0; in < C; in += kInputs)
      for (int b = 0; b < blocks; b += kBlocks) {
        const int inputs = std::min(kInputs, C - in), wide = std::min(kBlocks, blocks - b);
        for (int tap = 0; tap < taps; ++tap)
          for (int i = 0; i < inputs; ++i) {
            const A* at = partial + (int64_t(tap) * width + in + i) * width + b * L;
            Wide<A> sum[kBlocks] = {};
            for (int g = 0; g < groups; ++g, at += this->dense_sums(t))
              for (int k = 0; k < wide; ++k) sum[k] += __builtin_convertvector(get(at + k * L), Wide<A>);
            for (int k = 0; k < wide; ++k)
              for (int lane = 0; lane < L; ++lane) tile[k * L + lane][i][tap] = A(sum[k][lane]);
          }
        for (int out_channel = 0; out_channel < wide * L && b * L + out_channel < C; ++out_channel)
          for (int i = 0; i < inputs; ++i)
            for (int tap = 0; tap < taps; ++tap)
              dV[(int64_t(b * L + out_channel) * C + in + i) * taps + tap] = store<T>(tile[out_channel][i][tap]);
      }
  }

  // The order of the passes is told at the top of the file. The folded matrices of forward are made again from the
  // kept statistics, which takes C^2 work a half and no pass over the data.
  void run() {
    this->pack_taps();
    this->fold_all();
    for (int node = p.nodes - 1; node >= 0; --node) {
      this->for_each_image([&](Scratch& s, int group, int64_t image) {
        if (node + 1 < p.nodes) first_halves(s, node + 1, group, image);
        finish_state(s, p.inputs + node, image);
        add_sums(s, node, group, image);
      });
      fold_sums(node);
      this->for_each_image([&](Scratch& s, int group, int64_t image) { second_halves(s, node, group, image); });
      fold_halves(node, false);
    }
    this->for_each_image([&](Scratch& s, int group, int64_t image) {
      first_halves(s, 0, group, image);
      for (int state = 0; state < p.inputs; ++state) finish_state(s, state, image);
    });
    finish_parameters();
  }
};

}  // namespace fastnas::FASTNAS_ISA
