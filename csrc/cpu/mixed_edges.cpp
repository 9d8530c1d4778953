// Forward of mixed_edges on the CPU: three sweeps over the images a level, statistics folded between them.
// Compiled once per instruction set; FASTNAS_ISA names the namespace.
#include "mixed_edges.h"

#include "mixed_edges_bwd.h"
#include "mixed_edges_call.h"

namespace fastnas::FASTNAS_ISA {
namespace {

template <class T> struct Forward : Call<T> {
  using Base = Call<T>;
  using typename Base::A;
  using typename Base::Norm;
  using typename Base::Scratch;
  using Base::p, Base::C, Base::L, Base::blocks, Base::width, Base::groups, Base::halves, Base::out, Base::norms;

  // Gram partials of the halves whose statistics one sweep gathers: [halves][groups].
  struct Gram {
    A *sum, *rest, *shift;  // [width][width]; sums of u + shift; minus the mean of the group's first rows
  };
  std::vector<Gram> grams;
  double* small;  // [threads][3][width][width] for folding
  int gathered;

  Forward(const MixedEdgesParams& params, bool measure) : Base(params, measure) {
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
    small = this->arena.template take<double>(int64_t(this->scratch.size()) * 2 * C * width);
  }

  bool is_first(const Half<A>& h) const { return h.index == h.term->half; }

  // f(place among those gathered, half) over the first or second halves that leave the states [from, to).
  template <class F> void for_halves(int from, int to, bool first, F f) {
    int place = 0;
    for (const auto& h : halves) {
      const int source = this->edge_of(*h.term).source;
      if (source >= from && source < to && is_first(h) == first) f(place++, h);
    }
  }

  // Adds an image's u to the mean and Gram matrix of its half, centred by the group's first rows.
  void gather_gram(Scratch& s, const Half<A>& h, const A* in, int place, int group, bool opens) {
    Gram& gram = grams[place * groups + group];
    if (opens) {
      std::fill_n(s.t, width, A(0));
      std::fill_n(gram.sum, int64_t(width) * width, A(0));
      std::fill_n(gram.rest, width, A(0));
      std::fill_n(gram.shift, width, A(0));
    }
    for_each_rows<A>(out, blocks, [&](Rows rows) {
      const int pixels = rows.count() * out.cols;
      const auto compute = [&] {
        depthwise(in, this->half_grid(h), h.taps, h.kernel, gram.shift, rows, out.cols, blocks, s.u);
      };
      if (opens && rows.first == 0) {
        compute();
        add_channel_sums(s.u, pixels, blocks, s.t);
        for (int c = 0; c < width; ++c) gram.shift[c] = -s.t[c] / A(pixels);
      }
      compute();
      add_channel_sums(s.u, pixels, blocks, gram.rest);
      outer(s.u, C, pixels, s.u, blocks, pixels, pixels, true, gram.sum);
    });
  }

  // First sweep over a state: statistics of pools, skips and first halves of all edges that leave it.
  void gather_first(Scratch& s, int state, int group, int64_t image) {
    const int64_t before = image - this->first_image(group);
    const Grid& grid = this->grids[state];
    bool done[2][2] = {}, raw = false;
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      const Edge& e = this->edge_of(t);
      if (e.source != state) continue;
      if (this->is_pool(t) && !done[t.op == EdgeOp::avg_pool][e.stride - 1]) {
        done[t.op == EdgeOp::avg_pool][e.stride - 1] = true;
        this->pool(t, s, s.z);
        this->pooled(state, t.op, e.stride).add_image(s.z, out.pixels(), C, group, before * out.pixels());
      } else if (t.op == EdgeOp::reduce_skip) {
        this->reduce(t, s, s.u, s.z);
        this->reduce_moments[i].add_image(s.z, out.pixels(), C, group, before * out.pixels());
      } else if (t.op == EdgeOp::skip && is_relative(p.form) && !raw) {
        raw = true;
        this->state_moments[state].add_image(s.x, grid.pixels(), C, group, before * grid.pixels());
      }
    }
  }

  void gather_first_halves(Scratch& s, int from, int to, int state, int group, int64_t image) {
    for_halves(from, to, true, [&](int place, const Half<A>& h) {
      if (this->edge_of(*h.term).source == state)
        gather_gram(s, h, s.relu_x, place, group, image == this->first_image(group));
    });
  }

  void gather_second_halves(Scratch& s, int from, int to, int group, int64_t image) {
    for_halves(from, to, false, [&](int place, const Half<A>& h) {
      this->compute_second_input(s, *h.term, image, p.v != nullptr);
      gather_gram(s, h, s.v, place, group, image == this->first_image(group));
    });
  }

  void fold_halves(int from, int to, bool first) {
    std::vector<const Half<A>*> chosen;
    for_halves(from, to, first, [&](int, const Half<A>& h) { chosen.push_back(&h); });
    this->for_each_job(int64_t(chosen.size()),
                       [&](int64_t i) { fold_statistics(*chosen[i], int(i), small + thread_number() * 2 * C * width); });
  }

  // mean(u) and cov(u) from the groups' partial sums, then var(W u) = diag(W S W^T), then the folded matrix.
  void fold_statistics(const Half<A>& h, int place, double* spare) {
    double *S = spare, *row = spare + int64_t(C) * width;
    std::vector<double> mean(C, 0.0);
    const double total = double(this->samples());
    for (int g = 0; g < groups; ++g) {
      const Gram& gram = grams[place * groups + g];
      const double n = group_samples(g);
      for (int c = 0; c < C; ++c) mean[c] += n / total * (double(gram.rest[c]) / n - double(gram.shift[c]));
    }
    std::fill_n(S, int64_t(C) * width, 0.0);
    std::vector<double> rest(width, 0.0), delta(width, 0.0);
    for (int g = 0; g < groups; ++g) {
      const Gram& gram = grams[place * groups + g];
      const double n = group_samples(g);
      for (int c = 0; c < C; ++c) {
        rest[c] = double(gram.rest[c]) / n;
        delta[c] = rest[c] - double(gram.shift[c]) - mean[c];
      }
      for (int i = 0; i < C; ++i)
        for (int j = i / L * L; j < C; ++j)
          S[int64_t(i) * width + j] +=
              (double(gram.sum[int64_t(i) * width + j]) + n * (delta[i] * delta[j] - rest[i] * rest[j])) / total;
    }
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
  double group_samples(int g) const {
    return double((this->first_image(g + 1) - this->first_image(g)) * out.pixels());
  }

  Moments finished(const ChannelMoments<A>& m, int channel, int64_t pixels) const {
    return m.total(channel, width, groups, p.images, pixels);
  }

  // Pools, strided skips and noise of the edges that leave the states [from, to).
  void fold_others(int from, int to) {
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      const Edge& e = this->edge_of(t);
      if (e.source < from || e.source >= to) continue;
      if (t.op == EdgeOp::skip && is_relative(p.form))
        p.std[t.skip] = whole_std(this->state_moments[e.source], this->grids[e.source].pixels());
      if (!this->has_norm(t)) continue;
      const ChannelMoments<A>& m =
          t.op == EdgeOp::reduce_skip ? this->reduce_moments[i] : this->pooled(e.source, t.op, e.stride);
      A* stats = this->stats_of(t.norm);
      for (int c = 0; c < C; ++c) {
        const Moments total = finished(m, c, out.pixels());
        stats[c] = A(total.mean), stats[C + c] = stored_variance<A>(total.squares / total.count);
      }
      this->fold_norm(i);
      if (t.op == EdgeOp::reduce_skip && is_relative(p.form)) p.std[t.skip] = normalised_std(norms[i], m);
    }
  }
  // Of a whole tensor, from its channels.
  double whole_std(const ChannelMoments<A>& m, int64_t pixels) const {
    Moments total;
    for (int c = 0; c < C; ++c) total = merge(total, finished(m, c, pixels));
    return unbiased_std(total);
  }
  double normalised_std(const Norm& norm, const ChannelMoments<A>& m) const {
    Moments total;
    for (int c = 0; c < C; ++c) {
      const Moments z = finished(m, c, out.pixels());
      total = merge(total, {z.count, 0.0, z.squares * norm.rstd[c] * norm.rstd[c]});
    }
    return unbiased_std(total);
  }

  // Last sweep: the sum of a node, written into its slice of the output.
  void sum_node(Scratch& s, int node, int64_t image) {
    const int64_t pixels = out.pixels();
    std::fill_n(s.y, pixels * width, A(0));
    for (int e = 0; e < p.edge_count; ++e) {
      if (p.edges[e].target != node) continue;
      this->load_source(s, p.edges[e].source, image, true);
      for (int i = p.edges[e].first_term; i < p.edges[e].last_term; ++i) add_term(s, i, image);
    }
    const int64_t stride = int64_t(p.nodes) * C;
    store_image<T, A>(s.y, out, C,
                      {static_cast<T*>(p.out) + image * pixels * stride + int64_t(node) * C, stride});
  }

  void add_term(Scratch& s, int i, int64_t image) {
    const EdgeTerm& t = p.terms[i];
    if (t.half >= 0) {
      const bool two = t.op == EdgeOp::sep_conv;
      const Half<A>& h = halves[t.half + two];
      if (two) this->load_second_input(s, t, image);
      const bool keep = p.training && this->keeps(h);
      this->centred_rows(s, h, image, false, [&](Rows rows, const Grid& part) {
        if (keep) {
          const Pixels<T> to = this->template kept_pixels<T>(h, image);
          store_image<T, A>(s.u, part, C, {to.data + int64_t(rows.first) * out.cols * to.stride, to.stride});
        }
        const Factor<A> factor{s.u, h.fold, C};
        product(&factor, 1, part, blocks, h.bias, true, this->rows_of(s.y, rows), out.cols, out.pixels());
      });
      return;
    }
    const A w = this->weight(t);
    if (this->is_pool(t)) {
      this->pool(t, s, s.z);
      add_normalised(s, norms[i]);
      return;
    }
    const A* value = s.x;
    if (t.op == EdgeOp::reduce_skip) {
      this->reduce(t, s, s.u, s.z);
      if (!this->noisy()) {
        add_normalised(s, norms[i]);
        return;
      }
      for_each_pixel<A>(out, C, [&](int b, int h, int c, int) {
        A* at = s.z + (int64_t(b) * out.pixels() + h * out.cols + c) * L;
        Vec<A> rstd{};
        for (int l = 0; l < L && b * L + l < C; ++l) rstd[l] = A(norms[i].rstd[b * L + l]);
        put(at, (get(at) - get(norms[i].mean + b * L)) * rstd);
      });
      value = s.z;
    }
    const int64_t size = int64_t(out.pixels()) * width;
    if (!this->noisy()) {
      for (int64_t k = 0; k < size; k += L) put(s.y + k, get(s.y + k) + w * get(value + k));
      return;
    }
    this->draw_noise(s, t, image, s.u);
    const bool times = this->multiplicative();
    for (int64_t k = 0; k < size; k += L) {
      const Vec<A> x = get(value + k), d = get(s.u + k);
      put(s.y + k, get(s.y + k) + w * (times ? x * d : x + d));
    }
  }

  void add_normalised(Scratch& s, const Norm& n) {
    for (int b = 0; b < blocks; ++b) {
      const Vec<A> scale = get(n.scale + b * L), mean = get(n.mean + b * L);
      for (int64_t i = 0; i < out.pixels(); ++i) {
        const int64_t at = (b * int64_t(out.pixels()) + i) * L;
        put(s.y + at, get(s.y + at) + scale * (get(s.z + at) - mean));
      }
    }
  }

  void fold_running_statistics() {
    for (const auto& h : halves) this->fold_half(h);
    for (int i = 0; i < this->terms(); ++i)
      if (this->has_norm(p.terms[i])) this->fold_norm(i);
  }

  // The statistics of everything that leaves the states [from, to); `summed`: the node computed just before.
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
    for_halves(from, to, false, [&](int, const Half<A>&) { any = true; });
    if (!any) return;
    this->for_each_image([&](Scratch& s, int group, int64_t image) {
      gather_second_halves(s, from, to, group, image);
    });
    fold_halves(from, to, false);
  }

  void run() {
    this->pack_taps();
    if (p.training) gather(0, p.inputs, -1);
    else fold_running_statistics();
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
    if (p.dout) return mixed_edges_bwd_workspace<decltype(t)>(p);
    return Forward<decltype(t)>(p, true).arena.used;
  });
}

void mixed_edges_fwd(const MixedEdgesParams& p) {
  with_dtype(p.dtype, [&](auto t) { Forward<decltype(t)>(p, false).run(); });
}

void mixed_edges_bwd(const MixedEdgesParams& p) {
  with_dtype(p.dtype, [&](auto t) { run_mixed_edges_bwd<decltype(t)>(p); });
}

}  // namespace fastnas::FASTNAS_ISA
