// Schemas of all ops, and the CPU implementations of those that compress and decompress: check, allocate, split rows over threads, call the
// kernels. No arithmetic here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "layout.h"
#include "parallel.h"
#include "proof.h"
#include "tensors.h"

namespace bitmask {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

// What the kernels need to know of a dtype.
struct Element {
  int32_t dtype;
  int width;  // bytes
  ZeroTest zero_test;
};

// A test that looks at all bits of an element but the sign bit of each of its `real_width`-byte numbers.
ZeroTest ignore_sign(int real_width) {
  ZeroTest test;
  for (int i = 0; i < 16; ++i) test.bytes[i] = i % real_width == real_width - 1 ? 0x7f : 0xff;
  return test;
}

ZeroTest test_all_bits() {
  ZeroTest test;
  for (uint8_t& byte : test.bytes) byte = 0xff;
  return test;
}

// The default zero rule of a dtype. The float8 *fnuz kinds have no -0.0 (its bits are NaN) and float8_e8m0fnu has no sign.
ZeroTest zero_test_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
      return ignore_sign(1);
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::ComplexHalf:
      return ignore_sign(2);
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return ignore_sign(4);
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return ignore_sign(8);
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e8m0fnu:
      return test_all_bits();
    default:
      fail("dtype: got torch scalar type ", static_cast<int>(type), ", expected bool, an integer, a float or a complex dtype");
  }
}

Element element_of(const Tensor& tensor, bool keep_negative_zero) {
  const int32_t dtype = dtype_of(tensor);
  const ZeroTest by_value = zero_test_of(static_cast<ScalarType>(dtype));
  return {dtype, static_cast<int>(aoti_torch_dtype_element_size(dtype)), keep_negative_zero ? test_all_bits() : by_value};
}

const cpu::CodecKernels& codec_of(const Element& element) { return cpu::kernels().codec[__builtin_ctz(element.width)]; }

int64_t sum(const int64_t* counts, int64_t length) {
  int64_t total = 0;
  for (int64_t i = 0; i < length; ++i) total += counts[i];
  return total;
}

// Replaces counts by their exclusive prefix sums, from `start` on; returns the total.
int64_t exclusive_prefix_sums(int64_t* counts, int64_t length, int64_t start) {
  for (int64_t i = 0; i < length; ++i) start += std::exchange(counts[i], start);
  return start;
}

// Where the parts of a task lie, in elements, bitmask bytes and values.
struct Slice {
  Tasks::Task task;
  int64_t element;
  int64_t mask_byte;
};

Slice slice_of(const Tasks& tasks, int64_t index, const Geometry& g) {
  const Tasks::Task task = tasks[index];
  return {task, task.row * g.cols + task.col, task.row * bitmask_bytes(g.cols) + task.col / 8};
}

std::tuple<Tensor, Tensor, Tensor> compress(const Tensor& dense, bool keep_negative_zero) {
  const Element element = element_of(dense, keep_negative_zero);
  const cpu::CodecKernels& codec = codec_of(element);
  const Tensor source = contiguous("dense", dense);
  const Geometry g = geometry(source.sizes());

  std::vector<int64_t> mask_sizes(source.sizes().begin(), source.sizes().end());
  if (mask_sizes.empty()) mask_sizes.push_back(1);
  mask_sizes.back() = bitmask_bytes(g.cols);
  const Tensor bitmasks = empty(mask_sizes, aoti_torch_dtype_uint8());
  const Tensor row_offsets = empty(std::vector<int64_t>{g.rows}, aoti_torch_dtype_int64());
  const uint8_t* const dense_data = const_bytes(source);
  uint8_t* const mask_data = mutable_bytes(bitmasks);
  int64_t* const offset_data = static_cast<int64_t*>(row_offsets.mutable_data_ptr());

  const Tasks tasks(g);
  std::vector<int64_t> starts(static_cast<size_t>(tasks.count()));
  for_each_task(tasks.count(), tasks.bytes(element.width), [&](int64_t index) {
    const Slice s = slice_of(tasks, index, g);
    int64_t* const counts = tasks.whole_rows() ? offset_data + s.task.row : &starts[static_cast<size_t>(index)];
    codec.build_bitmasks(dense_data + s.element * element.width, s.task.rows, s.task.cols, element.zero_test, mask_data + s.mask_byte,
                         counts);
    if (tasks.whole_rows()) starts[static_cast<size_t>(index)] = sum(counts, s.task.rows);
  });
  const int64_t nnz = exclusive_prefix_sums(starts.data(), tasks.count(), 0);

  const Tensor values = empty(std::vector<int64_t>{nnz}, element.dtype);
  uint8_t* const value_data = mutable_bytes(values);
  for_each_task(tasks.count(), tasks.bytes(element.width), [&](int64_t index) {
    const Slice s = slice_of(tasks, index, g);
    const int64_t start = starts[static_cast<size_t>(index)];
    const int64_t end = index + 1 < tasks.count() ? starts[static_cast<size_t>(index) + 1] : nnz;
    codec.pack_values(dense_data + s.element * element.width, mask_data + s.mask_byte, s.task.rows, s.task.cols,
                      value_data + start * element.width, end - start);
    if (tasks.whole_rows()) {
      exclusive_prefix_sums(offset_data + s.task.row, s.task.rows, start);
    } else if (s.task.col == 0) {
      offset_data[s.task.row] = start;
    }
  });
  return {values, bitmasks, row_offsets};
}

// The parts of a bitmask tensor, contiguous, and where the values of each task begin. Whoever writes to the parts meanwhile (another
// thread or process may hold them) gets wrong elements, never an access out of bounds: the starts are copied once and proven as copied,
// and the kernels keep within them.
struct Parts {
  Tensor values;
  Tensor bitmasks;
  Tensor row_offsets;
  Geometry g;
  Tasks tasks;
  std::vector<int64_t> starts;  // [tasks + 1], the last one being nnz

  int64_t nnz() const { return starts.back(); }
  const uint8_t* masks() const { return const_bytes(bitmasks); }
  const int64_t* offsets() const { return static_cast<const int64_t*>(row_offsets.const_data_ptr()); }
};

// Tasks of whole rows: every row's popcount leads from its offset to the next. The lowest faulty row becomes the error, whatever the
// threads' order.
void prove_rows(Parts& parts) {
  const Geometry& g = parts.g;
  const uint8_t* const masks = parts.masks();
  const int64_t* const offsets = parts.offsets();
  const int64_t nnz = parts.nnz();
  std::vector<int64_t> faults(static_cast<size_t>(parts.tasks.count()), g.rows);
  for_each_task(parts.tasks.count(), parts.tasks.bytes(1), [&](int64_t index) {
    const Slice s = slice_of(parts.tasks, index, g);
    const int64_t next = s.task.row + s.task.rows;
    parts.starts[static_cast<size_t>(index)] = offsets[s.task.row];
    const int64_t faulty = cpu::kernels().first_faulty_row(masks + s.mask_byte, offsets + s.task.row, s.task.rows, g.cols,
                                                           next < g.rows ? offsets[next] : nnz, nnz);
    if (faulty < s.task.rows) faults[static_cast<size_t>(index)] = s.task.row + faulty;
  });
  if (g.rows > 0 && parts.starts[0] != 0) fail_row(masks, offsets, 0, g, nnz);
  for (const int64_t row : faults) {
    if (row < g.rows) fail_row(masks, offsets, row, g, nnz);
  }
  if (!std::is_sorted(parts.starts.begin(), parts.starts.end())) fail("row_offsets: changed while they were read");
}

// Tasks that are parts of a row: counted first, then each row's sum is held against the offsets.
void prove_long_rows(Parts& parts) {
  const Geometry& g = parts.g;
  const uint8_t* const masks = parts.masks();
  const int64_t* const offsets = parts.offsets();
  const int64_t nnz = parts.nnz();
  for_each_task(parts.tasks.count(), parts.tasks.bytes(1), [&](int64_t index) {
    const Slice s = slice_of(parts.tasks, index, g);
    parts.starts[static_cast<size_t>(index)] = cpu::kernels().count_bits(masks + s.mask_byte, bitmask_bytes(s.task.cols));
  });
  const int64_t padding = g.cols % 8;
  int64_t offset = 0;
  for (int64_t row = 0; row < g.rows; ++row) {
    const int64_t count = sum(&parts.starts[static_cast<size_t>(row * parts.tasks.parts_per_row())], parts.tasks.parts_per_row());
    const int64_t next = row + 1 < g.rows ? offsets[row + 1] : nnz;
    const uint8_t last_byte = masks[(row + 1) * bitmask_bytes(g.cols) - 1];
    if (offsets[row] != offset || next != offset + count || (padding != 0 && last_byte >> padding != 0)) {
      fail_row(masks, offsets, row, g, nnz);
    }
    offset += count;
  }
  exclusive_prefix_sums(parts.starts.data(), parts.tasks.count(), 0);
}

// Proves the parts before anything is read through them: dtypes and sizes first, then every row.
Parts prove(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, const std::vector<int64_t>& shape) {
  const Geometry g = geometry(shape);
  element_of(values, false);  // refuses dtypes that have no codec
  check_dtype("bitmasks", dtype_of(bitmasks), "torch.uint8", aoti_torch_dtype_uint8());
  check_dtype("row_offsets", dtype_of(row_offsets), "torch.int64", aoti_torch_dtype_int64());
  check_part_sizes(values.sizes(), bitmasks.sizes(), row_offsets.sizes(), shape, g);
  Parts parts{contiguous("values", values), contiguous("bitmasks", bitmasks), contiguous("row_offsets", row_offsets), g, Tasks(g), {}};
  parts.starts.resize(static_cast<size_t>(parts.tasks.count()) + 1);
  parts.starts.back() = values.numel();
  parts.tasks.whole_rows() ? prove_rows(parts) : prove_long_rows(parts);
  return parts;
}

Tensor decompress(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, IntHeaderOnlyArrayRef shape) {
  const std::vector<int64_t> sizes(shape.begin(), shape.end());
  const Parts parts = prove(values, bitmasks, row_offsets, sizes);
  const Element element = element_of(values, false);
  const cpu::CodecKernels& codec = codec_of(element);
  const Tensor dense = empty(sizes, element.dtype);
  uint8_t* const dense_data = mutable_bytes(dense);
  const uint8_t* const value_data = const_bytes(parts.values);
  const uint8_t* const mask_data = parts.masks();
  for_each_task(parts.tasks.count(), parts.tasks.bytes(element.width), [&](int64_t index) {
    const Slice s = slice_of(parts.tasks, index, parts.g);
    const int64_t start = parts.starts[static_cast<size_t>(index)];
    const int64_t end = parts.starts[static_cast<size_t>(index) + 1];
    codec.expand_values(value_data + start * element.width, end - start, mask_data + s.mask_byte, s.task.rows, s.task.cols,
                        dense_data + s.element * element.width);
  });
  return dense;
}

void validate_parts(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, IntHeaderOnlyArrayRef shape) {
  validate(values, bitmasks, row_offsets, std::vector<int64_t>(shape.begin(), shape.end()));
}

}  // namespace

void validate(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, const std::vector<int64_t>& shape) {
  prove(values, bitmasks, row_offsets, shape);
}

STABLE_TORCH_LIBRARY(bitmask, m) {
  m.def("compress(Tensor dense, bool keep_negative_zero) -> (Tensor values, Tensor bitmasks, Tensor row_offsets)");
  m.def("decompress(Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt[] shape) -> Tensor");
  m.def("linear(Tensor x, Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt in_features, Tensor? bias=None) -> Tensor");
  m.def("linear_backward_input(Tensor grad, Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt in_features) -> Tensor");
  m.def("validate(Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt[] shape) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bitmask, CPU, m) {
  m.impl("compress", TORCH_BOX(&compress));
  m.impl("decompress", TORCH_BOX(&decompress));
  m.impl("validate", TORCH_BOX(&validate_parts));
}

}  // namespace bitmask
