// Entry points of mixed_sum, one namespace per instruction set; isa.h picks at run time.
#pragma once

#include "../params.h"

#define FASTNAS_DECLARE_MIXED_SUM(isa)              \
  namespace fastnas::isa {                          \
  void mixed_sum_fwd(const MixedSumParams& params); \
  void mixed_sum_bwd(const MixedSumParams& params); \
  }

FASTNAS_DECLARE_MIXED_SUM(baseline)
#if defined(__x86_64__)
FASTNAS_DECLARE_MIXED_SUM(avx2)
FASTNAS_DECLARE_MIXED_SUM(avx512)
#endif
