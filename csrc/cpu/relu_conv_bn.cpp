// Computes y = BN(W relu(x)) on the CPU, the preprocessing of a cell. Compiled once per instruction set;
// FASTNAS_ISA names the namespace.
//
// z is written where y will be and normalised in place, so backward needs x and y, which exist anyway; eager
// holds relu(x) and z besides. Forward takes two sweeps over the images (z and its moments, then the
// normalisation), backward two (sums over dy, then dz, dW and dx); the batch norm's barrier lies between them.
// Unlike in mixed_edges there is no Gram fold: the input has up to 4 C channels, and their Gram matrix would
// cost twice the product itself.
#include "relu_conv_bn.h"

#include <vector>

#include "../formulas/relu_conv_bn.h"
#include "groups.h"
#include "moments.h"
#include "product.h"

namespace fastnas::FASTNAS_ISA {
namespace {

template <class T> struct Call {
  using A = typename Accumulate<T>::type;
  static constexpr int L = kLanes<A>;

  const ReluConvBnParams& p;
  const int C, in_C, blocks, in_blocks, width, in_width, parts;
  const Batch batch;
  const int groups;
  const Grid in, out;
  Arena arena;
  A *forward, *back;  // W of each part, [in_C][width] and [C][in_width]; rows of the other part are 0
  ChannelMoments<A> moments;
  A *mean, *rstd, *dy_mean, *q;  // [width]
  A *dy_sums, *dots, *crosses;   // [groups][width] twice, [groups][parts][width][in_width]
  // Holds what a thread needs for one image: x, relu(x) as one convolution reads it, z or dz, and y
  // (or the second part of z).
  struct Scratch {
    A *x, *u, *z, *y;
  };
  std::vector<Scratch> scratch;

  Call(const ReluConvBnParams& params, bool measure)
      : p(params), C(p.channels), in_C(p.in_channels), blocks(blocks_of<A>(C)), in_blocks(blocks_of<A>(in_C)),
        width(blocks * L), in_width(in_blocks * L), parts(p.reduce ? 2 : 1), batch{p.images, C},
        groups(batch.groups()),
        in{int(p.rows), int(p.cols)},
        out{int(p.reduce ? (p.rows + 1) / 2 : p.rows), int(p.reduce ? (p.cols + 1) / 2 : p.cols)},
        arena{measure ? nullptr : static_cast<char*>(p.workspace)} {
    const bool backward = p.dy != nullptr;
    forward = arena.take<A>(int64_t(parts) * in_C * width);
    back = arena.take<A>(int64_t(parts) * C * in_width);
    moments = {arena.take<double>(int64_t(groups) * width), arena.take<double>(int64_t(groups) * width)};
    for (A** vector : {&mean, &rstd, &dy_mean, &q}) *vector = arena.take<A>(width);
    dy_sums = arena.take<A>(backward ? int64_t(groups) * width : 0);
    dots = arena.take<A>(backward ? int64_t(groups) * width : 0);
    crosses = arena.take<A>(backward && p.dparams[0] ? int64_t(groups) * parts * width * in_width : 0);
    scratch.resize(std::max(1, std::min(p.threads, groups)));
    for (Scratch& s : scratch) {
      s.x = arena.take<A>(int64_t(in_width) * in.pixels());
      s.u = arena.take<A>(int64_t(in_width) * out.pixels());
      s.z = arena.take<A>(int64_t(width) * out.pixels());
      s.y = arena.take<A>(int64_t(width) * out.pixels());
    }
  }

  template <class F> void for_each_image(F f) {
    batch.for_each_pack(int(scratch.size()), [&](int thread, int group, int64_t n) { f(scratch[thread], group, n); });
  }
  double samples() const { return double(p.images) * out.pixels(); }
  int64_t first_image(int group) const { return batch.first(group); }

  // Lays out W twice, for the product forward (input channel outermost) and the one
  // back (output channel outermost).
  void pack() {
    std::fill_n(forward, int64_t(parts) * in_C * width, A(0));
    std::fill_n(back, int64_t(parts) * C * in_width, A(0));
    const int rows = C / parts;
    for (int part = 0; part < parts; ++part)
      for (int row = 0; row < rows; ++row)
        for (int ci = 0; ci < in_C; ++ci) {
          const int co = part * rows + row;
          const A w = load(static_cast<const T*>(p.params[part])[int64_t(row) * in_C + ci]);
          forward[(int64_t(part) * in_C + ci) * width + co] = back[(int64_t(part) * C + co) * in_width + ci] = w;
        }
  }

  template <class U> Pixels<U> image(U* base, const Grid& grid, int channels, int64_t n) const {
    return {base + n * grid.pixels() * channels, channels};
  }
  void load_x(Scratch& s, int64_t n) {
    load_image<T, A>(image(static_cast<const T*>(p.x), in, in_C, n), in, in_C, s.x);
  }
  // Collects relu(x) as a part's convolution reads it: every pixel, or at stride 2 the pixels (2h + part, 2w +
  // part). An odd image has no pixel there for the last row or column of the second part, which reads zeros.
  void input_of(const Scratch& s, int part, A* to) const {
    const int step = p.reduce ? 2 : 1;
    for_each_pixel<A>(out, in_C, [&](int b, int h, int w, int) {
      const int row = step * h + part, col = step * w + part;
      const bool inside = row < in.rows && col < in.cols;
      put(to + (int64_t(b) * out.pixels() + h * out.cols + w) * L,
          inside ? relu(get(s.x + (int64_t(b) * in.pixels() + row * in.cols + col) * L)) : Vec<A>{});
    });
  }

  // Applies f to the elements of z's or y's image in place, per channel block.
  template <class F> void update(A* z, F f) const {
    for (int b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < out.pixels(); ++i) {
        const int64_t at = (b * int64_t(out.pixels()) + i) * L;
        put(z + at, f(b, at, get(z + at)));
      }
  }
  void normalise(A* z) const {
    update(z, [&](int b, int64_t, Vec<A> v) { return (v - get(mean + b * L)) * get(rstd + b * L); });
  }
  void read_stats() {
    const A* stats = static_cast<const A*>(p.stats);
    for (int c = 0; c < width; ++c) {
      mean[c] = c < C ? stats[c] : A(0);
      rstd[c] = c < C ? A(batch_rstd(double(stats[C + c]), p.eps)) : A(0);
    }
  }

  // Makes z, stores it and gathers its moments in the first sweep, normalises it in the second. The statistics are
  // those of z as it was rounded to the stored dtype, since that is what gets normalised: in a channel whose z are
  // all alike the rounding error must not look like a deviation.
  void run_forward() {
    pack();
    if (!p.training) read_stats();
    T* y = static_cast<T*>(p.y);
    for_each_image([&](Scratch& s, int group, int64_t n) {
      load_x(s, n);
      for (int part = 0; part < parts; ++part) {
        input_of(s, part, s.u);
        const Factor<A> factor{s.u, forward + int64_t(part) * in_C * width, in_C};
        product(&factor, 1, out, blocks, static_cast<A*>(nullptr), false, part == 0 ? s.z : s.y);
      }
      if (p.reduce) select_halves(out.pixels(), C, s.y, s.z);
      if (!p.training) normalise(s.z);
      store_image<T, A>(s.z, out, C, image(y, out, C, n));
      if (!p.training) return;
      // Rounded values are read back: the mean of the unrounded ones would be off by what rounding took.
      if constexpr (!std::is_same_v<T, A>) load_image<T, A>(image(static_cast<const T*>(y), out, C, n), out, C, s.z);
      moments.add_pack(s.z, out.pixels(), C, group, (n - first_image(group)) * out.pixels());
    });
    if (!p.training) return;
    for (int c = 0; c < C; ++c) {
      const Moments total = moments.total(batch, c, width, out.pixels());
      static_cast<A*>(p.stats)[c] = A(total.mean);
      static_cast<A*>(p.stats)[C + c] = stored_variance<A>(total.squares / total.count);
    }
    read_stats();
    for_each_image([&](Scratch& s, int, int64_t n) {
      load_image<T, A>(image(static_cast<const T*>(y), out, C, n), out, C, s.z);
      normalise(s.z);
      store_image<T, A>(s.z, out, C, image(y, out, C, n));
    });
  }

  void load_gradient(Scratch& s, int64_t n) {
    load_image<T, A>(image(static_cast<const T*>(p.dy), out, C, n), out, C, s.z);
    if (p.training) load_image<T, A>(image(static_cast<const T*>(p.y), out, C, n), out, C, s.y);
  }

  // Gathers mean(dy) and q = mean(dy y), which every dz needs in training, since the batch norm ties all pixels of a
  // channel together.
  void gather_dy() {
    for_each_image([&](Scratch& s, int group, int64_t n) {
      A *sums = dy_sums + int64_t(group) * width, *dot = dots + int64_t(group) * width;
      if (n == first_image(group)) std::fill_n(sums, width, A(0)), std::fill_n(dot, width, A(0));
      load_gradient(s, n);
      add_channel_sums(s.z, out.pixels(), blocks, sums);
      add_channel_dots(s.z, s.y, out.pixels(), blocks, dot);
    });
    for (int c = 0; c < width; ++c) {
      dy_mean[c] = A(batch.sum(dy_sums, width, c) / samples());
      q[c] = A(batch.sum(dots, width, c) / samples());
    }
  }

  // Makes dz in place of dy, then dW and dx from it, in one sweep; in training one that gathers comes before.
  void run_backward() {
    pack();
    read_stats();
    if (p.training) gather_dy();
    for_each_image([&](Scratch& s, int group, int64_t n) { input_gradient(s, group, n); });
    const int rows = C / parts;
    for (int part = 0; part < parts && p.dparams[0]; ++part)
      for (int row = 0; row < rows; ++row)
        for (int ci = 0; ci < in_C; ++ci)
          static_cast<T*>(p.dparams[part])[int64_t(row) * in_C + ci] = store<T>(A(batch.sum(
              crosses, int64_t(parts) * width * in_width,
              (int64_t(part) * width + part * rows + row) * in_width + ci)));
  }

  // Computes dz, the group's partial sum of dW = dz relu(x)^T, and dx = W^T dz where x > 0, of one image. At
  // stride 2 the parts write disjoint pixels of dx, which is cleared before, for the pixels that neither
  // reads. A part multiplies its own C/2 channels of dz alone (Factor::first): the others' rows of W are
  // zeros, and 0 times an inf is NaN.
  void input_gradient(Scratch& s, int group, int64_t n) {
    load_x(s, n);
    load_gradient(s, n);
    update(s.z, [&](int b, int64_t at, Vec<A> dy) {
      const Vec<A> r = get(rstd + b * L);
      return p.training ? norm_gradient(r, dy, get(dy_mean + b * L), get(s.y + at), get(q + b * L)) : r * dy;
    });
    for (int part = 0; part < parts && p.dparams[0]; ++part) {
      A* cross = crosses + (int64_t(group) * parts + part) * width * in_width;
      if (n == first_image(group)) std::fill_n(cross, int64_t(width) * in_width, A(0));
      input_of(s, part, s.u);
      outer(s.z, C, out.pixels(), s.u, in_blocks, out.pixels(), out.pixels(),
            static_cast<const LaneNumbers<A>*>(nullptr), false, cross);
    }
    if (!p.dx) return;
    T* dx = static_cast<T*>(p.dx) + n * in.pixels() * in_C;
    const Pixels<T> to{dx, in_C};
    if (p.reduce) memset(dx, 0, sizeof(T) * size_t(in.pixels()) * in_C);
    const int step = p.reduce ? 2 : 1;
    for (int part = 0; part < parts; ++part) {
      const int rows = C / parts;
      const Factor<A> factor{s.z, back + int64_t(part) * C * in_width, (part + 1) * rows, nullptr, 0, part * rows};
      product(&factor, 1, out, in_blocks, static_cast<A*>(nullptr), false, s.u);
      for_each_pixel<A>(out, in_C, [&](int b, int h, int w, int used) {
        const int row = step * h + part, col = step * w + part;
        if (row >= in.rows || col >= in.cols) return;
        const int64_t pixel = int64_t(row) * in.cols + col;
        store_lanes<T, A>(to.data + pixel * to.stride + b * L,
                          where_relu_passes(get(s.x + (int64_t(b) * in.pixels() + pixel) * L),
                                            get(s.u + (int64_t(b) * out.pixels() + h * out.cols + w) * L)), used);
      });
    }
  }
};

}  // namespace

size_t relu_conv_bn_workspace(const ReluConvBnParams& p) {
  return with_dtype(p.dtype, [&](auto t) { return Call<decltype(t)>(p, true).arena.used; });
}
void relu_conv_bn_fwd(const ReluConvBnParams& p) {
  with_dtype(p.dtype, [&](auto t) { Call<decltype(t)>(p, false).run_forward(); });
}
void relu_conv_bn_bwd(const ReluConvBnParams& p) {
  with_dtype(p.dtype, [&](auto t) { Call<decltype(t)>(p, false).run_backward(); });
}

}  // namespace fastnas::FASTNAS_ISA
