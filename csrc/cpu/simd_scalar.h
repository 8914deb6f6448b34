// The kernels' vector vocabulary in plain C++, for any 64-bit little-endian machine. Costs follow the set bits, not the columns.
struct Simd {
  template <int W>
  static uint64_t nonzero(const uint8_t* src, const ZeroTest& test) {
    constexpr int kLanes = W < 8 ? 8 / W : 1;  // elements a step: those of a 64-bit word, or one
    uint64_t mask = 0;
    for (int i = 0; i < kGroup; i += kLanes) mask |= nonzero_lanes<W>(src + i * W, test) << i;
    return mask;
  }

  template <int W>
  static uint8_t* compress(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    for (; mask != 0; mask &= mask - 1, dst += W) __builtin_memcpy(dst, src + __builtin_ctzll(mask) * W, W);
    return dst;
  }

  template <int W>
  static const uint8_t* expand(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    __builtin_memset(dst, 0, kGroup * W);
    for (; mask != 0; mask &= mask - 1, src += W) __builtin_memcpy(dst + __builtin_ctzll(mask) * W, src, W);
    return src;
  }

  template <int W>
  static void compress_pairs(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    compress<W>(src, mask, dst);
  }

  template <int W>
  static void expand_pairs(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    expand<W>(src, mask, dst);
  }

  template <int W>
  static constexpr int kFoursBytes = 4 * W;

  template <int W, int A, int B, int C, int D, class Vector>
  static Vector permute_fours(const Vector& v) {
    return Vector{v[A], v[B], v[C], v[D]};
  }

  template <int W, class Vector>
  static uint64_t at_least(const Vector& a, const Vector& b) {
    uint64_t mask = 0;
    for (int lane = 0; lane < 4; ++lane) mask |= uint64_t{a[lane] >= b[lane]} << lane;
    return mask;
  }

  static int64_t* list(uint64_t mask, int64_t first, int64_t* dst) {
    for (; mask != 0; mask &= mask - 1) *dst++ = first + __builtin_ctzll(mask);
    return dst;
  }

 private:
  static uint64_t load(const uint8_t* src) {
    uint64_t word;
    __builtin_memcpy(&word, src, 8);
    return word;
  }

  // One bit for each W-byte element of a word (or of one 16-byte element) that has a tested bit set.
  template <int W>
  static uint64_t nonzero_lanes(const uint8_t* src, const ZeroTest& test) {
    const uint64_t bits = load(src) & load(test.bytes);
    if constexpr (W == 16) {
      return (bits | (load(src + 8) & load(test.bytes + 8))) != 0;
    } else if constexpr (W == 8) {
      return bits != 0;
    } else {
      // Adding a lane's low ones carries into its top bit iff a low bit is set; a multiplication then brings the lanes' bits side by
      // side at the top: lane i from bit i * kSize to bit 64 - kSize + i.
      constexpr int kSize = 8 * W;
      constexpr uint64_t kOnes = ~uint64_t{0} / ((uint64_t{1} << kSize) - 1);
      constexpr uint64_t kLow = kOnes * ((uint64_t{1} << (kSize - 1)) - 1);
      uint64_t gather = 0;
      for (int lane = 0; lane < 64 / kSize; ++lane) gather |= uint64_t{1} << (64 - kSize + lane - lane * kSize);
      const uint64_t marked = (((bits & kLow) + kLow) | bits) >> (kSize - 1) & kOnes;
      return marked * gather >> (64 - kSize);
    }
  }
};
