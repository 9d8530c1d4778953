// Entry points of mixed_norm_sum on CUDA: enqueue on params.sum.stream, return a cudaError_t as int.
#pragma once

#include "../params.h"

namespace fastnas::cuda {

int64_t mixed_norm_sum_parts(const MixedNormSumParams& params);
int mixed_norm_sum_fwd(const MixedNormSumParams& params);
int mixed_norm_sum_bwd(const MixedNormSumParams& params);

}  // namespace fastnas::cuda
