// What ops on block-sparse weights ask of the tensors that they are called with, on every device: kinds and sizes. What an index holds is
// proven elsewhere.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "block_index.h"
#include "checks.h"
#include "dtypes.h"
#include "layout.h"
#include "operands.h"
#include "tensors.h"

namespace bitmask {

// Sizes of a weight [rows, cols] and of its blocks.
struct BlockSizes {
  int64_t rows, cols, block_rows, block_cols;

  int64_t rows_of_blocks() const { return blocks_across(rows, block_rows); }
  int64_t cols_of_blocks() const { return blocks_across(cols, block_cols); }
};

constexpr const char* kOfValues = "the dtype of values";

inline int64_t width_of(int32_t dtype) { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)); }
inline int64_t rows_of(const Tensor& x) { return geometry(x.sizes()).rows; }

// Fails unless tensors of this dtype, that of `name`, can be multiplied.
inline void check_linear_dtype(const char* name, int32_t dtype) { by_linear_dtype(dtype, 0, 0, 0, 0, name); }

// The last size of what is multiplied; throws unless it has the dtype that is `expected`.
inline int64_t last_size(const char* name, const Tensor& tensor, const char* expected, int32_t dtype) {
  check_dtype(name, dtype_of(tensor), expected, dtype);
  if (tensor.dim() == 0) fail(name, ": got size [], expected at least one dimension");
  return tensor.size(tensor.dim() - 1);
}

// ------------------------------------------------------------------------------------------------------------- the index

// The parts of an index of blocks, contiguous.
struct BlockParts {
  BlockFields fields;
  Tensor starts, positions;     // [lines + 1], [blocks]
  std::optional<Tensor> order;  // [blocks]
  int64_t lines;
  int64_t limit;  // of positions

  int64_t blocks() const { return positions.numel(); }
};

inline Tensor entries_of(const char* name, const Tensor& part) {
  check_dtype(name, dtype_of(part), "torch.int64", aoti_torch_dtype_int64());
  return contiguous(name, part);
}
inline const int64_t* data_of(const Tensor& entries) { return static_cast<const int64_t*>(entries.const_data_ptr()); }

// The parts of an index of so many blocks.
inline BlockParts parts_of(const BlockFields& fields, const Tensor& starts, int64_t lines, const Tensor& positions, int64_t blocks,
                           int64_t limit) {
  check_starts_size(fields.starts, starts.sizes(), lines);
  check_entries_size(fields.positions, positions.sizes(), blocks);
  return {fields, entries_of(fields.starts, starts), entries_of(fields.positions, positions), std::nullopt, lines, limit};
}

inline BlockParts parts_by_row(const BlockSizes& sizes, const Tensor& crow_indices, const Tensor& col_indices, int64_t blocks) {
  return parts_of(kByRow, crow_indices, sizes.rows_of_blocks(), col_indices, blocks, sizes.cols_of_blocks());
}

inline BlockParts parts_by_column(const BlockSizes& sizes, const Tensor& ccol_indices, const Tensor& row_indices, const Tensor& order,
                                  int64_t blocks) {
  BlockParts parts = parts_of(kByColumn, ccol_indices, sizes.cols_of_blocks(), row_indices, blocks, sizes.rows_of_blocks());
  check_entries_size("order", order.sizes(), blocks);
  parts.order = entries_of("order", order);
  return parts;
}

// The index that bsr_transpose transposes.
inline BlockParts parts_to_transpose(const Tensor& crow_indices, const Tensor& col_indices, int64_t cols_of_blocks) {
  check_feature_count("cols_of_blocks", cols_of_blocks);
  check_vector("crow_indices", crow_indices.sizes(), 1);
  check_vector("col_indices", col_indices.sizes(), 0);
  return parts_of(kByRow, crow_indices, crow_indices.size(0) - 1, col_indices, col_indices.size(0), cols_of_blocks);
}

// ------------------------------------------------------------------------------------------------------------- products

// What a product is of, beside what is multiplied.
struct BlockOperands {
  int32_t dtype;
  BlockSizes sizes;
  BlockParts index;                      // by columns for the gradient of x
  std::optional<BlockParts> transposed;  // by columns, if bsr_linear is given it
};

// Those of y = x W^T + bias with `blocks` blocks of block_rows x block_cols.
inline BlockOperands linear_operands(const Tensor& x, int32_t dtype, int64_t blocks, int64_t block_rows, int64_t block_cols,
                                     const Tensor& crow_indices, const Tensor& col_indices, int64_t out_features,
                                     const std::optional<Tensor>& bias) {
  check_linear_dtype("values", dtype);
  const int64_t in_features = last_size("x", x, kOfValues, dtype);
  check_feature_count("out_features", out_features);
  const BlockSizes sizes{out_features, in_features, block_rows, block_cols};
  if (bias) check_dtype("bias", dtype_of(*bias), kOfValues, dtype);
  if (bias) check_bias_size(bias->sizes(), out_features);
  return {dtype, sizes, parts_by_row(sizes, crow_indices, col_indices, blocks), std::nullopt};
}

// The kept blocks of a weight whose blocks are 2:4, checked but for what the metadata hold: rows of blocks are rows of a 2:4 matrix.
inline TwoFourParts two_four_blocks_of(const Tensor& values, const Tensor& metadata) {
  check_linear_dtype("values", dtype_of(values));
  if (values.dim() != 3) fail("values: got size ", to_text(values.sizes()), ", expected [blocks, block rows, block columns / 2]");
  TwoFourParts parts = two_four_parts_of(values, metadata);
  check_block_shape("values", values.sizes(), parts.sizes[1], parts.sizes[2]);
  return parts;
}

// Adds the transposed index, all of which must be there, or nothing.
inline void add_transposed(BlockOperands& operands, const std::optional<Tensor>& ccol_indices, const std::optional<Tensor>& row_indices,
                           const std::optional<Tensor>& order) {
  const int given = int{ccol_indices.has_value()} + int{row_indices.has_value()} + int{order.has_value()};
  if (given % 3 != 0) fail("ccol_indices, row_indices, order: got ", given, " of them, expected all three or none");
  if (given == 0) return;
  operands.transposed = parts_by_column(operands.sizes, *ccol_indices, *row_indices, *order, operands.index.blocks());
}

// Those of the gradient of x, grad W.
inline BlockOperands backward_input_operands(const Tensor& grad, const Tensor& values, const Tensor& ccol_indices,
                                             const Tensor& row_indices, const Tensor& order, int64_t in_features) {
  const int32_t dtype = dtype_of(values);
  check_linear_dtype("values", dtype);
  const int64_t out_features = last_size("grad", grad, kOfValues, dtype);
  check_feature_count("in_features", in_features);
  check_block_values(values.sizes());
  const BlockSizes sizes{out_features, in_features, values.size(1), values.size(2)};
  return {dtype, sizes, parts_by_column(sizes, ccol_indices, row_indices, order, values.size(0)), std::nullopt};
}

// Fails unless x has the leading dimensions of grad.
inline void check_leading_sizes(const Tensor& grad, const Tensor& x) {
  std::vector<int64_t> leading(grad.sizes().begin(), grad.sizes().end()), got(x.sizes().begin(), x.sizes().end());
  leading.pop_back();
  got.pop_back();
  if (got != leading) fail("x: got size ", to_text(x.sizes()), ", expected the leading dimensions of grad, ", to_text(leading));
}

// Those of the gradient of values, the kept blocks of grad^T x.
template <typename Shape>
BlockOperands backward_values_operands(const Tensor& grad, const Tensor& x, const Tensor& crow_indices, const Tensor& col_indices,
                                       const Shape& block_shape) {
  const int32_t dtype = dtype_of(grad);
  check_linear_dtype("grad", dtype);
  const int64_t out_features = last_size("grad", grad, "the dtype of grad", dtype);
  const int64_t in_features = last_size("x", x, "the dtype of grad", dtype);
  check_leading_sizes(grad, x);
  if (block_shape.size() != 2) fail("block_shape: got ", to_text(block_shape), ", expected block rows and block columns");
  check_block_shape("block_shape", block_shape, block_shape[0], block_shape[1]);
  const BlockSizes sizes{out_features, in_features, block_shape[0], block_shape[1]};
  check_vector("col_indices", col_indices.sizes(), 0);
  return {dtype, sizes, parts_by_row(sizes, crow_indices, col_indices, col_indices.size(0)), std::nullopt};
}

// The sizes of the values of so many blocks, checked.
inline std::vector<int64_t> values_sizes(const BlockOperands& operands) {
  const std::vector<int64_t> sizes{operands.index.blocks(), operands.sizes.block_rows, operands.sizes.block_cols};
  geometry(sizes);
  return sizes;
}

}  // namespace bitmask
