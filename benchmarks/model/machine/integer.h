// Integer arithmetic, logic, moves and comparisons. Those of the uniform datapath have the same names after a U.
#pragma once

#include "warp.h"

namespace machine {

inline int64_t widened(uint32_t v, bool is_unsigned) { return is_unsigned ? int64_t(v) : int64_t(int32_t(v)); }

// D = A B + C: low half, high half, or both.
inline bool run_imad(Warp& w, const Instruction& in, uint32_t lanes) {
  Cursor next(in);
  const Operand& to = next.next();
  const Operand carry_out = next.maybe_predicate();
  Lanes a, b;
  fetch(w, next.next(), a);
  fetch(w, next.next(), b);
  const Operand& added = next.next();
  const uint32_t carry = in.has(kX) ? predicate(w, next.next()) : 0;
  const bool is_unsigned = in.has(kU32);
  if (in.has(kWide) || in.has(kHi)) {
    Lanes64 c, sum;
    fetch64(w, added, c);
    uint32_t out = 0;
    for (size_t i = 0; i < kLanes; ++i) {
      const auto product = uint64_t(widened(a[i], is_unsigned) * widened(b[i], is_unsigned));
      sum[i] = product + c[i] + (carry >> i & 1);
      out |= uint32_t(sum[i] < product) << i;
    }
    write_predicate(w, carry_out, lanes, out);
    if (in.has(kWide)) return write64(w, to, lanes, sum), false;
    for (size_t i = 0; i < kLanes; ++i) a[i] = uint32_t(sum[i] >> 32);
    return write(w, to, lanes, a), false;
  }
  Lanes c;
  fetch(w, added, c);
  for (size_t i = 0; i < kLanes; ++i) a[i] = a[i] * b[i] + c[i] + (carry >> i & 1);
  return write(w, to, lanes, a), false;
}

// D = A + B + C, with carries out and in. A minus in front is ~v + 1, whose carry counts.
inline bool run_iadd3(Warp& w, const Instruction& in, uint32_t lanes) {
  Cursor next(in);
  const Operand& to = next.next();
  const Operand first_out = next.maybe_predicate(), second_out = next.maybe_predicate();
  Lanes64 sum{};
  for (int i = 0; i < 3; ++i) {
    const Operand& from = next.next();
    Lanes v;
    Operand plain = from;
    plain.negative = false;
    fetch(w, plain, v);
    for (size_t k = 0; k < kLanes; ++k) sum[k] += from.negative ? uint64_t(~v[k]) + 1 : uint64_t(v[k]);
  }
  while (in.has(kX) && next.more()) {
    const uint32_t carry = predicate(w, next.next());
    for (size_t k = 0; k < kLanes; ++k) sum[k] += carry >> k & 1;
  }
  Lanes low;
  uint32_t once = 0, twice = 0;
  for (size_t k = 0; k < kLanes; ++k) {
    low[k] = uint32_t(sum[k]);
    once |= uint32_t(sum[k] >> 32 >= 1) << k;
    twice |= uint32_t(sum[k] >> 32 >= 2) << k;
  }
  write_predicate(w, first_out, lanes, once);
  write_predicate(w, second_out, lanes, twice);
  return write(w, to, lanes, low), false;
}

inline bool run_viadd(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, b;
  fetch(w, in.at(1), a);
  fetch(w, in.at(2), b);
  for (size_t i = 0; i < kLanes; ++i) a[i] += b[i];
  return write(w, in.at(0), lanes, a), false;
}

inline bool run_mov(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a;
  fetch(w, in.at(1), a);
  return write(w, in.at(0), lanes, a), false;
}

inline bool run_iabs(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a;
  fetch(w, in.at(1), a);
  for (auto& v : a) v = int32_t(v) < 0 ? 0u - v : v;
  return write(w, in.at(0), lanes, a), false;
}

// D = (A << s) + B, or of the high half of {C, A} << s.
inline bool run_lea(Warp& w, const Instruction& in, uint32_t lanes) {
  Cursor next(in);
  const Operand& to = next.next();
  const Operand carry_out = next.maybe_predicate();
  Lanes a, b, high{}, shift;
  fetch(w, next.next(), a);
  fetch(w, next.next(), b);
  const bool extended = in.has(kHi) && !in.has(kSx32);
  if (extended) fetch(w, next.next(), high);
  fetch(w, next.next(), shift);
  const uint32_t carry = in.has(kX) ? predicate(w, next.next()) : 0;
  uint32_t out = 0;
  for (size_t i = 0; i < kLanes; ++i) {
    if (in.has(kSx32)) high[i] = uint32_t(int32_t(a[i]) >> 31);
    const uint64_t shifted = (uint64_t(high[i]) << 32 | a[i]) << (shift[i] & 31);
    const uint64_t sum = (in.has(kHi) ? shifted >> 32 : shifted & kFull) + b[i] + (carry >> i & 1);
    a[i] = uint32_t(sum);
    out |= uint32_t(sum >> 32 & 1) << i;
  }
  write_predicate(w, carry_out, lanes, out);
  return write(w, to, lanes, a), false;
}

// Shifts {high, low}: to the right it keeps the low word, or the high one; to the left alike.
inline bool run_shf(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes low, shift, high;
  fetch(w, in.at(1), low);
  fetch(w, in.at(2), shift);
  fetch(w, in.at(3), high);
  const bool wide = in.has(kU64) || in.has(kS64), is_signed = in.has(kS32) || in.has(kS64);
  const uint32_t most = wide ? 64 : 32;
  for (size_t i = 0; i < kLanes; ++i) {
    uint32_t s = in.has(kWrap) ? shift[i] & (most - 1) : std::min(shift[i], most);
    const uint64_t both = uint64_t(high[i]) << 32 | low[i];
    uint64_t moved;
    if (in.has(kLeft)) moved = s > 63 ? 0 : both << s;
    else if (is_signed) moved = uint64_t(int64_t(both) >> std::min(s, 63u));
    else moved = s > 63 ? 0 : both >> s;
    low[i] = uint32_t(in.has(kHi) ? moved >> 32 : moved);
  }
  return write(w, in.at(0), lanes, low), false;
}

inline uint32_t looked_up(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (uint32_t k = 0; k < 8; ++k)
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return result;
}

inline bool run_lop3(Warp& w, const Instruction& in, uint32_t lanes) {
  Cursor next(in);
  const Operand any = next.maybe_predicate();
  const Operand& to = next.next();
  Lanes a, b, c, table;
  fetch(w, next.next(), a);
  fetch(w, next.next(), b);
  fetch(w, next.next(), c);
  fetch(w, next.next(), table);
  uint32_t set = next.more() ? predicate(w, next.next()) : 0;
  for (size_t i = 0; i < kLanes; ++i) {
    a[i] = looked_up(a[i], b[i], c[i], table[0]);
    set |= uint32_t(a[i] != 0) << i;
  }
  write_predicate(w, any, lanes, set);
  return write(w, to, lanes, a), false;
}

inline bool run_plop3(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint32_t a = predicate(w, in.at(2)), b = predicate(w, in.at(3)), c = predicate(w, in.at(4));
  write_predicate(w, in.at(0), lanes, looked_up(a, b, c, uint32_t(in.at(5).value)));
  write_predicate(w, in.at(1), lanes, looked_up(a, b, c, uint32_t(in.at(6).value)));
  return false;
}

inline bool run_sel(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, b;
  fetch(w, in.at(1), a);
  fetch(w, in.at(2), b);
  const uint32_t mask = predicate(w, in.at(3));
  for (size_t i = 0; i < kLanes; ++i) a[i] = mask >> i & 1 ? a[i] : b[i];
  return write(w, in.at(0), lanes, a), false;
}

template <class T> bool compared(Compare by, T a, T b) {
  switch (by) {
    case Compare::lt: return a < b;
    case Compare::eq: return a == b;
    case Compare::le: return a <= b;
    case Compare::gt: return a > b;
    case Compare::ge: return a >= b;
    case Compare::ne: return a != b;
    case Compare::t: return true;
    default: return false;
  }
}
inline uint32_t combined(const Instruction& in, uint32_t a, uint32_t b) {
  return in.has(kOr) ? a | b : in.has(kXor) ? a ^ b : a & b;
}
// Writes a comparison's two results: it and the predicate that comes in, its opposite and that predicate.
inline void write_comparison(Warp& w, const Instruction& in, uint32_t lanes, uint32_t holds, uint32_t with) {
  write_predicate(w, in.at(0), lanes, combined(in, holds, with));
  write_predicate(w, in.at(1), lanes, combined(in, ~holds, with));
}

inline bool run_isetp(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, b;
  fetch(w, in.at(2), a);
  fetch(w, in.at(3), b);
  const Compare by = in.compare;
  const auto counts = [&](const Operand& of) { return of.kind == Kind::reg && of.index == w.counted; };
  if (w.counted >= 0 && (counts(in.at(2)) || counts(in.at(3)))) a = b, w.counted = -1;
  // Of 64-bit numbers this compares the upper halves: where they are equal the lower ones have decided.
  const uint32_t lower = in.has(kEx) ? predicate(w, in.at(5)) : 0;
  uint32_t holds = 0;
  for (size_t i = 0; i < kLanes; ++i) {
    bool held = in.has(kU32) ? compared(by, a[i], b[i]) : compared(by, int32_t(a[i]), int32_t(b[i]));
    if (in.has(kEx) && a[i] == b[i]) held = lower >> i & 1;
    holds |= uint32_t(held) << i;
  }
  write_comparison(w, in, lanes, holds, predicate(w, in.at(4)));
  return false;
}

// VIMNMX takes two, VIADDMNMX the smaller or larger of A + B and C.
inline bool run_imnmx(Warp& w, const Instruction& in, uint32_t lanes) {
  Cursor next(in);
  const Operand& to = next.next();
  Lanes a, b, c;
  fetch(w, next.next(), a);
  fetch(w, next.next(), b);
  if (in.name == "VIADDMNMX") {
    fetch(w, next.next(), c);
    for (size_t i = 0; i < kLanes; ++i) a[i] += b[i], b[i] = c[i];
  }
  const uint32_t smaller = predicate(w, next.next());
  for (size_t i = 0; i < kLanes; ++i) {
    const bool less = in.has(kU32) ? a[i] < b[i] : int32_t(a[i]) < int32_t(b[i]);
    a[i] = less == bool(smaller >> i & 1) ? a[i] : b[i];
    if (in.has(kRelu)) a[i] = int32_t(a[i]) < 0 ? 0 : a[i];
  }
  return write(w, to, lanes, a), false;
}

inline bool run_prmt(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, choice, b;
  fetch(w, in.at(1), a);
  fetch(w, in.at(2), choice);
  fetch(w, in.at(3), b);
  for (size_t i = 0; i < kLanes; ++i) {
    const uint64_t both = uint64_t(b[i]) << 32 | a[i];
    uint32_t made = 0;
    for (uint32_t k = 0; k < 4; ++k) {
      const uint32_t pick = choice[i] >> (4 * k) & 15;
      uint32_t byte = uint32_t(both >> (8 * (pick & 7)) & 255);
      if (pick & 8) byte = byte & 128 ? 255 : 0;
      made |= byte << (8 * k);
    }
    a[i] = made;
  }
  return write(w, in.at(0), lanes, a), false;
}

inline bool run_popc(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a;
  fetch(w, in.at(1), a);
  for (auto& v : a) v = uint32_t(__builtin_popcount(v));
  return write(w, in.at(0), lanes, a), false;
}

// The highest set bit; of SH, how far it is to the left end.
inline bool run_flo(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a;
  fetch(w, in.at(1), a);
  for (auto& v : a) {
    if (!in.has(kU32) && int32_t(v) < 0) v = ~v;
    v = v ? (in.has(kSh) ? uint32_t(__builtin_clz(v)) : 31u - uint32_t(__builtin_clz(v))) : kFull;
  }
  return write(w, in.at(0), lanes, a), false;
}

inline bool run_brev(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a;
  fetch(w, in.at(1), a);
  for (auto& v : a) {
    uint32_t turned = 0;
    for (int k = 0; k < 32; ++k) turned |= (v >> k & 1) << (31 - k);
    v = turned;
  }
  return write(w, in.at(0), lanes, a), false;
}

inline bool run_sgxt(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, bits;
  fetch(w, in.at(1), a);
  fetch(w, in.at(2), bits);
  for (size_t i = 0; i < kLanes; ++i) {
    const uint32_t n = std::min(bits[i], 32u);
    if (n == 0 || n == 32) a[i] = n ? a[i] : 0;
    else a[i] = in.has(kU32) ? a[i] & ((1u << n) - 1) : uint32_t(int32_t(a[i] << (32 - n)) >> (32 - n));
  }
  return write(w, in.at(0), lanes, a), false;
}

inline bool run_p2r(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, mask;
  fetch(w, in.at(2), a);
  fetch(w, in.at(3), mask);
  each(lanes, [&](int lane) {
    uint32_t bits = 0;
    for (size_t k = 0; k < 7; ++k) bits |= (w.predicates[k] >> lane & 1) << k;
    a[size_t(lane)] = (a[size_t(lane)] & ~mask[0]) | (bits & mask[0]);
  });
  return write(w, in.at(0), lanes, a), false;
}
inline bool run_r2p(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, mask;
  fetch(w, in.at(1), a);
  fetch(w, in.at(2), mask);
  int shift = 0;
  for (const std::string& suffix : in.suffixes) if (suffix[0] == 'B') shift = 8 * (suffix[1] - '0');
  for (int k = 0; k < 7; ++k) {
    if (!(mask[0] >> k & 1)) continue;
    uint32_t set = 0;
    for (size_t i = 0; i < kLanes; ++i) set |= (a[i] >> (shift + k) & 1) << i;
    w.predicates[size_t(k)] = (w.predicates[size_t(k)] & ~lanes) | (set & lanes);
  }
  return false;
}

}  // namespace machine
