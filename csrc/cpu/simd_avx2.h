// The kernels' vector vocabulary for AVX2: no compress instruction, so a table turns 8 (or 4) mask bits into a shuffle. One- and two-byte
// lanes use a byte shuffle, four- and eight-byte lanes a dword permutation whose indices are the same tables widened. pext and pdep are
// avoided: they are microcode on Zen 1 and 2.
struct Simd {
  template <int W>
  static uint64_t nonzero(const uint8_t* src, const ZeroTest& test) {
    const __m256i tested = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(test.bytes)));
    uint64_t mask = 0;
    if constexpr (W == 2) {
      for (int pair = 0; pair < 2; ++pair) mask |= uint64_t{nonzero_words(src + pair * 64, tested)} << (pair * 32);
    } else {
      for (int vector = 0; vector < 2 * W; ++vector) {
        mask |= uint64_t{nonzero_lanes<W>(load(src + vector * 32), tested)} << (vector * (32 / W));
      }
    }
    return mask;
  }

  template <int W>
  static uint8_t* compress(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    for (int at = 0; at < kGroup; at += kLanes<W>) {
      const unsigned lanes = lanes_at<W>(mask, at);
      store_low<kLanes<W> * W>(dst, pack_lanes<W>(load_low<kLanes<W> * W>(src + at * W), lanes));
      dst += __builtin_popcount(lanes) * W;
    }
    return dst;
  }

  template <int W>
  static const uint8_t* expand(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    for (int at = 0; at < kGroup; at += kLanes<W>) {
      const unsigned lanes = lanes_at<W>(mask, at);
      store_low<kLanes<W> * W>(dst + at * W, spread_lanes<W>(load_low<kLanes<W> * W>(src), lanes));
      src += __builtin_popcount(lanes) * W;
    }
    return src;
  }

  template <int W>
  static void compress_pairs(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    for (int at = 0; at < kGroup; at += kLanes<W>) {
      store_low<kLanes<W> * W / 2>(dst + at / 2 * W, pack_lanes<W>(load_low<kLanes<W> * W>(src + at * W), lanes_at<W>(mask, at)));
    }
  }

  template <int W>
  static void expand_pairs(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    for (int at = 0; at < kGroup; at += kLanes<W>) {
      store_low<kLanes<W> * W>(dst + at * W, spread_lanes<W>(load_low<kLanes<W> * W / 2>(src + at / 2 * W), lanes_at<W>(mask, at)));
    }
  }

  template <int W>
  static constexpr int kFoursBytes = 32;

  template <int W, int A, int B, int C, int D, class Vector>
  static Vector permute_fours(Vector lanes) {
    const __m256i v = reinterpret_cast<__m256i>(lanes);
    constexpr int kOrder = A | B << 2 | C << 4 | D << 6;
    if constexpr (W == 1) {
      const __m256i fours = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
      const __m256i order = _mm256_set1_epi32(A | B << 8 | C << 16 | D << 24);
      return reinterpret_cast<Vector>(_mm256_shuffle_epi8(v, _mm256_or_si256(fours, order)));
    } else if constexpr (W == 2) {
      return reinterpret_cast<Vector>(_mm256_shufflehi_epi16(_mm256_shufflelo_epi16(v, kOrder), kOrder));
    } else if constexpr (W == 4) {
      return reinterpret_cast<Vector>(_mm256_shuffle_epi32(v, kOrder));
    } else {
      return reinterpret_cast<Vector>(_mm256_permute4x64_epi64(v, kOrder));
    }
  }

  template <int W, class Vector>
  static uint64_t at_least(Vector a, Vector b) {
    const __m256i left = reinterpret_cast<__m256i>(a), right = reinterpret_cast<__m256i>(b);
    if constexpr (W == 1) return ~move_mask<1>(_mm256_cmpgt_epi8(right, left));
    if constexpr (W == 2) return 0xffffu ^ move_mask<2>(_mm256_cmpgt_epi16(right, left));
    if constexpr (W == 4) return 0xffu ^ move_mask<4>(_mm256_cmpgt_epi32(right, left));
    if constexpr (W == 8) return 0xfu ^ move_mask<8>(_mm256_cmpgt_epi64(right, left));
  }

  // A byte of the mask at a time: its row of the table is the positions, and what marks absent ones is overwritten by the next byte's.
  static int64_t* list(uint64_t mask, int64_t first, int64_t* dst) {
    for (int at = 0; at < kGroup; at += 8) {
      const unsigned lanes = lanes_at<1>(mask, at);
      const __m128i positions = _mm256_castsi256_si128(load_low<8>(kBytes.compress[lanes]));
      const __m256i base = _mm256_set1_epi64x(first + at);
      uint8_t* const to = reinterpret_cast<uint8_t*>(dst);
      store_low<32>(to, _mm256_add_epi64(_mm256_cvtepu8_epi64(positions), base));
      store_low<32>(to + 32, _mm256_add_epi64(_mm256_cvtepu8_epi64(_mm_srli_si128(positions, 4)), base));
      dst += __builtin_popcount(lanes);
    }
    return dst;
  }

 private:
  // Elements that one shuffle handles.
  template <int W>
  static constexpr int kLanes = W <= 4   ? 8
                                : W == 8 ? 4
                                         : 1;

  static constexpr ShuffleTables<8, 1> kBytes{};
  static constexpr ShuffleTables<8, 2> kWords{};
  static constexpr ShuffleTables<4, 2> kPairs{};  // four 8-byte lanes as pairs of dwords

  static __m256i load(const uint8_t* src) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)); }

  // The first kSize bytes of a vector; a load leaves the others undefined.
  template <int kSize>
  static __m256i load_low(const uint8_t* src) {
    if constexpr (kSize == 32) return load(src);
    if constexpr (kSize == 16) return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
    if constexpr (kSize == 8) return _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src)));
    if constexpr (kSize == 4) return _mm256_castsi128_si256(_mm_cvtsi32_si128(load_as<int>(src)));
  }
  template <int kSize>
  static void store_low(uint8_t* dst, __m256i v) {
    const __m128i low = _mm256_castsi256_si128(v);
    if constexpr (kSize == 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), v);
    if constexpr (kSize == 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), low);
    if constexpr (kSize == 8) _mm_storel_epi64(reinterpret_cast<__m128i*>(dst), low);
    if constexpr (kSize == 4) store_as(_mm_cvtsi128_si32(low), dst);
  }

  // The mask bits of the lanes of a shuffle, those from bit `at` on.
  template <int W>
  static unsigned lanes_at(uint64_t mask, int at) {
    return mask >> at & ((1u << kLanes<W>)-1);
  }

  // The marked lanes of a vector, packed.
  template <int W>
  static __m256i pack_lanes(__m256i v, unsigned lanes) {
    if constexpr (W == 1) return shuffle_bytes(v, load_low<8>(kBytes.compress[lanes]));
    if constexpr (W == 2) return shuffle_bytes(v, load_low<16>(kWords.compress[lanes]));
    if constexpr (W == 4) return _mm256_permutevar8x32_epi32(v, dword_indices(kBytes.compress[lanes]));
    if constexpr (W == 8) return _mm256_permutevar8x32_epi32(v, dword_indices(kPairs.compress[lanes]));
    if constexpr (W == 16) return v;
  }

  // The first elements of a vector in the marked lanes, zero in the others.
  template <int W>
  static __m256i spread_lanes(__m256i v, unsigned lanes) {
    if constexpr (W == 1) return shuffle_bytes(v, load_low<8>(kBytes.expand[lanes]));
    if constexpr (W == 2) return shuffle_bytes(v, load_low<16>(kWords.expand[lanes]));
    if constexpr (W == 4) return spread_dwords(v, dword_indices(kBytes.expand[lanes]));
    if constexpr (W == 8) return spread_dwords(v, dword_indices(kPairs.expand[lanes]));
    if constexpr (W == 16) return _mm256_and_si256(v, _mm256_set1_epi64x(-static_cast<int64_t>(lanes)));
  }

  // In the first 16 bytes.
  static __m256i shuffle_bytes(__m256i v, __m256i indices) {
    return _mm256_castsi128_si256(_mm_shuffle_epi8(_mm256_castsi256_si128(v), _mm256_castsi256_si128(indices)));
  }

  static __m256i dword_indices(const uint8_t* table) { return _mm256_cvtepu8_epi32(_mm256_castsi256_si128(load_low<8>(table))); }

  // Permutes dwords; an index of 0x80 gives zero.
  static __m256i spread_dwords(__m256i v, __m256i indices) {
    const __m256i absent = _mm256_srai_epi32(_mm256_slli_epi32(indices, 24), 31);
    return _mm256_andnot_si256(absent, _mm256_permutevar8x32_epi32(v, indices));
  }

  // All ones in every lane of L bytes with no tested bit set.
  template <int L>
  static __m256i zero_lanes(__m256i v, __m256i tested) {
    const __m256i bits = _mm256_and_si256(v, tested);
    const __m256i zero = _mm256_setzero_si256();
    if constexpr (L == 1) return _mm256_cmpeq_epi8(bits, zero);
    if constexpr (L == 2) return _mm256_cmpeq_epi16(bits, zero);
    if constexpr (L == 4) return _mm256_cmpeq_epi32(bits, zero);
    if constexpr (L == 8) return _mm256_cmpeq_epi64(bits, zero);
  }

  // One bit for each lane of L bytes, which are all ones or all zeros.
  template <int L>
  static uint32_t move_mask(__m256i lanes) {
    if constexpr (L == 1) return static_cast<uint32_t>(_mm256_movemask_epi8(lanes));
    if constexpr (L == 2) return move_mask_words(lanes, _mm256_setzero_si256());
    if constexpr (L == 4) return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
    if constexpr (L == 8) return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(lanes)));
  }

  // The same for two vectors of two-byte lanes, narrowed to bytes, whose 8-byte quarters the pack leaves in the order 0 2 1 3.
  static uint32_t move_mask_words(__m256i low, __m256i high) {
    return move_mask<1>(_mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8));
  }

  // One bit for each W-byte element of a vector that has a tested bit set. 16-byte elements are pairs of 8-byte lanes.
  template <int W>
  static uint32_t nonzero_lanes(__m256i v, __m256i tested) {
    if constexpr (W == 1) return ~move_mask<1>(zero_lanes<1>(v, tested));
    if constexpr (W == 4) return 0xffu ^ move_mask<4>(zero_lanes<4>(v, tested));
    if constexpr (W == 8) return 0xfu ^ move_mask<8>(zero_lanes<8>(v, tested));
    if constexpr (W == 16) {
      const uint32_t halves = nonzero_lanes<8>(v, tested);
      const uint32_t pairs = halves | halves >> 1;
      return (pairs & 1) | (pairs >> 1 & 2);
    }
  }

  // The same for 32 two-byte elements.
  static uint32_t nonzero_words(const uint8_t* src, __m256i tested) {
    return ~move_mask_words(zero_lanes<2>(load(src), tested), zero_lanes<2>(load(src + 32), tested));
  }
};

// ---- Lanes of the linear kernels (generic/lanes.h says what they hold): eight columns a vector, multiplied in fp32

struct Float32Operands {
  using Sum = float;
  using Sums = __m256;
  using Lanes = __m256;
  static constexpr int kDepth = 1;
  static constexpr int kLanes = 8;
  static constexpr int kPanelRows = 6;
  static constexpr int kStreamedRows = 4;
  static constexpr int kStreamSums = 4;
  static constexpr int kMicroRows = 4;
  static constexpr int kMicroVectors = 3;
  static constexpr int kSelectedFrom = 0;  // a shuffle for each product costs what is saved

  static Lanes load(const uint8_t* src) { return _mm256_loadu_ps(reinterpret_cast<const float*>(src)); }
  static void store(Lanes lanes, uint8_t* dst) { _mm256_storeu_ps(reinterpret_cast<float*>(dst), lanes); }
  static Lanes broadcast(const uint8_t* src) { return _mm256_set1_ps(load_as<float>(src)); }
  static Sums multiply_add(Lanes a, Lanes b, Sums sums) { return _mm256_fmadd_ps(a, b, sums); }
  static Sums zero() { return _mm256_setzero_ps(); }
  static Sums add(Sums a, Sums b) { return _mm256_add_ps(a, b); }
  static Sums load_sums(const uint8_t* src) { return load(src); }
  static void store_sums(Sums sums, uint8_t* dst) { store(sums, dst); }

  static Sum reduce(Sums sums) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // Pairs of rows are interleaved by lanes, then by pairs of lanes; what is then left to exchange are halves of vectors.
  static void transpose(const uint8_t* src, int64_t stride, uint8_t* dst) {
    __m256 pairs[8], quads[8];
    for (int row = 0; row < 8; row += 2) {
      const __m256 even = load(src + row * stride);
      const __m256 odd = load(src + (row + 1) * stride);
      pairs[row] = _mm256_unpacklo_ps(even, odd);
      pairs[row + 1] = _mm256_unpackhi_ps(even, odd);
    }
    for (int row = 0; row < 8; row += 4) {
      for (int half = 0; half < 2; ++half) {
        quads[row + 2 * half] = _mm256_shuffle_ps(pairs[row + half], pairs[row + half + 2], 0x44);
        quads[row + 2 * half + 1] = _mm256_shuffle_ps(pairs[row + half], pairs[row + half + 2], 0xee);
      }
    }
    for (int lane = 0; lane < 4; ++lane) {
      store(_mm256_permute2f128_ps(quads[lane], quads[4 + lane], 0x20), dst + lane * 32);
      store(_mm256_permute2f128_ps(quads[lane], quads[4 + lane], 0x31), dst + (lane + 4) * 32);
    }
  }
};

struct Float32Lanes : Float32Operands {
  using Element = Float32Element;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[8]) {
    alignas(32) uint8_t dense[kGroup * 4];
    src = Simd::expand<4>(src, mask, dense);
    for (int vector = 0; vector < 8; ++vector) lanes[vector] = load(dense + vector * 32);
    return src;
  }
  static Lanes widen(const uint8_t* src) { return load(src); }
  static void round(Sums sums, uint8_t* dst) { store(sums, dst); }
};

struct Float16Lanes : Float32Operands {
  using Element = Float16Element;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[8]) {
    alignas(32) uint8_t dense[kGroup * 2];
    src = Simd::expand<2>(src, mask, dense);
    for (int vector = 0; vector < 8; ++vector) lanes[vector] = widen(dense + vector * 16);
    return src;
  }
  static Lanes widen(const uint8_t* src) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))); }
  static void round(Sums sums, uint8_t* dst) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct Bfloat16Lanes : Float32Operands {
  using Element = Bfloat16Element;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[8]) {
    alignas(32) uint8_t dense[kGroup * 2];
    src = Simd::expand<2>(src, mask, dense);
    for (int vector = 0; vector < 8; ++vector) lanes[vector] = widen(dense + vector * 16);
    return src;
  }
  static Lanes widen(const uint8_t* src) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

  // Bfloat16Element::narrow in each lane.
  static void round(Sums sums, uint8_t* dst) {
    const __m256i bits = _mm256_castps_si256(sums);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(sums, sums, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_castsi256_si128(packed));
  }
};
