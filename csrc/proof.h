// Proving the parts of a bitmask tensor, for ops that read only some of each row.
#pragma once

#include <vector>

#include "tensors.h"

namespace bitmask {

// Throws unless the parts have the dtypes and sizes that `shape` asks for and every row leads from its offset to the next.
void validate(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, const std::vector<int64_t>& shape);

}  // namespace bitmask
