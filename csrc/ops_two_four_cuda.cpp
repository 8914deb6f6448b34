// The CUDA implementations of the 2:4 ops: check, allocate, launch (launch.h). No arithmetic here.
//
// Nothing waits for the GPU but what throws: pack_24 unless it prunes, unpack_24 and validate_24. Where nobody may wait, in linear_24 and
// while a CUDA graph is captured, a weight that proves faulty gives NaN instead of an exception.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/kernels.h"
#include "dense_products.h"
#include "dtypes.h"
#include "launch.h"
#include "layout.h"
#include "operands.h"
#include "tensors.h"
#include "two_four_operands.h"

namespace bitmask {
namespace {

// ------------------------------------------------------------------------------------------------------------- the codec

std::tuple<Tensor, Tensor> pack_24(const Tensor& dense, bool prune, bool keep_negative_zero) {
  const Element element = element_of(dense, keep_negative_zero);
  const Magnitude magnitude = check_packable(dense);
  const Geometry g = geometry(dense.sizes());
  return launch("pack_24", {{"dense", &dense}}, [&](const Launch& on) -> std::tuple<Tensor, Tensor> {
    if (!prune) on.refuse_capture("with prune=True it does not");
    const Tensor source = contiguous("dense", dense);
    const Tensor values = on.empty(with_last_size(dense, g.cols / 2), element.dtype);
    const Tensor metadata = on.empty(bitmask_sizes(dense.sizes()), aoti_torch_dtype_uint8());
    const Verdict verdict(on);
    on.check(cuda::pack_24(source.const_data_ptr(), g, element.width, element.zero_test, magnitude, prune, values.mutable_data_ptr(),
                           mutable_bytes(metadata), verdict.word(), on.stream()));
    if (prune) return {values, metadata};
    const cuda::Fault fault = verdict.read();
    if (fault != cuda::kNoFault) {
      const int64_t row = static_cast<int64_t>(fault), row_bytes = g.cols * element.width;
      std::vector<uint8_t> elements(static_cast<size_t>(row_bytes));
      on.read(elements.data(), const_bytes(source) + row * row_bytes, elements.size());
      fail_dense(elements.data(), row, g.cols, element.zero_test, element.width);
    }
    return {values, metadata};
  });
}

// A 2:4 matrix while it is proven on the GPU.
class Proof {
 public:
  Proof(const Launch& on, const TwoFourMatrix& matrix, int width) : on_(on), matrix_(matrix), width_(width), verdict_(on) {}

  // Proves the rows [begin, end), which come in order, and writes them to `dense`, unless that is null.
  void expand(int64_t begin, int64_t end, void* dense) const {
    on_.check(cuda::unpack_24(matrix_, begin, end, width_, dense, begin == 0, verdict_.word(), on_.stream()));
  }
  void expand_all(void* dense) const { expand(0, matrix_.rows, dense); }

  // Waits for the proof, and throws what is wrong in the lowest faulty row.
  void throw_fault() const {
    const cuda::Fault fault = verdict_.read();
    if (fault == cuda::kNoFault) return;
    const int64_t row = static_cast<int64_t>(fault), row_bytes = bitmask_bytes(matrix_.cols);
    std::vector<uint8_t> bits(static_cast<size_t>(row_bytes));
    on_.read(bits.data(), matrix_.metadata + row * row_bytes, bits.size());
    fail_metadata(bits.data(), row, matrix_.cols);
  }

  void poison(const Tensor& result) const { verdict_.poison(result); }

 private:
  const Launch& on_;
  TwoFourMatrix matrix_;
  int width_;
  Verdict verdict_;
};

Tensor unpack_24(const Tensor& values, const Tensor& metadata) {
  return launch("unpack_24", {{"values", &values}, {"metadata", &metadata}}, [&](const Launch& on) {
    const TwoFourParts parts = two_four_parts_of(values, metadata);
    const bool capturing = on.capturing();
    if (capturing && !all_ones_is_nan(parts.element)) on.refuse_capture("nor could it show faulty parts as NaN in this dtype");
    const Tensor dense = on.empty(parts.sizes, parts.element.dtype);
    const Proof proof(on, parts.matrix, parts.element.width);
    proof.expand_all(dense.mutable_data_ptr());
    capturing ? proof.poison(dense) : proof.throw_fault();
    return dense;
  });
}

// Of values only their sizes count.
void validate_24(const Tensor& values, const Tensor& metadata) {
  launch("validate_24", {{"values", &values}, {"metadata", &metadata}}, [&](const Launch& on) {
    on.refuse_capture("validate before");
    const Geometry g = geometry(two_four_sizes(values, metadata));
    const Tensor bits = contiguous("metadata", metadata);
    const Proof proof(on, {nullptr, const_bytes(bits), g.rows, g.cols}, 1);
    proof.expand_all(nullptr);
    proof.throw_fault();
  });
}

void prune_24(const Tensor& tensor, bool transposable) {
  const Magnitude magnitude = check_prunable(tensor, transposable);
  const Element element = element_of(tensor, false);
  const Geometry g = geometry(tensor.sizes());
  launch("prune_24", {{"tensor", &tensor}}, [&](const Launch& on) {
    void* const data = tensor.mutable_data_ptr();
    on.check(transposable ? cuda::prune_24_transposable(data, g, linear_dtype_of(element.dtype), on.stream())
                          : cuda::prune_24(data, g, element.width, element.zero_test, magnitude, on.stream()));
  });
}

// ------------------------------------------------------------------------------------------------------------- products

cuda::TwoFourParams params_of(const TwoFourParts& weight, const Tensor& values, const Tensor& x, const std::optional<Tensor>& bias,
                              const Tensor& y) {
  const TwoFourMatrix& w = weight.matrix;
  cuda::TwoFourParams params{};
  params.values = values.const_data_ptr();
  params.metadata = w.metadata;
  params.rows = params.block_rows = w.rows;
  params.cols = params.block_cols = w.cols;
  params.x = x.const_data_ptr();
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  params.y = y.mutable_data_ptr();
  params.m = geometry(x.sizes()).rows;
  params.dtype = linear_dtype_of(weight.element.dtype);
  return params;
}

Tensor linear_24(const Tensor& x, const Tensor& values, const Tensor& metadata, const std::optional<Tensor>& bias) {
  const std::initializer_list<Named> tensors = {{"values", &values}, {"metadata", &metadata}, {"x", &x}, {"bias", bias ? &*bias : &x}};
  return launch("linear_24", tensors, [&](const Launch& on) {
    const TwoFourParts weight = two_four_weight_of(values, metadata);
    const Tensor y = on.empty(linear_sizes(x, weight, bias), weight.element.dtype);
    if (y.numel() == 0) return y;
    const Tensor rows = on.aligned("x", x);
    const std::optional<Tensor> offset = bias ? std::make_optional(contiguous("bias", *bias)) : std::nullopt;
    const Tensor stored = on.aligned("values", weight.values);
    const cuda::TwoFourParams params = params_of(weight, stored, rows, offset, y);
    const cuda::Device device = on.device();
    const cuda::TwoFourPlan plan = cuda::plan_two_four(params, device);
    if (plan.way == cuda::TwoFourWay::kLibrary) {
      linear_by_library(on, weight, Proof(on, weight.matrix, weight.element.width), rows, offset, y);
      return y;
    }
    const Tensor workspace = on.bytes(plan.workspace_bytes);
    const auto run = plan.way == cuda::TwoFourWay::kStream ? cuda::two_four_stream : cuda::two_four_multiply;
    on.check(run(params, device, workspace.mutable_data_ptr(), on.stream()));
    return y;
  });
}

Tensor linear_24_backward_input(const Tensor& grad, const Tensor& values, const Tensor& metadata) {
  const std::initializer_list<Named> tensors = {{"values", &values}, {"metadata", &metadata}, {"grad", &grad}};
  return launch("linear_24_backward_input", tensors, [&](const Launch& on) {
    const TwoFourParts weight = two_four_weight_of(values, metadata);
    const Tensor y = on.empty(backward_input_sizes(grad, weight), weight.element.dtype);
    if (y.numel() == 0) return y;
    backward_input_by_library(on, weight, Proof(on, weight.matrix, weight.element.width), contiguous("grad", grad), y);
    return y;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CUDA, m) {
  m.impl("linear_24", TORCH_BOX(&linear_24));
  m.impl("linear_24_backward_input", TORCH_BOX(&linear_24_backward_input));
  m.impl("pack_24", TORCH_BOX(&pack_24));
  m.impl("prune_24", TORCH_BOX(&prune_24));
  m.impl("unpack_24", TORCH_BOX(&unpack_24));
  m.impl("validate_24", TORCH_BOX(&validate_24));
}

}  // namespace bitmask
