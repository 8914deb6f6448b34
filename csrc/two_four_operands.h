// What the 2:4 ops of every device ask of the tensors that they are called with.
#pragma once

#include "checks.h"
#include "dtypes.h"
#include "operands.h"
#include "tensors.h"

namespace bitmask {

// Throws unless a dense tensor is of whole groups of four, of a dtype that has a 2:4 layout; returns how its magnitudes compare.
inline Magnitude check_packable(const Tensor& tensor, const char* name = "dense") {
  const Magnitude magnitude = magnitude_of(name, dtype_of(tensor));
  check_groups_of_four(name, tensor.sizes());
  return magnitude;
}

// The same for one that is to be pruned in place, as rows or, transposable, as 4 x 4 elements.
inline Magnitude check_prunable(const Tensor& tensor, bool transposable) {
  const Magnitude magnitude = check_packable(tensor, "tensor");
  if (transposable) {
    by_linear_dtype(dtype_of(tensor), 0, 0, 0, 0, "tensor");
    if (tensor.dim() < 2 || tensor.size(tensor.dim() - 2) % 4 != 0) {
      fail("tensor: got size ", to_text(tensor.sizes()), ", expected [..., rows, cols], both multiples of 4 (transposable)");
    }
  }
  if (!tensor.is_contiguous()) fail("tensor: got strides ", to_text(tensor.strides()), ", expected contiguous memory to write to");
  check_storage("tensor", tensor);
  return magnitude;
}

// The parts of the weight [out_features, in_features] of a linear layer.
inline TwoFourParts two_four_weight_of(const Tensor& values, const Tensor& metadata) {
  by_linear_dtype(dtype_of(values), 0, 0, 0, 0);  // refuses dtypes that have no linear kernels
  if (values.dim() != 2) fail("values: got size ", to_text(values.sizes()), ", expected [out_features, in_features / 2]");
  return two_four_parts_of(values, metadata);
}

}  // namespace bitmask
