// Entry points of sample_paths on CUDA: enqueue on params.stream, return a cudaError_t as int.
#pragma once

#include "../params.h"

namespace fastnas::cuda {

int sample_paths_fwd(const SamplePathsParams& params);
int sample_paths_bwd(const SamplePathsParams& params);

}  // namespace fastnas::cuda
