// The op compress, for ops that compress what they are given on the way to something else.
#pragma once

#include <tuple>

#include "tensors.h"

namespace bitmask {

// values [nnz], bitmasks [..., bitmask_bytes(cols)] and row_offsets [rows] of a tensor of any shape and strides.
std::tuple<Tensor, Tensor, Tensor> compress(const Tensor& dense, bool keep_negative_zero);

}  // namespace bitmask
