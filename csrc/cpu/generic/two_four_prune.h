// Pruning to 2:4 in rows and in columns at once, so that the transposed weight, which gradients are multiplied with, is 2:4 as well:
// of each 4 x 4 elements the pattern of two in every row and column that keeps the largest sum of magnitudes, found by trying all 90
// (Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", 2024, https://arxiv.org/abs/2404.01847; the patterns are those of
// Hubara et al., 2021, https://arxiv.org/abs/2102.08124).

// Every mask of 16 bits, row by row, that has two bits in each row and each column.
struct TransposablePatterns {
  static constexpr int kCount = 90;
  uint16_t masks[kCount];

  constexpr TransposablePatterns() : masks{} {
    constexpr int kRows[6] = {0x3, 0x5, 0x6, 0x9, 0xa, 0xc};
    int count = 0;
    for (int a : kRows) {
      for (int b : kRows) {
        for (int c : kRows) {
          for (int d : kRows) {
            const bool two_each = (a ^ b ^ c ^ d) == 0 && (a & b & c) == 0 && (a & b & d) == 0 && (a & c & d) == 0 && (b & c & d) == 0 &&
                                  (a | b | c | d) == 0xf;
            if (two_each) masks[count++] = static_cast<uint16_t>(a | b << 4 | c << 8 | d << 12);
          }
        }
      }
    }
  }
};
constexpr TransposablePatterns kTransposable;

template <class L>
void prune_transposable_24(void* dense, int64_t rows, int64_t cols) {
  constexpr int64_t kWidth = L::Element::kWidth;
  uint8_t* const data = static_cast<uint8_t*>(dense);
  for (int64_t row = 0; row < rows; row += 4) {
    for (int64_t col = 0; col < cols; col += 4) {
      double magnitudes[16];
      for (int i = 0; i < 16; ++i) {
        const double element = static_cast<double>(L::Element::widen(data + ((row + i / 4) * cols + col + i % 4) * kWidth));
        magnitudes[i] = element < 0 ? -element : element;
      }
      int best = 0;
      double best_sum = -1;
      for (int pattern = 0; pattern < TransposablePatterns::kCount; ++pattern) {
        double sum = 0;
        for (int i = 0; i < 16; ++i) sum += (kTransposable.masks[pattern] >> i & 1) != 0 ? magnitudes[i] : 0;
        if (sum > best_sum) best = pattern, best_sum = sum;
      }
      for (int i = 0; i < 16; ++i) {
        if ((kTransposable.masks[best] >> i & 1) == 0) __builtin_memset(data + ((row + i / 4) * cols + col + i % 4) * kWidth, 0, kWidth);
      }
    }
  }
}
