// Branches, convergence, barriers, and what the lanes of a warp tell each other.
#pragma once

#include "memory.h"

namespace machine {

// The index of the instruction at an address of the program; set by machine.cpp when it is loaded.
using Places = std::unordered_map<uint32_t, uint32_t>;
inline thread_local const Places* places = nullptr;

inline uint32_t place_of(uint64_t address) {
  const auto found = places->find(uint32_t(address));
  if (found == places->end()) throw Error("branch to no instruction");
  return found->second;
}
inline void go(Warp& w, uint32_t lanes, uint64_t address) {
  const uint32_t place = place_of(address);
  each(lanes, [&](int lane) { w.pc[size_t(lane)] = place; });
}

inline bool run_bra(Warp& w, const Instruction& in, uint32_t lanes) {
  Cursor next(in);
  while (next.next_is_predicate()) lanes &= predicate(w, next.next());
  go(w, lanes, uint64_t(next.next().value));
  return true;
}
inline bool run_brx(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes to;
  fetch_bits(w, in.at(0), 0, to);
  each(lanes, [&](int lane) {
    w.pc[size_t(lane)] = place_of(uint32_t(int64_t(to[size_t(lane)]) + in.address + 16 + in.at(1).value));
  });
  return true;
}
inline bool run_call(Warp& w, const Instruction& in, uint32_t lanes) {
  go(w, lanes, uint64_t(in.at(0).value));
  return true;
}
inline bool run_ret(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes to;
  fetch_bits(w, in.at(0), 0, to);
  each(lanes, [&](int lane) { w.pc[size_t(lane)] = place_of(to[size_t(lane)]); });
  return true;
}

// --- convergence -------------------------------------------------------------------------------------------
// Each lane knows which lanes it meets at a barrier (BSSY names them); they wait in BSYNC until all have come, have
// left (BREAK) or have ended. WARPSYNC is one more such barrier, whose lanes stand in the instruction.

constexpr int kWarpSync = 16;

inline void release(Warp& w) {
  for (uint32_t left = w.waiting; left; left &= left - 1) {
    const auto lane = size_t(__builtin_ctz(left));
    const uint32_t met = w.meets[size_t(w.waits_at[lane])][lane] & w.alive;
    uint32_t come = 0;
    each(met & w.waiting, [&](int other) { come |= uint32_t(w.waits_at[size_t(other)] == w.waits_at[lane]) << other; });
    if (come == met) w.waiting &= ~met, left &= ~met | (1u << lane);
  }
}
inline void wait_at(Warp& w, int barrier, uint32_t lanes) {
  each(lanes, [&](int lane) { w.waits_at[size_t(lane)] = barrier; });
  w.waiting |= lanes;
  release(w);
}

inline bool run_bssy(Warp& w, const Instruction& in, uint32_t lanes) {
  each(lanes, [&](int lane) { w.meets[size_t(in.at(0).index)][size_t(lane)] = lanes; });
  return false;
}
inline bool run_bsync(Warp& w, const Instruction& in, uint32_t lanes) {
  wait_at(w, in.at(0).index, lanes);
  return true;
}
inline bool run_break(Warp& w, const Instruction& in, uint32_t lanes) {
  for (auto& met : w.meets[size_t(in.at(0).index)]) met &= ~lanes;
  release(w);
  return true;
}
// Saves and restores a barrier around a call.
inline bool run_bmov(Warp& w, const Instruction& in, uint32_t lanes) {
  if (in.at(0).kind == Kind::barrier) {
    Lanes from;
    fetch_bits(w, in.at(1), 0, from);
    each(lanes, [&](int lane) { w.meets[size_t(in.at(0).index)][size_t(lane)] = from[size_t(lane)]; });
    return false;
  }
  write(w, in.at(0), lanes, w.meets[size_t(in.at(1).index)]);
  return false;
}
inline bool run_warpsync(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes named;
  named.fill(kFull);
  if (!in.operands.empty() && in.at(0).kind != Kind::none) fetch_bits(w, in.at(0), 0, named);
  each(lanes, [&](int lane) { w.meets[kWarpSync][size_t(lane)] = named[size_t(lane)]; });
  wait_at(w, kWarpSync, lanes);
  return true;
}
// BRA.DIV leaves the way of a whole warp where lanes are missing. Here those that come first wait for the others.
inline bool run_bra_div(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes named;
  fetch_bits(w, in.at(0), 0, named);
  w.meets[kWarpSync] = named;
  return wait_at(w, kWarpSync, lanes), true;
}
inline bool run_exit(Warp& w, const Instruction&, uint32_t lanes) {
  w.alive &= ~lanes;
  release(w);
  return true;
}

inline bool run_bar(Warp& w, const Instruction& in, uint32_t lanes) {
  if (in.suffixes.at(0) != "SYNC" || in.operands.size() > 1 || in.at(0).value != 0)
    throw Error("barrier that is not modelled: " + in.opcode);
  w.at_barrier |= lanes;
  return true;
}

inline bool run_nothing(Warp&, const Instruction&, uint32_t) { return false; }
// A fence waits until what was written is seen.
inline bool run_membar(Warp& w, const Instruction&, uint32_t) {
  for (auto& clock : w.clock) clock += w.block.launch.latencies.l2;
  return false;
}
// Forgets what is in L1.
inline bool run_cctl(Warp& w, const Instruction& in, uint32_t) {
  if (in.suffixes.at(0) == "IVALL") w.block.number = ++w.block.launch.numbers;
  return false;
}
inline bool run_unsupported(Warp&, const Instruction& in, uint32_t) {
  throw Error("instruction that is not modelled: " + in.opcode);
}

// --- lanes and special registers -----------------------------------------------------------------------------

inline bool run_shfl(Warp& w, const Instruction& in, uint32_t lanes) {
  result_in(w, w.block.launch.latencies.shuffle);
  const std::string& kind = in.suffixes.at(0);
  Lanes v, by, limit, got{};
  fetch_bits(w, in.at(2), 0, v);
  fetch_bits(w, in.at(3), 0, by);
  fetch_bits(w, in.at(4), 0, limit);
  uint32_t valid = 0;
  each(lanes, [&](int lane) {
    const auto i = size_t(lane);
    const int segment = int(limit[i] >> 8 & 31), clamp = int(limit[i] & 31), b = int(by[i] & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = kind == "BFLY" ? lane ^ b : kind == "UP" ? lane - b : kind == "DOWN" ? lane + b : first | (b & ~segment);
    const bool fits = kind == "UP" ? from >= last : from <= last;
    if (!fits) from = lane;
    if (!(lanes >> from & 1)) throw Error("shuffle from a lane that takes no part");
    valid |= uint32_t(fits) << lane;
    got[i] = v[size_t(from)];
  });
  write_predicate(w, in.at(0), lanes, valid);
  return write(w, in.at(1), lanes, got), false;
}

inline bool run_vote(Warp& w, const Instruction& in, uint32_t lanes) {
  Cursor next(in);
  const bool has_register = !next.next_is_predicate();
  const Operand to = has_register ? next.next() : Operand{};
  const Operand& any = next.next();
  const uint32_t votes = predicate(w, next.next()) & lanes;
  const std::string& kind = in.suffixes.at(0);
  const bool result = kind == "ALL" ? votes == lanes : kind == "ANY" ? votes != 0 : votes == 0 || votes == lanes;
  Lanes ballot;
  ballot.fill(votes);
  if (has_register) write(w, to, lanes, ballot);
  write_predicate(w, any, lanes, result ? kFull : 0);
  return false;
}

inline bool run_redux(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes v, result;
  fetch_bits(w, in.at(1), 0, v);
  if (!in.has(kAnd | kOr | kXor) && in.opcode.find("SUM") == std::string::npos) return run_unsupported(w, in, lanes);
  uint32_t sum = in.has(kAnd) ? kFull : 0;
  each(lanes, [&](int lane) {
    const uint32_t x = v[size_t(lane)];
    sum = in.has(kAnd) ? sum & x : in.has(kOr) ? sum | x : in.has(kXor) ? sum ^ x : sum + x;
  });
  result.fill(sum);
  return write(w, in.at(0), lanes, result), false;
}

inline uint32_t special_register(const Warp& w, Special name, int lane) {
  const Block& b = w.block;
  const Dim& size = b.launch.block;
  const uint32_t thread = w.lane_thread(lane);
  switch (name) {
    case Special::zero: return 0;
    case Special::tid_x: return thread % size.x;
    case Special::tid_y: return thread / size.x % size.y;
    case Special::tid_z: return thread / (size.x * size.y);
    case Special::block_x: return b.index.x;
    case Special::block_y: return b.index.y;
    case Special::block_z: return b.index.z;
    case Special::lane: return uint32_t(lane);
    case Special::lane_mask: return 1u << lane;
    case Special::lower_mask: return (1u << lane) - 1;
    case Special::shared_window: return uint32_t(kSharedWindow >> 32);
    case Special::local_window: return uint32_t(kLocalWindow >> 32);
    default: throw Error("special register that is not modelled");
  }
}
// S2R, S2UR, CS2R; CS2R of SRZ clears a pair.
inline bool run_s2r(Warp& w, const Instruction& in, uint32_t lanes) {
  result_in(w, w.block.launch.latencies.special);
  Lanes v, none{};
  for (int lane = 0; lane < kLanes; ++lane) v[size_t(lane)] = special_register(w, in.at(1).special, lane);
  write(w, in.at(0), lanes, v);
  if (in.name == "CS2R" && in.bytes == 4 && in.suffixes.empty()) write(w, in.at(0), lanes, none, 1);
  return false;
}
inline bool run_r2ur(Warp& w, const Instruction& in, uint32_t lanes) { return run_mov(w, in, lanes); }

}  // namespace machine
