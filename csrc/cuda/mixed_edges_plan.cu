// Plans a call of mixed_edges on the host: which jobs a call has, and where their buffers lie.
//
// The lifetimes decide the memory. What outlives the call (statistics, shift, gram, v, u) is the caller's.
// Node sums or gradients live through the call. Everything else (u, pools, folded matrices) lives for one
// level forward or one state backward, so the arena goes back to one place for each: a cell at 64x16x32x32
// needs 210 MiB forward, 259 backward.
#include "mixed_edges_plan.h"

namespace fastnas::cuda {

namespace {

// Carries a part of the tables as a kernel argument. Arguments may be 32,764 bytes; the tables of a DARTS cell take
// 30 KiB, so one launch carries them.
struct alignas(16) Chunk {
  static constexpr int kBytes = 30 * 1024;
  unsigned char bytes[kBytes];
};

// Copies a chunk to the tables, 16 bytes a thread. In a graph the argument is part of the node, so each replay
// writes the same tables again; they hold addresses, which a graph keeps.
__global__ void upload_kernel(const __grid_constant__ Chunk chunk, uint4* to, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = reinterpret_cast<const uint4*>(chunk.bytes)[i];
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
  picks.gathered[i] = own.gathered, picks.pools[i] = own.pool, picks.reduces[i] = own.reduce;
  picks.plains[i] = own.plain;
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

// Tiles of few pixels give more blocks, tiles of many read the matrices less often: this takes the largest tiles that
// still give a block for each of the H100's 132 multiprocessors; a launch has several jobs, which multiplies the
// blocks. The number is fixed, not asked of the device, so results do not depend on the card.
Tiling balanced(Grid grid, int channels, int64_t images, int most) {
  int pixels = most;
  while (pixels > 32 && images * tiling_of(grid, channels, pixels).count() < 132) pixels /= 2;
  return tiling_of(grid, channels, pixels);
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
    if (int error = launch(upload_kernel, (quads + 127) / 128, 128, 0, stream, chunk, to, quads)) return error;
  }
  return sampled() ? launch(pick_kernel, (picks.edges + 127) / 128, 128, 0, stream, plan, picks) : 0;
}

// Lays out sizes, tilings, then the jobs state by state. Convolutions of a few channels have tiles of 256 pixels
// (`strip_tiling`); products hold all channels of a tile, so theirs shrink as C grows. Forward, both inputs are one
// level and share nothing; afterwards each node begins where the level before began.
void Planner::lay_out() {
  const Edge& first = p.edges[0];
  plan.images = p.images, plan.C = p.channels, plan.width = (p.channels + 3) / 4 * 4, plan.nodes = p.nodes;
  plan.wide = p.dtype == DType::f32;
  plan.tensor = (p.tf32 || !plan.wide) && p.channels <= kMostTensorChannels;
  plan.groups = int(std::max<int64_t>(1, std::min<int64_t>(kMostGroups, p.images)));
  const int64_t* size = p.sizes + 2 * first.source;  // the source of the first edge is an input
  plan.out = {int((size[0] + first.stride - 1) / first.stride), int((size[1] + first.stride - 1) / first.stride)};
  // On tensor cores a tile is at most 16 pieces of 32 pixels by 16 channels: four for
  // each of the block's four warps.
  const int most = plan.tensor ? std::min(256, 16 / ((p.channels + 15) / 16) * 32) : 256;
  plan.tiling = balanced(plan.out, plan.width, plan.images, most), plan.strip_tiling = tiling_of(plan.out, 1, 256);
  plan.w = static_cast<const float*>(p.w), plan.output = p.out, plan.dw = p.dw, plan.std = p.std;
  plan.eps = p.eps, plan.form = p.form, plan.level = p.level, plan.rng = p.rng;
  plan.training = p.training, plan.wants_params = p.dparams != nullptr;
  // Node sums of floats grow in the output itself; those of bfloat16 need a buffer, or each level would round.
  const bool output_serves = !backward() && plan.wide;
  for (int j = 0; j < p.nodes; ++j)
    node_values.push_back(output_serves ? reinterpret_cast<float*>(const_cast<char*>(slice(p.out, j)))
                                        : arena.take<float>(plane_size()));
  std::vector<std::vector<Term>> by_edge(p.edge_count);
  if (sampled()) candidates.assign(size_t(p.edge_count) * p.candidates, Candidate{});
  // What a level, or on the way back a state, needs for itself, the next one overwrites.
  const size_t scope = arena.used;
  size_t peak = scope;
  for (int state = 0; state < states(); ++state) {
    if (backward() || state >= p.inputs || state == 0) arena.used = scope;
    add_state(state, by_edge);
    peak = std::max(peak, arena.used);
  }
  begin_state();  // one past the last
  // The jobs of a state are known only now, when the next state has begun.
  for (int state = 0; state < int(sources.size()); ++state) {
    Source& s = sources[state];
    const Range here{state, state + 1};
    s.halves = halves_of(here), s.pools = pools_of(here), s.reduces = reduces_of(here), s.plains = plains_of(here);
  }
  plan.patch_floats = kPatchFloats;
  for (const Half& h : halves)
    plan.patch_floats = std::max(plan.patch_floats, patch_size(h, plan.strip_tiling).pixels());
  arena.used = peak;
  add_sums(by_edge);
  // Partial sums of the largest launch: all halves of a level or state, and both parts of its strided skips. They
  // grow with groups * C^2: 48 halves and 32 groups at C = 256 are 0.4 GB.
  int jobs = 0;
  for (int state = 0; state < states(); ++state)
    jobs = std::max({jobs, halves_of({state, state + 1}).count(), 2 * reduces_of({state, state + 1}).count()});
  if (!backward()) jobs = std::max(jobs, halves_of({0, p.inputs}).count());
  plan.partial = arena.take<float>(jobs * plan.groups * plan.partial_size());
}

// Notes where the jobs of the next state begin. It is called once more after the last
// state, so every state has an end.
void Planner::begin_state() {
  half_begin.push_back(int(halves.size())), gathered_begin.push_back(int(gathered.size()));
  pool_begin.push_back(int(pools.size())), reduce_begin.push_back(int(reduces.size()));
  plain_begin.push_back(int(plains.size())), slot_begin.push_back(int(slots.size()));
}

// Lists the jobs of everything that leaves a state, edge by edge, and per pool the list of the terms that read it.
// Of a sampled path one candidate of an edge runs, so all of them begin at the same address, and an edge takes the
// memory of its largest candidate.
void Planner::add_state(int state, std::vector<std::vector<Term>>& by_edge) {
  begin_state();
  for (int e = 0; e < p.edge_count; ++e) {
    const Edge& edge = p.edges[e];
    if (edge.source != state) continue;
    const size_t begin = arena.used;
    size_t peak = begin;
    for (int i = edge.first_term; i < edge.last_term; ++i) {
      if (sampled()) arena.used = begin;  // only one of them runs
      const EdgeTerm& t = p.terms[i];
      const Candidate c = t.half >= 0 ? add_convolution(t, edge) : add_plain(i, t, edge, state);
      by_edge[e].push_back({c.last_half, c.plain});
      if (sampled()) candidates[e * p.candidates + t.weight] = c;
      peak = std::max(peak, arena.used);
    }
    arena.used = peak;
    if (sampled()) slots.push_back({e, -1});
  }
  for (int k = pool_begin[state]; k < int(pools.size()); ++k) {
    pools[k].first_plain = int(pool_plains.size());
    for (int i = plain_begin[state]; i < int(plains.size()); ++i)
      if (plains[i].pool == k) pool_plains.push_back(i);
    pools[k].last_plain = int(pool_plains.size());
  }
  if (!backward()) return;
  Source s{};
  s.x = state_planes(state);
  s.tiling = tiling_of(s.x.grid, 1, 256);
  const int node = state - p.inputs;
  if (node >= 0) s.dout = {slice(p.dout, node), out_image(), plan.out, plan.wide};
  s.dx = node >= 0 ? node_values[node] : p.dx[state];
  s.wanted = node >= 0 || s.dx != nullptr;
  sources.push_back(s);
}

// Adds one half, or two: a dil_conv's only half is final, a sep_conv's first is not. `output` is where
// second_input_kernel writes v: null if v is no input of another half, or lies there from forward. u is left out
// where forward kept it centred ("fast"); the products then read `kept`.
Candidate Planner::add_convolution(const EdgeTerm& t, const Edge& e) {
  const int count = t.halves, C = plan.C;
  const bool holds_v = p.v != nullptr && p.training;
  char* v = nullptr;
  if (count == 2)
    v = holds_v ? static_cast<char*>(p.v) + size_t(sampled() ? t.edge : t.input) * plane_size() * element
                : arena.take<char>(plane_size() * element);
  const int kept = sampled() ? t.edge : t.kept;
  for (int part = 0; part < count; ++part) {
    Half h{};
    // A sampled path has two halves an edge, whichever candidate runs: what backward needs
    // lies by edge, not by candidate.
    const int index = (sampled() ? 2 * t.edge : t.half) + part, param = t.param + 2 * part;
    h.second = part == 1, h.final = part + 1 == count;
    h.in = h.second ? own_planes(v, plan.wide) : state_planes(e.source);
    h.taps = p.params[param], h.pointwise = p.params[param + 1];
    h.size = t.size, h.dilation = t.dilation, h.stride = part == 0 ? e.stride : 1;
    h.weight = weight_of(t), h.target = e.target;
    h.stats = static_cast<float*>(p.stats) + int64_t(t.norm + part) * 2 * C;
    h.shift = static_cast<float*>(p.shift) + int64_t(index) * C;
    h.gram = p.gram ? static_cast<float*>(p.gram) + int64_t(index) * C * C : nullptr;
    h.mean = arena.take<double>(C), h.cov = arena.take<double>(backward() ? 0 : int64_t(C) * C);
    h.fold = arena.take<float>(int64_t(C) * plan.width);
    h.bias = p.training ? nullptr : arena.take<float>(plan.width);
    if (h.final && t.kept >= 0 && p.u && p.training)
      h.kept = static_cast<char*>(p.u) + size_t(kept) * plane_size() * element;
    if (!(backward() && h.kept)) h.u = arena.take<float>(plane_size());
    h.output = h.final || (backward() && holds_v) ? nullptr : v;
    if (backward()) {
      h.from_dy = arena.take<float>(int64_t(C) * plan.width), h.from_u = arena.take<float>(int64_t(C) * plan.width);
      h.du_bias = arena.take<float>(plan.width), h.du = arena.take<float>(plane_size());
      h.coefficient = arena.take<double>(C), h.dy_mean = arena.take<double>(C), h.q = arena.take<double>(C);
      h.dv = h.final ? nullptr : arena.take<float>(plane_size());
      h.dy = own_planes(h.final ? node_values[e.target] : h.dv, true);
      if (p.dparams) {
        h.dtaps = arena.take<float>(int64_t(plan.groups) * C * t.size * t.size);
        h.dD = p.dparams[param], h.dW = p.dparams[param + 1];
      }
    }
    halves.push_back(h);
  }
  Candidate c;
  c.first_half = int(halves.size()) - count, c.last_half = int(halves.size()) - 1;
  return c;
}

// Lays out the two matrices of a strided skip and its buffers; dx has a plane for each part.
void Planner::add_reduce(const EdgeTerm& t, const Edge& e) {
  Reduce r{};
  r.x = state_planes(e.source);
  for (int part = 0; part < 2; ++part) {
    r.params[part] = p.params[t.param + part];
    r.dparams[part] = p.dparams ? p.dparams[t.param + part] : nullptr;
  }
  r.plain = int(plains.size());
  r.z = arena.take<float>(plane_size());
  const int64_t matrix = int64_t(plan.C) * plan.width;
  r.matrix = arena.take<float>(matrix), r.back = arena.take<float>(matrix);
  if (backward()) r.dx = arena.take<float>(2 * plane_size());
  reduces.push_back(r);
}

// Adds a pool, a skip or a strided skip. Pools of one kind and stride share z and statistics, plain skips
// the spread of x; a sampled path shares neither, as its jobs are picked edge by edge. The way back
// gathers no statistics, it reads them.
Candidate Planner::add_plain(int i, const EdgeTerm& t, const Edge& e, int state) {
  const int C = plan.C;
  Plain n{};
  n.gathered = n.pool = -1;
  n.strided = t.op == EdgeOp::reduce_skip;
  n.normed = t.op != EdgeOp::skip;
  n.noisy = t.skip >= 0 && p.form != NoiseForm::none;
  n.weight = weight_of(t), n.skip = sampled() ? t.edge : t.skip, n.target = e.target;
  for (int k = 0; k < i; ++k)
    n.ordinal += p.terms[k].skip >= 0 && p.edges[p.terms[k].edge].target == e.target;
  if (n.normed) {
    n.stats = static_cast<float*>(p.stats) + int64_t(t.norm) * 2 * C;
    n.mean = arena.take<float>(C), n.rstd = arena.take<float>(C);
  }
  // Has the moments of a tensor gathered, one job for however many terms need them.
  const auto gather = [&](const Planes& z) {
    gathered.push_back({z, arena.take<double>(int64_t(plan.groups) * C * 2)});
    return int(gathered.size()) - 1;
  };
  const bool gathers = p.training && !backward();
  if (n.strided) {
    add_reduce(t, e);
    n.z = own_planes(reduces.back().z, true);
    if (gathers) n.gathered = gather(n.z);
  } else if (n.normed) {
    n.pool = pool_of(state, t, e.stride);
    n.z = own_planes(pools[n.pool].z, true);
    for (int k = plain_begin[state]; k < int(plains.size()); ++k)
      if (plains[k].pool == n.pool) n.gathered = plains[k].gathered;
    if (gathers && n.gathered < 0) n.gathered = gather(n.z);
  } else {
    n.z = state_planes(e.source);
    for (int k = plain_begin[state]; k < int(plains.size()); ++k)
      if (!sampled() && !plains[k].normed) n.gathered = plains[k].gathered;
    if (gathers && n.noisy && is_relative(p.form) && n.gathered < 0) n.gathered = gather(n.z);
  }
  if (backward()) {
    n.dy = own_planes(node_values[e.target], true);
    n.dots = arena.take<double>(int64_t(plan.groups) * 3 * C);
    n.dy_mean = arena.take<float>(C), n.rstd_q = arena.take<float>(C);
  }
  plains.push_back(n);
  return {-1, -1, int(plains.size()) - 1, n.gathered, n.pool, n.strided ? int(reduces.size()) - 1 : -1};
}

// Finds the pool of this kind and stride, which is made if the state has none yet. In a sampled
// path a pool serves one edge.
int Planner::pool_of(int state, const EdgeTerm& t, int stride) {
  const bool average = t.op == EdgeOp::avg_pool;
  for (int k = sampled() ? int(pools.size()) : pool_begin[state]; k < int(pools.size()); ++k)
    if (pools[k].average == average && pools[k].stride == stride) return k;
  Pool pool{};
  pool.x = state_planes(state);
  pool.average = average, pool.stride = stride;
  pool.z = arena.take<float>(plane_size());
  if (backward()) {
    pool.dz = arena.take<float>(plane_size());
    pool.winner = average ? nullptr : arena.take<uint8_t>(plane_size());
  }
  pools.push_back(pool);
  return int(pools.size()) - 1;
}

// Lists the terms that each level adds to each node, edge by edge in the table's order. A sampled path has
// one term an edge, which pick_kernel fills. The next level waits for the sum of the last edge into its
// node alone, not for all of them.
void Planner::add_sums(const std::vector<std::vector<Term>>& by_edge) {
  if (backward()) return;
  const auto level_of = [&](const Edge& e) { return e.source < p.inputs ? 0 : e.source - p.inputs + 1; };
  std::vector<int> opens(p.nodes, p.nodes), closes(p.nodes, 0);
  for (int e = 0; e < p.edge_count; ++e) {
    const int node = p.edges[e].target, level = level_of(p.edges[e]);
    opens[node] = std::min(opens[node], level), closes[node] = std::max(closes[node], level);
  }
  for (int level = 0; level < p.nodes; ++level) {
    const int begin = int(sums.size());
    for (int node = 0; node < p.nodes; ++node) {
      Sum s{};
      bool any = false;
      s.node = node, s.first = int(terms.size());
      for (int e = 0; e < p.edge_count; ++e) {
        if (p.edges[e].target != node || level_of(p.edges[e]) != level) continue;
        any = true;
        if (!sampled()) {
          terms.insert(terms.end(), by_edge[e].begin(), by_edge[e].end());
          continue;
        }
        for (Slot& slot : slots)
          if (slot.edge == e) slot.term = int(terms.size());
        terms.push_back({-1, -1});
      }
      s.last = int(terms.size());
      s.opens = level == opens[node], s.closes = level == closes[node];
      s.sum = node_values[node];
      s.sum_image = plan.wide ? out_image() : int64_t(plan.C) * plan.out.pixels();
      if (any) sums.push_back(s);
    }
    level_sums.push_back({begin, int(sums.size())});
  }
}

// Appends a table to the image of all tables and returns its offset as a pointer, until the address is known.
template <class T> T* Planner::pack(const std::vector<T>& table) {
  const size_t at = image.size();
  image.resize(at + (table.size() * sizeof(T) + 15) / 16 * 16);
  if (!table.empty()) memcpy(image.data() + at, table.data(), table.size() * sizeof(T));
  return reinterpret_cast<T*>(at);  // an offset, until the address is known
}

// Packs all tables, gives them a place on the device and turns offsets into addresses, then takes the lists of
// picked jobs. A measuring arena hands out null, and offsets stay what they are; nobody follows them.
void Planner::pack_tables() {
  plan.halves.all = pack(halves), plan.gathered.all = pack(gathered), plan.pools.all = pack(pools);
  plan.reduces.all = pack(reduces), plan.plains.all = pack(plains), plan.pool_plains = pack(pool_plains);
  plan.terms = pack(terms), plan.sums = pack(sums), plan.sources = pack(sources);
  picks.slots = pack(slots), picks.candidates = pack(candidates);
  tables = arena.take<char>(int64_t(image.size()));
  const auto move = [&](auto*& table) {
    table = reinterpret_cast<std::decay_t<decltype(table)>>(tables + reinterpret_cast<size_t>(table));
  };
  move(plan.halves.all), move(plan.gathered.all), move(plan.pools.all), move(plan.reduces.all), move(plan.plains.all);
  move(plan.pool_plains), move(plan.terms), move(plan.sums), move(plan.sources);
  move(picks.slots), move(picks.candidates);
  if (!sampled()) return;
  const int edges = p.edge_count;
  picks.choice = p.choice, picks.edges = edges, picks.count = p.candidates;
  plan.halves.picked = picks.halves = arena.take<int>(2 * edges);
  plan.gathered.picked = picks.gathered = arena.take<int>(edges);
  plan.pools.picked = picks.pools = arena.take<int>(edges);
  plan.reduces.picked = picks.reduces = arena.take<int>(edges);
  plan.plains.picked = picks.plains = arena.take<int>(edges);
}

}  // namespace fastnas::cuda
