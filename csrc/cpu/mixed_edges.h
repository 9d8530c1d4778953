// Entry points of mixed_edges, one namespace per instruction set; isa.h picks at run time.
#pragma once

#include <cstddef>

#include "../params.h"

#define FASTNAS_DECLARE_MIXED_EDGES(isa)                      \
  namespace fastnas::isa {                                    \
  size_t mixed_edges_workspace(const MixedEdgesParams& params); \
  void mixed_edges_fwd(const MixedEdgesParams& params);       \
  void mixed_edges_bwd(const MixedEdgesParams& params);       \
  }

FASTNAS_DECLARE_MIXED_EDGES(baseline)
#if defined(__x86_64__)
FASTNAS_DECLARE_MIXED_EDGES(avx2)
FASTNAS_DECLARE_MIXED_EDGES(avx512)
#endif
