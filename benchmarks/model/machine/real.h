// Floating point in 16, 32 and 64 bits, conversions, the special functions and the tensor cores' product.
#pragma once

#include <cfenv>
#include <cmath>

#include "integer.h"

namespace machine {

// Sets the rounding of an instruction for as long as it lives. Only divisions and roots ask for another than nearest.
class Rounding {
 public:
  explicit Rounding(const Instruction& in) : changed_(in.traits & (kRz | kRm | kRp)) {
    if (changed_) std::fesetround(in.has(kRz) ? FE_TOWARDZERO : in.has(kRm) ? FE_DOWNWARD : FE_UPWARD);
  }
  ~Rounding() { if (changed_) std::fesetround(FE_TONEAREST); }

 private:
  bool changed_;
};

inline uint32_t finished(const Instruction& in, float v) {
  if (in.has(kSat)) v = v > 0 ? std::min(v, 1.0f) : 0.0f;
  return flushed(bits_of(v), in.has(kFtz));
}

// Computes f(a, b, c) of floats; what an operation does not take is 0.
template <class F> bool real(Warp& w, const Instruction& in, uint32_t lanes, F f) {
  Lanes v[3] = {};
  for (size_t i = 1; i < in.operands.size() && i <= 3; ++i) fetch_real(w, in.operands[i], v[i - 1], in.has(kFtz));
  const Rounding rounding(in);
  for (size_t i = 0; i < kLanes; ++i)
    v[0][i] = finished(in, f(as_float(v[0][i]), as_float(v[1][i]), as_float(v[2][i])));
  return write(w, in.at(0), lanes, v[0]), false;
}
inline bool run_ffma(Warp& w, const Instruction& in, uint32_t lanes) {
  return real(w, in, lanes, [](float a, float b, float c) { return std::fma(a, b, c); });
}
inline bool run_fadd(Warp& w, const Instruction& in, uint32_t lanes) {
  return real(w, in, lanes, [](float a, float b, float) { return a + b; });
}
inline bool run_fmul(Warp& w, const Instruction& in, uint32_t lanes) {
  return real(w, in, lanes, [](float a, float b, float) { return a * b; });
}

template <class F> bool real64(Warp& w, const Instruction& in, uint32_t lanes, F f) {
  Lanes64 v[3] = {};
  for (size_t i = 1; i < in.operands.size() && i <= 3; ++i) fetch_double(w, in.operands[i], v[i - 1]);
  const Rounding rounding(in);
  for (size_t i = 0; i < kLanes; ++i)
    v[0][i] = bits_of(f(as_double(v[0][i]), as_double(v[1][i]), as_double(v[2][i])));
  return write64(w, in.at(0), lanes, v[0]), false;
}
inline bool run_dfma(Warp& w, const Instruction& in, uint32_t lanes) {
  return real64(w, in, lanes, [](double a, double b, double c) { return std::fma(a, b, c); });
}
inline bool run_dadd(Warp& w, const Instruction& in, uint32_t lanes) {
  return real64(w, in, lanes, [](double a, double b, double) { return a + b; });
}
inline bool run_dmul(Warp& w, const Instruction& in, uint32_t lanes) {
  return real64(w, in, lanes, [](double a, double b, double) { return a * b; });
}

template <class T> bool compared_reals(Compare by, bool unordered, T a, T b) {
  const bool nan = std::isnan(a) || std::isnan(b);
  if (by == Compare::num) return !nan;
  if (by == Compare::nan) return nan;
  if (nan) return unordered || by == Compare::t;
  return compared(by, a, b);
}
inline bool run_fsetp(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, b;
  fetch_real(w, in.at(2), a, in.has(kFtz));
  fetch_real(w, in.at(3), b, in.has(kFtz));
  uint32_t holds = 0;
  for (size_t i = 0; i < kLanes; ++i)
    holds |= uint32_t(compared_reals(in.compare, in.unordered, as_float(a[i]), as_float(b[i]))) << i;
  write_comparison(w, in, lanes, holds, predicate(w, in.at(4)));
  return false;
}
inline bool run_dsetp(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes64 a, b;
  fetch_double(w, in.at(2), a);
  fetch_double(w, in.at(3), b);
  uint32_t holds = 0;
  for (size_t i = 0; i < kLanes; ++i)
    holds |= uint32_t(compared_reals(in.compare, in.unordered, as_double(a[i]), as_double(b[i]))) << i;
  write_comparison(w, in, lanes, holds, predicate(w, in.at(4)));
  return false;
}

inline bool run_fsel(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, b;
  fetch_real(w, in.at(1), a, in.has(kFtz));
  fetch_real(w, in.at(2), b, in.has(kFtz));
  const uint32_t mask = predicate(w, in.at(3));
  for (size_t i = 0; i < kLanes; ++i) a[i] = mask >> i & 1 ? a[i] : b[i];
  return write(w, in.at(0), lanes, a), false;
}

inline bool run_fmnmx(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint32_t smaller = predicate(w, in.at(3));
  Lanes v[2];
  for (size_t i = 0; i < 2; ++i) fetch_real(w, in.at(i + 1), v[i], in.has(kFtz));
  for (size_t i = 0; i < kLanes; ++i) {
    const float a = as_float(v[0][i]), b = as_float(v[1][i]);
    float best = smaller >> i & 1 ? std::fmin(a, b) : std::fmax(a, b);
    if (in.has(kNan) && (std::isnan(a) || std::isnan(b))) best = NAN;
    v[0][i] = bits_of(best);
  }
  return write(w, in.at(0), lanes, v[0]), false;
}

// Says which lanes may not divide by a reciprocal and two corrections, as an exponent is too large or too small.
inline bool run_fchk(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, b;
  fetch_real(w, in.at(1), a, false);
  fetch_real(w, in.at(2), b, false);
  uint32_t slow = 0;
  for (size_t i = 0; i < kLanes; ++i) {
    const int above = int(a[i] >> 23 & 255), below = int(b[i] >> 23 & 255), apart = above - below;
    const bool plain = above != 255 && below != 255 && below != 0 && below < 253 && apart < 126 && apart > -126 &&
                       (above > 23 || (a[i] & 0x7fffffffu) == 0);
    slow |= uint32_t(!plain) << i;
  }
  write_predicate(w, in.at(0), lanes, slow);
  return false;
}

inline bool run_mufu(Warp& w, const Instruction& in, uint32_t lanes) {
  const std::string& kind = in.suffixes.at(0);
  Lanes a;
  fetch_real(w, in.at(1), a, in.has(kFtz));
  for (auto& bits : a) {
    const double x = as_float(bits), high = as_double(uint64_t(bits) << 32);
    if (kind == "RCP64H") { bits = uint32_t(bits_of(1 / high) >> 32); continue; }
    if (kind == "RSQ64H") { bits = uint32_t(bits_of(1 / std::sqrt(high)) >> 32); continue; }
    const double y = kind == "RCP" ? 1 / x : kind == "RSQ" ? 1 / std::sqrt(x) : kind == "SQRT" ? std::sqrt(x)
                     : kind == "EX2" ? std::exp2(x) : kind == "LG2" ? std::log2(x)
                     : kind == "SIN" ? std::sin(x) : kind == "COS" ? std::cos(x)
                     : kind == "TANH" ? std::tanh(x) : throw Error("unknown function: " + in.opcode);
    bits = bits_of(float(y));
  }
  return write(w, in.at(0), lanes, a), false;
}

// --- conversions -------------------------------------------------------------------------------------------

inline float half_as_float(uint32_t bits, bool bf16) {
  if (bf16) return as_float(bits << 16);
  _Float16 v;
  const auto low = uint16_t(bits);
  memcpy(&v, &low, 2);
  return float(v);
}
inline uint32_t half_bits(float v, bool bf16) {
  if (!bf16) {
    const auto narrow = _Float16(v);
    uint16_t bits;
    memcpy(&bits, &narrow, 2);
    return bits;
  }
  const uint32_t bits = bits_of(v);
  if (std::isnan(v)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// From integers, of 32 or 64 bits, to floats or doubles; a rounding suffix is that of the conversion.
inline bool run_i2f(Warp& w, const Instruction& in, uint32_t lanes) {
  const Rounding rounding(in);
  const bool wide = in.has(kU64) || in.has(kS64);
  Lanes64 source, result;
  if (wide) {
    fetch64(w, in.at(1), source);
  } else {
    Lanes narrow;
    fetch(w, in.at(1), narrow);
    for (size_t i = 0; i < kLanes; ++i) {
      uint32_t v = narrow[i];
      if (in.has(kU8)) v &= 0xff;
      if (in.has(kU16)) v &= 0xffff;
      if (in.has(kS8)) v = uint32_t(int32_t(int8_t(v)));
      if (in.has(kS16)) v = uint32_t(int32_t(int16_t(v)));
      source[i] = in.has(kU32) || in.has(kU8) || in.has(kU16) ? v : uint64_t(int64_t(int32_t(v)));
    }
  }
  for (size_t i = 0; i < kLanes; ++i) {
    const uint64_t v = source[i];
    if (in.has(kF64)) result[i] = bits_of(in.has(kU64) ? double(v) : double(int64_t(v)));
    else result[i] = bits_of(in.has(kU64) ? float(v) : float(int64_t(v)));
  }
  if (in.has(kF64)) return write64(w, in.at(0), lanes, result), false;
  Lanes narrow;
  for (size_t i = 0; i < kLanes; ++i) narrow[i] = uint32_t(result[i]);
  return write(w, in.at(0), lanes, narrow), false;
}

// To integers, saturating; NaN is 0.
inline bool run_f2i(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes64 v{};
  if (in.has(kF64)) {
    fetch_double(w, in.at(1), v);
  } else {
    Lanes narrow;
    fetch_real(w, in.at(1), narrow, in.has(kFtz));
    for (size_t i = 0; i < kLanes; ++i) v[i] = bits_of(double(as_float(narrow[i])));
  }
  const bool wide = in.has(kU64) || in.has(kS64), is_unsigned = in.has(kU32) || in.has(kU64);
  const double low = is_unsigned ? 0 : wide ? -0x1p63 : -0x1p31;
  const double high = is_unsigned ? (wide ? 0x1p64 : 0x1p32) : wide ? 0x1p63 : 0x1p31;
  Lanes narrow;
  for (size_t i = 0; i < kLanes; ++i) {
    double x = as_double(v[i]);
    x = in.has(kTrunc)   ? std::trunc(x)
        : in.has(kFloor) ? std::floor(x)
        : in.has(kCeil)  ? std::ceil(x)
                         : std::nearbyint(x);
    if (std::isnan(x)) v[i] = 0;
    else if (x >= high) v[i] = is_unsigned ? (wide ? ~0ull : kFull) : wide ? ~0ull >> 1 : 0x7fffffffu;
    else if (x <= low) v[i] = is_unsigned ? 0 : wide ? 1ull << 63 : 1u << 31;
    else v[i] = is_unsigned ? uint64_t(x) : uint64_t(int64_t(x));
    narrow[i] = uint32_t(v[i]);
  }
  if (wide) return write64(w, in.at(0), lanes, v), false;
  return write(w, in.at(0), lanes, narrow), false;
}

// F2F.F64.F32 and back, and to a half in the low 16 bits.
inline bool run_f2f(Warp& w, const Instruction& in, uint32_t lanes) {
  const Rounding rounding(in);
  const std::string &to = in.suffixes.at(in.has(kFtz)), &from = in.suffixes.at(1 + in.has(kFtz));
  Lanes64 v;
  if (from == "F64") {
    fetch_double(w, in.at(1), v);
  } else {
    Lanes narrow;
    fetch_real(w, in.at(1), narrow, in.has(kFtz));
    for (size_t i = 0; i < kLanes; ++i)
      v[i] = bits_of(double(from == "F32" ? as_float(narrow[i]) : half_as_float(narrow[i], from == "BF16")));
  }
  if (to == "F64") return write64(w, in.at(0), lanes, v), false;
  Lanes narrow;
  for (size_t i = 0; i < kLanes; ++i) {
    const auto x = float(as_double(v[i]));
    narrow[i] = to == "F32" ? finished(in, x) : half_bits(x, to == "BF16");
  }
  return write(w, in.at(0), lanes, narrow), false;
}

// Packs two floats into halves; the first operand is the upper one.
inline bool run_f2fp(Warp& w, const Instruction& in, uint32_t lanes) {
  Lanes a, b;
  fetch_real(w, in.at(1), a, false);
  fetch_real(w, in.at(2), b, false);
  for (size_t i = 0; i < kLanes; ++i) {
    float x = as_float(a[i]), y = as_float(b[i]);
    if (in.has(kRelu)) x = x < 0 ? 0 : x, y = y < 0 ? 0 : y;
    a[i] = half_bits(x, in.has(kBf16)) << 16 | half_bits(y, in.has(kBf16));
  }
  return write(w, in.at(0), lanes, a), false;
}

// Fetches both halves of packed numbers as floats.
inline void fetch_halves(Warp& w, const Operand& from, bool bf16, Lanes (&to)[2]) {
  Lanes bits;
  fetch_bits(w, from, 0, bits);
  for (size_t i = 0; i < kLanes; ++i)
    for (int half = 0; half < 2; ++half) {
      const int taken = from.half < 0 ? half : from.half;
      float v = half_as_float(bits[i] >> (16 * taken) & 0xffff, bf16);
      if (from.absolute) v = std::fabs(v);
      if (from.negative) v = -v;
      to[half][i] = bits_of(v);
    }
}
// HFMA2, HADD2, HMUL2: two halves at once. Literals stand as two operands whose bits are the encoding's.
inline bool run_half2(Warp& w, const Instruction& in, uint32_t lanes) {
  const bool bf16 = in.has(kBf16);
  Lanes v[3][2] = {};
  size_t count = 0;
  for (size_t i = 1; i < in.operands.size() && count < 3; ++i, ++count) {
    fetch_halves(w, in.operands[i], bf16, v[count]);
    if (in.operands[i].kind == Kind::literal) ++i;
  }
  Lanes made{};
  for (int half = 0; half < 2; ++half)
    for (size_t i = 0; i < kLanes; ++i) {
      const float a = as_float(v[0][half][i]), b = as_float(v[1][half][i]), c = as_float(v[2][half][i]);
      const float x = in.name == "HFMA2" ? std::fma(a, b, c) : in.name == "HADD2" ? a + b : a * b;
      if (in.name == "HADD2" && in.has(kF32)) made[i] = bits_of(x);  // of one half, widened
      else made[i] |= half_bits(x, bf16) << (16 * half);
    }
  return write(w, in.at(0), lanes, made), false;
}

// --- tensor cores ------------------------------------------------------------------------------------------

// D = A B + C of 16 x 8 sums. Lane 4 g + t has rows g and g + 8 of A, column g of B, columns 2 t and 2 t + 1 of C.
// 1688.TF32: a register is one number, at depth t or t + 4; of halves it is two, at depths 2 t and 2 t + 1 (+ 8).
inline bool run_hmma(Warp& w, const Instruction& in, uint32_t lanes) {
  if (lanes != kFull) throw Error("HMMA by part of a warp");
  const bool tf32 = in.opcode.find("TF32") != std::string::npos, bf16 = in.has(kBf16);
  const int depth = in.suffixes.at(0) == "16816" ? 16 : 8, per_register = tf32 ? 1 : 2;
  float a[16][16], b[16][8], sums[16][8];
  Lanes bits;
  const auto number = [&](uint32_t word, int part) {
    return tf32 ? as_float(word) : half_as_float(word >> (16 * part) & 0xffff, bf16);
  };
  for (int r = 0; r < (tf32 || depth == 16 ? 4 : 2); ++r) {
    fetch_bits(w, in.at(1), r, bits);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int part = 0; part < per_register; ++part)
        a[lane / 4 + 8 * (r % 2)][lane % 4 * per_register + part + 4 * per_register * (r / 2)] =
            number(bits[size_t(lane)], part);
  }
  for (int r = 0; r < (tf32 || depth == 16 ? 2 : 1); ++r) {
    fetch_bits(w, in.at(2), r, bits);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int part = 0; part < per_register; ++part)
        b[lane % 4 * per_register + part + 4 * per_register * r][lane / 4] = number(bits[size_t(lane)], part);
  }
  for (int r = 0; r < 4; ++r) {
    fetch_bits(w, in.at(3), r, bits);
    for (int lane = 0; lane < kLanes; ++lane)
      sums[lane / 4 + 8 * (r / 2)][lane % 4 * 2 + r % 2] = as_float(bits[size_t(lane)]);
  }
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j)
      for (int k = 0; k < depth; ++k) sums[i][j] += a[i][k] * b[k][j];
  for (int r = 0; r < 4; ++r) {
    for (int lane = 0; lane < kLanes; ++lane)
      bits[size_t(lane)] = bits_of(sums[lane / 4 + 8 * (r / 2)][lane % 4 * 2 + r % 2]);
    write(w, in.at(0), lanes, bits, r);
  }
  return false;
}

}  // namespace machine
