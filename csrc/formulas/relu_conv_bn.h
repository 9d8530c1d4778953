// y = r (z - mean z),  z = W relu(x),  r = (var z + eps)^-1/2,  W a 1x1 convolution
// dz = r (dy - mean dy - y mean(dy y)),  dW = dz relu(x)^T,  dx = W^T dz where x > 0.
// Given statistics: dz = r dy
#pragma once

#include "mixed_edges.h"
