// The scratch memory of linear_multiply, for whoever plans it; plain host code.
#pragma once

#include "kernels.h"

namespace bitmask::cuda {

int64_t linear_multiply_workspace_bytes(const LinearParams& params, const Device& device);

}  // namespace bitmask::cuda
