// The CPU implementations of the 2:4 ops: check, allocate, split rows over threads, call the kernels. No arithmetic here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "bitmask_products.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "dtypes.h"
#include "layout.h"
#include "operands.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"
#include "two_four_operands.h"

namespace bitmask {
namespace {

using cpu::LinearKernels;
using cpu::TwoFourCodecKernels;
using cpu::TwoFourLinearKernels;

// ------------------------------------------------------------------------------------------------------------- the codec

const TwoFourCodecKernels& codec_of(const Element& element) { return cpu::kernels().two_four_codec[__builtin_ctz(element.width)]; }

// Calls part(slice), which returns the first faulty row of the slice or their number, for all of a matrix of elements of `width` bytes, in
// parallel; returns the first faulty row of the matrix, or their number.
template <typename Part>
int64_t first_faulty_row(const Geometry& g, int64_t width, const Part& part) {
  if (g.cols == 0) return g.rows;  // rows of nothing may be very many
  const Tasks tasks(g);
  return first_fault(tasks.count(), tasks.bytes(width), g.rows, [&](int64_t index) {
    const Slice s = slice_of(tasks, index, g);
    const int64_t row = part(s);
    return row < s.task.rows ? s.task.row + row : g.rows;
  });
}

// Throws if that is a row of the metadata.
void check_fault(int64_t row, const TwoFourMatrix& w) {
  if (row < w.rows) fail_metadata(w.metadata + row * bitmask_bytes(w.cols), row, w.cols);
}

// Proves the metadata by itself.
void prove(const TwoFourMatrix& w) {
  const int64_t row = first_faulty_row({w.rows, w.cols}, 1, [&](const Slice& s) {
    return cpu::kernels().first_faulty_metadata(w.metadata + s.mask_byte, s.task.rows, s.task.cols);
  });
  check_fault(row, w);
}

std::tuple<Tensor, Tensor> pack_24(const Tensor& dense, bool prune, bool keep_negative_zero) {
  const Element element = element_of(dense, keep_negative_zero);
  const Magnitude magnitude = check_packable(dense);
  const Geometry g = geometry(dense.sizes());
  const Tensor source = contiguous("dense", dense);
  const Tensor values = empty(with_last_size(dense, g.cols / 2), element.dtype);
  const Tensor metadata = empty(bitmask_sizes(dense.sizes()), aoti_torch_dtype_uint8());
  const TwoFourCodecKernels& codec = codec_of(element);
  const uint8_t* const from = const_bytes(source);
  uint8_t *const to = mutable_bytes(values), *const bits = mutable_bytes(metadata);
  const int64_t row = first_faulty_row(g, element.width, [&](const Slice& s) {
    const uint8_t* const elements = from + s.element * element.width;
    uint8_t *const kept = to + s.element / 2 * element.width, *const mask = bits + s.mask_byte;
    if (!prune) return codec.pack(elements, s.task.rows, s.task.cols, element.zero_test, kept, mask);
    codec.pack_largest(elements, s.task.rows, s.task.cols, element.zero_test, magnitude, kept, mask);
    return s.task.rows;
  });
  if (row < g.rows) fail_dense(from + row * g.cols * element.width, row, g.cols, element.zero_test, element.width);
  return {values, metadata};
}

Tensor unpack_24(const Tensor& values, const Tensor& metadata) {
  const TwoFourParts parts = two_four_parts_of(values, metadata);
  const int64_t width = parts.element.width;
  const Tensor dense = empty(parts.sizes, parts.element.dtype);
  const TwoFourCodecKernels& codec = codec_of(parts.element);
  const uint8_t* const from = const_bytes(parts.values);
  uint8_t* const to = mutable_bytes(dense);
  const int64_t row = first_faulty_row(parts.geometry(), width, [&](const Slice& s) {
    return codec.unpack(from + s.element / 2 * width, parts.matrix.metadata + s.mask_byte, s.task.rows, s.task.cols,
                        to + s.element * width);
  });
  check_fault(row, parts.matrix);
  return dense;
}

// Of values only their sizes count.
void validate_24(const Tensor& values, const Tensor& metadata) {
  const Geometry g = geometry(two_four_sizes(values, metadata));
  const Tensor bits = contiguous("metadata", metadata);
  prove({nullptr, const_bytes(bits), g.rows, g.cols});
}

// ------------------------------------------------------------------------------------------------------------- pruning

int index_of(const Element& element) {
  return by_linear_dtype(element.dtype, int{cpu::kFloat32}, int{cpu::kBfloat16}, int{cpu::kFloat16}, int{cpu::kFloat64});
}

// Bytes that memory brings while one is pruned in rows and in columns.
constexpr int64_t kPruningCost = 8;

// In rows and in columns at once: a task is whole rows of 4 x 4 elements.
void prune_transposable(uint8_t* data, const Geometry& g, const Element& element) {
  const TwoFourLinearKernels& kernels = cpu::kernels().two_four_linear[index_of(element)];
  const int64_t row_bytes = g.cols * element.width, bytes = g.rows * row_bytes * kPruningCost, lines = g.rows / 4;
  if (bytes == 0) return;
  const int64_t count = std::clamp<int64_t>(task_count(bytes), 1, lines);
  for_each_task(count, bytes / count, [&](int64_t task) {
    const int64_t begin = lines * task / count * 4, end = lines * (task + 1) / count * 4;
    kernels.prune_transposable(data + begin * row_bytes, end - begin, g.cols);
  });
}

void prune_24(const Tensor& tensor, bool transposable) {
  const Element element = element_of(tensor, false);
  const Magnitude magnitude = check_prunable(tensor, transposable);
  const Geometry g = geometry(tensor.sizes());
  uint8_t* const data = mutable_bytes(tensor);
  if (transposable) return prune_transposable(data, g, element);
  first_faulty_row(g, element.width, [&](const Slice& s) {
    codec_of(element).prune(data + s.element * element.width, s.task.rows, s.task.cols, element.zero_test, magnitude);
    return s.task.rows;
  });
}

// ------------------------------------------------------------------------------------------------------------- products

// What multiplies a weight [rows, cols]: its own kernels, and those of a bitmask for what these leave out.
struct Weight : TwoFourParts {
  const TwoFourLinearKernels& kernels;
  const LinearKernels& bitmask_kernels;
};

Weight weight_of(const Tensor& values, const Tensor& metadata) {
  const TwoFourParts parts = two_four_weight_of(values, metadata);
  const cpu::Kernels& table = cpu::kernels();  // looked up once: both must be of one instruction set
  const int dtype = index_of(parts.element);
  return {parts, table.two_four_linear[dtype], table.linear[dtype]};
}

// The weight as a bitmask, once its metadata are proven: half of each row is stored.
class AsBitmask {
 public:
  explicit AsBitmask(const TwoFourMatrix& w) : row_offsets_(static_cast<size_t>(w.rows)) {
    for (int64_t row = 0; row < w.rows; ++row) row_offsets_[static_cast<size_t>(row)] = row * (w.cols / 2);
    matrix_ = {w.values, w.metadata, row_offsets_.data(), w.rows, w.cols, w.rows * (w.cols / 2)};
  }
  AsBitmask(const AsBitmask&) = delete;

  const BitmaskMatrix& matrix() const { return matrix_; }

 private:
  std::vector<int64_t> row_offsets_;
  BitmaskMatrix matrix_;
};

// y = x W^T + bias for few rows of x. Returns the first faulty row, as all of these, or w.rows.
int64_t stream(const Weight& weight, const uint8_t* x, int64_t m, const void* bias, uint8_t* y) {
  const TwoFourMatrix& w = weight.matrix;
  const LinearKernels& packing = weight.bitmask_kernels;
  const Tensor lanes = empty_bytes(m * groups_of(w.cols) * packing.group_bytes);
  packing.pack_rows(x, m, w.cols, mutable_bytes(lanes));
  const int64_t bytes = w.rows * (w.cols / 2 * weight.element.width + bitmask_bytes(w.cols));
  const int64_t count = std::clamp<int64_t>(task_count(bytes), 1, w.rows);
  return first_fault(count, bytes / count, w.rows, [&](int64_t task) {
    const int64_t begin = w.rows * task / count, end = w.rows * (task + 1) / count;
    const int64_t row = weight.kernels.stream(w, begin, end, const_bytes(lanes), m, bias, y);
    return row < end ? row : w.rows;
  });
}

// The same as the product with a bitmask, whose kernels prove less of a row.
int64_t multiply_as_bitmask(const Weight& weight, const uint8_t* x, int64_t m, const void* bias, uint8_t* y) {
  prove(weight.matrix);
  return multiply(weight.bitmask_kernels, AsBitmask(weight.matrix).matrix(), x, m, bias, y, weight.element.width);
}

// The same for as many rows of x as are repacked at a time.
int64_t multiply_block(const Weight& weight, const uint8_t* x, int64_t m, const void* bias, uint8_t* y) {
  const TwoFourMatrix& w = weight.matrix;
  const TwoFourLinearKernels& kernels = weight.kernels;
  std::atomic<bool> finite{true};
  const Tensor tiles = pack_tiles(kernels, m, w.cols, [&](int64_t first, int64_t rows, void* to) {
    if (!kernels.pack_tiles(x + first * w.cols * weight.element.width, rows, w.cols, to)) finite = false;
  });
  // A kernel that leaves dropped weights out would make 0 of 0 * inf.
  if (!finite) return multiply_as_bitmask(weight, x, m, bias, y);

  const int64_t tile = tile_rows_of(w.rows, m, weight.bitmask_kernels.tile_rows), count = blocks_across(w.rows, tile);
  return first_fault(count, product_bytes(tile * w.cols, m, weight.element.width), w.rows, [&](int64_t task) {
    const int64_t begin = task * tile, end = std::min(begin + tile, w.rows);
    const int64_t row = kernels.multiply(w, begin, end, const_bytes(tiles), m, bias, y, scratch(kernels.scratch_bytes));
    return row < end ? row : w.rows;
  });
}

// The same for any rows of x.
int64_t multiply_rows(const Weight& weight, const uint8_t* x, int64_t m, const void* bias, uint8_t* y) {
  const TwoFourMatrix& w = weight.matrix;
  const TwoFourLinearKernels& kernels = weight.kernels;
  if (kernels.multiply == nullptr) return multiply_as_bitmask(weight, x, m, bias, y);
  int64_t fault = w.rows;
  for_each_block(m, kernels.most_rows, kernels.tile_rows, [&](int64_t first, int64_t count) {
    const int64_t width = weight.element.width;
    if (fault == w.rows) fault = multiply_block(weight, x + first * w.cols * width, count, bias, y + first * w.rows * width);
  });
  return fault;
}

Tensor linear_24(const Tensor& x, const Tensor& values, const Tensor& metadata, const std::optional<Tensor>& bias) {
  const Weight weight = weight_of(values, metadata);
  const Tensor y = empty(linear_sizes(x, weight, bias), weight.element.dtype);
  const Tensor rows = contiguous("x", x);
  const Tensor offset = bias ? contiguous("bias", *bias) : rows;
  const int64_t m = geometry(x.sizes()).rows;
  if (weight.matrix.rows == 0 || m == 0) return y;
  const void* const bias_data = bias ? const_bytes(offset) : nullptr;
  const auto run = m <= weight.kernels.streaming_rows ? stream : multiply_rows;
  check_fault(run(weight, const_bytes(rows), m, bias_data, mutable_bytes(y)), weight.matrix);
  return y;
}

Tensor linear_24_backward_input(const Tensor& grad, const Tensor& values, const Tensor& metadata) {
  const Weight weight = weight_of(values, metadata);
  const std::vector<int64_t> sizes = backward_input_sizes(grad, weight);
  prove(weight.matrix);
  const Tensor g = contiguous("grad", grad);
  const int64_t m = geometry(grad.sizes()).rows;
  const Tensor y = empty(sizes, weight.element.dtype);
  if (weight.matrix.cols == 0 || m == 0) return y;
  const AsBitmask bitmask(weight.matrix);
  check_fault(multiply_transposed(weight.bitmask_kernels, bitmask.matrix(), const_bytes(g), m, mutable_bytes(y), weight.element.width),
              weight.matrix);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CPU, m) {
  m.impl("linear_24", TORCH_BOX(&linear_24));
  m.impl("linear_24_backward_input", TORCH_BOX(&linear_24_backward_input));
  m.impl("pack_24", TORCH_BOX(&pack_24));
  m.impl("prune_24", TORCH_BOX(&prune_24));
  m.impl("unpack_24", TORCH_BOX(&unpack_24));
  m.impl("validate_24", TORCH_BOX(&validate_24));
}

}  // namespace bitmask
