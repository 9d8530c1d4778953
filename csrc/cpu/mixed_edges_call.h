// Computes what forward and backward of mixed_edges share.
//
// The working unit is one image of one state, or a pack of them where they share vectors; `image` is the first of it.
// What is cheap to compute from it (pools, depthwise outputs, strided skips, draws of noise) is computed again in every
// sweep that needs it and never held: 25 FMA an element cost less than writing and reading the element (0.3 against
// 0.4 ns, benchmarks/NOTES.md).
#pragma once

#include "mixed_edges_buffers.h"
#include "noise.h"
#include "pool.h"
#include "product.h"

namespace fastnas::FASTNAS_ISA {

template <class T> struct Call : Buffers<T> {
  using Base = Buffers<T>;
  using typename Base::A;
  using typename Base::Norm;
  using typename Base::Scratch;
  using Base::p, Base::C, Base::L, Base::blocks, Base::width, Base::groups, Base::grids, Base::out, Base::halves;
  using Base::batch, Base::lanes, Base::pack, Base::fill_lanes;
  using Base::norms, Base::reduce_matrix, Base::dense_terms, Base::scratch;
  using Base::terms, Base::edge_of, Base::source_grid, Base::half_grid, Base::weight, Base::is_pool, Base::is_dense;
  using Base::param;
  using Base::Base;

  // Calls f(scratch of the thread, group, first image) over all packs; the packs of a
  // group come in order on one thread.
  template <class F> void for_each_image(F f) {
    batch.for_each_pack(int(scratch.size()), [&](int thread, int group, int64_t n) { f(scratch[thread], group, n); });
  }

  // Calls f(index) over independent small jobs.
  template <class F> void for_each_job(int64_t count, F f) {
    const int threads = int(std::min<int64_t>(scratch.size(), count));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) f(i);
  }

  // Finds the pixels of a node: its slice of the concatenated output, C of outputs * C channels, or where the output
  // does not show it an image of its own.
  template <class U> Pixels<U> node_pixels(int node, int64_t image) const {
    const int inner = p.nodes - p.outputs;
    if (node < inner)
      return kept_pack<U>(p.inner, node, image);
    return output_slice(static_cast<U*>(p.out), node, image);
  }
  template <class U> Pixels<U> output_slice(U* base, int node, int64_t image) const {
    return pack(base + int64_t(node - (p.nodes - p.outputs)) * C, out, int64_t(p.outputs) * C, image);
  }
  // Finds the pixels of a state: an input tensor or a node.
  Pixels<const T> state_pixels(int state, int64_t image) const {
    if (state >= p.inputs) return node_pixels<const T>(state - p.inputs, image);
    return pack(static_cast<const T*>(p.x[state]), grids[state], C, image);
  }

  // Reads an image of a state, rectifies and pads it in one pass: convolutions read relu_x; pools, skips and
  // statistics read x itself, which is stored only if `raw` asks for it. Edges that leave one state follow
  // each other, so the image that is there already is used again. States do not change once they are
  // written, hence it never goes stale.
  void load_source(Scratch& s, int state, int64_t image, bool raw) {
    if (s.state == state && s.image == image && s.raw >= raw) return;
    const Grid& grid = grids[state];
    const Pixels<const T> from = state_pixels(state, image);
    clear_halo(grid, blocks, s.relu_x);
    for_each_pixel<A>(grid, C, [&](int b, int h, int w, int used) {
      const int pixel = h * grid.cols + w;
      const Vec<A> x = load_pixel<T, A>(from, pixel, b, used);
      if (raw) put(s.x + (int64_t(b) * grid.pixels() + pixel) * L, x);
      put(s.relu_x + (int64_t(b) * grid.padded() + grid.inside() + h * grid.pitch() + w) * L, relu(x));
    });
    s.state = state, s.image = image, s.raw = raw;
  }

  // --- pieces that are computed again wherever they are needed ---------------------------------------------

  // Computes z of a pool, [blocks][pixels][lanes].
  void pool(const EdgeTerm& t, const Scratch& s, A* z) {
    const Grid& grid = source_grid(t);
    for (int b = 0; b < blocks; ++b) {
      const A* x = s.x + int64_t(b) * grid.pixels() * L;
      A* to = z + int64_t(b) * out.pixels() * L;
      if (t.op == EdgeOp::max_pool) max_pool(x, grid, edge_of(t).stride, out, s.columns, to);
      else avg_pool(x, grid, edge_of(t).stride, out, s.columns, to);
    }
  }

  // Collects the pixels (2h + shift, 2w + shift) of relu(x), which a part of a strided skip reads. Beyond the image
  // they are the halo's zeros, so odd sizes need no test.
  void gather(const Scratch& s, const Grid& grid, int shift, A* to) {
    for_each_pixel<A>(out, C, [&](int b, int h, int w, int) {
      const A* from = s.relu_x + (int64_t(b) * grid.padded() + grid.inside()) * L;
      put(to + (int64_t(b) * out.pixels() + h * out.cols + w) * L,
          get(from + ((2 * h + shift) * grid.pitch() + 2 * w + shift) * L));
    });
  }

  // Computes z of a strided skip (FactorizedReduce): each part multiplies its own pixels with its own half of the
  // matrix, then the channels are selected. `strided` and s.v are overwritten.
  void reduce(const EdgeTerm& t, const Scratch& s, A* strided, A* z) {
    const A* matrix = reduce_matrix[&t - p.terms];
    for (int part = 0; part < 2; ++part) {
      gather(s, source_grid(t), part, strided);
      const Factor<A> factor{strided, matrix + part * int64_t(C) * width, C, this->slots()};
      product(&factor, 1, out, blocks, static_cast<A*>(nullptr), false, part == 0 ? z : s.v);
    }
    select_halves(out.pixels(), C, s.v, z);
  }

  // Writes or adds the dense convolution of an image, or its transpose: `weights` are packed for either.
  void convolve(const Scratch& s, const EdgeTerm& t, const A* in, const A* weights, bool add, A* to, int pitch,
                int64_t plane) {
    if (this->by_tiles(t)) winograd(in, out, C, weights, add, to, pitch, plane, s.tiles);
    else dense(in, out, C, weights, t.size, add, to, pitch, plane);
  }
  // Computes z of a dense convolution, rounded to the stored dtype: what is kept and what is computed again must be
  // the same z, or the memory setting would change results. Reads s.relu_x.
  void compute_dense(const Scratch& s, const EdgeTerm& t, A* z) {
    convolve(s, t, s.relu_x, dense_terms[&t - p.terms].forward, false, z, out.cols, out.pixels());
    if constexpr (!std::is_same_v<T, A>)
      for (int64_t k = 0; k < int64_t(out.pixels()) * width; ++k) z[k] = load(store<T>(z[k]));
  }
  // Makes z of a dense convolution where its statistics are known: read where it was kept, else computed again.
  void load_dense(Scratch& s, const EdgeTerm& t, int64_t image, A* z) {
    if (p.training && keeps_dense(t)) {
      const Pixels<const T> kept = dense_pixels<const T>(t, image);
      load_image<T, A>(kept, out, C, z);
      return;
    }
    load_source(s, edge_of(t).source, image, false);
    compute_dense(s, t, z);
  }
  bool keeps_dense(const EdgeTerm& t) const { return p.z != nullptr && t.kept >= 0; }
  template <class U> Pixels<U> dense_pixels(const EdgeTerm& t, int64_t image) const {
    return kept_pack<U>(p.z, t.kept, image);
  }

  // Makes v = relu(BN(W1 (D1 * relu(x)))), the input of a second half, padded in s.v: read where forward kept it
  // (memory "fast" and "lean"), else computed again, one depthwise convolution and one product ("minimal", and eval
  // mode, where nothing is kept). The latter overwrites s.u and s.work, and loads the source.
  void load_second_input(Scratch& s, const EdgeTerm& t, int64_t image) {
    if (p.v == nullptr || !p.training) {
      compute_second_input(s, t, image, false);
      return;
    }
    clear_halo(out, blocks, s.v);
    const Pixels<const T> from = second_input<const T>(t, image);
    for_each_pixel<A>(out, C, [&](int b, int h, int w, int used) {
      put(s.v + (int64_t(b) * out.padded() + out.inside() + h * out.pitch() + w) * L,
          load_pixel<T, A>(from, h * out.cols + w, b, used));
    });
  }
  template <class U> Pixels<U> second_input(const EdgeTerm& t, int64_t image) const {
    return kept_pack<U>(p.v, t.input, image);
  }
  // Computes v a few rows at a time and stores it if `keep`. v is rounded to the stored dtype
  // either way: statistics, the sum of the node and backward must all see the same v, or the
  // memory setting would change results.
  void compute_second_input(Scratch& s, const EdgeTerm& t, int64_t image, bool keep) {
    load_source(s, edge_of(t).source, image, false);
    const Half<A>& h = halves[t.half];
    clear_halo(out, blocks, s.v);
    const Pixels<T> to = keep ? second_input<T>(t, image) : Pixels<T>{nullptr, 0};
    centred_rows(s, h, image, false, [&](Rows rows, const Grid& part) {
      const Factor<A> factor{s.u, h.fold, C, this->slots()};
      product(&factor, 1, part, blocks, h.bias, false, s.work);
      for_each_pixel<A>(rows, out.cols, C, [&](int b, int row, int w, int used) {
        const A* at = s.work + (int64_t(b) * part.pixels() + (row - rows.first) * out.cols + w) * L;
        const Vec<A> v = rounded<T, A>(relu(get(at)));
        put(s.v + (int64_t(b) * out.padded() + out.inside() + row * out.pitch() + w) * L, v);
        if (keep) store_pixel<T, A>(to, row * out.cols + w, b, used, v);
      });
    });
  }

  // Makes u - mean(u) of a half, a few rows at a time in s.u, and calls f(rows, grid of s.u)
  // on each piece while it is in L1.
  //
  // u is read where it was kept (`reuse`, memory "fast"), else computed from s.v (second half of a sep_conv) or
  // s.relu_x, which must be loaded. Centring costs nothing, since minus mean(u) is the bias of the convolution, and
  // it is what keeps the products exact: A u - A mean(u) would cancel where channels lie far from zero.
  template <class F> void centred_rows(Scratch& s, const Half<A>& h, int64_t image, bool reuse, F f) {
    const bool second = h.final && h.term->halves == 2, read = reuse && keeps(h);
    for_each_rows<A>(out, blocks, [&](Rows rows) {
      const Grid part{rows.count(), out.cols};
      if (read) {
        load_image<T, A>(kept_pixels<const T>(h, image).from(int64_t(rows.first) * out.cols), part, C, s.u);
      } else {
        depthwise(second ? s.v : s.relu_x, half_grid(h), h.taps, h.kernel, h.shift, rows, out.cols, blocks, s.u);
      }
      f(rows, part);
    });
  }
  // Finds these rows of an unpadded image of the node's grid, in the first channel block.
  A* rows_of(A* image, Rows rows) const { return image + int64_t(rows.first) * out.cols * L; }
  bool keeps(const Half<A>& h) const { return p.u != nullptr && h.kept >= 0; }
  template <class U> Pixels<U> kept_pixels(const Half<A>& h, int64_t image) const {
    return kept_pack<U>(p.u, h.kept, image);
  }
  // Finds a pack of one of the images of a node's size that were kept for backward, [kept][N][pixels][C].
  template <class U> Pixels<U> kept_pack(void* kept, int32_t place, int64_t image) const {
    return pack(static_cast<U*>(kept) + place * p.images * out.pixels() * C, out, C, image);
  }

  // Draws the noise of a skip into `to`, channels in the lanes. The j-th skip into a node takes stream j of the
  // node, and elements are counted in NCHW order over the whole batch, as on every backend: drawn in that order,
  // four to a Philox block, then transposed. Draws are made again in every sweep, so they are never stored.
  void draw_noise(Scratch& s, const EdgeTerm& t, int64_t image, A* to) {
    const int node = edge_of(t).target;
    int ordinal = 0;
    for (int i = 0; i < int(&t - p.terms); ++i)
      ordinal += p.terms[i].skip >= 0 && edge_of(p.terms[i]).target == node;
    const double spread = p.level[1] * (is_relative(p.form) ? p.std[t.skip] : 1.0);
    const Draw<A> draw(p.form, uint64_t(p.rng[2 * node]), uint64_t(p.rng[2 * node + 1]) + uint64_t(ordinal),
                       p.level[0], spread);
    const int64_t count = int64_t(C) * out.pixels();
    for (int64_t n = image; n < std::min(image + batch.slots, p.images); ++n) {
      draw_range(draw, n * count, count, s.noise);
      A* slot = to + (n - image) * C;
      for_each_pixel<A>(out, C, [&](int b, int h, int w, int used) {
        const int pixel = h * out.cols + w;
        A* at = slot + (int64_t(b) * out.pixels() + pixel) * L;
        for (int l = 0; l < used; ++l) at[l] = s.noise[int64_t(b * L + l) * out.pixels() + pixel];
      });
    }
  }
  bool noisy(const EdgeTerm& t) const { return is_drawn_on(p.form, t.op); }
  bool multiplicative() const { return is_multiplicative(p.form); }

  // --- small matrices --------------------------------------------------------------------------------------

  // Lays out the weights of dense convolutions, the depthwise taps by channel block, and the matrices of strided
  // skips. A part of a strided skip fills its own output channels only; the zeros elsewhere are multiplied, but their
  // results are never selected.
  void pack_taps() {
    for_each_job(terms(), [&](int64_t i) {
      const EdgeTerm& t = p.terms[i];
      if (!is_dense(t)) return;
      for (const bool transposed : {false, true}) {
        A* to = transposed ? dense_terms[i].back : dense_terms[i].forward;
        if (to && this->by_tiles(t)) pack_winograd(param(t.param), C, transposed, to);
        else if (to) pack_dense(param(t.param), C, t.size, transposed, to);
      }
    });
    for_each_job(int64_t(halves.size()), [&](int64_t i) {
      const Half<A>& h = halves[i];
      const T* taps = param(h.param);
      const int count = h.kernel.taps();
      for (int l = 0; l < width; ++l)
        for (int k = 0; k < count; ++k)
          h.taps[(int64_t(l / L) * count + k) * L + l % L] =
              l < lanes ? A(load(taps[int64_t(l % C) * count + k])) : A(0);
    });
    for (int i = 0; i < terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (t.op != EdgeOp::reduce_skip) continue;
      for (int part = 0; part < 2; ++part) {
        const T* w = param(t.param + part);
        A *forward = reduce_matrix[i] + part * int64_t(C) * width, *back = forward + 2 * int64_t(C) * width;
        const int first = part * (C / 2);
        const auto of = [&](int co, int ci) {
          return co >= first && co < first + C / 2 ? load(w[int64_t(co - first) * C + ci]) : A(0);
        };
        for (int row = 0; row < C; ++row) {
          fill_lanes(forward + int64_t(row) * width, [&](int co) { return of(co, row); });
          fill_lanes(back + int64_t(row) * width, [&](int ci) { return of(row, ci); });
        }
      }
    }
  }

  // Makes, from mean and variance of z = W u, r, the matrix A = w r W and, outside of training, the constant -w r
  // mean(z). The products are made in fp64 and rounded once. A first half of a sep_conv has w = 1.
  void fold_half(const Half<A>& h) {
    const double scale = scale_of(h);
    const T* pointwise = param(h.param + 1);
    const A *stats = stats_of(h.norm), *shift = nullptr;
    if (p.training) shift = static_cast<const A*>(p.shift) + int64_t(h.index) * C;
    fill_lanes(h.shift, [&](int c) { return shift ? shift[c] : A(0); });
    for (int co = 0; co < C; ++co) h.rstd[co] = batch_rstd(double(stats[C + co]), p.eps);
    for (int ci = 0; ci < C; ++ci)
      fill_lanes(h.fold + int64_t(ci) * width,
                 [&](int co) { return folded(scale, h.rstd[co], load(pointwise[int64_t(co) * C + ci])); });
    if (h.bias) fill_lanes(h.bias, [&](int co) { return -scale * h.rstd[co] * double(stats[co]); });
  }
  double scale_of(const Half<A>& h) const { return h.final ? double(weight(*h.term)) : 1.0; }
  A* stats_of(int norm) const { return static_cast<A*>(p.stats) + int64_t(norm) * 2 * C; }

  // Makes the same for a pool, strided skip or dense convolution: mean, r and w r of each channel, zeros in the lanes
  // past the last.
  void fold_norm(int term) {
    const EdgeTerm& t = p.terms[term];
    const A* stats = stats_of(t.norm);
    Norm& n = norms[term];
    for (int c = 0; c < C; ++c) n.rstd[c] = batch_rstd(double(stats[C + c]), p.eps);
    fill_lanes(n.mean, [&](int c) { return stats[c]; });
    fill_lanes(n.scale, [&](int c) { return double(weight(t)) * n.rstd[c]; });
  }
  bool has_norm(const EdgeTerm& t) const { return is_pool(t) || t.op == EdgeOp::reduce_skip || is_dense(t); }
  // Folds all at once from the statistics that are there: those that are given, or that forward kept.
  void fold_all() {
    for_each_job(int64_t(halves.size()), [&](int64_t i) { fold_half(halves[i]); });
    for (int i = 0; i < terms(); ++i)
      if (has_norm(p.terms[i])) fold_norm(i);
  }
};

}  // namespace fastnas::FASTNAS_ISA
