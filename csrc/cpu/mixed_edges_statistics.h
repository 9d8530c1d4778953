// Holds the first part of mixed_edges' forward on the CPU: what every batch norm needs is gathered
// image by image, then folded.
//
// A convolution's batch norm needs mean(z) and var(z) of z = W u over all images before a single output can be
// written. z is linear in u, so both follow from mean(u) and S = cov(u):  mean(z) = W mean(u),  var(z) = diag(W S
// W^T). A sweep therefore adds C x C Gram matrices (C/2 MAC an element, by symmetry) instead of forming z, storing
// it and reading it again. Pools and strided skips form z in cache and add moments of its channels.
#pragma once

#include "mixed_edges_call.h"

namespace fastnas::FASTNAS_ISA {

template <class T> struct Statistics : Call<T> {
  using Base = Call<T>;
  using typename Base::A;
  using typename Base::Norm;
  using typename Base::Scratch;
  using Base::p, Base::C, Base::L, Base::blocks, Base::width, Base::groups, Base::halves, Base::out, Base::norms;
  using Base::batch, Base::lanes;

  // Holds the partial sums of one half over one group of images. The Gram matrix is that of u + shift, where shift
  // is minus the mean of the group's first rows: where u lies far from zero, raw second moments in fp32 would lose
  // the variance when the square of the mean is taken off. The pivot need not be exact, the fold corrects for it.
  struct Gram {
    A* products;    // [width][width] of (u + shift)(u + shift)^T, lane blocks on and above the diagonal
    A* deviations;  // [width] of u + shift
    A* shift;       // [width]
    Gram of_slot(int lane) const { return {products + lane, deviations + lane, shift + lane}; }
  };
  // They are [halves that one sweep gathers][groups], used again by every sweep.
  std::vector<Gram> grams;
  double* fold_scratch;  // [threads][2][C][width]
  int gathered;  // the most halves that one sweep gathers

  // A sweep gathers the first halves that leave a level's states, or the second ones. The level of a state: 0 for
  // the inputs, then one per node, because node j is complete only after node j - 1.
  Statistics(const MixedEdgesParams& params, bool measure) : Base(params, measure) {
    std::vector<int> first(p.nodes + 1), second(p.nodes + 1);
    for (const auto& h : halves) {
      const int source = this->edge_of(*h.term).source, level = source < p.inputs ? 0 : source - p.inputs + 1;
      ++(is_first(h) ? first : second)[level];
    }
    gathered = p.training ? std::max(*std::max_element(first.begin(), first.end()),
                                     *std::max_element(second.begin(), second.end()))
                          : 0;
    for (int i = 0; i < gathered * groups; ++i)
      grams.push_back({this->arena.template take<A>(int64_t(width) * width), this->arena.template take<A>(width),
                       this->arena.template take<A>(width)});
    fold_scratch = this->arena.template take<double>(int64_t(this->scratch.size()) * 2 * C * width);
  }

  bool is_first(const Half<A>& h) const { return h.index == h.term->half; }

  // Calls f(slot in `grams`, half) over the first or second halves that leave the states [from, to).
  template <class F> void for_halves(int from, int to, bool first, F f) {
    int slot = 0;
    for (const auto& h : halves) {
      const int source = this->edge_of(*h.term).source;
      if (source >= from && source < to && is_first(h) == first) f(slot++, h);
    }
  }

  // Adds an image's u to the Gram matrix and the sums of its half. `opens` marks the group's first image, which
  // clears the partial sums and sets the pivot: its first rows are computed once unshifted for their mean and then
  // again shifted. Each piece of u is used while it is in L1, for the sums and for the products, and dropped.
  void gather_gram(Scratch& s, const Half<A>& h, const A* in, int slot, int group, bool opens) {
    Gram& gram = grams[slot * groups + group];
    if (opens) {
      std::fill_n(s.work, width, A(0));
      std::fill_n(gram.products, int64_t(width) * width, A(0));
      std::fill_n(gram.deviations, width, A(0));
      std::fill_n(gram.shift, width, A(0));
    }
    for_each_rows<A>(out, blocks, [&](Rows rows) {
      const int pixels = rows.count() * out.cols;
      const auto compute = [&] {
        depthwise(in, this->half_grid(h), h.taps, h.kernel, gram.shift, rows, out.cols, blocks, s.u);
      };
      if (opens && rows.first == 0) {
        compute();
        add_channel_sums(s.u, pixels, blocks, s.work);
        for (int c = 0; c < width; ++c) gram.shift[c] = -s.work[c] / A(pixels);
      }
      compute();
      add_channel_sums(s.u, pixels, blocks, gram.deviations);
      outer(s.u, C, pixels, s.u, blocks, pixels, pixels, this->slots(), true, gram.products);
    });
  }

  // Gathers, from one image of a state, the moments of its pools (each kind and stride once, for all edges),
  // of its strided skips and dense convolutions, whose z is kept where the memory setting says so, and of
  // the state itself where noise is relative to the spread of x. `before` counts the group's earlier packs.
  void gather_first(Scratch& s, int state, int group, int64_t image) {
    const int64_t before = (image - this->first_image(group)) / batch.slots;
    const int used = C * batch.slots_of(group);
    const Grid& grid = this->grids[state];
    bool done[2][2] = {}, raw = false;
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      const Edge& e = this->edge_of(t);
      if (e.source != state) continue;
      if (this->is_pool(t) && !done[t.op == EdgeOp::avg_pool][e.stride - 1]) {
        done[t.op == EdgeOp::avg_pool][e.stride - 1] = true;
        this->pool(t, s, s.z);
        this->pooled(state, t.op, e.stride).add_pack(s.z, out.pixels(), used, group, before * out.pixels());
      } else if (t.op == EdgeOp::reduce_skip) {
        this->reduce(t, s, s.u, s.z);
        this->own_moments[i].add_pack(s.z, out.pixels(), used, group, before * out.pixels());
      } else if (this->is_dense(t)) {
        this->compute_dense(s, t, s.z);
        if (this->keeps_dense(t)) store_image<T, A>(s.z, out, C, this->template dense_pixels<T>(t, image));
        this->own_moments[i].add_pack(s.z, out.pixels(), used, group, before * out.pixels());
      } else if (t.op == EdgeOp::skip && is_relative(p.form) && !raw) {
        raw = true;
        this->state_moments[state].add_pack(s.x, grid.pixels(), used, group, before * grid.pixels());
      }
    }
  }

  // Gathers the Gram matrices of all first halves that leave the state; reads relu_x of the image just loaded.
  void gather_first_halves(Scratch& s, int from, int to, int state, int group, int64_t image) {
    for_halves(from, to, true, [&](int slot, const Half<A>& h) {
      if (this->edge_of(*h.term).source == state)
        gather_gram(s, h, s.relu_x, slot, group, image == this->first_image(group));
    });
  }

  // Computes v of every sep_conv, stores it if the memory setting keeps it, and gathers the Gram
  // matrix of its second depthwise output. It needs the folded first halves, whose batch norm stands
  // between: hence a sweep of its own.
  void gather_second_halves(Scratch& s, int from, int to, int group, int64_t image) {
    for_halves(from, to, false, [&](int slot, const Half<A>& h) {
      this->compute_second_input(s, *h.term, image, p.v != nullptr);
      gather_gram(s, h, s.v, slot, group, image == this->first_image(group));
    });
  }

  // Folds the halves whose sums are complete, one job each: about C^3 multiplications in fp64.
  void fold_halves(int from, int to, bool first) {
    std::vector<const Half<A>*> chosen;
    for_halves(from, to, first, [&](int, const Half<A>& h) { chosen.push_back(&h); });
    this->for_each_job(int64_t(chosen.size()), [&](int64_t i) {
      fold_statistics(*chosen[i], int(i), fold_scratch + thread_number() * 2 * C * width);
    });
  }

  // Goes from the groups' partial sums to mean(u), S, the statistics of z, the shift that backward
  // uses, and the folded matrix.
  //
  // The first loop adds the means of the groups' slots: that of u is deviations / n - shift. The second adds,
  // with d such a mean minus the whole mean and e = deviations / n the mean left after the shift,
  //  sum (u - mean)(u - mean)^T = products + n (d d^T - e e^T),
  // all in fp64 and group by group in their order. Only lane blocks on and above the diagonal are
  // there; the rest is mirrored. A variance below 0, which rounding can leave of a constant channel, is
  // stored as 0 (stored_variance).
  void fold_statistics(const Half<A>& h, int slot, double* work) {
    double *S = work, *row = work + int64_t(C) * width;
    std::vector<double> mean(C, 0.0);
    const double total = double(this->samples());
    batch.for_each_slot([&](int g, int lane) {
      const Gram gram = grams[slot * groups + g].of_slot(lane);
      const double n = double(batch.packs(g) * out.pixels());
      for (int c = 0; c < C; ++c) mean[c] += n / total * (double(gram.deviations[c]) / n - double(gram.shift[c]));
    });
    std::fill_n(S, int64_t(C) * width, 0.0);
    std::vector<double> deviation(width, 0.0), delta(width, 0.0);
    batch.for_each_slot([&](int g, int lane) {
      const Gram gram = grams[slot * groups + g].of_slot(lane);
      const double n = double(batch.packs(g) * out.pixels());
      for (int c = 0; c < C; ++c) {
        deviation[c] = double(gram.deviations[c]) / n;
        delta[c] = deviation[c] - double(gram.shift[c]) - mean[c];
      }
      for (int i = 0; i < C; ++i)
        for (int j = i / L * L; j < C; ++j)
          S[int64_t(i) * width + j] +=
              (double(gram.products[int64_t(i) * width + j]) +
               n * (delta[i] * delta[j] - deviation[i] * deviation[j])) /
              total;
    });
    for (int i = 0; i < C; ++i)
      for (int j = 0; j < i / L * L; ++j) S[int64_t(i) * width + j] = S[int64_t(j) * width + i];
    if (p.gram)
      for (int i = 0; i < C; ++i)
        for (int j = 0; j < C; ++j)
          static_cast<A*>(p.gram)[(int64_t(h.index) * C + i) * C + j] = A(S[int64_t(i) * width + j]);

    const T* pointwise = this->param(h.param + 1);
    A* stats = this->stats_of(h.norm);
    for (int co = 0; co < C; ++co) {
      std::fill_n(row, C, 0.0);
      double mean_z = 0, var = 0;
      for (int i = 0; i < C; ++i) {
        const double w = load(pointwise[int64_t(co) * C + i]);
        mean_z += w * mean[i];
        for (int j = 0; j < C; ++j) row[j] += w * S[int64_t(i) * width + j];
      }
      for (int j = 0; j < C; ++j) var += row[j] * load(pointwise[int64_t(co) * C + j]);
      stats[co] = A(mean_z);
      stats[C + co] = stored_variance<A>(var);
    }
    for (int c = 0; c < C; ++c) static_cast<A*>(p.shift)[int64_t(h.index) * C + c] = A(-mean[c]);
    this->fold_half(h);
  }

  Moments finished(const ChannelMoments<A>& m, int channel, int64_t pixels) const {
    return m.total(batch, channel, width, pixels);
  }

  // Folds pools, strided skips and noise of the edges that leave the states [from, to): statistics of z, folded
  // scales, and the spread that relative noise is multiplied with.
  void fold_others(int from, int to) {
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      const Edge& e = this->edge_of(t);
      if (e.source < from || e.source >= to) continue;
      if (t.op == EdgeOp::skip && is_relative(p.form))
        p.std[t.skip] = whole_std(this->state_moments[e.source], this->grids[e.source].pixels());
      if (!this->has_norm(t)) continue;
      const ChannelMoments<A>& m =
          this->is_pool(t) ? this->pooled(e.source, t.op, e.stride) : this->own_moments[i];
      A* stats = this->stats_of(t.norm);
      for (int c = 0; c < C; ++c) {
        const Moments total = finished(m, c, out.pixels());
        stats[c] = A(total.mean), stats[C + c] = stored_variance<A>(total.squares / total.count);
      }
      this->fold_norm(i);
      if (t.op == EdgeOp::reduce_skip && is_relative(p.form)) p.std[t.skip] = normalised_std(norms[i], m);
    }
  }
  // Computes the standard deviation of a whole tensor from the moments of its channels, as torch's std() of x.
  double whole_std(const ChannelMoments<A>& m, int64_t pixels) const {
    Moments total;
    for (int c = 0; c < C; ++c) total = merge(total, finished(m, c, pixels));
    return unbiased_std(total);
  }
  // Computes the same of a strided skip after its batch norm, which noise comes after: every channel has mean 0
  // there, and squares scaled by r^2. It is not exactly 1, because of eps and of channels that are constant.
  double normalised_std(const Norm& norm, const ChannelMoments<A>& m) const {
    Moments total;
    for (int c = 0; c < C; ++c) {
      const Moments z = finished(m, c, out.pixels());
      total = merge(total, {z.count, 0.0, z.squares * norm.rstd[c] * norm.rstd[c]});
    }
    return unbiased_std(total);
  }
};

}  // namespace fastnas::FASTNAS_ISA
