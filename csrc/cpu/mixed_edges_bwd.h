// Backward of mixed_edges on the CPU: node by node from the last, two sweeps over the images each.
#pragma once

#include "mixed_edges_call.h"

namespace fastnas::FASTNAS_ISA {

template <class T> struct Backward : Call<T> {
  using Base = Call<T>;
  using typename Base::A;
  using typename Base::Norm;
  using typename Base::Scratch;
  using Base::p, Base::C, Base::L, Base::blocks, Base::width, Base::groups, Base::halves, Base::out, Base::norms;

  std::vector<A*> crosses;        // [halves of one sweep][groups]: P = sum dy (u - mean u)^T, [width][width]
  A *dy_sums, *dv_sums;           // [groups][width]; the latter per sep_conv into the node
  A* dy_mean;                     // [nodes][width]
  std::vector<A*> gradients;      // of each state, [N][pixels][C]
  std::vector<bool> needed;       // of each state: some gradient hangs on its own
  std::vector<int> writer;        // of each state: the edge that writes its gradient first, -1: none
  A* dv;                          // [sep_convs into the node][N][pixels][C]
  std::vector<A*> skip_dots;      // [terms]: [groups][2][width] of <dy, x + noise> and, multiplicative, sum of dy d
  std::vector<A*> reduce_crosses; // [terms]: [groups][2][width][width]
  double* spare;                  // [threads][2][width][width]
  int most_halves = 0, most_inputs = 0;

  Backward(const MixedEdgesParams& params, bool measure) : Base(params, measure) {
    std::vector<int> final_halves(p.nodes), inputs(p.nodes);
    for (const auto& h : halves) {
      const int node = this->edge_of(*h.term).target;
      if (h.final) most_halves = std::max(most_halves, ++final_halves[node]);
      else most_inputs = std::max(most_inputs, ++inputs[node]);
    }
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
      if (t.skip >= 0) skip_dots[i] = this->arena.template take<A>(int64_t(groups) * 2 * width);
      if (t.op == EdgeOp::reduce_skip && p.dparams)
        reduce_crosses[i] = this->arena.template take<A>(int64_t(groups) * 2 * width * width);
    }
    spare = this->arena.template take<double>(int64_t(this->scratch.size()) * 2 * C * width);
    writer.assign(this->states(), -1);
    for (int node = p.nodes - 1; node >= 0; --node)
      for (int e = 0; e < p.edge_count; ++e)
        if (p.edges[e].target == node && writer[p.edges[e].source] < 0 && has_convolutions(e))
          writer[p.edges[e].source] = e;
  }

  bool has_convolutions(int e) const {
    for (int i = p.edges[e].first_term; i < p.edges[e].last_term; ++i)
      if (p.terms[i].half >= 0 || p.terms[i].op == EdgeOp::reduce_skip) return true;
    return false;
  }
  // Whether anything of an edge but dL/dw is wanted.
  bool goes_on(const Edge& e) const { return p.dparams != nullptr || needed[e.source]; }
  Pixels<A> gradient(int state, int64_t image) const {
    return {gradients[state] + image * this->grids[state].pixels() * C, C};
  }
  Pixels<A> input_gradient(int place, int64_t image) const {
    return {dv + (place * p.images + image) * out.pixels() * C, C};
  }

  // f(place among those of the node, half) over its final halves, or over its sep_convs' first ones.
  template <class F> void for_halves(int node, bool final, F f) {
    int place = 0;
    for (const auto& h : halves)
      if (this->edge_of(*h.term).target == node && h.final == final) f(place++, h);
  }

  void load_gradient(Scratch& s, int node, int64_t image) {
    const auto at = gradient(p.inputs + node, image);
    load_image<A, A>({at.data, at.stride}, out, C, s.g);
  }

  // --- sums over dy --------------------------------------------------------------------------------------

  void add_sums(Scratch& s, int node, int group, int64_t image) {
    const bool opens = image == this->first_image(group);
    const int64_t pixels = out.pixels();
    load_gradient(s, node, image);
    if (opens) std::fill_n(dy_sums + int64_t(group) * width, width, A(0));
    add_channel_sums(s.g, pixels, blocks, dy_sums + int64_t(group) * width);
    int place = 0;
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (this->edge_of(t).target != node) continue;
      if (t.half >= 0) {
        const bool two = t.op == EdgeOp::sep_conv;
        const Half<A>& h = halves[t.half + two];
        A* sum = crosses[place++ * groups + group];
        if (opens) std::fill_n(sum, int64_t(width) * width, A(0));
        if (!this->keeps(h)) {
          if (two) this->load_second_input(s, t, image);
          else this->load_source(s, this->edge_of(t).source, image, false);
        }
        this->centred_rows(s, h, image, true, [&](Rows rows, const Grid& part) {
          outer(this->rows_of(s.g, rows), C, pixels, s.u, blocks, part.pixels(), part.pixels(), false, sum);
        });
        continue;
      }
      this->load_source(s, this->edge_of(t).source, image, true);
      if (this->is_pool(t)) {
        if (opens) std::fill_n(norms[i].dot + int64_t(group) * width, width, A(0));
        centred_norm(s, i, s.z);
        add_channel_dots(s.g, s.z, pixels, blocks, norms[i].dot + int64_t(group) * width);
      } else {
        add_skip_sums(s, i, group, image, opens);
      }
    }
  }

  // z - mean(z) of a pool or strided skip. Overwrites s.u.
  void centred_norm(Scratch& s, int i, A* z) {
    const EdgeTerm& t = p.terms[i];
    if (this->is_pool(t)) this->pool(t, s, z);
    else this->reduce(t, s, s.u, z);
    for (int b = 0; b < blocks; ++b) {
      const Vec<A> mean = get(norms[i].mean + b * L);
      for (int64_t k = 0; k < out.pixels(); ++k) {
        A* at = z + (b * int64_t(out.pixels()) + k) * L;
        put(at, get(at) - mean);
      }
    }
  }

  void add_skip_sums(Scratch& s, int i, int group, int64_t image, bool opens) {
    const EdgeTerm& t = p.terms[i];
    const int64_t pixels = out.pixels();
    A *dots = skip_dots[i] + int64_t(group) * 2 * width, *sums = dots + width;
    if (opens) std::fill_n(dots, 2 * width, A(0));
    const bool strided = t.op == EdgeOp::reduce_skip, times = this->multiplicative();
    const bool draws = this->noisy() && (p.dw || (times && strided));
    if (draws) this->draw_noise(s, t, image, s.t);
    if (!strided) {
      if (!p.dw) return;
      if (!draws) {
        add_channel_dots(s.g, s.x, pixels, blocks, dots);
        return;
      }
      combine(s.x, s.t, times, s.u);
      add_channel_dots(s.g, s.u, pixels, blocks, dots);
      return;
    }
    centred_norm(s, i, s.z);
    const A* dy = s.g;
    if (draws && times) {
      combine(s.g, s.t, true, s.t);
      dy = s.t;
      add_channel_sums(dy, pixels, blocks, sums);
    } else if (draws) {
      add_channel_dots(s.g, s.t, pixels, blocks, dots);
    }
    if (opens) std::fill_n(norms[i].dot + int64_t(group) * width, width, A(0));
    add_channel_dots(dy, s.z, pixels, blocks, norms[i].dot + int64_t(group) * width);
  }

  void combine(const A* x, const A* d, bool times, A* to) {
    for (int64_t k = 0; k < int64_t(out.pixels()) * width; k += L)
      put(to + k, times ? get(x + k) * get(d + k) : get(x + k) + get(d + k));
  }

  double total(const A* partial, int64_t stride, int64_t at) const {
    return sum_over_groups(partial, groups, stride, at);
  }

  // From partial sums to dL/dw, dL/dW and the matrices of dL/du.
  void fold_sums(int node) {
    for (int c = 0; c < width; ++c)
      dy_mean[int64_t(node) * width + c] = A(total(dy_sums, width, c) / double(this->samples()));
    fold_halves(node, true);
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (t.half >= 0 || this->edge_of(t).target != node) continue;
      double dw = 0;
      if (this->has_norm(t)) {
        Norm& n = norms[i];
        for (int c = 0; c < width; ++c) n.rstd_q[c] = 0;
        for (int c = 0; c < C; ++c) {
          const double q = total(n.dot, width, c) * n.rstd[c] / double(this->samples());
          n.rstd_q[c] = A(n.rstd[c] * q);
          dw += q * double(this->samples());
        }
      }
      if (t.skip >= 0)
        for (int c = 0; c < C; ++c) dw += total(skip_dots[i], 2 * width, c);
      if (p.dw) p.dw[t.edge * p.candidates + t.weight] = dw;
    }
  }

  void fold_halves(int node, bool final) {
    std::vector<const Half<A>*> chosen;
    for_halves(node, final, [&](int, const Half<A>& h) { chosen.push_back(&h); });
    this->for_each_job(int64_t(chosen.size()), [&](int64_t i) {
      const A* sums = final ? dy_sums : dv_sums + i * groups * width;
      fold_half_gradient(*chosen[i], int(i), sums, spare + thread_number() * 2 * C * width);
    });
  }

  void fold_half_gradient(const Half<A>& h, int place, const A* sums, double* B) {
    const double samples = double(this->samples()), scale = this->scale_of(h);
    const T* pointwise = this->param(h.param + 1);
    const A* S = p.gram ? static_cast<const A*>(p.gram) + int64_t(h.index) * C * C : nullptr;
    T* dW = p.dparams ? static_cast<T*>(p.dparams[h.param + 1]) : nullptr;
    double* row = B + int64_t(C) * width;
    std::vector<double> P(width), W(width), bias(width, 0.0);
    std::fill_n(B, int64_t(C) * width, 0.0);
    std::fill_n(h.from_dy, int64_t(C) * width, A(0));
    double dw = 0;
    for (int co = 0; co < C; ++co) {
      std::fill(P.begin(), P.end(), 0.0);
      for (int g = 0; g < groups; ++g) {
        const A* partial = crosses[place * groups + g] + int64_t(co) * width;
        for (int ci = 0; ci < C; ++ci) P[ci] += double(partial[ci]);
      }
      double q = 0;
      for (int ci = 0; ci < C; ++ci) {
        P[ci] /= samples;
        W[ci] = load(pointwise[int64_t(co) * C + ci]);
        q += W[ci] * P[ci];
      }
      q *= h.rstd[co];
      dw += q * samples;
      const double mean = total(sums, width, co) / samples;
      for (int ci = 0; ci < C; ++ci) {
        const double a = folded(scale, h.rstd[co], W[ci]);
        h.from_dy[int64_t(co) * width + ci] = A(a);
        bias[ci] -= a * mean;
      }
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
      for (int j = 0; j < width; ++j) h.from_u[int64_t(i) * width + j] = j < C ? A(-B[int64_t(i) * width + j]) : A(0);
    for (int c = 0; c < width; ++c) h.du_bias[c] = A(bias[c]);
    if (h.final && p.dw) p.dw[h.term->edge * p.candidates + h.term->weight] = dw;
  }

  // du of a half from dy; padded where the convolution has stride 1. Adds to dL/dD.
  void depthwise_gradient(Scratch& s, const Half<A>& h, A* dy, const A* in, int group, int64_t image, bool opens) {
    const bool padded = h.kernel.stride == 1;
    if (padded) clear_halo(out, blocks, s.du);
    this->centred_rows(s, h, image, true, [&](Rows rows, const Grid& part) {
      const Factor<A> factors[2] = {{this->rows_of(dy, rows), h.from_dy, C, out.pixels()}, {s.u, h.from_u, C, part.pixels()}};
      if (padded)
        product(factors, 2, part, blocks, h.du_bias, false, s.du + (out.inside() + rows.first * out.pitch()) * L,
                out.pitch(), out.padded());
      else
        product(factors, 2, part, blocks, h.du_bias, false, this->rows_of(s.du, rows), out.cols, out.pixels());
    });
    if (!p.dparams) return;
    A* dtaps = h.dtaps + int64_t(group) * width * h.kernel.taps();
    if (opens) std::fill_n(dtaps, int64_t(width) * h.kernel.taps(), A(0));
    depthwise_correlate(in, this->half_grid(h), s.du, out, h.kernel, blocks, dtaps);
  }

  // Second halves of the sep_convs into a node: dv, and the sums of the batch norm before it.
  void second_halves(Scratch& s, int node, int group, int64_t image) {
    const bool opens = image == this->first_image(group);
    load_gradient(s, node, image);
    for_halves(node, false, [&](int place, const Half<A>& first) {
      const EdgeTerm& t = *first.term;
      if (!goes_on(this->edge_of(t))) return;
      const Half<A>& second = halves[t.half + 1];
      this->load_second_input(s, t, image);
      depthwise_gradient(s, second, s.g, s.v, group, image, opens);
      depthwise_transposed_plain(s.du, out, second.taps, second.kernel, blocks, s.y);
      for_each_pixel<A>(out, C, [&](int b, int h, int w, int) {
        A* at = s.y + (int64_t(b) * out.pixels() + h * out.cols + w) * L;
        const A* v = s.v + (int64_t(b) * out.padded() + out.inside() + h * out.pitch() + w) * L;
        put(at, where_relu_passes(get(v), get(at)));
      });
      store_image<A, A>(s.y, out, C, input_gradient(place, image));
      this->load_source(s, this->edge_of(t).source, image, false);
      A *sum = crosses[place * groups + group], *sums = dv_sums + (int64_t(place) * groups + group) * width;
      if (opens) std::fill_n(sum, int64_t(width) * width, A(0)), std::fill_n(sums, width, A(0));
      this->centred_rows(s, first, image, true, [&](Rows rows, const Grid& part) {
        outer(this->rows_of(s.y, rows), C, out.pixels(), s.u, blocks, part.pixels(), part.pixels(), false, sum);
      });
      add_channel_sums(s.y, out.pixels(), blocks, sums);
    });
  }

  // What the convolutions into a node give their sources.
  void first_halves(Scratch& s, int node, int group, int64_t image) {
    const bool opens = image == this->first_image(group);
    load_gradient(s, node, image);
    int place = 0;
    for (int e = 0; e < p.edge_count; ++e) {
      const Edge& edge = p.edges[e];
      if (edge.target != node) continue;
      const bool skipped = !goes_on(edge) || !has_convolutions(e);
      const Grid& grid = this->grids[edge.source];
      if (!skipped) {
        this->load_source(s, edge.source, image, false);
        if (edge.stride == 2) std::fill_n(s.dx, int64_t(blocks) * grid.padded() * L, A(0));
      }
      bool fresh = edge.stride == 1;
      for (int i = edge.first_term; i < edge.last_term; ++i) {
        const EdgeTerm& t = p.terms[i];
        const int mine = t.op == EdgeOp::sep_conv ? place++ : 0;
        if (skipped) continue;
        if (t.op == EdgeOp::reduce_skip) reduce_gradient(s, i, group, image, opens);
        if (t.half < 0) continue;
        const Half<A>& h = halves[t.half];
        A* dy = s.g;
        if (!h.final) {
          const auto from = input_gradient(mine, image);
          load_image<A, A>({from.data, from.stride}, out, C, s.y);
          dy = s.y;
        }
        depthwise_gradient(s, h, dy, s.relu_x, group, image, opens);
        if (needed[edge.source]) depthwise_transposed(s.du, out, h.taps, h.kernel, grid, blocks, fresh, s.dx);
        fresh = false;
      }
      if (!skipped && needed[edge.source]) add_to_source(s, edge, e, image);
    }
  }

  void add_to_source(Scratch& s, const Edge& edge, int e, int64_t image) {
    const Grid& grid = this->grids[edge.source];
    const bool first = writer[edge.source] == e;
    const auto to = gradient(edge.source, image);
    for_each_pixel<A>(grid, C, [&](int b, int h, int w, int used) {
      const int pixel = h * grid.cols + w;
      const int64_t inside = (int64_t(b) * grid.padded() + grid.inside() + h * grid.pitch() + w) * L;
      Vec<A> d = where_relu_passes(get(s.relu_x + inside), get(s.dx + inside));
      A* at = to.data + pixel * to.stride + b * L;
      if (!first) d += load_lanes<A, A>(at, used);
      store_lanes<A, A>(at, d, used);
    });
  }

  // dz of a strided skip, its dW and what it gives to relu(x).
  void reduce_gradient(Scratch& s, int i, int group, int64_t image, bool opens) {
    const EdgeTerm& t = p.terms[i];
    const int64_t pixels = out.pixels();
    const Norm& n = norms[i];
    centred_norm(s, i, s.z);
    const A* dy = s.g;
    const bool times = this->noisy() && this->multiplicative();
    if (times) {
      this->draw_noise(s, t, image, s.t);
      combine(s.g, s.t, true, s.t);
      dy = s.t;
    }
    for (int b = 0; b < blocks; ++b) {
      Vec<A> mean = get(dy_mean + int64_t(this->edge_of(t).target) * width + b * L);
      if (times)
        for (int l = 0; l < L; ++l)
          mean[l] = A(total(skip_dots[i] + width, 2 * width, b * L + l) / double(this->samples()));
      for (int64_t k = 0; k < pixels; ++k) {
        A* at = s.z + (b * pixels + k) * L;
        put(at, norm_gradient(get(n.scale + b * L), get(dy + (b * pixels + k) * L), mean, get(at),
                              get(n.rstd_q + b * L)));
      }
    }
    const Grid& grid = this->source_grid(t);
    for (int part = 0; part < 2; ++part) {
      const A* back = this->reduce_matrix[i] + (2 + part) * int64_t(C) * width;
      if (p.dparams) {
        A* sum = reduce_crosses[i] + (int64_t(group) * 2 + part) * width * width;
        if (opens) std::fill_n(sum, int64_t(width) * width, A(0));
        this->gather(s, grid, part, s.u);
        outer(s.z, C, pixels, s.u, blocks, pixels, pixels, false, sum);
      }
      const Factor<A> factor{s.z, back, part == 0 ? C / 2 : C, 0, part * (C / 2)};
      product(&factor, 1, out, blocks, static_cast<A*>(nullptr), false, s.u);
      for_each_pixel<A>(out, C, [&](int b, int h, int w, int) {
        if (2 * h + part >= grid.rows || 2 * w + part >= grid.cols) return;
        A* at = s.dx + (int64_t(b) * grid.padded() + grid.inside() + (2 * h + part) * grid.pitch() + 2 * w + part) * L;
        put(at, get(at) + get(s.u + (int64_t(b) * pixels + h * out.cols + w) * L));
      });
    }
  }

  // The rest of a state's gradient: pools and skips of all edges that leave it, and the output's for a node.
  void finish_state(Scratch& s, int state, int64_t image) {
    if (!needed[state]) return;
    const Grid& grid = this->grids[state];
    const int64_t size = int64_t(grid.pixels()) * width;
    const auto own = gradient(state, image);
    if (writer[state] >= 0) load_image<A, A>({own.data, own.stride}, grid, C, s.dx);
    else std::fill_n(s.dx, size, A(0));
    pools_and_skips(s, state, image);
    if (state < p.inputs) {
      store_image<T, A>(s.dx, grid, C, {static_cast<T*>(p.dx[state]) + image * grid.pixels() * C, C});
      return;
    }
    const int64_t stride = int64_t(p.nodes) * C;
    load_image<T, A>({static_cast<const T*>(p.dout) + image * grid.pixels() * stride + int64_t(state - p.inputs) * C,
                      stride}, grid, C, s.z);
    for (int64_t k = 0; k < size; k += L) put(s.dx + k, get(s.dx + k) + get(s.z + k));
    store_image<A, A>(s.dx, grid, C, own);
  }

  void pools_and_skips(Scratch& s, int state, int64_t image) {
    const int64_t size = int64_t(out.pixels()) * width;
    for (EdgeOp op : {EdgeOp::max_pool, EdgeOp::avg_pool})
      for (int stride : {1, 2}) {
        bool any = false;
        for (int i = 0; i < this->terms(); ++i) {
          const EdgeTerm& t = p.terms[i];
          const Edge& edge = this->edge_of(t);
          if (t.op != op || edge.source != state || edge.stride != stride) continue;
          if (!any) {
            this->load_source(s, state, image, true);
            std::fill_n(s.y, size, A(0));
            centred_norm(s, i, s.z);
          }
          any = true;
          load_gradient(s, edge.target, image);
          const Norm& n = norms[i];
          for (int b = 0; b < blocks; ++b) {
            const Vec<A> scale = get(n.scale + b * L), mean = get(dy_mean + int64_t(edge.target) * width + b * L),
                         rstd_q = get(n.rstd_q + b * L);
            for (int64_t k = b * int64_t(out.pixels()) * L; k < (b + 1) * int64_t(out.pixels()) * L; k += L)
              put(s.y + k, get(s.y + k) + norm_gradient(scale, get(s.g + k), mean, get(s.z + k), rstd_q));
          }
        }
        if (!any) continue;
        const Grid& grid = this->grids[state];
        for (int b = 0; b < blocks; ++b) {
          const A* d = s.y + int64_t(b) * out.pixels() * L;
          A* dx = s.dx + int64_t(b) * grid.pixels() * L;
          if (op == EdgeOp::max_pool)
            max_pool_transposed(s.x + int64_t(b) * grid.pixels() * L, d, grid, stride, out, s.columns,
                                s.more_columns, dx);
          else
            avg_pool_transposed(d, grid, stride, out, s.columns, dx);
        }
      }
    for (int i = 0; i < this->terms(); ++i) {
      const EdgeTerm& t = p.terms[i];
      if (t.op != EdgeOp::skip || this->edge_of(t).source != state) continue;
      load_gradient(s, this->edge_of(t).target, image);
      const A w = this->weight(t);
      if (this->noisy() && this->multiplicative()) {
        this->draw_noise(s, t, image, s.t);
        combine(s.g, s.t, true, s.g);
      }
      for (int64_t k = 0; k < size; k += L) put(s.dx + k, get(s.dx + k) + w * get(s.g + k));
    }
  }

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

  void run() {
    this->pack_taps();
    this->for_each_job(int64_t(halves.size()), [&](int64_t i) { this->fold_half(halves[i]); });
    for (int i = 0; i < this->terms(); ++i)
      if (this->has_norm(p.terms[i])) this->fold_norm(i);
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

template <class T> size_t mixed_edges_bwd_workspace(const MixedEdgesParams& p) {
  return Backward<T>(p, true).arena.used;
}
template <class T> void run_mixed_edges_bwd(const MixedEdgesParams& p) { Backward<T>(p, false).run(); }

}  // namespace fastnas::FASTNAS_ISA
