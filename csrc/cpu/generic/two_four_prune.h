// Pruning to 2:4 in rows and in columns at once, so that the transposed weight, which gradients are multiplied with, is 2:4 as well:
// of each 4 x 4 elements the pattern of two in every row and column that keeps the largest sum of magnitudes, found by trying all 90
// (Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", 2024, https://arxiv.org/abs/2404.01847; the patterns are those of
// Hubara et al., 2021, https://arxiv.org/abs/2102.08124).
//
// A lane holds a block of 4 x 4, the blocks of a vector lie side by side. Sums are of doubles, row 0 and row 1 first, then row 2 and row 3,
// then both. More NaNs are better than fewer, then more infinities, then a larger sum of the others; of equally good patterns the first one
// stays. They are in the order of their rows, the first row counting most, and rows in that of their last, then their first column.

constexpr int kRowPatterns = 6;
constexpr int kHalfPatterns = kRowPatterns * kRowPatterns;  // of two rows: kRowPatterns * that of the first + that of the second
constexpr int kRowPattern[kRowPatterns] = {0x3, 0x5, 0x6, 0x9, 0xa, 0xc};

struct TransposablePatterns {
  static constexpr int kCount = 90;
  uint8_t upper[kCount], lower[kCount];  // patterns of the two halves

  constexpr TransposablePatterns() : upper(), lower() {
    int count = 0;
    for (int halves = 0; halves < kHalfPatterns * kHalfPatterns; ++halves) {
      const int high = halves / kHalfPatterns, low = halves % kHalfPatterns;
      if (in_columns(high) + in_columns(low) != 0x2222) continue;
      upper[count] = static_cast<uint8_t>(high);
      lower[count++] = static_cast<uint8_t>(low);
    }
  }

  // The elements that a half has in each column, a hexadecimal digit each.
  static constexpr int in_columns(int half) { return digits(kRowPattern[half / kRowPatterns]) + digits(kRowPattern[half % kRowPatterns]); }
  static constexpr int digits(int row) { return (row & 1) | (row & 2) << 3 | (row & 4) << 6 | (row & 8) << 9; }
};
constexpr TransposablePatterns kTransposable;

constexpr int kBlockLanes = Simd::kFoursBytes<4> / 8;  // those of a vector register
typedef double BlockLanes __attribute__((vector_size(kBlockLanes * 8)));
typedef int64_t BlockMarks __attribute__((vector_size(kBlockLanes * 8)));  // all ones or zero

// The sums of the patterns of both halves.
struct HalfSums {
  BlockLanes upper[kHalfPatterns], lower[kHalfPatterns];

  explicit HalfSums(const BlockLanes (&terms)[16]) {
    add_up(terms, upper);
    add_up(terms + 8, lower);
  }

 private:
  static void add_up(const BlockLanes* terms, BlockLanes (&halves)[kHalfPatterns]) {
    BlockLanes rows[2][kRowPatterns];
    for (int row = 0; row < 2; ++row) {
      int pattern = 0;
      for (int last = 1; last < 4; ++last) {
        for (int first = 0; first < last; ++first) rows[row][pattern++] = terms[row * 4 + first] + terms[row * 4 + last];
      }
    }
    for (int half = 0; half < kHalfPatterns; ++half) halves[half] = rows[0][half / kRowPatterns] + rows[1][half % kRowPatterns];
  }
};

inline void replace(BlockMarks& old, const BlockMarks& where, const BlockMarks& by) { old = (old & ~where) | (by & where); }

// The best pattern of each block. `ranks` may be null.
inline BlockMarks best_patterns(const HalfSums& sums, const HalfSums* ranks) {
  BlockMarks best{}, best_sum{}, best_rank{};
  for (int pattern = 0; pattern < TransposablePatterns::kCount; ++pattern) {
    const int upper = kTransposable.upper[pattern], lower = kTransposable.lower[pattern];
    const BlockLanes sum = sums.upper[upper] + sums.lower[lower];
    BlockMarks better = sum > reinterpret_cast<BlockLanes>(best_sum);
    if (ranks != nullptr) {
      const BlockLanes rank = ranks->upper[upper] + ranks->lower[lower], other = reinterpret_cast<BlockLanes>(best_rank);
      better = (rank > other) | ((rank == other) & better);
      replace(best_rank, better, reinterpret_cast<BlockMarks>(rank));
    }
    replace(best_sum, better, reinterpret_cast<BlockMarks>(sum));
    replace(best, better, BlockMarks{} + pattern);
  }
  return best;
}

// Magnitudes that are not all below 2^1000: those that are not finite are ranked, others scaled where their sum might not be finite.
__attribute__((noinline, cold)) inline BlockMarks best_extreme_patterns(const BlockLanes (&magnitudes)[16]) {
  BlockLanes terms[16], ranks[16], scale = BlockLanes{} + 1;
  for (int i = 0; i < 16; ++i) {
    for (int lane = 0; lane < kBlockLanes; ++lane) {
      const double magnitude = magnitudes[i][lane];
      const bool finite = magnitude <= 0x1.fffffffffffffp1023;
      ranks[i][lane] = finite ? 0 : magnitude == magnitude ? 1 : 16;
      terms[i][lane] = finite ? magnitude : 0;
      if (terms[i][lane] >= 0x1p1000) scale[lane] = 0x1p-8;
    }
  }
  for (BlockLanes& term : terms) term *= scale;
  const HalfSums rank_sums(ranks);
  return best_patterns(HalfSums(terms), &rank_sums);
}

// The best patterns of the blocks that begin with column `col` of four rows, in lanes.
template <class Element>
inline BlockMarks choose_patterns(uint8_t* const (&rows)[4], int col) {
  BlockLanes magnitudes[16];
  BlockMarks extreme{};
  for (int i = 0; i < 16; ++i) {
    BlockLanes elements;
    for (int lane = 0; lane < kBlockLanes; ++lane) {
      elements[lane] = static_cast<double>(Element::widen(rows[i / 4] + (col + lane * 4 + i % 4) * Element::kWidth));
    }
    magnitudes[i] = reinterpret_cast<BlockLanes>(reinterpret_cast<BlockMarks>(elements) & INT64_MAX);
    extreme |= ~(magnitudes[i] < 0x1p1000);
  }
  int64_t any = 0;
  for (int lane = 0; lane < kBlockLanes; ++lane) any |= extreme[lane];
  return any != 0 ? best_extreme_patterns(magnitudes) : best_patterns(HalfSums(magnitudes), nullptr);
}

// Prunes 64 columns of four rows.
template <class Element>
inline void prune_four_rows(uint8_t* const (&rows)[4]) {
  uint64_t masks[4] = {};
  for (int col = 0; col < kGroup; col += 4 * kBlockLanes) {
    const BlockMarks patterns = choose_patterns<Element>(rows, col);
    for (int lane = 0; lane < kBlockLanes; ++lane) {
      const int upper = kTransposable.upper[patterns[lane]], lower = kTransposable.lower[patterns[lane]];
      const int of_rows[4] = {upper / kRowPatterns, upper % kRowPatterns, lower / kRowPatterns, lower % kRowPatterns};
      for (int row = 0; row < 4; ++row) masks[row] |= static_cast<uint64_t>(kRowPattern[of_rows[row]]) << (col + lane * 4);
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
