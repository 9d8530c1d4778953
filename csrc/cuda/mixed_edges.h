// mixed_edges on CUDA: the nodes of a cell from its states. See formulas/mixed_edges.h.
#pragma once

#include <cstddef>

#include "../params.h"

namespace fastnas::cuda {

// Bytes of device memory that a call needs for itself; backward where p.dout is given.
size_t mixed_edges_workspace(const MixedEdgesParams& p);
int mixed_edges_fwd(const MixedEdgesParams& p);
int mixed_edges_bwd(const MixedEdgesParams& p);

}  // namespace fastnas::cuda
