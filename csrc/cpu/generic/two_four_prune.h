// Pruning to 2:4 in rows and in columns at once, so that the transposed weight, which gradients are multiplied with, is 2:4 as well:
// of each 4 x 4 elements the pattern of two in every row and column that keeps the largest sum of magnitudes, found by trying all 90
// (Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", 2024, https://arxiv.org/abs/2404.01847; the patterns are those of
// Hubara et al., 2021, https://arxiv.org/abs/2102.08124).
//
// A lane holds a block of 4 x 4, the blocks of a vector lie side by side. Sums are of doubles, row 0 and row 1 first, then row 2 and row 3,
// then both. More NaNs are better than fewer, then more infinities, then a larger sum of the others; of equally good patterns the first one
// stays (two_four_patterns.h has them in their order).

constexpr int kBlocksPerVector = Simd::kFoursBytes<4> / 8;  // those of a vector register
constexpr int kBlockVectors = 2;                            // searched side by side, because each comparison waits for the one before
typedef double BlockLanes __attribute__((vector_size(kBlocksPerVector * 8)));
typedef int64_t BlockMarks __attribute__((vector_size(kBlocksPerVector * 8)));  // all ones or zero, or numbers of patterns

// The sums of the patterns of both halves.
struct HalfSums {
  BlockLanes upper[kHalfPatterns], lower[kHalfPatterns];

  void add_up(const BlockLanes (&terms)[16]) {
    add_up_half(terms, upper);
    add_up_half(terms + 8, lower);
  }

 private:
  static void add_up_half(const BlockLanes* terms, BlockLanes* sums) {
    BlockLanes rows[2][kRowPatterns];
    for (int row = 0; row < 2; ++row) {
      int pattern = 0;
      for (int last = 1; last < 4; ++last) {
        for (int first = 0; first < last; ++first) rows[row][pattern++] = terms[row * 4 + first] + terms[row * 4 + last];
      }
    }
    for (const BlockLanes& first : rows[0]) {
      for (const BlockLanes& second : rows[1]) *sums++ = first + second;
    }
  }
};

// Bits of fp64 magnitudes, which compare as these do.
constexpr int64_t kLeastNormal = 0x0010000000000000;
constexpr int64_t kTooLarge = 0x7e70000000000000;  // 2^1000
constexpr int64_t kInfinity = 0x7ff0000000000000;

// The best pattern of each block. `ranks` may be null.
inline void find_best(const HalfSums (&sums)[kBlockVectors], const HalfSums* ranks, BlockMarks (&best)[kBlockVectors]) {
  BlockLanes best_sum[kBlockVectors] = {}, best_rank[kBlockVectors] = {};
  for (BlockMarks& patterns : best) patterns = BlockMarks{};
  for (int pattern = 0; pattern < TransposablePatterns::kCount; ++pattern) {
    const int upper = kTransposable.upper[pattern], lower = kTransposable.lower[pattern];
    for (int i = 0; i < kBlockVectors; ++i) {
      const BlockLanes sum = sums[i].upper[upper] + sums[i].lower[lower];
      BlockMarks better = sum > best_sum[i];
      if (ranks != nullptr) {
        const BlockLanes rank = ranks[i].upper[upper] + ranks[i].lower[lower];
        better = (rank > best_rank[i]) | ((rank == best_rank[i]) & better);
        best_rank[i] = better ? rank : best_rank[i];
      }
      best_sum[i] = better ? sum : best_sum[i];
      best[i] = better ? BlockMarks{} + pattern : best[i];
    }
  }
}

// The same for magnitudes that are not all zeros or normal numbers below 2^1000: those that are not finite are ranked, others scaled where
// their sum might not be finite, or where they might be subnormal, which some modes of the processor take for zero.
__attribute__((noinline, cold)) inline void find_best_of_extremes(const BlockLanes (&magnitudes)[kBlockVectors][16],
                                                                  BlockMarks (&best)[kBlockVectors]) {
  HalfSums sums[kBlockVectors], rank_sums[kBlockVectors];
  for (int i = 0; i < kBlockVectors; ++i) {
    BlockLanes terms[16], ranks[16];
    for (int lane = 0; lane < kBlocksPerVector; ++lane) {
      double largest = 0;
      for (const BlockLanes& magnitude : magnitudes[i]) {
        if (bits_as<int64_t>(magnitude[lane]) < kInfinity && magnitude[lane] > largest) largest = magnitude[lane];
      }
      const double scale = largest >= 0x1p1000 ? 0x1p-8 : largest < 0x1p400 ? 0x1p600 : 1;
      for (int at = 0; at < 16; ++at) {
        const double magnitude = magnitudes[i][at][lane];
        const int64_t bits = bits_as<int64_t>(magnitude);
        ranks[at][lane] = bits < kInfinity ? 0 : bits == kInfinity ? 1 : 16;
        // A subnormal is its bits, as an integer, times 2^-1074.
        const double scaled = bits < kLeastNormal ? static_cast<double>(bits) * 0x1p-474 * (scale * 0x1p-600) : magnitude * scale;
        terms[at][lane] = bits < kInfinity ? scaled : 0;
      }
    }
    sums[i].add_up(terms);
    rank_sums[i].add_up(ranks);
  }
  find_best(sums, rank_sums, best);
}

// A number as fp64, by its bits where it is an fp32 subnormal, for the same modes.
inline double as_double(double number) { return number; }
inline double as_double(float number) {
  const uint32_t bits = bits_as<uint32_t>(number) & 0x7fffffff;
  return bits < 0x00800000 ? static_cast<double>(static_cast<int32_t>(bits)) * 0x1p-149 : static_cast<double>(number);
}

// The magnitudes of the blocks that begin with column `col` of four rows. Returns whether all are zeros or normal numbers below 2^1000.
template <class Element>
inline bool load_magnitudes(uint8_t* const (&rows)[4], int col, BlockLanes (&magnitudes)[16]) {
  BlockMarks extreme{};
  for (int row = 0; row < 4; ++row) {
    const uint8_t* const src = rows[row] + col * Element::kWidth;
    double elements[4 * kBlocksPerVector];
    for (int i = 0; i < 4 * kBlocksPerVector; ++i) elements[i] = as_double(Element::widen(src + i * Element::kWidth));
    for (int i = 0; i < 4; ++i) {
      BlockLanes lanes;
      for (int lane = 0; lane < kBlocksPerVector; ++lane) lanes[lane] = elements[lane * 4 + i];
      const BlockMarks bits = reinterpret_cast<BlockMarks>(lanes) & INT64_MAX;
      lanes = reinterpret_cast<BlockLanes>(bits);
      extreme |= (bits >= kTooLarge) | ((bits != 0) & (bits < kLeastNormal));
      magnitudes[row * 4 + i] = lanes;
    }
  }
  int64_t any = 0;
  for (int lane = 0; lane < kBlocksPerVector; ++lane) any |= extreme[lane];
  return any == 0;
}

// Prunes 64 columns of four rows.
template <class Element>
inline void prune_four_rows(uint8_t* const (&rows)[4]) {
  uint64_t masks[4] = {};
  for (int col = 0; col < kGroup; col += 4 * kBlocksPerVector * kBlockVectors) {
    BlockLanes magnitudes[kBlockVectors][16];
    HalfSums sums[kBlockVectors];
    BlockMarks best[kBlockVectors];
    bool moderate = true;
    for (int i = 0; i < kBlockVectors; ++i) moderate &= load_magnitudes<Element>(rows, col + i * 4 * kBlocksPerVector, magnitudes[i]);
    if (moderate) {
      for (int i = 0; i < kBlockVectors; ++i) sums[i].add_up(magnitudes[i]);
      find_best(sums, nullptr, best);
    } else {
      find_best_of_extremes(magnitudes, best);
    }
    for (int block = 0; block < kBlockVectors * kBlocksPerVector; ++block) {
      const int64_t pattern = best[block / kBlocksPerVector][block % kBlocksPerVector];
      for (int row = 0; row < 4; ++row) {
        masks[row] |= static_cast<uint64_t>(kTransposable.row(static_cast<int>(pattern), row)) << (col + block * 4);
      }
    }
  }
  for (int row = 0; row < 4; ++row) keep_pairs<Element::kWidth>(rows[row], masks[row]);
}

template <class L>
void prune_transposable_24(void* dense, int64_t rows, int64_t cols) {
  using Element = typename L::Element;
  constexpr int64_t kWidth = Element::kWidth;
  const int64_t row_bytes = cols * kWidth, tail = cols % kGroup;
  for (int64_t row = 0; row < rows; row += 4) {
    uint8_t* const src = static_cast<uint8_t*>(dense) + row * row_bytes;
    for (int64_t col = 0; col < cols - tail; col += kGroup) {
      uint8_t* const group = src + col * kWidth;
      prune_four_rows<Element>({group, group + row_bytes, group + 2 * row_bytes, group + 3 * row_bytes});
    }
    if (tail != 0) {
      uint8_t* const group = src + (cols - tail) * kWidth;
      uint8_t edges[4][kGroup * kWidth] = {};
      for (int i = 0; i < 4; ++i) copy_bytes(edges[i], group + i * row_bytes, tail * kWidth);
      prune_four_rows<Element>({edges[0], edges[1], edges[2], edges[3]});
      for (int i = 0; i < 4; ++i) copy_bytes(group + i * row_bytes, edges[i], tail * kWidth);
    }
  }
}
