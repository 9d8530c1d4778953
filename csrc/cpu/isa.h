// Names the instruction set that the CPU kernels run on: the best this machine has, or the one that use_isa()
// named. Sums that wait for memory stay below AVX-512, whose wider vectors gain nothing there (bind_cpu.cpp).
#pragma once

namespace fastnas {

enum class Isa { baseline, avx2, avx512 };

bool isa_supported(Isa isa);
Isa best_isa();
const char* isa_name(Isa isa);

// Picks the variant of `op` for the instruction set in use. Every kernel source is compiled once per instruction set
// into a namespace of that name, so the choice is one branch a call and nothing is dispatched inside of a kernel.
#if defined(__x86_64__)
#define FASTNAS_ISA_SELECT(isa, op) \
  ((isa) == Isa::avx512 ? avx512::op : (isa) == Isa::avx2 ? avx2::op : baseline::op)
#else
#define FASTNAS_ISA_SELECT(isa, op) (baseline::op)
#endif

}  // namespace fastnas
