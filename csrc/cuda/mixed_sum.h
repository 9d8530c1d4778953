// Entry points of mixed_sum on CUDA: enqueue on params.stream, return a cudaError_t as int.
#pragma once

#include "../params.h"

namespace fastnas::cuda {

// params.std of relative noise from the noisy terms; nothing for another.
int mixed_sum_std(const MixedSumParams& params);
int mixed_sum_fwd(const MixedSumParams& params);
int mixed_sum_bwd(const MixedSumParams& params);

}  // namespace fastnas::cuda
