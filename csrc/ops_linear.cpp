// The CPU implementation of linear: check, repack x, choose a kernel, split rows of the weight over threads. No arithmetic here.
#include <algorithm>
#include <optional>
#include <vector>

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

constexpr int64_t kLeastTileRows = 32;

// Rows of x that reuse a tile too little to pay for one that outgrows the first cache.
constexpr int64_t kFewRows = 32;

const LinearKernels& kernels_for(const Parts& weight) {
  return cpu::kernels().linear[by_linear_dtype(weight.element.dtype, cpu::kFloat32, cpu::kBfloat16, cpu::kFloat16, cpu::kFloat64)];
}

int64_t groups_of(int64_t cols) { return (cols + kGroup - 1) / kGroup; }

// Borders of ranges of rows that hold about equally many compressed bytes. Offsets that are out of order are refused by a kernel later.
std::vector<int64_t> split_by_bytes(const BitmaskMatrix& w, int64_t width, int64_t pieces) {
  const int64_t row_bytes = bitmask_bytes(w.cols) + static_cast<int64_t>(sizeof(int64_t));
  return split_by_cost(w.rows, pieces, [&](int64_t row) {
    return (row < w.rows ? std::clamp<int64_t>(w.row_offsets[row], 0, w.nnz) : w.nnz) * width + row * row_bytes;
  });
}

// Fails if a task found a faulty row: the first one, whatever the threads' order.
void check_faults(const std::vector<int64_t>& faults, const BitmaskMatrix& w) {
  const int64_t row = *std::min_element(faults.begin(), faults.end());
  if (row < w.rows) fail_row(w.bitmasks, w.row_offsets, row, {w.rows, w.cols}, w.nnz);
}

void stream(const LinearKernels& kernels, const BitmaskMatrix& w, const Tensor& x, int64_t m, const void* bias, void* y, int64_t width) {
  const Tensor lanes = empty_bytes(m * groups_of(w.cols) * kernels.group_bytes);
  kernels.pack_rows(const_bytes(x), m, w.cols, mutable_bytes(lanes));

  const int64_t bytes = w.nnz * width + w.rows * bitmask_bytes(w.cols);
  const std::vector<int64_t> borders = split_by_bytes(w, width, task_count(bytes));
  const int64_t count = static_cast<int64_t>(borders.size()) - 1;
  std::vector<int64_t> faults(static_cast<size_t>(count), w.rows);
  for_each_task(count, bytes / count, [&](int64_t index) {
    const size_t task = static_cast<size_t>(index);
    const int64_t row = kernels.stream(w, borders[task], borders[task + 1], const_bytes(lanes), m, bias, y);
    if (row < borders[task + 1]) faults[task] = row;
  });
  check_faults(faults, w);
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

void multiply_block(const LinearKernels& kernels, const BitmaskMatrix& w, const uint8_t* x, int64_t m, const void* bias, void* y,
                    int64_t width) {
  const Tensor panels = pack_panels(kernels.pack_panel, kernels.panel_rows, kernels.group_bytes, x, m, w.cols, width);
  const int64_t fair = (w.rows / (threads() * kTasksPerThread) + kLeastTileRows - 1) / kLeastTileRows * kLeastTileRows;
  const int64_t most = m <= kFewRows ? kLeastTileRows : kernels.tile_rows;
  const int64_t tile = std::max(std::min(fair, most), kLeastTileRows);
  const int64_t count = (w.rows + tile - 1) / tile;
  std::vector<int64_t> faults(static_cast<size_t>(count), w.rows);
  for_each_task(count, product_bytes(tile * w.cols, m, width), [&](int64_t index) {
    const int64_t begin = index * tile, end = std::min(begin + tile, w.rows);
    const int64_t row = kernels.multiply(w, begin, end, const_bytes(panels), m, bias, y, scratch(kernels.scratch_bytes));
    if (row < end) faults[static_cast<size_t>(index)] = row;
  });
  check_faults(faults, w);
}

void multiply(const LinearKernels& kernels, const BitmaskMatrix& w, const Tensor& x, int64_t m, const void* bias, void* y, int64_t width) {
  for_each_block(m, kernels.block_rows, kernels.panel_rows, [&](int64_t first, int64_t count) {
    multiply_block(kernels, w, const_bytes(x) + first * w.cols * width, count, bias, static_cast<uint8_t*>(y) + first * w.rows * width,
                   width);
  });
}

// y [m, cols] = g [m, rows] W, for as many rows of g as the kernel takes.
void multiply_transposed(const LinearKernels& kernels, const BitmaskMatrix& w, const uint8_t* g, int64_t m, uint8_t* y, int64_t width) {
  const Tensor panels = pack_panels(kernels.pack_gradient, kernels.panel_rows, kernels.gradient_group_bytes, g, m, w.rows, width);
  const int64_t fair = groups_of(w.cols) / (threads() * kTasksPerThread) * kGroup;
  const int64_t columns = std::max(fair, 2 * kGroup);
  const int64_t count = (w.cols + columns - 1) / columns;
  std::vector<int64_t> faults(static_cast<size_t>(count), w.rows);
  for_each_task(count, product_bytes(w.rows * columns, m, width), [&](int64_t index) {
    std::vector<uint8_t> readers(static_cast<size_t>(w.rows * kernels.reader_bytes));
    const int64_t begin = index * columns, end = std::min(begin + columns, w.cols);
    faults[static_cast<size_t>(index)] =
        kernels.multiply_transposed(w, begin, end, const_bytes(panels), m, y, readers.data(), scratch(kernels.gradient_scratch_bytes));
  });
  check_faults(faults, w);
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
  run(kernels, w, rows, m, bias_data, mutable_bytes(y), weight.element.width);
  return y;
}

Tensor linear_backward_input(const Tensor& grad, const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets,
                             int64_t in_features) {
  const Parts weight = weight_of(values, bitmasks, row_offsets, in_features);
  const BitmaskMatrix& w = weight.matrix;
  const std::vector<int64_t> sizes = backward_input_sizes(grad, weight);
  prove(weight.values, weight.bitmasks, weight.row_offsets, {w.rows, w.cols});
  const Tensor g = contiguous("grad", grad);
  const int64_t m = geometry(grad.sizes()).rows, width = weight.element.width;
  const Tensor y = empty(sizes, weight.element.dtype);
  if (w.cols == 0 || m == 0) return y;

  const LinearKernels& kernels = kernels_for(weight);
  for_each_block(m, kernels.block_rows, kernels.panel_rows, [&](int64_t first, int64_t count) {
    multiply_transposed(kernels, w, const_bytes(g) + first * w.rows * width, count, mutable_bytes(y) + first * w.cols * width, width);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward_input", TORCH_BOX(&linear_backward_input));
}

}  // namespace bitmask
