// Plans a call of mixed_edges on the host: which jobs a call has, and where their buffers lie.
//
// The lifetimes decide the memory. What outlives the call (statistics, shift, gram, v, u) is the caller's.
// Node sums or gradients live through the call. Everything else (u, pools, folded matrices) lives for one
// level forward or one state backward, so the arena goes back to one place for each: a cell at 64x16x32x32
// needs 210 MiB forward, 259 backward.
#include "mixed_edges_plan.h"

namespace fastnas::cuda {
namespace {

// A block's threads, or on tensor cores its warps, sum one tile of products at once: 8 channels by 4 pixels each, or 16
// by 64. Tiles of more would be summed in passes that read all operands again, tiles of fewer leave threads idle.
Tiling mixed_tiling(Grid grid, int width, bool tensor) {
  const int pixels =
      tensor ? 64 * std::max(1, 4 / ((width + 15) / 16)) : kMixedElements / rounded_up(width, 8) / 4 * 4;
  return product_tiling(grid, width, std::min(256, pixels));
}

// A thread copies four quads of a part, so that what it does with them is unrolled, and the matrix takes no more than
// the tile; but no part has fewer than 8 channels. A row more is read ahead, and not used. Banks: a warp reads quads of
// pixels of a channel, or on tensor cores 8 pixels of 4 channels and 8 rows of 4 columns of the matrix.
PartLayout part_layout(const Tiling& t, int width) {
  constexpr int kQuads = kMixedElements / 8;
  PartLayout p{};
  p.channels = kQuads >> t.quad_bits;
  while (p.channels > 8 && p.channels * width > 4 * kQuads) p.channels /= 2;
  p.pitch = t.tile.pixels() + 8, p.apart = 4 * p.channels + 16;
  p.floats = (p.channels + 1) * p.pitch + rounded_up(width, 16) / 4 * p.apart;
  return p;
}

}  // namespace

// Sizes the tiles. Sums over pixels hold all channels of a tile of whole strips; where these do not fit, u and z are
// computed first, in tiles of some channels.
void Planner::lay_out_tiles() {
  const Edge& first = p.edges[0];
  const int64_t* size = p.sizes + 2 * first.source;  // the source of the first edge is an input
  plan.out = {int((size[0] + first.stride - 1) / first.stride), int((size[1] + first.stride - 1) / first.stride)};
  bool strides = false;
  for (int e = 0; e < p.edge_count; ++e) strides |= p.edges[e].stride == 2;
  plan.fused = plan.width <= kMostFusedChannels;
  const int channels = std::min(plan.width, kMostFusedChannels);
  // On tensor cores a product's tile is at most 16 pieces of 32 pixels by 16 channels: four for each of the block's
  // four warps.
  const int most_pixels = plan.tensor ? std::max(1, 16 / ((p.channels + 15) / 16)) * 32 : kMostTilePixels;
  const int strip_pixels = std::max(64, std::min({kMostTilePixels, kTileElements / channels, most_pixels}));
  plan.strips = strip_tiling(plan.out, strip_pixels, strides ? 4 : 8);
  plan.tiling = plan.fused ? plan.strips : product_tiling(plan.out, plan.width, std::min(256, most_pixels));
  plan.product = mixed_tiling(plan.out, plan.width, plan.tensor);
  plan.parts = part_layout(plan.product, plan.width);
}

// Takes as many groups as there are images, up to kMostGroups, but fewer where the partial sums of the largest level
// would take more than kMostPartialBytes: they grow with groups C^2, and 48 halves of 1024 channels in 64 groups
// would be 13 GB.
int Planner::count_groups() const {
  int jobs = 1;
  for (int state = 0; state < p.inputs + p.nodes; ++state) {
    int own = 0;
    for (int e = 0; e < p.edge_count; ++e) {
      const Edge& edge = p.edges[e];
      const bool same_level = backward() ? edge.source == state : std::max(edge.source, p.inputs - 1) == state;
      for (int i = edge.first_term; same_level && i < edge.last_term; ++i)
        own += p.terms[i].op == EdgeOp::reduce_skip ? 2 : p.terms[i].halves;
    }
    jobs = std::max(jobs, own);
  }
  const int64_t fit = kMostPartialBytes / (jobs * plan.partial_size() * int64_t(sizeof(float)));
  return int(std::max<int64_t>(1, std::min({int64_t(kMostGroups), p.images, fit})));
}

// Lays out sizes, tilings, then the jobs state by state. Forward, both inputs are one level and share nothing;
// afterwards each node begins where the level before began.
void Planner::lay_out() {
  plan.images = p.images, plan.C = p.channels, plan.width = rounded_up(p.channels, 4), plan.nodes = p.nodes;
  plan.type = p.dtype;
  plan.tensor = (p.tf32 || plan.type != DType::f32) && p.channels <= kMostTensorChannels;
  plan.groups = count_groups(), plan.a_group = p.images / plan.groups, plan.longer = p.images % plan.groups;
  lay_out_tiles();
  plan.w = static_cast<const float*>(p.w), plan.output = p.out, plan.dw = p.dw, plan.std = p.std;
  plan.eps = p.eps, plan.form = p.form, plan.level = p.level, plan.rng = p.rng;
  plan.training = p.training, plan.backward = backward(), plan.wants_params = p.dparams != nullptr;
  plan.output_aligned = user_planes(p.out, 0, plan.out).aligned;
  int terms_count = 0, strided = 0;
  for (int e = 0; e < p.edge_count; ++e) terms_count = std::max(terms_count, int(p.edges[e].last_term));
  for (int i = 0; i < terms_count; ++i) strided += p.terms[i].op == EdgeOp::reduce_skip;
  counters = arena.take<unsigned>(kCountersOfTerm * terms_count);
  matrices = arena.take<float>(2 * strided * plan.matrix_size());
  // Node sums of floats grow in the output itself; those of 16 bits need a buffer, or each level would round.
  const bool output_serves = !backward() && plan.type == DType::f32;
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
    s.halves = halves_of(here), s.values = values_of(here), s.plains = jobs_of(plain_begin, here);
  }
  arena.used = peak;
  add_sums(by_edge);
}

// Notes where the jobs of the next state begin. It is called once more after the last
// state, so every state has an end.
void Planner::begin_state() {
  half_begin.push_back(int(halves.size())), value_begin.push_back(int(values.size()));
  plain_begin.push_back(int(plains.size())), slot_begin.push_back(int(slots.size()));
}

// Lists the jobs of everything that leaves a state, edge by edge, and per value the list of the terms that read it.
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
  for (int k = value_begin[state]; k < int(values.size()); ++k) {
    values[k].first_plain = int(readers.size());
    for (int i = plain_begin[state]; i < int(plains.size()); ++i)
      if (plains[i].value == k) readers.push_back(i);
    values[k].last_plain = int(readers.size());
  }
  if (!backward()) return;
  Source s{};
  s.x = state_planes(state);
  s.tiling = strip_tiling(s.x.grid, kMostSourcePixels, 8);
  const int node = state - p.inputs;
  if (node >= 0) s.dout = user_planes(slice(p.dout, node), out_image(), plan.out);
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
  const auto take_plane = [&] { return static_cast<void*>(arena.take<char>(plane_size() * int64_t(element))); };
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
    h.in = h.second ? plan.own(v) : state_planes(e.source);
    h.taps = p.params[param], h.pointwise = p.params[param + 1];
    h.size = t.size, h.dilation = t.dilation, h.stride = part == 0 ? e.stride : 1;
    h.weight = weight_of(t), h.target = e.target;
    h.stats = static_cast<float*>(p.stats) + int64_t(t.norm + part) * 2 * C;
    h.shift = p.training ? static_cast<float*>(p.shift) + int64_t(index) * C : nullptr;
    h.gram = p.gram ? static_cast<float*>(p.gram) + int64_t(index) * C * C : nullptr;
    h.mean = arena.take<double>(C);
    h.weights = plan.type == DType::f32 ? nullptr : arena.take<float>(int64_t(C) * C);
    h.fold = arena.take<float>(plan.matrix_size());
    h.bias = p.training ? nullptr : arena.take<float>(plan.width);
    h.partial = p.training || backward() ? arena.take<float>(plan.groups * plan.partial_size()) : nullptr;
    h.done = count_up(kCountersOfSum);
    if (h.final && t.kept >= 0 && p.u && p.training)
      h.kept = static_cast<char*>(p.u) + size_t(kept) * plane_size() * element;
    if (!(backward() && h.kept)) h.u = arena.take<float>(plane_size());
    h.output = h.final || (backward() && holds_v) ? nullptr : v;
    if (backward()) {
      h.from_dy = arena.take<float>(plan.matrix_size()), h.from_u = arena.take<float>(plan.matrix_size());
      h.du_bias = arena.take<float>(plan.width), h.du = take_plane();
      h.coefficient = arena.take<double>(C), h.q = arena.take<double>(C);
      h.dv = h.final ? nullptr : take_plane();
      h.dy = h.final ? plan.own(node_values[e.target], DType::f32) : plan.own(h.dv);
      if (p.dparams) {
        h.dtaps = arena.take<float>(plan.tap_groups() * plan.taps_size(t.size * t.size));
        h.taps_done = count_up(1);
        h.dD = p.dparams[param], h.dW = p.dparams[param + 1];
      }
    }
    halves.push_back(h);
  }
  Candidate c;
  c.first_half = int(halves.size()) - count, c.last_half = int(halves.size()) - 1;
  return c;
}

// Gives a strided skip its matrices, which are laid out when the call begins and so outlive a level, and its buffers;
// dx has a plane for each part.
void Planner::add_matrices(Value& value, const EdgeTerm& t) {
  for (int part = 0; part < 2; ++part) {
    value.params[part] = p.params[t.param + part];
    value.dparams[part] = p.dparams ? p.dparams[t.param + part] : nullptr;
  }
  value.matrix = matrices, value.back = matrices + plan.matrix_size(), matrices += 2 * plan.matrix_size();
  if (!backward()) return;
  value.dx = arena.take<float>(2 * plane_size());
  value.partial = arena.take<float>(2 * plan.groups * plan.partial_size());
  value.reduce_done = count_up(2 * kCountersOfSum);
}

// Adds a pool, a skip or a strided skip. Pools of one kind and stride share a value, plain skips share the state; a
// sampled path shares neither, as its jobs are picked edge by edge. A skip reads no value where nothing is to be
// gathered: forward its statistics where its noise is relative to them, on the way back dL/dw.
Candidate Planner::add_plain(int i, const EdgeTerm& t, const Edge& e, int state) {
  const int C = plan.C;
  Plain n{};
  n.value = -1;
  n.strided = t.op == EdgeOp::reduce_skip;
  n.normed = t.op != EdgeOp::skip;
  n.noisy = t.skip >= 0 && is_drawn_on(p.form, t.op);
  n.weight = weight_of(t), n.skip = sampled() ? t.edge : t.skip, n.target = e.target;
  for (int k = 0; k < i; ++k)
    n.ordinal += p.terms[k].skip >= 0 && p.edges[p.terms[k].edge].target == e.target;
  if (n.normed) n.stats = static_cast<float*>(p.stats) + int64_t(t.norm) * 2 * C, n.rstd = arena.take<float>(C);
  const bool gathers = backward() ? p.dw != nullptr : p.training && n.noisy && is_relative(p.form);
  const Made made = n.strided                    ? Made::strided
                    : t.op == EdgeOp::avg_pool   ? Made::average
                    : n.normed                   ? Made::maximum
                                                 : Made::state;
  if (n.normed || gathers) {
    n.value = value_of(state, made, e.stride);
    if (n.strided) add_matrices(values[n.value], t);
  }
  n.z = n.value < 0 ? state_planes(e.source) : values[n.value].z;
  if (backward()) {
    n.dy = plan.own(node_values[e.target], DType::f32);
    n.dots = arena.take<double>(int64_t(plan.groups) * 3 * C);
    n.dy_mean = arena.take<float>(C), n.rstd_q = arena.take<float>(C);
  }
  plains.push_back(n);
  return {-1, -1, int(plains.size()) - 1, n.value};
}

// Finds the value of this kind and stride, which is made if the state has none yet. Each strided skip has matrices of
// its own, and in a sampled path a value serves one edge.
int Planner::value_of(int state, Made made, int stride) {
  if (!sampled() && made != Made::strided)
    for (int k = value_begin[state]; k < int(values.size()); ++k)
      if (values[k].made == made && values[k].stride == stride) return k;
  Value value{};
  value.x = state_planes(state), value.made = made, value.stride = stride;
  value.z = made == Made::state ? value.x : plan.own(arena.take<float>(plane_size()), DType::f32);
  if (!backward() && p.training) value.parts = arena.take<double>(int64_t(plan.groups) * 3 * plan.C);
  if (backward() && made != Made::state) {
    value.dz = arena.take<float>(plane_size());
    value.winner = made == Made::maximum ? arena.take<float>(plane_size()) : nullptr;
  }
  value.done = count_up(1);
  values.push_back(value);
  return int(values.size()) - 1;
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
      s.sum_image = plan.type == DType::f32 ? out_image() : plan.image();
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
  plan.halves.all = pack(halves), plan.values.all = pack(values), plan.plains.all = pack(plains);
  plan.readers = pack(readers), plan.terms = pack(terms), plan.sums = pack(sums), plan.sources = pack(sources);
  picks.slots = pack(slots), picks.candidates = pack(candidates);
  tables = arena.take<char>(int64_t(image.size()));
  const auto move = [&](auto*& table) {
    table = reinterpret_cast<std::decay_t<decltype(table)>>(tables + reinterpret_cast<size_t>(table));
  };
  move(plan.halves.all), move(plan.values.all), move(plan.plains.all), move(plan.readers);
  move(plan.terms), move(plan.sums), move(plan.sources);
  move(picks.slots), move(picks.candidates);
  if (!sampled()) return;
  const int edges = p.edge_count;
  picks.choice = p.choice, picks.edges = edges, picks.count = p.candidates;
  plan.halves.picked = picks.halves = arena.take<int>(2 * edges);
  plan.values.picked = picks.values = arena.take<int>(edges);
  plan.plains.picked = picks.plains = arena.take<int>(edges);
}

}  // namespace fastnas::cuda
