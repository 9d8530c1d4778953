// What the machine has to run kernels on.
#pragma once

#include <string>

namespace fastnas::cuda {

// Why kernels of this build cannot run here ("no driver", "no kernel image"), empty if they can.
std::string device_problem();
std::string error_text(int code);

}  // namespace fastnas::cuda
