// The kernel table of an instruction set, from the algorithms of the headers before it.
//
// F32, BF16, F16  how this instruction set multiplies each dtype (lanes.h says what such a type holds)
// GradientBF16    the same for gradients: one column in each lane
template <class F32, class BF16, class F16, class GradientBF16 = BF16>
constexpr Kernels make_kernels(const char* isa) {
  return {
      isa,
      {codec_kernels<1>(), codec_kernels<2>(), codec_kernels<4>(), codec_kernels<8>(), codec_kernels<16>()},
      {linear_kernels<F32>(), linear_kernels<BF16, GradientBF16>(), linear_kernels<F16>(), linear_kernels<PortableLanes<Float64Element>>()},
      count_bits,
      first_faulty_row};
}
