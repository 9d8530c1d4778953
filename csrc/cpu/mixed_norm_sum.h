// Entry points of mixed_norm_sum, one namespace per instruction set; isa.h picks at run time.
#pragma once

#include "../params.h"

#define FASTNAS_DECLARE_MIXED_NORM_SUM(isa)                  \
  namespace fastnas::isa {                                   \
  int64_t mixed_norm_sum_parts(const MixedNormSumParams& p); \
  void mixed_norm_sum_fwd(const MixedNormSumParams& p);      \
  void mixed_norm_sum_bwd(const MixedNormSumParams& p);      \
  }

FASTNAS_DECLARE_MIXED_NORM_SUM(baseline)
#if defined(__x86_64__)
FASTNAS_DECLARE_MIXED_NORM_SUM(avx2)
FASTNAS_DECLARE_MIXED_NORM_SUM(avx512)
#endif
