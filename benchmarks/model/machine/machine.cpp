// Runs the machine code of CUDA kernels (sm_90) on the memory of this process, and counts what it does: instructions,
// cycles of a warp's own path, lines of memory, passes through the banks of shared memory. It is no simulation of a
// whole GPU: a block runs alone, its warps one after the other between barriers, each on a clock of its own.
//
// What a launch writes goes to copies (memory.h), so blocks may be picked from a grid of thousands. Python loads
// programs and picks blocks (machine.py); the functions at the end are all that it sees.
#include <numeric>

#include "control.h"

namespace machine {
namespace {

struct Program {
  std::vector<Instruction> instructions;
  Places places;
};

const std::map<std::string, Run>& runs() {
  static const std::map<std::string, Run> table{
      {"IMAD", run_imad}, {"IADD3", run_iadd3}, {"VIADD", run_viadd}, {"MOV", run_mov}, {"IABS", run_iabs},
      {"LEA", run_lea}, {"SHF", run_shf}, {"LOP3", run_lop3}, {"PLOP3", run_plop3}, {"SEL", run_sel},
      {"ISETP", run_isetp}, {"VIMNMX", run_imnmx}, {"IMNMX", run_imnmx}, {"VIADDMNMX", run_imnmx}, {"PRMT", run_prmt},
      {"POPC", run_popc}, {"FLO", run_flo}, {"BREV", run_brev}, {"SGXT", run_sgxt}, {"P2R", run_p2r}, {"R2P", run_r2p},
      {"R2UR", run_r2ur}, {"FFMA", run_ffma}, {"FADD", run_fadd}, {"FMUL", run_fmul}, {"DFMA", run_dfma},
      {"DADD", run_dadd}, {"DMUL", run_dmul}, {"FSETP", run_fsetp}, {"DSETP", run_dsetp}, {"FSEL", run_fsel},
      {"FMNMX", run_fmnmx}, {"FCHK", run_fchk}, {"MUFU", run_mufu}, {"I2F", run_i2f}, {"I2FP", run_i2f},
      {"F2I", run_f2i}, {"F2F", run_f2f}, {"F2FP", run_f2fp}, {"HFMA2", run_half2}, {"HADD2", run_half2},
      {"HMUL2", run_half2}, {"HMMA", run_hmma}, {"LDG", run_load}, {"LD", run_load}, {"LDS", run_load},
      {"LDL", run_load}, {"STG", run_store}, {"ST", run_store}, {"STS", run_store}, {"STL", run_store},
      {"LDC", run_ldc}, {"LDGSTS", run_ldgsts}, {"LDGDEPBAR", run_ldgdepbar}, {"DEPBAR", run_depbar},
      {"ATOM", run_atomic}, {"ATOMG", run_atomic}, {"ATOMS", run_atomic}, {"RED", run_atomic}, {"REDG", run_atomic},
      {"SHFL", run_shfl}, {"VOTE", run_vote}, {"VOTEU", run_vote}, {"REDUX", run_redux}, {"S2R", run_s2r},
      {"S2UR", run_s2r}, {"CS2R", run_s2r}, {"BSSY", run_bssy}, {"BMOV", run_bmov}, {"NOP", run_nothing},
      {"YIELD", run_nothing}, {"CCTL", run_cctl}, {"ERRBAR", run_nothing}, {"CGAERRBAR", run_nothing},
      {"MEMBAR", run_membar}};
  return table;
}
const std::map<std::string, Run>& jumps() {
  static const std::map<std::string, Run> table{
      {"BRA", run_bra}, {"BRX", run_brx}, {"BRXU", run_brx}, {"CALL", run_call}, {"RET", run_ret}, {"BSYNC", run_bsync},
      {"BREAK", run_break}, {"WARPSYNC", run_warpsync}, {"EXIT", run_exit}, {"BAR", run_bar}};
  return table;
}

// Finds what runs an instruction; UIADD3 is IADD3 of the uniform datapath.
Run run_of(const Instruction& in) {
  const auto& ordinary = runs();
  if (in.opcode == "BRA.DIV") return run_bra_div;
  if (in.jumps) return jumps().at(in.name);
  if (const auto found = ordinary.find(in.name); found != ordinary.end()) return found->second;
  if (in.name[0] == 'U')
    if (const auto found = ordinary.find(in.name.substr(1)); found != ordinary.end()) return found->second;
  return run_unsupported;
}

// Issues an instruction: the warp waits for the scoreboards that it names.
void issue(Warp& w, const Instruction& in) {
  for (uint32_t left = in.waits; left; left &= left - 1) {
    const auto board = size_t(__builtin_ctz(left));
    for (size_t k = 0; k < kClocks; ++k) w.clock[k] = std::max(w.clock[k], w.ready[board][k]);
    w.loading[board] = 0;
  }
  ++w.block.counters.issued;
  result_in(w, in.tensor ? w.block.launch.latencies.tensor : w.block.launch.latencies.other);
}
void retire(Warp& w, const Instruction& in, Tally& tally) {
  if (in.write_scoreboard < 6) {
    if (in.loads) ++w.loading[size_t(in.write_scoreboard)];
    auto& board = w.ready[size_t(in.write_scoreboard)];
    for (size_t k = 0; k < kClocks; ++k) board[k] = std::max(board[k], w.result_at[k]);
  }
  if (in.read_scoreboard < 6) {
    auto& board = w.ready[size_t(in.read_scoreboard)];
    for (size_t k = 0; k < kClocks; ++k) board[k] = std::max(board[k], w.clock[k] + w.block.launch.latencies.other);
  }
  for (auto& clock : w.clock) clock += in.stall;
  tally.cycles += uint64_t(w.clock[0]);
  tally.in_flight = std::max(tally.in_flight, std::accumulate(w.loading.begin(), w.loading.end(), w.copying));
}

// Runs lanes that are at one place until they branch.
void run_group(Warp& w, const Program& program, uint32_t place, uint32_t lanes, Tally* tallies) {
  for (;; ++place) {
    const Instruction& in = program.instructions.at(place);
    const uint32_t guarded = lanes & predicate(w, in.guard);
    Tally& tally = tallies[place];
    tally.cycles -= uint64_t(w.clock[0]);
    issue(w, in);
    ++tally.issued;
    tally.lanes += uint64_t(__builtin_popcount(guarded));
    if (!guarded) {
      retire(w, in, tally);
      continue;
    }
    if (in.jumps) each(lanes, [&](int lane) { w.pc[size_t(lane)] = place + 1; });
    bool jumped;
    try {
      jumped = in.run(w, in, guarded);
    } catch (const Error& error) {
      std::ostringstream text;
      text << error.what() << " (at 0x" << std::hex << in.address << ")";
      throw Error(text.str());
    }
    retire(w, in, tally);
    if (jumped) return;
  }
}

// Runs a warp until its lanes have ended or wait at the block's barrier. Of lanes at several places those run that
// are farthest behind.
void run_warp(Warp& w, const Program& program, Tally* tallies) {
  while (const uint32_t runnable = w.alive & ~w.waiting & ~w.at_barrier) {
    uint32_t place = ~0u, lanes = 0;
    each(runnable, [&](int lane) {
      const uint32_t own = w.pc[size_t(lane)];
      if (own < place) place = own, lanes = 0;
      lanes |= uint32_t(own == place) << lane;
    });
    run_group(w, program, place, lanes, tallies);
  }
  if (w.alive & w.waiting) throw Error("lanes wait for others that never come");
}

void run_block(Block& block, const Program& program, Tally* tallies) {
  const auto threads = int(block.launch.block.count());
  std::vector<Warp> warps;
  warps.reserve(size_t(threads + kLanes - 1) / kLanes);
  for (int first = 0; first < threads; first += kLanes) {
    warps.emplace_back(block, first / kLanes);
    warps.back().alive = threads - first >= kLanes ? kFull : (1u << (threads - first)) - 1;
  }
  for (bool left = true; left;) {
    left = false;
    Clock met{};
    for (Warp& w : warps) {
      run_warp(w, program, tallies);
      for (size_t k = 0; k < kClocks; ++k) met[k] = std::max(met[k], w.clock[k]);
    }
    for (Warp& w : warps) {
      if (!w.alive && w.counted >= 0) throw Error("an atomic counts, and nothing is compared with its result");
      if (!w.alive) continue;
      left = true;
      w.at_barrier = 0;
      Tally& barrier = tallies[w.pc[size_t(__builtin_ctz(w.alive))] - 1];
      barrier.cycles += uint64_t(met[0] + block.launch.latencies.barrier - w.clock[0]);
      for (size_t k = 0; k < kClocks; ++k) w.clock[k] = met[k] + block.launch.latencies.barrier;
    }
    for (size_t k = 0; k < kClocks; ++k) block.counters.cycles[k] = std::max(block.counters.cycles[k], met[k]);
  }
}

thread_local std::string problem;

}  // namespace
}  // namespace machine

extern "C" {

using namespace machine;

// What went wrong in the last call that returned null or -1.
const char* machine_problem() { return problem.c_str(); }

// Reads a listing, a line for each instruction.
void* machine_load(const char* listing) try {
  auto program = std::make_unique<Program>();
  std::istringstream lines{std::string(listing)};
  for (std::string line; std::getline(lines, line);) {
    program->places[uint32_t(std::stoul(line, nullptr, 16))] = uint32_t(program->instructions.size());
    program->instructions.push_back(read_instruction(line));
    Instruction& last = program->instructions.back();
    last.jumps = jumps().count(last.name) > 0;
    last.run = run_of(last);
  }
  return program.release();
} catch (const std::exception& error) {
  problem = error.what();
  return nullptr;
}
void machine_unload(void* program) { delete static_cast<Program*>(program); }

// Begins a launch: grid and block (three numbers each), bytes of shared memory, the kernel's parameters, and its
// constants (bank 2: tables of branches).
void* machine_open(const uint32_t* sizes, uint32_t shared, const unsigned char* parameters, size_t parameter_bytes,
                   const unsigned char* tables, size_t table_bytes) {
  auto* launch = new Launch;
  launch->grid = {sizes[0], sizes[1], sizes[2]};
  launch->block = {sizes[3], sizes[4], sizes[5]};
  launch->shared_bytes = shared;
  auto& constants = launch->constants[0];
  constants.assign(kConstantParams + parameter_bytes, 0);
  const uint32_t geometry[] = {sizes[3], sizes[4], sizes[5], sizes[0], sizes[1], sizes[2]};
  memcpy(constants.data(), geometry, sizeof geometry);
  const uint32_t stack = kLocalBytes / 2;
  memcpy(constants.data() + 0x28, &stack, 4);
  if (parameter_bytes) memcpy(constants.data() + kConstantParams, parameters, parameter_bytes);
  launch->constants[2].assign(tables, tables + table_bytes);
  return launch;
}

// Runs one block; adds to the tally of each instruction. `last`: of those that count themselves it is the last.
int machine_block(void* opened, const void* loaded, const uint32_t* index, int last, Tally* tallies,
                  Counters* counters) try {
  auto& launch = *static_cast<Launch*>(opened);
  const auto& program = *static_cast<const Program*>(loaded);
  places = &program.places;
  launch.last = last != 0;
  Block block{launch, {index[0], index[1], index[2]}, ++launch.numbers, {}, {}};
  block.shared.assign(launch.shared_bytes, 0xff);
  run_block(block, program, tallies);
  *counters = block.counters;
  return 0;
} catch (const std::exception& error) {
  problem = error.what();
  return -1;
}

// Counts the sectors of 32 bytes that the blocks so far have read and written, each once.
void machine_sectors(const void* opened, int64_t* read, int64_t* written) {
  const auto* launch = static_cast<const Launch*>(opened);
  *read = launch->read_sectors;
  *written = launch->written_sectors;
}

// Ends a launch; with `keep` what it wrote is copied to the memory of the process.
void machine_close(void* opened, int keep) {
  const auto* launch = static_cast<Launch*>(opened);
  for (const auto& [line, held] : launch->lines)
    for (size_t k = 0; k < kLine; ++k)
      if (keep && held.changed[k]) reinterpret_cast<unsigned char*>(line * kLine)[k] = held.bytes[k];
  delete launch;
}
}
