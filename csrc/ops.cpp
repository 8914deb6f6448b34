// Schemas of all ops, and the CPU implementations of those that compress and decompress: check, allocate, split rows over threads, call the
// kernels. No arithmetic here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "compress.h"
#include "cpu/kernels.h"
#include "dtypes.h"
#include "layout.h"
#include "operands.h"
#include "parallel.h"
#include "proof.h"
#include "tensors.h"

namespace bitmask {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

const cpu::CodecKernels& codec_of(const Element& element) { return cpu::kernels().codec[__builtin_ctz(element.width)]; }

// A dense tensor on its way to its parts.
struct Compression {
  Tensor source;  // contiguous
  Element element;
  Geometry g;
  Tasks tasks;
  std::vector<int64_t> starts;  // [tasks]: where the values of each task begin
};

Compression compression_of(const Tensor& dense, bool keep_negative_zero) {
  const Element element = element_of(dense, keep_negative_zero);
  const Tensor source = contiguous("dense", dense);
  const Geometry g = geometry(source.sizes());
  const Tasks tasks(g);
  return {source, element, g, tasks, std::vector<int64_t>(static_cast<size_t>(tasks.count()))};
}

// Writes the bitmasks, and each row's number of values to row_offsets; returns the number of all values.
int64_t mark(Compression& c, uint8_t* mask_data, int64_t* offset_data) {
  const cpu::CodecKernels& codec = codec_of(c.element);
  const uint8_t* const dense_data = const_bytes(c.source);
  for_each_task(c.tasks.count(), c.tasks.bytes(c.element.width), [&](int64_t index) {
    const Slice s = slice_of(c.tasks, index, c.g);
    int64_t* const counts = c.tasks.whole_rows() ? offset_data + s.task.row : &c.starts[static_cast<size_t>(index)];
    codec.build_bitmasks(dense_data + s.element * c.element.width, s.task.rows, s.task.cols, c.element.zero_test, mask_data + s.mask_byte,
                         counts);
    if (c.tasks.whole_rows()) c.starts[static_cast<size_t>(index)] = sum(counts, s.task.rows);
  });
  return exclusive_prefix_sums(c.starts.data(), c.tasks.count(), 0);
}

// Writes the nnz values that mark has found, and turns row_offsets from counts to offsets.
void pack(const Compression& c, const uint8_t* mask_data, int64_t* offset_data, uint8_t* value_data, int64_t nnz) {
  const cpu::CodecKernels& codec = codec_of(c.element);
  const uint8_t* const dense_data = const_bytes(c.source);
  const int64_t width = c.element.width;
  for_each_task(c.tasks.count(), c.tasks.bytes(width), [&](int64_t index) {
    const Slice s = slice_of(c.tasks, index, c.g);
    const int64_t start = c.starts[static_cast<size_t>(index)];
    const int64_t end = index + 1 < c.tasks.count() ? c.starts[static_cast<size_t>(index) + 1] : nnz;
    codec.pack_values(dense_data + s.element * width, mask_data + s.mask_byte, s.task.rows, s.task.cols, value_data + start * width,
                      end - start);
    if (c.tasks.whole_rows()) {
      exclusive_prefix_sums(offset_data + s.task.row, s.task.rows, start);
    } else if (s.task.col == 0) {
      offset_data[s.task.row] = start;
    }
  });
}

Tensor compress_into(const Tensor& dense, bool keep_negative_zero, const Tensor& values, const Tensor& bitmasks,
                     const Tensor& row_offsets) {
  Compression c = compression_of(dense, keep_negative_zero);
  check_buffers(c.source, values, bitmasks, row_offsets);
  int64_t* const offset_data = static_cast<int64_t*>(row_offsets.mutable_data_ptr());
  const int64_t nnz = mark(c, mutable_bytes(bitmasks), offset_data);
  const bool fits = nnz <= values.numel();
  const Tensor packed = fits ? values : empty(std::vector<int64_t>{nnz}, c.element.dtype);
  pack(c, const_bytes(bitmasks), offset_data, mutable_bytes(packed), nnz);
  if (!fits && values.numel() > 0) std::memcpy(mutable_bytes(values), const_bytes(packed), static_cast<size_t>(nbytes(values)));
  const Tensor count = empty(std::vector<int64_t>{}, aoti_torch_dtype_int64());
  *static_cast<int64_t*>(count.mutable_data_ptr()) = nnz;
  return count;
}

Tensor decompress(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, IntHeaderOnlyArrayRef shape) {
  const std::vector<int64_t> sizes(shape.begin(), shape.end());
  const Proof proof = prove(values, bitmasks, row_offsets, sizes);
  const Element& element = proof.parts.element;
  const cpu::CodecKernels& codec = codec_of(element);
  const Tensor dense = empty(sizes, element.dtype);
  uint8_t* const dense_data = mutable_bytes(dense);
  const uint8_t* const value_data = const_bytes(proof.parts.values);
  const uint8_t* const mask_data = proof.masks();
  for_each_task(proof.tasks.count(), proof.tasks.bytes(element.width), [&](int64_t index) {
    const Slice s = slice_of(proof.tasks, index, proof.g);
    const int64_t start = proof.starts[static_cast<size_t>(index)];
    const int64_t end = proof.starts[static_cast<size_t>(index) + 1];
    codec.expand_values(value_data + start * element.width, end - start, mask_data + s.mask_byte, s.task.rows, s.task.cols,
                        dense_data + s.element * element.width);
  });
  return dense;
}

void validate(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, IntHeaderOnlyArrayRef shape) {
  prove(values, bitmasks, row_offsets, std::vector<int64_t>(shape.begin(), shape.end()));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> compress(const Tensor& dense, bool keep_negative_zero) {
  Compression c = compression_of(dense, keep_negative_zero);
  const Tensor bitmasks = empty(bitmask_sizes(c.source.sizes()), aoti_torch_dtype_uint8());
  const Tensor row_offsets = empty(std::vector<int64_t>{c.g.rows}, aoti_torch_dtype_int64());
  int64_t* const offset_data = static_cast<int64_t*>(row_offsets.mutable_data_ptr());
  const int64_t nnz = mark(c, mutable_bytes(bitmasks), offset_data);
  const Tensor values = empty(std::vector<int64_t>{nnz}, c.element.dtype);
  pack(c, const_bytes(bitmasks), offset_data, mutable_bytes(values), nnz);
  return {values, bitmasks, row_offsets};
}

STABLE_TORCH_LIBRARY(bitmask, m) {
  m.def(
      "bsr_linear(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, SymInt out_features, Tensor? bias=None, "
      "Tensor? ccol_indices=None, Tensor? row_indices=None, Tensor? order=None, bool allow_tf32=False) -> Tensor");
  m.def(
      "bsr_linear_24(Tensor x, Tensor values, Tensor metadata, Tensor crow_indices, Tensor col_indices, SymInt out_features, "
      "Tensor? bias=None) -> Tensor");
  m.def(
      "bsr_linear_backward_input(Tensor grad, Tensor values, Tensor ccol_indices, Tensor row_indices, Tensor order, SymInt in_features, "
      "bool allow_tf32=False) -> Tensor");
  m.def(
      "bsr_linear_backward_values(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, SymInt[] block_shape, "
      "bool allow_tf32=False) -> Tensor");
  m.def(
      "bsr_transpose(Tensor crow_indices, Tensor col_indices, SymInt cols_of_blocks) "
      "-> (Tensor ccol_indices, Tensor row_indices, Tensor order)");
  m.def("compress(Tensor dense, bool keep_negative_zero) -> (Tensor values, Tensor bitmasks, Tensor row_offsets)");
  m.def("compress_into(Tensor dense, bool keep_negative_zero, Tensor(a!) values, Tensor(b!) bitmasks, Tensor(c!) row_offsets) -> Tensor");
  m.def("coo_to_crow(Tensor indices, SymInt[] shape) -> Tensor");
  m.def("decompress(Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt[] shape) -> Tensor");
  m.def(
      "from_bsr(Tensor values, Tensor crow_indices, Tensor col_indices, SymInt[] shape, bool keep_negative_zero) "
      "-> (Tensor values, Tensor bitmasks, Tensor row_offsets)");
  m.def(
      "from_csr(Tensor values, Tensor crow_indices, Tensor col_indices, SymInt[] shape, bool keep_negative_zero) "
      "-> (Tensor values, Tensor bitmasks, Tensor row_offsets)");
  m.def("linear(Tensor x, Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt in_features, Tensor? bias=None) -> Tensor");
  m.def("linear_backward_input(Tensor grad, Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt in_features) -> Tensor");
  m.def("linear_24(Tensor x, Tensor values, Tensor metadata, Tensor? bias=None) -> Tensor");
  m.def("linear_24_backward_input(Tensor grad, Tensor values, Tensor metadata) -> Tensor");
  m.def("pack_24(Tensor dense, bool prune, bool keep_negative_zero) -> (Tensor values, Tensor metadata)");
  m.def("prune_24(Tensor(a!) tensor, bool transposable) -> ()");
  m.def(
      "to_bsr(Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt[] shape, SymInt[] block_shape) "
      "-> (Tensor crow_indices, Tensor col_indices, Tensor values)");
  m.def("to_coo(Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt[] shape) -> (Tensor indices, Tensor values)");
  m.def(
      "to_csc(Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt[] shape) "
      "-> (Tensor ccol_indices, Tensor row_indices, Tensor values)");
  m.def(
      "to_csr(Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt[] shape) "
      "-> (Tensor crow_indices, Tensor col_indices, Tensor values)");
  m.def(
      "transpose(Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt[] shape) "
      "-> (Tensor values, Tensor bitmasks, Tensor row_offsets)");
  m.def("unpack_24(Tensor values, Tensor metadata) -> Tensor");
  m.def("validate(Tensor values, Tensor bitmasks, Tensor row_offsets, SymInt[] shape) -> ()");
  m.def("validate_24(Tensor values, Tensor metadata) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bitmask, CPU, m) {
  m.impl("compress", TORCH_BOX(&compress));
  m.impl("compress_into", TORCH_BOX(&compress_into));
  m.impl("decompress", TORCH_BOX(&decompress));
  m.impl("validate", TORCH_BOX(&validate));
}

}  // namespace bitmask
