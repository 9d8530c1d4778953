// Entry points of relu_conv_bn, one namespace per instruction set; isa.h picks at run time.
#pragma once

#include <cstddef>

#include "../params.h"

#define FASTNAS_DECLARE_RELU_CONV_BN(isa)                       \
  namespace fastnas::isa {                                      \
  size_t relu_conv_bn_workspace(const ReluConvBnParams& params); \
  void relu_conv_bn_fwd(const ReluConvBnParams& params);        \
  void relu_conv_bn_bwd(const ReluConvBnParams& params);        \
  }

FASTNAS_DECLARE_RELU_CONV_BN(baseline)
#if defined(__x86_64__)
FASTNAS_DECLARE_RELU_CONV_BN(avx2)
FASTNAS_DECLARE_RELU_CONV_BN(avx512)
#endif
