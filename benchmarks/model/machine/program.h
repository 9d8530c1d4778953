// Reads a kernel's machine code (sm_90, as nvdisasm lists it) into instructions that warp.h can run.
//
// A line is: address, guard or "-", opcode, operands, TAB, 128 bits as two hexadecimal words, the low one first. Labels
// in operands are already addresses. What the listing rounds or leaves out is read from the bits: immediates of
// floating point, and what the compiler tells the scheduler (stall counts, scoreboards).
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace machine {

constexpr int kLanes = 32;
constexpr uint32_t kFull = 0xffffffffu;
constexpr int kNoScoreboard = 7;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Kind : uint8_t { none, reg, uniform_reg, predicate, uniform_predicate, literal, constant, memory, special,
                            barrier };

enum class Special : uint8_t { zero, tid_x, tid_y, tid_z, block_x, block_y, block_z, lane, lane_mask, lower_mask,
                               shared_window, local_window, predicates, unknown };
inline Special special_of(const std::string& name) {
  static const std::map<std::string, Special> names{
      {"SRZ", Special::zero}, {"SR_CgaCtaId", Special::zero}, {"SR_CLOCKLO", Special::zero},
      {"SR_TID.X", Special::tid_x}, {"SR_TID.Y", Special::tid_y}, {"SR_TID.Z", Special::tid_z},
      {"SR_CTAID.X", Special::block_x},
      {"SR_CTAID.Y", Special::block_y}, {"SR_CTAID.Z", Special::block_z}, {"SR_LANEID", Special::lane},
      {"SR_EQMASK", Special::lane_mask}, {"SR_LTMASK", Special::lower_mask}, {"SR_SWINHI", Special::shared_window},
      {"SR_LWINHI", Special::local_window}, {"PR", Special::predicates}};
  const auto found = names.find(name);
  return found == names.end() ? Special::unknown : found->second;
}

// Where a load or store goes; `generic`: the address tells.
enum class Space : uint8_t { generic, global, shared, local };

enum class Compare : uint8_t { none, lt, eq, le, gt, ne, ge, num, nan, f, t };

// Names what an instruction reads or writes. Of a constant `value` is the offset in `bank`, of memory that to the
// registers' sum.
struct Operand {
  Kind kind = Kind::none;
  bool negative = false, absolute = false, inverted = false;  // inverted: ~ of an integer, ! of a predicate
  bool wide = false;      // memory: the register is the first of two
  bool real = false;      // literal: floating point, its bits from the encoding
  int8_t half = -1;       // of packed halves: the one that both take; -1: each its own
  int index = 255;        // register; of memory and constants the one that is added, 255 is zero
  int uniform = 63;       // memory: the uniform register that is added, 63 is zero
  int bank = 0;
  int64_t value = 0;
  Special special = Special::zero;
};

struct Warp;
struct Instruction;
// Runs an instruction for the lanes of a mask. Control flow sets the lanes' program counters itself and returns true.
using Run = bool (*)(Warp&, const Instruction&, uint32_t lanes);

struct Instruction {
  uint32_t address = 0;
  std::string opcode, name;
  std::vector<std::string> suffixes;
  Operand guard;
  std::vector<Operand> operands;
  Run run = nullptr;
  bool jumps = false;     // may set program counters
  // What the scheduler is told: cycles to the next instruction; scoreboards that are waited for, and those that
  // are released when the result is written or the sources are read.
  int stall = 1, write_scoreboard = kNoScoreboard, read_scoreboard = kNoScoreboard;
  uint32_t waits = 0;
  int bytes = 4;          // that a lane moves
  Compare compare = Compare::none;
  bool unordered = false; // a comparison that holds where a number is NaN
  bool tensor = false, loads = false;  // HMMA; LDG and LD
  Space space = Space::generic;
  uint64_t traits = 0;    // bits of Trait
  bool has(uint64_t trait) const { return traits & trait; }
  const Operand& at(size_t i) const {
    if (i >= operands.size()) throw Error("too few operands: " + opcode);
    return operands[i];
  }
};

// Suffixes that change what an instruction does, as bits: looked up once, tested at every step.
enum Trait : uint64_t {
  kU32 = 1, kU64 = 2, kS64 = 4, kHi = 8, kWide = 16, kX = 32, kEx = 64, kSx32 = 128, kFtz = 256, kNan = 512,
  kLeft = 1024, kWrap = 2048, kF64 = 4096, kF16 = 8192, kBf16 = 16384, kTrunc = 32768, kSigned = 65536,
  kFloor = 1 << 17, kCeil = 1 << 18, kAnd = 1 << 19, kOr = 1 << 20, kXor = 1 << 21, kBypass = 1 << 22, kS32 = 1 << 23,
  kRz = 1 << 24, kRm = 1 << 25, kRp = 1 << 26, kSat = 1 << 27, kF32 = 1 << 28, kU16 = 1 << 29, kS16 = 1 << 30,
};
constexpr uint64_t kU8 = 1ull << 31, kS8 = 1ull << 32, kRelu = 1ull << 33, kPacked = 1ull << 34, kAdd = 1ull << 35,
                   kClear = 1ull << 36, kSh = 1ull << 37;

inline const std::map<std::string, uint64_t>& traits_of_suffixes() {
  static const std::map<std::string, uint64_t> traits{
      {"U32", kU32}, {"U64", kU64}, {"S64", kS64}, {"HI", kHi}, {"WIDE", kWide}, {"X", kX}, {"EX", kEx},
      {"SX32", kSx32}, {"FTZ", kFtz}, {"NAN", kNan}, {"L", kLeft}, {"W", kWrap}, {"F64", kF64}, {"F16", kF16},
      {"BF16", kBf16}, {"BF16_V2", kBf16}, {"TRUNC", kTrunc}, {"FLOOR", kFloor}, {"CEIL", kCeil}, {"AND", kAnd},
      {"OR", kOr}, {"XOR", kXor}, {"STRONG", kBypass}, {"BYPASS", kBypass}, {"S32", kS32}, {"RZ", kRz},
      {"RM", kRm}, {"RP", kRp}, {"SAT", kSat}, {"F32", kF32}, {"U16", kU16}, {"S16", kS16}, {"U8", kU8}, {"S8", kS8},
      {"RELU", kRelu},
      {"PACK_AB", kPacked}, {"ADD", kAdd}, {"CLEAR", kClear}, {"SH", kSh}};
  return traits;
}

inline bool starts(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

// Reads "R4", "-R4.reuse", "|R4|", "UR4", "P0", "0x10", "c[0x0][R2+0x4]", "[R2.64+UR4+0x10]" and the like.
class OperandReader {
 public:
  OperandReader(std::string text, uint64_t low) : text_(std::move(text)), low_(low) {}

  Operand read() {
    // A number's minus belongs to it.
    const std::string unsigned_text = text_.substr(std::min<size_t>(1, text_.size()));
    const bool number = isdigit(unsigned_text[0]) || unsigned_text == "INF" || unsigned_text == "QNAN";
    if (text_[0] == '-' && !number) of_.negative = true, text_.erase(0, 1);
    if (text_[0] == '~' || text_[0] == '!') of_.inverted = true, text_.erase(0, 1);
    if (text_[0] == '|') of_.absolute = true, text_ = text_.substr(1, text_.rfind('|') - 1);
    if (starts(text_, "c[")) read_constant();
    else if (starts(text_, "desc[")) text_ = text_.substr(text_.find("][") + 1), read_memory();
    else if (text_[0] == '[') read_memory();
    else read_plain();
    return of_;
  }

 private:
  static int number_after(const std::string& text, size_t prefix, const char* zero, int of_zero) {
    return text.compare(prefix, std::string::npos, zero) == 0 ? of_zero : std::atoi(text.c_str() + prefix);
  }

  void read_plain() {
    std::string name = text_;
    if (name.find(".H0_H0") != std::string::npos) of_.half = 0;
    if (name.find(".H1_H1") != std::string::npos) of_.half = 1;
    // What follows a register's point is a hint or a half; a number and SR_TID.X keep theirs.
    if (isalpha(name[0]) && !starts(name, "SR_")) name.erase(std::min(name.find('.'), name.size()));
    if (starts(name, "SR_") || name == "SRZ" || name == "PR") of_.kind = Kind::special, of_.special = special_of(name);
    else if (starts(name, "UR")) of_.kind = Kind::uniform_reg, of_.index = number_after(name, 2, "Z", 63);
    else if (starts(name, "UP")) of_.kind = Kind::uniform_predicate, of_.index = number_after(name, 2, "T", 7);
    else if (name[0] == 'R') of_.kind = Kind::reg, of_.index = number_after(name, 1, "Z", 255);
    else if (name[0] == 'P') of_.kind = Kind::predicate, of_.index = number_after(name, 1, "T", 7);
    else if (name[0] == 'B' && isdigit(name[1])) of_.kind = Kind::barrier, of_.index = number_after(name, 1, "", 0);
    else read_literal(name);
  }

  void read_literal(const std::string& name) {
    of_.kind = Kind::literal;
    const size_t digits = name[0] == '-' || name[0] == '+';
    if (name.compare(digits, 2, "0x") == 0) {
      const auto size = int64_t(std::strtoull(name.c_str() + digits, nullptr, 16));
      of_.value = name[0] == '-' ? -size : size;
    } else {
      of_.real = true;
      of_.value = int64_t(low_ >> 32);
    }
  }

  // Reads what stands between brackets: registers and an offset, added up.
  void read_sum(const std::string& sum) {
    std::istringstream parts(sum);
    for (std::string part; std::getline(parts, part, '+');) {
      if (part.empty()) continue;
      if (starts(part, "UR")) of_.uniform = number_after(part, 2, "Z", 63);
      else if (part[0] == 'R') {
        const size_t dot = part.find('.');
        of_.wide |= dot != std::string::npos && part.find(".64") != std::string::npos;
        of_.index = number_after(part.substr(0, dot), 1, "Z", 255);
      } else {
        const bool minus = part[0] == '-';
        const auto size = int64_t(std::strtoull(part.c_str() + minus, nullptr, 16));
        of_.value += minus ? -size : size;
      }
    }
  }

  void read_constant() {
    of_.kind = Kind::constant;
    const size_t middle = text_.find("][");
    of_.bank = int(std::strtol(text_.c_str() + 2, nullptr, 16));
    read_sum(text_.substr(middle + 2, text_.find(']', middle + 2) - middle - 2));
  }

  void read_memory() {
    of_.kind = Kind::memory;
    read_sum(text_.substr(1, text_.find(']') - 1));
  }

  std::string text_;
  uint64_t low_;
  Operand of_;
};

inline std::vector<std::string> split(const std::string& text, char by) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, by);) {
    const size_t first = part.find_first_not_of(' ');
    if (first != std::string::npos) parts.push_back(part.substr(first, part.find_last_not_of(' ') - first + 1));
  }
  return parts;
}

// Finds which comparison an opcode names: LT, or LTU, which also holds where a number is NaN.
inline void read_comparison(Instruction& of) {
  static const std::map<std::string, Compare> names{
      {"LT", Compare::lt}, {"EQ", Compare::eq}, {"LE", Compare::le}, {"GT", Compare::gt}, {"NE", Compare::ne},
      {"GE", Compare::ge}, {"NUM", Compare::num}, {"NAN", Compare::nan}, {"F", Compare::f}, {"T", Compare::t}};
  if (of.name.find("SETP") == std::string::npos) return;
  const std::string& name = of.suffixes.at(0);
  of.unordered = !names.count(name);
  of.compare = names.at(of.unordered ? name.substr(0, 2) : name);
}

inline Space space_of(const std::string& name) {
  if (name == "LDS" || name == "STS" || name == "ATOMS") return Space::shared;
  if (name == "LDL" || name == "STL") return Space::local;
  return name == "LD" || name == "ST" || name == "ATOM" ? Space::generic : Space::global;
}

inline int bytes_of(const Instruction& of) {
  for (const std::string& suffix : of.suffixes) {
    if (suffix == "128") return 16;
    if (suffix == "64") return 8;
    if (suffix == "U8" || suffix == "S8") return 1;
    if (suffix == "U16" || suffix == "S16") return 2;
  }
  return 4;
}

inline Instruction read_instruction(const std::string& line) {
  const std::vector<std::string> columns = split(line, '\t');
  if (columns.size() != 6) throw Error("no instruction: " + line);
  Instruction made;
  made.address = uint32_t(std::stoul(columns[0], nullptr, 16));
  const uint64_t low = std::stoull(columns[4], nullptr, 16), high = std::stoull(columns[5], nullptr, 16);
  if (columns[1] != "-") made.guard = OperandReader(columns[1], 0).read();
  made.opcode = columns[2];
  made.suffixes = split(made.opcode, '.');
  made.name = made.suffixes.front();
  made.suffixes.erase(made.suffixes.begin());
  for (const std::string& suffix : made.suffixes) {
    const auto found = traits_of_suffixes().find(suffix);
    if (found != traits_of_suffixes().end()) made.traits |= found->second;
  }
  if (columns[3] != "-")
    for (const std::string& text : split(columns[3], ',')) made.operands.push_back(OperandReader(text, low).read());
  made.bytes = bytes_of(made);
  made.space = space_of(made.name);
  made.tensor = made.name == "HMMA";
  made.loads = made.name == "LDG" || made.name == "LD";
  read_comparison(made);
  made.stall = std::max(1, int(high >> 41 & 15));
  made.write_scoreboard = int(high >> 46 & 7);
  made.read_scoreboard = int(high >> 49 & 7);
  made.waits = uint32_t(high >> 52 & 63);
  return made;
}

}  // namespace machine
