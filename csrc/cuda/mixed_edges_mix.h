// Multiplies the channels of tiles by matrices, sum over operands of M^T tile, in registers: v, the sum of a node and
// dL/du are such sums. On CUDA cores or on tensor cores; what is the same for both is below them.
//
// A block has a tile of the output, 32 sums a thread. Operands pass through shared memory a few channels at a time,
// with their rows of the matrix, by asynchronous copies into one of two buffers while the other is multiplied: between
// two parts there is one barrier. A thread copies at most four quads of a part, so that what it does with them is
// unrolled: it centres its own quads when they have landed.
#pragma once

#include "async_copy.h"
#include "mixed_edges_patch.h"
#include "mixed_edges_tile.h"
#include "tf32.h"

namespace fastnas::cuda {
namespace {

constexpr int kMostOperands = 32;
constexpr int kOwnQuads = 4;  // of a part of an operand, that a thread copies

// Names planes of channels and what they are multiplied by. `at` is the first element of the tile's image. `shift` is
// added to a channel before, or null; what comes of it is stored to `kept` in the call's dtype, or not if that is null.
struct Operand {
  Planes planes;
  int64_t at;
  const float *matrix, *shift;
  void* kept;
};

// Names what a worker sums: channels from the first on, pixels from the first on.
struct Piece { int channel, pixel; };

// Multiplies in fp32. A worker is a thread, its piece 8 channels by 4 pixels: a channel of the tile takes 3 loads of 16
// bytes for 32 FMA. Neighbouring threads read neighbouring quads of pixels, and share the matrix.
struct CudaMixing {
  static constexpr int kTeam = 1, kChannels = 8, kPixels = 4;
  static constexpr int kBlocks = 5;  // that registers leave room for on a multiprocessor
  using Sums = float[8][4];

  static __device__ void add_product(const PartLayout& p, const Piece& piece, const float* tile, const float* matrix,
                                     int channels, Sums& sum) {
    const float *f = matrix + piece.channel / 4 * p.apart, *g = f + p.apart, *v = tile + piece.pixel;
    Quad x[2] = {quad_at(f), quad_at(g)}, y = quad_at(v);
#pragma unroll 4
    for (int c = 0; c < channels; ++c) {
      f += 4, g += 4, v += p.pitch;
      const Quad next_x[2] = {quad_at(f), quad_at(g)}, next_y = quad_at(v);  // past the last they are not used
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += x[i / 4].v[i % 4] * y.v[j];
      x[0] = next_x[0], x[1] = next_x[1], y = next_y;
    }
  }

  // Sums are quads of neighbouring pixels already.
  static __device__ void to_quads(float*, Sums&) {}
  static __device__ void from_quads(float*, Sums&) {}
  static __device__ int channel_of(const Piece& piece, int i) { return piece.channel + i; }
  static __device__ int quad_of(const Piece& piece) { return piece.pixel / 4; }
};

// Multiplies operands rounded to TF32 and sums in fp32. A worker is a warp, its piece 16 channels by 64 pixels: four by
// two 16 x 8 products, of which a lane has four sums each. All lanes have the same loop bounds, as mma.sync demands.
//
// For 8 channels a warp issues 20 loads of 4 bytes a lane and 8 instructions, where CUDA cores take 24 loads of 16
// bytes and 256 FMA. bfloat16 uses the same instruction: its own is twice as fast, but would round A and u, which are
// fp32 here, to 8 bits.
struct TensorMixing {
  static constexpr int kTeam = 32, kChannels = 16, kPixels = 64;
  static constexpr int kBlocks = 4;
  static constexpr int kPitch = kPixels + 4;
  using Sums = float[8][4];

  // These are pixel and channel of a sum in a piece: which lane has what is the instruction's layout (tf32.h).
  static __device__ int pixel_of(int i, int j) { return 16 * (i / 2) + 8 * (j / 2) + lane_index() / 4; }
  static __device__ int output_of(int i, int j) { return 8 * (i % 2) + lane_index() % 4 * 2 + j % 2; }

  // Channels past the last are zeros, on both sides: what lies there may be NaN. Pixels past the last are not stored.
  static __device__ void add_product(const PartLayout& p, const Piece& piece, const float* tile, const float* matrix,
                                     int channels, Sums& sum) {
    const int row = lane_index() / 4, deep = lane_index() % 4;
    const float* const v = tile + piece.pixel + row;
    const float* const f = matrix + (piece.channel + row) / 4 * p.apart + row % 4;
    for (int first = 0; first < channels; first += 8) {
      float a[4][4], b[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = first + deep + 4 * half;
        const bool exists = c < channels;
#pragma unroll
        for (int part = 0; part < 8; ++part)
          a[part / 2][part % 2 + 2 * half] = exists ? v[c * p.pitch + 8 * part] : 0.0f;
#pragma unroll
        for (int part = 0; part < 2; ++part) b[part][half] = exists ? f[2 * part * p.apart + 4 * c] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) add_tf32_product(a[i / 2], b[i % 2], sum[i]);
    }
  }

  // Changes the sums that a lane has: to quads of neighbouring pixels, and back, in the warp's own `space`.
  static __device__ void to_quads(float* space, Sums& sum) {
    float* const own = space + int(threadIdx.x) / 32 * kChannels * kPitch;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) own[output_of(i, j) * kPitch + pixel_of(i, j)] = sum[i][j];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Quad quad = quad_at(own + (lane_index() / 16 + 2 * i) * kPitch + lane_index() % 16 * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = quad.v[j];
    }
  }
  static __device__ void from_quads(float* space, Sums& sum) {
    float* const own = space + int(threadIdx.x) / 32 * kChannels * kPitch;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      store_quad(own + (lane_index() / 16 + 2 * i) * kPitch + lane_index() % 16 * 4,
                 Quad{{sum[i][0], sum[i][1], sum[i][2], sum[i][3]}});
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = own[output_of(i, j) * kPitch + pixel_of(i, j)];
    __syncwarp();
  }
  static __device__ int channel_of(const Piece& piece, int i) { return piece.channel + lane_index() / 16 + 2 * i; }
  static __device__ int quad_of(const Piece& piece) { return piece.pixel / 4 + lane_index() % 16; }
};

// Count the pieces of a tile.
template <class Units> FASTNAS_HD int pixel_pieces(const Tiling& t) {
  return (t.tile.pixels() + Units::kPixels - 1) / Units::kPixels;
}
template <class Units> FASTNAS_HD int pieces_of(const Plan& plan, const Tiling& t) {
  return (plan.width + Units::kChannels - 1) / Units::kChannels * pixel_pieces<Units>(t);
}

// Counts the floats of shared memory that a block takes: two buffers, and what the sums of tensor cores go through.
inline int mixing_floats(const Plan& plan) {
  const int exchanged = plan.tensor ? kWarps * TensorMixing::kChannels * TensorMixing::kPitch : 0;
  return std::max(2 * plan.parts.floats + exchanged, kMixedElements);
}

// Sums operands over the block's tile. A block that has more pieces than workers goes through all operands once for as
// many pieces as it has workers: each_pass(). A thread's sums are 8 quads of pixels, between calls of add().
template <class Units> struct Mixing {
  const Plan& plan;
  const Tiling& t;
  const Tile tile;
  float* const shared;
  Piece piece;
  bool exists;  // the piece
  int own_channel, own_step;
  Place own;  // the quads that this thread copies: one of each own_step-th channel from own_channel on
  float shift[kOwnQuads];
  typename Units::Sums sum;

  __device__ Mixing(const Plan& plan, float* shared)
      : plan(plan), t(plan.product), tile(tile_of_block(plan.product)), shared(shared) {
    const int quad = int(threadIdx.x) & ((1 << t.quad_bits) - 1);
    own_channel = int(threadIdx.x) >> t.quad_bits, own_step = kThreads >> t.quad_bits;
    own = place_at(t, tile, 0, quad);
    if (quad >= t.quads()) own.count = 0;
  }

  // Calls f() with the piece of each pass, and with sums of 0.
  template <class F> __device__ void each_pass(F f) {
    const int across = pixel_pieces<Units>(t), count = pieces_of<Units>(plan, t);
    for (int base = 0; base < count; base += kThreads / Units::kTeam) {
      const int index = base + int(threadIdx.x) / Units::kTeam, row = index / across;
      exists = index < count;
      piece = {row * Units::kChannels, (index - row * across) * Units::kPixels};
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = 0;
      f();
    }
  }

  __device__ float* tile_of(int buffer) const { return shared + buffer * plan.parts.floats; }
  __device__ float* matrix_of(int buffer) const {
    return tile_of(buffer) + (plan.parts.channels + 1) * plan.parts.pitch;
  }
  __device__ float* space() const { return shared + 2 * plan.parts.floats; }

  // Begins to copy a part: `channels` channels from `first` on.
  __device__ void load_tile(const Operand& from, int first, int channels, int buffer) {
    const int plane = from.planes.grid.pixels();
    const int64_t at = from.at + int64_t(first + own_channel) * plane + own.offset;
    float* const to = tile_of(buffer) + own_channel * plan.parts.pitch + own.pixel;
    const int left = own.count > 0 ? channels - own_channel : 0, step = own_step * plan.parts.pitch;
    if (from.planes.aligned && from.planes.type == DType::f32) {
      const float* const x = strips::in_global(static_cast<const float*>(from.planes.data)) + at;
#pragma unroll
      for (int k = 0; k < kOwnQuads; ++k)
        if (k * own_step < left) copy_async16(to + k * step, x + int64_t(k * own_step) * plane);
    } else {
#pragma unroll 1
      for (int k = 0; k * own_step < left; ++k)
        store_quad(to + k * step, get_quad(from.planes, at + int64_t(k * own_step) * plane, own.count));
    }
  }
  // Reads what this thread's channels of a part are to be shifted by, when the part lands.
  __device__ void load_shifts(const Operand& from, int first, int channels) {
    const float* const shifts = strips::in_global(from.shift) + first + own_channel;
#pragma unroll
    for (int k = 0; k < kOwnQuads; ++k)
      if (k * own_step < channels - own_channel) shift[k] = shifts[k * own_step];
  }
  __device__ void load_matrix(const Operand& from, int first, int channels, int buffer) {
    float* const to = matrix_of(buffer);
    const float* const matrix = strips::in_global(from.matrix) + first * 4;
    for (int out = int(threadIdx.x) / 8; out < plan.width / 4; out += kThreads / 8)
      for (int c = int(threadIdx.x) % 8; c < channels; c += 8)
        copy_async16(to + out * plan.parts.apart + 4 * c, matrix + (out * plan.C + c) * 4);
  }

  // Shifts what this thread copied, and keeps it. No other thread has read it.
  __device__ void centre(const Operand& from, int first, int channels, int buffer) {
    const int left = own.count > 0 ? channels - own_channel : 0;
    float* const at = tile_of(buffer) + own_channel * plan.parts.pitch + own.pixel;
#pragma unroll
    for (int k = 0; k < kOwnQuads; ++k) {
      if (k * own_step >= left) continue;
      Quad quad = quad_at(at + k * own_step * plan.parts.pitch);
#pragma unroll
      for (int j = 0; j < 4; ++j) quad.v[j] += shift[k];
      store_quad(at + k * own_step * plan.parts.pitch, quad);
    }
    const Planes kept = plan.own(from.kept);
#pragma unroll 1
    for (int k = 0; from.kept && k * own_step < left; ++k)
      put_quad(kept, tile.image * kept.image + (first + own_channel + k * own_step) * plan.plane() + own.offset,
               own.count, quad_at(at + k * own_step * plan.parts.pitch));
  }

  // Adds `count` operands of `channels` channels, which lie in shared memory. meanwhile() is called while the first of
  // them is on its way.
  template <class F> __device__ void add(const Operand* operands, int count, int channels, F meanwhile) {
    __syncthreads();  // what was read of the buffers, or written to the operands
    int next = 0, first = 0;  // of the part that is loaded next
    const auto load = [&](int buffer) {
      const int some = min(plan.parts.channels, channels - first);
      load_tile(operands[next], first, some, buffer);
      load_matrix(operands[next], first, some, buffer);
      if (operands[next].shift) load_shifts(operands[next], first, some);
      commit();
    };
    if (count > 0) load(0);
    meanwhile();
    Units::from_quads(space(), sum);
    for (int buffer = 0; next < count; buffer ^= 1) {
      const int some = min(plan.parts.channels, channels - first);
      wait<0>();
      if (operands[next].shift) centre(operands[next], first, some, buffer);
      __syncthreads();
      first += plan.parts.channels;
      if (first >= channels) first = 0, ++next;
      if (next < count) load(buffer ^ 1);
      if (exists) Units::add_product(plan.parts, piece, tile_of(buffer), matrix_of(buffer), some, sum);
    }
    Units::to_quads(space(), sum);
  }

  // Finds the thread's quads of sums: the first's place in the image, without its channel.
  __device__ Place place() const {
    const int quad = Units::quad_of(piece);
    Place place = place_at(t, tile, 0, min(quad, t.quads() - 1));
    if (!exists || quad >= t.quads()) place.count = 0;
    return place;
  }
  __device__ int channel_of(int i) const { return Units::channel_of(piece, i); }

  // Calls f(place, sums of a quad) over what the thread has of the image.
  template <class F> __device__ void each_quad(F f) {
    Place at = place();
    if (at.count == 0) return;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (at.channel = channel_of(i); at.channel < plan.C) f(at, sum[i]);
  }
  // Does the same in a loop that is not unrolled, for what is long and seldom wanted. The sums go by way of the
  // buffers, so all threads call it.
  template <class F> __device__ void each_quad_by_turns(F f) {
    __syncthreads();
    float* const own = shared + 4 * threadIdx.x;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      store_quad(own + 4 * i * kThreads, Quad{{sum[i][0], sum[i][1], sum[i][2], sum[i][3]}});
    Place at = place();
#pragma unroll 1
    for (int i = 0; at.count > 0 && i < 8; ++i) {
      if (at.channel = channel_of(i); at.channel >= plan.C) break;
      Quad quad = quad_at(own + 4 * i * kThreads);
      f(at, quad.v);
      store_quad(own + 4 * i * kThreads, quad);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Quad quad = quad_at(own + 4 * i * kThreads);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = quad.v[j];
    }
  }

  // Calls f(place, i) for the sums of quads i to i + 3, whose loads are to be in flight at once: what f asks for by
  // four() and channels() depends on nothing. Quads of channels past the last are those of the last, and never stored.
  template <class F> __device__ void each_four(F f) {
    const Place at = place();
    if (at.count == 0) return;
#pragma unroll
    for (int i = 0; i < 8; i += 4) f(at, i);
  }
  template <class T> __device__ void four(const T* image, const Place& at, int i, Quad (&quads)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      quads[k] = load_quad(strips::in_global(image) + min(channel_of(i + k), plan.C - 1) * plan.plane() + at.offset);
  }
  __device__ void channels(const float* from, int i, float (&values)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) values[k] = strips::in_global(from)[min(channel_of(i + k), plan.C - 1)];
  }

  // Adds a constant of each channel.
  __device__ void add_constants(const float* from) {
    each_four([&](const Place&, int i) {
      float constant[4];
      channels(from, i, constant);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i + k][j] += constant[k];
    });
  }

  // Stores the sums to planes whose image begins at `first`.
  __device__ void put(const Planes& to, int64_t first) {
    if (to.aligned && to.type == DType::f32) {
      float* const data = static_cast<float*>(const_cast<void*>(to.data)) + first;
      each_quad([&](const Place& p, float(&own)[4]) {
        store_quad(data + p.channel * plan.plane() + p.offset, Quad{{own[0], own[1], own[2], own[3]}});
      });
    } else {
      each_quad_by_turns([&](const Place& p, float(&own)[4]) {
        put_quad(to, first + p.channel * plan.plane() + p.offset, p.count, Quad{{own[0], own[1], own[2], own[3]}});
      });
    }
  }
};

}  // namespace
}  // namespace fastnas::cuda
