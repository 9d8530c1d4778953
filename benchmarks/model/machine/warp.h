// Holds what a warp and its block are made of: registers, predicates, lanes with program counters of their own, the
// memory that they see, and a clock that stops where the compiler told the scheduler to wait.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <unordered_set>

#include "program.h"

namespace machine {

using Lanes = std::array<uint32_t, kLanes>;
using Lanes64 = std::array<uint64_t, kLanes>;

struct Dim { uint32_t x = 1, y = 1, z = 1; uint64_t count() const { return uint64_t(x) * y * z; } };

constexpr int64_t kLine = 128;
// Shared memory begins behind what the system keeps; generic addresses of it are found by their upper half.
constexpr uint32_t kSharedBase = 0x400;
constexpr uint64_t kSharedWindow = 0x7f01'0000'0000'0000ull, kLocalWindow = 0x7f02'0000'0000'0000ull;
constexpr uint32_t kConstantParams = 0x210;
constexpr uint32_t kLocalBytes = 1024;  // of a lane

// Cycles from an instruction to its result, where a scoreboard tells when it is there; of loads without those that a
// line beyond the first takes. Those of fixed latency are in the stall counts. Two memories: what a block has not
// read before comes from L2 in the first, from beyond in the second.
struct Latencies {
  int shared = 29, l1 = 35, l2 = 270, hbm = 520, special = 20, constant = 30, shuffle = 24, tensor = 33, atomic = 600,
      other = 14, barrier = 20;
};
constexpr int kClocks = 2;
using Clock = std::array<int64_t, kClocks>;

// A line of global memory as the launch sees it: a copy where it was written to, and which blocks have read it.
struct Line {
  std::array<unsigned char, kLine> bytes;
  bool copied = false;
  std::bitset<kLine> changed;  // of the bytes: only these go back, as others own the rest of the line
  uint32_t read_sectors = 0, written_sectors = 0;
  int64_t last_block = 0;  // that has it in L1
};

// What all blocks of a launch share. Writes go to copies, so the memory of the process stays as it is, and the blocks
// that are run see each other's.
struct Launch {
  Dim grid, block;
  std::vector<unsigned char> constants[5];
  uint32_t shared_bytes = 0;
  std::unordered_map<uint64_t, Line> lines;
  std::unordered_set<uint64_t> pages;  // that are mapped
  Latencies latencies;
  int64_t numbers = 0;                 // of blocks, and of what a block has in L1
  int64_t read_sectors = 0, written_sectors = 0;  // of 32 bytes, each counted once
  bool last = false;                   // the block that runs counts itself as the last one
};

struct Counters {
  int64_t cycles[kClocks];
  int64_t issued, shared_wavefronts, global_wavefronts, l1_misses, load_sectors, store_sectors;
  uint64_t atomic_address;
};

// Counts what became of one instruction: how often warps issued it, for how many lanes, cycles from the instruction
// before it to the one after it, and how many loads of global memory a warp had under way behind it at most.
struct Tally { uint64_t issued, lanes, cycles, in_flight; };

struct Block {
  Launch& launch;
  Dim index;
  int64_t number;
  std::vector<unsigned char> shared;
  Counters counters{};
};

struct Warp {
  Block& block;
  int number;
  uint32_t alive = 0, at_barrier = 0;
  std::array<uint32_t, kLanes> pc{};     // index of the next instruction
  std::array<Lanes, 256> registers{};
  std::array<uint32_t, 64> uniform{};
  std::array<uint32_t, 8> predicates{};  // a bit per lane; the last is true
  std::array<bool, 8> uniform_predicates{};
  std::array<Lanes, 17> meets{};         // by convergence barrier and lane: the lanes that meet there
  std::array<int, kLanes> waits_at{};    // the barrier that a waiting lane is at
  uint32_t waiting = 0;
  std::vector<unsigned char> local;      // of 32 lanes, one after the other
  Clock clock{};
  std::array<Clock, 8> ready{};          // scoreboards
  std::array<uint64_t, 8> loading{};     // loads of global memory that one of them stands for
  uint64_t copying = 0;                  // asynchronous copies that nobody has waited for
  Clock result_at{};                     // of the instruction that runs, if a scoreboard is told
  int counted = -1;                      // register with what an atomic returned, which nobody has looked at yet
  std::vector<Clock> copies;             // asynchronous ones of the group that is open, and of those before
  Clock open_copies{};

  explicit Warp(Block& block, int number) : block(block), number(number) {
    predicates[7] = kFull;
    uniform_predicates[7] = true;
    local.resize(size_t(kLanes) * kLocalBytes);
    registers[1].fill(kLocalBytes / 2);  // the stack grows down
  }
  uint32_t lane_thread(int lane) const { return uint32_t(number * kLanes + lane); }
};

// Calls f(lane) for the lanes of a mask.
template <class F> inline void each(uint32_t lanes, F f) {
  if (lanes == kFull) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (uint32_t left = lanes; left; left &= left - 1) f(__builtin_ctz(left));
  }
}

// Reads a constant; 0 outside of the bank, where the register of a lane that takes no part may point.
inline uint32_t word_of(const std::vector<unsigned char>& bytes, int64_t at) {
  uint32_t word = 0;
  if (at >= 0 && size_t(at) < bytes.size())
    memcpy(&word, bytes.data() + at, std::min<size_t>(4, bytes.size() - size_t(at)));
  return word;
}

// Fetches 32 bits per lane as they are stored, word `word` of what is wider.
inline void fetch_bits(Warp& w, const Operand& from, int word, Lanes& to) {
  switch (from.kind) {
    case Kind::reg:
      if (from.index == 255) to.fill(0);
      else to = w.registers[size_t(from.index + word)];
      return;
    case Kind::uniform_reg: to.fill(from.index == 63 ? 0 : w.uniform[size_t(from.index + word)]); return;
    case Kind::literal: to.fill(word ? uint32_t(from.value >> 63) : uint32_t(from.value)); return;
    case Kind::constant: {
      const auto& bank = w.block.launch.constants[from.bank];
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t added = from.index == 255 ? 0 : w.registers[size_t(from.index)][size_t(lane)];
        const uint32_t uniform = from.uniform == 63 ? 0 : w.uniform[size_t(from.uniform)];
        to[size_t(lane)] = word_of(bank, int64_t(int32_t(added + uniform)) + from.value + 4 * word);
      }
      return;
    }
    default: throw Error("no number to read");
  }
}

// Fetches integers: ~ and minus are applied.
inline void fetch(Warp& w, const Operand& from, Lanes& to) {
  fetch_bits(w, from, 0, to);
  if (from.inverted) for (auto& v : to) v = ~v;
  if (from.negative) for (auto& v : to) v = 0u - v;
}
inline void fetch64(Warp& w, const Operand& from, Lanes64& to) {
  Lanes low, high;
  fetch_bits(w, from, 0, low);
  fetch_bits(w, from, 1, high);
  for (size_t i = 0; i < kLanes; ++i) {
    to[i] = uint64_t(high[i]) << 32 | low[i];
    if (from.inverted) to[i] = ~to[i];
    if (from.negative) to[i] = 0 - to[i];
  }
}

inline float as_float(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
inline uint32_t bits_of(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }
inline double as_double(uint64_t bits) { double v; memcpy(&v, &bits, 8); return v; }
inline uint64_t bits_of(double v) { uint64_t bits; memcpy(&bits, &v, 8); return bits; }

inline uint32_t flushed(uint32_t bits, bool flush) {
  return flush && !(bits & 0x7f800000u) ? bits & 0x80000000u : bits;
}

// Fetches floats, with |x| and minus; denormal numbers are 0 where the instruction flushes them.
inline void fetch_real(Warp& w, const Operand& from, Lanes& to, bool flush) {
  fetch_bits(w, from, 0, to);
  for (auto& v : to) {
    v = flushed(v, flush);
    if (from.absolute) v &= 0x7fffffffu;
    if (from.negative) v ^= 0x80000000u;
  }
}
// Fetches doubles; of a literal the encoding has the upper half.
inline void fetch_double(Warp& w, const Operand& from, Lanes64& to) {
  if (from.kind == Kind::literal) {
    to.fill(uint64_t(uint32_t(from.value)) << 32);
  } else {
    Operand plain = from;
    plain.negative = plain.inverted = false;
    fetch64(w, plain, to);
  }
  for (auto& v : to) {
    if (from.absolute) v &= ~(1ull << 63);
    if (from.negative) v ^= 1ull << 63;
  }
}

// Returns a mask of the lanes whose predicate holds.
inline uint32_t predicate(const Warp& w, const Operand& of) {
  uint32_t mask = kFull;
  if (of.kind == Kind::predicate) mask = w.predicates[size_t(of.index)];
  else if (of.kind == Kind::uniform_predicate) mask = w.uniform_predicates[size_t(of.index)] ? kFull : 0;
  else if (of.kind != Kind::none) throw Error("no predicate");
  return of.inverted ? ~mask : mask;
}

inline void write(Warp& w, const Operand& to, uint32_t lanes, const Lanes& values, int word = 0) {
  if (to.kind == Kind::uniform_reg) {
    if (to.index != 63) w.uniform[size_t(to.index + word)] = values[size_t(__builtin_ctz(lanes))];
    return;
  }
  if (to.kind != Kind::reg) throw Error("no register to write");
  if (to.index == 255) return;
  Lanes& target = w.registers[size_t(to.index + word)];
  each(lanes, [&](int lane) { target[size_t(lane)] = values[size_t(lane)]; });
}
inline void write64(Warp& w, const Operand& to, uint32_t lanes, const Lanes64& values) {
  Lanes low, high;
  for (size_t i = 0; i < kLanes; ++i) low[i] = uint32_t(values[i]), high[i] = uint32_t(values[i] >> 32);
  write(w, to, lanes, low);
  if (to.index != 255) write(w, to, lanes, high, 1);
}
inline void write_predicate(Warp& w, const Operand& to, uint32_t lanes, uint32_t mask) {
  if (to.kind == Kind::none || to.index == 7) return;
  if (to.kind == Kind::uniform_predicate) {
    w.uniform_predicates[size_t(to.index)] = mask & lanes;
  } else {
    uint32_t& target = w.predicates[size_t(to.index)];
    target = (target & ~lanes) | (mask & lanes);
  }
}

// Reads the operands of an instruction in turn: results first (a register, then predicates), then what it takes.
class Cursor {
 public:
  explicit Cursor(const Instruction& of) : of_(of) {}
  const Operand& next() { return of_.at(at_++); }
  bool more() const { return at_ < of_.operands.size(); }
  size_t left() const { return of_.operands.size() - at_; }
  bool next_is_predicate() const {
    return more() && (of_.operands[at_].kind == Kind::predicate || of_.operands[at_].kind == Kind::uniform_predicate);
  }
  // Takes a predicate if the next operand is one.
  Operand maybe_predicate() { return next_is_predicate() ? next() : Operand{}; }

 private:
  const Instruction& of_;
  size_t at_ = 0;
};

}  // namespace machine
