// Defines compiler vectors of this instruction set's width, and images laid out for them.
//
// An image is [channel blocks][rows][columns][lanes]: the lanes of a vector are neighbouring channels of one pixel.
// With pixels in the lanes a plane of 8 x 8 or of an odd width would leave lanes empty, and every horizontal tap
// would need shifted, unaligned loads. This way every plane size and every tap is an aligned load of a full vector,
// and nothing is shuffled. The lanes past the last channel hold zeros, so no loop over pixels has a tail.
//
// Where half of a vector or more would stay empty, a pack of images shares it: lane s C + c is channel c of image s.
// What treats the lanes alike (convolutions, pools, sums of channels) does not know of it; taps and the other values of
// channels are repeated for each slot s. Products over the channels broadcast slot by slot (pick), and what was summed
// over pixels is summed over slots in the end.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../formulas/storage.h"

namespace fastnas::FASTNAS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

// One source serves every instruction set: the compiler's vector types become zmm, ymm, xmm or NEON registers. With
// 32 registers the kernels keep twice as many sums in flight (kColumns in depthwise.h, R in product.h).
inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class A> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(kVectorBytes))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(kVectorBytes))); };
template <class A> using Vec = typename VectorOf<A>::type;
template <class A> constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A> int blocks_of(int channels) { return (channels + kLanes<A> - 1) / kLanes<A>; }
// Counts the images of a pack: as many as fit a vector, and not more than there are.
template <class A> int slots_for(int channels, int64_t images) {
  const int64_t fit = kLanes<A> / channels, slots = fit < images ? fit : images;
  return slots > 1 ? int(slots) : 1;
}

// Adds the lanes in their order, so the result depends on the instruction set, never
// on a compiler's reduction tree.
template <class A> Vec<A> get(const A* at) { return *reinterpret_cast<const Vec<A>*>(at); }
template <class A> void put(A* at, Vec<A> v) { *reinterpret_cast<Vec<A>*>(at) = v; }
template <class A> Vec<A> splat(A a) { return Vec<A>{} + a; }
template <class A> A sum_lanes(Vec<A> v) {
  A sum = 0;
  for (int l = 0; l < kLanes<A>; ++l) sum += v[l];
  return sum;
}

// Picks the lanes that `lanes` counts, for each lane of the result.
template <class A> using Whole = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <class A> struct LaneNumbersOf { typedef Whole<A> type __attribute__((vector_size(kVectorBytes))); };
template <class A> using LaneNumbers = typename LaneNumbersOf<A>::type;
template <class A> Vec<A> pick(Vec<A> v, LaneNumbers<A> lanes) {
#if defined(__clang__)
  return __builtin_shufflevector(v, lanes);
#else
  return __builtin_shuffle(v, lanes);
#endif
}
// Counts, for every lane, the first lane of its slot; picking that plus i broadcasts channel i within each slot.
template <class A> LaneNumbers<A> slot_starts(int channels) {
  LaneNumbers<A> starts{};
  for (int l = 0; l < kLanes<A>; ++l) starts[l] = l / channels * channels;
  return starts;
}

// As in torch: a comparison with NaN is false, so NaN stays NaN going forward, and its gradient passes going back.
template <class V> V relu(V x) { return x < 0 ? V{} : x; }
template <class V> V where_relu_passes(V x, V dy) { return x <= 0 ? V{} : dy; }

// Loads and stores a vector of a stored dtype. 16-bit dtypes are widened and narrowed here as integer vectors,
// because g++ 12 converts them lane by lane if it is left to find the vector form itself.
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
template <class T, class A> Vec<A> load_vector(const T* from) {
  if constexpr (sizeof(T) == sizeof(A)) {
    Vec<A> v;
    memcpy(&v, from, sizeof v);
    return v;
  } else {
    static_assert(sizeof(T) == 2 && std::is_same_v<A, float>);
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    const Bits bits = __builtin_convertvector(halves, Bits);
    if constexpr (std::is_same_v<T, bf16_t>) return bit_cast<Vec<A>>(bits << 16);
    return value_of_f16<Vec<A>>(bits);
  }
}
template <class T, class A> void store_vector(T* to, Vec<A> v) {
  if constexpr (sizeof(T) == sizeof(A)) {
    memcpy(to, &v, sizeof v);
  } else {
    static_assert(sizeof(T) == 2 && std::is_same_v<A, float>);
    Bits bits = bit_cast<Bits>(v);
    if constexpr (std::is_same_v<T, bf16_t>) bits = bf16_of(bits);
    else bits = f16_of<Vec<A>>(bits);
    const Halves halves = __builtin_convertvector(bits, Halves);
    memcpy(to, &halves, sizeof halves);
  }
}

// Rounds to what store_vector and load_vector would leave of the values.
template <class T, class A> Vec<A> rounded(Vec<A> v) {
  if constexpr (std::is_same_v<T, bf16_t>) return bit_cast<Vec<A>>(bf16_of(bit_cast<Bits>(v)) << 16);
  else return v;
}

// Loads or stores `count` <= lanes values; the other lanes read as 0. A full load past the last channel would read
// the next pixel's channels, or past the end of the tensor at the last pixel.
template <class T, class A> Vec<A> load_lanes(const T* from, int count) {
  if (count == kLanes<A>) return load_vector<T, A>(from);
  Vec<A> v{};
  for (int l = 0; l < count; ++l) v[l] = load(from[l]);
  return v;
}
template <class T, class A> void store_lanes(T* to, Vec<A> v, int count) {
  if (count == kLanes<A>) return store_vector<T, A>(to, v);
  for (int l = 0; l < count; ++l) to[l] = store<T>(v[l]);
}

// A padded plane has a halo of zeros around the image, wide enough for every kernel (a dilated 5x5 reaches 4
// pixels, a 7x7 reaches 3). Convolutions and weight gradients therefore test no column against a border.
constexpr int kHalo = 4;
struct Grid {
  int rows, cols;
  int pixels() const { return rows * cols; }
  int pitch() const { return cols + 2 * kHalo; }
  int padded() const { return (rows + 2 * kHalo) * pitch(); }
  int inside() const { return kHalo * pitch() + kHalo; }  // first pixel of the image in a padded plane
};

// Rows are some rows of an image. What one kernel writes and the next one reads is cut to rows of at most
// 8 KiB: u goes from the depthwise kernel into the product while it is still in L1, beside the input rows
// and the folded matrix. With whole images (64 KiB of fp32 at the first stage of a network) u made a trip
// to L2 and back for each of them.
struct Rows {
  int first, last;
  int count() const { return last - first; }
};
template <class A, class F> void for_each_rows(const Grid& grid, int blocks, F f) {
  constexpr int kBytes = 8192;
  const int64_t row = int64_t(grid.cols) * blocks * kVectorBytes;
  if (row == 0) return;
  const int fit = int(kBytes / row), step = fit < 1 ? 1 : fit;
  for (int h = 0; h < grid.rows; h += step) f(Rows{h, h + step < grid.rows ? h + step : grid.rows});
}

// Pixels are one image of a channels-last tensor, or a pack of them: `stride` elements from pixel to pixel, which is C,
// or nodes * C for a node, whose values are a slice of the concatenated output of a cell; `image` from one to the next.
template <class T> struct Pixels {
  T* data;
  int64_t stride, image = 0;
  int images = 1;
  Pixels from(int64_t pixel) const { return {data + pixel * stride, stride, image, images}; }
  Pixels<const T> to_read() const { return {data, stride, image, images}; }
};

// Loads the same channels of several images side by side. Halves are joined as vectors: written to memory one by one
// and read back at once, they would wait until the last of them had left the store buffer.
template <class T> using Stored = std::conditional_t<sizeof(T) == 2, uint16_t, T>;  // vectors have no bf16
template <class T, int count> struct Channels { typedef T type __attribute__((vector_size(count * sizeof(T)))); };
template <class V, int... lane> auto joined(V low, V high, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(low, high, lane...);
}
template <class T, int channels, int images> auto load_joined(const T* from, int64_t image) {
  if constexpr (images == 1) {
    typename Channels<T, channels>::type v;
    memcpy(&v, from, sizeof v);
    return v;
  } else {
    return joined(load_joined<T, channels, images / 2>(from, image),
                  load_joined<T, channels, images / 2>(from + images / 2 * image, image),
                  std::make_integer_sequence<int, channels * images>());
  }
}

// Calls f(integral constant images) if that many images of `channels` fill a vector evenly: 2 or 4.
template <class A, class F> bool with_even_pack(int channels, int images, F f) {
  if (channels * images != kLanes<A>) return false;
  if constexpr (kLanes<A> >= 4)
    if (images == 4) return f(std::integral_constant<int, 4>()), true;
  if (images == 2) return f(std::integral_constant<int, 2>()), true;
  return false;
}

// Loads of images ask for what lies this many pixels ahead. A node is one line in `nodes` of the concatenated
// output, a stride that the hardware's prefetcher does not follow; asking made reading images 1.5 times faster.
constexpr int kAhead = 24;
template <class T> void prefetch(const T* pixel, int64_t stride) { __builtin_prefetch(pixel + kAhead * stride); }

// Loads or stores one vector of a pixel: `channels` of a block, of every image of the pack.
template <class T, class A> Vec<A> load_pixel(const Pixels<const T>& from, int64_t pixel, int block, int channels) {
  constexpr int L = kLanes<A>;
  const T* at = from.data + pixel * from.stride + block * L;
  if (from.images == 1) {
    prefetch(at, from.stride);
    return load_lanes<T, A>(at, channels);
  }
  Vec<A> v{};
  const bool even = with_even_pack<A>(channels, from.images, [&](auto images) {
    const auto stored = load_joined<Stored<T>, L / images, images>(reinterpret_cast<const Stored<T>*>(at), from.image);
    v = load_vector<T, A>(reinterpret_cast<const T*>(&stored));
  });
  for (int l = 0; !even && l < channels * from.images; ++l) v[l] = load(at[l / channels * from.image + l % channels]);
  return v;
}
template <class T, class A> void store_pixel(const Pixels<T>& to, int64_t pixel, int block, int channels, Vec<A> v) {
  constexpr int L = kLanes<A>;
  T* at = to.data + pixel * to.stride + block * L;
  if (to.images == 1) return store_lanes<T, A>(at, v, channels);
  const bool even = with_even_pack<A>(channels, to.images, [&](auto images) {
    T stored[L];
    store_vector<T, A>(stored, v);
    for (int s = 0; s < images; ++s) memcpy(at + s * to.image, stored + s * (L / images), sizeof(T) * (L / images));
  });
  for (int l = 0; !even && l < channels * to.images; ++l)
    at[l / channels * to.image + l % channels] = store<T>(v[l]);
}

// Calls f(block, row, column, channels in use) for every vector of an image.
template <class A, class F> void for_each_pixel(Rows rows, int cols, int channels, F f) {
  for (int b = 0; b < blocks_of<A>(channels); ++b) {
    const int used = channels - b * kLanes<A> < kLanes<A> ? channels - b * kLanes<A> : kLanes<A>;
    for (int h = rows.first; h < rows.last; ++h)
      for (int w = 0; w < cols; ++w) f(b, h, w, used);
  }
}
template <class A, class F> void for_each_pixel(const Grid& grid, int channels, F f) {
  for_each_pixel<A>(Rows{0, grid.rows}, grid.cols, channels, f);
}

// Makes z of a strided pair of convolutions (FactorizedReduce): channels below C/2 are those of the
// first, the others those of the second. The parts are selected, not multiplied by zeros and added: 0
// times an inf of the other part is NaN.
template <class A> void select_halves(int64_t pixels, int channels, const A* second, A* z) {
  for (int b = 0; b < blocks_of<A>(channels); ++b) {
    Vec<A> lane{};
    for (int l = 0; l < kLanes<A>; ++l) lane[l] = A((b * kLanes<A> + l) % channels);
    const auto first = lane < splat<A>(A(channels / 2));
    for (int64_t i = b * pixels * kLanes<A>; i < (b + 1) * pixels * kLanes<A>; i += kLanes<A>)
      put(z + i, first ? get(z + i) : get(second + i));
  }
}

template <class T, class A> void load_image(Pixels<const T> from, const Grid& grid, int channels, A* to) {
  for_each_pixel<A>(grid, channels, [&](int b, int h, int w, int used) {
    const int pixel = h * grid.cols + w;
    put(to + (int64_t(b) * grid.pixels() + pixel) * kLanes<A>, load_pixel<T, A>(from, pixel, b, used));
  });
}

template <class T, class A> void store_image(const A* from, const Grid& grid, int channels, Pixels<T> to) {
  for_each_pixel<A>(grid, channels, [&](int b, int h, int w, int used) {
    const int pixel = h * grid.cols + w;
    store_pixel<T, A>(to, pixel, b, used, get(from + (int64_t(b) * grid.pixels() + pixel) * kLanes<A>));
  });
}

// Writes zeros into the halo of every plane and leaves the inside alone: the caller fills that anyway, and clearing
// whole planes would write every pixel twice.
template <class A> void clear_halo(const Grid& grid, int blocks, A* padded) {
  const int64_t row = int64_t(grid.pitch()) * kLanes<A>, edge = int64_t(kHalo) * kLanes<A>;
  for (int b = 0; b < blocks; ++b) {
    A* plane = padded + int64_t(b) * grid.padded() * kLanes<A>;
    memset(plane, 0, sizeof(A) * kHalo * row);
    memset(plane + (grid.rows + kHalo) * row, 0, sizeof(A) * kHalo * row);
    for (int h = kHalo; h < grid.rows + kHalo; ++h) {
      memset(plane + h * row, 0, sizeof(A) * edge);
      memset(plane + (h + 1) * row - edge, 0, sizeof(A) * edge);
    }
  }
}

}  // namespace fastnas::FASTNAS_ISA
