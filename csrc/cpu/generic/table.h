// The kernel table of an instruction set, from the algorithms of the headers before it.

// L multiplies, G takes gradients: one column in each lane, because there rows of W would have to be paired.
template <class L, class G = L>
constexpr LinearKernels linear_kernels() {
  static_assert(G::kDepth == 1 && kVectors<G> % kStrips == 0, "strips of a gradient are pieces of rows");
  static_assert(G::kPanelRows == L::kPanelRows, "x and g are packed into panels of the same size");
  static_assert(kBlockRows % L::kPanelRows == 0 && L::kPanelRows % 3 == 0 && kTileRows % (kStrips * L::kLanes) == 0, "");
  static_assert(L::kStreamSums >= L::kStreamedRows, "stream keeps the sums of at least one row of W");
  LinearKernels kernels{};
  kernels.group_bytes = kGroupBytes<L>;
  kernels.streaming_rows = L::kStreamedRows;
  kernels.panel_rows = L::kPanelRows;
  kernels.block_rows = kBlockRows;
  kernels.tile_rows = kTileRows;
  kernels.scratch_bytes = sizeof(Scratch<L>);
  kernels.pack_rows = pack_rows<L>;
  kernels.pack_panel = pack_panel<L>;
  kernels.stream = stream<L, BitmaskRows>;
  kernels.multiply = multiply<L>;
  kernels.gradient_group_bytes = kGroupBytes<G>;
  kernels.gradient_scratch_bytes = sizeof(Scratch<G>);
  kernels.reader_bytes = sizeof(RowReader<G, true>);
  kernels.pack_gradient = pack_panel<G>;
  kernels.multiply_transposed = multiply_transposed<G>;
  return kernels;
}

template <class L>
constexpr BlockKernels block_kernels() {
  BlockKernels kernels{};
  kernels.streaming_rows = L::kStreamedRows;
  kernels.rows_bytes = block_rows_bytes<L>;
  kernels.pack_rows = block_pack_rows<L>;
  kernels.stream = block_stream<L>;
  kernels.tile_rows = kBlockTileRows<L>;
  kernels.most_rows = kBlockMostRows;
  kernels.tiles_bytes = block_tiles_bytes<L>;
  kernels.pack_tiles = block_pack_tiles<L>;
  kernels.multiply = block_multiply<L>;
  kernels.multiply_transposed = block_multiply_transposed<L>;
  kernels.sampled_rows = kBlockSampledRows<L>;
  kernels.columns_bytes = block_columns_bytes<L>;
  kernels.pack_columns = block_pack_columns<L>;
  kernels.sample = block_sample<L>;
  kernels.sum_bytes = sizeof(typename L::Sum);
  kernels.scratch_bytes = kBlockScratchBytes<L> > kBlockStreamScratchBytes<L> ? kBlockScratchBytes<L> : kBlockStreamScratchBytes<L>;
  return kernels;
}

template <class L>
constexpr TwoFourLinearKernels two_four_linear_kernels() {
  TwoFourLinearKernels kernels{};
  kernels.streaming_rows = L::kStreamedRows;
  kernels.stream = stream<L, TwoFourRows>;
  if constexpr (L::kSelectedFrom != 0) {
    kernels.tile_rows = L::kPanelRows;
    static_assert(kTwoFourMostRows % L::kPanelRows == 0, "whole panels");
    kernels.most_rows = kTwoFourMostRows;
    kernels.scratch_bytes = sizeof(Scratch<L>);
    kernels.tiles_bytes = two_four_tiles_bytes<L>;
    kernels.pack_tiles = two_four_pack_tiles<L>;
    kernels.multiply = two_four_multiply<L>;
  }
  kernels.prune_transposable = prune_transposable_24<L>;
  return kernels;
}

template <int W>
constexpr ConvertValueKernels convert_value_kernels() {
  return {transpose_values<W>, expand_blocks<W>, build_block_bitmasks<W>, pack_block_values<W>};
}

constexpr ConvertKernels convert_kernels() {
  return {list_columns,
          mark_columns,
          start_rows,
          transpose_bits,
          mark_blocks,
          {convert_value_kernels<1>(), convert_value_kernels<2>(), convert_value_kernels<4>(), convert_value_kernels<8>(),
           convert_value_kernels<16>()}};
}

// F32, BF16, F16  how this instruction set multiplies each dtype (lanes.h says what such a type holds)
// GradientBF16    the same for gradients: one column in each lane
template <class F32, class BF16, class F16, class GradientBF16 = BF16>
constexpr Kernels make_kernels(const char* isa) {
  return {
      isa,
      {codec_kernels<1>(), codec_kernels<2>(), codec_kernels<4>(), codec_kernels<8>(), codec_kernels<16>()},
      {linear_kernels<F32>(), linear_kernels<BF16, GradientBF16>(), linear_kernels<F16>(), linear_kernels<PortableLanes<Float64Element>>()},
      {block_kernels<F32>(), block_kernels<BF16>(), block_kernels<F16>(), block_kernels<PortableLanes<Float64Element>>()},
      {two_four_codec_kernels<1>(), two_four_codec_kernels<2>(), two_four_codec_kernels<4>(), two_four_codec_kernels<8>()},
      {two_four_linear_kernels<F32>(), two_four_linear_kernels<BF16>(), two_four_linear_kernels<F16>(),
       two_four_linear_kernels<PortableLanes<Float64Element>>()},
      convert_kernels(),
      count_bits,
      first_faulty_row,
      first_faulty_metadata};
}
