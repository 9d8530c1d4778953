// What the machine has to run kernels on.
#pragma once

#include <string>

namespace fastnas::cuda {

// Why kernels of this build cannot run here ("no driver", "no kernel image"), empty if they can.
std::string device_problem();
std::string error_text(int code);

// Names the kernel whose launch last failed on the calling thread. With FASTNAS_CUDA_SYNC=1 also where it failed
// after its launch, on the device.
std::string failed_kernel_name();

}  // namespace fastnas::cuda
