// What the ops of every device ask of the tensors that they are called with: kinds, sizes, one device. Contents are the kernels' business.
#pragma once

#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "dtypes.h"
#include "layout.h"
#include "tensors.h"

namespace bitmask {

// The parts of a bitmask tensor, contiguous, checked but for what their rows hold.
struct Parts {
  Tensor values, bitmasks, row_offsets;
  Element element;
  BitmaskMatrix matrix;  // of these tensors' memory

  Geometry geometry() const { return {matrix.rows, matrix.cols}; }
};

// Throws unless the parts have the dtypes and sizes that `shape` asks for.
inline Parts parts_of(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, const std::vector<int64_t>& shape) {
  const Geometry g = geometry(shape);
  const Element element = element_of(values, false);
  check_dtype("bitmasks", dtype_of(bitmasks), "torch.uint8", aoti_torch_dtype_uint8());
  check_dtype("row_offsets", dtype_of(row_offsets), "torch.int64", aoti_torch_dtype_int64());
  check_part_sizes(values.sizes(), bitmasks.sizes(), row_offsets.sizes(), shape, g);
  Parts parts{contiguous("values", values), contiguous("bitmasks", bitmasks), contiguous("row_offsets", row_offsets), element, {}};
  const int64_t* const offsets = static_cast<const int64_t*>(parts.row_offsets.const_data_ptr());
  parts.matrix = {const_bytes(parts.values), const_bytes(parts.bitmasks), offsets, g.rows, g.cols, values.numel()};
  return parts;
}

// The parts of the weight [out_features, in_features] of a linear layer.
inline Parts weight_of(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, int64_t in_features) {
  by_linear_dtype(dtype_of(values), 0, 0, 0, 0);  // refuses dtypes that have no linear kernels
  return parts_of(values, bitmasks, row_offsets, {row_offsets.numel(), in_features});
}

// Sizes with another last one, checked.
inline std::vector<int64_t> with_last_size(const Tensor& tensor, int64_t size) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = size;
  geometry(sizes);
  return sizes;
}

// Throws unless x and bias fit the weight, Parts or TwoFourParts; returns the sizes of y = x W^T + bias.
template <typename Weight>
std::vector<int64_t> linear_sizes(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias) {
  check_dtype("x", dtype_of(x), "the dtype of values", weight.element.dtype);
  check_last_size("x", x.sizes(), weight.matrix.cols, "in_features");
  if (bias) check_dtype("bias", dtype_of(*bias), "the dtype of values", weight.element.dtype);
  if (bias) check_bias_size(bias->sizes(), weight.matrix.rows);
  return with_last_size(x, weight.matrix.rows);
}

// Throws unless grad fits the weight; returns the sizes of y = grad W.
template <typename Weight>
std::vector<int64_t> backward_input_sizes(const Tensor& grad, const Weight& weight) {
  check_dtype("grad", dtype_of(grad), "the dtype of values", weight.element.dtype);
  check_last_size("grad", grad.sizes(), weight.matrix.rows, "out_features");
  return with_last_size(grad, weight.matrix.cols);
}

// Sizes of the bitmasks of a tensor of these sizes: the last dimension counts bytes.
template <typename Sizes>
std::vector<int64_t> bitmask_sizes(const Sizes& sizes) {
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  if (result.empty()) result.push_back(1);
  result.back() = bitmask_bytes(geometry(sizes).cols);
  return result;
}

// The parts of a 2:4 tensor, contiguous, checked but for what the metadata hold.
struct TwoFourParts {
  Tensor values, metadata;
  Element element;
  std::vector<int64_t> sizes;  // of the dense tensor
  TwoFourMatrix matrix;        // of these tensors' memory

  Geometry geometry() const { return {matrix.rows, matrix.cols}; }
};

// Throws unless the parts have the dtypes and sizes of a 2:4 tensor; returns the sizes of the dense one.
inline std::vector<int64_t> two_four_sizes(const Tensor& values, const Tensor& metadata) {
  magnitude_of("values", dtype_of(values));  // refuses dtypes that have no 2:4 layout
  check_dtype("metadata", dtype_of(metadata), "torch.uint8", aoti_torch_dtype_uint8());
  const auto got = values.sizes();
  if (got.size() == 0 || got[got.size() - 1] % 2 != 0) {
    fail("values: got size ", to_text(got), ", expected [..., cols / 2], two for each group of four columns");
  }
  std::vector<int64_t> sizes(got.begin(), got.end());
  if (__builtin_mul_overflow(sizes.back(), int64_t{2}, &sizes.back())) {
    fail("values: got size ", to_text(got), ", expected fewer than 2^63 columns");
  }
  const std::vector<int64_t> expected = bitmask_sizes(sizes), found(metadata.sizes().begin(), metadata.sizes().end());
  if (found != expected) {
    fail("metadata: got size ", to_text(found), ", expected ", to_text(expected), " ([..., ceil(cols / 8)]) for values of size ",
         to_text(got));
  }
  return sizes;
}

// The parts, contiguous, checked but for what the metadata hold.
inline TwoFourParts two_four_parts_of(const Tensor& values, const Tensor& metadata) {
  const std::vector<int64_t> sizes = two_four_sizes(values, metadata);
  const Geometry g = geometry(sizes);
  TwoFourParts parts{contiguous("values", values), contiguous("metadata", metadata), element_of(values, false), sizes, {}};
  parts.matrix = {const_bytes(parts.values), const_bytes(parts.metadata), g.rows, g.cols};
  return parts;
}

// Throws unless compress_into can write to the three buffers, which must not overlap each other or what it reads.
inline void check_buffers(const Tensor& source, const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets) {
  check_dtype("values", dtype_of(values), "the dtype of dense", dtype_of(source));
  check_dtype("bitmasks", dtype_of(bitmasks), "torch.uint8", aoti_torch_dtype_uint8());
  check_dtype("row_offsets", dtype_of(row_offsets), "torch.int64", aoti_torch_dtype_int64());
  check_values_size(values.sizes());
  check_index_sizes(bitmasks.sizes(), row_offsets.sizes(), source.sizes(), geometry(source.sizes()));

  const std::pair<const char*, const Tensor*> tensors[] = {
      {"dense", &source}, {"values", &values}, {"bitmasks", &bitmasks}, {"row_offsets", &row_offsets}};
  for (size_t i = 1; i < std::size(tensors); ++i) {
    const auto& [name, buffer] = tensors[i];
    if (!buffer->is_contiguous()) fail(name, ": got strides ", to_text(buffer->strides()), ", expected contiguous memory to write to");
    check_storage(name, *buffer);
    for (size_t j = 0; j < i; ++j) {
      const auto& [other_name, other] = tensors[j];
      const uint8_t *const begin = const_bytes(*buffer), *const other_begin = const_bytes(*other);
      const bool overlap = begin < other_begin + nbytes(*other) && other_begin < begin + nbytes(*buffer);
      if (overlap) fail(name, ": got memory that overlaps that of ", other_name, ", expected memory of its own");
    }
  }
}

// Throws unless all tensors are where the first one is.
inline void check_one_device(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  const auto device_of = [](const Tensor& tensor) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    const std::string name = type == aoti_torch_device_type_cpu() ? "cpu" : type == aoti_torch_device_type_cuda() ? "cuda" : "another kind";
    return tensor.is_cpu() ? name : name + ":" + std::to_string(tensor.get_device_index());
  };
  const auto& [first_name, first] = *tensors.begin();
  for (const auto& [name, tensor] : tensors) {
    const std::string got = device_of(*tensor), expected = device_of(*first);
    if (got != expected) fail(name, ": got device ", got, ", expected ", expected, ", the device of ", first_name);
  }
}

}  // namespace bitmask
