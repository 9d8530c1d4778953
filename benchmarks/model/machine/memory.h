// Global, shared and local memory: what is moved, how many cycles a warp waits for it, which lines and banks it takes.
#pragma once

#include <sys/mman.h>

#include "real.h"

namespace machine {

constexpr uint64_t kPage = 4096;

inline bool in_window(uint64_t address, uint64_t window) { return address >> 40 == window >> 40; }

inline Line& line_of(Launch& launch, uint64_t address) {
  const uint64_t page = address / kPage;
  if (!launch.pages.count(page)) {
    if (msync(reinterpret_cast<void*>(page * kPage), kPage, MS_ASYNC) != 0) {
      std::ostringstream text;
      text << "global memory: nothing at 0x" << std::hex << address;
      throw Error(text.str());
    }
    launch.pages.insert(page);
  }
  return launch.lines[address / kLine];
}

inline void read_line(const Line& line, uint64_t address, int bytes, unsigned char* to) {
  const auto* from = line.copied ? line.bytes.data() + address % kLine : reinterpret_cast<unsigned char*>(address);
  memcpy(to, from, size_t(bytes));
}
inline void write_line(Line& line, uint64_t address, int bytes, const unsigned char* from) {
  if (!line.copied) memcpy(line.bytes.data(), reinterpret_cast<void*>(address / kLine * kLine), kLine);
  line.copied = true;
  memcpy(line.bytes.data() + address % kLine, from, size_t(bytes));
  for (int k = 0; k < bytes; ++k) line.changed.set(address % kLine + size_t(k));
}

// Addresses of the lanes; those of shared and local memory are offsets of 32 bits. Of global memory: the lines that
// they lie in, each once, and which of them a lane's is.
struct Access {
  Lanes64 address{};
  uint32_t lanes;
  int bytes;
  int count = 0;
  std::array<Line*, kLanes> lines{};
  std::array<uint32_t, kLanes> sectors{};  // of a line, that the lanes reach
  std::array<uint8_t, kLanes> line_of_lane{};
  Line& line(int lane) const { return *lines[line_of_lane[size_t(lane)]]; }
};
inline Access access_of(Warp& w, const Instruction& in, const Operand& at, uint32_t lanes) {
  if (at.kind != Kind::memory) throw Error("no address: " + in.opcode);
  Access made;
  made.lanes = lanes;
  made.bytes = in.bytes;
  const bool wide = at.wide && at.index != 255;
  const auto ur = size_t(at.uniform);
  uint64_t uniform = ur == 63 ? 0 : w.uniform[ur];
  if (wide && ur != 63) uniform |= uint64_t(w.uniform[ur + 1]) << 32;
  each(lanes, [&](int lane) {
    const auto i = size_t(lane);
    uint64_t base = at.index == 255 ? 0 : w.registers[size_t(at.index)][i];
    if (wide) base |= uint64_t(w.registers[size_t(at.index + 1)][i]) << 32;
    made.address[i] = base + uniform + uint64_t(at.value);
    if (made.address[i] % uint64_t(in.bytes)) throw Error("misaligned address: " + in.opcode);
  });
  return made;
}

// Waits for a result of fixed latency, or one that takes so long in each of the two memories.
inline void result_in(Warp& w, int64_t first, int64_t second) {
  w.result_at = {w.clock[0] + first, w.clock[1] + second};
}
inline void result_in(Warp& w, int64_t cycles) { result_in(w, cycles, cycles); }

// Finds the lines that an access of global memory reaches.
inline void find_lines(Warp& w, Access& of) {
  std::array<uint64_t, kLanes> number;
  each(of.lanes, [&](int lane) {
    const uint64_t at = of.address[size_t(lane)], line = at / kLine;
    int k = of.count - 1;  // neighbours mostly share the line that was found last
    while (k >= 0 && number[size_t(k)] != line) --k;
    if (k < 0) {
      k = of.count++;
      number[size_t(k)] = line;
      of.lines[size_t(k)] = &line_of(w.block.launch, at);
    }
    of.sectors[size_t(k)] |= 1u << (at % kLine / 32);
    of.line_of_lane[size_t(lane)] = uint8_t(k);
  });
}

// Counts lines and sectors of global memory, and returns whether all of them are in L1.
inline bool touch(Warp& w, const Access& of, bool store, bool bypass) {
  Counters& count = w.block.counters;
  bool hit = true;
  for (size_t k = 0; k < size_t(of.count); ++k) {
    Line& line = *of.lines[k];
    const uint32_t sectors = of.sectors[k], known = line.read_sectors | line.written_sectors;
    const bool here = line.last_block == w.block.number && !bypass && !(sectors & ~known);
    if (store) {
      w.block.launch.written_sectors += __builtin_popcount(sectors & ~line.written_sectors);
      line.written_sectors |= sectors, count.store_sectors += __builtin_popcount(sectors);
    } else {
      w.block.launch.read_sectors += __builtin_popcount(sectors & ~line.read_sectors);
      line.read_sectors |= sectors;
      if (!here) count.load_sectors += __builtin_popcount(sectors), ++count.l1_misses, hit = false;
    }
    line.last_block = w.block.number;
  }
  count.global_wavefronts += std::max(of.count, (__builtin_popcount(of.lanes) * of.bytes + 127) / 128);
  return hit;
}

// Counts the passes that the banks of shared memory need: words of one bank come one after the other; of 8 or 16
// bytes a lane, half or a quarter of the warp takes part in each.
inline int64_t bank_passes(const Access& of) {
  const int at_once = of.bytes <= 4 ? kLanes : of.bytes == 8 ? 16 : 8;
  int64_t passes = 0;
  for (int first = 0; first < kLanes; first += at_once) {
    std::array<std::array<uint32_t, kLanes>, 32> words;
    std::array<int, 32> count{};
    for (int lane = first; lane < first + at_once; ++lane) {
      if (!(of.lanes >> lane & 1)) continue;
      for (int k = 0; k < std::max(1, of.bytes / 4); ++k) {
        const auto word = uint32_t(of.address[size_t(lane)] / 4) + uint32_t(k), bank = word % 32;
        int i = 0;
        while (i < count[bank] && words[bank][size_t(i)] != word) ++i;
        if (i == count[bank]) words[bank][size_t(count[bank]++)] = word;
      }
    }
    passes += *std::max_element(count.begin(), count.end());
  }
  return std::max<int64_t>(passes, 1);
}

inline Space space_of(const Instruction& in, const Access& at) {
  if (in.space != Space::generic) return in.space;
  const uint64_t first = at.address[size_t(__builtin_ctz(at.lanes))];
  if (in_window(first, kSharedWindow)) return Space::shared;
  return in_window(first, kLocalWindow) ? Space::local : Space::global;
}

inline unsigned char* inside(Warp& w, Space space, uint64_t address, int bytes, int lane) {
  auto& memory = space == Space::shared ? w.block.shared : w.local;
  uint64_t at = uint32_t(address);
  if (space == Space::local) {
    if (at + uint64_t(bytes) > kLocalBytes) throw Error("past the end of local memory");
    at += uint64_t(lane) * kLocalBytes;
  }
  if (at + uint64_t(bytes) > memory.size()) throw Error("past the end of shared memory");
  return memory.data() + at;
}

// Counts an access and finds when its result is there.
inline void time_access(Warp& w, const Instruction& in, const Access& at, Space space, bool store) {
  const Latencies& after = w.block.launch.latencies;
  if (space == Space::global) {
    const bool hit = touch(w, at, store, in.has(kBypass));
    const int64_t extra = std::max(at.count - 1, 0);
    if (store) result_in(w, after.other);
    else result_in(w, (hit ? after.l1 : after.l2) + extra, (hit ? after.l1 : after.hbm) + extra);
  } else {
    const int64_t passes = space == Space::shared ? bank_passes(at) : 1;
    if (space == Space::shared) w.block.counters.shared_wavefronts += passes;
    result_in(w, after.shared + passes - 1);
  }
}

inline bool run_load(Warp& w, const Instruction& in, uint32_t lanes) {
  Access at = access_of(w, in, in.at(1), lanes);
  const Space space = space_of(in, at);
  if (space == Space::global) find_lines(w, at);
  time_access(w, in, at, space, false);
  Lanes words[4] = {};
  each(lanes, [&](int lane) {
    uint32_t got[4] = {};
    const uint64_t address = at.address[size_t(lane)];
    if (space == Space::global) read_line(at.line(lane), address, in.bytes, reinterpret_cast<unsigned char*>(got));
    else memcpy(got, inside(w, space, address, in.bytes, lane), size_t(in.bytes));
    if (in.has(kS8)) got[0] = uint32_t(int32_t(int8_t(got[0])));
    if (in.has(kS16)) got[0] = uint32_t(int32_t(int16_t(got[0])));
    for (size_t k = 0; k < 4; ++k) words[k][size_t(lane)] = got[k];
  });
  for (int k = 0; k < std::max(1, in.bytes / 4); ++k) write(w, in.at(0), lanes, words[k], k);
  return false;
}

inline bool run_store(Warp& w, const Instruction& in, uint32_t lanes) {
  Access at = access_of(w, in, in.at(0), lanes);
  const Space space = space_of(in, at);
  if (space == Space::global) find_lines(w, at);
  time_access(w, in, at, space, true);
  Lanes words[4];
  for (int k = 0; k < std::max(1, in.bytes / 4); ++k) fetch_bits(w, in.at(1), k, words[k]);
  each(lanes, [&](int lane) {
    uint32_t given[4];
    for (size_t k = 0; k < 4; ++k) given[k] = words[k][size_t(lane)];
    const uint64_t address = at.address[size_t(lane)];
    const auto* bytes = reinterpret_cast<const unsigned char*>(given);
    if (space == Space::global) write_line(at.line(lane), address, in.bytes, bytes);
    else memcpy(inside(w, space, address, in.bytes, lane), bytes, size_t(in.bytes));
  });
  return false;
}

// LDC, ULDC: constants by an address that may be computed.
inline bool run_ldc(Warp& w, const Instruction& in, uint32_t lanes) {
  result_in(w, w.block.launch.latencies.constant);
  const int words = std::max(1, in.bytes / 4);
  Lanes v[4];  // all of them before the first is written: it may go to the register that has the address
  for (int k = 0; k < words; ++k) fetch_bits(w, in.at(1), k, v[k]);
  if (in.bytes < 4)
    for (auto& word : v[0]) word = in.has(kS8) ? uint32_t(int32_t(int8_t(word))) : word & ((1u << 8 * in.bytes) - 1);
  for (int k = 0; k < words; ++k) write(w, in.at(0), lanes, v[k], k);
  return false;
}

// LDGSTS: from global to shared memory without registers; with a predicate that fails zeros are written.
inline bool run_ldgsts(Warp& w, const Instruction& in, uint32_t lanes) {
  const Access to = access_of(w, in, in.at(0), lanes);
  Access from = access_of(w, in, in.at(1), lanes);
  const uint32_t copied = in.operands.size() > 2 ? predicate(w, in.at(2)) & lanes : lanes;
  from.lanes = copied;
  find_lines(w, from);
  if (copied) time_access(w, in, from, Space::global, false);
  else result_in(w, w.block.launch.latencies.shared);
  const int64_t passes = bank_passes(to);
  w.block.counters.shared_wavefronts += passes;
  ++w.copying;
  for (size_t k = 0; k < kClocks; ++k) w.open_copies[k] = std::max(w.open_copies[k], w.result_at[k]);
  result_in(w, w.block.launch.latencies.other);  // a scoreboard only tells when the addresses are read
  each(lanes, [&](int lane) {
    unsigned char bytes[16] = {};
    if (copied >> lane & 1) read_line(from.line(lane), from.address[size_t(lane)], in.bytes, bytes);
    memcpy(inside(w, Space::shared, to.address[size_t(lane)], in.bytes, lane), bytes, size_t(in.bytes));
  });
  return false;
}
inline bool run_ldgdepbar(Warp& w, const Instruction&, uint32_t) {
  w.copies.push_back(w.open_copies);
  w.open_copies = {};
  return false;
}
// Waits until at most so many groups of copies are under way.
inline bool run_depbar(Warp& w, const Instruction& in, uint32_t) {
  const size_t left = in.operands.size() > 1 ? size_t(in.at(1).value) : 0;
  for (size_t group = 0; group + left < w.copies.size(); ++group)
    for (size_t k = 0; k < kClocks; ++k) w.clock[k] = std::max(w.clock[k], w.copies[group][k]);
  if (left == 0) w.copying = 0;
  if (w.copies.size() > left) w.copies.erase(w.copies.begin(), w.copies.end() - int64_t(left));
  return false;
}

// Adds to memory, lane by lane, and returns what was there. For a block that is to find itself the last of those that
// count themselves, what it returns will be what it is compared with (run_isetp).
inline bool run_atomic(Warp& w, const Instruction& in, uint32_t lanes) {
  Cursor next(in);
  const bool returns = in.name != "RED" && in.name != "REDG";
  if (returns) next.maybe_predicate();
  const Operand to = returns ? next.next() : Operand{};
  Access at = access_of(w, in, next.next(), lanes);
  const Space space = space_of(in, at);
  if (space == Space::global) find_lines(w, at);
  if (in.bytes != 4 || !in.has(kAdd)) throw Error("atomic that is not modelled: " + in.opcode);
  Lanes added, before{};
  fetch_bits(w, next.next(), 0, added);
  each(lanes, [&](int lane) {
    const auto i = size_t(lane);
    unsigned char bytes[4];
    if (space == Space::global) read_line(at.line(lane), at.address[i], 4, bytes);
    else memcpy(bytes, inside(w, space, at.address[i], 4, lane), 4);
    memcpy(&before[i], bytes, 4);
    const uint32_t sum = in.has(kF32) ? bits_of(as_float(before[i]) + as_float(added[i])) : before[i] + added[i];
    memcpy(bytes, &sum, 4);
    if (space == Space::global) write_line(at.line(lane), at.address[i], 4, bytes);
    else memcpy(inside(w, space, at.address[i], 4, lane), bytes, 4);
  });
  if (space == Space::global) {
    w.block.counters.atomic_address = at.address[size_t(__builtin_ctz(lanes))];
    if (w.block.launch.last && returns) w.counted = to.index;
  }
  result_in(w, space == Space::global ? w.block.launch.latencies.atomic : w.block.launch.latencies.shared);
  if (returns) write(w, to, lanes, before);
  return false;
}

}  // namespace machine
