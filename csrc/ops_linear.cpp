// The CPU implementation of linear: check, repack x, choose a kernel, split rows of the weight over threads. No arithmetic here.
#include <algorithm>
#include <optional>
#include <vector>

#include "bitmask_products.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "dtypes.h"
#include "layout.h"
#include "operands.h"
#include "parallel.h"
#include "products.h"
#include "proof.h"
#include "tensors.h"

namespace bitmask {
namespace {

using cpu::LinearKernels;

const LinearKernels& kernels_for(const Parts& weight) {
  return cpu::kernels().linear[by_linear_dtype(weight.element.dtype, cpu::kFloat32, cpu::kBfloat16, cpu::kFloat16, cpu::kFloat64)];
}

// Borders of ranges of rows that hold about equally many compressed bytes. Offsets that are out of order are refused by a kernel later.
std::vector<int64_t> split_by_bytes(const BitmaskMatrix& w, int64_t width, int64_t pieces) {
  const int64_t row_bytes = bitmask_bytes(w.cols) + static_cast<int64_t>(sizeof(int64_t));
  return split_by_cost(w.rows, pieces, [&](int64_t row) {
    return (row < w.rows ? std::clamp<int64_t>(w.row_offsets[row], 0, w.nnz) : w.nnz) * width + row * row_bytes;
  });
}

int64_t stream(const LinearKernels& kernels, const BitmaskMatrix& w, const uint8_t* x, int64_t m, const void* bias, uint8_t* y,
               int64_t width) {
  const Tensor lanes = empty_bytes(m * groups_of(w.cols) * kernels.group_bytes);
  kernels.pack_rows(x, m, w.cols, mutable_bytes(lanes));

  const int64_t bytes = w.nnz * width + w.rows * bitmask_bytes(w.cols);
  const std::vector<int64_t> borders = split_by_bytes(w, width, task_count(bytes));
  const int64_t count = static_cast<int64_t>(borders.size()) - 1;
  return first_fault(count, bytes / count, w.rows, [&](int64_t index) {
    const int64_t begin = borders[static_cast<size_t>(index)], end = borders[static_cast<size_t>(index) + 1];
    const int64_t row = kernels.stream(w, begin, end, const_bytes(lanes), m, bias, y);
    return row < end ? row : w.rows;
  });
}

// Rows [m, cols] repacked into panels by `pack`, in parallel where there is much of it.
Tensor pack_panels(void (*pack)(const void*, int64_t, int64_t, void*), int64_t panel_rows, int64_t group_bytes, const uint8_t* source,
                   int64_t m, int64_t cols, int64_t width) {
  const int64_t panel_bytes = panel_rows * groups_of(cols) * group_bytes;
  const int64_t count = (m + panel_rows - 1) / panel_rows;
  const Tensor panels = empty_bytes(count * panel_bytes);
  uint8_t* const packed = mutable_bytes(panels);
  const auto pack_one = [&](int64_t index) {
    const int64_t row = index * panel_rows;
    pack(source + row * cols * width, std::min(panel_rows, m - row), cols, packed + index * panel_bytes);
  };
  if (count * panel_bytes < kLeastPackBytes) {
    for (int64_t index = 0; index < count; ++index) pack_one(index);
  } else {
    for_each_task(count, 2 * panel_bytes, pack_one);
  }
  return panels;
}

int64_t multiply_block(const LinearKernels& kernels, const BitmaskMatrix& w, const uint8_t* x, int64_t m, const void* bias, uint8_t* y,
                       int64_t width) {
  const Tensor panels = pack_panels(kernels.pack_panel, kernels.panel_rows, kernels.group_bytes, x, m, w.cols, width);
  const int64_t tile = tile_rows_of(w.rows, m, kernels.tile_rows);
  const int64_t count = (w.rows + tile - 1) / tile;
  return first_fault(count, product_bytes(tile * w.cols, m, width), w.rows, [&](int64_t index) {
    const int64_t begin = index * tile, end = std::min(begin + tile, w.rows);
    const int64_t row = kernels.multiply(w, begin, end, const_bytes(panels), m, bias, y, scratch(kernels.scratch_bytes));
    return row < end ? row : w.rows;
  });
}

// y [m, cols] = g [m, rows] W, for as many rows of g as the kernel takes.
int64_t multiply_transposed_block(const LinearKernels& kernels, const BitmaskMatrix& w, const uint8_t* g, int64_t m, uint8_t* y,
                                  int64_t width) {
  const Tensor panels = pack_panels(kernels.pack_gradient, kernels.panel_rows, kernels.gradient_group_bytes, g, m, w.rows, width);
  const int64_t fair = groups_of(w.cols) / (threads() * kTasksPerThread) * kGroup;
  const int64_t columns = std::max(fair, 2 * kGroup);
  const int64_t count = (w.cols + columns - 1) / columns;
  return first_fault(count, product_bytes(w.rows * columns, m, width), w.rows, [&](int64_t index) {
    std::vector<uint8_t> readers(static_cast<size_t>(w.rows * kernels.reader_bytes));
    const int64_t begin = index * columns, end = std::min(begin + columns, w.cols);
    return kernels.multiply_transposed(w, begin, end, const_bytes(panels), m, y, readers.data(), scratch(kernels.gradient_scratch_bytes));
  });
}

// Calls block(first, count), which returns the first faulty row of `w`, for blocks of m rows until one has found one.
template <typename Block>
int64_t first_fault_of_blocks(const LinearKernels& kernels, const BitmaskMatrix& w, int64_t m, const Block& block) {
  int64_t fault = w.rows;
  for_each_block(m, kernels.block_rows, kernels.panel_rows, [&](int64_t first, int64_t count) {
    if (fault == w.rows) fault = block(first, count);
  });
  return fault;
}

// Fails if that is a row: of those that threads found, the first one.
void check_fault(int64_t row, const BitmaskMatrix& w) {
  if (row < w.rows) fail_row(w.bitmasks, w.row_offsets, row, {w.rows, w.cols}, w.nnz);
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, int64_t in_features,
              const std::optional<Tensor>& bias) {
  const Parts weight = weight_of(values, bitmasks, row_offsets, in_features);
  const BitmaskMatrix& w = weight.matrix;
  const Tensor y = empty(linear_sizes(x, weight, bias), weight.element.dtype);
  const Tensor rows = contiguous("x", x);
  const Tensor offset = bias ? contiguous("bias", *bias) : rows;
  const int64_t m = geometry(x.sizes()).rows;
  if (w.rows == 0 || m == 0) return y;
  if (w.row_offsets[0] != 0) fail_row(w.bitmasks, w.row_offsets, 0, {w.rows, w.cols}, w.nnz);
  const void* const bias_data = bias ? const_bytes(offset) : nullptr;
  const LinearKernels& kernels = kernels_for(weight);
  const auto run = m <= kernels.streaming_rows ? stream : multiply;
  check_fault(run(kernels, w, const_bytes(rows), m, bias_data, mutable_bytes(y), weight.element.width), w);
  return y;
}

Tensor linear_backward_input(const Tensor& grad, const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets,
                             int64_t in_features) {
  const Parts weight = weight_of(values, bitmasks, row_offsets, in_features);
  const BitmaskMatrix& w = weight.matrix;
  const std::vector<int64_t> sizes = backward_input_sizes(grad, weight);
  prove(weight.values, weight.bitmasks, weight.row_offsets, {w.rows, w.cols});
  const Tensor g = contiguous("grad", grad);
  const int64_t m = geometry(grad.sizes()).rows;
  const Tensor y = empty(sizes, weight.element.dtype);
  if (w.cols == 0 || m == 0) return y;

  check_fault(multiply_transposed(kernels_for(weight), w, const_bytes(g), m, mutable_bytes(y), weight.element.width), w);
  return y;
}

}  // namespace

int64_t multiply(const LinearKernels& kernels, const BitmaskMatrix& w, const uint8_t* x, int64_t m, const void* bias, uint8_t* y,
                 int64_t width) {
  return first_fault_of_blocks(kernels, w, m, [&](int64_t first, int64_t count) {
    return multiply_block(kernels, w, x + first * w.cols * width, count, bias, y + first * w.rows * width, width);
  });
}

int64_t multiply_transposed(const LinearKernels& kernels, const BitmaskMatrix& w, const uint8_t* g, int64_t m, uint8_t* y, int64_t width) {
  return first_fault_of_blocks(kernels, w, m, [&](int64_t first, int64_t count) {
    return multiply_transposed_block(kernels, w, g + first * w.rows * width, count, y + first * w.cols * width, width);
  });
}

STABLE_TORCH_LIBRARY_IMPL(bitmask, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward_input", TORCH_BOX(&linear_backward_input));
}

}  // namespace bitmask
