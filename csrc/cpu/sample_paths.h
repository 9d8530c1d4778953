// Entry points of sample_paths, one namespace per instruction set; isa.h picks at run time.
#pragma once

#include "../params.h"

#define FASTNAS_DECLARE_SAMPLE_PATHS(isa)                 \
  namespace fastnas::isa {                                \
  void sample_paths_fwd(const SamplePathsParams& params); \
  void sample_paths_bwd(const SamplePathsParams& params); \
  }

FASTNAS_DECLARE_SAMPLE_PATHS(baseline)
#if defined(__x86_64__)
FASTNAS_DECLARE_SAMPLE_PATHS(avx2)
FASTNAS_DECLARE_SAMPLE_PATHS(avx512)
#endif
