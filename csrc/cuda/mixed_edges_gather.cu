// Computes what leaves some states and sums it over all images: u of halves and their Gram or cross matrices, values
// that are no convolutions and their moments or dots. The last block of a job folds the sums.
//
// u is made where it is summed: a warp stages the patches of a few channels, its lanes convolve a strip each into the
// block's tile, and when all channels are there the block adds u u^T (or dy u^T) to the matrix in its registers. So
// u is written to memory once, for the products that follow, and never read for its statistics. Before, a kernel wrote
// it and another read it, 4 bytes an element and 75 instructions for each.
#include "mixed_edges_values.h"

namespace fastnas::cuda {
namespace {

// --- convolution into a tile -------------------------------------------------------------------------------

// Says where u goes: into the tile plus shift[c] (or as it is, where that is null), and to memory, where it is wanted:
// `centred` says whether shifted, too.
struct Destination {
  float* tile;
  const float* shift;
  Planes planes;
  bool centred;
};

// Adds D * relu(in) to the strip of one lane. The kernels of the other stride are left out.
template <int S> struct ConvolvedStrip {
  const Stand& stand;
  float* patches;
  float (&acc)[strips::kSide<S>][strips::kSide<S>];
  template <int K, int D, int OfS> __device__ void run() const {
    if constexpr (OfS == S) {
      const strips::Strip strip = strips::strip_of_lane(stand.lanes, stand.tiling.tile, stand.reach.strip());
      const strips::Patch patch = own_patch(stand, patches);
      const int row = stand.reach.below(stand.tile.row + strip.row);
      const int col = stand.reach.below(stand.tile.col + strip.col);
      const float* taps = own_taps(stand, patches) + strip.channel * strips::tap_pitch(K);
      strips::convolve<K, D, S>(patch.at(strip.channel, row, col), patch.pitch, edges_of(stand.reach, patch, row), taps,
                                acc);
    }
  }
};

// Writes u of a strip from registers to memory and to the tile, whose pixels outside of the image are 0.
template <int N>
__device__ void put_u(const Stand& stand, const strips::Strip& strip, int channel, const Destination& to,
                      const float (&acc)[N][N]) {
  const Tiling& t = stand.tiling;
  const Tile& tile = stand.tile;
  const float by = to.shift ? to.shift[channel] : 0.0f, stored_by = to.centred ? by : 0.0f;
  const int rows = tile.rows - strip.row, cols = tile.cols - strip.col;
  float* own = to.tile + channel * t.pitch + strip.row * t.tile.cols + strip.col;
  int64_t at = tile.image * to.planes.image + (stand.first_channel + channel) * int64_t(t.grid.pixels()) +
               int64_t(tile.row + strip.row) * t.grid.cols + tile.col + strip.col;
#pragma unroll
  for (int r = 0; r < N; ++r, own += t.tile.cols, at += t.grid.cols) {
    if (strip.row + r >= t.tile.rows) return;
#pragma unroll
    for (int q = 0; q < N; q += 4) {
      if (strip.col + q >= t.tile.cols) continue;
      Quad stored, shifted;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        stored.v[k] = acc[r][q + k] + stored_by;
        shifted.v[k] = r < rows && q + k < cols ? acc[r][q + k] + by : 0.0f;
      }
      strips::put_quad(own + q, make_float4(shifted.v[0], shifted.v[1], shifted.v[2], shifted.v[3]));
      if (r < rows && q < cols) put_floats(to.planes, at + q, min(4, cols - q), stored);
    }
  }
}

// Convolves the strip of a lane, of `count` channels from the stand's `first` on. The strip is found again afterwards,
// as in registers it would not fit beside the sums.
template <int S>
__device__ __forceinline__ void convolve_strip(const Stand& stand, float* patches, int first, int count,
                                               const Destination& to) {
  float acc[strips::kSide<S>][strips::kSide<S>] = {};
  const Half& h = stand.half;
  const strips::Strip strip = strips::strip_of_lane(stand.lanes, stand.tiling.tile, stand.reach.strip());
  if (!strip.inside || strip.channel >= count) return;
  strips::with_kernel(h.size, h.dilation, h.stride, ConvolvedStrip<S>{stand, patches, acc});
  fence_registers();
  const strips::Strip again = strips::strip_of_lane(stand.lanes, stand.tiling.tile, stand.reach.strip());
  put_u(stand, again, first + again.channel, to, acc);
}

// Computes u of the stand's half over its tile: to[c][pixel] = D * relu(in). A warp takes the channels of a
// pass, as many as its 32 lanes have strips for, in patches of its own, so only the caller needs a barrier. Its ten
// unrolled convolutions are 9,000 instructions, so one kernel alone calls it, in one place.
__device__ __forceinline__ void convolve_tile(DType type, const Stand& stand, float* patches, const Destination& to) {
  for (int c = warp_index() * stand.at_once; c < stand.channels; c += kWarps * stand.at_once) {
    const Half& h = stand.half;
    const int count = min(stand.at_once, stand.channels - c);
    strips::stage(h.in, stand.tile.image, stand.first_channel + c, count, own_patch(stand, patches));
    strips::stage_taps(h.taps, type, h.size, stand.first_channel + c, count, own_taps(stand, patches));
    strips::wait_staged();
    if (h.stride == 1) convolve_strip<1>(stand, patches, c, count, to);
    else convolve_strip<2>(stand, patches, c, count, to);
  }
}

// --- halves ------------------------------------------------------------------------------------------------

// Adds to sums[c] the sum of a tile's channel. sums are global memory that this block alone writes, always by the same
// lane, so no barrier is needed between tiles.
__device__ void add_channel_sums(const Tiling& t, int C, const float* tile, float* sums) {
  channel_sums(t, C, tile, [&](int c, float sum) { sums[c] += sum; });
}

// Notes minus the mean of a group's first tile in `shift`, so that no digits of the Gram matrix cancel.
__device__ void note_shift(const Tiling& t, const Tile& tile, int C, const float* u, float* shift) {
  const float per_pixel = 1.0f / float(tile.rows * tile.cols);
  channel_sums(t, C, u, [&](int c, float sum) { shift[c] = -sum * per_pixel; });
}

// Adds shift[c] to what a tile has of the image.
__device__ void shift_tile(const Tiling& t, const Tile& tile, int C, float* u, const float* shift) {
  for (QuadWalk walk(t); walk.channel < C; walk.go_on()) {
    const Place p = place_at(t, tile, walk.channel, walk.quad);
    float* const at = u + p.channel * t.pitch + p.pixel;
    Quad quad = quad_at(at);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < p.count) quad.v[k] += shift[p.channel];
    store_quad(at, quad);
  }
}

// Brings u of the stand's tile into shared memory, computed here or, by a launch before or in a pass before, in memory;
// and where it is computed stores it for the products. The Gram matrix is of u' = u + `shift`, which the group's first
// tile sets, and u is stored; a cross matrix is of u centred by the exact mean, and that is stored: summing dy u^T and
// taking the means off afterwards would cancel. Forward's readers centre u by the same addition, so both have the same
// bits.
__device__ __forceinline__ void bring_u(const Plan& plan, const Gather& call, const Stand& stand, float* shift,
                                        const Space& space) {
  const Half& h = stand.half;
  float* const u = space.tile;
  const bool computes = (plan.fused || call.wide) && h.u && stand.base == 0, gram = call.sums == Sums::gram;
  const bool sets_shift = gram && stand.opens && stand.base == 0;
  const Planes planes = u_of(plan, h);
  if (computes) {
    // Where dy lay over the patches, their margins are no zeros any more.
    if (call.sums == Sums::cross && !stand.opens) strips::clear(own_patch(stand, space.patches), stand.at_once);
    const float* const by = call.centres ? h.shift + stand.first_channel : gram && !sets_shift ? shift : nullptr;
    convolve_tile(plan.type, stand, space.patches, {u, by, planes, call.centres});
  } else {
    load_tile(stand.tiling, stand.tile, plan.C, planes, stand.tile.image * planes.image, u,
              [&](int c) { return gram && !sets_shift ? shift[c] : 0.0f; });
  }
  __syncthreads();
  if (!sets_shift) return;
  note_shift(stand.tiling, stand.tile, plan.C, u, shift);
  __syncthreads();
  shift_tile(stand.tiling, stand.tile, plan.C, u, shift);
  __syncthreads();
}

// Gathers the sums of one group of images: of u' u'^T and u', or of dy (u - mean u)^T and dy. A matrix of more pieces
// than the block holds is made in several passes over the images; the first computes u, the others read it.
__device__ __forceinline__ void gather_half(const Plan& plan, const Gather& call, const Space& space, Stand& stand) {
  const bool sums_up = call.sums != Sums::none, cross = call.sums == Sums::cross;
  const auto row = [&](int k) {  // of the group's partial sums, behind the matrix
    return stand.half.partial + blockIdx.x * plan.partial_size() + plan.matrix_size() + k * plan.width;
  };
  for (int c = int(threadIdx.x); sums_up && c < plan.C; c += kThreads) row(0)[c] = row(1)[c] = 0;
  for (int base = 0; base < (sums_up ? cross_pieces(plan) : 1); base += pieces_of_a_pass(plan)) {
    if (sums_up) with_cross(plan, space.sums, base, [](auto product) { product.clear(); });
    for (begin_pass(stand, base); !stand.ends; go_on(stand)) {
      bring_u(plan, call, stand, sums_up ? row(1) : nullptr, space);
      if (cross) {
        load_plainly(plan, stand.tiling, stand.half.dy, stand.tile, space.other);
        clear_tails(stand.tiling, plan.C, space.other);
        __syncthreads();
      }
      if (!sums_up) continue;
      const float* const left = cross ? space.other : space.tile;
      with_cross(plan, space.sums, stand.base,
                 [&](auto product) { product.add(plan, stand.tiling, left, space.tile); });
      if (stand.base == 0) add_channel_sums(stand.tiling, plan.C, left, row(0));
    }
    float* const matrix = sums_up ? row(0) - plan.matrix_size() : nullptr;
    if (sums_up) with_cross(plan, space.sums, base, [&](auto product) { product.store(plan, matrix); });
  }
}

// Merges and folds what the blocks of a half gathered. Without sums the statistics are there already, and the first
// block folds.
__device__ void fold_half(const Plan& plan, const Half& h, const Gather& call, float* scratch) {
  if (call.sums == Sums::none) {
    if (blockIdx.x == 0 && !call.wide) fold_rows(plan, h, false, scratch);
    return;
  }
  const bool cross = call.sums == Sums::cross;
  const auto merge = [&](const Parts& parts) {
    if (cross) merge_crosses(plan, parts);
    else merge_grams(plan, parts);
  };
  if (!merges_all(plan, h.partial, h.done, merge)) return;
  if (cross) return plan.training ? fold_cross(plan, h, scratch) : fold_linear(plan, h);
  fold_gram(plan, h);
  fold_rows(plan, h, true, scratch);
}

// grid (groups, halves + values): a block walks all tiles of a group of images. 64 groups fix the order of the sums.
// They give the two second halves of one edge 128 blocks, about one for each of the 132 multiprocessors of an H100, and
// make the longest block, a max pool with its dots, short enough that others fill the time beside it.
//
// `wide`: grid (images, halves + values, channels) computes u and z alone, of cells whose tiles have no room for whole
// strips of all channels; a block takes kMostFusedChannels of them.
__global__ void __launch_bounds__(kThreads, 3) gather_kernel(const __grid_constant__ Plan plan, Gather call) {
  DYNAMIC_SHARED(float, shared);
  SHARED(Stand, stands, 1);
  Stand& stand = stands[0];
  const Space space(call, shared);
  const int job = int(blockIdx.y), index = job - call.halves;
  if (index < 0) {
    const Half* const h = plan.halves.at(call.first_half + job);
    if (!is_wanted(h, call.which) || (call.wide && !h->u)) return;
    if (threadIdx.x == 0) stand.half = *h;
    stand_at(plan, call, space, stand, true, {h->size, h->dilation, h->stride, false}, h->in.grid);
    gather_half(plan, call, space, stand);
    return fold_half(plan, stand.half, call, space.sums);
  }
  const Value* const value = plan.values.at(call.first_value + (call.strided ? index / 2 : index));
  if (!value || (call.wide && !is_pool(*value)) || (call.strided && value->made != Made::strided)) return;
  if (threadIdx.x == 0) stand.value = *value;
  stand_at(plan, call, space, stand, is_pool(*value), reach_of(*value), value->x.grid);
  if (call.strided) gather_strided(plan, index % 2, space, stand);
  else gather_value(plan, call, space, stand);
}

// Counts the floats that a warp needs for the largest patches and taps of a launch; of a sampled path the host does
// not know which candidates run, so it is for all of them.
int warp_floats(const Launcher& run, Range states, bool values) {
  const Plan& plan = run.plan();
  const Tiling& t = plan.strips;
  int most = 0;
  const auto take = [&](const strips::Reach& reach, int taps) {
    const int plane = strips::patch_of(reach, t, t.grid, nullptr).plane;
    most = std::max(most, channels_at_once(t, reach, std::min(plan.C, kMostFusedChannels)) * (plane + taps));
  };
  for (const Half& h : run.planner.all_halves(states))
    take({h.size, h.dilation, h.stride, false}, strips::tap_pitch(h.size));
  for (const Value& value : run.planner.all_values(states))
    if (values && is_pool(value)) take(reach_of(value), 0);
  return most;
}

// Launches u and z alone, of a wide cell, before the sums.
void launch_wide(Launcher& run, Gather call) {
  const Plan& plan = run.plan();
  call.wide = true, call.sums = Sums::none, call.two_tiles = false;
  call.tile_floats = kMostFusedChannels * plan.strips.pitch, call.sum_floats = 0;
  if (call.strided) call.strided = false, call.values = 0;
  const unsigned chunks = unsigned((plan.C + kMostFusedChannels - 1) / kMostFusedChannels);
  run(gather_kernel, dim3(unsigned(plan.images), unsigned(call.halves + call.values), chunks),
      sizeof(float) * size_t(call.tile_floats + kWarps * call.warp_floats), call);
}

}  // namespace

void launch_gather(Launcher& run, Range states, Which which, Sums sums, bool values) {
  const Plan& plan = run.plan();
  const Range halves = run.planner.halves_of(states), own = run.planner.values_of(states);
  Gather call{};
  call.first_half = halves.first, call.halves = halves.count();
  call.first_value = own.first, call.values = values ? own.count() : 0;
  call.which = which, call.sums = sums;
  call.strided = which == Which::inner, call.centres = sums == Sums::cross && plan.training;
  call.warp_floats = warp_floats(run, states, values);
  if (!plan.fused) launch_wide(run, call), call.warp_floats = 0;
  call.tile_floats = tile_floats(plan, plan.tiling);
  call.two_tiles = values || sums == Sums::cross;
  call.sum_floats = 16 * kThreads * pieces_held(plan);
  static_assert(kFoldFloats <= 16 * kThreads, "a fold works where the sums were");
  const int jobs = call.strided ? 2 * call.values : call.values;
  const int patches = std::max(kWarps * call.warp_floats, call.two_tiles ? call.tile_floats : 0);
  const int floats = call.tile_floats + call.sum_floats + patches;
  run(gather_kernel, dim3(unsigned(plan.groups), unsigned(call.halves + jobs)), sizeof(float) * size_t(floats), call);
}

}  // namespace fastnas::cuda
