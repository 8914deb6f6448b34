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

  // A byte of the mask at a time: its row of the table is the positions, and what marks absent ones is overwritten by the next byte's.
  static int64_t* list(uint64_t mask, int64_t first, int64_t* dst) {
    for (int at = 0; at < kGroup; at += 8) {
      const unsigned lanes = mask >> at & 0xff;
      const __m128i positions = load_low(kBytes.compress[lanes]);
      const __m256i base = _mm256_set1_epi64x(first + at);
      uint8_t* const to = reinterpret_cast<uint8_t*>(dst);
      store(to, _mm256_add_epi64(_mm256_cvtepu8_epi64(positions), base));
      store(to + 32, _mm256_add_epi64(_mm256_cvtepu8_epi64(_mm_srli_si128(positions, 4)), base));
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
