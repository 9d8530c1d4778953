// Copies the tables of a call of mixed_edges to the device, and makes there what the jobs of the whole call need.
#include "mixed_edges_tile.h"

namespace fastnas::cuda {
namespace {

// Carries a part of the tables as a kernel argument. Arguments may be 32,764 bytes; the tables of a DARTS cell take
// 30 KiB, so one launch carries them.
struct alignas(16) Chunk {
  static constexpr int kBytes = 30 * 1024;
  unsigned char bytes[kBytes];
};

// Copies a chunk to the tables, 16 bytes a thread, and begins the counters of blocks that have ended at 0. In a graph
// the argument is part of the node, so each replay writes the same tables again; they hold addresses, which a graph
// keeps.
__global__ void upload_kernel(const __grid_constant__ Chunk chunk, uint4* to, int count, unsigned* counters,
                              int counted) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = reinterpret_cast<const uint4*>(chunk.bytes)[i];
  for (int k = i; k < counted; k += int(gridDim.x * blockDim.x)) counters[k] = 0;
}

// grid (blocks, values): lays out the two matrices of the strided skips as the products read them, once a call.
__global__ void matrices_kernel(Plan plan, int first) {
  const Value& value = plan.values.all[first + blockIdx.y];
  if (value.made != Made::strided) return;
  const int C = plan.C, half = C / 2;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < C * C; i += int(gridDim.x * blockDim.x)) {
    const int co = i / C, ci = i % C, part = co >= half;
    const float w = get(value.params[part], plan.type, int64_t(co - part * half) * C + ci);
    value.matrix[plan.at(ci, co)] = value.back[plan.at(co, ci)] = w;
  }
}

// Runs a thread per edge: it notes the jobs of the candidate that the path takes, -1 for every kind that it
// does not need, and for an edge that is not in the path. The j-th skip into a node draws stream j, so
// `ordinal` counts the skips that the path takes into the node before this edge; the counting repeats for each
// edge and is as deterministic as the path.
__global__ void pick_kernel(Plan plan, Picks picks) {
  const auto candidate_of = [&](int edge) {
    const int64_t choice = picks.choice[edge];
    const bool any = choice >= 0 && choice < picks.count;
    return any ? picks.candidates[edge * picks.count + choice] : Candidate{};
  };
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= picks.edges) return;
  const Slot slot = picks.slots[i];
  const Candidate own = candidate_of(slot.edge);
  picks.halves[2 * i] = own.first_half, picks.halves[2 * i + 1] = own.last_half > own.first_half ? own.last_half : -1;
  picks.values[i] = own.value, picks.plains[i] = own.plain;
  if (slot.term >= 0) plan.terms[slot.term] = {own.last_half, own.plain};
  if (own.plain < 0) return;
  Plain& plain = plan.plains.all[own.plain];
  plain.ordinal = 0;
  for (int edge = 0; edge < slot.edge; ++edge) {
    const int other = candidate_of(edge).plain;
    if (other < 0) continue;
    const Plain& n = plan.plains.all[other];
    plain.ordinal += n.target == plain.target && (n.strided || !n.normed);
  }
}

}  // namespace

// Copies the tables to the device and, for a sampled path, has its jobs picked there.
int Planner::upload(void* stream) const {
  for (size_t done = 0; done < image.size(); done += Chunk::kBytes) {
    Chunk chunk;
    const size_t count = std::min(image.size() - done, sizeof(chunk.bytes));
    memcpy(chunk.bytes, image.data() + done, count);
    const int quads = int((count + 15) / 16);  // tables are whole quads
    uint4* to = reinterpret_cast<uint4*>(tables + done);
    const int zeros = done == 0 ? counted : 0;
    if (int error = launch(upload_kernel, (quads + 127) / 128, 128, 0, stream, chunk, to, quads, counters, zeros))
      return error;
  }
  const auto is_strided = [](const Value& value) { return value.made == Made::strided; };
  if (std::any_of(values.begin(), values.end(), is_strided))
    if (int error = launch(matrices_kernel, dim3(8, unsigned(values.size())), 128, 0, stream, plan, 0)) return error;
  return sampled() ? launch(pick_kernel, (picks.edges + 127) / 128, 128, 0, stream, plan, picks) : 0;
}

}  // namespace fastnas::cuda
