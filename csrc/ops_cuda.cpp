// The CUDA implementations of the ops on bitmasks: check, allocate, take torch's current stream, launch. No arithmetic here.
//
// Nothing waits for the GPU but compress, which must know the size of its result, and decompress and validate, which throw. Where nobody
// may wait, in linear and while a CUDA graph is captured, a weight that proves faulty gives NaN instead of an exception.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "cuda/kernels.h"
#include "dense_products.h"
#include "dtypes.h"
#include "launch.h"
#include "layout.h"
#include "operands.h"
#include "tensors.h"

namespace bitmask {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

// ---------------------------------------------------------------------------------------------------------------- codec

// Compresses `source` into buffers that it fits; `nnz` says how many values there are.
void compress_to(const Launch& on, const Tensor& source, const Element& element, const Tensor& values, const Tensor& bitmasks,
                 const Tensor& row_offsets, const Tensor& nnz) {
  const Geometry g = geometry(source.sizes());
  const Tensor workspace = on.bytes(cuda::codec_workspace_bytes(g));
  on.check(cuda::compress(source.const_data_ptr(), g, element.width, element.zero_test, mutable_bytes(bitmasks),
                          static_cast<int64_t*>(row_offsets.mutable_data_ptr()), values.mutable_data_ptr(), values.numel(),
                          static_cast<int64_t*>(nnz.mutable_data_ptr()), workspace.mutable_data_ptr(), on.stream()));
}

std::tuple<Tensor, Tensor, Tensor> compress(const Tensor& dense, bool keep_negative_zero) {
  const Element element = element_of(dense, keep_negative_zero);
  return launch("compress", {{"dense", &dense}}, [&](const Launch& on) -> std::tuple<Tensor, Tensor, Tensor> {
    on.refuse_capture("compress_into does not");
    const Tensor source = contiguous("dense", dense);
    const Geometry g = geometry(source.sizes());
    const Tensor count = on.int64();
    int64_t* const count_data = static_cast<int64_t*>(count.mutable_data_ptr());
    on.check(cuda::count_nonzero(source.const_data_ptr(), g, element.width, element.zero_test, count_data, on.stream()));
    int64_t nnz;
    on.read(&nnz, count_data, sizeof nnz);
    const Tensor values = on.empty(std::vector<int64_t>{nnz}, element.dtype);
    const Tensor bitmasks = on.empty(bitmask_sizes(source.sizes()), aoti_torch_dtype_uint8());
    const Tensor row_offsets = on.empty(std::vector<int64_t>{g.rows}, aoti_torch_dtype_int64());
    compress_to(on, source, element, values, bitmasks, row_offsets, count);
    return {values, bitmasks, row_offsets};
  });
}

Tensor compress_into(const Tensor& dense, bool keep_negative_zero, const Tensor& values, const Tensor& bitmasks,
                     const Tensor& row_offsets) {
  const Element element = element_of(dense, keep_negative_zero);
  const std::initializer_list<Named> tensors = {
      {"dense", &dense}, {"values", &values}, {"bitmasks", &bitmasks}, {"row_offsets", &row_offsets}};
  return launch("compress_into", tensors, [&](const Launch& on) {
    const Tensor source = contiguous("dense", dense);
    check_buffers(source, values, bitmasks, row_offsets);
    const Tensor nnz = on.int64();
    compress_to(on, source, element, values, bitmasks, row_offsets, nnz);
    return nnz;
  });
}

// The parts of a weight while they are proven on the GPU.
class Proof {
 public:
  Proof(const Launch& on, const Parts& parts)
      : on_(on), parts_(parts), verdict_(on), workspace_(on.bytes(cuda::codec_workspace_bytes(parts.geometry()))) {}

  // Proves the rows [begin, end), which come in order, and writes them to `dense`, unless that is null.
  void expand(int64_t begin, int64_t end, void* dense) const {
    on_.check(cuda::decompress(parts_.matrix, begin, end, parts_.element.width, dense, begin == 0, verdict_.word(),
                               workspace_.mutable_data_ptr(), on_.stream()));
  }

  void expand_all(void* dense) const { expand(0, parts_.matrix.rows, dense); }

  // Waits for the proof, and throws what is wrong in the lowest faulty row.
  void throw_fault() const {
    const cuda::Fault fault = verdict_.read();
    if (fault == cuda::kNoFault) return;
    const BitmaskMatrix& w = parts_.matrix;
    const int64_t row = static_cast<int64_t>(fault), row_bytes = bitmask_bytes(w.cols);
    std::vector<uint8_t> bits(static_cast<size_t>(row_bytes));
    int64_t offsets[2] = {0, w.nnz};
    on_.read(offsets, w.row_offsets + row, sizeof(int64_t) * static_cast<size_t>(std::min<int64_t>(2, w.rows - row)));
    if (row_bytes > 0) on_.read(bits.data(), w.bitmasks + row * row_bytes, bits.size());
    fail_row(bits.data(), offsets[0], offsets[1], row, parts_.geometry(), w.nnz);
  }

  void poison(const Tensor& result) const { verdict_.poison(result); }

 private:
  const Launch& on_;
  const Parts& parts_;
  Verdict verdict_;
  Tensor workspace_;
};

Tensor decompress(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, IntHeaderOnlyArrayRef shape) {
  const std::vector<int64_t> sizes(shape.begin(), shape.end());
  const std::initializer_list<Named> tensors = {{"values", &values}, {"bitmasks", &bitmasks}, {"row_offsets", &row_offsets}};
  return launch("decompress", tensors, [&](const Launch& on) {
    const Parts parts = parts_of(values, bitmasks, row_offsets, sizes);
    const bool capturing = on.capturing();
    if (capturing && !all_ones_is_nan(parts.element)) on.refuse_capture("nor could it show faulty parts as NaN in this dtype");
    const Tensor dense = on.empty(sizes, parts.element.dtype);
    Proof proof(on, parts);
    proof.expand_all(dense.mutable_data_ptr());
    capturing ? proof.poison(dense) : proof.throw_fault();
    return dense;
  });
}

void validate(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, IntHeaderOnlyArrayRef shape) {
  const std::initializer_list<Named> tensors = {{"values", &values}, {"bitmasks", &bitmasks}, {"row_offsets", &row_offsets}};
  launch("validate", tensors, [&](const Launch& on) {
    on.refuse_capture("validate before");
    const Parts parts = parts_of(values, bitmasks, row_offsets, std::vector<int64_t>(shape.begin(), shape.end()));
    Proof proof(on, parts);
    proof.expand_all(nullptr);
    proof.throw_fault();
  });
}

// ---------------------------------------------------------------------------------------------------------------- linear

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, int64_t in_features,
              const std::optional<Tensor>& bias) {
  const std::initializer_list<Named> tensors = {
      {"values", &values}, {"bitmasks", &bitmasks}, {"row_offsets", &row_offsets}, {"x", &x}, {"bias", bias ? &*bias : &x}};
  return launch("linear", tensors, [&](const Launch& on) {
    const Parts weight = weight_of(values, bitmasks, row_offsets, in_features);
    const Tensor y = on.empty(linear_sizes(x, weight, bias), weight.element.dtype);
    if (y.numel() == 0) return y;
    const Tensor rows = contiguous("x", x);
    const std::optional<Tensor> offset = bias ? std::make_optional(contiguous("bias", *bias)) : std::nullopt;
    const int32_t dtype = weight.element.dtype;
    if (dtype == aoti_torch_dtype_float64()) {  // has no kernels here
      linear_by_library(on, weight, Proof(on, weight), rows, offset, y);
      return y;
    }
    const cuda::LinearParams params{weight.matrix,
                                    rows.const_data_ptr(),
                                    offset ? offset->const_data_ptr() : nullptr,
                                    y.mutable_data_ptr(),
                                    geometry(x.sizes()).rows,
                                    by_linear_dtype(dtype, cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16, cuda::kFloat64)};
    const cuda::Device device = on.device();
    const cuda::LinearPlan plan = cuda::plan_linear(params, device);
    if (plan.way == cuda::LinearWay::kLibrary) {
      linear_by_library(on, weight, Proof(on, weight), rows, offset, y);
      return y;
    }
    const Tensor workspace = on.bytes(plan.workspace_bytes);
    const auto run = plan.way == cuda::LinearWay::kStream ? cuda::linear_stream : cuda::linear_multiply;
    on.check(run(params, device, workspace.mutable_data_ptr(), on.stream()));
    return y;
  });
}

Tensor linear_backward_input(const Tensor& grad, const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets,
                             int64_t in_features) {
  const std::initializer_list<Named> tensors = {
      {"values", &values}, {"bitmasks", &bitmasks}, {"row_offsets", &row_offsets}, {"grad", &grad}};
  return launch("linear_backward_input", tensors, [&](const Launch& on) {
    const Parts weight = weight_of(values, bitmasks, row_offsets, in_features);
    const Tensor y = on.empty(backward_input_sizes(grad, weight), weight.element.dtype);
    if (y.numel() == 0) return y;
    backward_input_by_library(on, weight, Proof(on, weight), contiguous("grad", grad), y);
    return y;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CUDA, m) {
  m.impl("compress", TORCH_BOX(&compress));
  m.impl("compress_into", TORCH_BOX(&compress_into));
  m.impl("decompress", TORCH_BOX(&decompress));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward_input", TORCH_BOX(&linear_backward_input));
  m.impl("validate", TORCH_BOX(&validate));
}

}  // namespace bitmask

// For bitmask/native.py.
extern "C" __attribute__((visibility("default"))) const char* bitmask_cuda_architectures() { return BITMASK_CUDA_ARCHITECTURES; }
extern "C" __attribute__((visibility("default"))) int bitmask_cuda_toolkit() { return CUDART_VERSION; }
