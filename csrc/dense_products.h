// Products on a GPU that are left to cuBLAS, the weight being expanded to dense memory: the same for every compressed layout.
//
// Weight: has `element` and `matrix`, with rows and cols. Proof: expand(begin, end, dense) proves rows of it, which come in order, and
// writes them; poison(result) makes a result NaN if they prove faulty.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "launch.h"
#include "tensors.h"

namespace bitmask {

// Expanded bytes that cuBLAS is given at a time, unless a single row has more: enough rows to fill a large GPU from a few hundred rows of x
// on, little beside the memory that compressing saves.
constexpr int64_t kPartBytes = 64 << 20;

// Rows of W in such a part are a multiple of this where so many fit, so that the tiles of cuBLAS are whole.
constexpr int64_t kPartRows = 128;

inline Tensor slice(Tensor tensor, int64_t dim, int64_t begin, int64_t count) { return torch::stable::narrow(tensor, dim, begin, count); }

// Rows of W that are expanded at a time, in about equal parts.
inline int64_t part_rows(int64_t rows, int64_t cols, int64_t width) {
  const int64_t fitting = std::max<int64_t>(kPartBytes / (std::max<int64_t>(cols, 1) * width), 1);
  const int64_t unit = fitting < kPartRows ? 1 : kPartRows;
  const int64_t most = fitting / unit * unit;
  const int64_t parts = (rows + most - 1) / most;
  const int64_t fair = (rows + parts - 1) / parts;
  return std::min((fair + unit - 1) / unit * unit, rows);
}

// y = x W^T + bias, W being expanded a part at a time.
template <typename Weight, typename Proof>
void linear_by_library(const Launch& on, const Weight& weight, const Proof& proof, const Tensor& x, const std::optional<Tensor>& bias,
                       const Tensor& y) {
  const int64_t all = weight.matrix.rows, cols = weight.matrix.cols, m = geometry(x.sizes()).rows;
  const int64_t step = part_rows(all, cols, weight.element.width);
  const Tensor part = on.empty(std::vector<int64_t>{step, cols}, weight.element.dtype);
  const Tensor rows = matrix(x, m, cols), result = matrix(y, m, all);
  for (int64_t begin = 0; begin < all; begin += step) {
    const int64_t count = std::min(step, all - begin);
    proof.expand(begin, begin + count, part.mutable_data_ptr());
    const std::optional<Tensor> offset = bias ? std::make_optional(slice(*bias, 0, begin, count)) : std::nullopt;
    call_out("aten::linear", rows, slice(part, 0, 0, count), offset, slice(result, 1, begin, count));
  }
  proof.poison(y);
}

// y = grad W. W is expanded as a whole: products with parts of it would have to be summed in the dtype of the result, or in a float32 copy.
template <typename Weight, typename Proof>
void backward_input_by_library(const Launch& on, const Weight& weight, const Proof& proof, const Tensor& grad, const Tensor& y) {
  const int64_t rows = weight.matrix.rows, cols = weight.matrix.cols, m = geometry(grad.sizes()).rows;
  const Tensor dense = on.empty(std::vector<int64_t>{rows, cols}, weight.element.dtype);
  proof.expand(0, rows, dense.mutable_data_ptr());
  call_out("aten::mm", matrix(grad, m, rows), dense, matrix(y, m, cols));
  proof.poison(y);
}

}  // namespace bitmask
