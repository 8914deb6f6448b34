// Proving the parts of a bitmask tensor: for ops that cannot prove a row while they walk it.
#pragma once

#include <vector>

#include "layout.h"
#include "operands.h"
#include "parallel.h"
#include "tensors.h"

namespace bitmask {

// Parts on their way to being proven, and where the values of each task begin. Whoever writes to the parts meanwhile (another thread or
// process may hold them) gets wrong elements, never an access out of bounds: the starts are copied once and proven as copied, and the
// kernels keep within them.
struct Proof {
  Parts parts;
  Geometry g;
  Tasks tasks;
  std::vector<int64_t> starts;  // [tasks + 1], the last one being nnz

  int64_t nnz() const { return starts.back(); }
  const uint8_t* masks() const { return parts.matrix.bitmasks; }
  const int64_t* offsets() const { return parts.matrix.row_offsets; }
};

// Throws unless the parts have the dtypes and sizes that `shape` asks for and every row leads from its offset to the next.
Proof prove(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, const std::vector<int64_t>& shape);

}  // namespace bitmask
