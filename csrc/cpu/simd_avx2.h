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
    for (int at = 0; at < kGroup; at += kLanes<W>, src += kLanes<W> * W) {
      const unsigned lanes = mask >> at & ((1u << kLanes<W>)-1);
      if constexpr (W == 1) {
        store_low(dst, _mm_shuffle_epi8(load_low(src), load_low(kBytes.compress[lanes])));
      } else if constexpr (W == 2) {
        store(dst, _mm_shuffle_epi8(load_128(src), load_128(kWords.compress[lanes])));
      } else if constexpr (W == 4) {
        store(dst, _mm256_permutevar8x32_epi32(load(src), dword_indices(kBytes.compress[lanes])));
      } else if constexpr (W == 8) {
        store(dst, _mm256_permutevar8x32_epi32(load(src), dword_indices(kPairs.compress[lanes])));
      } else {
        store(dst, load_128(src));
      }
      dst += __builtin_popcount(lanes) * W;
    }
    return dst;
  }

  template <int W>
  static const uint8_t* expand(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    for (int at = 0; at < kGroup; at += kLanes<W>, dst += kLanes<W> * W) {
      const unsigned lanes = mask >> at & ((1u << kLanes<W>)-1);
      if constexpr (W == 1) {
        store_low(dst, _mm_shuffle_epi8(load_low(src), load_low(kBytes.expand[lanes])));
      } else if constexpr (W == 2) {
        store(dst, _mm_shuffle_epi8(load_128(src), load_128(kWords.expand[lanes])));
      } else if constexpr (W == 4) {
        store(dst, spread_dwords(load(src), dword_indices(kBytes.expand[lanes])));
      } else if constexpr (W == 8) {
        store(dst, spread_dwords(load(src), dword_indices(kPairs.expand[lanes])));
      } else {
        store(dst, _mm_and_si128(load_128(src), _mm_set1_epi64x(-static_cast<int64_t>(lanes))));
      }
      src += __builtin_popcount(lanes) * W;
    }
    return src;
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
  static __m128i load_128(const uint8_t* src) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src)); }
  static __m128i load_low(const uint8_t* src) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(src)); }
  static void store(uint8_t* dst, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), v); }
  static void store(uint8_t* dst, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), v); }
  static void store_low(uint8_t* dst, __m128i v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(dst), v); }

  static __m256i dword_indices(const uint8_t* table) { return _mm256_cvtepu8_epi32(load_low(table)); }

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

  // One bit for each W-byte element of a vector that has a tested bit set. 16-byte elements are pairs of 8-byte lanes.
  template <int W>
  static uint32_t nonzero_lanes(__m256i v, __m256i tested) {
    if constexpr (W == 1) return ~static_cast<uint32_t>(_mm256_movemask_epi8(zero_lanes<1>(v, tested)));
    if constexpr (W == 4) return 0xffu ^ static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(zero_lanes<4>(v, tested))));
    if constexpr (W == 8) return 0xfu ^ static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(zero_lanes<8>(v, tested))));
    if constexpr (W == 16) {
      const uint32_t halves = 0xfu ^ static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(zero_lanes<8>(v, tested))));
      const uint32_t pairs = halves | halves >> 1;
      return (pairs & 1) | (pairs >> 1 & 2);
    }
  }

  // The same for 32 two-byte elements: both vectors narrowed to bytes, whose 8-byte quarters the pack leaves in the order 0 2 1 3.
  static uint32_t nonzero_words(const uint8_t* src, __m256i tested) {
    const __m256i bytes = _mm256_packs_epi16(zero_lanes<2>(load(src), tested), zero_lanes<2>(load(src + 32), tested));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)));
  }
};
